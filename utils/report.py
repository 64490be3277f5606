"""What a scoring run leaves behind: a table on the screen, results.json and per_image.csv, each naming its protocol."""

import csv
import dataclasses
import io
import json
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from utils import config, metrics, scoring
from utils.checkpoint import atomic
from utils.config import Settings
from utils.scoring import Score

FIGURES = ("psnr", "ssim", "hazy_psnr", "hazy_ssim")


def table(model: str, scores: Sequence[Score]) -> str:
    """Mean figures of ``model`` beneath those of the hazy input, and the protocol, as lines for a terminal."""
    mean, width = scoring.mean(scores), max(len(model), len("hazy input"))
    lines = [
        f"{'':{width}}  PSNR (dB)    SSIM  s/picture",
        f"{'hazy input':{width}}  {mean.hazy_psnr:9.2f}  {mean.hazy_ssim:6.4f}",
        f"{model:{width}}  {mean.psnr:9.2f}  {mean.ssim:6.4f}  {mean.seconds:9.3f}",
        f"pictures: {len(scores)}",
        *(f"left out of the mean {key}: {count}, infinite or undefined" for key, count in _left_out(scores).items()),
        f"protocol {metrics.PROTOCOL['name']}: {metrics.PROTOCOL['pixels']}",
        f"  PSNR: {metrics.PROTOCOL['psnr']}",
        f"  SSIM: {metrics.PROTOCOL['ssim']}",
    ]
    return "\n".join(lines)


def write(
    folder: Path, scores: Sequence[Score], settings: Settings, *, weights: Path | None, device: str, skipped: list[str]
) -> None:
    """Write results.json and per_image.csv into ``folder``, each whole or not at all.

    ``settings`` are those in force, ``skipped`` says of every picture left out what was wrong. Infinite and undefined
    figures are the texts "inf" and "nan", since JSON has no numbers for them. Raises `UserError` if it cannot write.
    """
    in_force, mean = config.to_dict(settings), dataclasses.asdict(scoring.mean(scores))
    results = {
        "model": settings.model,
        "weights": weights and weights.name,
        "device": device,
        "settings": {key: in_force[key] for key in ("precision", "test", settings.model)},
        "protocol": metrics.PROTOCOL,
        "versions": metrics.versions(),
        "images": len(scores),
        "skipped": skipped,
        "mean": {key: mean[key] for key in FIGURES},
        "left_out_of_mean": _left_out(scores),
        "median_seconds": mean["seconds"],
        "per_image": [dataclasses.asdict(score) for score in scores],
    }
    _write_text(folder / "results.json", json.dumps(_plain(results), indent=2, allow_nan=False) + "\n")
    rows = io.StringIO(newline="")
    writer = csv.DictWriter(rows, [field.name for field in dataclasses.fields(Score)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(dataclasses.asdict(score) for score in scores)
    _write_text(folder / "per_image.csv", rows.getvalue())


def picture_names(names: Sequence[str]) -> dict[str, str]:
    """The PNG that each input becomes: a/b.jpg -> a/b.png, or a/b.jpg.png where folder a has two pictures named b."""
    folders = defaultdict(list)
    for name in map(PurePosixPath, dict.fromkeys(names)):
        folders[name.parent].append(name)
    outputs = {}
    for folder, members in folders.items():
        stems = Counter(name.stem.casefold() for name in members)
        taken = {name.name.casefold() for name in members}  # b.jpg.png must not get the name that b.jpg may need
        for name in members:
            alone = stems[name.stem.casefold()] == 1 and name.stem.casefold() not in taken
            outputs[str(name)] = str(folder / f"{name.stem if alone else name.name}.png")
    return outputs


def _left_out(scores: Sequence[Score]) -> dict[str, int]:
    counts = {key: scoring.left_out(getattr(score, key) for score in scores) for key in FIGURES}
    return {key: count for key, count in counts.items() if count}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _write_text(path: Path, text: str) -> None:
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="surrogateescape", newline="\n")
