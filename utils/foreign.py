"""Files of others: the weights among all that people save beside them, found by their names, and nothing executed.

People save weights bare, under any name (state_dict, net_g, params_ema), nested, with the prefixes of DataParallel,
torch.compile and Lightning, in half precision, beside optimisers, options, dates and paths.
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

Weights = dict[str, Any]  # names -> tensors; what stands where a tensor should is kept, to be refused by its name

# Parts of a name that wrappers put into it, at any place: DataParallel, torch.compile, FSDP, checkpointing.
WRAPPED = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
WEIGHT = re.compile(r"(^|[._])(weight|bias)([._]|$)")  # weight_orig, parametrizations.weight.original0
AVERAGED = re.compile(r"(^|[._])(ema|averaged|swa)([._]|$)")  # params_ema, ema_model, state_dict_ema


class StandIn:
    """In place of an object beside the weights: takes whatever it is given, and does nothing with it."""

    def __new__(cls, *_: Any) -> "StandIn":
        return super().__new__(cls)

    def __init__(self, *_: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _list(*_: Any) -> list:
    """In place of what pickle fills like a list."""
    return []


def _dict(*_: Any) -> dict:
    """In place of a function that gives what pickle fills like a dict."""
    return {}


def _names(module: Any, *others: str) -> list[str]:
    """The classes of ``module`` by the names under which pickle finds them, in this or ``others``, its older homes."""
    kinds = [kind for kind in vars(module).values() if isinstance(kind, type)]
    own = [f"{kind.__module__}.{kind.__qualname__}" for kind in kinds]
    return own + [f"{home}.{kind.__qualname__}" for home in others for kind in kinds]


# What is harmless beside weights. PyTorch's reader makes only these and its own, and refuses what is not named.
OBJECTS = [
    "argparse.Namespace",
    "types.SimpleNamespace",
    "uuid.UUID",
    "decimal.Decimal",
    *_names(datetime),
    *_names(pathlib, "pathlib", "pathlib._local"),  # at home in pathlib._local in Python 3.13
    *_names(torch.optim),
    *_names(torch.optim.lr_scheduler),
    "torch.optim.lr_scheduler._LRScheduler",
    *(f"torch.{home}.grad_scaler.GradScaler" for home in ("amp", "cuda.amp")),
    *(f"torch.{home}.grad_scaler._refresh_per_optimizer_state" for home in ("amp", "cuda.amp")),
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
DICTS = [
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
# Plain numbers (a best PSNR) and texts are NumPy's; they hold no code.
NUMBERS = [np.dtype, *{type(np.dtype(kind)) for kind in "?bhilqBHILQefdFDUSMm"}]
NUMBERS += [(np._core.multiarray.scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
HARMLESS = [
    *NUMBERS,
    *((StandIn, name) for name in dict.fromkeys(OBJECTS)),
    *((OrderedDict, name) for name in DICTS),
    (_dict, "collections.defaultdict"),
    (_list, "collections.deque"),
]


def find(state: Any, fits: Callable[[Weights], bool], averaged: bool = True) -> Weights | None:
    """The one set of weights in ``state`` that ``fits``, wherever it stands and whatever its names begin with, or None.

    Of sets beside each other the averaged ones (EMA) are taken, or with ``averaged`` False the others; where several
    are left it is the first, with a warning. float16 and float64 become float32.
    """
    groups, found = sets(state), []
    for prefix in sorted(groups, key=lambda prefix: prefix.count(".")):  # stable: those of one depth as in the file
        if not prefix.startswith(tuple(found)) and fits(groups[prefix]):
            found.append(prefix)
    wanted = [prefix for prefix in found if bool(AVERAGED.search(prefix)) == averaged] or found
    if len(wanted) > 1:
        told = ", ".join(f"'{prefix.removesuffix('.')}'" for prefix in wanted)
        warnings.warn(f"the file holds several sets of weights, {told}: the first is taken", stacklevel=2)
    return groups[wanted[0]] if wanted else None


def most(state: Any, names: Collection[str]) -> Weights:
    """Of the sets of weights in ``state`` the one with most of ``names``; empty if it holds no weights."""
    return max(sets(state).values(), key=lambda weights: len(weights.keys() & names), default={})


def sets(state: Any) -> dict[str, Weights]:
    """All weights in ``state`` by each prefix that their names have, '' first: the names go on where it ends."""
    groups: dict[str, Weights] = {}
    for name, value in _tensors(state):
        parts = [part for part in name.split(".") if part not in WRAPPED]
        for n in range(len(parts)):
            groups.setdefault("".join(f"{part}." for part in parts[:n]), {})[".".join(parts[n:])] = value
    return groups


def _tensors(state: Any, path: str = "", seen: set[int] | None = None) -> Iterator[tuple[str, Any]]:
    """Every tensor of the mappings in ``state`` that hold weights, by its whole name, in float32 if it has fractions.

    A mapping without any weight or bias is none of a network's (moments of an optimiser, random states).
    """
    seen = set() if seen is None else seen
    if id(state) in seen:  # shared, or in itself
        return
    seen.add(id(state))
    items = [(f"{key}", value) for key, value in _items(state)]
    holds = any(isinstance(value, Tensor) and value.dim() and WEIGHT.search(key) for key, value in items)
    for key, value in items:
        if isinstance(value, Mapping | list | tuple) and any(_items(value)):
            yield from _tensors(value, f"{path}{key}.", seen)
        elif holds and ("." in key or (isinstance(value, Tensor) and value.dim())):  # else a count, a score, a name
            yield f"{path}{key}", _plain(value)


def _items(state: Any) -> Iterable[tuple[Any, Any]]:
    """What a mapping holds, or a list in which there are mappings; of anything else nothing."""
    if isinstance(state, Mapping):
        return [(key, value) for key, value in state.items() if isinstance(key, str | int)]  # others name no weights
    if isinstance(state, list | tuple) and any(isinstance(value, Mapping) for value in state):
        return enumerate(state)
    return ()


def _plain(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.detach().float() if value.is_floating_point() else value.detach()
