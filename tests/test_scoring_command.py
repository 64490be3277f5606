"""test.py from the outside: what it prints, writes and returns."""

import csv
import importlib.util
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageCms
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

import models
from data import images
from models import DCP, NeDR, candidates
from utils import checkpoint, config, errors, memory
from utils.errors import UserError
from utils.evaluation import extra_metrics, journal, runner, selection

ROOT = Path(__file__).resolve().parent.parent
FORMATS = {  # name -> (mode, size, how it is saved)
    "grey.png": ("L", (20, 12), {}),
    "rgba.png": ("RGBA", (13, 31), {}),
    "palette.gif": ("P", (12, 12), {}),
    "cmyk.jpg": ("CMYK", (40, 17), {}),
    "deep.png": ("I;16", (11, 11), {}),
    "one.bmp": ("RGB", (1, 1), {}),
    "thin.png": ("RGB", (1, 33), {}),
    "turned.jpg": ("RGB", (30, 20), {"exif": {0x0112: 6}}),
    "two.words.tif": ("RGB", (9, 7), {}),
    "deeper/twin.png": ("RGB", (16, 16), {}),
    "deeper/twin.jpg": ("RGB", (16, 16), {}),
}


def load_command():
    spec = importlib.util.spec_from_file_location("scoring_command", ROOT / "test.py")  # "test" is Python's own
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


command = load_command()


@dataclass
class Outcome:
    status: int
    out: str
    err: str


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """Run test.py in this process, in an empty folder, as the shell would."""
    monkeypatch.chdir(tmp_path)

    def run(*argv):
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            errors.run(lambda: command.main([str(arg) for arg in argv]))
        return Outcome(end.value.code, *capsys.readouterr())

    return run


def paint(path, mode, size, options):
    path.parent.mkdir(parents=True, exist_ok=True)
    width, height = size
    rng = np.random.default_rng(width)
    if mode == "I;16":
        image = Image.fromarray(rng.integers(20000, 65535, (height, width), dtype=np.uint16))
    else:
        image = Image.fromarray(rng.integers(90, 255, (height, width, 3), dtype=np.uint8)).convert(mode)
    exif = Image.Exif()
    exif.update(options.get("exif", {}))
    image.save(path, exif=exif, icc_profile=options.get("icc_profile")) if options else image.save(path)


@pytest.fixture
def photos(tmp_path):
    """Images of all sorts, without ground truth."""
    for name, options in FORMATS.items():
        paint(tmp_path / "photos" / name, *options)
    return tmp_path / "photos"


@pytest.fixture
def pairs(tmp_path):
    """Three hazy images of two scenes, RESIDE's way: hazy/1_1.png, clear/1.png."""
    for scene, hazes in {"1": 2, "2": 1}.items():
        clear = torch.rand(3, 24, 36, generator=torch.Generator().manual_seed(int(scene)))
        images.write(tmp_path / "clear" / f"{scene}.png", clear)
        for n in range(1, hazes + 1):
            images.write(tmp_path / "hazy" / f"{scene}_{n}.png", 0.6 * clear + 0.35)
    return ["--hazy", tmp_path / "hazy", "--clear", tmp_path / "clear"]


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    """A folder with a small NeDR, untrained."""
    folder = tmp_path_factory.mktemp("experiment")
    small = [
        "nedr.base_channels=8",
        "nedr.encoder=test_efficientnet",
        "nedr.encoder_weights=none",
        "data.crop_size=128",
    ]
    settings = config.load("nedr", models.settings_types(), overrides=small)
    torch.manual_seed(0)
    state = models.build(settings).state_dict()
    saved = {"model": "nedr", "settings": config.to_dict(settings), "networks": state, "ema": {}}
    checkpoint.save(folder / "last.pt", saved)
    return folder


@pytest.fixture(scope="module")
def trained_aknet(tmp_path_factory):
    """A file with a small AKNet, untrained."""
    settings = config.load("aknet", models.settings_types(), overrides=["aknet.width=8"])
    torch.manual_seed(0)
    identity = {"model": "aknet", "settings": config.to_dict(settings)}
    file = tmp_path_factory.mktemp("aknet") / "weights.safetensors"
    checkpoint.save_weights(file, models.build(settings).inference_state(), identity)
    return file


@pytest.fixture
def seen(monkeypatch):
    """The settings under which NeDR dehazes; it gives the hazy image back."""
    seen = []
    monkeypatch.setattr(NeDR, "predict", lambda self, hazy, tile: seen.append(self.settings) or {"clear": hazy})
    return seen


def results(folder):
    return json.loads((folder / "results.json").read_text())


def row(folder, method="dcp", benchmark="pictures"):
    rows = results(folder)["rows"]
    return next(each for each in rows if (each["method"], each["benchmark"]) == (method, benchmark))


def pictures(folder):
    files = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {path.as_posix() for path in files if not path.name.startswith(".")}


def test_scores_as_a_process(pairs, tmp_path):
    argv = [sys.executable, ROOT / "test.py", "--model", "dcp", *pairs, "--output", "out", "dcp.guided_filter=false"]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    for text in ("hazy input", "dcp", "protocol ours", "3 images done"):
        assert text in done.stdout
    found = row(tmp_path / "out")
    assert found["settings"] == {"guided_filter": False}
    assert [each["name"] for each in found["per_image"]] == ["1_1.png", "1_2.png", "2_1.png"]
    for name, value in found["mean"].items():
        assert value == pytest.approx(np.mean([each[name] for each in found["per_image"]]))
    with open(tmp_path / "out" / "per_image.csv", newline="") as file:
        read = [float(each["ours.psnr"]) for each in csv.DictReader(file) if each["method"] == "dcp"]
    assert read == [each["ours.psnr"] for each in found["per_image"]]
    assert pictures(tmp_path / "out" / "pictures") == {"1_1.png", "1_2.png", "2_1.png"}
    assert {name.split("_")[0] for name in pictures(tmp_path / "out" / "panels")} == {"best", "median", "worst"}
    assert not (tmp_path / "out" / journal.NAME).exists()


def test_the_hazy_input_comes_out_as_scikit_image_has_it(run, pairs, tmp_path):
    run("--model", "dcp", *pairs, "--output", "out")
    for each in row(tmp_path / "out", "hazy input")["per_image"]:
        hazy, clear = (
            np.asarray(Image.open(tmp_path / folder / name))
            for folder, name in [("hazy", each["name"]), ("clear", each["name"].split("_")[0] + ".png")]
        )
        window = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "channel_axis": 2}
        assert each["ours.psnr"] == pytest.approx(peak_signal_noise_ratio(clear, hazy, data_range=255), abs=1e-9)
        assert each["ours.ssim"] == pytest.approx(
            structural_similarity(clear, hazy, data_range=255, **window), abs=1e-9
        )


@pytest.mark.slow
def test_a_mistake_as_a_process_is_one_line(tmp_path):
    argv = [sys.executable, ROOT / "test.py", "--model", "dcp", "--hazy", "nowhere"]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: nowhere: no such file or folder")
    assert done.stderr.count("\n") == 1


def test_dehazes_images_of_every_format_and_size(run, photos, tmp_path):
    assert run("--model", "dcp", "--hazy", photos, "--format", "png").status == 0
    out = tmp_path / "results" / "pictures"
    expected = {name: f"{Path(name).with_suffix('')}.png" for name in FORMATS}
    expected |= {f"deeper/twin.{kind}": f"deeper/twin.{kind}.png" for kind in ("png", "jpg")}
    assert pictures(tmp_path / "results" / "pictures") == set(expected.values())
    assert not (tmp_path / "results" / "results.json").exists()  # there is no figure to report
    for name, written in expected.items():
        with Image.open(out / written) as image:
            assert image.mode == "RGB"
            assert (image.height, image.width) == images.read(photos / name).shape[1:]


def test_one_image_and_a_list(run, photos, tmp_path):
    assert run("--model", "dcp", "--hazy", photos / "turned.jpg", "--output", "one").status == 0
    assert pictures(tmp_path / "one") == {"pictures/turned.jpg"}
    (tmp_path / "some.flist").write_text("photos/grey.png\nphotos/deeper/twin.jpg\n")
    assert run("--model", "dcp", "--hazy", "some.flist", "--output", "two").status == 0
    assert pictures(tmp_path / "two" / "pictures") == {"grey.png", "deeper/twin.jpg"}


def test_several_paths_as_the_shell_hands_them_over(run, photos, tmp_path):
    (tmp_path / "some.flist").write_text("photos/grey.png\nphotos/thin.png\nphotos/grey.png\n")
    argv = ["--hazy", photos / "turned.jpg", photos / "grey.png", "some.flist", photos / "deeper"]
    done = run("--model", "dcp", *argv, "dcp.guided_filter=false", "--output", "out")
    assert done.status == 0
    wanted = {"turned.jpg", "grey.png", "thin.png", "deeper/twin.png", "deeper/twin.jpg"}
    assert pictures(tmp_path / "out" / "pictures") == wanted
    done = run("--model", "dcp", "--hazy", "some.flist", "--output", "list")
    assert pictures(tmp_path / "list" / "pictures") == {"grey.png", "thin.png"}
    assert "1 image named twice, taken once" in done.err


def test_several_pairs_as_the_shell_hands_them_over(run, pairs, tmp_path):
    hazy, clear = (sorted((tmp_path / folder).iterdir()) for folder in ("hazy", "clear"))
    assert run("--model", "dcp", "--hazy", *hazy, "--clear", *clear, "--output", "out").status == 0
    assert [each["name"] for each in row(tmp_path / "out")["per_image"]] == ["1_1.png", "1_2.png", "2_1.png"]


@pytest.mark.parametrize(
    "name", ["# O-HAZY NTIRE 2018", "2018", "null", '"quoted"', "photos: winter", "seed=1", "\x7f"]
)
def test_paths_are_taken_as_typed(run, tmp_path, name):
    images.write(tmp_path / name / "hazy" / "a.png", torch.rand(3, 12, 12))
    images.write(tmp_path / name / "a.png", torch.rand(3, 12, 12))
    assert run("--model", "dcp", "--hazy", name, f"{name}/a.png", "--output", f"{name}/out").status == 0
    assert pictures(tmp_path / name / "out" / "pictures") == {"a.png", "hazy/a.png"}


def test_a_network_takes_any_size(run, photos, experiment, tmp_path):
    (tmp_path / "some.flist").write_text("photos/one.bmp\nphotos/thin.png\nphotos/turned.jpg\n")
    done = run("--checkpoints", experiment, "--hazy", "some.flist", "--output", "out")
    assert (done.status, done.err) == (0, "")
    sizes = {path.name: Image.open(path).size for path in (tmp_path / "out" / "pictures").iterdir()}
    assert sizes == {"one.png": (1, 1), "thin.png": (1, 33), "turned.jpg": (20, 30)}


def test_a_checkpoint_is_scored_in_its_folder(run, pairs, experiment, seen):
    assert run("--model", "nedr", "--checkpoints", experiment, *pairs, "precision=bf16").status == 0
    found = results(experiment / "results")
    about = found["methods"]["nedr"]
    assert (about["weights"], found["settings"]["precision"]) == ("last.pt", "bf16")
    assert about["settings"]["base_channels"] == 8  # the checkpoint's, not the default
    assert about["parameters"] > 1000
    assert row(experiment / "results", "nedr")["mean"] == row(experiment / "results", "hazy input")["mean"]


def test_settings_given_for_the_test_are_applied_and_training_settings_are_not(run, pairs, experiment, seen, tmp_path):
    folder = tmp_path / "experiment"
    folder.mkdir()
    (folder / "last.pt").symlink_to(experiment / "last.pt")
    (folder / "config.yml").write_text("nedr: {airlight: max, base_channels: 64}\ntest: {pictures: false}\n")
    run("--checkpoints", folder, *pairs, "nedr.guided_filter=true")
    assert (seen[-1].airlight, seen[-1].guided_filter, seen[-1].base_channels) == ("max", True, 8)
    assert not (folder / "results" / "pictures").exists()
    run("--checkpoints", folder, *pairs, "nedr.airlight=dark_channel")  # the command line wins
    assert (seen[-1].airlight, seen[-1].guided_filter) == ("dark_channel", False)
    run("--weights", folder / "last.pt", *pairs)
    assert seen[-1].airlight == "learned"  # the checkpoint's own


def test_images_on_the_command_line_override_the_configured_ground_truth(run, pairs, photos, tmp_path):
    (tmp_path / "config.yml").write_text("test: {hazy: hazy, clear: clear}\n")
    assert "protocol" in run("--model", "dcp", "--checkpoints", tmp_path).out
    done = run("--model", "dcp", "--checkpoints", tmp_path, "--hazy", photos)
    assert done.status == 0
    assert "protocol" not in done.out


def test_better_weights_come_first(tmp_path):
    test = config.load("nedr", models.settings_types()).test
    for name in reversed(candidates.WEIGHTS):
        (tmp_path / name).touch()
        assert candidates._weights(tmp_path, test, [], print) == [tmp_path / name]
    test.ema = False  # weights.safetensors holds averaged ones alone
    assert candidates._weights(tmp_path, test, [], print) == [tmp_path / "last.pt"]


def test_trained_methods_of_several_files_side_by_side(run, pairs, experiment, trained_aknet, tmp_path):
    """In the order of --model, or else of the files; two files of one method bear the names of their folders."""
    pairs = [*pairs, "test.panels=false"]
    files = [experiment / "last.pt", trained_aknet]
    done = run(
        "--model", "aknet", "dcp", "nedr", "--weights", *files, *pairs, "--output", "out", "aknet.border=reflect"
    )
    assert done.status == 0
    found = results(tmp_path / "out")
    assert [row["method"] for row in found["rows"]] == ["hazy input", "aknet", "dcp", "nedr"]
    assert {name: about["model"] for name, about in found["methods"].items()} == {
        n: n for n in ("aknet", "dcp", "nedr")
    }
    assert found["methods"]["aknet"]["settings"]["border"] == "reflect"
    assert pictures(tmp_path / "out" / "pictures" / "aknet") == {"1_1.png", "1_2.png", "2_1.png"}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "weights.safetensors").symlink_to(trained_aknet)
    run("--weights", "other/weights.safetensors", *files, *pairs, "--output", "all")
    folder = trained_aknet.parent.name
    assert list(results(tmp_path / "all")["methods"]) == ["other:aknet", "nedr", f"{folder}:aknet"]
    folders = {"other-aknet", "nedr", f"{folder}-aknet"}  # without the colon, which Windows does not take
    assert {path.name for path in (tmp_path / "all" / "pictures").iterdir()} == folders
    done = run("--weights", trained_aknet, trained_aknet.parent / ".." / folder / trained_aknet.name, *pairs)
    assert done.status == 2
    assert f"2 files would be called {folder}:aknet" in done.err


def test_weights_and_names_must_agree(run, pairs, experiment, trained_aknet):
    done = run("--model", "aknet", "kanet", "--weights", trained_aknet, *pairs)
    assert done.status == 2
    assert "no weights of kanet in" in done.err
    done = run("--model", "aknet", "--weights", trained_aknet, experiment / "last.pt", *pairs)
    assert done.status == 2
    assert "holds a nedr model, not aknet; give --model nedr" in done.err


def test_a_damaged_image_is_named_and_the_others_are_scored(run, pairs, tmp_path):
    whole = (tmp_path / "hazy" / "1_2.png").read_bytes()
    (tmp_path / "hazy" / "1_2.png").write_bytes(whole[: len(whole) // 2])
    done = run("--model", "dcp", *pairs, "--output", "out")
    assert done.status == 2
    *said, last = done.err.splitlines()
    assert len(said) == 1  # though two rows lack it
    assert said[0].startswith("skipped: ")
    assert "1_2.png" in said[0]
    assert last == "error: 1 image could not be used; they are listed above and in out/skipped.txt"
    assert [f"skipped: {line}" for line in (tmp_path / "out" / "skipped.txt").read_text().splitlines()] == said
    assert row(tmp_path / "out")["images"] == 2
    assert len(row(tmp_path / "out")["skipped"]) == 1
    assert pictures(tmp_path / "out" / "pictures") == {"1_1.png", "2_1.png"}


def test_a_link_that_leads_nowhere_is_skipped(run, pairs, tmp_path):
    (tmp_path / "hazy" / "2_2.png").symlink_to("nowhere.png")
    done = run("--model", "dcp", *pairs, "--output", "out")
    assert done.status == 2
    assert "2_2.png: no such image" in done.err
    assert row(tmp_path / "out")["images"] == 3


def test_a_pair_of_different_sizes_is_skipped(run, pairs, tmp_path):
    images.write(tmp_path / "clear" / "2.png", torch.rand(3, 24, 37))
    done = run("--model", "dcp", *pairs, "--output", "out")
    assert done.status == 2
    assert "36x24 but its ground truth" in done.err


def test_results_never_become_inputs(run, photos):
    """Not those of the same output, nor of another; only where their own folder is named."""
    argv = ["--model", "dcp", "--hazy", photos, "--overwrite", "--output"]
    for n, output in enumerate(("out", "out", "out2")):
        done = run(*argv, photos / output)
        assert (done.status, f"{len(FORMATS)} images done" in done.out) == (0, True)
        assert ("results of an earlier run, passed over" in done.err) == (n > 0)
    done = run("--model", "dcp", "--hazy", photos / "out" / "pictures", "--output", photos / "out")
    assert done.status == 2
    assert "another --output" in done.err


def test_results_of_a_benchmark_are_not_taken_for_it(run, tmp_path):
    """They lie in a folder of its name, and not as deep."""
    images.write(tmp_path / "root/deep/down/RTTS/1.png", torch.rand(3, 12, 12))
    argv = ["--model", "dcp", "--data-root", "root", "--benchmarks", "RTTS", "--output"]
    for output in ("root/out", "root/out2"):
        assert run(*argv, output).status == 0
        found = row(tmp_path / output, benchmark="RTTS")
        assert not any("also" in remark for remark in found["remarks"])
        assert [each["name"] for each in found["per_image"]] == ["1.png"]
    (tmp_path / "root/deep").rename(tmp_path / "gone")
    assert "RTTS: not under" in run(*argv, "root/out3").err


def test_skipped_files_and_the_pairing_rule_are_reported(run, tmp_path):
    for n in (1, 2):
        images.write(tmp_path / f"h/{n}.png", torch.rand(3, 12, 12))
        images.write(tmp_path / f"c/x{n}.png", torch.rand(3, 12, 12))
        (tmp_path / f"h/{n}.CR2").touch()
    for side, names in (("h", "12"), ("c", ["x1", "x2"])):
        (tmp_path / f"{side}.flist").write_text("".join(f"{side}/{name}.png\n" for name in names))
    done = run("--model", "dcp", "--hazy", "h.flist", "--clear", "c.flist", "--output", "out")
    assert "line by line" in done.err
    assert any("line by line" in remark for remark in row(tmp_path / "out")["remarks"])
    done = run("--model", "dcp", "--hazy", "h", "--output", "out2")
    assert (done.status, done.err.count("2 CR2")) == (0, 1)
    for n in (1, 2):
        images.write(tmp_path / f"c/{n}.png", torch.rand(3, 12, 12))
    run("--model", "dcp", "--hazy", "h", "--clear", "c", "--output", "out3")
    assert "2 CR2" in (tmp_path / "out3/results.md").read_text()


@pytest.mark.slow
def test_lists_models(run):
    assert run("--list-models").out.startswith(models.listing())


@pytest.fixture
def benchmarks(tmp_path):
    """A data root with SOTS-indoor as RESIDE ships it (border and all), HSTS and RTTS, a part of each."""
    rng = torch.Generator().manual_seed(0)
    for scene in (1400, 1401):
        clear = torch.rand(3, 44, 60, generator=rng)
        images.write(tmp_path / f"data/SOTS/indoor/gt/{scene}.png", clear)
        images.write(tmp_path / f"data/SOTS/indoor/hazy/{scene}_1.png", 0.6 * clear[:, 10:-10, 10:-10] + 0.35)
    clear = torch.rand(3, 20, 24, generator=rng)
    images.write(tmp_path / "data/HSTS/synthetic/original/0586.jpg", clear)
    images.write(tmp_path / "data/HSTS/synthetic/synthetic/0586.jpg", 0.6 * clear + 0.35)
    images.write(tmp_path / "data/RTTS/JPEGImages/a.png", clear)
    return ["--data-root", tmp_path / "data"]


def test_benchmarks_by_name_with_a_method_beside_and_two_protocols(run, benchmarks, experiment, tmp_path, monkeypatch):
    monkeypatch.setattr(extra_metrics, "installed", lambda name: False)
    argv = ["--model", "nedr", "dcp", "--checkpoints", experiment, "--output", "out", *benchmarks]
    done = run(*argv, "--benchmarks", "sots_indoor", "HSTS", "RTTS", "--protocols", "ours", "d4", "test.panels=false")
    assert done.status == 0
    assert "SOTS-indoor: 2 of 500" in done.out
    assert "left out: HSTS-real" in done.err
    found = results(tmp_path / "out")
    assert [(each["benchmark"], each["method"]) for each in found["rows"]] == [
        *((name, method) for name in ("SOTS-indoor", "HSTS-synthetic") for method in ("hazy input", "nedr", "dcp")),
        ("RTTS", "nedr"),
        ("RTTS", "dcp"),
    ]
    assert list(found["protocols"]) == ["ours", "d4"]
    assert row(tmp_path / "out", "dcp", "SOTS-indoor")["mean"].keys() == {
        "ours.psnr", "ours.ssim", "d4.psnr", "d4.ssim",
    }  # fmt: skip
    assert "out/pictures/RTTS/dcp/a.png" in {f"out/{name}" for name in pictures(tmp_path / "out")}
    assert "protocol `d4`" in (tmp_path / "out/results.md").read_text()


def test_without_a_no_reference_metric_the_package_is_recommended(run, benchmarks, monkeypatch):
    monkeypatch.setattr(extra_metrics, "installed", lambda name: False)
    done = run("--model", "dcp", "--benchmarks", "RTTS", *benchmarks)
    assert done.status == 0
    assert "pip install fade-python" in done.err
    assert "s/image" in done.out


def test_metrics_of_real_haze_are_used_where_they_are_installed(run, benchmarks, monkeypatch, tmp_path):
    def load(names, device):
        if "niqe" in names:
            raise UserError("niqe: its weights are not here")
        return {name: lambda dehazed, clear: float(dehazed.mean()) for name in names}

    monkeypatch.setattr(extra_metrics, "installed", lambda name: name in ("fade", "niqe"))
    monkeypatch.setattr(extra_metrics, "load", load)
    done = run("--model", "dcp", "--benchmarks", "RTTS", *benchmarks)
    assert "left out: niqe: its weights are not here" in done.err
    assert row(tmp_path / "results", "dcp", "RTTS")["mean"].keys() == {"fade"}
    assert row(tmp_path / "results", "hazy input", "RTTS")["mean"].keys() == {"fade"}


def test_ciede2000_beside_psnr_and_ssim(run, pairs, tmp_path):
    run("--model", "dcp", *pairs, "--metrics", "ciede2000", "test.pictures=false")
    means = row(tmp_path / "results")["mean"]
    assert means.keys() == {"ours.psnr", "ours.ssim", "ciede2000"}
    assert not (tmp_path / "results" / "pictures").exists()


def test_a_guessed_airlight_is_reported(run, pairs, benchmarks, official_file, experiment, seen, tmp_path):
    """Official files do not tell it; a benchmark does, and weights that have learned it need nothing."""
    said, argv = "nedr.airlight is not given", ["--weights", official_file, "test.panels=false"]
    done = run(*argv, *pairs, "--output", "a")
    assert done.err.count(said) == 1
    remedy = ["nedr.airlight=dark_channel", "nedr.guided_filter=true"]
    assert " ".join(remedy) in done.err
    assert said not in run(*argv, *pairs, *remedy, "--output", "b").err
    assert said not in run(*argv, "--benchmarks", "HSTS", *benchmarks, "--output", "c").err
    assert said not in run("--checkpoints", experiment, *pairs, "--output", "d").err


@pytest.mark.parametrize("airlight", ["max", "learned"])
def test_a_benchmark_brings_the_released_settings_except_to_a_learned_airlight(
    run, benchmarks, experiment, seen, tmp_path, airlight
):
    state = checkpoint.read(experiment / "last.pt")
    state["settings"]["nedr"]["airlight"] = airlight
    state["networks"] = {k: v for k, v in state["networks"].items() if airlight == "learned" or ".airlight." not in k}
    checkpoint.save(tmp_path / "other.pt", {k: v for k, v in state.items() if k not in ("format", "version")})
    argv = ["--weights", "other.pt", "--benchmarks", "SOTS-indoor", "HSTS", *benchmarks]

    def in_force(name):
        settings = row(tmp_path / "results", "nedr", name)["settings"]
        return settings["airlight"], settings["guided_filter"]

    run(*argv)
    learned = airlight == "learned"
    assert in_force("SOTS-indoor") == ((airlight, False) if learned else ("max", False))
    assert in_force("HSTS-synthetic") == ((airlight, False) if learned else ("dark_channel", True))
    assert (seen[-1].airlight, seen[-1].guided_filter) == in_force("HSTS-synthetic")
    run(*argv, "nedr.guided_filter=false")  # what is asked for goes before
    assert in_force("HSTS-synthetic")[1] is False


def test_fragments_of_a_killed_run_are_removed(run, pairs, tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    stray = [tmp_path / f"out/{part}.unfinished.a_png-0badc0de-{dead.pid}" for part in ("", "pictures/x/", "videos/")]
    for path in stray:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert run(*pairs, "--model", "dcp", "--output", "out").status == 0
    assert not any(path.exists() for path in stray)


def test_a_deterministic_run_names_an_operation_without_a_deterministic_form(run, pairs, monkeypatch):
    seen = []

    def predict(self, hazy, tile=None):
        seen.append(torch.are_deterministic_algorithms_enabled())
        if len(seen) == 2:
            raise RuntimeError("scatter does not have a deterministic implementation, but you set ...")
        return {"clear": hazy}

    monkeypatch.setattr(DCP, "predict", predict)
    try:
        done = run(*pairs, "--model", "dcp", "--output", "out", "deterministic=true", "data.workers=0")
    finally:
        torch.use_deterministic_algorithms(False)
    assert seen == [True, True]
    assert done.status == 2
    assert "error: deterministic=true: scatter has no deterministic form on cpu" in done.err
    assert "Traceback" not in done.err


def test_an_interrupted_run_continues_without_repetition(run, pairs, tmp_path, monkeypatch):
    written, write = [], images.write

    def interrupted(path, picture, **like):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path.name)
        write(path, picture, **like)

    argv = ["--model", "dcp", *pairs, "--output", "out", "data.workers=0", "test.panels=false"]
    run(*argv, "--output", "whole")
    monkeypatch.setattr(images, "write", interrupted)
    assert run(*argv).status == 130
    assert not (tmp_path / "out/results.json").exists()
    monkeypatch.setattr(images, "write", lambda path, *args, **like: (written.append(path.name), write(path, *args)))
    done = run(*argv)
    assert done.status == 0
    assert "continuing an interrupted run: 5 images are done" in done.err  # three are the hazy input's
    assert written == ["1_1.png", "1_2.png", "2_1.png"]
    assert row(tmp_path / "out")["resumed"] == 2
    assert row(tmp_path / "out")["mean"] == row(tmp_path / "whole")["mean"]
    assert [each["name"] for each in row(tmp_path / "out")["per_image"]] == ["1_1.png", "1_2.png", "2_1.png"]
    assert not (tmp_path / "out" / journal.NAME).exists()
    run(*argv)
    assert len(written) == 6  # a finished run is not continued


@pytest.mark.parametrize("truth", [False, True])
def test_dehazed_images_keep_profile_and_exif(run, tmp_path, truth):
    profile, exif = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), Image.Exif()
    exif[ExifTags.Base.Orientation], exif[ExifTags.Base.Make] = 6, "Maker"
    for folder in ("hazy", "clear"):
        paint(tmp_path / folder / "a.jpg", "RGB", (24, 36), {"icc_profile": profile, "exif": exif})
    argv = ["--clear", "clear", "test.panels=false"] if truth else []
    assert run("--model", "dcp", "--hazy", "hazy", "--output", "out", *argv).status == 0
    with Image.open(tmp_path / f"out/pictures/a.{'png' if truth else 'jpg'}") as dehazed:
        assert dehazed.size == (36, 24)
        assert dehazed.info["icc_profile"] == profile
        assert dict(dehazed.getexif()) == {ExifTags.Base.Make: "Maker"}


@pytest.mark.parametrize("change", ["settings", "files", "picture"])
def test_changed_settings_or_files_invalidate_an_interrupted_run(run, pairs, tmp_path, monkeypatch, change):
    argv = ["--model", "dcp", *pairs, "--output", "out", "data.workers=0", "test.panels=false"]
    with monkeypatch.context() as patch:
        patch.setattr(runner.Evaluation, "finish", lambda *_: sys.exit(1))
        run(*argv)
    if change == "settings":
        argv.append("dcp.guided_filter=false")
    elif change == "files":
        images.write(tmp_path / "clear/1.png", torch.rand(3, 24, 36))
    else:
        (tmp_path / "out/pictures/1_2.png").unlink()
    done = run(*argv)
    assert done.status == 0
    assert ("starting again" in done.err) == (change != "picture")
    assert row(tmp_path / "out")["resumed"] == (2 if change == "picture" else 0)
    assert pictures(tmp_path / "out/pictures") == {"1_1.png", "1_2.png", "2_1.png"}


def test_a_failed_panel_costs_no_figure_and_old_panels_are_deleted(run, pairs, tmp_path, monkeypatch):
    argv = ["--model", "dcp", *pairs, "--output", "out"]
    images.write(tmp_path / "out/panels/best_of_an_earlier_run.png", torch.rand(3, 8, 8))
    assert run(*argv).status == 0
    assert len(pictures(tmp_path / "out/panels")) == 3

    def exhausted(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(DCP, "estimate", exhausted)
    monkeypatch.setattr(DCP, "dehaze", lambda self, hazy, *_: hazy)
    done = run(*argv)
    assert done.status == 0
    assert "no panel: 1_1.png: 36x24 pixels are too many for the memory of cpu; set test.tile=128" in done.err
    for tile, remedy in {"0": "set test.tile=512", "400": "set test.tile=200", "128": "shrink it"}.items():
        assert f"of cpu; {remedy}\n" in run(*argv, f"test.tile={tile}").err
    assert row(tmp_path / "out")["images"] == 3


def test_a_panel_that_cannot_be_written_costs_no_figure(run, tmp_path):
    name = f"{'x' * 249}.png"  # with best_ before it too long for a file system
    for side in ("hazy", "clear"):
        images.write(tmp_path / side / "1.png", torch.rand(3, 24, 36))
        (tmp_path / side / "1.png").rename(tmp_path / side / name)
    done = run("--model", "dcp", "--hazy", "hazy", "--clear", "clear", "--output", "out")
    assert done.status == 0
    assert "no panel: " in done.err
    assert row(tmp_path / "out")["images"] == 1


def test_an_output_named_like_a_file_is_refused(run, pairs):
    done = run("--model", "dcp", "--hazy", "hazy", "--output", "out.jpg")
    assert done.status == 2
    assert "--output out.jpg: is the name of a file, and images go into a folder; name one" in done.err


def test_unreadable_images_alone_still_give_a_report(run, pairs, tmp_path):
    for path in (tmp_path / "clear").iterdir():
        path.write_bytes(b"no image")
    done = run("--model", "dcp", *pairs, "--output", "out")
    assert done.status == 2
    assert "3 images could not be used" in done.err
    assert (row(tmp_path / "out")["images"], len(row(tmp_path / "out")["skipped"])) == (0, 3)


def test_raw_weights_in_place_of_the_averaged_ones(run, pairs, experiment, tmp_path):
    state = checkpoint.read(experiment / "last.pt")
    averaged = {k: v * 1.1 if v.is_floating_point() else v for k, v in state["networks"].items() if "removal" in k}
    state["ema"] = {"weights": averaged, "steps": 1}
    checkpoint.save(tmp_path / "both.pt", {k: v for k, v in state.items() if k not in ("format", "version")})
    pairs = [*pairs, "test.panels=false"]
    raw, named = run("--weights", experiment / "last.pt", *pairs, "--output", "raw"), ["--weights", "both.pt", *pairs]
    assert raw.status == run(*named, "--output", "ema").status == 0
    assert run(*named, "--output", "chosen", "test.ema=false").status == 0
    means = [row(tmp_path / folder, "nedr")["mean"]["ours.psnr"] for folder in ("raw", "chosen", "ema")]
    assert means[0] == means[1] != means[2]


def test_the_shipped_weights_are_one_set(run, pairs):
    done = run(*pairs, "test.ema=false")
    assert done.status == 2
    assert "holds one set of weights; raw ones (test.ema=false) are in a last.pt" in done.err


def test_swapped_folders_are_warned_about(run, pairs, tmp_path):
    for path in (tmp_path / "hazy").iterdir():
        images.write(tmp_path / "same" / f"{path.stem.split('_')[0]}.png", images.read(path))
    done = run("--model", "dcp", "--hazy", tmp_path / "same", "--clear", tmp_path / "clear")
    assert "warning" not in done.err
    (tmp_path / "copy").mkdir()
    for path in (tmp_path / "same").iterdir():
        (tmp_path / "copy" / path.name).write_bytes(path.read_bytes())
    done = run("--model", "dcp", "--hazy", tmp_path / "same", "--clear", tmp_path / "copy")
    assert "2 of 2 hazy images equal their ground truth" in done.err
    done = run("--model", "dcp", "--hazy", tmp_path / "clear", "--clear", tmp_path / "same")
    assert "look clearer than their ground truth" in done.err
    assert "look clearer" in "".join(row(tmp_path / "results")["remarks"])


def test_tiles_and_self_ensemble_reach_the_method(run, photos, monkeypatch):
    seen = []
    monkeypatch.setattr(
        DCP, "dehaze", lambda self, hazy, tile, ensemble, strength: seen.append((tile, ensemble)) or hazy
    )
    argv = ["--model", "dcp", "--hazy", photos / "grey.png", "--overwrite"]
    for settings in ([], ["test.tile=128"], ["test.tile=0", "test.self_ensemble=true"]):
        run(*argv, *settings)
    assert seen == [(None, False), (128, False), (None, True)]  # nothing else: no figure, so no operations to count


def test_inexact_tiles_are_used_only_when_set_and_recorded(run, trained_aknet, tmp_path, monkeypatch):
    """AKNet's figures in tiles are others: they do not follow from the memory that happens to be free."""
    for side in ("hazy", "clear"):
        images.write(tmp_path / side / "a.png", torch.rand(3, 96, 200))
    argv = ["--weights", trained_aknet, "--hazy", "hazy", "--clear", "clear", "test.panels=false"]
    assert run(*argv, "--output", "whole").status == 0
    assert "tile" not in row(tmp_path / "whole", "aknet")["settings"]
    done = run(*argv, "--output", "tiles", "test.tile=128")
    assert row(tmp_path / "tiles", "aknet")["settings"]["tile"] == 128
    assert "aknet: in cross-faded tiles of 128, so not the figures of whole images" in done.out
    assert "cross-faded tiles of 128" in (tmp_path / "tiles" / "results.md").read_text()
    monkeypatch.setattr(memory, "free_memory", lambda device: 1e6)
    done = run(*argv, "--output", "scarce")
    assert done.status == 2
    assert "a.png: 200x96 pixels are too many for the memory of cpu; set test.tile=128" in done.err


def test_figures_on_images_that_weights_were_chosen_on_are_warned_about(run, pairs, experiment, tmp_path):
    """However they were written; and of others not."""
    state = checkpoint.read(experiment / "last.pt")
    chosen = selection.chosen_on(["mine"], 2, [selection.fingerprint(images.read(tmp_path / "clear" / "1.png"))])
    metadata = {"model": "nedr", "settings": state["settings"], "chosen_on": chosen}
    checkpoint.save_weights(tmp_path / "chosen.safetensors", state["networks"], metadata)
    images.write(tmp_path / "clear" / "1.png", images.read(tmp_path / "clear" / "1.png"), compress_level=1)
    argv = ["--weights", "chosen.safetensors", "test.panels=false"]
    done = run(*argv, *pairs)
    remark = "chosen on the ground truths of 2 of these 3 images (validation on mine)"
    assert f"warning: pictures: nedr: its weights were {remark}" in done.err
    assert remark in "".join(row(tmp_path / "results", "nedr")["remarks"])
    assert json.loads((tmp_path / "results" / "results.json").read_text())["methods"]["nedr"]["chosen_on"] == {
        "sets": ["mine"],
        "pictures": 2,
    }
    for name in ("1_1", "1_2"):
        (tmp_path / "hazy" / f"{name}.png").unlink()
    assert "were chosen on" not in run(*argv, *pairs, "--output", "others").err


def test_runs_are_compared(run, pairs, tmp_path):
    run("--model", "dcp", *pairs, "--output", "a")
    run("--model", "dcp", *pairs, "--output", "b", "dcp.guided_filter=false")
    done = run("--compare", "a", "b", "--output", "both")
    assert done.status == 0
    assert "difference" in done.out
    assert pictures(tmp_path / "both") == {"comparison.json", "comparison.md"}
    run("--model", "dcp", *pairs, "--output", "c", "--protocols", "d4")
    done = run("--compare", "a", "c")
    assert done.status == 2
    assert "protocol" in done.err


def test_lists_benchmarks(run):
    done = run("--list-benchmarks")
    assert done.status == 0
    for name in ("SOTS-indoor", "NH-HAZE2", "PhoneHazy"):
        assert name in done.out


def test_shipped_weights_are_used_where_none_are_named(run, tmp_path, experiment, monkeypatch):
    """And it is said; --model nedr, no model at all and models.load() mean the same file."""
    monkeypatch.setattr(models, "SHIPPED", tmp_path / "shipped")
    trained = models.load(experiment / "last.pt")
    saved = checkpoint.read(experiment / "last.pt")["settings"]
    file = tmp_path / "shipped" / "nedr" / "weights.safetensors"
    checkpoint.save_weights(file, trained.inference_state(), {"model": "nedr", "settings": saved})
    images.write(tmp_path / "photos" / "a.png", torch.rand(3, 70, 80))
    for number, named in enumerate([[], ["--model", "nedr"]]):
        done = run(*named, "--hazy", "photos", "--output", f"out{number}")
        assert done.status == 0
        assert "nedr: the weights shipped with this project" in done.err
        assert (tmp_path / f"out{number}" / "pictures" / "a.png").is_file()
    named = trained.inference_state()
    for ours in (models.load(), models.load("nedr")):
        assert all(torch.equal(value, named[key]) for key, value in ours.state_dict().items())
    with pytest.raises(UserError, match="no weights of d4 ship with this project"):
        models.load("d4")


MISTAKES = {  # name -> (arguments, what the one line must say)
    "missing folder": (["--model", "dcp", "--hazy", "nowhere"], "nowhere: no such file or folder"),
    "empty folder": (["--model", "dcp", "--hazy", "empty"], "empty: no images"),
    "no images named": (["--model", "dcp"], "or --hazy PATH"),
    "no weights named": (["--model", "aknet", "--hazy", "photos"], "no weights of aknet named, and none ship"),
    "folder without weights": (["--checkpoints", "empty", "--hazy", "photos"], "no weights.safetensors or last.pt"),
    "missing experiment": (["--checkpoints", "nowhere", "--hazy", "photos"], "nowhere: no such file or folder"),
    "file for an experiment": (["--checkpoints", "damaged/last.pt", "--hazy", "photos"], "--weights a file"),
    "missing weights": (["--weights", "nowhere.pt", "--hazy", "photos"], "no checkpoint nowhere.pt"),
    "damaged checkpoint": (["--checkpoints", "damaged", "--hazy", "photos"], "last.pt: it is damaged"),
    "unknown model": (["--model", "nadr", "--hazy", "photos"], "did you mean 'nedr'?"),
    "unknown protocol": (["--model", "dcp", "--hazy", "photos", "--protocols", "our"], "did you mean 'ours'?"),
    "unknown metric": (["--model", "dcp", "--hazy", "photos", "--metrics", "nique"], "did you mean 'niqe'?"),
    "unknown benchmark": (["--model", "dcp", "--benchmarks", "OHAZZE", "--data-root", "photos"], "did you mean"),
    "missing data root": (["--model", "dcp", "--benchmarks", "O-HAZE", "--data-root", "nowhere"], "nowhere: no such"),
    "missing benchmark": (["--model", "dcp", "--benchmarks", "O-HAZE", "--data-root", "photos"], "O-HAZE"),
    "two things to score": (["--model", "dcp", "--benchmarks", "O-HAZE", "--hazy", "photos"], "give one of them"),
    "a tile too small": (["--model", "dcp", "--hazy", "photos", "test.tile=12"], "tile"),
    "a tile that is a word": (["--model", "dcp", "--hazy", "photos", "test.tile=big"], "a whole number or auto"),
    "nothing to compare": (["--compare", "empty"], "results.json"),
    "unknown setting": (["--model", "dcp", "--hazy", "photos", "dcp.guided_filtre=false"], "'guided_filter'?"),
    "a word too many": (["--model", "dcp", "--hazy", "photos", "fast"], "key=value"),
    "a word before": (["fast", "--model", "dcp", "--hazy", "photos"], "key=value"),
    "a pattern": (["--model", "dcp", "--hazy", "photos/*.jpg"], "name the folder photos"),
    "another method": (["--model", "dcp", "--hazy", "photos", "d4.airlight=max"], "d4 is not in use here, dcp is"),
    "of weights": (["--checkpoints", "{experiment}", "--hazy", "photos", "d4.airlight=max"], "write nedr.airlight"),
    "data for training": (["--model", "dcp", "--hazy", "photos", "data.clear=clear"], "write test.clear"),
    "a training": (["--model", "dcp", "--hazy", "photos", "train.batch=4"], "does not use train.batch; remove it"),
    "no such device": (["--model", "dcp", "--hazy", "photos", "device=cuda:99"], "device=cuda:99"),
    "fp16 on the CPU": (["--model", "dcp", "--hazy", "photos", "device=cpu", "precision=fp16"], "needs a GPU"),
    "nothing to do": (["--model", "dcp", "--hazy", "photos", "test.pictures=false"], "leave nothing to do"),
    "pairs that do not pair": (["--model", "dcp", "--hazy", "photos", "--clear", "clear"], "no ground truth in clear"),
    "another model": (["--model", "other", "--checkpoints", "{experiment}", "--hazy", "photos"], "nedr model, not"),
    "trained setting": (["--checkpoints", "{experiment}", "--hazy", "photos", "nedr.drem=false"], "by training"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_status_2(name, run, tmp_path, experiment, monkeypatch):
    class Other(DCP):
        Settings = dataclass(type("OtherSettings", (), {}))
        stages = ("train",)

    monkeypatch.setitem(models.METHODS, "other", Other)
    argv, expected = MISTAKES[name]
    images.write(tmp_path / "photos" / "a.png", torch.rand(3, 8, 8))
    images.write(tmp_path / "clear" / "b.png", torch.rand(3, 8, 8))
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "last.pt").write_bytes(b"not a checkpoint")
    done = run(*[arg.format(experiment=experiment) for arg in argv])
    assert done.status == 2
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1
    assert expected in done.err
    assert not list(tmp_path.rglob("pictures"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU that is not there")
def test_an_absent_gpu_is_refused(run, pairs):
    done = run("--model", "dcp", *pairs, "device=cuda")
    assert done.status == 2
    assert "device=cpu" in done.err
