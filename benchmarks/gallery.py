"""Make docs/gallery.md: what the weights that ship do, and where they fail, beside the dark channel prior.

    python -m benchmarks.gallery [--output docs]

Images of the sample set (`data.sample`), and rendered ones (`benchmarks.scenes`), whose truth is known.
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
WIDE = 270  # pixels of each image; five stand side by side
SKY = 300.0  # metres: how far away the sky is taken to be


class Case(NamedTuple):
    name: str
    title: str
    hazy: Tensor  # (3,H,W) in [0,1]
    clear: Tensor
    remark: str


def main(arguments: list[str] | None = None) -> None:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gallery", description=__doc__, formatter_class=style)
    parser.add_argument("--output", type=Path, default=Path("docs"), help="folder of gallery.md and gallery/ (docs)")
    output = parser.parse_args(arguments).output
    methods = {name: models.load(name) for name in METHODS}
    parts = [HEAD]
    for case in cases():
        shown, figures = treat(case, methods)
        save(output / "gallery" / f"{case.name}.jpg", panels.panel({name: small(each) for name, each in shown.items()}))
        parts.append(section(case, figures))
    (output / "gallery.md").write_text("\n".join(parts), encoding="utf-8")
    print(f"see {output / 'gallery.md'}")


def cases() -> Iterator[Case]:
    """All cases, the easy ones first."""
    for scene, remark in SAMPLES.items():
        folder, name = sample.make() / scene.partition("/")[0], scene.partition("/")[2]
        clear = images.read(folder / "clear" / f"{name.rpartition('_')[0]}.png")
        yield Case(name, f"Sample set: {name}", images.read(folder / "hazy" / f"{name}.png"), clear, remark)
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
    """``clear`` in haze through which ``seen`` metres can be seen: there 5 % of the light come through."""
    return synthesis.add_haze(clear, metres.clamp(max=SKY), 3 / seen, torch.tensor(airlight))[0]


def treat(case: Case, methods: dict[str, Method]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Captions and images, and the PSNR of the hazy image and of every method's."""
    found = {name: method.estimate(case.hazy[None]) for name, method in methods.items()}
    made = {"hazy": case.hazy} | {name: each["clear"][0] for name, each in found.items()}
    figures = {name: metrics.psnr(picture, case.clear) for name, picture in made.items()}
    shown = {f"{name}, {figures[name]:.1f} dB": picture for name, picture in made.items()}
    return shown | {"truth": case.clear, "nedr: transmission": found["nedr"]["transmission"][0]}, figures


def small(picture: Tensor) -> Tensor:
    """(C,H,W) no wider than `WIDE`."""
    height, width = picture.shape[1:]
    size = (round(height * WIDE / width), WIDE)
    return picture if width <= WIDE else F.interpolate(picture[None], size, mode="bilinear", antialias=True)[0]


def save(path: Path, picture: Tensor) -> None:
    """A JPEG as small as documents want it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rounding.to_8bit(picture)).save(path, quality=85, optimize=True)


def section(case: Case, figures: dict[str, float]) -> str:
    told = ", ".join(f"{name} {value:.1f} dB" for name, value in figures.items())
    return f"## {case.title}\n\n![{told}](gallery/{case.name}.jpg)\n\n{case.remark}\n"


HEAD = """# Gallery

Hazy, dehazed by the weights that ship (nedr) and by the dark channel prior (dcp), the truth, and the transmission
that nedr found (white: no haze); with PSNR in dB at full size. All of it is made by `python -m benchmarks.gallery`:
images of the sample set with haze made by the haze law, and a rendered street for what that set lacks. Photographs of
real haze are harder than either; what was seen on those stands in the
[model card](../checkpoints/README.md#where-it-fails).
"""

SAMPLES = {
    "test/coffee_2": "No training saw this scene. The haze goes; what is dark comes out a little darker than it was.",
    "test/chelsea_3": "Thick haze: the colours come back, where dcp takes pale fur for haze and burns it.",
    "train/motorcycle_left_2": "Haze by measured depth goes evenly, near and far.",
    "train/rocket_1": "**Fails.** The sky at dusk is dark and blue; it is taken for haze, and comes out nearly black.",
}
REMARKS = {
    "street": "Near and middle distance are right. The sky, of which hardly any light came through, comes out white.",
    "dense": "**Fails.** What dense haze has hidden stays hidden, and what is near comes out with too much contrast.",
    "white": "**Fails in part.** White and hazy look alike: walls and cars come out brighter than they are.",
    "sky": "**Fails in part.** The land is right; the sky stays pale, where dcp makes it cyan and burns the clouds.",
    "dusk": "**Fails in part.** The far end keeps a blue veil, and what is near comes out too dark.",
    "night": "**Fails.** The glow around lamps is no airlight: it stays, and what is dark becomes black.",
}


if __name__ == "__main__":
    errors.run(main)
