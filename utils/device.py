"""The device on which a run computes, and its precision."""

import contextlib
import os
import platform
from collections.abc import Iterator

import torch

from utils.errors import UserError, quoted

CUBLAS_WORKSPACE = ":4096:8"  # makes cuBLAS deterministic, as NVIDIA documents


def pick(name: str, process: int = 0, processes: int = 1) -> torch.device:
    """The device that the setting ``device`` names: auto (a GPU if there is one), cpu, cuda, or cuda:N.

    Of several ``processes`` on one machine, number ``process`` gets the GPU of that number. Raises `UserError` for an
    absent GPU, for other names, and for processes that would share a GPU.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, colon, number = name.partition(":")
    if name != "cpu" and (kind != "cuda" or (colon and not (number.isdecimal() and len(number) < 5))):
        raise UserError(f"device={quoted(name)}: must be auto, cpu, cuda or cuda:N")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"device={name}: PyTorch finds no GPU here; set device=cpu or device=auto, or repair the driver"
        )
    count = torch.cuda.device_count()
    if colon and int(number) >= count:
        raise UserError(f"device={name}: there {'is' if count == 1 else 'are'} {count}; the last is cuda:{count - 1}")
    if kind == "cpu" or processes == 1:
        return torch.device(name)
    if colon:
        raise UserError(f"device={name}: {processes} processes cannot share a GPU; with device=cuda each has its own")
    if processes > count:
        raise UserError(f"{processes} processes, {count} GPUs: start {count} (--nproc_per_node) or set device=cpu")
    return torch.device("cuda", process)


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """A context in which networks compute in ``precision``: float32, tf32 and fp16 (GPU only, else `UserError`), bf16.

    tf32 is float32 with products in TF32, see `prepare`.
    """
    if precision in ("tf32", "fp16") and device.type == "cpu":
        raise UserError(f"precision={precision} needs a GPU; set precision=bf16 or precision=float32 on the CPU")
    if precision in ("float32", "tf32"):
        return contextlib.nullcontext()
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(f"precision=bf16: {describe(device)} has no bf16; set precision=fp16 or precision=float32")
    return torch.autocast(device.type, {"bf16": torch.bfloat16, "fp16": torch.float16}[precision])


def prepare(device: torch.device, precision: str, deterministic: bool = False) -> None:
    """Make ``device`` the current one, and set the precision of float32 products on a GPU.

    With precision=float32 they are computed in float32, for convolutions and matrices alike; with all others in TF32
    (10 bits of mantissa), also the operations that a reduced precision leaves in float32. PyTorch's default is TF32 for
    convolutions only. ``deterministic`` allows only algorithms that give the same bits every time; an operation that
    has none raises a RuntimeError when it runs, see `deterministic_errors`.
    """
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.deterministic = deterministic
    if deterministic:
        # Read when the GPU computes its first product.
        config = os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", CUBLAS_WORKSPACE)
        if config not in (CUBLAS_WORKSPACE, ":16:8"):
            raise UserError(f"deterministic=true: products are not with CUBLAS_WORKSPACE_CONFIG={config}; unset it")
    if device.type == "cuda":
        torch.cuda.set_device(torch.cuda.current_device() if device.index is None else device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision != "float32"


@contextlib.contextmanager
def deterministic_errors(device: torch.device) -> Iterator[None]:
    """Turns the lack of a deterministic algorithm for an operation inside into a `UserError` that names it."""
    try:
        yield
    except RuntimeError as error:
        operation, matched, _ = str(error).partition(" does not have a deterministic implementation")
        if not matched:
            raise
        raise UserError(
            f"deterministic=true: {operation} has no deterministic form on {describe(device)}; set deterministic=false"
        ) from None


@contextlib.contextmanager
def without_benchmark() -> Iterator[None]:
    """Inside, cuDNN does not benchmark its kernels, which it would repeat for every image size (cudnn.benchmark)."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def warnings(device: torch.device, precision: str, deterministic: bool = False) -> list[str]:
    """Warnings about these settings on this device: one line, or none."""
    if deterministic and device.type == "cuda":
        config = os.environ["CUBLAS_WORKSPACE_CONFIG"]
        return [f"deterministic=true: slower; CUBLAS_WORKSPACE_CONFIG={config} is in force"]
    if device.type != "cpu" or precision != "bf16" or torch.cpu._is_avx512_bf16_supported() or _is_arm():
        return []
    return ["precision=bf16: this processor has no bf16 units and emulates them; precision=float32 will be faster"]


def _is_arm() -> bool:
    return platform.machine().lower() in ("aarch64", "arm64")  # most of them have bf16 units


def describe(device: torch.device) -> str:
    """The device for a report: the GPU's name, or cpu and the machine's architecture."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})"
