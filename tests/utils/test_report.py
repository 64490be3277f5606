import csv
import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import models
from utils import config, report
from utils.errors import UserError
from utils.scoring import Score

SCORES = [
    Score("a/1.png", 20.0, 0.8, 10.0, 0.5, 0.1),
    Score('ü, "2".png', math.inf, math.nan, 12.0, math.nan, 0.3),
]


@pytest.fixture
def settings():
    return config.load("dcp", models.settings_types())


def write(folder, settings):
    report.write(folder, SCORES, settings, weights=Path("x/best.pt"), device="cpu", skipped=["3.png: damaged"])


def refuse(name):
    raise AssertionError(f"{name} is not JSON")


def test_results_are_valid_json_and_complete(tmp_path, settings):
    write(tmp_path, settings)
    results = json.loads((tmp_path / "results.json").read_text(), parse_constant=refuse)
    assert (results["model"], results["weights"], results["images"]) == ("dcp", "best.pt", 2)
    assert results["mean"] == {"psnr": 20.0, "ssim": 0.8, "hazy_psnr": 11.0, "hazy_ssim": 0.5}
    assert results["left_out_of_mean"] == {"psnr": 1, "ssim": 1, "hazy_ssim": 1}
    assert results["per_image"][1]["psnr"] == "inf"
    assert results["per_image"][1]["ssim"] == "nan"
    assert results["settings"]["dcp"] == {"guided_filter": True}
    assert results["skipped"] == ["3.png: damaged"]
    assert "rounding" in results["protocol"]["pixels"]
    assert "torch" in results["versions"]


def test_rows_read_back(tmp_path, settings):
    write(tmp_path, settings)
    with open(tmp_path / "per_image.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == [score.name for score in SCORES]
    assert [float(row["psnr"]) for row in rows] == [20.0, math.inf]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["per_image.csv", "results.json"]  # nothing half-written


def test_a_place_that_cannot_be_written_is_named(tmp_path, settings):
    (tmp_path / "results.json").mkdir()
    with pytest.raises(UserError, match=r"results\.json"):
        write(tmp_path, settings)


def test_the_table_shows_input_method_and_protocol():
    text = report.table("dcp", SCORES)
    assert "hazy input      11.00  0.5000" in text
    assert "dcp             20.00  0.8000" in text
    assert "pictures: 2" in text
    assert "left out of the mean psnr: 1" in text
    assert "protocol ours: RGB, 8 bit by rounding" in text


def test_picture_names_keep_folders_and_never_collide():
    names = ["a.jpg", "b/a.png", "b/a.jpg", "b/c.d.tif"]
    assert list(report.picture_names(names).values()) == ["a.png", "b/a.png.png", "b/a.jpg.png", "b/c.d.png"]
    assert list(report.picture_names(["A.png", "a.jpg", "a.jpg.bmp"]).values()) == [
        "A.png.png",
        "a.jpg.png",
        "a.jpg.bmp.png",
    ]


names = st.from_regex(r"([ab]/)?[ab](\.(png|jpg))?\.(png|jpg)", fullmatch=True)


@given(st.sets(names, max_size=12))
def test_no_two_inputs_share_an_output(inputs):
    outputs = report.picture_names(sorted(inputs))
    assert outputs.keys() == inputs
    assert len(set(outputs.values())) == len(inputs)
