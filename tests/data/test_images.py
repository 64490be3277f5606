import contextlib
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.io
import tifffile
import torch
from PIL import ExifTags, Image, ImageCms, ImageFile

from data import images, paths
from utils import memory
from utils.errors import ImageError, UserError

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (13, 17, 3), dtype=np.uint8)
GREY = RGB[..., 0]


def expected(pixels: np.ndarray) -> torch.Tensor:
    """(H,W,3) or (H,W) in 0..255 -> what read() must give."""
    pixels = np.repeat(pixels[..., None], 3, 2) if pixels.ndim == 2 else pixels
    return torch.from_numpy(pixels.transpose(2, 0, 1).astype(np.float32) / 255)


def saved(path: Path, image: Image.Image, **options) -> Path:
    image.save(path, **options)
    return path


@pytest.mark.parametrize("extension", ["png", "bmp", "tif", "webp", "ppm", "tga", "PNG"])
def test_lossless_formats_are_read_exactly(tmp_path, extension):
    options = {"lossless": True} if extension == "webp" else {}
    image = images.read(saved(tmp_path / f"a.{extension}", Image.fromarray(RGB), **options))
    assert image.dtype == torch.float32
    assert image.is_contiguous()
    assert torch.equal(image, expected(RGB))


def test_one_pixel(tmp_path):
    image = images.read(saved(tmp_path / "a.png", Image.new("RGB", (1, 1), (255, 0, 51))))
    torch.testing.assert_close(image.flatten(), torch.tensor([1, 0, 0.2]))


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "1", "P"])
def test_modes_become_rgb_and_alpha_is_dropped(tmp_path, mode):
    alpha = Image.fromarray(GREY)
    image = {
        "L": lambda: Image.fromarray(GREY),
        "LA": lambda: Image.merge("LA", [Image.fromarray(GREY), alpha]),
        "RGBA": lambda: Image.merge("RGBA", [*Image.fromarray(RGB).split(), alpha]),
        "1": lambda: Image.fromarray(GREY > 127),
        "P": lambda: Image.fromarray(GREY // 4).convert("P"),
    }[mode]()
    want = {"L": GREY, "LA": GREY, "RGBA": RGB, "1": (GREY > 127) * np.uint8(255), "P": GREY // 4}[mode]
    path = saved(tmp_path / "a.png", image)
    assert Image.open(path).mode == mode
    assert torch.equal(images.read(path), expected(want))


@pytest.mark.parametrize("transparency", [3, bytes([0, 128, 255])])
@pytest.mark.filterwarnings("error")
def test_palette_with_transparency(tmp_path, transparency):
    palette = Image.fromarray((GREY % 3).astype(np.uint8)).copy()
    palette = palette.convert("P")
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255] + [0] * 9)
    path = saved(tmp_path / "a.png", palette, transparency=transparency)
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]], np.uint8)
    assert torch.equal(images.read(path), expected(colours[GREY % 3]))


def test_cmyk(tmp_path):
    path = saved(tmp_path / "a.jpg", Image.new("CMYK", (16, 16), (0, 255, 255, 0)), quality=100)
    image = images.read(path)
    assert image[0].min() > 0.98
    assert image[1:].max() < 0.02


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_16_bit_grey_is_divided_by_65535(tmp_path, name):
    values = RNG.integers(0, 65536, (5, 7), dtype=np.uint16)
    image = images.read(saved(tmp_path / name, Image.fromarray(values)))
    assert image.shape == (3, 5, 7)
    torch.testing.assert_close(image[1], torch.from_numpy(values.astype(np.float32) / 65535))


def test_integer_mode_is_16_bit_or_refused(tmp_path):
    values = np.array([[0, 65535, 13107]], np.int32)
    image = images.read(saved(tmp_path / "a.tif", Image.fromarray(values)))
    torch.testing.assert_close(image[0, 0], torch.tensor([0, 1, 0.2]))
    with pytest.raises(UserError, match="beyond 16 bit"):
        images.read(saved(tmp_path / "b.tif", Image.fromarray(values * 2)))


def test_float_pixels_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"a\.tif.*float"):
        images.read(saved(tmp_path / "a.tif", Image.fromarray(np.ones((4, 4), np.float32))))


def turned(orientation: int) -> np.ndarray:
    """What a camera stores when the image RGB is to be seen and the EXIF tag says ``orientation``."""
    inverse = [0, 1, 2, 3, 4, 5, 8, 7, 6][orientation]  # 6 and 8, the quarter turns, undo each other
    image = Image.fromarray(RGB)
    if inverse > 1:
        image = image.transpose([None, None, 0, 3, 1, 5, 4, 6, 2][inverse])
    return np.asarray(image)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("extension", ["png", "webp"])
def test_exif_orientation(tmp_path, orientation, extension):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if extension == "webp" else {}
    path = saved(tmp_path / f"a.{extension}", Image.fromarray(turned(orientation)), exif=exif, **options)
    assert torch.equal(images.read(path), expected(RGB))


def test_16_bit_grey_respects_exif_orientation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    values = RNG.integers(0, 65536, (3, 4), dtype=np.uint16)
    assert images.read(saved(tmp_path / "a.png", Image.fromarray(values), exif=exif)).shape == (3, 4, 3)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_does_not_refuse_the_image(tmp_path):
    path = saved(tmp_path / "a.jpg", Image.fromarray(RGB), exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12junk")
    assert images.read(path).shape == (3, 13, 17)


def test_content_decides_not_the_extension(tmp_path):
    assert torch.equal(images.read(saved(tmp_path / "a.jpg", Image.fromarray(RGB), format="PNG")), expected(RGB))


def test_animation_gives_its_first_frame(tmp_path):
    frames = [Image.fromarray(np.full((4, 4), v, np.uint8)) for v in (0, 255)]
    path = saved(tmp_path / "a.gif", frames[0], save_all=True, append_images=frames[1:])
    assert images.read(path).max() == 0


@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 0.95])
@pytest.mark.parametrize("extension", ["png", "jpg", "bmp", "tif", "webp"])
def test_truncated_images_are_refused(tmp_path, extension, share):
    noise = RNG.integers(0, 256, (200, 200, 3), dtype=np.uint8)
    whole = saved(tmp_path / f"whole.{extension}", Image.fromarray(noise)).read_bytes()
    path = tmp_path / f"a.{extension}"
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(UserError, match=rf"a\.{extension}: cannot be read"):
        images.read(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"no image at all\n", "no known image format.*; convert it"),
        (bytes(100), "no known image format"),
    ],
)
def test_files_that_are_not_images_are_refused(tmp_path, content, message):
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as refusal:
        images.read(path)
    assert str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_missing_and_folder_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.png: no such image"):
        images.read(tmp_path / "nowhere.png")
    with pytest.raises(UserError, match="a folder, not an image"):
        images.read(tmp_path)


@pytest.mark.filterwarnings("error")
def test_size_limits(tmp_path, monkeypatch):
    path = saved(tmp_path / "a.png", Image.new("L", (120, 100)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)  # read() sets it: put it back afterwards
    monkeypatch.setattr(images, "MAX_PIXELS", 12_000)
    assert images.read(path).shape == (3, 100, 120)
    for limit in (7_000, 5_000):  # the second is Pillow's own limit, too
        monkeypatch.setattr(images, "MAX_PIXELS", limit)
        with pytest.raises(UserError, match=rf"more than {limit:,} pixels\); shrink it"):
            images.read(path)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (PermissionError(13, "Permission denied"), r"\(Permission denied\); check its permissions and the disk"),
        (MemoryError(), "too little memory for it"),
        (SyntaxError("broken PNG file"), r"broken PNG file: damaged or cut short\); replace it with a complete copy"),
    ],
)
def test_an_unreadable_image_is_reported_with_cause_and_remedy(tmp_path, monkeypatch, error, message):
    path = saved(tmp_path / "a.png", Image.new("L", (4, 4)))

    def fail(*_):
        raise error

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(UserError, match=message) as refusal:
        images.read(path)
    assert "fetch" not in str(refusal.value)


def large_header(path: Path, width: int, height: int) -> Path:
    path.write_bytes(b"P6\n%d %d\n255\nabc" % (width, height))
    return path


def test_an_image_too_large_for_memory_is_refused_from_its_header(tmp_path, monkeypatch):
    """A PNG of few bytes and many pixels, and a file of 22 bytes that claims more."""
    monkeypatch.setattr(memory, "free_memory", lambda device: 2**28)
    monkeypatch.setattr(ImageFile.ImageFile, "load", None)  # not a byte is decoded
    one_bit = saved(tmp_path / "a.png", Image.new("1", (5000, 5000)))
    for path in (one_bit, large_header(tmp_path / "b.ppm", 22000, 22000)):
        with pytest.raises(UserError, match=r"\(its \d+x\d+ pixels take \d\.\d GiB to read, 0\.2 GiB are free\); free"):
            images.read(path)


@pytest.mark.parametrize("where", ["convert", "fromarray", "div_"])
def test_running_out_of_memory_while_reading_is_an_image_error(tmp_path, monkeypatch, where):
    def fail(*_, **__):
        raise (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
            if where == "div_"
            else MemoryError
        )

    path = saved(tmp_path / "a.png", Image.new("L", (4, 4)))
    place = {"convert": Image.Image, "div_": torch.Tensor, "fromarray": np}[where]
    monkeypatch.setattr(place, {"fromarray": "array"}.get(where, where), fail)
    with pytest.raises(UserError, match=r"a\.png: .*too little memory"):
        images.read(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes are of POSIX")
def test_pipes_and_devices_are_refused_without_blocking(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to("c.png")
    (tmp_path / "c.png").symlink_to("b.png")
    wanted = {"a.png": "a pipe or a device", "b.png": "a broken link", "x" * 5000: "no such image"}
    for name, words in (wanted | {"a\0b.png": r"a\\x00b\.png: no such image"}).items():
        with pytest.raises(UserError, match=words) as error:
            images.read(tmp_path / name)
        assert len(str(error.value)) < 400
    os.mkfifo(tmp_path / "a.flist")
    with pytest.raises(UserError, match="a pipe or a device"):
        paths.find(tmp_path / "a.flist")


def test_a_file_name_of_maximum_length_is_written(tmp_path):
    for name in ("n" * 251 + ".png", "\U0001f32b" * 62 + ".jpg"):
        images.write(tmp_path / name, torch.rand(3, 4, 5))
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(ImageError, match="File name too long"):
        images.write(tmp_path / ("n" * 252 + ".png"), torch.rand(3, 4, 5))


def test_large_photographs_are_legal():
    assert images.MAX_PIXELS >= 5436 * 3612 * 10


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_depth_is_divided_by_its_own_maximum(tmp_path, dtype):
    values = np.array([[0, 50], [100, 199]], dtype)
    want = torch.tensor([[0.5, 50.5], [100.5, 199.5]]) / 199.5
    torch.testing.assert_close(images.read_depth(saved(tmp_path / "a.png", Image.fromarray(values)))[0], want)
    np.save(tmp_path / "a.npy", values[None])
    torch.testing.assert_close(images.read_depth(tmp_path / "a.npy")[0], want)


def test_depth_in_fractions(tmp_path):
    np.save(tmp_path / "a.npy", np.array([[0, 1.0], [2, 4]]))
    torch.testing.assert_close(images.read_depth(tmp_path / "a.npy")[0], torch.tensor([[0, 0.25], [0.5, 1]]))


DEPTH = np.array([[0, 1.0], [2, 4]])
FLOATS = {
    "float32": lambda path: tifffile.imwrite(path, DEPTH.astype(np.float32)),
    "float64": lambda path: tifffile.imwrite(path, DEPTH),
    "float16": lambda path: tifffile.imwrite(path, DEPTH.astype(np.float16)),
    "LZW": lambda path: Image.fromarray(DEPTH.astype(np.float32)).save(path, compression="tiff_lzw"),
    "RGB": lambda path: tifffile.imwrite(path, np.stack([DEPTH.astype(np.float32)] * 3, -1), photometric="rgb"),
}


@pytest.mark.parametrize("case", FLOATS)
def test_float_tiff_is_depth_in_fractions(tmp_path, case):
    FLOATS[case](tmp_path / "a.tif")
    torch.testing.assert_close(images.read_depth(tmp_path / "a.tif")[0], torch.tensor([[0, 0.25], [0.5, 1]]))


@pytest.mark.parametrize(("dtype", "scale"), [(np.int32, 10**6), (np.uint32, 10**9), (np.int64, 10**12)])
def test_whole_numbers_of_any_size_are_depth(tmp_path, dtype, scale):
    values = DEPTH.astype(dtype) * scale
    tifffile.imwrite(tmp_path / "a.tif", values)
    torch.testing.assert_close(images.read_depth(tmp_path / "a.tif")[0], torch.tensor([[0, 0.25], [0.5, 1]]))


def test_pfm_depth(tmp_path):
    saved(tmp_path / "a.pfm", Image.fromarray(DEPTH.astype(np.float32)), format="PPM")
    assert tmp_path / "a.pfm" in paths.find(tmp_path, paths.DEPTH_EXTENSIONS)
    torch.testing.assert_close(images.read_depth(tmp_path / "a.pfm")[0], torch.tensor([[0, 0.25], [0.5, 1]]))


@pytest.mark.parametrize("names", [["depth"], ["x"], ["depth", "mask", "K"]])
def test_mat_depth(tmp_path, names):
    scipy.io.savemat(tmp_path / "a.mat", {name: DEPTH if k == 0 else np.eye(3) for k, name in enumerate(names)})
    torch.testing.assert_close(images.read_depth(tmp_path / "a.mat")[0], torch.tensor([[0, 0.25], [0.5, 1]]))


def test_mat_refusals(tmp_path, monkeypatch):
    path = tmp_path / "a.mat"
    for content, message in (({"x": DEPTH, "y": DEPTH}, r"several matrices \(x, y\)"), ({"x": "text"}, "no matrix")):
        scipy.io.savemat(path, content)
        with pytest.raises(UserError, match=message):
            images.read_depth(path)
    path.write_bytes(b"MATLAB 7.3 MAT-file".ljust(124) + b"\0\2IM" + bytes(99))
    with pytest.raises(UserError, match="-v7"):
        images.read_depth(path)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(UserError, match=r"SciPy is not installed; pip install -r requirements-extras\.txt"):
        images.read_depth(path)


def test_exr_depth(tmp_path, monkeypatch):
    """With a reader in the package's place; where it is installed, also with itself."""
    path = tmp_path / "a.exr"
    path.write_bytes(b"EXR")
    monkeypatch.setitem(sys.modules, "OpenEXR", None)
    with pytest.raises(UserError, match="OpenEXR is not installed"):
        images.read_depth(path)
    channels = {"Z": SimpleNamespace(pixels=DEPTH.astype(np.float32)), "A": SimpleNamespace(pixels=np.ones((2, 2)))}
    file = contextlib.nullcontext(SimpleNamespace(channels=lambda: channels))
    monkeypatch.setitem(sys.modules, "OpenEXR", SimpleNamespace(File=lambda *_, **__: file))
    torch.testing.assert_close(images.read_depth(path)[0], torch.tensor([[0, 0.25], [0.5, 1]]))
    channels["Y"] = channels.pop("Z")
    assert images.read_depth(path).max() == 1
    channels |= {"R": channels.pop("Y"), "G": channels["A"], "B": channels["A"]}
    with pytest.raises(UserError, match="none of the channels"):
        images.read_depth(path)


def test_exr_depth_by_the_package(tmp_path):
    openexr = pytest.importorskip("OpenEXR")
    header = {"type": openexr.scanlineimage}
    openexr.File(header, {"Z": DEPTH.astype(np.float32)}).write(str(tmp_path / "a.exr"))
    torch.testing.assert_close(images.read_depth(tmp_path / "a.exr")[0], torch.tensor([[0, 0.25], [0.5, 1]]))


def test_invalid_depths_are_counted(tmp_path):
    values = np.array([[np.nan, np.nan, np.inf], [-1, 2, 3]], np.float32)
    tifffile.imwrite(tmp_path / "a.tif", values)
    with pytest.raises(UserError, match=r"2 NaN and 1 infinite and 1 negative of 6 values"):
        images.read_depth(tmp_path / "a.tif")


def test_float_files_are_refused_as_images(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", DEPTH.astype(np.float32))
    with pytest.raises(UserError, match="no agreed white"):
        images.read(tmp_path / "a.tif")


def test_grey_depth_saved_as_rgb_is_taken(tmp_path):
    path = saved(tmp_path / "a.png", Image.fromarray(GREY).convert("RGB"))
    assert torch.equal(images.read_depth(path), images.read_depth(saved(tmp_path / "b.png", Image.fromarray(GREY))))


def test_depth_refusals(tmp_path):
    with pytest.raises(UserError, match="coloured"):
        images.read_depth(saved(tmp_path / "a.png", Image.fromarray(RGB)))
    for array in (np.zeros((2, 2)), np.array([[1, np.nan]]), -np.ones((2, 2)), np.array([[np.inf, 1]])):
        np.save(tmp_path / "a.npy", array)
        with pytest.raises(UserError, match=r"a\.npy: depth must be"):
            images.read_depth(tmp_path / "a.npy")
    np.save(tmp_path / "a.npy", np.ones((2, 2, 3)))
    with pytest.raises(UserError, match="not a depth map"):
        images.read_depth(tmp_path / "a.npy")
    (tmp_path / "a.npy").write_bytes(b"junk")
    with pytest.raises(UserError, match="cannot be read"):
        images.read_depth(tmp_path / "a.npy")


@pytest.mark.parametrize("channels", [1, 3])
def test_write_rounds_and_reads_back(tmp_path, channels):
    image = torch.rand(channels, 5, 6)
    path = tmp_path / "deep" / "er" / "a.png"
    images.write(path, image)
    assert torch.equal(images.read(path), (image.mul(255).round() / 255).expand(3, -1, -1))
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]


def test_write_jpeg_and_refusals(tmp_path):
    images.write(tmp_path / "a.jpg", torch.full((3, 8, 8), 0.5))
    assert Image.open(tmp_path / "a.jpg").format == "JPEG"
    with pytest.raises(UserError, match=r"\.png, \.jpg, \.webp or \.tif"):
        images.write(tmp_path / "a.bmp", torch.zeros(3, 2, 2))
    with pytest.raises(UserError, match="cannot be written"):
        images.write(tmp_path / "a.jpg" / "b.png", torch.zeros(3, 2, 2))


RGB_PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def profile(space: bytes) -> bytes:
    """A profile of another colour space, as its header tells."""
    return RGB_PROFILE[:16] + space + RGB_PROFILE[20:]


def photograph(path: Path, mode: str = "RGB", icc: bytes = RGB_PROFILE, **options) -> Path:
    """An image 17x13 that lies on its side, with a profile and EXIF of a camera."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.Base.Make] = "Maker"
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.ExifImageWidth] = 17
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.ISOSpeedRatings] = 200
    exif.get_ifd(ExifTags.IFD.GPSInfo)[1] = "N"
    for part in (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo):
        exif[part] = exif.get_ifd(part)  # Pillow writes them into TIFF only so
    return saved(path, Image.fromarray(RGB).convert(mode), icc_profile=icc, exif=exif, **options)


@pytest.mark.parametrize("output", ["out.png", "out.jpg"])
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif", "a.webp"])
def test_profile_and_exif_are_kept_and_the_orientation_is_not(tmp_path, name, output):
    source = photograph(tmp_path / name)
    image = images.read(source)
    images.write(tmp_path / output, image, like=source)
    with Image.open(tmp_path / output) as written:
        assert written.info["icc_profile"] == RGB_PROFILE
        exif = written.getexif()
        assert written.size == (image.shape[2], image.shape[1]) == (13, 17)
    assert dict(exif) | {ExifTags.IFD.Exif: 0, ExifTags.IFD.GPSInfo: 0} == {
        ExifTags.Base.Make: "Maker",
        ExifTags.IFD.Exif: 0,
        ExifTags.IFD.GPSInfo: 0,
    }
    details = exif.get_ifd(ExifTags.IFD.Exif)
    assert details == {ExifTags.Base.ExifImageWidth: 13, ExifTags.Base.ISOSpeedRatings: 200}
    assert exif.get_ifd(ExifTags.IFD.GPSInfo) == {1: "N"}
    assert images.read(tmp_path / output).shape == image.shape  # turned once, not twice


@pytest.mark.parametrize(
    ("mode", "icc", "kept"),
    [
        ("L", profile(b"GRAY"), False),
        ("CMYK", profile(b"CMYK"), False),
        ("CMYK", RGB_PROFILE, False),
        ("P", RGB_PROFILE, True),
    ],
)
def test_only_profiles_of_rgb_are_kept(tmp_path, mode, icc, kept):
    source = photograph(tmp_path / ("a.tif" if mode == "CMYK" else "a.png"), mode, icc)
    images.write(tmp_path / "out.png", images.read(source), like=source)
    assert ("icc_profile" in Image.open(tmp_path / "out.png").info) == kept


def test_metadata_that_cannot_be_written_are_left_out(tmp_path):
    plain = saved(tmp_path / "plain.png", Image.fromarray(RGB))
    broken = saved(tmp_path / "broken.jpg", Image.fromarray(RGB), exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12junk")
    exif = Image.Exif()
    exif[ExifTags.Base.ImageDescription] = "x" * 70_000
    long = saved(tmp_path / "long.png", Image.fromarray(RGB), exif=exif)
    for source in (plain, broken, long, tmp_path / "gone.png"):
        images.write(tmp_path / "out.jpg", torch.rand(3, 4, 5), like=source)
        assert not Image.open(tmp_path / "out.jpg").getexif().get(ExifTags.Base.ImageDescription)


def test_write_depth_reads_back(tmp_path):
    depth = torch.rand(1, 5, 6)
    depth /= depth.max()
    images.write_depth(tmp_path / "a.png", depth)
    torch.testing.assert_close(images.read_depth(tmp_path / "a.png"), depth, atol=2e-5, rtol=0)


def touch(folder: Path, *names: str) -> list[Path]:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return [folder / name for name in names]


def test_find_sorts_naturally_and_below(tmp_path):
    want = touch(tmp_path, "1.png", "2.JPG", "10.png", "b/1.Tif", "b/02.png", "b/10.webp")
    touch(tmp_path, "notes.txt", "._1.png", ".hidden/1.png", "depth.npy")
    assert paths.find(tmp_path) == want
    assert paths.find(tmp_path / "1.png") == [tmp_path / "1.png"]


def test_find_follows_links_but_not_in_circles(tmp_path):
    touch(tmp_path, "real/1.png")
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / "real").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "back").symlink_to(tmp_path / "all")
    assert paths.find(tmp_path / "all") == [tmp_path / "all" / "real" / "1.png"]


def test_flist(tmp_path, monkeypatch):
    touch(tmp_path, "here/b.png", "lists/a.png")
    (tmp_path / "lists" / "x.flist").write_bytes(b"\xef\xbb\xbf# a comment\r\n\r\nhere/b.png\r\na.png\r\n")
    monkeypatch.chdir(tmp_path)
    assert paths.find("lists/x.flist") == [Path("here/b.png"), Path("lists/a.png")]
    (tmp_path / "y.flist").write_text("here/b.png\ngone.png\nalso.png\n")
    with pytest.raises(UserError, match=r"2 of its 3 files are absent, the first gone\.png"):
        paths.find("y.flist")
    (tmp_path / "y.flist").write_text("# nothing\n")
    with pytest.raises(UserError, match="names no files"):
        paths.find("y.flist")


def test_a_flist_names_files_that_begin_with_a_comment_sign(tmp_path, monkeypatch):
    touch(tmp_path, "# O-HAZY NTIRE 2018/01.png", "#2.png", "a.png")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.flist").write_text("# O-HAZY NTIRE 2018/01.png\n# a remark\n#2.png\n#a.png\na.png\n")
    assert paths.find("x.flist") == [Path("# O-HAZY NTIRE 2018/01.png"), Path("#2.png"), Path("a.png")]


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("deep\\a.png", "deep/a.png"),
        ('"deep/a.png"', "deep/a.png"),
        ("'deep\\a.png'", "deep/a.png"),
        ("  deep/a.png\t", "deep/a.png"),
        (" a.png", " a.png"),
        ("'a.png'", "'a.png'"),
        ("two words.png", "two words.png"),
        ("b\u2028c.png", "b\u2028c.png"),
    ],
)
def test_flist_lines_of_other_programs_are_read(tmp_path, monkeypatch, line, name):
    touch(tmp_path, name)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.flist").write_text(f"{line}\n", encoding="utf-8")
    assert paths.find("x.flist") == [Path(name)]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("a.png\na.png b.png\n", r"x\.flist, line 2: .*a\.png exists, but more text follows it: .* one path a line"),
        ("a.png\tb.png\n", "line 1: .* one list for each column"),
        ("a.png,b.png\n", "line 1: .* one list for each column"),
        ("a.png\n\ndeep\n", "line 3: .*the first deep; that is a folder"),
        ("a.png\ngone.png\n", "line 2: .*relative to the working directory or to the list"),
        (f"{'x' * 400}\n", "line 1: 1 of its 1 files are absent"),
    ],
)
def test_invalid_lines_of_a_flist_are_reported_with_their_number(tmp_path, monkeypatch, lines, message):
    touch(tmp_path, "a.png", "b.png", "deep/c.png")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.flist").write_text(lines)
    with pytest.raises(UserError, match=message):
        paths.find("x.flist")


def test_missing_files_of_a_list_can_be_reported_instead_of_refused(tmp_path, monkeypatch):
    touch(tmp_path, "a.png")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.flist").write_bytes(b"\n".join([b"a.png", b"x" * 5000, b"~nouser/a.png", b"a\0b", b"na\xefve.png"]))
    absent = []
    assert paths.find(["x.flist", "gone.png"], absent=absent) == [Path("a.png")]
    starts = ["line 2: xxx", "line 3: ~nouser/a.png is", r"line 4: a\x00b is", r"line 5: na\xefve.png is"]
    assert [line.startswith(f"x.flist, {start}") for line, start in zip(absent, starts, strict=False)] == [True] * 4
    assert absent[4].startswith("gone.png: no such file")
    assert [len(line) < 300 and line.isprintable() for line in absent] == [True] * 5
    with pytest.raises(UserError, match=r"gone\.png: no such file"):
        paths.find(["gone.png", "gone.jpg"], absent=[])
    (tmp_path / "x.flist").write_bytes("a.png".encode("utf-16"))
    with pytest.raises(UserError, match="is UTF-16"):
        paths.find("x.flist")


def test_undecodable_file_names_are_found_and_read(tmp_path):
    name = os.fsdecode(b"na\xefve.png")
    saved(tmp_path / "a.png", Image.new("L", (4, 4))).rename(tmp_path / name)
    (tmp_path / "x.flist").write_bytes(b"na\xefve.png\n")
    for source in (tmp_path, tmp_path / "x.flist"):
        assert [images.read(path).shape for path in paths.find(source)] == [(3, 4, 4)]


def test_the_home_of_an_unknown_user_is_refused():
    with pytest.raises(UserError, match=r"~nouser/a\.png: there is no home folder ~nouser"):
        paths.find("~nouser/a.png")


def test_several_sources_merge_without_duplicates(tmp_path):
    touch(tmp_path, "b/2.png", "b/1.png", "a.png")
    (tmp_path / "x.flist").write_text("a.png\nb/1.png\na.png\n")
    assert len(paths.find(tmp_path / "x.flist")) == 3  # a list may say so: more often in training, truths of several
    found = paths.find([tmp_path / "b" / "2.png", str(tmp_path / "x.flist"), tmp_path / "b"])
    assert [path.relative_to(tmp_path).as_posix() for path in found] == ["b/2.png", "a.png", "b/1.png"]


def test_find_refusals(tmp_path):
    with pytest.raises(UserError, match=r"patterns are not looked up here: name the folder .*hazy, or a \.flist"):
        paths.find(tmp_path / "hazy" / "*.png")
    with pytest.raises(UserError, match="no such file or folder"):
        paths.find("x" * 400)
    touch(tmp_path, "hazy/notes.txt")
    with pytest.raises(UserError, match="did you mean 'hazy'"):
        paths.find(tmp_path / "hasy")
    with pytest.raises(UserError, match="no images"):
        paths.find(tmp_path / "hazy")
    with pytest.raises(UserError, match=r"nor a \.flist"):
        paths.find(tmp_path / "hazy" / "notes.txt")
    with pytest.raises(UserError, match="did you mean 'test/hazy'"):
        paths.find("sample:test/hazi")


def test_files_that_are_not_read_are_counted_by_type(tmp_path):
    touch(tmp_path, "a/1.HEIC", "a/b/2.heic", "a/3.CR2", "a/4.jpg", "a/notes.txt", "a/._5.heic", "a/.old/6.nef")
    extensions = paths.EXTENSIONS - paths.HEIF
    assert paths.find(tmp_path / "a", extensions) == [tmp_path / "a/4.jpg"]
    (remark,) = paths.passed_over(tmp_path / "a", extensions)
    assert remark.startswith(
        f"{tmp_path / 'a'}: passed over 1 CR2, 2 HEIC, of kinds that are not read; HEIC is read with"
    )
    assert "convert them to PNG" in remark
    assert paths.passed_over(tmp_path / "a" / "4.jpg") == []
    (tmp_path / "a/4.jpg").unlink()
    with pytest.raises(UserError, match=r"no images in this folder or below; .*1 CR2, 2 HEIC, of .*; expected "):
        paths.find(tmp_path / "a", extensions)
    with pytest.raises(UserError, match=r"3\.CR2: 1 CR2, of kinds that are not read; convert"):
        paths.find(tmp_path / "a/3.CR2")
    assert paths.passed_over(touch(tmp_path, "b/1.npy", "b/2.jxl")[0].parent, paths.DEPTH_EXTENSIONS) == [
        f"{tmp_path / 'b'}: passed over 1 JXL, of kinds that are not read; convert them to PNG, TIFF or JPEG"
    ]


def test_heic_is_read_where_pillow_heif_is_installed(tmp_path):
    pytest.importorskip("pillow_heif")
    path = saved(tmp_path / "a.heic", Image.new("RGB", (32, 16), (200, 100, 50)))
    assert paths.find(tmp_path) == [path]
    torch.testing.assert_close(images.read(path).mean((1, 2)), torch.tensor([200, 100, 50]) / 255, atol=0.02, rtol=0)


def test_results_that_cannot_be_marked_are_reported(tmp_path):
    with pytest.raises(UserError, match=r"absent/\.dehazed: cannot be written \(No such file or directory\); check"):
        paths.mark_results(tmp_path / "absent", ["pictures"])


def test_results_of_earlier_runs_are_skipped(tmp_path):
    own = touch(tmp_path, "1.png", "out/2.png", "out/pictures of mine/3.png", "pictures/4.png")
    touch(tmp_path, "out/pictures/1.png", "out/panels/1.png")
    paths.mark_results(tmp_path / "out", ["pictures", "panels"])
    assert paths.find(tmp_path) == own
    (remark,) = paths.passed_over(tmp_path)
    assert "and 1 more such folders: results of an earlier run" in remark
    assert paths.find(tmp_path / "out/pictures") == [tmp_path / "out/pictures/1.png"]  # by its own name it is taken
    for path in own:
        path.unlink()
    with pytest.raises(UserError, match=r"no images in this folder or below; .*results of an earlier run"):
        paths.find(tmp_path / "out")
