"""The registry of methods; builds a method from settings or loads one from a file."""

import dataclasses
import logging
import textwrap
from pathlib import Path
from typing import get_type_hints

import torch

from models import cost
from models.aknet import AKNet
from models.dcp import DCP
from models.kanet import KANet
from models.method import Method
from models.nedr import D4, NeDR
from utils import checkpoint, config, foreign, trust
from utils.errors import UserError, nearest, quoted
from utils.files import expand_home
from utils.training import progress

SHIPPED = Path(__file__).resolve().parent.parent / "checkpoints"
METHODS: dict[str, type[Method]] = {
    "nedr": NeDR,
    "d4": D4,
    "aknet": AKNet,
    "kanet": KANet,
    "dcp": DCP,
}


def names() -> list[str]:
    """The methods' names, the values of ``--model``."""
    return list(METHODS)


def listing() -> str:
    """All methods as a table of at most 120 columns: size, cost, training data and the paper to cite."""
    width = max(8, *(len(name) + 2 for name in METHODS))
    row = f"{{:{width}}}{{:>12}}{{:>16}}  {{}}".format
    lines = [row("method", "parameters", "MACs (256x256)", "trained on")]
    papers = []
    for name, kind in METHODS.items():
        method = build(config.load(name, settings_types())).eval()
        size, macs = cost.parameters(method, kind.inference), cost.macs(method.dehaze)
        figures = [f"{size / 1e6:.2f} M" if size else "-", f"{macs / 1e9:.2f} G" if macs else "-"]
        lines.append(row(name, *figures, kind.about.trained_on))
        cited = f"{name:{width}}{kind.about.title}. {kind.about.citation}"
        papers += textwrap.wrap(cited, 110, subsequent_indent=" " * width)
    note = "Cost of dehazing with the defaults of configs.yml. MACs: convolutions, matrix products and attention."
    return "\n".join([*lines, note, "", *papers])


def settings_types() -> dict[str, type]:
    """Each method's settings dataclass by name, for `utils.config.load`."""
    return {name: method.Settings for name, method in METHODS.items()}


def check_training(settings: config.Settings) -> None:
    """Raise `UserError`, before anything is loaded, for a method or settings that cannot be trained."""
    method = METHODS[settings.model]
    if not method.stages:
        raise UserError(f"{settings.model} has nothing to train; score it with test.py --model {settings.model}")
    for stage in progress.stages(settings):
        if stage.name not in method.stages:
            raise UserError(f"{settings.model} has no stage {stage.name}; set {stage.name}.steps=0")
    method.check(settings)


def build(settings: config.Settings) -> Method:
    """The method that ``settings`` describe, with all its networks, untrained, on the CPU."""
    return METHODS[settings.model](settings.method)


def shipped(name: str) -> Path | None:
    """The weights of method ``name`` shipped with this project (checkpoints/README.md), or None."""
    path = SHIPPED / name / "weights.safetensors"
    return path if path.is_file() else None


def load(file: str | Path | None = None, device: str | torch.device = "cpu", ema: bool = True, **test_time) -> Method:
    """A trained method from a file, in eval mode: .pt or .safetensors of this project, or any official file.

    ``file`` may be the name of a method, for the weights in its folder of checkpoints/ (``nedr``, the default, ships
    with this project; ``dcp`` needs none). Call the method with an image to dehaze it, see `Method.forward`:

    >>> import numpy as np
    >>> dehaze = load()
    >>> clear = dehaze(np.full((48, 64, 3), 200, np.uint8))
    >>> clear.shape, clear.dtype
    ((48, 64, 3), dtype('uint8'))

    Keyword arguments override settings that may change after training (for NeDR ``airlight``, ``guided_filter``).
    ``ema`` prefers the averaged weights if the file has them. Only networks that the file holds are created.
    Raises `UserError` for a missing, damaged or foreign file, and for invalid settings.
    """
    if file in METHODS and not METHODS[file].stages and not Path(file).is_file():  # a method without weights
        method = build(config.load(file, settings_types()))
    else:
        method = _read(_path(file), ema)
    change(method, test_time)
    return method.to(device).eval()


def _read(path: Path, ema: bool) -> Method:
    """The method stored in a file."""
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a checkpoint file in it, such as {path / 'weights.safetensors'}")
    if path.suffix == ".safetensors":
        weights, metadata = checkpoint.read_safetensors(path)
        if metadata is None:
            return _from_official_file(weights, path, ema)
        return _from_own_file(metadata, weights, path)
    state = checkpoint.read(path)
    if state.get("format") != checkpoint.FORMAT:
        return _from_official_file(state, path, ema)
    averaged = state.get("ema", {}).get("weights", {}) if ema else {}
    checkpoint.require(state, ["networks"], path)
    return _from_own_file(state, state["networks"] | averaged, path)


def start(method: Method, file: str | Path | None) -> None:
    """Initialise ``method`` for training, then load the weights in ``file``, if given.

    ``file`` may be this project's or official; networks that it does not hold keep their initialisation, and so do the
    method's ``replaceable`` parts if the file's differ. Raises `UserError` for networks that do not fit.
    """
    method.start()
    if file is None:
        return
    with checkpoint.unmoved_random_states():  # training is the same whichever networks the file holds
        source = load(file)
    if type(source) is not type(method):
        raise UserError(f"{file} holds a {name_of(source)} model, not {name_of(method)}; name another train.init")
    networks = [(name, child) for name, child in source.named_children() if next(child.parameters(), None) is not None]
    for name, network in networks:
        target, state = getattr(method, name), network.state_dict()
        for part in method.replaceable:
            if part.startswith(f"{name}."):
                _keep_current(target.state_dict(), state, part.removeprefix(f"{name}."))
        checkpoint.load_strict(target, state, f"the {name} network of {file}")


def _keep_current(current: dict, state: dict, prefix: str) -> None:
    """Replace the entries of ``state`` below ``prefix`` by the ``current`` ones if names or shapes differ."""
    shapes = [{k: v.shape for k, v in each.items() if k.startswith(prefix)} for each in (current, state)]
    if shapes[0] != shapes[1]:
        for key in shapes[1]:
            del state[key]
        state.update({key: current[key] for key in shapes[0]})


def change(method: Method, test_time: dict) -> None:
    """Override settings of ``method`` that may change after training. Raises `UserError` for any other."""
    types = get_type_hints(method.Settings, include_extras=True)
    changed = {}
    for key, value in test_time.items():
        if key not in method.test_time:
            known = nearest(key, method.test_time) if method.test_time else "; no setting of it can"
            raise UserError(f"'{quoted(key)}' of {name_of(method)} cannot change after training{known}")
        changed[key] = config.convert(value, types[key], f"{name_of(method)}.{key}")
    method.accept(dataclasses.replace(method.settings, **changed))


def name_of(method: Method) -> str:
    """The method's name in the registry."""
    return next(name for name, kind in METHODS.items() if type(method) is kind)


def _path(file: str | Path | None) -> Path:
    """``file`` as a path, or that of the shipped weights, which is logged."""
    name = file or "nedr"
    if name not in METHODS or (file and Path(name).is_file()):  # a folder named like a method is not a file of weights
        return expand_home(file)
    path = shipped(name)
    if path is None:
        raise UserError(f"no weights of {name} ship with this project; name a file, or train one with train.py")
    logging.getLogger(__name__).info("shipped weights: %s", path)
    return path


def _from_own_file(metadata: dict, weights: dict, path: Path) -> Method:
    """The method for ``weights``; ``metadata`` of the file records its name and settings."""
    checkpoint.require(metadata, ("model", "settings"), path)
    settings = config.load(metadata["model"], settings_types(), saved=metadata["settings"])
    held = {key.split(".")[0] for key in weights}  # an inference file holds only the networks that dehaze
    with trust.limit_size(weights, path):
        method = METHODS[settings.model].with_networks(settings.method, held)
    checkpoint.load_strict(method, weights, str(path))
    return method


def _from_official_file(state: dict, path: Path, ema: bool) -> Method:
    kinds = METHODS.values()
    weights = foreign.find(state, lambda each: any(kind.recognises(each) for kind in kinds), ema)
    for name, kind in METHODS.items() if weights else ():
        with trust.limit_size(weights, path):
            method = kind.from_official(weights, config.load(name, settings_types()).method)
        if method is not None:
            return method
    known = ", ".join(name for name, kind in METHODS.items() if kind.stages)
    names = list(foreign.weight_sets(state).get("", {}))
    content = f"its {len(names)} tensors are {', '.join([*names[:3], '...'])}" if names else "it holds no weights"
    raise UserError(f"{path} is neither this project's checkpoint nor an official file of {known}: {content}")
