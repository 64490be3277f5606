"""Which settings may change on --resume.

All may change except those of `FIXED` and those of a finished warm start that are not in `FREE_IN_WARM_START`; these
are refused by name. Changes take effect at the first step (learning rates, betas, weight decay, schedules, batches,
losses, images, precision) and are logged.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from utils import checkpoint, config
from utils.errors import UserError

LEARNED = "the networks learned with it"
ONLY_AT_START = "it is read only where training begins"
NEDR_SETTINGS = dict.fromkeys(
    ("variant", "kan_cid", "idrm", "drem", "base_channels", "idrm_hidden", "drem_growth", "encoder", "airlight"),
    LEARNED,
) | {"airlight_head": LEARNED, "encoder_weights": ONLY_AT_START}
METHOD_SETTINGS = {
    "nedr": NEDR_SETTINGS,
    "d4": NEDR_SETTINGS,
    "aknet": {"width": LEARNED, "border": LEARNED},
    "kanet": {"width": LEARNED, "sample_weights.kind": LEARNED, "sample_weights.saved": LEARNED},
}
REQUIRED_FIELDS = ("stage", "step", "best", "networks", "ema", "updater", "random")
FIXED = {"seed": "the order of the images comes from it", "train.init": ONLY_AT_START}
FIXED |= {f"{name}.{key}": why for name, keys in METHOD_SETTINGS.items() for key, why in keys.items()}
FREE_IN_WARM_START = ("warm_start.clear", "warm_start.depth", "warm_start.outdoor")  # folders of images
FREE_IN_WARM_START += ("warm_start.replay", "warm_start.outdoor_share")  # used by the adversarial training that follows
VALIDATION_SETTINGS = ("data.validation_pairs", "data.validation_hazy", "data.validation_clear", "data.root")
VALIDATION_SETTINGS += ("log.validation_limit",)


def changes(saved: Mapping[str, Any], settings: config.Settings, file: Path) -> dict[str, tuple[Any, Any]]:
    """Settings by name that differ from those in the checkpoint ``saved``, read from ``file``: (until now, now).

    Settings of test.py only, and those that are newer than the checkpoint, are left out. Raises `UserError` for another
    method's checkpoint, for one that lacks a field needed to resume, and for a setting that may not change.
    """
    if saved.get("model") != settings.model:
        raise UserError(f"{file} is a checkpoint of {saved.get('model')}, not of {settings.model}")
    before = dict(_flat(saved.get("settings", {})))
    now = dict(_flat(config.to_dict(settings)))
    changed = {key: (before[key], value) for key, value in now.items() if key in before and before[key] != value}
    changed = {key: both for key, both in changed.items() if not key.startswith("test.")}
    warm_start_over = saved.get("stage") != "warm_start" and any(
        (before.get("warm_start.steps"), now["warm_start.steps"])
    )
    for key, (old, new) in changed.items():
        past = warm_start_over and key.startswith("warm_start.") and key not in FREE_IN_WARM_START
        reason = "the warm start is over" if past else FIXED.get(key)
        if reason:
            raise UserError(
                f"--resume: {key} was {_text(old)} until now, and cannot become {_text(new)}, since {reason}; give "
                f"{key}={_text(old)} as before, or start a new run in another folder"
            )
    checkpoint.require(saved, REQUIRED_FIELDS, file)
    return changed


def log_lines(changed: Mapping[str, tuple[Any, Any]]) -> Iterator[str]:
    """A line for the log for every setting that has changed."""
    for key, (old, new) in changed.items():
        yield f"from now on {key}={_text(new)} (until now {_text(old)})"


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _text(value: Any) -> str:
    """A value as written on the command line."""
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)
