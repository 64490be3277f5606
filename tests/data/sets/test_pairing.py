"""Which image belongs to which: every rule, and what must be refused."""

from pathlib import Path

import pytest

from data.sets.pairing import match_depth, pairs
from utils.errors import UserError


def touch(folder: Path, *names: str) -> list[Path]:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return [folder / name for name in names]


def touch_both(root: Path, hazy: str, clear: str) -> None:
    touch(root / "hazy", *hazy.split())
    touch(root / "clear", *clear.split())


def paired(root: Path) -> str:
    """The pairs of hazy and clear as a text: "1_1 1, 1_2 1"."""
    found, remarks = pairs(root / "hazy", root / "clear")
    assert remarks == []
    names = [(a.relative_to(root / "hazy"), b.relative_to(root / "clear")) for a, b in found]
    return ", ".join(f"{a.with_suffix('')} {b.with_suffix('')}" for a, b in names)


@pytest.mark.parametrize(
    ("hazy", "clear"),
    [
        ("1_1_0.90179.png", "1.png"),  # ITS
        ("0005_0.8_0.04.jpg", "0005.jpg"),  # OTS
        ("1400_1.png", "1400.png"),  # SOTS-indoor
        ("0001_0.8_0.2.jpg", "0001.png"),  # SOTS-outdoor
        ("0586.jpg", "0586.jpg"),  # HSTS
        ("01_indoor_hazy.jpg", "01_indoor_GT.jpg"),  # I-HAZE
        ("01_outdoor_hazy.JPG", "01_outdoor_GT.jpg"),  # O-HAZE
        ("01_hazy.png", "01_GT.png"),  # NH-HAZE, Dense-HAZE
        ("1_0.79_1.44.png", "1.png"),  # Haze4K
        ("0006R0_f01020_1_0.9.png", "0006R0_f01020.png"),  # python -m data.haze on a stem with _
    ],
)
def test_pairs_of_every_benchmark(tmp_path, hazy, clear):
    touch(tmp_path, f"hazy/{hazy}", f"clear/{clear}", "clear/14.png", "clear/010.png")
    assert pairs(tmp_path / "hazy", tmp_path / "clear") == (
        [(tmp_path / "hazy" / hazy, tmp_path / "clear" / clear)],
        [],
    )


def test_pair_refusals(tmp_path):
    touch(tmp_path, "hazy/1_1.png", "hazy/2_1.png", "clear/1.png")
    with pytest.raises(UserError, match=r"2_1\.png: no ground truth in .*clear \(1 of 2"):
        pairs(tmp_path / "hazy", tmp_path / "clear")
    touch(tmp_path, "clear/2.png", "clear/2.jpg")
    with pytest.raises(UserError, match=r"2_1\.png: has two ground truths, .*2\.(png|jpg) and .*2\.(png|jpg)"):
        pairs(tmp_path / "hazy", tmp_path / "clear")
    with pytest.raises(UserError, match="are the same file"):
        pairs(tmp_path / "hazy", tmp_path / "hazy")


def test_match_depth(tmp_path):
    clear, depth = touch(tmp_path, "c/1.jpg", "c/2.jpg"), touch(tmp_path, "d/2.png", "d/1.npy")
    assert match_depth(clear, depth) == [tmp_path / "d/1.npy", tmp_path / "d/2.png"]
    with pytest.raises(UserError, match=r"2\.jpg: no depth map"):
        match_depth(clear, depth[1:])


@pytest.mark.parametrize(
    "wanted",
    [
        "1_hazy 1_clear, 2_hazy 2_clear",
        "1_haze 1_gt, 2_haze 2_GT",
        "1_input 1_target, 2_input 2_target",
        "1_A 1_B, 2_A 2_B",
        "A_1 B_1, A_2 B_2",
        "01 01_GT, 02 02_GT",
        "01_hazy 01, 02_hazy 02",
        "hazy_1 clear_1, hazy_2 clear_2",
        "hazy01 gt01, hazy02 gt02",
        "01-hazy 01-clear, 02-hazy 02-clear",
        "1.hazy 1_ground-truth, 2.hazy 2_ground-truth",
        "1_foggy 1_haze-free, 2_foggy 2_haze-free",
        "a_hazy_1 a_clear_1, b_hazy_1 b_clear_1",
        "room_a_hazy room_a_clear, room_b_hazy room_b_clear",
        "1_lq 1_hq, 2_lq 2_hq",
        "1400_1 1400_GT, 1400_2 1400_GT",
        "street_1 street, street_night_1 street_night",
    ],
)
def test_pairs_by_common_naming_schemes(tmp_path, wanted):
    hazy, clear = zip(*(pair.split() for pair in wanted.split(", ")), strict=True)
    touch_both(tmp_path, " ".join(f"{name}.png" for name in hazy), " ".join(f"{name}.jpg" for name in clear))
    assert paired(tmp_path) == wanted


@pytest.mark.parametrize(
    ("hazy", "clear", "wanted"),
    [
        ("C1/0.JPG C2/0.JPG", "C1/0.jpg C2/0.jpg", "C1/0 C1/0, C2/0 C2/0"),
        ("C1/0_hazy.png C2/0_hazy.png", "C1/0_GT.png C2/0_GT.png", "C1/0_hazy C1/0_GT, C2/0_hazy C2/0_GT"),
        ("C1/0_1.png C2/0_1.png", "C1/0.png C2/0.png", "C1/0_1 C1/0, C2/0_1 C2/0"),
        ("C1/hazy/0.png C2/hazy/0.png", "C1/gt/0.png C2/gt/0.png", "C1/hazy/0 C1/gt/0, C2/hazy/0 C2/gt/0"),
        ("C1_hazy/0.png C2_hazy/0.png", "C1_gt/0.png C2_gt/0.png", "C1_hazy/0 C1_gt/0, C2_hazy/0 C2_gt/0"),
        ("part1/1_1.png part2/2_1.png", "1.png 2.png", "part1/1_1 1, part2/2_1 2"),
        ("light/1.png dense/1.png", "1.png", "dense/1 1, light/1 1"),
        ("1_1.png 2_1.png", "part1/1.png part2/2.png", "1_1 part1/1, 2_1 part2/2"),
        ("set/C1/0.png set/C2/0.png", "C1/0.png C2/0.png", "set/C1/0 C1/0, set/C2/0 C2/0"),
        ("rain/1.png snow/1.png", "rain/1.png snow/1.png", "rain/1 rain/1, snow/1 snow/1"),
    ],
)
def test_the_same_path_comes_before_the_name_alone(tmp_path, hazy, clear, wanted):
    touch_both(tmp_path, hazy, clear)
    assert paired(tmp_path) == wanted


@pytest.mark.parametrize(
    ("hazy", "clear", "message"),
    [
        ("f_001.png f_002.png f_003.png", "f.png f_001.png", r"f_002\.png: only a part .*f_001\.png too"),
        ("f_002.png f_003.png", "f.png f_001.png", r"f_002\.png: only a part .*f_001\.png too"),
        ("f_001_hazy.png f_002_hazy.png", "f_clear.png f_001_clear.png", r"f_002_hazy\.png: only a part"),
        ("f.png f_002.png f_003.png", "f.png g.png", r"f_002\.png: only a part of .*f\.png is named otherwise"),
        ("s_1_1.png s_2_1.png", "s_1.png s.png", r"s_1_1\.png: only a part .*s\.png too"),
        ("a_1_0.9.png a_1_1_0.8.png", "a.png a_1.png", r"a_1_0\.9\.png: only a part of .*a\.png too"),
        ("room_a.png room_b.png", "room_b.png hall.png", r"room_a\.png: only a part"),
        ("f_001.png f_002.png", "f_001.png g.png", r"f_002\.png: no ground truth in .* \(1 of 2 .* 01_hazy and 01_GT"),
        ("01_hazy.png", "01_gt.png 01_clear.png", "has two ground truths"),
        ("0.png", "C1/0.png C2/0.png", "has two ground truths, .*; keep one, or arrange both sides"),
        ("C1/0.png C2/0.png", "C1/0.png", r"C2/0\.png: no ground truth"),
        ("C1/0.png C2/0.png", "C1/0.png other/1.png", r"C2/0\.png: no ground truth"),
        ("C1/0.png C1/1.png", "C1/0.png C2/1.png", r"C1/1\.png: no ground truth"),
        ("foggy_day.png", "street.png", r"no ground truth"),  # in folders one of each may be anything
    ],
)
def test_ambiguous_pairs_are_refused(tmp_path, hazy, clear, message):
    touch_both(tmp_path, hazy, clear)
    with pytest.raises(UserError, match=message):
        pairs(tmp_path / "hazy", tmp_path / "clear")


def test_merged_sets_may_follow_several_rules(tmp_path):
    touch_both(
        tmp_path, "0586.jpg 1_1_0.9.png 1400_1.png 07_outdoor_hazy.png", "0586.jpg 1.png 1400.png 07_outdoor_GT.png"
    )
    assert paired(tmp_path) == "1_1_0.9 1, 07_outdoor_hazy 07_outdoor_GT, 0586 0586, 1400_1 1400"


def test_a_single_image_pairs_with_a_single_ground_truth(tmp_path):
    hazy, clear = touch(tmp_path, "my_foggy.png", "street.png")
    assert pairs(hazy, clear) == ([(hazy, clear)], [])
    with pytest.raises(UserError, match="are the same file"):
        pairs(hazy, hazy)


def listed(root: Path, name: str, names: str) -> Path:
    touch(root, *names.split())
    (root / name).write_text("\n".join(names.split()))
    return root / name


def test_lists_of_equal_length_pair_line_by_line(tmp_path):
    """By name where all names pair, else line by line; either way it is said where that is not the same."""
    h = listed(tmp_path, "h.flist", "h/x.png h/y.png h/z.png")
    c = listed(tmp_path, "c.flist", "c/p.png c/q.png c/p.png")
    found, remarks = pairs(h, c)
    assert [(a.name, b.name) for a, b in found] == [("x.png", "p.png"), ("y.png", "q.png"), ("z.png", "p.png")]
    assert remarks == [f"{c}: paired with {h} line by line, since the names do not pair"]
    with pytest.raises(UserError, match="no ground truth"):
        pairs(h, listed(tmp_path, "d.flist", "c/p.png c/q.png"))
    found, remarks = pairs(h, listed(tmp_path, "d.flist", "c/y.png c/x.png c/z.png"))
    assert [(a.name, b.name) for a, b in found] == [("x.png", "x.png"), ("y.png", "y.png"), ("z.png", "z.png")]
    assert "by name, not line by line" in remarks[0]
    with pytest.raises(
        UserError, match=r"by line .*h/x\.png belongs to .*c/y\.png .line 1 of both lists. but by name to .*c/x"
    ):
        pairs(h, listed(tmp_path, "d.flist", "c/y.png c/x.png c/w.png"))


def test_lists_of_repeating_names(tmp_path):
    h = listed(tmp_path, "h.flist", "foggy_set/C1/0.png foggy_set/C1/1.png")
    found, _ = pairs(h, listed(tmp_path, "c.flist", "truths/C2/0.png truths/C1/0.png truths/C1/1.png"))
    assert [truth.parent.name for _, truth in found] == ["C1", "C1"]
    with pytest.raises(UserError, match=r"C1/1\.png: no ground truth"):
        pairs(h, listed(tmp_path, "c.flist", "truths/C2/0.png truths/C1/0.png truths/C2/1.png"))
    h = listed(tmp_path, "h.flist", "h/1_1.png h/1_2.png h/2_1.png")
    assert pairs(h, listed(tmp_path, "c.flist", "c/1.png c/1.png c/2.png"))[1] == []  # a truth a line


def test_depth_in_sub_folders(tmp_path):
    clear = touch(tmp_path, "c/C1/0.jpg", "c/C2/0.jpg")
    depth = touch(tmp_path, "d/C1/0.png", "d/C2/0.npy")
    assert match_depth(clear, depth) == depth
    with pytest.raises(UserError, match=r"C2/0\.jpg: no depth map"):
        match_depth(clear, depth[:1])
    assert match_depth(touch(tmp_path, "e/1_rgb.png"), touch(tmp_path, "e/1_depth.png")) == [tmp_path / "e/1_depth.png"]
    assert match_depth(touch(tmp_path, "a/1.png", "b/1.png"), touch(tmp_path, "d/1.png")) == [tmp_path / "d/1.png"] * 2
