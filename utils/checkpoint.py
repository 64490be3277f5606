"""One file holds a run: written whole or not at all, read without executing or believing anything in it.

Files of this project have a checksum of all that they hold; those of earlier versions, which have none, load too.
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
# What the fields of this project's files are, where they are there.
KINDS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("model", "stage", "checksum"), str),
    **dict.fromkeys(("version", "step", "seen"), int),
    **dict.fromkeys(("settings", "networks", "ema", "updater", "random"), dict),
    "best": (int, float),
    "others": list,
    "chosen_on": (dict, type(None)),
}
# Saves the weights of a file alone, where its classes are at hand: of a network, or of a dict with networks in it.
ALONE = (
    "import torch; w = lambda x: x.state_dict() if hasattr(x, 'state_dict') else {k: w(v) for k, v in x.items() if "
    "isinstance(v, (dict, torch.Tensor)) or hasattr(v, 'state_dict')} if isinstance(x, dict) else x; "
    "torch.save(w(torch.load(%r, 'cpu', weights_only=False)), 'weights.pth')"
)
TORCHSCRIPT = "import torch; torch.save(torch.jit.load(%r, 'cpu').state_dict(), 'weights.pth')"
RENAMED = {"judge_clear": "discriminator_clear", "judge_hazy": "discriminator_hazy"}  # networks, since earlier files
MARKS = ("format", "version", "checksum")  # of a file, beside its state


def save(path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` (tensors and plain values) with this project's mark, version and checksum, atomically."""
    state = {key: value for key, value in state.items() if key not in MARKS}  # of one that was read
    write(path, {"format": FORMAT, "version": VERSION, "checksum": trust.digest(state), **state})


def write(path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` as torch.save does, atomically; the same state gives the same bytes."""
    with atomic(path) as temporary:
        torch.save(state, temporary)


def read(path: Path) -> dict[str, Any]:
    """Read a .pt, .pth or .pkl file by torch, weights only, on the CPU: plain dicts, lists, tuples, tensors and values.

    Of this project's files the fields that are there are what they should be; `require` asks for those that must be.
    Raises `UserError` for a file that is damaged, hostile or of a newer version.
    """
    try:
        with path.open("rb") as file:
            if not file.read(1):
                raise UserError(f"{path} is empty; the download or copy was cut short, fetch it again")
        trust.check_archive(path)
        ignored = warnings.catch_warnings(action="ignore")  # about odd pickle protocols, in files that then fail
        with ignored, torch.serialization.safe_globals(foreign.HARMLESS):
            state = torch.load(path, map_location="cpu", weights_only=True)
        state = trust.plain(state, path)
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
    return _ours(path, state) if isinstance(state.get("format"), str) and state["format"] == FORMAT else state


def require(state: Mapping[str, Any], names: Iterable[str], path: Path) -> None:
    """Raise `UserError` where ``state``, read from this project's file ``path``, lacks one of the fields ``names``."""
    lacking = [name for name in names if name not in state]
    if lacking:
        raise UserError(f"{path} is not whole: it has no {', '.join(lacking)}; take another file of that run")


def _ours(path: Path, state: dict[str, Any]) -> dict[str, Any]:
    """``state`` of this project's file without its checksum. Raises `UserError` if it is not what was written."""
    _check_kinds(path, state)
    _check_version(path, state.get("version", 0))
    told = state.pop("checksum", None)
    if told is not None and told != trust.digest({k: v for k, v in state.items() if k not in MARKS}):
        raise UserError(_changed(path))
    average = state.get("ema") or {"weights": {}, "steps": 0}  # {}: without averaging
    steps = average.get("steps")
    if not isinstance(steps, int) and not (isinstance(steps, Tensor) and steps.numel() == 1):  # a tensor: earlier files
        raise UserError(f"cannot read {path}: its 'ema' does not say of how many steps it is; take another file")
    for name, weights in {"networks": state.get("networks", {}), "ema": average.get("weights")}.items():
        good = isinstance(weights, dict) and all(isinstance(key, str) for key in weights)
        if not good or not all(isinstance(value, Tensor) for value in weights.values()):
            raise UserError(f"cannot read {path}: its '{name}' are not weights by their names; take another file")
    if "networks" in state:
        state["networks"] = {_renamed(key): value for key, value in state["networks"].items()}
    return state


def _renamed(key: str) -> str:
    network, dot, rest = key.partition(".")
    return f"{RENAMED.get(network, network)}{dot}{rest}"


def _check_kinds(path: Path, fields: Mapping[str, Any]) -> None:
    """Refuse fields of a file of this project that are of another type, by their names."""
    for name, kind in KINDS.items():
        value = fields.get(name)
        odd = name in fields and (not isinstance(value, kind) or isinstance(value, bool))
        if odd or (kind is int and name in fields and not 0 <= value < 2**62):
            raise UserError(f"cannot read {path}: its '{name}' is no such thing ({value!r:.40}); take another file")
    trust.check_tree(fields.get("settings"), f"the settings in {path}")
    chosen = fields.get("chosen_on") or {"sets": [], "truths": []}
    lists = [chosen.get(key) for key in ("sets", "truths")]
    if not all(isinstance(each, list) and all(isinstance(text, str) for text in each) for each in lists):
        raise UserError(f"cannot read {path}: what its weights were 'chosen_on' is damaged; take another file")


def _changed(path: Path) -> str:
    return f"{path} is not as it was written (its checksum differs): a disk or a copy has changed it; get it once more"


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
    if bad := not_finite(weights):
        raise UserError(
            f"{path}: not written, and what it held stays: {bad}; training has diverged: lower the learning rate or "
            f"set train.clip=1, and go on with --resume"
        )


def not_finite(weights: Mapping[str, Tensor]) -> str:
    """The words for which of ``weights`` hold NaN or infinity; empty, if none does."""
    bad = [key for key, value in weights.items() if value.is_floating_point() and not value.isfinite().all()]
    more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
    return f"{bad[0]}{more} of {len(weights)} weights hold NaN or infinity" if bad else ""


def save_weights(path: Path, weights: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write inference weights as safetensors; ``metadata`` (JSON-able) goes into the header. See `check_finite`.

    The same weights and metadata give the same bytes: safetensors itself writes its header's texts in any order.
    """
    check_finite(weights, path)
    told = json.dumps(metadata)
    header = {"format": FORMAT, "version": str(VERSION), "checksum": _checksum(weights, told), "metadata": told}
    body = safetensors.torch.save({k: v.contiguous() for k, v in weights.items()})
    start = 8 + int.from_bytes(body[:8], "little")
    text = json.dumps({"__metadata__": header} | json.loads(body[8:start]), separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    with atomic(path) as temporary, temporary.open("wb") as file:
        for part in (len(text).to_bytes(8, "little"), text, memoryview(body)[start:]):
            file.write(part)


def _checksum(weights: Mapping[str, Tensor], metadata: str) -> str:
    return trust.digest({"weights": weights, "metadata": metadata})


def read_metadata(path: Path) -> dict[str, Any]:
    """What this project's training says of the weights in a .safetensors file; {} for files of others."""
    with _opened(path) as file:
        return _metadata(path, file.metadata() or {}) or {}


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Weights and this project's metadata (None if another program wrote the file). Raises `UserError` as `read`."""
    with _opened(path) as file:
        header = file.metadata() or {}
        weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    metadata, told = _metadata(path, header), header.get("checksum")
    if metadata is not None and told is not None and told != _checksum(weights, header["metadata"]):
        raise UserError(_changed(path))
    return trust.plain(weights, path), metadata


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A .safetensors file; whatever fails as it is read becomes a `UserError`."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            yield file
    except UserError:
        raise
    except Exception as error:  # of many kinds, as for types of numbers that PyTorch has not
        if isinstance(error, FileNotFoundError):
            raise UserError(f"no checkpoint {path}; train one with train.py or name another file") from None
        raise UserError(f"cannot read {path}: it is damaged, cut short or not safetensors; fetch it again") from None


def _metadata(path: Path, header: Mapping[str, str]) -> dict[str, Any] | None:
    """What the ``header`` of this project's file says; None for others'. Raises `UserError`."""
    if header.get("format") != FORMAT:
        return None
    try:
        metadata, version = json.loads(header["metadata"]), int(header["version"])
    except (ValueError, KeyError, RecursionError):
        metadata, version = None, 0
    if not isinstance(metadata, dict):
        raise UserError(f"cannot read {path}: what it says of its weights is damaged; fetch it again")
    _check_version(path, version)
    _check_kinds(path, metadata)
    return metadata


def read_weights(path: Path, names: Collection[str]) -> dict[str, Tensor]:
    """The set of weights in a file, .safetensors or torch's, that has most of ``names``, whatever is around it.

    Raises `UserError` as `read`, and for weights of these names that are none, see `check_values`.
    """
    found = foreign.most(read_safetensors(path)[0] if path.suffix == ".safetensors" else read(path), names)
    held = {name: found[name] for name in names if name in found}
    check_values(held, f"{path}", [k for k, v in held.items() if isinstance(v, Tensor) and not v.dim()])
    return found


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
    """Put back what `random_states` gave; CUDA's only where the number of devices is the same.

    Raises `UserError` for what are no such states.
    """
    try:
        torch.set_rng_state(states["torch"])
        version, internal, gauss = states["python"]
        random.setstate((version, tuple(internal), gauss))
        kind, keys, place, *rest = states["numpy"]
        if not 0 <= place <= len(keys):  # NumPy would read beyond their end
            raise ValueError("no place among the keys")
        np.random.set_state((kind, np.array(keys, dtype=np.uint32), place, *rest))
        if torch.cuda.is_available() and len(states.get("cuda", [])) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(states["cuda"])
    except (RuntimeError, TypeError, ValueError, KeyError, OverflowError, AttributeError):
        raise UserError("the checkpoint's random states are damaged; take another file of that run") from None


@contextlib.contextmanager
def unmoved_random_states() -> Iterator[None]:
    """Inside, random numbers may be drawn; what is drawn afterwards is as if they had not been."""
    states = random_states()
    try:
        yield
    finally:
        set_random_states(states)


def load_strict(module: torch.nn.Module, state: Mapping[str, Any], what: str) -> None:
    """Load ``state`` into ``module`` exactly, or raise `UserError` with a short key difference and change nothing.

    Refused are also weights that are none: see `check_values`.
    """
    own = module.state_dict()
    missing = [key for key in own if key not in state]
    extra = [key for key in state if key not in own]
    shared = [key for key in own if key in state]
    shapes = [key for key in shared if isinstance(state[key], Tensor) and own[key].shape != state[key].shape]
    faults = _list({"missing": missing, "unknown": extra, "of another shape": shapes})
    if faults:
        raise UserError(f"{what} does not fit this model: {faults}; use a file made for this model")
    check_values(state, what, [key for key in own if not own[key].is_floating_point()])
    module.load_state_dict(state)


def check_values(weights: Mapping[str, Any], what: str, counts: Collection[str] = ()) -> None:
    """Raise `UserError` where ``weights`` are no tensors of fractions, hold NaN or infinity, or are all zero.

    ``counts`` names those that may be whole numbers.
    """
    tensors = {key: value for key, value in weights.items() if isinstance(value, Tensor)}
    others = [key for key in weights if key not in tensors]
    kinds = [k for k, v in tensors.items() if v.is_complex() or not (v.is_floating_point() or k in counts)]
    if told := _list({"no tensors": others, "not of fractions": kinds}):
        raise UserError(f"{what} holds what are no weights: {told}; use a file made for this model")
    if bad := not_finite(tensors):
        raise UserError(f"{what}: {bad}; the training that wrote them had diverged: use a file of before")
    matrices = [key for key, value in tensors.items() if value.dim() > 1 and key not in counts]
    if matrices and not any(tensors[key].any() for key in matrices):
        raise UserError(f"{what}: all weights are zero ({matrices[0]}, ...); they were never written, get them anew")


def _list(keys: Mapping[str, list[str]]) -> str:
    """How many keys of each kind there are, and the first of them; empty, if there are none."""
    return "; ".join(
        f"{len(each)} {word} ({', '.join(each[:3])}{', ...' if len(each) > 3 else ''})"
        for word, each in keys.items()
        if each
    )
