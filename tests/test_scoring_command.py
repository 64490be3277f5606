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
from PIL import Image

import models
from data import images
from models import DCP, NeDR
from utils import checkpoint, config, errors

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
    image.save(path, exif=exif) if options else image.save(path)


@pytest.fixture
def photos(tmp_path):
    """Pictures of all sorts, without ground truth."""
    for name, options in FORMATS.items():
        paint(tmp_path / "photos" / name, *options)
    return tmp_path / "photos"


@pytest.fixture
def pairs(tmp_path):
    """Three hazy pictures of two scenes, RESIDE's way: hazy/1_1.png, clear/1.png."""
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
    small = ["nedr.base_channels=8", "nedr.encoder_weights=none", "data.crop_size=128"]
    settings = config.load("nedr", models.settings_types(), overrides=small)
    torch.manual_seed(0)
    state = models.build(settings).state_dict()
    saved = {"model": "nedr", "settings": config.to_dict(settings), "networks": state, "ema": {}}
    checkpoint.save(folder / "last.pt", saved)
    return folder


@pytest.fixture
def seen(monkeypatch):
    """The settings under which NeDR dehazes; it gives the hazy picture back."""
    seen = []
    monkeypatch.setattr(NeDR, "restore", lambda self, hazy: seen.append(self.settings) or hazy)
    return seen


def results(folder):
    return json.loads((folder / "results.json").read_text())


def pictures(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_scores_as_a_process(pairs, tmp_path):
    argv = [sys.executable, ROOT / "test.py", "--model", "dcp", *pairs, "--output", "out", "dcp.guided_filter=false"]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    for text in ("hazy input", "dcp", "protocol ours", "3 pictures done"):
        assert text in done.stdout
    found = results(tmp_path / "out")
    assert found["settings"]["dcp"] == {"guided_filter": False}
    assert [row["name"] for row in found["per_image"]] == ["1_1.png", "1_2.png", "2_1.png"]
    assert found["mean"]["hazy_psnr"] == pytest.approx(np.mean([row["hazy_psnr"] for row in found["per_image"]]))
    with open(tmp_path / "out" / "per_image.csv", newline="") as file:
        assert [float(row["psnr"]) for row in csv.DictReader(file)] == [row["psnr"] for row in found["per_image"]]
    assert pictures(tmp_path / "out" / "pictures") == {"1_1.png", "1_2.png", "2_1.png"}


def test_a_mistake_as_a_process_is_one_line(tmp_path):
    argv = [sys.executable, ROOT / "test.py", "--model", "dcp", "--hazy", "nowhere"]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: nowhere: no such file or folder")
    assert done.stderr.count("\n") == 1


def test_dehazes_pictures_of_every_kind_and_size(run, photos, tmp_path):
    assert run("--model", "dcp", "--hazy", photos).status == 0
    out = tmp_path / "results" / "pictures"
    expected = {name: f"{Path(name).with_suffix('')}.png" for name in FORMATS}
    expected |= {f"deeper/twin.{kind}": f"deeper/twin.{kind}.png" for kind in ("png", "jpg")}
    assert pictures(tmp_path / "results") == {f"pictures/{name}" for name in expected.values()}
    for name, written in expected.items():
        with Image.open(out / written) as image:
            assert image.mode == "RGB"
            assert (image.height, image.width) == images.read(photos / name).shape[1:]


def test_one_picture_and_a_list(run, photos, tmp_path):
    assert run("--model", "dcp", "--hazy", photos / "turned.jpg", "--output", "one").status == 0
    assert pictures(tmp_path / "one") == {"pictures/turned.png"}
    (tmp_path / "some.flist").write_text("photos/grey.png\nphotos/deeper/twin.jpg\n")
    assert run("--model", "dcp", "--hazy", "some.flist", "--output", "two").status == 0
    assert pictures(tmp_path / "two") == {"pictures/grey.png", "pictures/deeper/twin.png"}


def test_a_network_takes_any_size(run, photos, experiment, tmp_path):
    (tmp_path / "some.flist").write_text("photos/one.bmp\nphotos/thin.png\nphotos/turned.jpg\n")
    done = run("--checkpoints", experiment, "--hazy", "some.flist", "--output", "out")
    assert (done.status, done.err) == (0, "")
    sizes = {path.name: Image.open(path).size for path in (tmp_path / "out" / "pictures").iterdir()}
    assert sizes == {"one.png": (1, 1), "thin.png": (1, 33), "turned.png": (20, 30)}


def test_a_checkpoint_is_scored_where_it_lies(run, pairs, experiment, seen):
    assert run("--model", "nedr", "--checkpoints", experiment, *pairs, "precision=bf16").status == 0
    found = results(experiment / "results")
    assert (found["model"], found["weights"], found["settings"]["precision"]) == ("nedr", "last.pt", "bf16")
    assert found["settings"]["nedr"]["base_channels"] == 8  # the checkpoint's, not the default
    assert found["mean"]["psnr"] == found["mean"]["hazy_psnr"]


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


def test_pictures_named_on_the_command_line_leave_the_configured_truth_out(run, pairs, photos, tmp_path):
    (tmp_path / "config.yml").write_text("test: {hazy: hazy, clear: clear}\n")
    assert "protocol" in run("--model", "dcp", "--checkpoints", tmp_path).out
    done = run("--model", "dcp", "--checkpoints", tmp_path, "--hazy", photos)
    assert done.status == 0
    assert "protocol" not in done.out


def test_better_weights_come_first(tmp_path):
    for name in reversed(command.WEIGHTS):
        (tmp_path / name).touch()
        assert command.find_weights(tmp_path).name == name


def test_a_damaged_picture_is_named_and_the_others_are_kept(run, pairs, tmp_path):
    whole = (tmp_path / "hazy" / "1_2.png").read_bytes()
    (tmp_path / "hazy" / "1_2.png").write_bytes(whole[: len(whole) // 2])
    done = run("--model", "dcp", *pairs, "--output", "out")
    assert done.status == 2
    first, last = done.err.splitlines()
    assert first.startswith("skipped: ")
    assert "1_2.png" in first
    assert last == "error: 1 of 3 pictures could not be used, as said above"
    assert results(tmp_path / "out")["images"] == 2
    assert len(results(tmp_path / "out")["skipped"]) == 1
    assert pictures(tmp_path / "out" / "pictures") == {"1_1.png", "2_1.png"}


def test_a_pair_of_different_sizes_is_skipped(run, pairs, tmp_path):
    images.write(tmp_path / "clear" / "2.png", torch.rand(3, 24, 37))
    done = run("--model", "dcp", *pairs, "--output", "out")
    assert done.status == 2
    assert "36x24 but its ground truth" in done.err


def test_results_never_become_inputs(run, photos):
    argv = ["--model", "dcp", "--hazy", photos, "--output", photos / "out"]
    assert run(*argv).status == 0
    done = run(*argv)
    assert done.status == 2
    assert "another --output" in done.err


def test_lists_models(run):
    assert run("--list-models").out.split() == models.names()


MISTAKES = {  # name -> (arguments, what the one line must say)
    "missing folder": (["--model", "dcp", "--hazy", "nowhere"], "nowhere: no such file or folder"),
    "empty folder": (["--model", "dcp", "--hazy", "empty"], "empty: no pictures"),
    "no pictures named": (["--model", "dcp"], "give --hazy PATH"),
    "no weights named": (["--model", "nedr", "--hazy", "photos"], "a --model without any (dcp)"),
    "folder without weights": (["--checkpoints", "empty", "--hazy", "photos"], "no weights.safetensors or last.pt"),
    "missing experiment": (["--checkpoints", "nowhere", "--hazy", "photos"], "nowhere: no such file or folder"),
    "file for an experiment": (["--checkpoints", "damaged/last.pt", "--hazy", "photos"], "--weights a file"),
    "missing weights": (["--weights", "nowhere.pt", "--hazy", "photos"], "no checkpoint nowhere.pt"),
    "damaged checkpoint": (["--checkpoints", "damaged", "--hazy", "photos"], "last.pt: it is damaged"),
    "unknown model": (["--model", "nadr", "--hazy", "photos"], "did you mean 'nedr'?"),
    "unknown setting": (["--model", "dcp", "--hazy", "photos", "dcp.guided_filtre=false"], "'guided_filter'?"),
    "a word too many": (["--model", "dcp", "--hazy", "photos", "fast"], "key=value"),
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
def test_a_gpu_that_is_not_there(run, pairs):
    done = run("--model", "dcp", *pairs, "device=cuda")
    assert done.status == 2
    assert "device=cpu" in done.err
