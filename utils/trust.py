"""What comes from a file of others is looked through before it is used: its size, its nesting, its tensors, its types.

Nothing here believes a file. What is refused is refused by its name, in one line, before it costs memory or time.
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

from utils.errors import UserError
from utils.memory import exhausted

NESTED, PARTS, LONGEST = 32, 40, 500  # containers in each other; parts and characters of a tensor's whole name
VALUES, TEXT, BITS = 20_000, 10_000, 64  # of settings: how many, how long a text, how large a whole number
AMPLE_BYTES, AMPLE_NUMBERS, TIMES = 2**24, 2**24, 8  # beyond so many times what the file holds nothing is made of it


def check_archive(path: Path) -> None:
    """Refuse a zip archive that would grow as it is read: PyTorch stores the members of its files as they are.

    Files that are no archives (of before PyTorch 1.6) pass. Raises `UserError`, and RuntimeError for a program.
    """
    with path.open("rb") as file:
        if file.read(4) != b"PK\3\4":
            return
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        raise UserError(f"cannot read {path}: it is damaged or cut short; get it once more") from None
    packed = next((member.filename for member in members if member.compress_type != zipfile.ZIP_STORED), None)
    if packed is not None and any(member.filename.endswith("/constants.pkl") for member in members):
        raise RuntimeError("a TorchScript program")  # as PyTorch says it
    if packed is not None:
        raise UserError(
            f"cannot read {path}: {packed} in it is compressed, as in no PyTorch file; save it by torch.save"
        )
    told, held = sum(member.file_size for member in members), path.stat().st_size
    if told > held:
        raise UserError(f"cannot read {path}: it claims to hold {told} bytes in {held}; get it once more")


def plain(state: Any, path: Path) -> Any:
    """``state``, read from ``path``, with plain dicts, lists, tuples and tensors in place of whatever looks like them.

    Raises `UserError` for what holds itself, is nested too deep, or is a tensor that no network's weights are: sparse,
    quantized, without data, or repeated in memory to many times the size of the file.
    """
    return _Plain(path).made(state, ())


class _Plain:
    def __init__(self, path: Path):
        self.path, self.done, self.left = path, {}, TIMES * path.stat().st_size + AMPLE_BYTES

    def made(self, value: Any, name: tuple) -> Any:
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
            self.refuse(name, "holds itself")
        return self.done[id(value)]

    def container(self, kind: type, value: Any, name: tuple) -> Any:
        if kind is dict:  # its own methods may be anything
            return {key: self.made(each, (*name, _key(key))) for key, each in dict.items(value)}
        items = list.__iter__(value) if kind is list else tuple.__iter__(value)
        return kind([self.made(each, (*name, f"{k}")) for k, each in enumerate(items)])

    def tensor(self, value: Tensor, name: tuple) -> Tensor:
        self.check_name(name)
        value = Tensor.detach(value)  # a parameter's, and free of attributes that the file gave it
        for odd, told in (
            (value.layout != torch.strided or value.is_nested, "sparse or nested"),
            (value.is_quantized, "quantized"),
            (value.is_meta, "without data"),
        ):
            if odd:
                self.refuse(name, f"is {told}, not a plain tensor")
        self.left -= value.numel() * value.element_size()
        if self.left < 0:
            self.refuse(name, "and those before it would take many times the size of the file")
        return value

    def check_name(self, name: tuple) -> None:
        text = ".".join(name)
        if len(name) > NESTED or text.count(".") >= PARTS or len(text) > LONGEST:
            self.refuse((text[:60], "..."), f"is nested more than {NESTED} deep, or has too long a name")

    def refuse(self, name: tuple, what: str) -> None:
        raise UserError(f"cannot read {self.path}: '{'.'.join(name)}' {what}; save the weights alone, by torch.save")


def _key(key: Any) -> str:
    return f"{key}" if isinstance(key, str | int) else type(key).__name__


def check_tree(value: Any, what: str) -> None:
    """Refuse what settings do not consist of: texts, numbers, none, and lists and mappings by texts of these."""
    left, pending = VALUES, [(value, 0)]
    while pending:
        each, depth = pending.pop()
        left -= 1
        if isinstance(each, Mapping):
            good = all(isinstance(key, str) and len(key) <= LONGEST for key in each)
            pending += [(inner, depth + 1) for inner in each.values()]
        elif isinstance(each, list | tuple):
            good = True
            pending += [(inner, depth + 1) for inner in each]
        elif isinstance(each, int):
            good = each.bit_length() <= BITS
        else:
            good = each is None or isinstance(each, float) or (isinstance(each, str) and len(each) <= TEXT)
        if not good or depth > NESTED or left < 0 or len(pending) > VALUES:
            raise UserError(f"{what} hold a {type(each).__name__} where none can be, or are endless; take another file")


@contextlib.contextmanager
def made_for(weights: Mapping[str, Any], path: Path) -> Iterator[None]:
    """Inside, no network is made, by this thread, that is many times as large as the ``weights`` for it.

    A file of a few bytes may ask for a network that fills the memory. Raises `UserError`.
    """
    held = sum(value.numel() for value in weights.values() if isinstance(value, Tensor))
    left, thread = [TIMES * held + AMPLE_NUMBERS], threading.get_ident()
    refusal = UserError(
        f"{path} asks for networks far larger than its {held} weights; it is damaged, take another file"
    )

    def count(owner: Any, name: str, value: Any) -> None:
        if isinstance(value, Tensor) and threading.get_ident() == thread:
            left[0] -= value.numel()
            if left[0] < 0:
                raise refusal

    hooks = [modules.register_module_parameter_registration_hook(count)]
    hooks.append(modules.register_module_buffer_registration_hook(count))
    try:
        yield
    except (RuntimeError, MemoryError, OverflowError, TypeError) as error:  # sizes that no tensor can have
        if exhausted(error) or any(word in str(error).lower() for word in ("overflow", "int64", "too large", "c long")):
            raise refusal from None
        raise
    finally:
        for hook in hooks:
            hook.remove()


def digest(value: Any) -> str:
    """The SHA-256 of tensors and plain values, in whatever order a mapping has them and a tensor lies in memory."""
    total = hashlib.sha256()
    _add(value, total)
    return total.hexdigest()


def _add(value: Any, total: Any) -> None:
    if isinstance(value, Tensor):
        total.update(f"{value.dtype}{tuple(value.shape)}".encode())
        total.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    elif isinstance(value, Mapping):
        total.update(f"mapping {len(value)} ".encode())
        for key in sorted(value, key=repr):
            total.update(f"{key!r}:".encode())
            _add(value[key], total)
    elif isinstance(value, list | tuple):
        total.update(f"list {len(value)} ".encode())
        for each in value:
            _add(each, total)
    else:
        total.update(f"{value!r} ".encode())
