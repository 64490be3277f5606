"""The command that writes a hazy set: ``python -m data.haze``.

    python -m data.haze --clear CLEAR --depth DEPTH --output OUTPUT --per-image 10
    python -m data.haze --clear CLEAR --output OUTPUT --degradations jpeg.probability=0

The first follows RESIDE's ITS, the second the imaging model with several degradations (`degradations`).
"""

import argparse
import multiprocessing
import os
import sys
import zlib
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data import degradations, images, paths, pictures, synthesis
from data.sets import pairing
from utils import config, errors
from utils.errors import UserError


def write_hazy(task: tuple[Path, Path | None, str], options: argparse.Namespace) -> str:
    """Write a clear image, its depth map if given, and ``per_image`` hazy versions, seeded by the name alone.

    The name is the path below the folder of clear images, without extension. Returns why nothing was written, for an
    image that cannot be used; empty if all was.
    """
    clear, depth, name = task
    rng = np.random.default_rng([options.seed, zlib.crc32(name.encode())])
    try:
        image, distance = _read(clear, depth, rng, options)
    except UserError as error:
        return str(error)
    save = partial(images.write, compress_level=1)
    save(options.output / "clear" / f"{name}.{options.format}", image)
    if depth is not None:
        images.write_depth(options.output / "depth" / f"{name}.png", distance)
    for n in range(1, options.per_image + 1):
        hazy, suffix = _add_haze(image, distance, rng, options)
        save(options.output / "hazy" / f"{name}_{n}{suffix}.{options.format}", hazy)
    return ""


def _read(
    clear: Path, depth: Path | None, rng: np.random.Generator, options: argparse.Namespace
) -> tuple[Tensor, Tensor]:
    """An image (3,H,W) and its depth map (1,H,W), generated if there is none. Raises `UserError`."""
    pixels, depth_pixels = pictures.read_with_depth(clear, depth)
    image = pixels[:]
    distance = synthesis.smooth_depth(*image.shape[1:], rng) if depth_pixels is None else depth_pixels[:]
    return _trim(image, options, clear), _trim(distance, options, clear)


def _add_haze(
    clear: Tensor, depth: Tensor, rng: np.random.Generator, options: argparse.Namespace
) -> tuple[Tensor, str]:
    """A hazy image and the suffix of its file name, which for the haze law is the airlight, as in ITS."""
    if options.degradations is not None:
        return degradations.degrade(clear, depth, rng, options.degradations)["hazy"], ""
    grey = round(rng.uniform(*options.airlight), 5)  # exactly the five decimals of the file name
    hazy, _ = synthesis.add_haze(clear, depth, rng.uniform(*options.density), torch.full((3,), grey))
    return hazy, f"_{grey:.5f}"


def _trim(tensor: Tensor, options: argparse.Namespace, path: Path) -> Tensor:
    border = options.border
    height, width = tensor.shape[1:]
    if 2 * border >= min(height, width):
        raise UserError(f"{path}: {width}x{height} leaves nothing inside --border {border}; make it smaller")
    tensor = tensor[:, border : height - border, border : width - border]
    return tensor.flip(2) if options.mirror else tensor


def _tasks(options: argparse.Namespace) -> list[tuple[Path, Path | None, str]]:
    clear = paths.find(options.clear)
    names = [os.path.splitext(name)[0] for name in pictures.names(clear, paths.folder_of(options.clear))]
    taken: dict[str, Path] = {}
    for path, name in zip(clear, names, strict=True):
        if taken.setdefault(name.casefold(), path) != path:
            raise UserError(f"{taken[name.casefold()]} and {path} would be written to one name; rename one")
    depth: list[Path | None] = [None] * len(clear)
    if options.depth is not None:
        depth = pairing.match_depth(clear, paths.find(options.depth, paths.DEPTH_EXTENSIONS))
    return list(zip(clear, depth, names, strict=True))


def _check_output(options: argparse.Namespace) -> None:
    """Refuse an output folder that holds hazy images, or that the next run would read as clear images or depth."""
    if (options.output / "hazy").is_dir() and any((options.output / "hazy").iterdir()):
        raise UserError(f"{options.output}: holds hazy images already; give another --output or remove them")
    for option in ("clear", "depth"):
        sources = [os.path.realpath(paths.resolve(source)) for source in getattr(options, option) or ()]
        if any(Path(os.path.realpath(options.output)).is_relative_to(source) for source in sources):
            raise UserError(
                f"{options.output}: lies in the folder of --{option}, so the next run would read these results as "
                f"input; give an --output outside of it"
            )


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m data.haze",
        description="Write a hazy set: OUTPUT/clear, OUTPUT/hazy and OUTPUT/depth, like RESIDE's ITS.",
    )
    paths = partial(parser.add_argument, nargs="+", metavar="PATH")
    paths("--clear", required=True, help="clear images: folders, .flists, images or sample:train/clear")
    paths("--depth", help="depth maps of the same names (grey, float TIFF, .npy, .mat, .exr); else generated")
    parser.add_argument("--output", required=True, type=Path, help="folder to write")
    parser.add_argument("--per-image", type=int, default=1, help="hazy images of each clear one (1)")
    parser.add_argument("--density", type=float, nargs=2, help="range of beta (0.6 1.8)")
    parser.add_argument("--airlight", type=float, nargs=2, help="range of A (0.7 1.0)")
    parser.add_argument(
        "--degradations",
        nargs="*",
        metavar="KEY=VALUE",
        help="the imaging model with several degradations instead, as in configs.yml; override as blur.probability=0",
    )
    parser.add_argument("--seed", type=int, default=10)
    parser.add_argument("--border", type=int, default=0, help="pixels to cut from every side (0)")
    parser.add_argument("--mirror", action="store_true", help="flip left to right")
    parser.add_argument("--format", choices=("png", "jpg"), default="png")
    parser.add_argument("--workers", type=int, default=2, help="processes; 0 is this one alone (2)")
    options = parser.parse_args(arguments)
    if options.degradations is not None:
        if options.density or options.airlight:
            raise UserError(
                "--density and --airlight belong to the haze law; write --degradations haze.density=[LOW,HIGH]"
            )
        options.degradations = config.section("degradations", options.degradations)
    options.density = options.density or synthesis.DENSITY
    options.airlight = options.airlight or synthesis.AIRLIGHT
    for name, most in (("density", float("inf")), ("airlight", 1.0)):
        low, high = getattr(options, name)
        if not 0 <= low <= high <= most:
            raise UserError(f"--{name} {low} {high}: wanted 0 <= low <= high" + (" <= 1" if most == 1 else ""))
    for name, least in (("per_image", 1), ("border", 0), ("seed", 0), ("workers", 0)):
        if getattr(options, name) < least:
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)}: wanted {least} or more")
    return options


def main(arguments: list[str] | None = None) -> int:
    """The command; ``arguments`` as on the command line. Returns 0, or 2 if some images could not be used."""
    options = _options(arguments)
    tasks = _tasks(options)
    work = partial(write_hazy, options=options)
    _check_output(options)
    for source, kinds in ((options.clear, paths.EXTENSIONS), (options.depth, paths.DEPTH_EXTENSIONS)):
        for warning in paths.passed_over(source, kinds) if source else ():
            print(warning, file=sys.stderr)
    bar = partial(tqdm, total=len(tasks), unit="image", disable=None)
    if options.workers == 0:
        unusable = _report(bar(map(work, tasks)))
    else:
        with multiprocessing.Pool(options.workers, torch.set_num_threads, (1,)) as pool:
            unusable = _report(bar(pool.imap_unordered(work, tasks, chunksize=4)))
            pool.close()  # close and join: terminate, which `with` calls, hangs if a caller handles SIGTERM
            pool.join()
    done = len(tasks) - len(unusable)
    if not done:
        raise UserError(unusable[0])
    print(f"{done} clear and {done * options.per_image} hazy images in {options.output}")
    if unusable:
        print(f"error: {len(unusable)} of {len(tasks)} images could not be used, see above", file=sys.stderr)
    return 2 if unusable else 0


def _report(results: Iterable[str]) -> list[str]:
    """Print, as they come, why images were left out; returns these texts."""
    unusable = []
    for why in filter(None, results):
        tqdm.write(f"left out: {why}", file=sys.stderr)
        unusable.append(why)
    return unusable


if __name__ == "__main__":
    errors.run(main)
