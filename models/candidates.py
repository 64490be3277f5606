"""Methods made ready for test.py: with their weights, the settings that may change after training, and their cost."""

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

WEIGHTS = ("weights.safetensors", "last.pt")  # of an experiment's folder, the first that is there


class Tested(NamedTuple):
    """A method ready to be tested, where its weights come from (None: it has none), and what was asked of it.

    ``name`` is the method's, and the weights' folder with it where several are of one method; ``asked`` are the
    test-time settings that the user gave, and presets of benchmarks do not go over them. ``chosen_on``: the images
    that the weights were chosen on, as of `utils.evaluation.selection`, if they were and say so.
    """

    name: str
    method: Method
    weights: Path | None
    asked: dict[str, Any]
    chosen_on: dict[str, Any] | None = None

    @property
    def folder(self) -> str:
        """The name as that of a folder: Windows takes no colon."""
        return self.name.replace(":", "-")

    def candidate(self, settings: config.Settings, device: torch.device, pictures: ImageSet, folder: str) -> Candidate:
        """The method as it treats this set: with the set's preset, unless other settings were asked for."""
        method, test = self.method.to(device), settings.test
        models.change(method, method.preset(**pictures.preset) | self.asked)
        if test.show == "transmission" or test.strength != 1:
            method.check_haze(method.estimate(torch.zeros(1, 3, 32, 32, device=device)), _first(test))

        def apply(verb: Callable, hazy: Tensor, *options: Any) -> Any:
            with autocast(device, settings.precision):
                return verb(hazy, method.tile(hazy, test.tile), *options)

        frames, number = clips.plan(self, settings, device, pictures.name) if test.temporal else None, itertools.count()

        def dehaze(hazy: Tensor) -> Tensor:
            if frames is not None:
                return frames.then(hazy, frames.first(hazy, next(number)))
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
        """What of the method is guessed for this set, that neither the weights nor the set nor the user tell."""
        return self.method.guess(pictures.preset.keys() | self.asked.keys())

    def facts(self) -> dict[str, Any]:
        """What the figures of the method depend on: its weights and settings."""
        return {
            "model": models.name_of(self.method),
            "weights": self.weights and self.weights.name,
            "sha256": self.weights and files.sha256(self.weights),
            "settings": dataclasses.asdict(self.method.settings),
            "chosen_on": self.chosen_on and {key: self.chosen_on[key] for key in ("sets", "pictures")},
        }

    def cost(self, device: torch.device) -> dict[str, int]:
        """Size and cost, which a report gives beside the figures; takes a forward pass."""
        return {
            "parameters": cost.parameters(self.method, self.method.inference),
            "macs_256": cost.macs(self.method.dehaze, device),
        }


def prepare(
    named: Sequence[str],
    folder: Path | None,
    test: config.Test,
    files: Sequence[Path],
    overrides: Sequence[Override],
    say: Callable[[str], None] = lambda line: None,
) -> list[Tested]:
    """The methods ``named``, in that order: those without weights, and those that are loaded from ``test.weights``.

    Without weights named, they are looked for in ``folder``, and without that the ones that ship with the project are
    taken (``say`` hears of it); with no name at all the weights tell the methods. ``files`` and ``overrides`` may
    change test-time settings, and nothing else of a trained method. Raises `UserError`.
    """
    names = list(dict.fromkeys(named))
    for name in names:
        if name not in models.METHODS:
            raise UserError(f"unknown model '{quoted(name)}'{nearest(name, models.METHODS)}")
    trained = [name for name in names if models.METHODS[name].stages]
    paths = _weights(folder, test, trained, say) if trained or not names else []
    loaded = [_load(path, test.ema, files, overrides) for path in paths]
    if names:
        _check_all_there(loaded, trained)
    found = loaded if not names else []
    for name in names:
        of_name = [each for each in loaded if models.name_of(each.method) == name]
        found += of_name if name in trained else [_build(name, files, overrides)]
    config.check_used([models.name_of(each.method) for each in found], models.settings_types(), overrides)
    return _told_apart(found)


def _first(test: config.Test) -> str:
    """The setting that wants a transmission, as the user gives it."""
    return "test.show=transmission" if test.show == "transmission" else f"test.strength={test.strength:g}"


def _check_all_there(loaded: Sequence[Tested], trained: Sequence[str]) -> None:
    """Refuse weights of a method that was not named, and a method without weights. Raises `UserError`."""
    for each in loaded:
        if each.name not in trained:
            other = f"not {' or '.join(trained)}; give --model {each.name} or other weights"
            raise UserError(f"{each.weights} holds a {each.name} model, {other}")
    lacking = [name for name in trained if name not in [each.name for each in loaded]]
    if lacking:
        there = ", ".join(str(each.weights) for each in loaded)
        raise UserError(
            f"no weights of {' and '.join(lacking)} in {there}; name a file of each with --weights FILE ..."
        )


def _told_apart(found: list[Tested]) -> list[Tested]:
    """With the names of their folders where several are of one method; refuses what is still the same."""
    names = Counter(each.name for each in found)
    found = [
        each if names[each.name] == 1 else each._replace(name=f"{each.weights.absolute().parent.name}:{each.name}")
        for each in found
    ]
    for name, count in Counter(each.name for each in found).items():
        if count > 1:
            raise UserError(f"--weights: {count} files would be called {name}; test files of one folder one by one")
    return found


def _build(name: str, files: Sequence[Path], overrides: Sequence[Override]) -> Tested:
    types = models.settings_types()
    settings = config.load(name, types, files, overrides, used=types)
    return Tested(name, models.build(settings).eval(), None, _asked(name, files, overrides))


def _load(path: Path, ema: bool, files: Sequence[Path], overrides: Sequence[Override]) -> Tested:
    method = models.load(path, ema=ema)
    name = models.name_of(method)
    given = config.given(models.settings_types(), overrides=overrides).get(name, {})
    fixed = [key for key in given if key not in method.test_time]
    if fixed:
        raise UserError(f"{name}.{fixed[0]} was settled by training; only {', '.join(method.test_time)} can change now")
    wanted = _asked(name, files, overrides)
    models.change(method, wanted)
    metadata = checkpoint.read_metadata(path) if path.suffix == ".safetensors" else {}  # last.pt is no choice
    return Tested(name, method, path, wanted, metadata.get("chosen_on"))


def _asked(name: str, files: Sequence[Path], overrides: Sequence[Override]) -> dict[str, Any]:
    """The test-time settings of ``name`` that ``files`` and ``overrides`` themselves give."""
    types = models.settings_types()
    given = config.given(types, files, overrides).get(name, {})
    values = config.load(name, types, files, overrides, used=types)
    return {key: getattr(values.method, key) for key in given if key in models.METHODS[name].test_time}


def _weights(folder: Path | None, test: config.Test, trained: list[str], say: Callable[[str], None]) -> list[Path]:
    """The files that ``test`` names, or the best weights of an experiment's folder, or those that ship."""
    if test.weights:
        paths = [expand_home(name) for name in dict.fromkeys(test.weights)]
        for path in paths:
            if not test.ema and path.suffix == ".safetensors":
                raise UserError(f"{path}: holds one set of weights; raw ones (test.ema=false) are in a last.pt")
        return paths
    if folder is None:
        return [_shipped(name, say) for name in trained or ["nedr"]]
    choice = WEIGHTS if test.ema else WEIGHTS[1:]
    for name in choice:
        if (folder / name).is_file():
            return [folder / name]
    raise UserError(f"{folder}: no {' or '.join(choice)}; train it, or give --weights FILE (official ones too)")


def _shipped(name: str, say: Callable[[str], None]) -> Path:
    path = models.shipped(name)
    if path is None:
        others = ", ".join(each for each, kind in models.METHODS.items() if models.shipped(each) or not kind.stages)
        raise UserError(
            f"no weights of {name} named, and none ship; give --checkpoints DIR, --weights FILE, or one of {others}"
        )
    say(f"{name}: the weights that ship with this project (checkpoints/README.md)")
    return path
