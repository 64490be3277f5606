"""Weights in files of other projects, found by their names among everything else, without executing code.

Such files have the weights bare or under any name (state_dict, net_g, params_ema), nested, with the prefixes of
DataParallel, torch.compile and Lightning, in half precision, beside optimisers, options, dates and paths.
"""

import datetime
import pathlib
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

Weights = dict[str, Any]  # names -> tensors; other values are kept, so that they can be refused by name

# Parts that wrappers insert anywhere in a name: DataParallel, torch.compile, FSDP, checkpointing.
WRAPPER_PARTS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
WEIGHT = re.compile(r"(^|[._])(weight|bias)([._]|$)")  # weight_orig, parametrizations.weight.original0
AVERAGED = re.compile(r"(^|[._])(ema|averaged|swa)([._]|$)")  # params_ema, ema_model, state_dict_ema


class StandIn:
    """Replaces any object beside the weights: accepts all arguments and ignores them."""

    def __new__(cls, *_: Any) -> "StandIn":
        return super().__new__(cls)

    def __init__(self, *_: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _empty_list(*_: Any) -> list:
    """Replaces classes that pickle fills like a list."""
    return []


def _empty_dict(*_: Any) -> dict:
    """Replaces functions whose result pickle fills like a dict."""
    return {}


def _class_names(module: Any, *others: str) -> list[str]:
    """The names under which pickle finds the classes of ``module``, there or in its earlier locations ``others``."""
    classes = [value for value in vars(module).values() if isinstance(value, type)]
    names = [f"{each.__module__}.{each.__qualname__}" for each in classes]
    return names + [f"{other}.{each.__qualname__}" for other in others for each in classes]


# Harmless classes beside weights. PyTorch's reader creates only these and its own, and refuses all others.
STAND_IN_CLASSES = [
    "argparse.Namespace",
    "types.SimpleNamespace",
    "uuid.UUID",
    "decimal.Decimal",
    *_class_names(datetime),
    *_class_names(pathlib, "pathlib", "pathlib._local"),  # Python 3.13 has them in pathlib._local
    *_class_names(torch.optim),
    *_class_names(torch.optim.lr_scheduler),
    "torch.optim.lr_scheduler._LRScheduler",
    *(f"torch.{module}.grad_scaler.GradScaler" for module in ("amp", "cuda.amp")),
    *(f"torch.{module}.grad_scaler._refresh_per_optimizer_state" for module in ("amp", "cuda.amp")),
    *(f"numpy.{core}.multiarray._reconstruct" for core in ("core", "_core")),
    "numpy.ndarray",
    *(f"builtins.{kind}" for kind in ("int", "float", "str", "bool", "list", "dict", "tuple", "frozenset", "slice")),
    "typing.Any",
    "omegaconf.listconfig.ListConfig",
    *(f"omegaconf.base.{kind}" for kind in ("ContainerMetadata", "Metadata", "SCMode")),
    *(f"omegaconf.nodes.{kind}Node" for kind in ("Any", "String", "Integer", "Float", "Boolean", "Path")),
    "omegaconf.dictconfig.DictConfig",
    "warmup_scheduler.scheduler.GradualWarmupScheduler",
    "timm.scheduler.cosine_lr.CosineLRScheduler",
]
DICT_CLASSES = [
    "easydict.EasyDict",
    "addict.addict.Dict",
    "munch.Munch",
    "mmcv.utils.config.ConfigDict",
    "mmengine.config.config.ConfigDict",
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "lightning.pytorch.utilities.parsing.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "lightning.fabric.utilities.data.AttributeDict",
]
# NumPy's types of numbers (such as a best PSNR) and of texts, which contain no code.
NUMPY_TYPES = [np.dtype, *{type(np.dtype(kind)) for kind in "?bhilqBHILQefdFDUSMm"}]
NUMPY_SCALAR = np._core.multiarray.scalar  # type: ignore[attr-defined]  # private; files name it
NUMPY_TYPES += [(NUMPY_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
HARMLESS = [
    *NUMPY_TYPES,
    *((StandIn, name) for name in dict.fromkeys(STAND_IN_CLASSES)),
    *((OrderedDict, name) for name in DICT_CLASSES),
    (_empty_dict, "collections.defaultdict"),
    (_empty_list, "collections.deque"),
]


def find(state: Any, fits: Callable[[Weights], bool], averaged: bool = True) -> Weights | None:
    """The set of weights in ``state`` that ``fits``, at any depth and with any prefix of its names; None if none does.

    Of several sets the averaged ones (EMA) are preferred, or with ``averaged`` False the others; of those that remain
    the first is taken, with a warning. float16 and float64 become float32.
    """
    groups = weight_sets(state)
    matches = []
    for prefix in sorted(groups, key=lambda prefix: prefix.count(".")):  # stable: in the file's order at each depth
        if not prefix.startswith(tuple(matches)) and fits(groups[prefix]):
            matches.append(prefix)
    preferred = [prefix for prefix in matches if bool(AVERAGED.search(prefix)) == averaged] or matches
    if len(preferred) > 1:
        names = ", ".join(f"'{prefix.removesuffix('.')}'" for prefix in preferred)
        warnings.warn(f"the file holds several sets of weights, {names}: the first is taken", stacklevel=2)
    return groups[preferred[0]] if preferred else None


def best_match(state: Any, names: Collection[str]) -> Weights:
    """The set of weights in ``state`` that has most of ``names``; empty if there are no weights."""
    return max(weight_sets(state).values(), key=lambda weights: len(weights.keys() & names), default={})


def weight_sets(state: Any) -> dict[str, Weights]:
    """The weights in ``state`` grouped by every prefix of their names, '' first; names are without the prefix."""
    groups: dict[str, Weights] = {}
    for name, value in _tensors(state):
        parts = [part for part in name.split(".") if part not in WRAPPER_PARTS]
        for n in range(len(parts)):
            groups.setdefault("".join(f"{part}." for part in parts[:n]), {})[".".join(parts[n:])] = value
    return groups


def _tensors(state: Any, path: str = "", seen: set[int] | None = None) -> Iterator[tuple[str, Any]]:
    """Every tensor of the mappings in ``state`` that hold weights, by its full name; floating-point ones in float32.

    Mappings without a weight or bias (moments of an optimiser, random states) are skipped.
    """
    seen = set() if seen is None else seen
    if id(state) in seen:  # shared, or contained in itself
        return
    seen.add(id(state))
    items = [(f"{key}", value) for key, value in _items(state)]
    has_weights = any(isinstance(value, Tensor) and value.dim() and WEIGHT.search(key) for key, value in items)
    for key, value in items:
        if isinstance(value, Mapping | list | tuple) and any(_items(value)):
            yield from _tensors(value, f"{path}{key}.", seen)
        elif has_weights and ("." in key or (isinstance(value, Tensor) and value.dim())):  # not a count, score or name
            yield f"{path}{key}", _to_float32(value)


def _items(state: Any) -> Iterable[tuple[Any, Any]]:
    """The items of a mapping, or of a list that contains mappings; none for anything else."""
    if isinstance(state, Mapping):
        return [(key, value) for key, value in state.items() if isinstance(key, str | int)]  # possible names of weights
    if isinstance(state, list | tuple) and any(isinstance(value, Mapping) for value in state):
        return enumerate(state)
    return ()


def _to_float32(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.detach().float() if value.is_floating_point() else value.detach()
