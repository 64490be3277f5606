"""Which settings may change over a resume, and which may not: stated here and nowhere else.

All may, but for those of `FIXED` and those of a warm start that is over (`FREE_IN_WARM_START` excepted), which are
refused by name. What may change is in force from the first step on: rates, betas, weight decay, schedules, batches,
losses, images, precision. What did change is told in the log.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from utils import checkpoint, config
from utils.errors import UserError

NETWORKS, START = "the networks learned with it", "it is read only where training begins"
NEDR = dict.fromkeys(
    ("variant", "kan_cid", "idrm", "drem", "base_channels", "idrm_hidden", "drem_growth", "encoder", "airlight"),
    NETWORKS,
) | {"airlight_head": NETWORKS, "encoder_weights": START}
OF_METHODS = {
    "nedr": NEDR,
    "d4": NEDR,
    "aknet": {"width": NETWORKS, "border": NETWORKS},
    "kanet": {"width": NETWORKS, "sample_weights.kind": NETWORKS, "sample_weights.saved": NETWORKS},
}
NEEDED = ("stage", "step", "best", "networks", "ema", "updater", "random")
FIXED = {"seed": "the order of the images comes from it", "train.init": START}
FIXED |= {f"{name}.{key}": why for name, keys in OF_METHODS.items() for key, why in keys.items()}
FREE_IN_WARM_START = ("warm_start.clear", "warm_start.depth", "warm_start.outdoor")  # where the images lie
FREE_IN_WARM_START += ("warm_start.replay",)  # of adversarial training that follows
CHOICE = ("data.validation_pairs", "data.validation_hazy", "data.validation_clear", "data.root", "log.validation_limit")


def changes(saved: Mapping[str, Any], settings: config.Settings, file: Path) -> dict[str, tuple[Any, Any]]:
    """Settings by name that differ from those in the checkpoint ``saved``, read from ``file``: (until now, now).

    Those that only test.py reads are left out, and those that the checkpoint does not know yet. Raises `UserError` for
    another method's checkpoint, for one that lacks what a run goes on from, and for a setting that may not change.
    """
    if saved.get("model") != settings.model:
        raise UserError(f"{file} is a checkpoint of {saved.get('model')}, not of {settings.model}")
    checkpoint.require(saved, NEEDED, file)
    before, now = dict(_flat(saved.get("settings", {}))), dict(_flat(config.to_dict(settings)))
    changed = {key: (before[key], value) for key, value in now.items() if key in before and before[key] != value}
    changed = {key: both for key, both in changed.items() if not key.startswith("test.")}
    over = saved["stage"] != "warm_start" and any((before.get("warm_start.steps"), now["warm_start.steps"]))
    for key, (old, new) in changed.items():
        past = over and key.startswith("warm_start.") and key not in FREE_IN_WARM_START
        why = "the warm start is over" if past else FIXED.get(key)
        if why:
            raise UserError(
                f"--resume: {key} was {_text(old)} until now, and cannot become {_text(new)}, since {why}; give "
                f"{key}={_text(old)} as before, or begin anew in another folder"
            )
    return changed


def told(changed: Mapping[str, tuple[Any, Any]]) -> Iterator[str]:
    """A line for every setting that is another from now on."""
    for key, (old, new) in changed.items():
        yield f"from now on {key}={_text(new)} (until now {_text(old)})"


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _text(value: Any) -> str:
    """A value as the command line takes it."""
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)
