"""One file holds a run: written whole or not at all, read without executing anything in it."""

import contextlib
import json
import random
import re
import warnings
import zipfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from utils import foreign
from utils.errors import UserError
from utils.files import atomic

FORMAT = "nedr-dehaze"
VERSION = 1
# Saves the weights of a file alone, where its classes are at hand: of a network, or of a dict with networks in it.
ALONE = (
    "import torch; w = lambda x: x.state_dict() if hasattr(x, 'state_dict') else {k: w(v) for k, v in x.items() if "
    "isinstance(v, (dict, torch.Tensor)) or hasattr(v, 'state_dict')} if isinstance(x, dict) else x; "
    "torch.save(w(torch.load(%r, 'cpu', weights_only=False)), 'weights.pth')"
)
TORCHSCRIPT = "import torch; torch.save(torch.jit.load(%r, 'cpu').state_dict(), 'weights.pth')"


def save(path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` (tensors and plain values) with this project's mark and version, atomically."""
    with atomic(path) as temporary:
        torch.save({"format": FORMAT, "version": VERSION, **state}, temporary)


def read(path: Path) -> dict[str, Any]:
    """Read a .pt, .pth or .pkl file by torch, weights only, on the CPU. Raises `UserError` if it is damaged."""
    try:
        with path.open("rb") as file:
            if not file.read(1):
                raise UserError(f"{path} is empty; the download or copy was cut short, fetch it again")
        ignored = warnings.catch_warnings(action="ignore")  # about odd pickle protocols, in files that then fail
        with ignored, torch.serialization.safe_globals(foreign.HARMLESS):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # a damaged file makes torch fail in a dozen ways, AssertionError among them
        if isinstance(error, OSError) and not path.is_file():
            raise UserError(f"no checkpoint {path}; train one with train.py or name another file") from None
        raise UserError(f"cannot read {path}: {_why(path, str(error))}") from None
    if isinstance(state, list | tuple) and any(isinstance(each, dict) for each in state):
        return dict(enumerate(state))
    if not isinstance(state, dict):
        raise UserError(f"{path} holds a {type(state).__name__}, not a checkpoint; name another file")
    if state.get("format") == FORMAT:
        _check_version(path, state.get("version", 0))
    return state


def _why(path: Path, told: str) -> str:
    """Why torch could not read a file, of which it ``told`` this, and the remedy."""
    if "torchscript" in told.lower():
        return f"it is a program (TorchScript), {_remedy(TORCHSCRIPT, path)}"
    if re.search("unsupported global|can only|trying to call", told, re.IGNORECASE):
        name = re.search(r"GLOBAL ([\w.]+)", told)
        return f"it holds objects{f' ({name[1]})' if name else ''}, {_remedy(ALONE, path)}"
    if "Unsupported operand" in told and zipfile.is_zipfile(path):
        return f"it was saved with another pickle_protocol than torch.save's own, {_remedy(ALONE, path)}"
    return "it is damaged, cut short or not a PyTorch file; name another file, or get it once more"


def _remedy(code: str, path: Path) -> str:
    return (
        "and code in checkpoints is never run; if you trust it, save the weights alone where its code is installed, "
        f'and name that file: python -c "{code % str(path)}"'
    )


def _check_version(path: Path, version: int) -> None:
    if version > VERSION:
        raise UserError(f"{path} was written by a newer version of this project; update it to read this file")


def halved(weights: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    """``weights`` with its matrices in ``kind`` (float32 | float16), which halves a file; vectors stay as they are.

    Biases, norms and running statistics are a hundredth of the size, and these have values that float16 does not hold.
    """
    dtype = getattr(torch, kind)
    return {k: v.to(dtype) if v.dim() > 1 and v.is_floating_point() else v for k, v in weights.items()}


def check_finite(weights: Mapping[str, Tensor], path: Path) -> None:
    """Raise `UserError`, before ``path`` is touched, where a weight is NaN or infinite."""
    bad = [key for key, value in weights.items() if value.is_floating_point() and not value.isfinite().all()]
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise UserError(
            f"{path}: not written, and what it held stays: {bad[0]}{more} of {len(weights)} weights hold NaN or "
            f"infinity; training has diverged: lower the learning rate or set train.clip=1, and go on with --resume"
        )


def save_weights(path: Path, weights: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write inference weights as safetensors; ``metadata`` (JSON-able) goes into the header. See `check_finite`."""
    check_finite(weights, path)
    header = {"format": FORMAT, "version": str(VERSION), "metadata": json.dumps(metadata)}
    with atomic(path) as temporary:
        safetensors.torch.save_file({k: v.contiguous() for k, v in weights.items()}, temporary, header)
        _order_header(temporary)


def _order_header(path: Path) -> None:
    """Put what is told of the weights in order: the library leaves that to chance, and with it the file's digest."""
    with path.open("rb+") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) <= size:
            file.seek(8)
            file.write(text.ljust(size))


def read_metadata(path: Path) -> dict[str, Any]:
    """What this project's training says of the weights in a .safetensors file; {} for files of others."""
    with safetensors.safe_open(path, "pt") as file:
        header = file.metadata() or {}
    return json.loads(header["metadata"]) if header.get("format") == FORMAT else {}


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Weights and this project's metadata (None if another program wrote the file)."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            header = file.metadata() or {}
            weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
        metadata = json.loads(header["metadata"]) if header.get("format") == FORMAT else None
        version = int(header["version"]) if metadata is not None else 0
    except FileNotFoundError:
        raise UserError(f"no checkpoint {path}; train one with train.py or name another file") from None
    except (OSError, safetensors.SafetensorError, ValueError, KeyError):
        raise UserError(f"cannot read {path}: it is damaged, cut short or not safetensors; fetch it again") from None
    _check_version(path, version)
    return weights, metadata


def read_weights(path: Path, names: Collection[str]) -> dict[str, Tensor]:
    """The set of weights in a file, .safetensors or torch's, that has most of ``names``, whatever is around it."""
    return foreign.most(read_safetensors(path)[0] if path.suffix == ".safetensors" else read(path), names)


def seed(number: int) -> None:
    """Begin every random generator in use anew: PyTorch's, Python's and NumPy's."""
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number % 2**32)


def random_states() -> dict[str, Any]:
    """The states of every random generator in use, as plain values that weights_only loading admits."""
    kind, keys, *rest = np.random.get_state()
    states = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), *rest),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def set_random_states(states: dict[str, Any]) -> None:
    """Put back what `random_states` gave; CUDA's only where the number of devices is the same."""
    torch.set_rng_state(states["torch"])
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    if torch.cuda.is_available() and len(states.get("cuda", [])) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])


@contextlib.contextmanager
def unmoved_random_states() -> Iterator[None]:
    """Inside, random numbers may be drawn; what is drawn afterwards is as if they had not been."""
    states = random_states()
    try:
        yield
    finally:
        set_random_states(states)


def load_strict(module: torch.nn.Module, state: dict[str, Tensor], what: str) -> None:
    """Load ``state`` into ``module`` exactly, or raise `UserError` with a short key difference and change nothing."""
    own = module.state_dict()
    missing = [key for key in own if key not in state]
    extra = [key for key in state if key not in own]
    shapes = [key for key in own if key in state and own[key].shape != getattr(state[key], "shape", None)]
    faults = [
        f"{len(keys)} {word} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for word, keys in (("missing", missing), ("unknown", extra), ("of another shape", shapes))
        if keys
    ]
    if faults:
        raise UserError(f"{what} does not fit this model: {'; '.join(faults)}; use a file made for this model")
    module.load_state_dict(state)
