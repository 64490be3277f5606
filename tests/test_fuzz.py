"""Files changed at random, by a seed: images, settings, lists. In bounded children, see `bounds`."""

import contextlib
import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, features
from test_batches import run  # noqa: F401 (a fixture)

import models
from data import images, paths
from utils import config
from utils.errors import UserError

bounds = pytest.importorskip("bounds", reason="children are forked: POSIX")

TYPES = models.settings_types()
ROOT = Path(__file__).resolve().parents[1]
TOGETHER = 25  # files a child: to fork costs more than to read one
LONGEST = 800  # characters of a message without the folder: it may list forty settings


def base_images() -> dict[str, bytes]:
    """Small images of all kinds that are read, by a name with their ending."""
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(90, 255, (19, 23, 3), dtype=np.uint8))
    deep, grey = Image.fromarray(rng.integers(0, 65535, (19, 23), dtype=np.uint16)), rgb.convert("L")
    palette, exif = rgb.convert("P"), Image.Exif()
    exif[271], exif[274] = "a maker", 6
    cases = {
        "rgb.png": (rgb, {"exif": exif, "icc_profile": b"x" * 200}),
        "palette.png": (palette, {"transparency": bytes(range(200))}),
        "deep.png": (deep, {}),
        "bits.png": (rgb.convert("1"), {}),
        "alpha.png": (rgb.convert("RGBA"), {}),
        "plain.jpg": (rgb, {"exif": exif, "icc_profile": b"x" * 200}),
        "progressive.jpg": (rgb, {"progressive": True}),
        "cmyk.jpg": (rgb.convert("CMYK"), {}),
        "raw.tif": (rgb, {"exif": exif}),
        "deflate.tif": (rgb, {"compression": "tiff_deflate"}),
        "lzw.tif": (palette, {"compression": "tiff_lzw"}),
        "jpeg.tif": (rgb, {"compression": "jpeg"}),
        "fax.tif": (rgb.convert("1"), {"compression": "group4"}),
        "deep.tif": (deep, {}),
        "float.tif": (grey.convert("F"), {}),
        "lossy.webp": (rgb, {"exif": exif}),
        "lossless.webp": (rgb.convert("RGBA"), {"lossless": True}),
        "rgb.bmp": (rgb, {}),
        "palette.bmp": (palette, {}),
        "rgb.ppm": (rgb, {}),
        "grey.pgm": (grey, {}),
        "deep.pgm": (deep.convert("I"), {}),
        "bits.pbm": (rgb.convert("1"), {}),
        "palette.gif": (palette, {}),
        "rgb.tga": (rgb, {"compression": "tga_rle"}),
        "rgb.jp2": (rgb, {}),
        "rgb.avif": (rgb, {}),
    }
    made = {}
    for name, (image, options) in cases.items():
        kind = Image.registered_extensions().get(os.path.splitext(name)[1])  # None for AVIF before Pillow 11.3
        if kind is None or not features.check({"AVIF": "avif", "JPEG2000": "jpg_2000"}.get(kind, "pil")):
            continue
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        made[name] = buffer.getvalue()
    return made


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """One to three changes: bits, bytes of the header, large numbers in it, cuts, repeats; PNG's sums may be mended."""
    for _ in range(rng.integers(1, 4)):
        changed, size = bytearray(data), len(data)
        head, place = int(rng.integers(min(size, 80))), int(rng.integers(size))
        length = int(rng.integers(1, 40))
        match rng.integers(7):
            case 0:
                changed[place] ^= 1 << int(rng.integers(8))
            case 1:
                changed[head] = int(rng.integers(256))
            case 2:
                number = int(rng.choice([0, 1, 255, 22_000, 65_535, 10**6, 2**31 - 1, 2**31, 2**32 - 1]))
                changed[head : head + 4] = struct.pack(rng.choice(["<I", ">I"]), number)
            case 3:
                del changed[place:]
            case 4:
                changed[place:place] = changed[max(0, place - length) : place]
            case 5:
                del changed[place : place + length]
            case 6:
                changed[place : place + length] = rng.bytes(length)
        data = bytes(changed) or b"\0"
    return with_valid_checksums(data) if data.startswith(b"\x89PNG") and rng.integers(2) else data


def with_valid_checksums(data: bytes) -> bytes:
    """A PNG whose checksums fit what its chunks now hold."""
    out, place = bytearray(data), 8
    while place + 12 <= len(out):
        length = int.from_bytes(out[place : place + 4], "big")
        end = place + 8 + length
        if end + 4 > len(out):
            break
        out[end : end + 4] = zlib.crc32(out[place + 4 : end]).to_bytes(4, "big")
        place = end + 4
    return bytes(out)


def image_of_large_size(rng: np.random.Generator) -> tuple[str, bytes]:
    """An image of few bytes that says it is large, and one that is large."""
    width, height = (int(side) for side in rng.integers(1, 40_000, 2))
    if rng.integers(4):
        kind = rng.choice(["P1", "P2", "P3", "P4", "P5", "P6", "Pf", "PF"])
        return "claim.ppm", f"{kind} {width} {height} {rng.choice([1, 255, 65535, -1])}\n".encode() + rng.bytes(9)
    header = struct.pack(
        ">IIBBBBB", width, height, *rng.choice([1, 2, 8, 16], 1), *rng.choice([0, 2, 3, 6], 1), 0, 0, 0
    )
    body = zlib.compress(bytes(int(rng.integers(2**20))))
    chunks = [(b"IHDR", header), (b"IDAT", body), (b"IEND", b"")]
    return "claim.png", with_valid_checksums(
        b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(each)) + kind + each + b"sums" for kind, each in chunks)
    )


def hostile_images(seed: int, count: int) -> list[tuple[str, bytes]]:
    rng, base = np.random.default_rng(seed), base_images()
    names = list(base)
    found = []
    for number in range(count):
        name = names[number % len(names)]
        found.append(image_of_large_size(rng) if number % 20 == 19 else (name, mutated(base[name], rng)))
    return found


def together(works: list[tuple[str, Callable]], folder: Path) -> None:
    """Do every one of ``works`` in bounded children, and say which one went wrong."""

    def one_child(some: list[tuple[str, Callable]]) -> None:
        for name, work in some:
            try:
                work()
            except UserError as error:
                message = str(error).replace(str(folder), "")
                assert message.isprintable(), (name, message)
                assert len(message) < LONGEST, (name, message)
            except BaseException as error:
                raise AssertionError(name) from error

    for start in range(0, len(works), TOGETHER):
        some = works[start : start + TOGETHER]
        found = bounds.run(lambda some=some: one_child(some), folder, seconds=30)
        if found.fault:  # one by one, to name it
            alone = {name: bounds.run(lambda each=(name, work): one_child([each]), folder) for name, work in some}
            faults = {name: verdict.fault for name, verdict in alone.items() if verdict.fault}
            pytest.fail(f"of {[name for name, _ in some]}: {faults or found.fault}")


@pytest.mark.parametrize(("seed", "count"), [(1, 100), pytest.param(2, 2000, marks=pytest.mark.slow)])
def test_images(tmp_path, seed, count):
    """Read as an image, as a depth map, and written again in their own format with what is kept of them."""

    def work(path: Path) -> None:
        with contextlib.suppress(UserError):
            images.read_depth(path)
        made = images.read(path)
        images.write(tmp_path / "out" / "made.png", made[:, :64, :64], like=path)
        images.write(tmp_path / "out" / "made.jpg", made[:, :64, :64], like=path)

    works = []
    for number, (name, data) in enumerate(hostile_images(seed, count)):
        path = tmp_path / f"{number}_{name}"
        path.write_bytes(data)
        works.append((path.name, lambda path=path: work(path)))
    together(works, tmp_path)


TOKENS = [
    "[",
    "]",
    "{",
    "}",
    ": ",
    "- ",
    "? ",
    "&a ",
    "*a",
    "<<: *a",
    "!!int ",
    "!!float ",
    "!!set ",
    "!!binary ",
    "!x ",
]
TOKENS += ["2024-13-45", "9" * 400, "0x" + "f" * 5000, "1e999", ".inf", ".nan", '"', "'", '"\\0"', '"\\ud800"', "# "]
TOKENS += ["|\n", ">\n", "%YAML 1.1\n", "---\n", "...\n", "\t", "\0", "\x85", "\u2028", "\x1b[31m", "[" * 400, "null"]
TOKENS += ["~", "no", "!x ", "&b [*a, *a, *a, *a, *a, *a]\n", "x" * 5000, "data:\n", "train:\n  ", "haze:\n  density: "]
TOKENS += ["\ufeff", "@", "`"]


def hostile_text(rng: np.random.Generator, text: str) -> bytes:
    """Lines of ``text``, some doubled, some gone, with signs of YAML's in between; and some bytes that are no text."""
    lines = text.splitlines(keepends=True)
    start = int(rng.integers(len(lines)))
    lines = lines[start : start + int(rng.integers(1, 25))]
    for _ in range(rng.integers(1, 6)):
        place = int(rng.integers(len(lines)))
        line, token = lines[place], str(rng.choice(TOKENS))
        cut = int(rng.integers(len(line) + 1))
        lines[place] = rng.choice([line[:cut] + token + line[cut:], line[:cut] + token, line + line, token])
    data = "".join(lines).encode()
    if not rng.integers(8):
        cut = int(rng.integers(len(data) + 1))
        data = data[:cut] + rng.bytes(3) + data[cut:]
    return data


@pytest.mark.parametrize(("seed", "count"), [(1, 25), pytest.param(2, 250, marks=pytest.mark.slow)])
def test_settings(tmp_path, seed, count):
    """In a file and on the command line."""
    rng, works = np.random.default_rng(seed), []
    texts = [path.read_text() for path in (ROOT / "configs.yml", *sorted(ROOT.glob("checkpoints/*/config.yml")))]
    for number in range(count):
        file = tmp_path / f"{number}.yml"
        file.write_bytes(hostile_text(rng, str(rng.choice(texts))))
        works.append((file.name, lambda file=file: config.given(TYPES, [file])))
        key, value = rng.choice(["train.batch", "data.hazy", "test.weights", "haze.density", "seed", "nedr"]), file
        override = f"{key}={value.read_bytes().decode(errors='surrogateescape')}"
        works.append((f"{override!r:.200}", lambda override=override: config.given(TYPES, overrides=[override])))
    together(works, tmp_path)


ODD = [b"~nouser/a.png", b"~", b"a\0b.png", b"na\xefve.png", b"x" * 5000, b"x/" * 3000, b"loop.png", b"pipe.png"]
ODD += [b"/dev/null", b"/dev/zero", b"/proc/self/mem", b".", b"", b"\\\\server\\a.png", b"C:\\a.png", b"*.png"]
ODD += [b"a.png b.png", b"sample:../../etc", b"sample:\0", b"a.png/b.png", b"a.png/", b"\xff\xfe", b"#", b"'a.png"]
ODD += [b"\r", b"deep", b"a.png", b"pipe.flist", b"/dev/zero.flist", b"a.flist", b"clip.mp4"]


@pytest.mark.parametrize(("seed", "count"), [(1, 10), pytest.param(2, 40, marks=pytest.mark.slow)])
def test_lists_and_odd_paths(tmp_path, monkeypatch, seed, count):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "deep"))
    for name in ("a.png", "deep/b.png"):
        images.write(name, torch.rand(3, 4, 5))
    os.symlink("loop.png", "loop.png")
    for name in ("pipe.png", "pipe.flist", "clip.mp4"):
        os.mkfifo(name)
    rng, works = np.random.default_rng(seed), []

    def work(source: str) -> None:
        messages: list[str] = []
        for path in paths.find([source, "a.png"], absent=messages):
            try:
                images.read(path)
            except UserError as error:
                messages.append(str(error))
        assert [line for line in messages if not line.isprintable() or len(line) > LONGEST] == []
        paths.find(source)

    for number in range(count):
        lines = [ODD[place] for place in rng.integers(len(ODD), size=rng.integers(1, 8))]
        Path(f"{number}.flist").write_bytes(rng.choice([b"\n", b"\r\n", b"\n\n"]).join(lines))
        for source in (f"{number}.flist", os.fsdecode(ODD[number % len(ODD)])):
            works.append((f"{source!r:.80}", lambda source=source: work(source)))
    together(works, tmp_path)


def test_libraries_print_nothing(run, tmp_path, monkeypatch):  # noqa: F811
    """Warnings of Pillow, of NumPy, and of libraries in C."""
    monkeypatch.setattr("utils.memory.free_memory", lambda device: 2**28)  # else large ones take seconds
    (tmp_path / "in").mkdir()
    for number, (name, data) in enumerate(hostile_images(3, 60)):
        (tmp_path / "in" / f"{number}_{name}").write_bytes(data)
    _, out, err = run()
    assert [line for line in err.splitlines() if not line.startswith(("skipped: in/", "error: "))] == []
    assert len(out.splitlines()) == 1
