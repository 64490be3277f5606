"""Haze on clear pictures by the scattering model, I = J t + A (1 - t), t = exp(-beta d).

As a command it writes a set in the manner of RESIDE's ITS (Li et al., "Benchmarking Single-Image Dehazing and
Beyond", TIP 2019): d is the depth divided by the maximum of the whole map, beta in [0.6, 1.8], A in [0.7, 1].

    python -m data.haze --clear CLEAR --depth DEPTH --output OUTPUT --per-image 10
"""

import argparse
import multiprocessing
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from data import images
from utils import errors, physics
from utils.errors import UserError

DENSITY = (0.6, 1.8)
AIRLIGHT = (0.7, 1.0)


def smooth_depth(height: int, width: int, rng: np.random.Generator) -> Tensor:
    """Make up a smooth depth map: a plane that recedes towards the top, with hills. (1,H,W), largest value 1."""
    ramp = torch.linspace(1, 0, height, dtype=torch.float64).view(1, height, 1) ** rng.uniform(0.7, 2.0)
    coarse = torch.from_numpy(rng.random((1, 1, 4, 5)))
    hills = F.interpolate(coarse, (height, width), mode="bicubic", align_corners=True)[0].clamp(0, 1)
    share = rng.uniform(0.5, 0.8)
    depth = share * ramp + (1 - share) * hills
    nearest = rng.uniform(0.05, 0.25)  # nothing stands at the lens itself
    depth = nearest + (1 - nearest) * depth
    return (depth / depth.max()).float()


def add_haze(clear: Tensor, depth: Tensor, beta: float, airlight: Tensor) -> tuple[Tensor, Tensor]:
    """Put haze on ``clear`` (3,H,W) in [0,1], with ``depth`` (1,H,W), density ``beta`` >= 0, ``airlight`` (3,).

    -> hazy (3,H,W) in [0,1], transmission (1,H,W) in (0,1].
    """
    t = physics.transmission(depth, torch.tensor(beta, dtype=depth.dtype))
    return physics.scatter(clear, t, airlight.view(3, 1, 1)).clamp(0, 1), t


def random_haze(
    clear: Tensor,
    depth: Tensor | None,
    rng: np.random.Generator,
    density: tuple[float, float] = DENSITY,
    airlight: tuple[float, float] = AIRLIGHT,
    colour: float = 0.0,
) -> dict[str, Tensor]:
    """Put haze of random density and airlight on ``clear`` (3,H,W); without ``depth`` (1,H,W) that is made up too.

    The airlight is a grey from its range, each channel of which is then moved by up to ``colour`` and clamped.
    -> hazy, clear (3,H,W), transmission (1,H,W), airlight (3,1,1), density (1,).
    """
    if depth is None:
        depth = smooth_depth(*clear.shape[1:], rng)
    beta, grey = rng.uniform(*density), rng.uniform(*airlight)
    tint = np.clip(grey + rng.uniform(-1, 1, 3) * colour, 0, 1)
    light = torch.from_numpy(tint.astype(np.float32))
    hazy, t = add_haze(clear, depth, beta, light)
    return {
        "hazy": hazy,
        "clear": clear,
        "transmission": t,
        "airlight": light.view(3, 1, 1),
        "density": torch.tensor([beta], dtype=torch.float32),
    }


def read_with_depth(clear: Path, depth: Path | None) -> tuple[Tensor, Tensor | None]:
    """Read a picture (3,H,W) and its depth map (1,H,W) in [0,1]. Raises `UserError` if their sizes differ."""
    picture = images.read(clear)
    if depth is None:
        return picture, None
    distance = images.read_depth(depth)
    if distance.shape[1:] != picture.shape[1:]:
        sizes = [f"{tensor.shape[2]}x{tensor.shape[1]}" for tensor in (picture, distance)]
        raise UserError(f"{clear} is {sizes[0]} but its depth map {depth} is {sizes[1]}; they must have one size")
    return picture, distance


def write_hazy(task: tuple[Path, Path | None], options: argparse.Namespace) -> None:
    """Write a clear picture, its depth map if given, and its ``per_image`` hazy ones, seeded by its name alone."""
    clear, depth = task
    picture, distance = read_with_depth(clear, depth)
    rng = np.random.default_rng([options.seed, zlib.crc32(clear.stem.encode())])
    if distance is None:
        distance = smooth_depth(*picture.shape[1:], rng)
    picture, distance = (_trim(tensor, options, clear) for tensor in (picture, distance))
    save = partial(images.write, compress_level=1)
    save(options.output / "clear" / f"{clear.stem}.{options.format}", picture)
    if depth is not None:
        images.write_depth(options.output / "depth" / f"{clear.stem}.png", distance)
    for n in range(1, options.per_image + 1):
        grey = round(rng.uniform(*options.airlight), 5)  # the name tells it with five places: be true to it
        hazy, _ = add_haze(picture, distance, rng.uniform(*options.density), torch.full((3,), grey))
        save(options.output / "hazy" / f"{clear.stem}_{n}_{grey:.5f}.{options.format}", hazy)


def _trim(tensor: Tensor, options: argparse.Namespace, path: Path) -> Tensor:
    border, (height, width) = options.border, tensor.shape[1:]
    if 2 * border >= min(height, width):
        raise UserError(f"{path}: {width}x{height} leaves nothing inside --border {border}; make it smaller")
    tensor = tensor[:, border : height - border, border : width - border]
    return tensor.flip(2) if options.mirror else tensor


def _tasks(options: argparse.Namespace) -> list[tuple[Path, Path | None]]:
    clear = images.find(options.clear)
    for paths in images.by_stem(clear).values():
        if len(paths) > 1:
            raise UserError(f"{paths[0]} and {paths[1]} would be written to one name; rename one")
    if options.depth is None:
        return [(path, None) for path in clear]
    depth = images.match_depth(clear, images.find(options.depth, images.DEPTH_EXTENSIONS))
    return list(zip(clear, depth, strict=True))


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m data.haze",
        description="Write a hazy set in the manner of RESIDE's ITS: OUTPUT/clear, OUTPUT/hazy and OUTPUT/depth.",
    )
    parser.add_argument("--clear", required=True, help="clear pictures: a folder, a .flist or sample:train/clear")
    parser.add_argument("--depth", help="depth maps of the same stems (grey pictures or .npy); else made up")
    parser.add_argument("--output", required=True, type=Path, help="folder to write")
    parser.add_argument("--per-image", type=int, default=1, help="hazy pictures of each clear one (1)")
    parser.add_argument("--density", type=float, nargs=2, default=DENSITY, help="range of beta (0.6 1.8)")
    parser.add_argument("--airlight", type=float, nargs=2, default=AIRLIGHT, help="range of A (0.7 1.0)")
    parser.add_argument("--seed", type=int, default=10)
    parser.add_argument("--border", type=int, default=0, help="pixels to cut from every side (0)")
    parser.add_argument("--mirror", action="store_true", help="flip left to right")
    parser.add_argument("--format", choices=("png", "jpg"), default="png")
    parser.add_argument("--workers", type=int, default=2, help="processes; 0 is this one alone (2)")
    options = parser.parse_args(arguments)
    for name, most in (("density", float("inf")), ("airlight", 1.0)):
        low, high = getattr(options, name)
        if not 0 <= low <= high <= most:
            raise UserError(f"--{name} {low} {high}: wanted 0 <= low <= high" + (" <= 1" if most == 1 else ""))
    for name, least in (("per_image", 1), ("border", 0), ("seed", 0), ("workers", 0)):
        if getattr(options, name) < least:
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)}: wanted {least} or more")
    return options


def main(arguments: list[str] | None = None) -> None:
    """The command; ``arguments`` as on the command line."""
    options = _options(arguments)
    if (options.output / "hazy").is_dir() and any((options.output / "hazy").iterdir()):
        raise UserError(f"{options.output}: holds hazy pictures already; give another --output or remove them")
    tasks, work = _tasks(options), partial(write_hazy, options=options)
    bar = partial(tqdm, total=len(tasks), unit="picture", disable=None)
    if options.workers == 0:
        for task in bar(tasks):
            work(task)
    else:
        with multiprocessing.Pool(options.workers, torch.set_num_threads, (1,)) as pool:
            for _ in bar(pool.imap_unordered(work, tasks, chunksize=4)):
                pass
    print(f"{len(tasks)} clear and {len(tasks) * options.per_image} hazy pictures in {options.output}")


if __name__ == "__main__":
    errors.run(main)
