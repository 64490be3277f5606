"""The speed benchmark: its tables from made figures, its marks, its refusals, and one real measurement."""

import json

import pytest
import torch

from benchmarks import speed, speed_cases
from benchmarks.speed_cases import Case, Run, _backward
from utils.errors import UserError

MACHINE = {"float32": 1e12, "bf16": 4e12, "device": "cpu (made up)", "threads": 2, "torch": "2.9"}
REFERENCE = Case("forward", "reference", "float32", 128, 128)
OURS, LOW = REFERENCE._replace(of="ours"), REFERENCE._replace(of="ours", precision="bf16")
RESULTS = {
    REFERENCE: Run([0.4, 0.5, 0.6], 2**30, 2 * 10**11),
    OURS: Run([0.1, 0.2, 0.3], 2**29, 10**11),
    LOW: Run([0.1, 0.1, 0.1], 2**28, 10**11, 51.25),
}


@pytest.fixture
def measured(monkeypatch) -> list:
    """What the workers were asked for; they answer with `RESULTS`."""
    asked = []

    def worker(case, place, options):
        asked.append(case)
        return MACHINE if case is None else RESULTS[case]._asdict()

    monkeypatch.setattr(speed, "worker", worker)
    return asked


def test_the_table_gives_medians_ratios_and_shares_of_the_ceiling():
    lines = speed.markdown(RESULTS, MACHINE).splitlines()
    assert lines[2] == "| forward pass | 128x128 | reference | 0.5 (0.4-0.6) |  | 1,024 MiB | 0.4 | 40% |"
    assert lines[3] == "| forward pass | 128x128 | float32 | 0.2 (0.1-0.3) | 2.50x, memory 50% | 512 MiB | 0.5 | 50% |"
    assert lines[4] == "| forward pass | 128x128 | bf16 | 0.1 (0.1-0.1) | 5.00x, memory 25% | 256 MiB | 1 | 25% |"
    assert "- 50.0 GMACs at 128x128 (forward)." in lines
    assert "- bf16 against float32 output: 51.2 dB PSNR." in lines


def test_the_table_reports_images_per_second_loading_and_largest_batch():
    usual = OURS._replace(height=460, width=620)
    loading = Case("loading", "ours", "float32", 480, 640, 6)
    widest = Case("step", "ours", "bf16", 256, 256, 0)
    results = {usual: RESULTS[OURS], loading: Run([0.5], 0, 0, batch=6), widest: Run([2.0], 2**30, 10**12, batch=37)}
    table = speed.markdown(results, MACHINE)
    assert "- Images of 620x460 a second: 5 in float32." in table
    assert "- Loading gives 12 pairs of hazy and clear crops of 256x256 a second, of 640x480 once decoded" in table
    assert "| training step | 37 x 256x256 | bf16 | 2 (2-2) |  | 1,024 MiB | 0.5 | 12% |" in table
    assert "| loading" not in table


def test_the_plan_lists_sizes_batches_and_precisions():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    cases = speed.plan(cpu, speed.parse(["--sizes", "--steps", "128", "256", "--batches", "2", "6", "--compiled"]))
    steps = [case for case in cases if case.kind == "step"]
    assert {(case.width, case.batch) for case in steps} == {(128, 2), (256, 2), (256, 6)}
    assert {case.label for case in steps} == {
        "reference", "float32", "bf16", "float32, checkpointing", "bf16, checkpointing", "bf16, compiled"
    }  # fmt: skip
    assert [case.kind for case in cases[-5:]] == ["loading", "forward", "forward", "tiled", "tiled"]
    widest = [case.precision for case in speed.plan(gpu, speed.parse(["--steps", "128"])) if not case.batch]
    assert widest == ["float32", "bf16", "fp16"]
    with pytest.raises(UserError, match="at least one crop"):
        speed.parse(["--batches", "0"])


@pytest.mark.parametrize("most", [1, 5, 8])
def test_the_largest_batch_that_fits(monkeypatch, most):
    def fake(case, place):
        def act():
            if case.batch > most:
                raise RuntimeError("CUDA out of memory")

        return act, None

    monkeypatch.setattr(speed_cases, "_ours", fake)
    assert speed_cases._largest(OURS._replace(kind="step", batch=0), torch.device("cpu")) == most


@pytest.mark.slow
def test_loading_is_measured():
    options = speed.parse(["--repeats", "3"])
    run = Run(**speed.worker(Case("loading", "ours", "float32", 96, 128, 2), torch.device("cpu"), options))
    assert (len(run.seconds), run.batch) == (3, 2)
    assert 0 < run.median < 10


def test_files_are_updated_between_their_markers(measured, tmp_path, capsys):
    long, brief = tmp_path / "performance.md", tmp_path / "README.md"
    long.write_text("above\n<!-- speed -->\nold\n<!-- /speed -->\nbelow\n")
    brief.write_text("a\n<!-- speed in short -->\n<!-- /speed -->\nb\n")
    cases = ["--sizes", "128", "--steps", "--no-large", "--device", "cpu"]
    assert speed.main([*cases, "--output", str(tmp_path / "out"), "--into", str(long), str(brief)]) == 0
    assert measured == [None, REFERENCE, OURS, LOW, REFERENCE, OURS, LOW]
    twice = {case: run._replace(seconds=run.seconds * 2) for case, run in RESULTS.items()}
    table = speed.markdown(twice, MACHINE)
    assert long.read_text() == f"above\n<!-- speed -->\n{table}<!-- /speed -->\nbelow\n"
    assert "| forward pass, 128x128 | 0.5 s | 0.2 s (2.5x) | 0.1 s (5.0x) |" in brief.read_text()
    assert brief.read_text().endswith("<!-- /speed -->\nb\n")
    assert table in capsys.readouterr().out
    assert (tmp_path / "out" / "speed.md").read_text() == table
    assert len(json.loads((tmp_path / "out" / "speed.json").read_text())["cases"]) == 3

    measured.clear()
    assert speed.main(["--again", str(tmp_path / "out" / "speed.json"), "--into", str(long)]) == 0
    assert long.read_text() == f"above\n<!-- speed -->\n{table}<!-- /speed -->\nbelow\n"
    assert not measured
    with pytest.raises(UserError, match=r"not a speed\.json"):
        speed.main(["--again", str(long)])


def test_measurements_before_a_failed_case_are_kept(measured, monkeypatch, tmp_path):
    monkeypatch.delitem(RESULTS, LOW)
    with pytest.raises(KeyError):
        speed.main(["--sizes", "128", "--steps", "--no-large", "--device", "cpu", "--output", str(tmp_path)])
    kept = speed.load(tmp_path / "speed.json")[1]
    assert kept == {case: RESULTS[case] for case in (REFERENCE, OURS)}
    assert "| forward pass, 128x128 | 0.5 s | 0.2 s (2.5x) |  |" in speed.short(kept, MACHINE)


@pytest.mark.parametrize("side", ["100", "96"])
def test_sizes_that_the_reference_cannot_take_are_refused(side):
    with pytest.raises(UserError, match="multiples of 32, at least 128"):
        speed.main(["--sizes", side])


def test_a_file_without_markers_is_refused_before_measuring(measured, tmp_path):
    (tmp_path / "x.md").write_text("nothing")
    with pytest.raises(UserError, match="add them"):
        speed.main(["--into", str(tmp_path / "x.md")])
    assert not measured


@pytest.mark.slow
def test_a_failed_case_is_reported_in_one_line():
    options = speed.parse(["--repeats", "3"])
    with pytest.raises(UserError, match=r"^forward pass, 128x128, nonsense could not be measured: .*; leave that size"):
        speed.worker(OURS._replace(precision="nonsense"), torch.device("cpu"), options)


def test_one_real_measurement():
    options = speed.parse(["--repeats", "3", "--threads", "1"])
    run = Run(**speed.worker(LOW, torch.device("cpu"), options))
    assert len(run.seconds) == 3
    assert run.flops == pytest.approx(60e9 / 4, rel=0.01)  # 60 at 256x256
    assert run.psnr > 45


def test_flops_of_a_depthwise_gradient():
    mask = (True, True, False)
    assert _backward([1, 8, 4, 4], [1, 8, 6, 6], [8, 1, 3, 3], None, 1, 0, 1, False, 0, 8, mask) == 2 * 2 * 8 * 16 * 9
