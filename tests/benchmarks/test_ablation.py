"""The ablation: real trainings of two cases, and the rest of its course with trainings that are not."""

import contextlib
import io
import json
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

import models
import train
from benchmarks import ablation, ablation_table
from data import images, paths, sample
from data.sets import pairing
from utils import checkpoint
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "checkpoints" / "ablation_tiny" / "config.yml"


@pytest.fixture(scope="module")
def scored(tmp_path_factory) -> list[str]:
    """Settings that name two small pairs of the embedded sample set, and a small encoder."""
    folder = tmp_path_factory.mktemp("pairs")
    hazy = sorted(paths.find(sample.part("test/hazy")))
    for path, truth in pairing.pairs("sample:test/hazy", "sample:test/clear")[0]:
        if path in hazy[::3]:
            images.write(folder / "hazy" / path.name, images.read(path)[:, :128, :128])
            images.write(folder / "clear" / path.name, images.read(truth)[:, :128, :128])
    return [f"test.hazy={folder / 'hazy'}", f"test.clear={folder / 'clear'}", "nedr.encoder=test_efficientnet"]


@pytest.fixture(scope="module")
def done(scored, tmp_path_factory) -> SimpleNamespace:
    """D4 and NeDR trained and scored by the command: its folder, what it printed, the batches, the signals after."""
    folder, out, batches, before = tmp_path_factory.mktemp("run"), io.StringIO(), [], signal.getsignal(signal.SIGINT)
    shutil.copy(TINY, folder)
    adversarial = models.nedr.NeDR._adversarial

    def recorded(method, batch):
        batches.append(batch)
        return adversarial(method, batch)

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setattr(models.nedr.NeDR, "_adversarial", recorded)
        status = ablation.main(["--checkpoints", str(folder), *scored, "--cases", "nedr", "d4"])
    assert status == 0
    assert signal.getsignal(signal.SIGINT) is before
    return SimpleNamespace(folder=folder, printed=out.getvalue(), batches=batches, settings=scored)


def run_again(done, *arguments: str) -> int:
    return ablation.main(["--checkpoints", str(done.folder), *done.settings, "--cases", "d4", "nedr", *arguments])


def content(folder: Path) -> dict:
    return json.loads((folder / "ablation.json").read_text())


def test_the_table_holds_the_scored_means_of_every_case(done):
    found = content(done.folder)
    assert found["reference"] == "nedr"
    (table,) = found["tables"]
    hazy, d4, nedr = table["rows"]
    assert [row["case"] for row in table["rows"]] == ["hazy input", "d4", "nedr"]
    assert (d4["modules"], nedr["modules"]) == ([], ["kan_cid", "idrm", "drem"])
    for row in (d4, nedr):
        results = json.loads((done.folder / row["case"] / "results" / "results.json").read_text())
        own = results["rows"][1]
        assert row["psnr"]["mean"] == pytest.approx(own["mean"]["ours.psnr"])
        assert row["ssim"]["mean"] == pytest.approx(own["mean"]["ours.ssim"])
        assert row["psnr"]["difference"] in (None, pytest.approx(row["psnr"]["mean"] - nedr["psnr"]["mean"]))
        trained = models.load(done.folder / row["case"] / "weights.safetensors")
        assert row["parameters"] == sum(p.numel() for p in trained.removal.parameters())
        assert [m for m in ablation.MODULES if getattr(trained.settings, m)] == row["modules"]
    assert nedr["psnr"]["difference"] is None
    assert nedr["parameters"] > d4["parameters"]
    assert hazy["parameters"] is None
    assert found["settings"]["train.steps"] == 1
    assert "nedr.drem" not in found["settings"]


def test_the_printed_table_names_cases_modules_and_budget(done):
    lines = done.printed.splitlines()
    assert lines[0].startswith("pictures (2), protocol ours; differences and intervals: to nedr")
    assert lines[1].split()[:5] == ["case", "KAN-CID", "IDRM", "DREM", "params"]
    assert lines[3].split()[:4] == ["d4", "-", "-", "-"]
    assert lines[4].split()[:4] == ["nedr", "x", "x", "x"]
    assert max(map(len, lines[:-1])) <= 120  # the last one names files
    assert "every case: unpaired steps: 1 of 1 image; crops of 128 pixels (random); seed 10" in done.printed
    markdown = (done.folder / "ablation.md").read_text()
    assert "| d4 | - | - | - |" in markdown
    assert "protocol ours: " in markdown


def test_all_cases_see_the_same_data(done):
    one, other = done.batches
    assert all(torch.equal(one[name], other[name]) for name in ("hazy", "clear"))


def test_a_case_trained_alone_has_the_same_weights(done, tmp_path):
    """What was trained before it in the same process leaves no trace."""
    shutil.copy(done.folder / "d4" / "config.yml", tmp_path)
    assert train.main(["--checkpoints", str(tmp_path)]) == 0
    alone, within = (
        checkpoint.read_safetensors(folder / "weights.safetensors")[0] for folder in (tmp_path, done.folder / "d4")
    )
    assert all(torch.equal(value, within[key]) for key, value in alone.items())


def test_finished_cases_are_neither_trained_nor_scored_again(done, monkeypatch, capsys):
    monkeypatch.setattr(train.Updater, "step", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr(ablation.test, "main", lambda _: pytest.fail("scored again"))
    before = content(done.folder)
    assert run_again(done) == 0
    assert content(done.folder) == before
    assert capsys.readouterr().out == done.printed


def test_a_case_counts_as_scored_only_with_its_weights_and_settings(done, tmp_path):
    case = ablation.plan(done.folder, "d4", done.settings)
    assert ablation._scored(case)
    assert not ablation._scored(ablation.plan(done.folder, "d4", [*done.settings, "test.protocols=[ours,d4]"]))
    shutil.copytree(case.folder, tmp_path / "d4")
    copy = case._replace(folder=tmp_path / "d4")
    (copy.folder / "weights.safetensors").write_bytes(b"others")
    assert not ablation._scored(copy)
    shutil.rmtree(copy.folder / "results")
    assert not ablation._scored(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("train.steps=2", r"d4 was begun with train\.steps=1, not 2"),
        ("seed=11", r"begun with seed=10, not 11"),
        ("nedr.gan_weight=0", r"nedr\.gan_weight=0\.2, not 0\.0"),
    ],
)
def test_cases_with_other_settings_are_refused(done, change, message):
    with pytest.raises(UserError, match=message):
        run_again(done, change)


def test_device_workers_and_logging_may_change(done):
    ablation.check([ablation.plan(done.folder, "d4", [*done.settings, "data.workers=1", "log.every=7", "device=cpu"])])


# The course of it, with cases that are copies of the trained ones.


@pytest.fixture
def course(done, tmp_path, monkeypatch):
    """Run the command with trainings that copy: ``course(fates, *arguments)``, fate: a status, or what goes wrong."""
    shutil.copy(TINY, tmp_path / "config.yml")
    trained = []

    def run(fates: dict, *arguments: str) -> int:
        def fit(case):
            fate = fates.get(case.name, 0)
            if isinstance(fate, Exception):
                raise fate
            if fate == 0 and not case.folder.exists():
                trained.append(case.name)
                shutil.copytree(done.folder / "d4" / "results", case.folder / "results")
            return fate

        monkeypatch.setattr(ablation, "fit", fit)
        monkeypatch.setattr(ablation, "score", lambda case: None)
        monkeypatch.setattr(ablation, "check", lambda cases: None)
        return ablation.main(["--checkpoints", str(tmp_path), *arguments])

    return SimpleNamespace(run=run, folder=tmp_path, trained=trained)


def test_the_table_has_all_eight_cases(course, capsys):
    assert course.run({}) == 0
    rows = content(course.folder)["tables"][0]["rows"]
    assert [row["case"] for row in rows[1:]] == list(ablation.CASES)
    marks = [line.split()[1:4] for line in capsys.readouterr().out.splitlines()[3:11]]
    assert len({tuple(each) for each in marks}) == 8
    assert marks[0] == ["-", "-", "-"]
    assert marks[-1] == ["x", "x", "x"]


def test_a_failed_case_leaves_the_others_in_the_table(course, capsys):
    assert course.run({"idrm": UserError("the disk is full; free some space")}) == 2
    found = content(course.folder)
    assert found["missing"] == {"idrm": "the disk is full; free some space"}
    assert [row["case"] for row in found["tables"][0]["rows"][1:]] == [
        name for name in ablation.CASES if name != "idrm"
    ]
    assert "MISSING idrm: the disk is full" in capsys.readouterr().out
    assert course.run({}) == 0
    assert course.trained[-1] == "idrm"
    assert content(course.folder)["missing"] == {}


def test_an_interrupted_ablation_keeps_its_finished_cases(course):
    assert course.run({"drem": 143}) == 143
    assert course.trained == ["d4", "kan_cid", "idrm"]
    assert [row["case"] for row in content(course.folder)["tables"][0]["rows"][1:]] == ["d4", "kan_cid", "idrm"]
    assert course.run({}) == 0
    assert sorted(course.trained) == sorted(ablation.CASES)


def test_a_table_needs_two_finished_cases(course):
    with pytest.raises(UserError, match="too few cases were finished to compare them; nedr: no data"):
        course.run({"nedr": UserError("no data")}, "--cases", "d4", "nedr")
    assert not (course.folder / "ablation.json").exists()


def test_differences_are_those_of_the_means(done, tmp_path):
    """With figures made up: the difference of paired means, and an interval that holds it."""
    folders = {}
    for number, name in enumerate(("d4", "drem", "nedr")):
        folders[name] = tmp_path / name
        shutil.copytree(done.folder / "d4" / "results", folders[name] / "results")
        path = folders[name] / "results" / "results.json"
        data = json.loads(path.read_text())
        for k, picture in enumerate(data["rows"][1]["per_image"]):
            picture["ours.psnr"] = 20.0 + number * (1 + k)
        path.write_text(json.dumps(data))
    found = ablation_table.build(folders, ablation.CASES, content(done.folder)["settings"], {})
    _, d4, drem, nedr = found["tables"][0]["rows"]
    assert [row["psnr"]["mean"] for row in (d4, drem, nedr)] == [20, 21.5, 23]
    assert [row["psnr"]["difference"] for row in (d4, drem, nedr)] == [-3, -1.5, None]
    assert list(d4["psnr"]["interval"]) == [-4, -2]
    assert d4["ssim"]["interval"] is None  # the same figures


REFUSED = {
    "unknown case": (["--cases", "d4", "kancid"], r"unknown case 'kancid'; did you mean 'kan_cid'\?"),
    "one case": (["--cases", "nedr"], "at least two cases"),
    "a module": (["nedr.drem=true"], r"nedr\.drem is set for each case"),
    "weights": (["test.weights=[a.pth]"], r"test\.weights is set for each case"),
    "another method": (["d4.learning_rate=1e-3"], r"d4 is not in use here, nedr is; write nedr\.learning_rate"),
    "unknown setting": (["train.step=2"], "unknown setting 'train.step'"),
    "small crops": (["data.crop_size=64"], r"data\.crop_size=64: nedr needs .* at least 128"),
    "nothing to score": (["test.clear="], r"set test\.benchmarks, or test\.hazy and test\.clear"),
    "no such images": (["test.hazy=nowhere"], "nowhere"),
    "no such set": (["test.benchmarks=[SOTS-indoor]", "test.data_root=nowhere"], "nowhere"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_invalid_arguments_are_refused_before_training(tmp_path, monkeypatch, case):
    shutil.copy(TINY, tmp_path)
    monkeypatch.setattr(ablation.train, "main", lambda _: pytest.fail("trained"))
    arguments, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        ablation.main(["--checkpoints", str(tmp_path), *arguments])
    assert [path.name for path in tmp_path.iterdir()] == ["config.yml"]


def test_a_set_without_ground_truth_is_refused(tmp_path):
    shutil.copy(TINY, tmp_path)
    for name in ("a.png", "b.png"):
        images.write(tmp_path / "Fattal" / "hazy" / name, torch.rand(3, 16, 16))
    with pytest.raises(UserError, match="has ground truth"):
        ablation.main(["--checkpoints", str(tmp_path), "test.benchmarks=[Fattal]", f"test.data_root={tmp_path}"])


@pytest.mark.parametrize(("preset", "steps"), [("ablation", 2_000_000), ("ablation_tiny", 1)])
def test_presets(preset, steps):
    """Every case can train with them; the full one has the released budget."""
    folder = ROOT / "checkpoints" / preset
    plans = [ablation.plan(folder, name, []) for name in ablation.CASES]
    for case in plans:
        models.check_training(case.settings)
    switched = [tuple(getattr(case.settings.method, module) for module in ablation.MODULES) for case in plans]
    assert len(set(switched)) == 8
    assert plans[0].settings.train.steps == steps
    assert yaml.safe_load(yaml.safe_dump(plans[-1].given)) == plans[-1].given
