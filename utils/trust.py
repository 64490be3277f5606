"""Checks of untrusted files before they are used: their size, nesting, tensors and types.

Errors name the offending part in one line, and are raised before it takes memory or time.
"""

import contextlib
import hashlib
import threading
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules import module as modules

from utils.config.settings import MAX_VALUES
from utils.errors import UserError
from utils.memory import exhausted

MAX_DEPTH = 32  # nested containers
MAX_PARTS, MAX_NAME = 40, 500  # parts and characters of a tensor's full name
MAX_TEXT, MAX_BITS = 10_000, 64  # of settings: characters of a text, bits of an integer
# Tensors and networks may be this many times as large as their file, plus the spare bytes or numbers.
MAX_RATIO, SPARE_BYTES, SPARE_NUMBERS = 8, 2**24, 2**24


def check_archive(path: Path) -> None:
    """Refuse an empty file, and a zip archive that expands when it is read: PyTorch stores its members uncompressed.

    Files that are not archives (from before PyTorch 1.6) pass. Raises `UserError`, and RuntimeError for a program.
    """
    with path.open("rb") as file:
        start = file.read(4)
    if not start:
        raise UserError(f"{path} is empty; the download or copy was incomplete, fetch it again")
    if start != b"PK\3\4":
        return
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        raise UserError(f"cannot read {path}: it is damaged or cut short; fetch it again") from None
    with archive:
        _check_members(archive, path)


def _check_members(archive: zipfile.ZipFile, path: Path) -> None:
    members = archive.infolist()
    packed = next((member.filename for member in members if member.compress_type != zipfile.ZIP_STORED), None)
    if packed is not None and any(member.filename.endswith("/constants.pkl") for member in members):
        raise RuntimeError("a TorchScript program")  # as PyTorch's error
    if packed is not None:
        raise UserError(
            f"cannot read {path}: {packed} in it is compressed, unlike in PyTorch's files; save it by torch.save"
        )
    stated = sum(member.file_size for member in members)
    size = path.stat().st_size
    if stated > size:
        raise UserError(f"cannot read {path}: it claims to hold {stated} bytes in {size}; fetch it again")
    changed = [member.filename for member in members if not _is_whole(archive, member)]
    if changed and len(changed) < len(members):  # all of them: torch.save was told to write no CRC
        raise UserError(f"cannot read {path}: {changed[0]} in it has changed since it was written; fetch it again")


def _is_whole(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bool:
    """Does a member of an archive have the CRC that it was written with?"""
    try:
        with archive.open(member) as file:
            while file.read(2**20):
                pass
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, RuntimeError):
        return False
    return True


def plain(state: Any, path: Path) -> Any:
    """``state``, read from ``path``, with plain dicts, lists, tuples and tensors instead of their subclasses.

    Raises `UserError` for containers that contain themselves or are nested too deeply, and for tensors that cannot be
    weights: sparse, quantized, without data, or expanded to many times the size of the file.
    """
    return _Converter(path).convert(state, ())


class _Converter:
    def __init__(self, path: Path):
        self.path = path
        self.done = {}  # results by id; None while the container is being converted
        self.budget = MAX_RATIO * path.stat().st_size + SPARE_BYTES  # bytes that tensors may still take

    def convert(self, value: Any, name: tuple) -> Any:
        if isinstance(value, Tensor):
            return self.tensor(value, name)
        kind = next((kind for kind in (dict, list, tuple) if isinstance(value, kind)), None)
        if kind is None:
            return value
        if id(value) not in self.done:
            self.done[id(value)] = None
            self.check_name(name)
            self.done[id(value)] = self.container(kind, value, name)
        elif self.done[id(value)] is None:
            self.refuse(name, "contains itself")
        return self.done[id(value)]

    def container(self, kind: type, value: Any, name: tuple) -> Any:
        if kind is dict:  # a subclass may override items()
            return {key: self.convert(each, (*name, _key(key))) for key, each in dict.items(value)}
        items = list.__iter__(value) if kind is list else tuple.__iter__(value)
        return kind([self.convert(each, (*name, f"{k}")) for k, each in enumerate(items)])

    def tensor(self, value: Tensor, name: tuple) -> Tensor:
        self.check_name(name)
        value = Tensor.detach(value)  # without the attributes that the file may have set
        for refused, description in (
            (value.layout != torch.strided or value.is_nested, "sparse or nested"),
            (value.is_quantized, "quantized"),
            (value.is_meta, "without data"),
        ):
            if refused:
                self.refuse(name, f"is {description}, not a plain tensor")
        self.budget -= value.numel() * value.element_size()
        if self.budget < 0:
            self.refuse(name, "and the tensors before it would take many times the size of the file")
        return value

    def check_name(self, name: tuple) -> None:
        text = ".".join(name)
        if len(name) > MAX_DEPTH or text.count(".") >= MAX_PARTS or len(text) > MAX_NAME:
            self.refuse((text[:60], "..."), f"is nested more than {MAX_DEPTH} deep, or has too long a name")

    def refuse(self, name: tuple, reason: str) -> None:
        raise UserError(f"cannot read {self.path}: '{'.'.join(name)}' {reason}; save only the weights, by torch.save")


def _key(key: Any) -> str:
    return f"{key}" if isinstance(key, str | int) else type(key).__name__


def check_tree(value: Any, what: str) -> None:
    """Refuse values other than those of settings: strings, numbers, None, and lists and string-keyed mappings of them.

    ``what`` names the tree in the `UserError`.
    """
    remaining = MAX_VALUES
    pending = [(value, 0)]
    while pending:
        each, depth = pending.pop()
        remaining -= 1
        if isinstance(each, Mapping):
            valid = all(isinstance(key, str) and len(key) <= MAX_NAME for key in each)
            pending += [(inner, depth + 1) for inner in each.values()]
        elif isinstance(each, list | tuple):
            valid = True
            pending += [(inner, depth + 1) for inner in each]
        elif isinstance(each, int):
            valid = each.bit_length() <= MAX_BITS
        else:
            valid = each is None or isinstance(each, float) or (isinstance(each, str) and len(each) <= MAX_TEXT)
        if not valid or depth > MAX_DEPTH or remaining < 0 or len(pending) > MAX_VALUES:
            raise UserError(f"{what} hold an invalid {type(each).__name__}, or too many values; use another file")


@contextlib.contextmanager
def limit_size(weights: Mapping[str, Any], path: Path) -> Iterator[None]:
    """Inside, this thread cannot build networks many times as large as the ``weights`` for them.

    The settings in a small file could otherwise request a network that fills the memory. Raises `UserError`.
    """
    count = sum(value.numel() for value in weights.values() if isinstance(value, Tensor))
    remaining = MAX_RATIO * count + SPARE_NUMBERS
    thread = threading.get_ident()
    refusal = UserError(
        f"{path} asks for networks far larger than its {count} weights; it is damaged, use another file"
    )

    def subtract(owner: Any, name: str, value: Any) -> None:
        nonlocal remaining
        if isinstance(value, Tensor) and threading.get_ident() == thread:
            remaining -= value.numel()
            if remaining < 0:
                raise refusal

    hooks = [modules.register_module_parameter_registration_hook(subtract)]
    hooks.append(modules.register_module_buffer_registration_hook(subtract))
    try:
        yield
    except (RuntimeError, MemoryError, OverflowError, TypeError) as error:  # also sizes that are impossible for tensors
        if exhausted(error) or any(word in str(error).lower() for word in ("overflow", "int64", "too large", "c long")):
            raise refusal from None
        raise
    finally:
        for hook in hooks:
            hook.remove()


def digest(value: Any) -> str:
    """The SHA-256 of tensors and plain values, independent of the order of mappings and of memory layouts."""
    total = hashlib.sha256()
    _update(value, total)
    return total.hexdigest()


def _update(value: Any, total: Any) -> None:
    if isinstance(value, Tensor):
        total.update(f"{value.dtype}{tuple(value.shape)}".encode())
        total.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    elif isinstance(value, Mapping):
        total.update(f"mapping {len(value)} ".encode())
        for key in sorted(value, key=repr):
            total.update(f"{key!r}:".encode())
            _update(value[key], total)
    elif isinstance(value, list | tuple):
        total.update(f"list {len(value)} ".encode())
        for each in value:
            _update(each, total)
    else:
        total.update(f"{value!r} ".encode())
