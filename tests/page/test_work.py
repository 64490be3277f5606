"""What the page does with images and visitors; needs neither gradio nor a browser."""

import os
import shutil
import time
import zipfile
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import picture
from PIL import Image, ImageCms

import models
from data import images
from page import __main__ as program
from page import visitors, work
from page.visitors import Visitors
from utils import checkpoint, config
from utils.errors import UserError


@pytest.fixture(scope="module")
def method():
    return models.load("dcp")


@pytest.fixture
def photo(tmp_path):
    """A JPEG with a profile, EXIF and a tag that turns it by a quarter: 60 x 80 as stored, 80 x 60 upright."""
    exif = Image.Exif()
    exif[271], exif[274] = "a maker", 6
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    smooth = F.interpolate(picture(1, 1, 3, 4, 5), (60, 80), mode="bilinear")[0]  # JPEG keeps no noise
    pixels = (smooth.permute(1, 2, 0).numpy() * 255).astype(np.uint8)
    path = tmp_path / "in" / "sea.JPG"
    path.parent.mkdir()
    Image.fromarray(pixels).save(path, "JPEG", exif=exif, icc_profile=profile, quality=95)
    return path


def test_a_preview_is_the_resized_image(photo, method, monkeypatch):
    found = method.estimate(images.read(photo)[None])
    view = work.estimate(photo, method)
    torch.testing.assert_close(view.clear(1), found["clear"], atol=1e-6, rtol=0)
    torch.testing.assert_close(view.clear(0), images.read(photo)[None], atol=1e-6, rtol=0)
    t = found["transmission"] ** 0.5
    wanted = ((view.hazy - found["airlight"]) / t + found["airlight"]).clamp(0, 1)
    torch.testing.assert_close(view.clear(0.5), wanted, atol=1e-6, rtol=0)
    monkeypatch.setattr(work, "SHOWN", 40)
    small = work.estimate(photo, method)
    assert (small.hazy.shape, small.transmission.shape) == ((1, 3, 40, 30), (1, 1, 40, 30))


@pytest.mark.parametrize("strength", [0, 0.7, 1, 1.5])
def test_downloads_have_full_size_and_keep_metadata(photo, method, strength, tmp_path):
    written = work.write(photo, method, strength, tmp_path / "out")
    assert written.name == "sea_dehazed.JPG"
    with Image.open(written) as image:
        assert (image.format, image.size) == ("JPEG", (60, 80))
        assert image.info["icc_profile"]
        assert image.getexif()[271] == "a maker"
        assert 274 not in image.getexif()
    expected = work.estimate(photo, method).clear(strength)[0]
    assert (images.read(written) - expected).abs().mean() < 0.01  # JPEG


@pytest.mark.parametrize(("kind", "ending"), [("png", ".png"), ("bmp", ".png"), ("tiff", ".tiff"), ("webp", ".webp")])
def test_writable_formats_are_kept_and_others_become_png(kind, ending, method, tmp_path):
    path = tmp_path / f"a.{kind}"
    Image.new("RGB", (20, 30), "grey").save(path)
    assert work.write(path, method, 1, tmp_path / "out").name == f"a_dehazed{ending}"


@pytest.fixture(scope="module")
def aknet():
    settings = config.load("aknet", models.settings_types(), overrides=["aknet.width=8"])
    torch.manual_seed(0)
    return models.build(settings).eval()


def test_a_method_without_transmission_ignores_strength(photo, aknet, tmp_path):
    with torch.no_grad():
        wanted = aknet.dehaze(images.read(photo)[None])
    view = work.estimate(photo, aknet)
    assert view.transmission is None
    for strength in (0, 1, 1.5):
        torch.testing.assert_close(view.clear(strength), wanted.clamp(0, 1))
        written = images.read(work.write(photo, aknet, strength, tmp_path / "out"))
        assert (written - wanted[0].clamp(0, 1)).abs().mean() < 0.01  # JPEG


def test_every_method_with_available_weights_is_offered(aknet, tmp_path, monkeypatch):
    identity = {"model": "aknet", "settings": {"aknet": {"width": 8}}}
    for folder in ("aknet", "mine", "theirs"):
        checkpoint.save_weights(tmp_path / folder / "weights.safetensors", aknet.inference_state(), identity)
    monkeypatch.setattr(models, "SHIPPED", tmp_path)
    files = [str(tmp_path / folder / "weights.safetensors") for folder in ("mine", "theirs")]
    offered = program.load_methods(files, "cpu")
    names = ["AKNet", "weights", str(tmp_path / "theirs" / "weights"), "DCP (dark channel prior)"]
    assert list(offered) == names
    assert [models.name_of(each) for each in offered.values()] == ["aknet", "aknet", "aknet", "dcp"]
    with pytest.raises(UserError, match="is named twice"):
        program.load_methods([files[0]] * 3, "cpu")


def test_invalid_files_are_refused_without_naming_a_folder(photo, tmp_path):
    visitor = Visitors(tmp_path).get("a")
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "empty.png").touch()
    Image.new("1", (3000, 2000)).save(tmp_path / "large.png")
    files = [tmp_path / name for name in ("notes.txt", "empty.png", "large.png")]
    refused = visitor.take([*files, photo, tmp_path / "gone.png"], megapixels=5)
    assert list(visitor.images) == ["sea.JPG"]
    wanted = ["notes.txt: cannot be read as an image", "empty.png: the file is empty", "large.png: 3000x2000 are 6 m"]
    for words, start in zip(refused, [*wanted, "gone.png: no such image"], strict=True):
        assert words.startswith(start)
        assert str(tmp_path) not in words
    assert "this page accepts 5" in refused[2]


def test_a_truncated_image_is_refused_when_viewed(photo, method):
    photo.write_bytes(photo.read_bytes()[:-100])
    work.check(photo, 60)
    with pytest.raises(UserError, match=r"sea\.JPG: cannot be read as an image"):
        work.estimate(photo, method)


def test_running_out_of_memory_is_reported(photo, method, monkeypatch):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(images, "read", fail)
    with pytest.raises(UserError, match="too little memory"):
        work.estimate(photo, method)


def test_images_of_one_name_are_distinguished(photo, tmp_path):
    visitor = Visitors(tmp_path).get("a")
    (tmp_path / "other").mkdir()
    shutil.copy(photo, tmp_path / "other")
    assert visitor.take([photo, tmp_path / "other" / photo.name], 60) == []
    assert list(visitor.images) == ["sea.JPG", "sea (2).JPG"]


def test_several_images_give_a_zip_of_the_readable_ones(photo, method, tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(photo.read_bytes()[:-100])
    seen = []

    def write(path):
        return work.write(path, method, 1, tmp_path / "out")

    refused = work.write_zip(
        tmp_path / "a.zip", [photo, broken, photo], write, lambda done: seen.append(done) or done < 2
    )
    assert seen == [0, 1, 2]
    assert len(refused) == 1
    assert refused[0].startswith("broken.jpg: ")
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert archive.namelist() == ["sea_dehazed.JPG"]  # the third was not begun
        assert archive.testzip() is None
    assert list((tmp_path / "out").iterdir()) == []


def test_a_zip_holds_every_image_though_their_results_have_one_name(photo, method, tmp_path):
    visitor = Visitors(tmp_path).get("a")
    for name in ("a.bmp", "a.gif", "a.png"):
        Image.open(photo).save(tmp_path / name)
    visitor.take([tmp_path / name for name in ("a.bmp", "a.gif", "a.png")], 60)
    archive = visitor.result_folder() / "a.zip"
    taken = list(visitor.images.values())
    write = partial(work.write, method=method, strength=1, folder=archive.parent)
    assert work.write_zip(archive, taken, write, lambda done: True) == []
    with zipfile.ZipFile(archive) as file:
        assert file.namelist() == ["a_dehazed.png", "a_dehazed (2).png", "a_dehazed (3).png"]


def test_a_zip_in_the_making_survives_another_upload(photo, method, tmp_path):
    visitor = Visitors(tmp_path).get("a")
    Image.new("RGB", (9, 9)).save(tmp_path / "other.png")
    visitor.take([photo], 60)
    archive = visitor.result_folder() / "a.zip"

    def proceed(done):
        return visitor.take([photo, tmp_path / "other.png"], 60) == []

    work.write_zip(archive, [visitor.images["sea.JPG"]], lambda p: work.write(p, method, 1, archive.parent), proceed)
    assert zipfile.ZipFile(archive).namelist() == ["sea_dehazed.JPG"]
    for _ in range(3):
        latest = visitor.result_folder()
    assert latest.exists()
    assert not archive.exists()


def test_a_visitors_files_are_deleted_with_the_session(photo, tmp_path):
    all_, upload = Visitors(tmp_path / "root"), photo
    all_.root.mkdir()
    one, other = all_.get("one"), all_.get("other")
    for visitor in (one, other):
        visitor.take([upload], 60)
    with all_.at_work(one):
        one.show(picture(1, 1, 3, 8, 8))
        all_.leave("one")
        images.write(one.folder / "late.png", picture(1, 3, 8, 8))  # of work that was under way
    assert not one.folder.exists()
    with pytest.raises(UserError, match="deleted when the page was left; drop them again"):
        one.new_folder()
    assert other.images["sea.JPG"].is_file()
    assert all_.get("one") is not one
    all_.leave("nobody")


def test_earlier_uploads_stay_when_others_are_added_or_removed(photo, tmp_path):
    visitor, other = Visitors(tmp_path).get("a"), tmp_path / "other.png"
    Image.new("RGB", (9, 9)).save(other)
    visitor.take([photo], 60)
    own = visitor.images["sea.JPG"]
    photo.unlink()  # the server's copy was swept up
    assert visitor.take([photo, other], 60) == []
    assert visitor.images["sea.JPG"] == own
    assert visitor.take([other], 60) == []
    assert list(visitor.images) == ["other.png"]
    assert not own.exists()
    assert visitor.take([], 60) == []
    assert list(visitor.folder.iterdir()) == []


def test_new_uploads_replace_the_old_ones(photo, tmp_path):
    visitor = Visitors(tmp_path).get("a")
    visitor.take([photo], 60)
    old = visitor.images["sea.JPG"], visitor.show(picture(1, 1, 3, 8, 8))
    visitor.take([shutil.copy(photo, tmp_path)], 60)
    assert not any(os.path.exists(each) for each in old)
    for _ in range(30):
        visitor.show(picture(1, 1, 3, 8, 8))
    assert len(list(visitor.folder.iterdir())) == visitors.KEEP + 1


def test_abandoned_uploads_are_deleted(tmp_path, monkeypatch):
    all_ = Visitors(tmp_path)
    mine = all_.get("a").new_folder() / "mine"
    old, new = tmp_path / "old", tmp_path / "new"
    for path in (mine, old, new):
        path.touch()
    for path in (mine, old):
        os.utime(path, (time.time() - visitors.LINGER - 1,) * 2)
    all_.sweep()
    assert [path.exists() for path in (mine, old, new)] == [True, False, True]
    monkeypatch.setattr(visitors, "IDLE", -1)
    all_.sweep()
    assert not mine.exists()
