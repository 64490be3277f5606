"""Methods called from Python: with images of every usual type, which come back as they were given."""

import doctest
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import picture, tiny
from PIL import Image, ImageCms

import models
from models import DCP
from utils.errors import UserError

HAZY = (picture(3, 1, 3, 70, 90) * 255).round().to(torch.uint8)
ARRAY = HAZY[0].permute(1, 2, 0).numpy()


@pytest.fixture(scope="module", params=["dcp", "nedr"])
def dehaze(request):
    return models.load("dcp") if request.param == "dcp" else tiny("nedr.working_size=64").eval()


@pytest.fixture(scope="module")
def expected(dehaze):
    return dehaze.estimate(HAZY / 255)


def rounded(clear: torch.Tensor) -> np.ndarray:
    return clear[0].mul(255).round().to(torch.uint8).permute(1, 2, 0).numpy()


def test_pillow_images_come_back_as_rgb_images(dehaze, expected):
    clear = dehaze(Image.fromarray(ARRAY))
    assert isinstance(clear, Image.Image)
    assert clear.mode == "RGB"
    np.testing.assert_array_equal(np.array(clear), rounded(expected["clear"]))
    t = dehaze.transmission(Image.fromarray(ARRAY))
    assert (t.mode, t.size) == ("L", (90, 70))
    np.testing.assert_array_equal(np.array(t), rounded(expected["transmission"])[..., 0])


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "LA"])
def test_pillow_images_of_other_modes_are_taken_as_rgb(dehaze, mode):
    image = Image.fromarray(ARRAY).convert(mode)
    np.testing.assert_array_equal(np.array(dehaze(image)), np.array(dehaze(image.convert("RGB"))))


def test_metadata_of_pillow_images_are_kept():
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = Image.Exif()
    exif[272] = "a camera"
    file = io.BytesIO()
    Image.fromarray(ARRAY).save(file, "JPEG", icc_profile=profile, exif=exif)
    clear = models.load("dcp")(Image.open(file))
    assert clear.info["icc_profile"] == profile
    again = io.BytesIO()
    clear.save(again, "PNG", exif=clear.info["exif"])
    assert Image.open(again).getexif()[272] == "a camera"
    grey = Image.fromarray(ARRAY[..., 0])
    grey.info["icc_profile"] = b"of grey"
    assert "icc_profile" not in models.load("dcp")(grey).info


@pytest.mark.parametrize("kind", [np.uint8, np.float16, np.float32, np.float64, ">f4"])
def test_arrays_keep_their_type(dehaze, expected, kind):
    hazy = ARRAY if kind == np.uint8 else (ARRAY / 255).astype(kind)
    before, clear, t = hazy.copy(), dehaze(hazy), dehaze.transmission(hazy)
    assert (type(clear), clear.dtype, clear.shape) == (np.ndarray, np.dtype(kind), (70, 90, 3))
    assert clear.flags.c_contiguous
    assert clear.flags.writeable
    assert (t.dtype, t.shape) == (np.dtype(np.float32 if kind == np.uint8 else kind), (70, 90))
    near = 0.01 if kind == np.float16 else 1e-5
    wanted = expected["clear"][0].permute(1, 2, 0).numpy()
    if kind == np.uint8:
        np.testing.assert_array_equal(clear, rounded(expected["clear"]))
    else:
        np.testing.assert_allclose(clear, wanted, atol=20 * near)  # 1/t makes more of what float16 rounds
    np.testing.assert_allclose(t, expected["transmission"][0, 0], atol=20 * near)
    np.testing.assert_array_equal(hazy, before)


def test_arrays_may_be_views_and_read_only(dehaze):
    turned = np.rot90(ARRAY)[:, ::-1]
    turned.flags.writeable = False
    np.testing.assert_array_equal(dehaze(turned), dehaze(turned.copy()))


@pytest.mark.parametrize("kind", [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [None, 1, 2])
def test_tensors_keep_type_and_shape(dehaze, expected, kind, batch):
    hazy = HAZY if kind == torch.uint8 else (HAZY / 255).to(kind)
    hazy = hazy[0] if batch is None else hazy.expand(batch, -1, -1, -1)
    clear, t = dehaze(hazy), dehaze.transmission(hazy)
    assert (clear.dtype, clear.shape) == (kind, hazy.shape)
    assert t.dtype == (torch.float32 if kind == torch.uint8 else kind)
    assert t.shape == (*hazy.shape[:-3], 1, 70, 90)
    if kind in (torch.uint8, torch.float32):
        wanted = rounded(expected["clear"]) / 255 if kind == torch.uint8 else expected["clear"][0].permute(1, 2, 0)
        found = (clear / 255 if kind == torch.uint8 else clear).reshape(-1, 3, 70, 90)[-1].permute(1, 2, 0)
        torch.testing.assert_close(found, torch.as_tensor(wanted, dtype=torch.float32), atol=1e-5, rtol=0)


def test_outputs_for_tensors_with_gradients_have_none(dehaze):
    assert not dehaze((HAZY / 255).requires_grad_()).requires_grad


WRONG = {
    "path": ("a.jpg", TypeError, r"not str; open the file first \(PIL.Image.open\)"),
    "Path": (Path("a.jpg"), TypeError, r"; open the file first"),
    "list": ([[0.5]], TypeError, "a Pillow image, a NumPy array or a PyTorch tensor, not list"),
    "nothing": (None, TypeError, "not NoneType"),
    "grey array": (ARRAY[..., 0], ValueError, r"\(H,W,3\), not \(70, 90\); repeat the grey channel three times"),
    "alpha": (np.zeros((9, 9, 4), np.uint8), ValueError, "remove the alpha channel"),
    "channels first": (HAZY[0].numpy(), ValueError, r"arrays have the channels last \(transpose"),
    "channels last": (torch.from_numpy(ARRAY), ValueError, r"tensors first \(permute"),
    "batch of arrays": (ARRAY[None], ValueError, "pass arrays image by image"),
    "empty array": (ARRAY[:0], ValueError, r"not \(0, 90, 3\)"),
    "empty batch": (HAZY[:0], ValueError, r"not \(0, 3, 70, 90\)"),
    "whole numbers": (ARRAY.astype(np.int64), TypeError, "uint8, or floats .* not int64"),
    "16 bit": (ARRAY.astype(np.uint16), TypeError, "divide by its white"),
    "complex": (ARRAY.astype(complex), TypeError, "not complex128"),
    "objects": (ARRAY.astype(object), TypeError, "not object"),
    "integer tensor": (HAZY.int(), TypeError, "not torch.int32"),
    "0 to 255": (ARRAY.astype(np.float32), ValueError, r"lie in \[0,1\], and there are values from 0 to 255; divide"),
    "-1 to 1": (HAZY / 127.5 - 1, ValueError, "from -1 to 1"),
    "NaN": (np.full((9, 9, 3), np.nan), ValueError, "not numbers"),
    "infinite": (torch.full((3, 9, 9), torch.inf), ValueError, "from inf to inf"),
    "16-bit Pillow": (Image.new("I;16", (9, 9)), ValueError, "mode I;16 has no agreed white"),
    "float Pillow": (Image.new("F", (9, 9)), ValueError, "mode F"),
    "empty Pillow": (Image.new("RGB", (0, 9)), ValueError, "empty: 0x9"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_inputs_that_are_not_images_are_refused(wrong):
    image, kind, message = WRONG[wrong]
    for verb in (models.load("dcp"), models.load("dcp").transmission):
        with pytest.raises(kind, match=message):
            verb(image)


def test_methods_without_transmission_raise():
    method = models.load("dcp")
    method.predict = lambda hazy, tile=None: {"clear": hazy}
    with pytest.raises(UserError, match="DCP finds no transmission; nedr, d4 and dcp do"):
        method.transmission(ARRAY)


def test_one_pixel_is_an_image(dehaze):
    assert dehaze(ARRAY[:1, :1]).shape == (1, 1, 3)


def test_load_names_files_and_settings():
    assert isinstance(models.load("dcp"), DCP)
    assert models.load("dcp", guided_filter=False).settings.guided_filter is False
    with pytest.raises(UserError, match="nowhere"):
        models.load("nowhere.pt")


def test_doctests():
    failed, tried = doctest.testmod(models)
    assert not failed
    assert tried >= 4


def test_load_works_in_any_working_directory(tmp_path, monkeypatch):
    """Even where folders have the methods' names."""
    for name in models.names():
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    for name in ((), ("nedr",), ("dcp",)):
        assert models.load(*name)(np.zeros((40, 50, 3))).shape == (40, 50, 3)
