"""Methods prepared for test.py: with their weights, the settings that may change after training, and their cost."""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import models
from models import clips, cost
from models.method import Method
from utils import checkpoint, config, files
from utils.config import Override
from utils.device import autocast
from utils.errors import UserError, nearest, quoted
from utils.evaluation.runner import Candidate, ImageSet
from utils.files import expand_home

WEIGHTS = ("weights.safetensors", "last.pt")  # in an experiment's folder; the first that exists is used


class Tested(NamedTuple):
    """A method ready to be tested, the file of its weights (None: it has none), and the user's settings.

    ``name`` is the method's, preceded by the weights' folder if several files hold one method; ``overrides`` are the
    test-time settings that the user gave, which take precedence over presets of benchmarks. ``chosen_on``: the images
    by whose scores the weights were selected (`utils.evaluation.selection`), if the file records them.
    """

    name: str
    method: Method
    weights: Path | None
    overrides: dict[str, Any]
    chosen_on: dict[str, Any] | None = None

    @property
    def folder(self) -> str:
        """The name as a folder's name: Windows allows no colon."""
        return self.name.replace(":", "-")

    def candidate(self, settings: config.Settings, device: torch.device, pictures: ImageSet, folder: str) -> Candidate:
        """The method configured for this set of images: with the set's preset and the user's overrides."""
        method, test = self.method.to(device), settings.test
        models.change(method, method.preset(**pictures.preset) | self.overrides)
        if test.show == "transmission" or test.strength != 1:
            method.require_haze(method.estimate(torch.zeros(1, 3, 32, 32, device=device)), _haze_setting(test))

        def apply(function: Callable, hazy: Tensor, *options: Any) -> Any:
            with autocast(device, settings.precision):
                return function(hazy, method.tile(hazy, test.tile), *options)

        frames = clips.plan(self, settings, device, pictures.name) if test.temporal else None
        number = itertools.count()

        def dehaze(hazy: Tensor) -> Tensor:
            if frames is not None:
                return frames.in_order(hazy, frames.parallel(hazy, next(number)))
            if test.show == "transmission":
                return apply(method.estimate, hazy)["transmission"]
            return apply(method.dehaze, hazy, test.self_ensemble, test.strength)

        return Candidate(
            self.name,
            dehaze=dehaze,
            estimate=lambda hazy: apply(method.estimate, hazy, test.strength),
            settings={key: getattr(method.settings, key) for key in method.test_time},
            folder=folder,
            chosen_on=self.chosen_on,
            tile=None if method.exact_tiles or test.tile in ("auto", 0) else test.tile,
        )

    def guess(self, pictures: ImageSet) -> str | None:
        """A warning about a guessed setting, which neither the weights, the set nor the user determine, or None."""
        return self.method.guess(pictures.preset.keys() | self.overrides.keys())

    def facts(self) -> dict[str, Any]:
        """The weights and settings on which the method's scores depend."""
        return {
            "model": models.name_of(self.method),
            "weights": self.weights and self.weights.name,
            "sha256": self.weights and files.sha256(self.weights),
            "settings": dataclasses.asdict(self.method.settings),
            "chosen_on": self.chosen_on and {key: self.chosen_on[key] for key in ("sets", "pictures")},
        }

    def cost(self, device: torch.device) -> dict[str, int]:
        """Size and cost, for the report; runs a forward pass."""
        return {
            "parameters": cost.parameters(self.method, self.method.inference),
            "macs_256": cost.macs(self.method.dehaze, device),
        }


def prepare(
    requested: Sequence[str],
    folder: Path | None,
    test: config.Test,
    files: Sequence[Path],
    overrides: Sequence[Override],
    say: Callable[[str], None] = lambda line: None,
) -> list[Tested]:
    """The ``requested`` methods, in that order: those without weights, and those loaded from ``test.weights``.

    If that names no weights, they are those in ``folder``, and without a folder the shipped ones (reported by
    ``say``); if no method is requested, the weights determine them. ``files`` and ``overrides`` may change only the
    test-time settings of a trained method. Raises `UserError`.
    """
    names = list(dict.fromkeys(requested))
    for name in names:
        if name not in models.METHODS:
            raise UserError(f"unknown model '{quoted(name)}'{nearest(name, models.METHODS)}")
    trained = [name for name in names if models.METHODS[name].stages]
    paths = _weights(folder, test, trained, say) if trained or not names else []
    loaded = [_load(path, test.ema, files, overrides) for path in paths]
    if names:
        _check_complete(loaded, trained)
    prepared = loaded if not names else []
    for name in names:
        of_name = [each for each in loaded if models.name_of(each.method) == name]
        prepared += of_name if name in trained else [_build(name, files, overrides)]
    config.check_used([models.name_of(each.method) for each in prepared], models.settings_types(), overrides)
    return _with_unique_names(prepared)


def _haze_setting(test: config.Test) -> str:
    """The setting that needs a transmission, as the user wrote it."""
    return "test.show=transmission" if test.show == "transmission" else f"test.strength={test.strength:g}"


def _check_complete(loaded: Sequence[Tested], trained: Sequence[str]) -> None:
    """Raise `UserError` for weights of a method that was not requested and for a method without weights."""
    for each in loaded:
        if each.name not in trained:
            other = f"not {' or '.join(trained)}; give --model {each.name} or other weights"
            raise UserError(f"{each.weights} holds a {each.name} model, {other}")
    missing = [name for name in trained if name not in [each.name for each in loaded]]
    if missing:
        given = ", ".join(str(each.weights) for each in loaded)
        raise UserError(
            f"no weights of {' and '.join(missing)} in {given}; name a file of each with --weights FILE ..."
        )


def _with_unique_names(tested: list[Tested]) -> list[Tested]:
    """Prefix names with the weights' folder if several share a method. Raises `UserError` if duplicates remain."""
    names = Counter(each.name for each in tested)
    tested = [
        each if names[each.name] == 1 else each._replace(name=f"{each.weights.absolute().parent.name}:{each.name}")
        for each in tested
    ]
    for name, count in Counter(each.name for each in tested).items():
        if count > 1:
            raise UserError(f"--weights: {count} files would be called {name}; test files of one folder one by one")
    return tested


def _build(name: str, files: Sequence[Path], overrides: Sequence[Override]) -> Tested:
    types = models.settings_types()
    settings = config.load(name, types, files, overrides, used=types)
    return Tested(name, models.build(settings).eval(), None, _test_time(name, files, overrides))


def _load(path: Path, ema: bool, files: Sequence[Path], overrides: Sequence[Override]) -> Tested:
    method = models.load(path, ema=ema)
    name = models.name_of(method)
    given = config.given(models.settings_types(), overrides=overrides).get(name, {})
    fixed = [key for key in given if key not in method.test_time]
    if fixed:
        raise UserError(f"{name}.{fixed[0]} is fixed by training; only {', '.join(method.test_time)} can change now")
    changes = _test_time(name, files, overrides)
    models.change(method, changes)
    metadata = checkpoint.read_metadata(path) if path.suffix == ".safetensors" else {}  # last.pt was not selected
    return Tested(name, method, path, changes, metadata.get("chosen_on"))


def _test_time(name: str, files: Sequence[Path], overrides: Sequence[Override]) -> dict[str, Any]:
    """The test-time settings of ``name`` that ``files`` and ``overrides`` set explicitly."""
    types = models.settings_types()
    given = config.given(types, files, overrides).get(name, {})
    values = config.load(name, types, files, overrides, used=types)
    return {key: getattr(values.method, key) for key in given if key in models.METHODS[name].test_time}


def _weights(folder: Path | None, test: config.Test, trained: list[str], say: Callable[[str], None]) -> list[Path]:
    """The files named by ``test``, or the best weights in an experiment's folder, or the shipped ones."""
    if test.weights:
        paths = [expand_home(name) for name in dict.fromkeys(test.weights)]
    elif folder is None:
        paths = [_shipped(name, say) for name in trained or ["nedr"]]
    else:
        return [_in_folder(folder, WEIGHTS if test.ema else WEIGHTS[1:])]
    for path in paths:
        if not test.ema and path.suffix == ".safetensors":
            raise UserError(f"{path}: holds one set of weights; raw ones (test.ema=false) are in a last.pt")
    return paths


def _in_folder(folder: Path, names: Sequence[str]) -> Path:
    """The first of the ``names`` that is a file in an experiment's ``folder``."""
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{folder}: no {' or '.join(names)}; train it, or give --weights FILE (official ones too)")


def _shipped(name: str, say: Callable[[str], None]) -> Path:
    path = models.shipped(name)
    if path is None:
        others = ", ".join(each for each, kind in models.METHODS.items() if models.shipped(each) or not kind.stages)
        raise UserError(
            f"no weights of {name} named, and none ship; give --checkpoints DIR, --weights FILE, or one of {others}"
        )
    say(f"{name}: the weights shipped with this project (checkpoints/README.md)")
    return path
