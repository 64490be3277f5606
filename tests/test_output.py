"""How test.py writes images: their kind, names, strength, what is shown in them, and what it leaves alone."""

import io

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageCms
from test_scoring_command import command

import models
from data import images
from utils import checkpoint, config, errors, physics
from utils.evaluation.report import image_names

QUICK = ("--model", "dcp", "dcp.guided_filter=false", "--output", "out")


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """Run test.py on the folder ``photos``; -> exit status, output, errors."""
    monkeypatch.chdir(tmp_path)

    def run(*argv, hazy="photos"):
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            errors.run(lambda: command.main([*QUICK, "--hazy", hazy, *map(str, argv)]))
        return end.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def photos(tmp_path):
    """a.jpg, b.png, c.webp, d.tif and e.bmp, each with a colour profile and an EXIF line where its kind has them."""
    (tmp_path / "photos").mkdir()
    exif = Image.Exif()
    exif[ExifTags.Base.Artist] = "N. N."
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for n, name in enumerate(("a.jpg", "b.png", "c.webp", "d.tif", "e.bmp")):
        pixels = np.random.default_rng(n).integers(90, 255, (12 + n, 20, 3), dtype=np.uint8)
        kept = {} if name == "e.bmp" else {"exif": exif, "icc_profile": profile}
        Image.fromarray(pixels).save(tmp_path / "photos" / name, **kept)
    return tmp_path / "photos"


def written(tmp_path):
    return {path.name: path for path in (tmp_path / "out/pictures").rglob("*") if path.is_file()}


def test_images_keep_their_format_and_metadata(run, photos, tmp_path):
    status, out, _ = run()
    assert (status, "5 images done in " in out) == (0, True)
    kinds = {"a.jpg": "JPEG", "b.png": "PNG", "c.webp": "WEBP", "d.tif": "TIFF", "e.png": "PNG"}
    assert written(tmp_path).keys() == kinds.keys()
    for name, kind in kinds.items():
        with Image.open(written(tmp_path)[name]) as image:
            assert image.format == kind
            if name != "e.png":
                assert image.getexif()[ExifTags.Base.Artist] == "N. N."
                assert ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))


@pytest.mark.parametrize(("kind", "format"), [("jpg", "JPEG"), ("webp", "WEBP"), ("png", "PNG")])
def test_one_format_for_all_with_quality_and_suffix(run, photos, tmp_path, kind, format):
    assert run("--format", kind, "--quality", 30, "--suffix", "_clear")[0] == 0
    assert written(tmp_path).keys() == {f"{letter}_clear.{kind}" for letter in "abcde"}
    with Image.open(written(tmp_path)[f"b_clear.{kind}"]) as image:
        assert image.format == format
    size = written(tmp_path)[f"b_clear.{kind}"].stat().st_size
    run("--format", kind, "--quality", 99, "--suffix", "_clear", "--overwrite")
    larger = written(tmp_path)[f"b_clear.{kind}"].stat().st_size
    assert larger == size if kind == "png" else larger > 1.3 * size


def test_output_names_stay_distinct():
    keep = lambda name: "." + name.rpartition(".")[2]  # noqa: E731
    assert image_names(["a/b.png", "a/b.jpg"], keep) == {"a/b.png": "a/b.png", "a/b.jpg": "a/b.jpg"}
    found = image_names(["b.gif", "b.png", "b.gif.png", "c.jpg"], lambda name: "_x.png")
    assert found == {"b.gif": "b.gif_x.png", "b.png": "b.png_x.png", "b.gif.png": "b.gif.png_x.png", "c.jpg": "c_x.png"}


def test_existing_outputs_are_not_overwritten(run, photos, tmp_path):
    run()
    marked = written(tmp_path)["a.jpg"]
    marked.write_bytes(b"mine")
    written(tmp_path)["b.png"].unlink()
    status, out, _ = run()
    assert (status, marked.read_bytes()) == (0, b"mine")
    assert "1 image done" in out
    assert "4 images existed already, perhaps made with other settings (--overwrite makes them again)" in out
    assert "5 images done" in run("--overwrite")[1]
    assert images.read(marked).shape == (3, 12, 20)


def test_strength(run, photos, tmp_path):
    """0 gives the hazy image, 2 the formula with t squared."""
    hazy = images.read(photos / "b.png")
    assert run("--strength", 0)[0] == 0
    assert torch.equal(images.read(written(tmp_path)["b.png"]), hazy)
    run("--strength", 2, "--overwrite")
    method = models.build(config.load("dcp", models.settings_types(), overrides=["dcp.guided_filter=false"]))
    found = method.estimate(hazy[None])
    expected = physics.restore(hazy[None], found["transmission"] ** 2, found["airlight"])[0]
    assert (images.read(written(tmp_path)["b.png"]) - expected).abs().max() <= 0.5 / 255 + 1e-6


def test_strength_of_the_shipped_network_in_between():
    method, hazy = models.load(), torch.rand(1, 3, 70, 250)
    none, half, whole = (method.estimate(hazy, strength=k)["clear"] for k in (0, 0.5, 1))
    assert torch.allclose(none, hazy, atol=1e-6)
    assert torch.equal(whole, method.dehaze(hazy))
    assert (none - hazy).abs().mean() < (half - hazy).abs().mean() < (whole - hazy).abs().mean()


def test_side_by_side_and_transmission(run, photos, tmp_path):
    run()
    dehazed = images.read(written(tmp_path)["b.png"])
    run("--show", "side_by_side", "--overwrite")
    assert torch.equal(images.read(written(tmp_path)["b.png"]), torch.cat([images.read(photos / "b.png"), dehazed], 2))
    run("--show", "transmission", "--overwrite")
    with Image.open(written(tmp_path)["b.png"]) as image:
        assert (image.mode, image.size) == ("L", (20, 13))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--format", "gif"], "must be one of auto, png, jpg, webp"),
        (["--quality", "0"], "at least 1"),
        (["--strength", "9"], "at most 4"),
        (["--suffix", "a/b"], "no / can be in a file's name"),
        (["--show", "transmission", "--clear", "other"], "there is no dehazed image to measure"),
    ],
)
def test_invalid_output_options_are_refused(run, photos, tmp_path, argv, message):
    images.write(tmp_path / "other/a.png", torch.rand(3, 12, 20))
    status, _, err = run(*argv, hazy="photos/a.jpg")
    assert (status, err.count("error")) == (2, 1)
    assert message in err
    assert not written(tmp_path)


def test_a_method_without_transmission_is_refused_at_the_start(run, photos, tmp_path):
    settings = config.load("aknet", models.settings_types(), overrides=["aknet.width=8"])
    identity = {"model": "aknet", "settings": config.to_dict(settings)}
    checkpoint.save_weights(tmp_path / "w.safetensors", models.build(settings).inference_state(), identity)
    status, _, err = run("--model", "aknet", "--weights", "w.safetensors", "--strength", 0.5)
    assert status == 2
    assert "test.strength=0.5: AKNet finds no transmission" in err
