"""Make docs/gallery.md: results and failures of the weights that ship, next to the dark channel prior.

    python -m benchmarks.gallery [--output docs]

Images of the sample set (`data.sample`) and rendered ones (`benchmarks.scenes`), whose ground truth is known.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import models
from benchmarks import scenes
from data import images, sample, synthesis
from models.method import Method
from utils import errors, rounding
from utils.evaluation import metrics, panels

METHODS = ("nedr", "dcp")
WIDTH = 270  # pixels of each image; five are shown side by side
SKY = 300.0  # metres, the assumed distance of the sky


class Case(NamedTuple):
    name: str
    title: str
    hazy: Tensor  # (3,H,W) in [0,1]
    clear: Tensor
    comment: str


def main(arguments: list[str] | None = None) -> None:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gallery", description=__doc__, formatter_class=style)
    parser.add_argument("--output", type=Path, default=Path("docs"), help="folder of gallery.md and gallery/ (docs)")
    output = parser.parse_args(arguments).output
    methods = {name: models.load(name) for name in METHODS}
    parts = [HEAD]
    for case in cases():
        shown, figures = dehaze(case, methods)
        reduced = {caption: shrink(image) for caption, image in shown.items()}
        save(output / "gallery" / f"{case.name}.jpg", panels.panel(reduced))
        parts.append(section(case, figures))
    (output / "gallery.md").write_text("\n".join(parts), encoding="utf-8")
    print(f"see {output / 'gallery.md'}")


def cases() -> Iterator[Case]:
    """All cases, the easy ones first."""
    for scene, comment in SAMPLES.items():
        split, _, name = scene.partition("/")
        folder = sample.make() / split
        clear = images.read(folder / "clear" / f"{name.rpartition('_')[0]}.png")
        yield Case(name, f"Sample set: {name}", images.read(folder / "hazy" / f"{name}.png"), clear, comment)
    day, metres = scenes.render(scenes.street())
    white, _ = scenes.render(scenes.street((scenes.WHITE, scenes.WHITE), (scenes.WHITE, scenes.WHITE)))
    field, far = scenes.render([box for box in scenes.street() if box.low[2] > 45 and box.windows])
    night, fog = scenes.by_night(day, metres, seen=60)
    for name, title, clear, depth, seen, airlight in (
        ("street", "A street in haze", day, metres, 120, (0.85, 0.87, 0.9)),
        ("dense", "Dense haze", day, metres, 25, (0.8, 0.8, 0.8)),
        ("white", "White walls and cars", white, metres, 120, (0.85, 0.87, 0.9)),
        ("sky", "A wide sky", field, far, 400, (0.9, 0.92, 0.95)),
        ("dusk", "Fog at dusk", day * 0.35, metres, 90, (0.36, 0.38, 0.45)),
    ):
        yield Case(name, title, hazed(clear, depth, seen, airlight), clear, REMARKS[name])
    yield Case("night", "Fog at night, with lamps", fog, night, REMARKS["night"])


def hazed(clear: Tensor, metres: Tensor, seen: float, airlight: tuple[float, float, float]) -> Tensor:
    """``clear`` in haze with a visibility of ``seen`` metres, the distance from which 5 % of the light arrive."""
    return synthesis.add_haze(clear, metres.clamp(max=SKY), 3 / seen, torch.tensor(airlight))[0]


def dehaze(case: Case, methods: dict[str, Method]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Images by caption, and the PSNR of the hazy image and of every method's result."""
    estimates = {name: method.estimate(case.hazy[None]) for name, method in methods.items()}
    results = {"hazy": case.hazy} | {name: estimate["clear"][0] for name, estimate in estimates.items()}
    figures = {name: metrics.psnr(image, case.clear) for name, image in results.items()}
    shown = {f"{name}, {figures[name]:.1f} dB": image for name, image in results.items()}
    return shown | {"truth": case.clear, "nedr: transmission": estimates["nedr"]["transmission"][0]}, figures


def shrink(image: Tensor) -> Tensor:
    """(C,H,W), at most `WIDTH` wide."""
    height, width = image.shape[1:]
    size = (round(height * WIDTH / width), WIDTH)
    return image if width <= WIDTH else F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]


def save(path: Path, image: Tensor) -> None:
    """Write (3,H,W) in [0,1] as a small JPEG for the documentation."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rounding.to_8bit(image)).save(path, quality=85, optimize=True)


def section(case: Case, figures: dict[str, float]) -> str:
    caption = ", ".join(f"{name} {value:.1f} dB" for name, value in figures.items())
    return f"## {case.title}\n\n![{caption}](gallery/{case.name}.jpg)\n\n{case.comment}\n"


HEAD = """# Gallery

From left to right: the hazy image, dehazed by the weights that ship (nedr) and by the dark channel prior (dcp), the
ground truth, and nedr's transmission (white: no haze); with PSNR in dB at full size. Made by
`python -m benchmarks.gallery`: images of the sample set with synthetic haze by the haze law, and a rendered street for
scenes that the set lacks. Photographs of real haze are harder than either; for the results on those see the
[model card](../checkpoints/README.md#where-it-fails).
"""

SAMPLES = {
    "test/coffee_2": "Not in the training data. The haze is removed; dark areas become slightly too dark.",
    "test/chelsea_3": "Dense haze: the colours are recovered, while dcp mistakes pale fur for haze.",
    "train/motorcycle_left_2": "Haze by measured depth is removed evenly, near and far.",
    "train/rocket_1": "**Fails in part.** The dark blue sky at dusk is taken for haze and becomes too dark.",
}
REMARKS = {
    "street": "Near and middle distance are right. The sky, from which hardly any light arrived, becomes white.",
    "dense": "**Fails.** What dense haze hides is not recovered, and near objects get too much contrast.",
    "white": "**Fails in part.** White surfaces look like haze: walls and cars become too bright.",
    "sky": "**Fails in part.** The ground is right; the sky stays pale, while dcp turns it cyan and clips the clouds.",
    "dusk": "**Fails in part.** The far end keeps a blue veil, and near objects become too dark.",
    "night": "**Fails.** The glow around lamps is not airlight: it stays, and dark areas become black.",
}


if __name__ == "__main__":
    errors.run(main)
