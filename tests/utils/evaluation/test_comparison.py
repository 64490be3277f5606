import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.errors import UserError
from utils.evaluation import comparison

PSNR = {"title": "PSNR", "unit": "dB", "better": "higher", "digits": 2}
COLOUR = {"title": "CIEDE2000", "unit": "", "better": "lower", "digits": 2}
OURS = {"name": "ours", "pixels": "RGB, 8 bit by rounding", "psnr": "range 255", "ssim": "Gaussian 11", "used by": "us"}
D4 = {"name": "d4", "pixels": "RGB, 8 bit by truncation", "psnr": "range 255", "ssim": "grey 51", "used by": "D4"}


def results(figures, *, protocols=(OURS,), metrics=None, versions=None, order=1):
    """A results.json: ``figures[benchmark][method]`` lists each picture's PSNR, or {metric: figure}."""
    rows = []
    for benchmark, methods in figures.items():
        for method, values in methods.items():
            each = [value if isinstance(value, dict) else {"ours.psnr": value} for value in values]
            shown = [{k: v if math.isfinite(v) else str(v) for k, v in one.items()} for one in each]
            pictures = [
                {"name": f"{n}.png", "width": 9, "height": 9, "seconds": 1, **one} for n, one in enumerate(shown)
            ]
            row = {"benchmark": benchmark, "method": method, "images": len(values), "expected": 500, "skipped": []}
            rows.append(row | {"mean": {}, "remarks": [], "per_image": pictures[::order]})
    methods = {row["method"]: {"weights": "last.pt", "sha256": "0123456789abcdef", "parameters": 1} for row in rows}
    return {
        "format": "nedr-dehaze results",
        "version": 1,
        "protocols": {each["name"]: each for each in protocols},
        "metrics": metrics or {"ours.psnr": PSNR},
        "versions": {"torch": "2.15.0", "pillow": "11.0"} | (versions or {}),
        "device": "cpu",
        "settings": {},
        "methods": {name: about for name, about in methods.items() if name != "hazy input"},
        "rows": rows,
    }


@pytest.fixture
def save(tmp_path):
    def save(name, figures, **options):
        path = tmp_path / name / "results" / "results.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(results(figures, **options)))
        return tmp_path / name

    return save


HAZY = [10.0, 11.0, 12.0, 13.0]
NEAR = {"set": {"hazy input": HAZY, "nedr": [20.0, 21.0, 22.0, 23.0]}}
FAR = {"set": {"hazy input": HAZY, "nedr": [21.0, 23.0, 25.0, 27.0]}}


def lines(table):
    return {figure.label: figure for figure in table.figures}


def test_means_differences_and_verdicts(save):
    found = comparison.compare([save("a", NEAR), save("b", FAR)])
    (table,) = found.tables
    assert [figure.label for figure in table.figures] == ["hazy input", "a", "b"]
    hazy, a, b = table.figures
    assert (hazy.mean, a.mean, b.mean) == (11.5, 21.5, 24.0)
    assert (a.difference, a.interval, a.verdict) == (None, None, "reference")
    assert (b.difference, b.verdict) == (2.5, "better")  # of 1, 2, 3 and 4
    assert 1 < b.interval[0] < 2.5 < b.interval[1] < 4
    assert (table.pictures, table.common, table.scored, table.expected) == (4, 4, 4, 500)
    assert found.methods == {"a": "nedr, last.pt (sha256 0123456789ab)", "b": "nedr, last.pt (sha256 0123456789ab)"}


def test_a_constant_shift_has_a_difference_and_no_interval(save):
    shifted = {"set": {"hazy input": HAZY, "nedr": [value + 0.1 for value in NEAR["set"]["nedr"]]}}
    found = comparison.compare([save("a", NEAR), save("b", shifted)])
    b = lines(found.tables[0])["b"]
    assert b.difference == pytest.approx(0.1)
    assert (b.interval, b.verdict) == (None, "")
    assert "21.60       +0.10" in found.text()
    one = comparison.compare([save("c", {"set": {"x": [1.0]}}), save("d", {"set": {"x": [3.0]}})])
    assert lines(one.tables[0])["d"].interval is None


def test_lower_can_be_better(save):
    metrics = {"ciede2000": COLOUR}
    runs = [{"set": {"x": [{"ciede2000": v + k * (1 + v)} for v in range(5)]}} for k in (0, 1)]
    found = comparison.compare([save(f"run{k}", run, metrics=metrics) for k, run in enumerate(runs)])
    assert lines(found.tables[0])["run1"].verdict == "worse"
    assert found.tables[0].metric.protocol == ""
    assert found.protocols == {}


def test_images_are_paired_by_name_whatever_their_order(save):
    straight = comparison.compare([save("x/a", NEAR), save("x/b", FAR)])
    mixed = comparison.compare([save("y/a", NEAR), save("y/b", FAR, order=-1)])
    assert straight.to_dict() == mixed.to_dict()


def test_only_images_common_to_all_count(save):
    more = {"set": {"hazy input": [*HAZY, 14.0], "nedr": [21.0, 23.0, 25.0, 27.0, 90.0]}}
    found = comparison.compare([save("a", NEAR), save("b", more)])
    assert lines(found.tables[0])["b"].mean == 24.0
    assert "set: 4 of 5 images are common to all methods (the whole set: 500)" in found.text()


def test_figures_that_are_not_finite_leave_their_image_out(save):
    odd = {"set": {"hazy input": HAZY, "nedr": [math.inf, 23.0, math.nan, 27.0]}}
    found = comparison.compare([save("a", NEAR), save("b", odd)])
    (table,) = found.tables
    assert (table.pictures, table.common) == (2, 4)
    assert [figure.mean for figure in table.figures] == [12.0, 22.0, 25.0]
    assert "images: 2 (2 left out: infinite or undefined)" in found.text()
    json.dumps(found.to_dict(), allow_nan=False)


def test_a_metric_finite_nowhere_is_left_out_with_a_remark(save):
    both = {"ours.psnr": PSNR, "ciede2000": COLOUR}
    pairs = [{"ours.psnr": math.inf, "ciede2000": 1.0}, {"ours.psnr": 3.0, "ciede2000": 2.0}]
    runs = [{"set": {"x": pairs[::order]}} for order in (1, -1)]
    found = comparison.compare([save(f"run{k}", run, metrics=both) for k, run in enumerate(runs)])
    assert [table.metric.key for table in found.tables] == ["ciede2000"]
    assert any("ours.psnr left out" in remark for remark in found.remarks)


def test_metrics_that_do_not_apply_to_a_set_are_ignored(save):
    both = {"ours.psnr": PSNR, "ciede2000": COLOUR}
    figures = {"set": {"x": [{"ours.psnr": 1.0, "ciede2000": 1.0}] * 20}, "real": {"x": [{"ciede2000": 1.0}] * 20}}
    found = comparison.compare([save(name, figures, metrics=both) for name in ("a", "b")])
    assert [(t.benchmark, t.metric.key) for t in found.tables] == [
        ("set", "ours.psnr"),
        ("set", "ciede2000"),
        ("real", "ciede2000"),
    ]
    assert found.remarks == []


def test_a_metric_not_measured_on_the_hazy_input_leaves_it_out(save):
    figures = {"set": {"hazy input": [{}, {}], "x": [1.0, 2.0], "y": [2.0, 4.0]}}
    (table,) = comparison.compare([save("a", figures)]).tables
    assert [(figure.label, figure.mean) for figure in table.figures] == [("x", 1.5), ("y", 3.0)]
    assert (table.pictures, table.figures[0].verdict) == (2, "reference")


def test_where_the_first_method_was_not_scored_the_next_is_the_reference(save):
    third = save("c", NEAR | {"further": NEAR["set"]})
    found = comparison.compare([save("a", NEAR), save("b", FAR | {"further": FAR["set"]}), third])
    verdicts = {table.benchmark: [figure.verdict for figure in table.figures] for table in found.tables}
    assert verdicts == {"set": ["", "reference", "better", ""], "further": ["worse", "reference", "worse"]}


def test_remarks_about_a_set_are_repeated(save):
    a, b = save("a", NEAR), save("b", FAR)
    data = results(NEAR)
    data["rows"][0]["remarks"] = ["its pairs are not aligned"]
    (a / "results" / "results.json").write_text(json.dumps(data))
    assert "set: its pairs are not aligned" in comparison.compare([a, b]).remarks


def test_one_run_with_two_methods(save):
    found = comparison.compare([save("a", {"set": {"hazy input": HAZY, "nedr": HAZY, "dcp": HAZY[::-1]}})])
    assert [figure.label for figure in found.tables[0].figures] == ["hazy input", "nedr", "dcp"]
    assert found.tables[0].figures[1].verdict == "reference"


def test_labels_are_short_and_unique(save):
    two = {"set": {"nedr": HAZY, "dcp": HAZY}}
    runs = [save("one/run", NEAR), save("two/run", two), save("l" * 100, NEAR), save("l" * 101, NEAR)]
    labels = list(comparison.compare(runs).methods)
    assert labels[:3] == ["one/run", "two/run:nedr", "two/run:dcp"]
    assert len(set(labels)) == 5
    assert max(map(len, labels)) <= 41


def test_a_run_is_an_experiment_a_folder_or_a_file(save, tmp_path, monkeypatch):
    folder = save("a", NEAR)
    monkeypatch.chdir(folder / "results")
    for run in (folder, folder / "results", folder / "results" / "results.json", ".", Path("results.json")):
        assert comparison.load(run).name == "a"


def test_the_interval_of_normal_differences_is_the_t_interval():
    differences = np.random.default_rng(1).normal(0.3, 2.0, (100, 500))
    low, high = comparison.bootstrap(differences).T
    half = 1.984 * differences.std(axis=0, ddof=1) / 10  # the 97.5 % point of t with 99 degrees of freedom
    means = differences.mean(axis=0)
    np.testing.assert_allclose(low, means - half, atol=0.1 * half.mean())
    np.testing.assert_allclose(high, means + half, atol=0.1 * half.mean())
    assert 0.92 < np.mean((low < 0.3) & (high > 0.3)) < 0.97


def test_the_interval_is_the_same_in_chunks_and_again():
    differences = np.random.default_rng(0).normal(size=(4322, 1))
    once, again = comparison.bootstrap(differences), comparison.bootstrap(differences)
    assert (once == again).all()
    np.testing.assert_allclose(once[0], differences.mean() + np.array([-1, 1]) * 1.96 / math.sqrt(4322), atol=2e-3)


@settings(deadline=None, max_examples=10)
@given(st.integers(2, 30), st.floats(-50, 50), st.floats(0.01, 50))
def test_intervals_move_and_stretch_with_their_differences(count, shift, scale):
    values = np.random.default_rng(count).normal(size=(count, 1))
    moved = comparison.bootstrap(values * scale + shift)
    np.testing.assert_allclose(moved, comparison.bootstrap(values) * scale + shift, atol=1e-9)


def test_hazy_inputs_that_differ_are_named_with_the_versions(save):
    other = {"set": {"hazy input": [10.0, 11.5, 12.0, 13.0], "nedr": FAR["set"]["nedr"]}}
    found = comparison.compare([save("a", NEAR), save("b", other, versions={"pillow": "12.1"})])
    remark = found.remarks[0]
    assert "on 1 of 4 images (ours.psnr of 1.png is 11 and 11.5)" in remark
    assert remark.endswith("pillow 11.0 and 12.1")
    close = {"set": {"hazy input": [value + 1e-7 for value in HAZY], "nedr": FAR["set"]["nedr"]}}
    assert len(comparison.compare([save("c", NEAR), save("d", close)]).remarks) == 1  # that 4 images are few


def test_protocols_of_one_run_only_are_left_out(save):
    metrics = {"ours.psnr": PSNR, "d4.psnr": PSNR}
    more = save("b", FAR, protocols=(OURS, D4), metrics=metrics)
    found = comparison.compare([save("a", NEAR), more])
    assert "left out, since not all runs have them: d4.psnr of b" in found.remarks
    assert list(found.protocols) == ["ours"]


def test_benchmarks_of_one_method_only_are_left_out(save):
    found = comparison.compare([save("a", NEAR | {"alone": NEAR["set"]}), save("b", FAR)])
    assert "left out, since only one method was scored on them: alone (a)" in found.remarks
    assert {table.benchmark for table in found.tables} == {"set"}


def test_runs_of_different_protocols_are_refused(save):
    a, b = save("a", NEAR), save("b", FAR, protocols=(D4,), metrics={"d4.psnr": PSNR})
    with pytest.raises(UserError, match=r"a has ours; b has d4; score both with --protocols ours"):
        comparison.compare([a, b])
    c = save("c", FAR, protocols=(OURS | {"pixels": "Y channel"},))
    with pytest.raises(UserError, match=r"protocol ours differs.*pixels is 'RGB.*' in a and 'Y channel' in c"):
        comparison.compare([a, c])
    assert comparison.compare([a, save("d", FAR, protocols=(OURS | {"used by": "others"},))]).tables
    with pytest.raises(UserError, match=r"metric ours\.psnr differs.*better is 'higher' in a and 'lower' in g"):
        comparison.compare([a, save("g", FAR, metrics={"ours.psnr": PSNR | {"better": "lower"}})])
    others = [save(name, NEAR, protocols=(), metrics={key: PSNR}) for name, key in (("e", "x"), ("f", "y"))]
    with pytest.raises(UserError, match="e has x; f has y"):
        comparison.compare(others)


def test_runs_with_nothing_in_common_are_refused(save):
    a = save("a", NEAR)
    with pytest.raises(UserError, match=r"nothing to compare: .*set \(a\), other \(b\)"):
        comparison.compare([a, save("b", {"other": NEAR["set"]})])
    with pytest.raises(UserError, match="no image is common"):
        comparison.compare([a, save("c", {"set": {"nedr": []}})])


def test_too_few_and_repeated_runs_are_refused(save):
    a = save("a", NEAR)
    with pytest.raises(UserError, match="at least two methods, here is nedr"):
        comparison.compare([a])
    with pytest.raises(UserError, match="here is none"):
        comparison.compare([])
    with pytest.raises(UserError, match=r"given twice \(.*\); name different runs"):
        comparison.compare([a, a / "results"])


def test_missing_and_unfinished_runs_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"no run .*nowhere"):
        comparison.load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="may not be finished"):
        comparison.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"format": "other"}, "not a results.json"),
        ({"format": None}, "not a results.json"),
        ({"version": 2}, "newer version"),
        ({"version": "x"}, "damaged"),
        ({"rows": None}, "damaged"),
        ({"rows": [{"benchmark": "set"}]}, "damaged"),
        ({"rows": [{"benchmark": "s", "method": "m", "per_image": [{"name": "1", "ours.psnr": "?"}]}]}, "damaged"),
        ({"rows": [{"benchmark": "s", "method": "m", "per_image": [{"name": "1"}, {"name": "1"}]}]}, "damaged"),
        ({"rows": [{"benchmark": "s", "method": "m", "per_image": []}] * 2}, "damaged"),
        ({"metrics": {"ours.psnr": PSNR | {"better": "up"}}}, "damaged"),
        ({"metrics": {"ours.psnr": {}}}, "damaged"),
        ({"protocols": {"ours": "words"}}, "damaged"),
        ({"methods": []}, "damaged"),
        ({"versions": "2.15"}, "damaged"),
    ],
)
def test_files_that_are_not_results_are_refused(tmp_path, change, complaint):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results(NEAR) | change))
    with pytest.raises(UserError, match=complaint) as caught:
        comparison.load(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b'"x"', b"\xff\xfe", b"[" * 100_000, json.dumps(results(NEAR)).encode()[:-9]]
)
def test_damaged_files_are_refused(tmp_path, content):
    (tmp_path / "results.json").write_bytes(content)
    with pytest.raises(UserError, match=r"results\.json is (damaged|not a results\.json)"):
        comparison.load(tmp_path)


def test_files_without_rights_are_refused(save, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    folder = save("a", NEAR)
    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(UserError, match="Permission denied; change the rights"):
        comparison.load(folder)


names = st.text(st.characters(blacklist_characters="/\0", blacklist_categories=("Cs",)), min_size=1, max_size=60)


@settings(deadline=None, max_examples=30)
@given(names, names, names, st.lists(st.floats(-1e12, 1e12), min_size=3, max_size=3))
def test_text_fits_a_terminal_and_markdown_is_well_formed(tmp_path_factory, benchmark, method, other, values):
    path = tmp_path_factory.mktemp("run") / "results.json"
    path.write_text(json.dumps(results({benchmark: {"hazy input": HAZY[:3], method: values, other + "2": HAZY[:3]}})))
    if "hazy input" in (method, other + "2") or method == other + "2":
        return
    found = comparison.compare([path])
    assert max(map(len, found.text().split("\n"))) <= 120
    _, empty, *rows, after = (found.markdown().split("\n\n- ")[0] + "\n").split("\n")
    assert (empty, after, len(rows)) == ("", "", 2 + 3)
    assert {row.replace("\\|", "").count("|") for row in rows} == {4}
    assert all(note.startswith("- ") for note in found.markdown().split("\n")[8:-1])


def test_the_text_reads_well(save):
    text = comparison.compare([save("train_a", NEAR), save("train_b", FAR)]).text()
    assert text.startswith("""\
set: 4 of 4 images are common to all methods (the whole set: 500)
    method       mean  difference   95 % interval
  PSNR (dB, protocol ours, higher is better), images: 4
    hazy input  11.50      -10.00               -
    train_a     21.50                              reference
    train_b     24.00       +2.50  [+1.50, +3.50]  better

""")
    assert "with 4 images, fewer than 20, intervals come out too narrow" in text
    assert "protocol ours: pixels: RGB, 8 bit by rounding; psnr: range 255; ssim: Gaussian 11; used by: us" in text
    assert "(seeds)" in text


def test_the_markdown_has_methods_down_and_metrics_across(save):
    metrics = {"ours.psnr": PSNR, "ciede2000": COLOUR}
    far = [{"ours.psnr": 2.0 * n, "ciede2000": n} for n in range(1, 5)]
    figures = {"set": {"hazy input": [{"ours.psnr": 0.0}] * 4, "x": far, "y": far}, "set 2": {"x": far, "y": far}}
    text = comparison.compare([save("a", figures, metrics=metrics)]).markdown()
    assert text.startswith("""\
set: 4 of 4 images are common to all methods (the whole set: 500)

| method | PSNR (dB, protocol ours, higher is better), images: 4 | difference | CIEDE2000 (lower is better), images: 4 | difference |
| --- | ---: | ---: | ---: | ---: |
| hazy input | 0.00 | -5.00 [-7.00, -3.00] worse |  |  |
| x | 5.00 | reference | 2.50 | reference |
| y | 5.00 | +0.00 - | 2.50 | +0.00 - |

set 2: """)  # noqa: E501


def test_what_is_written_reads_back(save, tmp_path):
    found = comparison.compare([save("a", NEAR), save("b", FAR)])
    comparison.write(found, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "comparison.json").read_text()) == json.loads(json.dumps(found.to_dict()))
    assert (tmp_path / "out" / "comparison.md").read_text() == found.markdown()
    assert len(list((tmp_path / "out").iterdir())) == 2
    (tmp_path / "wall").touch()
    with pytest.raises(UserError, match="cannot write"):
        comparison.write(found, tmp_path / "wall")
