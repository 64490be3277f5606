import csv
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

import models
from utils import config
from utils.errors import UserError
from utils.evaluation import comparison, metrics, report, results, scoring, tables
from utils.evaluation.results import HAZY, Row
from utils.evaluation.scoring import Outcome, Score

METHODS = {"nedr": {"weights": "last.pt", "sha256": "ab", "settings": {}, "parameters": 12_345_678, "macs_256": 5e9}}
METHODS |= {"dcp": {"weights": None, "sha256": None, "settings": {}, "parameters": 0, "macs_256": 0}}


def figures(psnr, ssim):
    return {"ours.psnr": psnr, "ours.ssim": ssim, "d4.psnr": psnr + 1, "d4.ssim": ssim, "ciede2000": 30 - psnr}


def outcome(*scores, skipped=()):
    seconds = dict.fromkeys(scoring.STAGES, 0.5) | {"dehazing": 3.0, "wall": 4.0, "waiting": 1.0}
    return Outcome(list(scores), list(skipped), seconds)


@pytest.fixture
def rows():
    first = [
        Score("a/1.png", 6, 4, 0.1, figures(20.0, 0.8)),
        Score('ü, "2".png', 6, 4, 0.3, figures(math.inf, math.nan)),
    ]
    hazy = [Score(each.name, 6, 4, 0.0, figures(10.0, 0.5)) for each in first]
    set_remarks = ["2 of 45 hazy images"]
    return [
        Row("O-HAZE", HAZY, 45, outcome(*hazy), remarks=set_remarks),
        Row("O-HAZE", "nedr", 45, outcome(*first), {"airlight": "max", "guided_filter": True}, set_remarks, 2**30),
        Row("O-HAZE", "dcp", 45, outcome(hazy[0], skipped=["3.png: damaged"]), {}, set_remarks, 2**29),
        Row("RTTS", "nedr", 2, outcome(Score("x.png", 6, 4, 0.2, {}), Score("y.png", 6, 4, 0.2, {})), resumed=1),
    ]


@pytest.fixture
def settings():
    return config.load("nedr", models.settings_types(), overrides=["test.protocols=[ours, d4]"])


@pytest.fixture
def summary(rows, settings):
    return results.build(rows, settings, METHODS, "cpu")


def refuse(name):
    raise AssertionError(f"{name} is not JSON")


def test_results_are_valid_json_and_complete(tmp_path, rows, summary):
    report.write(tmp_path, rows, summary)
    read = json.loads((tmp_path / "results.json").read_text(), parse_constant=refuse)
    assert (read["format"], read["version"]) == (results.FORMAT, results.VERSION)
    assert list(read["protocols"]) == ["ours", "d4"]
    assert read["protocols"]["d4"] == metrics.protocol("d4").describe()
    assert read["metrics"]["ciede2000"]["better"] == "lower"
    assert read["methods"]["nedr"]["parameters"] == 12_345_678
    assert read["settings"]["precision"] == "float32"
    assert "torch" in read["versions"]
    hazy, nedr, dcp, real = read["rows"]
    assert nedr["mean"] == {"ours.psnr": 20, "ours.ssim": 0.8, "d4.psnr": 21, "d4.ssim": 0.8, "ciede2000": 10}
    assert nedr["left_out_of_mean"] == dict.fromkeys(nedr["mean"], 1)
    assert nedr["per_image"][1] | {"ours.psnr": "inf", "ours.ssim": "nan"} == nedr["per_image"][1]
    assert (nedr["images"], nedr["expected"], nedr["peak_memory_bytes"]) == (2, 45, 2**30)
    assert (nedr["images_per_second"], nedr["median_seconds"]) == (0.5, 0.2)
    assert nedr["settings"] == {"airlight": "max", "guided_filter": True}
    assert dcp["skipped"] == ["3.png: damaged"]
    assert hazy["remarks"] == ["2 of 45 hazy images"]
    assert (real["mean"], real["resumed"], real["images_per_second"]) == ({}, 1, 0.25)


def test_written_results_can_be_compared(tmp_path, rows, summary):
    report.write(tmp_path, rows, summary)
    assert "O-HAZE" in comparison.compare([tmp_path]).text()


def test_rows_read_back(tmp_path, rows, summary):
    report.write(tmp_path, rows, summary)
    with open(tmp_path / "per_image.csv", encoding="utf-8", newline="") as file:
        read = list(csv.DictReader(file))
    assert [(each["method"], each["name"]) for each in read] == [
        (row.method, score.name) for row in rows for score in row.outcome.scores
    ]
    assert [float(each["ours.psnr"]) for each in read if each["method"] == "nedr" and each["ours.psnr"]] == [
        20,
        math.inf,
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["per_image.csv", "results.json", "results.md"]


def test_an_unwritable_folder_is_named(tmp_path, rows, summary):
    (tmp_path / "results.json").mkdir()
    with pytest.raises(UserError, match=r"results\.json"):
        report.write(tmp_path, rows, summary)


def test_the_screen_shows_sets_methods_and_protocols(rows, summary):
    lines = tables.text(rows, summary).splitlines()
    assert lines[0] == "O-HAZE: 2 of 45 images"
    for method, start in {"hazy input": "10.00", "nedr": "20.00", "dcp": "10.00"}.items():
        line = next(line for line in lines if line.startswith(f"{method} "))
        assert line.split(method)[1].split()[0] == start
    text = "\n".join(lines)
    assert "nedr: left out of the mean ours.psnr: 1" in text
    assert "dcp: 1 image could not be used" in text
    assert "1 image is from an interrupted run" in text
    assert "dehazing waited 25%" in text
    assert "protocol ours: 8 bit by rounding" in text
    assert "protocol d4: " in text


def table_of(text, head):
    lines = text.splitlines()
    start = next(k for k, line in enumerate(lines) if line.startswith(f"| {head}"))
    block = lines[start:]
    block = block[: block.index("")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in block]


def test_markdown_has_a_table_for_each_protocol_and_metric(rows, summary):
    text = tables.markdown(rows, summary)
    assert table_of(text, "PSNR (dB) / SSIM, protocol `ours`") == [
        ["PSNR (dB) / SSIM, protocol `ours`", "O-HAZE (2 of 45)"],
        ["---", "---"],
        ["hazy input", "10.00 / 0.5000"],
        ["nedr", "20.00 / 0.8000"],
        ["dcp", "10.00 / 0.5000"],
    ]
    assert table_of(text, "PSNR (dB) / SSIM, protocol `d4`")[3] == ["nedr", "21.00 / 0.8000"]
    assert table_of(text, "CIEDE2000 (lower is better)")[3] == ["nedr", "10.00"]
    cost = table_of(text, "set")
    assert {len(line) for line in cost} == {8}
    assert cost[2] == ["O-HAZE (2 of 45)", "nedr", "airlight max, guided_filter on", *cost[2][3:]]
    assert cost[2][5:] == ["1,024 MiB", "12.35 M", "5.00 G"]
    assert [line[0] for line in cost[2:]] == ["O-HAZE (2 of 45)", "O-HAZE (1 of 45)", "RTTS (2)"]
    assert "- O-HAZE: 2 of 45 hazy images" in text
    assert "- protocol `ours`: 8 bit" in text
    assert f"torch {metrics.versions()['torch']}" in text


def test_image_names_keep_folders_and_never_collide():
    names = ["a.jpg", "b/a.png", "b/a.jpg", "b/c.d.tif"]
    assert list(report.image_names(names).values()) == ["a.png", "b/a.png.png", "b/a.jpg.png", "b/c.d.png"]
    assert list(report.image_names(["A.png", "a.jpg", "a.jpg.bmp"]).values()) == [
        "A.png.png",
        "a.jpg.png",
        "a.jpg.bmp.png",
    ]


names = st.from_regex(r"([ab]/)?[ab](\.(png|jpg))?\.(png|jpg)", fullmatch=True)


@given(st.sets(names, max_size=12))
def test_no_two_inputs_share_an_output(inputs):
    outputs = report.image_names(sorted(inputs))
    assert outputs.keys() == inputs
    assert len(set(outputs.values())) == len(inputs)
