"""Checkpoints and weights: written atomically, read without executing code and with every field checked.

Files of this project have a checksum of their contents; those of earlier versions, which have none, load too.
"""

import contextlib
import json
import random
import re
import warnings
import zipfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from utils import foreign, trust
from utils.errors import UserError
from utils.files import atomic

FORMAT = "nedr-dehaze"
VERSION = 1
# The types of the fields of this project's files; all are optional.
FIELD_TYPES: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("model", "stage", "checksum"), str),
    **dict.fromkeys(("version", "step", "seen"), int),
    **dict.fromkeys(("settings", "networks", "ema", "updater", "random"), dict),
    "best": (int, float),
    "others": list,
    "chosen_on": (dict, type(None)),
}
# A program that saves only the weights of a file with a network, or a dict of networks; it needs their classes.
EXTRACT_WEIGHTS = (
    "import torch; w = lambda x: x.state_dict() if hasattr(x, 'state_dict') else {k: w(v) for k, v in x.items() if "
    "isinstance(v, (dict, torch.Tensor)) or hasattr(v, 'state_dict')} if isinstance(x, dict) else x; "
    "torch.save(w(torch.load(%r, 'cpu', weights_only=False)), 'weights.pth')"
)
EXTRACT_TORCHSCRIPT = "import torch; torch.save(torch.jit.load(%r, 'cpu').state_dict(), 'weights.pth')"
RENAMED = {"judge_clear": "discriminator_clear", "judge_hazy": "discriminator_hazy"}  # networks of earlier files
HEADER_FIELDS = ("format", "version", "checksum")  # beside the state


def save(path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` (tensors and plain values) with this project's format, version and checksum, atomically."""
    state = {key: value for key, value in state.items() if key not in HEADER_FIELDS}  # a state that was read has them
    write(path, {"format": FORMAT, "version": VERSION, "checksum": trust.digest(state), **state})


def write(path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` as torch.save does, atomically; the same state gives the same bytes."""
    with atomic(path) as temporary:
        torch.save(state, temporary)


def read(path: Path) -> dict[str, Any]:
    """Read a .pt, .pth or .pkl file by torch, weights only, on the CPU: plain dicts, lists, tuples, tensors and values.

    The fields of this project's files have the right types; `require` checks that those needed exist. Raises
    `UserError` for a file that is damaged, hostile or of a newer version.
    """
    try:
        trust.check_archive(path)
        ignored = warnings.catch_warnings(action="ignore")  # about unusual pickle protocols, in files that then fail
        with ignored, torch.serialization.safe_globals(foreign.HARMLESS):
            state = torch.load(path, map_location="cpu", weights_only=True)
        state = trust.plain(state, path)
    except UserError:
        raise
    except Exception as error:  # damaged files make torch raise a dozen types, such as AssertionError
        if isinstance(error, OSError) and not path.is_file():
            raise UserError(f"no checkpoint {path}; train one with train.py or name another file") from None
        raise UserError(f"cannot read {path}: {_read_error(path, str(error))}") from None
    if isinstance(state, list | tuple) and any(isinstance(each, dict) for each in state):
        return dict(enumerate(state))
    if not isinstance(state, dict):
        raise UserError(f"{path} holds a {type(state).__name__}, not a checkpoint; name another file")
    return _checked(path, state) if isinstance(state.get("format"), str) and state["format"] == FORMAT else state


def require(state: Mapping[str, Any], names: Iterable[str], path: Path) -> None:
    """Raise `UserError` where ``state``, read from this project's file ``path``, lacks one of the fields ``names``."""
    missing = [name for name in names if name not in state]
    if missing:
        raise UserError(f"{path} is incomplete: it has no {', '.join(missing)}; use another file of that run")


def _checked(path: Path, state: dict[str, Any]) -> dict[str, Any]:
    """``state`` of this project's file without its checksum. Raises `UserError` if it is invalid or has changed."""
    _check_fields(path, state)
    _check_version(path, state.get("version", 0))
    checksum = state.pop("checksum", None)
    if checksum is not None and checksum != trust.digest({k: v for k, v in state.items() if k not in HEADER_FIELDS}):
        raise UserError(_checksum_error(path))
    average = state.get("ema") or {"weights": {}, "steps": 0}  # {}: without averaging
    steps = average.get("steps")
    if not isinstance(steps, int) and not (isinstance(steps, Tensor) and steps.numel() == 1):  # a tensor: earlier files
        raise UserError(f"cannot read {path}: its 'ema' does not have its number of steps; use another file")
    for name, weights in {"networks": state.get("networks", {}), "ema": average.get("weights")}.items():
        named = isinstance(weights, dict) and all(isinstance(key, str) for key in weights)
        if not named or not all(isinstance(value, Tensor) for value in weights.values()):
            raise UserError(f"cannot read {path}: its '{name}' are not tensors by name; use another file")
    if "networks" in state:
        state["networks"] = {_renamed(key): value for key, value in state["networks"].items()}
    return state


def _renamed(key: str) -> str:
    network, dot, rest = key.partition(".")
    return f"{RENAMED.get(network, network)}{dot}{rest}"


def _check_fields(path: Path, fields: Mapping[str, Any]) -> None:
    """Refuse fields of this project's file that have the wrong type; the error names the field."""
    for name, kind in FIELD_TYPES.items():
        value = fields.get(name)
        wrong = name in fields and (not isinstance(value, kind) or isinstance(value, bool))
        if wrong or (kind is int and name in fields and not 0 <= value < 2**62):
            raise UserError(f"cannot read {path}: its '{name}' has no valid value ({value!r:.40}); use another file")
    trust.check_tree(fields.get("settings"), f"the settings in {path}")
    chosen = fields.get("chosen_on") or {"sets": [], "truths": []}
    lists = [chosen.get(key) for key in ("sets", "truths")]
    if not all(isinstance(each, list) and all(isinstance(text, str) for text in each) for each in lists):
        raise UserError(f"cannot read {path}: its 'chosen_on' is damaged; use another file")


def _checksum_error(path: Path) -> str:
    return f"{path} has changed since it was written (its checksum differs), on a disk or in a copy; fetch it again"


def _read_error(path: Path, message: str) -> str:
    """The cause and the remedy for torch's error ``message`` about a file."""
    if "torchscript" in message.lower():
        return f"it is a program (TorchScript), {_extract_command(EXTRACT_TORCHSCRIPT, path)}"
    if re.search("unsupported global|can only|trying to call", message, re.IGNORECASE):
        name = re.search(r"GLOBAL ([\w.]+)", message)
        return f"it holds objects{f' ({name[1]})' if name else ''}, {_extract_command(EXTRACT_WEIGHTS, path)}"
    if "Unsupported operand" in message and zipfile.is_zipfile(path):
        command = _extract_command(EXTRACT_WEIGHTS, path)
        return f"it was saved with another pickle_protocol than torch.save's default, {command}"
    return "it is damaged, cut short or not a PyTorch file; name another file, or fetch it again"


def _extract_command(code: str, path: Path) -> str:
    return (
        "and code in checkpoints is never run; if you trust it, save only its weights where its code is installed, "
        f'and use that file: python -c "{code % str(path)}"'
    )


def _check_version(path: Path, version: int) -> None:
    if version > VERSION:
        raise UserError(f"{path} was written by a newer version of this project; update it to read this file")


def cast_matrices(weights: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    """``weights`` with the matrices cast to ``kind`` (float32 | float16; the latter halves the file).

    Vectors (biases, norms, running statistics) keep their type: they are a hundredth of the size, and running
    statistics exceed the range of float16.
    """
    dtype = getattr(torch, kind)
    return {k: v.to(dtype) if v.dim() > 1 and v.is_floating_point() else v for k, v in weights.items()}


def check_finite(weights: Mapping[str, Tensor], path: Path) -> None:
    """Raise `UserError`, before ``path`` is written, where a weight is NaN or infinite."""
    if message := not_finite(weights):
        raise UserError(
            f"{path}: not written, the earlier file is kept: {message}; training has diverged: lower the learning "
            f"rate or set train.clip=1, and continue with --resume"
        )


def not_finite(weights: Mapping[str, Tensor]) -> str:
    """A text that names the ``weights`` with NaN or infinity; empty, if there are none."""
    bad = [key for key, value in weights.items() if value.is_floating_point() and not value.isfinite().all()]
    more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
    return f"{bad[0]}{more} of {len(weights)} weights hold NaN or infinity" if bad else ""


def save_weights(path: Path, weights: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write inference weights as safetensors; ``metadata`` (JSON-able) goes into the header. See `check_finite`.

    The same weights and metadata give the same bytes, although safetensors writes its header's entries in any order.
    """
    check_finite(weights, path)
    text = json.dumps(metadata)
    fields = {"format": FORMAT, "version": str(VERSION), "checksum": _checksum(weights, text), "metadata": text}
    body = safetensors.torch.save({k: v.contiguous() for k, v in weights.items()})
    start = 8 + int.from_bytes(body[:8], "little")
    header = json.dumps({"__metadata__": fields} | json.loads(body[8:start]), separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # tensors begin at a multiple of 8
    with atomic(path) as temporary, temporary.open("wb") as file:
        for part in (len(header).to_bytes(8, "little"), header, memoryview(body)[start:]):
            file.write(part)


def _checksum(weights: Mapping[str, Tensor], metadata: str) -> str:
    return trust.digest({"weights": weights, "metadata": metadata})


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata that this project's training wrote into a .safetensors file; {} for files of others."""
    with _open_safetensors(path) as file:
        return _metadata(path, file.metadata() or {}) or {}


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Weights and this project's metadata (None if another program wrote the file). Raises `UserError` as `read`."""
    with _open_safetensors(path) as file:
        header = file.metadata() or {}
        weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    metadata = _metadata(path, header)
    checksum = header.get("checksum")
    if metadata is not None and checksum is not None and checksum != _checksum(weights, header["metadata"]):
        raise UserError(_checksum_error(path))
    return trust.plain(weights, path), metadata


@contextlib.contextmanager
def _open_safetensors(path: Path) -> Iterator[Any]:
    """An open .safetensors file; any error while it is read becomes a `UserError`."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            yield file
    except UserError:
        raise
    except Exception as error:  # many types, also for number types that PyTorch lacks
        if isinstance(error, FileNotFoundError):
            raise UserError(f"no checkpoint {path}; train one with train.py or name another file") from None
        raise UserError(f"cannot read {path}: it is damaged, cut short or not safetensors; fetch it again") from None


def _metadata(path: Path, header: Mapping[str, str]) -> dict[str, Any] | None:
    """The metadata in the ``header`` of this project's file; None for others'. Raises `UserError`."""
    if header.get("format") != FORMAT:
        return None
    try:
        metadata, version = json.loads(header["metadata"]), int(header["version"])
    except (ValueError, KeyError, RecursionError):
        metadata, version = None, 0
    if not isinstance(metadata, dict):
        raise UserError(f"cannot read {path}: its metadata is damaged; fetch it again")
    _check_version(path, version)
    _check_fields(path, metadata)
    return metadata


def read_weights(path: Path, names: Collection[str]) -> dict[str, Tensor]:
    """The set of weights in a file, .safetensors or torch's, that has most of ``names``; the rest is ignored.

    Raises `UserError` as `read`, and for invalid weights among ``names``, see `check_values`.
    """
    state = read_safetensors(path)[0] if path.suffix == ".safetensors" else read(path)
    weights = foreign.best_match(state, names)
    needed = {name: weights[name] for name in names if name in weights}
    check_values(needed, f"{path}", [k for k, v in needed.items() if isinstance(v, Tensor) and not v.dim()])
    return weights


def seed(number: int) -> None:
    """Seed every random generator in use: PyTorch's, Python's and NumPy's."""
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number % 2**32)


def random_states() -> dict[str, Any]:
    """The states of every random generator in use, as plain values that weights_only loading accepts."""
    state: Any = np.random.get_state()
    kind, keys, *rest = state
    states = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), *rest),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def set_random_states(states: dict[str, Any]) -> None:
    """Restore the result of `random_states`; CUDA's only where the number of devices is the same.

    Raises `UserError` for invalid states.
    """
    try:
        torch.set_rng_state(states["torch"])
        version, internal, gauss = states["python"]
        random.setstate((version, tuple(internal), gauss))
        kind, keys, position, *rest = states["numpy"]
        if not 0 <= position <= len(keys):  # NumPy would read beyond their end
            raise ValueError("the position is not within the keys")
        np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, *rest))
        if torch.cuda.is_available() and len(states.get("cuda", [])) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(states["cuda"])
    except (RuntimeError, TypeError, ValueError, KeyError, OverflowError, AttributeError):
        raise UserError("the checkpoint's random states are damaged; use another file of that run") from None


@contextlib.contextmanager
def unmoved_random_states() -> Iterator[None]:
    """Inside, random numbers may be drawn; the states of the generators are restored afterwards."""
    states = random_states()
    try:
        yield
    finally:
        set_random_states(states)


def load_strict(module: torch.nn.Module, state: Mapping[str, Any], what: str) -> None:
    """Load ``state`` into ``module`` exactly, or raise `UserError` with a short key difference and change nothing.

    Invalid weights are refused, too: see `check_values`.
    """
    expected = module.state_dict()
    missing = [key for key in expected if key not in state]
    extra = [key for key in state if key not in expected]
    shared = [key for key in expected if key in state]
    shapes = [key for key in shared if isinstance(state[key], Tensor) and expected[key].shape != state[key].shape]
    differences = _summary({"missing": missing, "unknown": extra, "of another shape": shapes})
    if differences:
        raise UserError(f"{what} does not fit this model: {differences}; use a file made for this model")
    check_values(state, what, [key for key in expected if not expected[key].is_floating_point()])
    module.load_state_dict(state)


def check_values(weights: Mapping[str, Any], what: str, counts: Collection[str] = ()) -> None:
    """Raise `UserError` where ``weights`` are not floating-point tensors, hold NaN or infinity, or are all zero.

    ``counts`` names those that may be integers.
    """
    tensors = {key: value for key, value in weights.items() if isinstance(value, Tensor)}
    others = [key for key in weights if key not in tensors]
    kinds = [k for k, v in tensors.items() if v.is_complex() or not (v.is_floating_point() or k in counts)]
    if message := _summary({"not tensors": others, "not floating-point": kinds}):
        raise UserError(f"{what} has values that are not weights: {message}; use a file made for this model")
    if message := not_finite(tensors):
        raise UserError(f"{what}: {message}; the training that wrote them had diverged: use an earlier file")
    matrices = [key for key, value in tensors.items() if value.dim() > 1 and key not in counts]
    if matrices and not any(tensors[key].any() for key in matrices):
        raise UserError(f"{what}: all weights are zero ({matrices[0]}, ...); they were never written, fetch them again")


def _summary(keys: Mapping[str, list[str]]) -> str:
    """A text with the number of keys of each kind, and the first of them; empty, if there are none."""
    return "; ".join(
        f"{len(each)} {word} ({', '.join(each[:3])}{', ...' if len(each) > 3 else ''})"
        for word, each in keys.items()
        if each
    )
