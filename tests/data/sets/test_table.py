import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data.pictures import Folder, Paired
from data.sets import locate, table
from data.sets.locate import find
from data.sets.table import BENCHMARKS, GROUPS, GT, RULES, SCENE
from utils.errors import UserError

NAMES = {  # a hazy image and its ground truth, as the set names number n
    "HSTS-synthetic": "{n:04}.jpg {n:04}.jpg",
    "SOTS-outdoor": "{n:04}_0.8_0.2.jpg {n:04}.png",
    "I-HAZE": "{n:02}_indoor_hazy.jpg {n:02}_indoor_GT.jpg",
    "O-HAZE": "{n:02}_outdoor_hazy.jpg {n:02}_outdoor_GT.JPG",
    "NH-HAZE2": "{n:02}.png {n:02}.png",
    "Haze4K": "{n}_0.79_1.44.png {n}.png",
    "Haze4K:train": "{n}_0.61_1.8.png {n}.png",
    "ITS": "{n}_{k}_0.90179.png {n}.png",
    "OTS": "{n:04}_0.8_0.2.jpg {n:04}.jpg",
    "CSD:train": "{n}.tif {n}.tif",
    "SRRS": "{n}.jpg {n}.jpg",
    "DPDD": "1P0A{n:04}.png 1P0A{other:04}.png",
    "DPDD:train": "1P0A{n:04}.png 1P0A{other:04}.png",
} | dict.fromkeys(["NH-HAZE", "Dense-HAZE"], "{n:02}_hazy.png {n:02}_GT.png")
LAYOUTS = [(b.name, layout) for b in BENCHMARKS.values() for layout in b.all_layouts()]
ELSEWHERE = """
SOTS-indoor: RESIDE/SOTS/indoor/{hazy,clear}; RESIDE-IN/test/{hazy,GT}; SOTS_indoor/{input,target}
SOTS-outdoor: RESIDE/SOTS/outdoor/{hazy,clear}; RESIDE-OUT/test/{hazy,GT}; sots outdoor/{HAZY,Clean}
HSTS-synthetic: hsts_synthetic/{hazy,original}; HSTS/Synthetic/{synthetic,original}
HSTS-real: HSTS/real world; HSTS_real
I-HAZE: # I-HAZY NTIRE 2018/{hazy,GT}; i_haze/{hazy,ground truth}
O-HAZE: # O-HAZY NTIRE 2018/{hazy,GT}; O-HAZE/{input,gt}; OHAZE/{haze,clear}
NH-HAZE: NH_HAZE; NH HAZE/test/{hazy,gt}
Dense-HAZE: Dense_Haze_NTIRE19/{hazy,GT}; DenseHaze/{hazy,gt}
NH-HAZE2: NTIRE2021 Train_{Hazy,GT}; NH-HAZE-2/{hazy,gt}; nh_haze2/{hazy,non-hazy}
Haze4K: haze4k-test/{hazy,gt}; Haze-4K/test/{haze,gt}
RTTS: RTTS-sample/{hazy}; RESIDE/RTTS/JPEGImages
URHI: URHI/UnannotatedHazyImages
Fattal: FATTAL
PhoneHazy: Phone-Hazy/{hazy,gt}; phonehazy/test/{hazy,clear}
ITS: its/{hazy,clear}; RESIDE/ITS/{haze,clear}; ITS/train/ITS_{haze,clear}
ITS: RESIDE-IN/train/{hazy,GT}; its/train/{haze,gt}
OTS: OTS/{haze,clear}; OTS_ALPHA/{haze/OTS,clear/clear_images}; OTS_ALPHA/{haze,clear}
OTS: OTS/{,clear}; reside-out/train/{hazy,GT}
Haze4K:train: Haze4K/train/{haze,gt}; haze_4k-train/{hazy,clear}
CSD: CSD/Test/{Snow,Gt}; CSD/test/{input,target}; csd/test2000/{Snow,Gt}
CSD:train: CSD/Train/{Snow,Gt}; CSD/train/{input,target}; CSD/train2500/{Snow,Gt}
SRRS: SRRS/Test/{Syn,Gt}; SRRS/test/{Snow,Gt}
SRRS:train: SRRS/train/{Snow,Gt}; SRRS/{Syn,gt}
Snow100K-L: media/test/Snow100K-L/{synthetic,gt}
Snow100K:train: snow100k/train/{synthetic,gt}; Snow100K-training/all/{synthetic,gt}
DPDD: dd_dp_dataset_png/test_c/{source,target}; Restormer/test/DPDD/{inputC,target}; DPDD/test/{input,target}
DPDD:train: dd_dp_dataset_canon/train_c/{source,target}; train/DPDD/{inputC,target}; dpdd/train/{input,target}
SOTS-indoor: ITS/test/{hazy,clear}; SOTS/indoor/indoor/{hazy,gt}; RESIDE_SOTS/indoor/{hazy,gt}; SOTS/indoor/{IN,GT}
SOTS-indoor: RESIDE/test/indoor/{hazy,gt}; RESIDE/indoor/test/{hazy,GT}; SOTS/{hazy,gt}; SOTS-indoor/{testA,testB}
SOTS-indoor: SOTS/indoor/{hazy,gt_images}; RESIDE-SOTS-indoor/{LQ,GT}; test/dehaze/{input,target}; SOTS/indoor/{LQ,HQ}
SOTS-outdoor: OTS/test/{hazy,clear}; test/dehaze/{input,target}; SOTS/outdoor/outdoor/{hazy,gt}; SOTS/{IN,GT}
SOTS-outdoor: RESIDE/test/outdoor/{hazy,gt}; RESIDE_SOTS/outdoor/{hazy,clear}; SOTS/outdoor/{LQ,GT}
HSTS-synthetic: RESIDE_HSTS/synthetic/{synthetic,original}; RESIDE-HSTS/{hazy,gt}
HSTS-real: RESIDE_HSTS/real-world
I-HAZE: I-HAZY/{hazy,GT}; I-HAZE/test/{IN,GT}; I-HAZE/{LQ,GT}
O-HAZE: O-HAZY/{hazy,GT}; o-haze/O-HAZY/{hazy,GT}; O-HAZE/{testA,testB}; O-HAZE/{hazy,gt_images}
O-HAZE: O-HAZE/{hazy/test,gt/test}
NH-HAZE: NHHaze20; NHHaze20/{hazy,GT}; NH-HAZE/{LQ,GT}; NH-HAZE/test/{IN,GT}
NH-HAZE2: NHHaze21/{hazy,GT}; NH-HAZE-21
Dense-HAZE: DenseHaze19/{hazy,GT}
Haze4K: Haze4K/test/{IN,GT}; Haze4K/{testA,testB}
RTTS: RTTS/images; RESIDE_RTTS/JPEGImages
URHI: UnannotatedHazyImages; RESIDE/UnannotatedHazyImages; URHI/images
ITS: RESIDE/train/indoor/{hazy,gt}; RESIDE_ITS/{hazy,clear}; ITS/{trainA,trainB}
OTS: Train/Dehaze/{synthetic,original}; RESIDE/train/outdoor/{hazy,gt}
O-HAZE:train: O-HAZE/{trainA,trainB}
O-HAZE:train: O-HAZE/train/{hazy,gt}; o_haze-train/{hazy,gt}; # O-HAZY NTIRE 2018/{hazy,GT}; O-HAZE/{hazy,gt}
NH-HAZE:train: NH-HAZE; NH-HAZE/train/{hazy,gt}
"""
TOLD = [line.partition(": ") for line in ELSEWHERE.strip().splitlines()]
LAYOUTS += [(name, layout) for name, _, layouts in TOLD for layout in layouts.split("; ")]


def save(path: Path, size=(4, 3), **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path, **options)
    return path


def entry(name: str) -> table.Benchmark:
    """That of a set, or of the one that a split is of."""
    return BENCHMARKS.get(name) or BENCHMARKS[name.partition(":")[0]]


def number(name: str, n: int) -> int:
    """The n-th number of the split that papers score, or of the one that is named."""
    splits = entry(name).splits
    numbers = table.unroll(splits["train" if ":" in name else "test" if "test" in splits else "all"])
    return numbers[n] if numbers else n + 1


def fill(name: str, hazy: Path, truth: Path, numbers=(0, 1)) -> list[tuple[Path, Path | None]]:
    """Images of a set by its own names; several at a number where it has several."""
    b, pairs = entry(name), []
    for n in (number(name, n) for n in numbers):
        for k in range(1, b.each + 1):
            default = f"{n}_{k}.png {n}.png" if b.rule == SCENE else f"{n}.png {n}.png"
            own = NAMES.get(name, NAMES.get(b.name, default))
            names = own if hazy != truth or b.rule != GT else NAMES["NH-HAZE"]
            names = names.format(n=n, k=k, other=n + 5000).split()
            save(hazy / names[0])
            pairs.append((hazy / names[0], None if b.truth == "none" else save(truth / names[1])))
    return pairs


def write_layout(name: str, layout: str, root: Path) -> list[tuple[Path, Path | None]]:
    """A set laid out as a layout says."""
    layout = layout.replace("/*", "/pictures").replace("*", "-more").replace("{hazy}", "hazy")
    return fill(name, *(root / re.sub("{(.*),(.*)}", rf"\{side}", layout) for side in (1, 2)))


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_entry_is_complete(name):
    b = BENCHMARKS[name]
    assert b.name == name
    assert b.hazy > 0 or name == "SRRS:train"
    assert (b.truth == "none") == (b.metrics == "no-reference")
    assert b.rule in RULES
    assert b.paper.authors in str(b.paper)
    assert str(b.paper.year) in str(b.paper)
    assert b.paper.where.startswith(("https://", "search for"))
    assert (b.airlight, b.guided_filter, b.border) == (
        ("max", False, 10) if name == "SOTS-indoor" else ("dark_channel", True, 10 if name == "ITS" else 0)
    )
    if b.numbers:
        assert len(table.unroll(b.numbers)) * b.each == b.hazy
        assert all(set(table.unroll(part)) <= set(table.unroll(b.numbers)) for part in b.splits.values())
    else:
        assert {b.train, b.test} <= {"", "all"}


def test_held_out_images_are_excluded_from_training():
    splits = BENCHMARKS["ITS"].splits
    training, validation = (set(table.unroll(splits[name])) for name in ("train", "validation"))
    assert not training & validation
    assert training | validation == set(table.unroll(splits["all"]))
    assert not validation & set(table.unroll(BENCHMARKS["SOTS-indoor"].numbers))
    assert all(BENCHMARKS["ITS"].to_train_on(split) for split in splits)


def test_the_agreed_splits_and_groups():
    splits = {name: b.test for name, b in BENCHMARKS.items() if b.test}
    assert splits == {
        "I-HAZE": "31-35",
        "O-HAZE": "41-45",
        "NH-HAZE": "51-55",
        "Dense-HAZE": "51-55",
        "NH-HAZE2": "21-25",
    } | dict.fromkeys(["Haze4K", "CSD", "SRRS", "Snow100K-S", "Snow100K-M", "Snow100K-L", "DPDD"], "all")
    for b in BENCHMARKS.values():
        if b.test not in ("", "all"):  # the splits share nothing and leave nothing over
            both = sorted(table.unroll(b.train) + table.unroll(b.test))
            assert both == sorted(table.unroll(b.numbers))
    assert 26 not in table.unroll(BENCHMARKS["I-HAZE"].numbers)
    haze = [b.name for b in BENCHMARKS.values() if b.degradation == "haze" and not b.to_train_on()]
    assert list(GROUPS["all"]) == haze
    assert len(haze) >= 14
    assert not any(BENCHMARKS[name].to_train_on() for parts in GROUPS.values() for name in parts)
    assert all(part in BENCHMARKS for parts in GROUPS.values() for part in parts)


@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
def test_every_layout_is_recognised(tmp_path, name, layout):
    pairs = write_layout(name, layout, tmp_path / "some")
    (found,) = find([name], tmp_path)
    assert found.pairs == pairs
    assert found.folder == pairs[0][0].parent
    assert not any("also" in remark for remark in found.remarks)


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """All sets as shipped, side by side, among folders that are none of them."""
    root = tmp_path_factory.mktemp("everything")
    pairs = {name: write_layout(name, b.all_layouts()[0], root) for name, b in BENCHMARKS.items()}
    for folder in ("RESIDE-IN/train/GT", "train/O-HAZE/hazy", "ITS-sample/hazy", ".cache/RTTS"):
        save(root / folder / "9.png")
    for folder in ("O-HAZE-train/hazy", "RTTS-dehazed", "SOTS-indoor_results/hazy", "NH-HAZE23/hazy", "XO-HAZE/hazy"):
        save(root / folder / "9.png")
        save(root / folder / "../gt/9.png")
    return root, pairs


@pytest.mark.parametrize("name", BENCHMARKS)
def test_no_set_is_mistaken_for_another(everything, name):
    root, pairs = everything
    (found,) = find([name], root)
    assert found.pairs == pairs[name]
    assert not any("also" in remark for remark in found.remarks)


def test_all_in_the_order_of_the_table_and_groups(everything):
    root, pairs = everything
    assert [found.name for found in find(["all"], root)] == list(GROUPS["all"])
    assert [found.pairs for found in find(["all"], root)] == [pairs[name] for name in GROUPS["all"]]
    names = [found.name for found in find(["hsts", "O-HAZE", "Sots", "SOTS-indoor", "o_haze:Test", "ohaze"], root)]
    assert names == ["HSTS-synthetic", "HSTS-real", "O-HAZE", "SOTS-indoor", "SOTS-outdoor", "O-HAZE:test"]
    tests = [found.name for found in find(["all:test"], root)]
    assert tests == [f"{name}:test" for name in GROUPS["all"] if BENCHMARKS[name].test]


def test_the_data_root_may_be_the_set_itself(everything, tmp_path, monkeypatch):
    root, pairs = everything
    assert find(["SOTS-indoor"], root / "SOTS" / "indoor")[0].pairs == pairs["SOTS-indoor"]
    assert find(["SOTS-indoor"], root / "SOTS" / "indoor" / "hazy")[0].pairs == pairs["SOTS-indoor"]
    monkeypatch.chdir(root / "SOTS" / "indoor")
    assert find(["SOTS-indoor"], ".")[0].pairs == pairs["SOTS-indoor"]
    (tmp_path / "link").symlink_to(root / "RTTS")
    assert find(["RTTS"], tmp_path / "link")[0].pairs == pairs["RTTS"]


def test_links(tmp_path):
    write_layout("O-HAZE", "O-HAZE/{hazy,gt}", tmp_path / "disk")
    write_layout("RTTS", "photos", tmp_path / "disk")
    root = tmp_path / "root"
    root.mkdir()
    (root / "first").symlink_to(tmp_path / "disk" / "O-HAZE")  # known by where it leads
    (root / "RTTS").symlink_to(tmp_path / "disk" / "photos")  # known by its own name
    (root / "back").symlink_to(tmp_path)
    (root / "gone").symlink_to(tmp_path / "nowhere")
    found = find(["O-HAZE", "RTTS"], root)
    assert [len(f.pairs) for f in found] == [2, 2]
    assert found[0].folder == tmp_path / "disk" / "O-HAZE" / "hazy"
    assert found[1].folder == root / "RTTS"
    assert not any("also" in remark for f in found for remark in f.remarks)


def test_the_first_folder_is_used_and_the_others_are_reported(tmp_path):
    write_layout("SOTS-indoor", "a/SOTS-indoor/{hazy,gt}", tmp_path)
    write_layout("SOTS-indoor", "deep/down/SOTS/indoor/{hazy,gt}", tmp_path)
    pairs = write_layout("SOTS-indoor", "z/SOTS/indoor/{hazy,gt}", tmp_path)
    save(tmp_path / "z/SOTS/indoor/clear/1400.png")
    (found,) = find(["SOTS-indoor"], tmp_path)
    assert found.pairs == pairs
    others = [remark for remark in found.remarks if "not used" in remark]
    assert others == [
        f"{tmp_path / path} exists too and is not used"
        for path in ("z/SOTS/indoor/clear", "deep/down/SOTS/indoor/hazy", "a/SOTS-indoor/hazy")
    ]


def test_huge_folders_are_not_listed_to_their_end(tmp_path, monkeypatch):
    save(tmp_path / "ots" / "1.png")
    for n in range(2, 50):
        (tmp_path / "ots" / f"{n}.png").touch()
    write_layout("RTTS", "RTTS", tmp_path)
    seen = []
    is_picture = locate._is_image
    monkeypatch.setattr(locate, "_is_image", lambda name: seen.append(name) or is_picture(name))
    monkeypatch.setattr(locate, "MANY", 5)
    assert len(find(["RTTS"], tmp_path)[0].pairs) == 2
    assert len(seen) < 12


def test_images_in_sub_folders_are_not_of_the_set(tmp_path):
    pairs = write_layout("O-HAZE", "O-HAZE/{hazy,gt}", tmp_path)
    save(pairs[0][0].parent / "old" / "01_outdoor_hazy.jpg")
    assert find(["O-HAZE"], tmp_path)[0].pairs == pairs


def test_natural_order(tmp_path):
    for n in (10, 9, 100, 1):
        fill("Haze4K", tmp_path / "Haze4K/test/haze", tmp_path / "Haze4K/test/gt", [n - 1])
    assert [h.name.split("_")[0] for h, _ in find(["haze4k"], tmp_path)[0].pairs] == ["1", "9", "10", "100"]


def test_the_same_stem_takes_precedence_over_the_rule(tmp_path):
    for name in ("hazy/1400_1.png", "hazy/1400_2.png", "GT/1400_1.png", "GT/1400_2.png", "GT/1400.png"):
        save(tmp_path / "RESIDE-IN/test" / name)
    pairs = find(["SOTS-indoor"], tmp_path)[0].pairs
    assert [truth.name for _, truth in pairs] == ["1400_1.png", "1400_2.png"]


def test_a_rule_is_not_that_of_another_set(tmp_path):
    save(tmp_path / "HSTS-synthetic/hazy/1_2.png")
    save(tmp_path / "HSTS-synthetic/gt/1.png")
    with pytest.raises(
        UserError, match=r"1_2\.png: no ground truth 1_2\.\* in .*gt; .*HSTS-synthetic is paired as 0586"
    ):
        find(["HSTS-synthetic"], tmp_path)


def test_splits(tmp_path):
    b = BENCHMARKS["O-HAZE"]
    folders = tmp_path / "O-HAZE/hazy", tmp_path / "O-HAZE/gt"
    for n in (1, 40, 41, 45):
        save(folders[0] / f"{n:02}_outdoor_hazy.jpg")
        save(folders[1] / f"{n:02}_outdoor_GT.jpg")
    whole, test = find(["O-HAZE", "O-HAZE:test"], tmp_path)
    assert (whole.name, whole.split, whole.expected, len(whole.pairs)) == ("O-HAZE", "all", 45, 4)
    assert (test.name, test.split, test.expected, len(test.pairs)) == ("O-HAZE:test", "test", 5, 2)
    assert test.benchmark is b
    assert whole.remarks == ["4 of 45 hazy images; missing: 02-39 42-44"]
    assert test.remarks == ["2 of 5 hazy images; missing: 42-44"]
    for path in [*folders[0].glob("4[15]*")]:
        path.unlink()
    with pytest.raises(UserError, match=r"hazy: none of O-HAZE:test \(41-45\)"):
        find(["O-HAZE:test"], tmp_path)


def test_complete_sets_have_no_remark(tmp_path):
    fill("I-HAZE", tmp_path / "I-HAZE/hazy", tmp_path / "I-HAZE/gt", range(5))
    (found,) = find(["I-HAZE:test"], tmp_path)
    assert found.remarks == []
    assert len(found.pairs) == found.expected == 5


def test_surplus_images_are_reported(tmp_path):
    hazy, gt = tmp_path / "I-HAZE/hazy", tmp_path / "I-HAZE/gt"
    for n in range(1, 36):
        save(hazy / f"{n:02}_indoor_hazy.jpg")
        save(gt / f"{n:02}_indoor_GT.jpg")
    remarks = find(["I-HAZE"], tmp_path)[0].remarks
    assert remarks[0].startswith("35 of 30 hazy images; not of this set: 26_indoor_hazy.jpg, ")
    assert remarks[0].endswith("28_indoor_hazy.jpg ...")
    assert "more hazy images than the set has" in remarks[1]


def test_incomplete_scenes_are_reported(tmp_path):
    hazy, gt = tmp_path / "SOTS/indoor/hazy", tmp_path / "SOTS/indoor/gt"
    fill("SOTS-indoor", hazy, gt, range(50))
    (found,) = find(["SOTS-indoor"], tmp_path)
    assert (len(found.pairs), found.remarks) == (500, [])
    for name in ("1403_2", "1404_10", *(f"1449_{k}" for k in range(1, 11))):
        (hazy / f"{name}.png").unlink()
    (found,) = find(["SOTS-indoor"], tmp_path)
    assert found.remarks == ["488 of 500 hazy images; missing: 1449; fewer than 10 each: 1403-1404"]


def test_a_wrong_number_of_ground_truths_is_reported(tmp_path):
    fill("HSTS-synthetic", tmp_path / "HSTS-synthetic/hazy", tmp_path / "HSTS-synthetic/gt", range(10))
    assert find(["HSTS-synthetic"], tmp_path)[0].remarks == []
    fill("SOTS-outdoor", tmp_path / "SOTS/outdoor/hazy", tmp_path / "SOTS/outdoor/gt", [0])
    for k in range(499):
        (tmp_path / f"SOTS/outdoor/hazy/0001_0.8_{k}.jpg").touch()
    assert find(["SOTS-outdoor"], tmp_path)[0].remarks == ["1 ground truths where the set has 492"]


def test_a_set_in_two_splits_is_whole(tmp_path):
    """O-HAZE as train/ and test/ with all 45 there; the test split may be numbered anew."""
    for numbers, folder in ((range(1, 41), "train"), (range(41, 46), "test")):
        for n in numbers:
            save(tmp_path / f"O-HAZE/{folder}/hazy/{n:02}_outdoor_hazy.jpg")
            save(tmp_path / f"O-HAZE/{folder}/gt/{n:02}_outdoor_GT.jpg")
    (found,) = find(["O-HAZE"], tmp_path)
    assert (len(found.pairs), found.remarks) == (45, [])
    assert len(set(found.items().names)) == 45
    assert [len(f.pairs) for f in find(["O-HAZE:train", "O-HAZE:test"], tmp_path)] == [40, 5]
    for side, ending in (("hazy", "hazy"), ("gt", "GT")):
        for n in range(41, 46):
            path = tmp_path / f"O-HAZE/test/{side}/{n}_outdoor_{ending}.jpg"
            path.rename(path.with_name(f"{n - 40:02}_outdoor_{ending}.jpg"))
    for name, number in (("O-HAZE", 45), ("O-HAZE:test", 5)):
        (found,) = find([name], tmp_path)
        assert len(found.pairs) == number
        (remark,) = found.remarks
        assert remark.startswith(f"{number} of {number} hazy images; those in ")
        assert "numbered 1-5: assumed to be 41-45" in remark
    (tmp_path / "O-HAZE/train/hazy/07_outdoor_hazy.jpg").unlink()
    assert len(find(["O-HAZE"], tmp_path)[0].pairs) == 5


def test_a_layout_of_two_sets_is_decided_by_numbers(tmp_path):
    write_layout("SOTS-outdoor", "SOTS/{hazy,gt}", tmp_path)
    with pytest.raises(UserError, match="SOTS-indoor: not under"):
        find(["SOTS-indoor"], tmp_path)
    save(tmp_path / "SOTS/hazy/1400_1.png")
    with pytest.raises(UserError, match="SOTS-outdoor: not under"):
        find(["SOTS-outdoor"], tmp_path)


def test_file_types_that_are_not_read_are_reported(tmp_path):
    write_layout("RTTS", "RTTS", tmp_path)
    (tmp_path / "RTTS/7.CR2").touch()
    assert "passed over 1 CR2" in find(["RTTS"], tmp_path)[0].remarks[-1]


@given(st.sets(st.integers(1, 60)))
def test_runs_of_numbers(numbers):
    text = locate._ranges(sorted(numbers), "01-60")
    if "..." not in text:
        assert table.unroll(text) == tuple(sorted(numbers))
    else:
        assert text.endswith(f" ... ({len(numbers)} in all)")
        assert set(table.unroll(text.partition(" ...")[0])) < numbers


@given(st.sampled_from(sorted(BENCHMARKS)), st.randoms(use_true_random=False))
def test_names_in_any_spelling(name, random):
    spelt = "".join(random.choice([c.upper(), c.lower()]) if c != "-" else random.choice(["-", "_", " "]) for c in name)
    assert locate._requested([spelt]) == {(name, "all"): ""}


def test_groups_leave_out_what_is_absent(tmp_path):
    write_layout("RTTS", "RTTS", tmp_path)
    write_layout("SOTS-outdoor", "SOTS/outdoor/{hazy,gt}", tmp_path)
    rtts, outdoor = find(["RTTS", "SOTS"], tmp_path)
    assert f"of SOTS, not under {tmp_path} and left out: SOTS-indoor" in outdoor.remarks
    assert not any("left out" in remark for remark in rtts.remarks)
    assert "left out" in " ".join(find(["all"], tmp_path)[0].remarks)
    with pytest.raises(UserError, match="SOTS-indoor: not under"):
        find(["SOTS", "SOTS-indoor"], tmp_path)
    with pytest.raises(UserError, match="HSTS-synthetic, HSTS-real: not under"):
        find(["HSTS", "all"], tmp_path)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["ohase"], r"'ohase': no such set; did you mean 'o-haze'\?"),
        ([""], r"'': no such set; known: all, "),
        (["O-HAZE:tests"], r"'O-HAZE:tests': no such split; did you mean 'test'\?"),
        (["SOTS:test"], r"'SOTS:test': no such split; known: all"),
        (["RTTS"], r"RTTS: not under .*looked for RTTS/JPEGImages, RTTS/hazy, RTTS and .* https://sites\.google"),
        (["NH-HAZE2"], r"NH-HAZE2: not under .*NTIRE2021_Train_\{Hazy,GT\}.* search for \"NTIRE 2021 NonHom"),
        (["RTTS", "URHI"], r"^RTTS, URHI: not under .* own folder as data root \(--data-root, .* \(--hazy and --clear"),
        (["all"], r"SOTS-indoor, .*, PhoneHazy.*: not under .*; --list-benchmarks has .*--data-root"),
    ],
)
def test_refusals_of_names(tmp_path, names, message):
    (tmp_path / "RTTS").mkdir()  # empty
    with pytest.raises(UserError, match=message) as refusal:
        find(names, tmp_path)
    assert "\n" not in str(refusal.value)


def test_refusals_of_the_root(tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        find(["RTTS"], tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"a\.png: a file, not a data root"):
        find(["RTTS"], save(tmp_path / "a.png"))


def test_hazy_images_without_ground_truths(tmp_path):
    pairs = write_layout("O-HAZE", "O-HAZE/{hazy,gt}", tmp_path)
    pairs[1][1].unlink()
    with pytest.raises(
        UserError, match=r"42_outdoor_hazy\.jpg: no ground truth 42_outdoor_gt\.\* in .*gt; add it; .*_GT"
    ):
        find(["O-HAZE"], tmp_path)
    pairs[0][1].rename(pairs[0][1].with_name("other.jpg"))
    with pytest.raises(UserError, match=r"41_outdoor_hazy\.jpg: .* \(and 1 more like this\)"):
        find(["O-HAZE"], tmp_path)
    pairs[0][1].with_name("other.jpg").unlink()
    with pytest.raises(UserError, match=r"gt: no images"):
        find(["O-HAZE"], tmp_path)
    pairs[0][1].parent.rmdir()
    with pytest.raises(UserError, match=r"O-HAZE/hazy has no folder of ground truths beside it \(gt, gts, clear"):
        find(["O-HAZE"], tmp_path)


def test_two_images_of_one_name_are_refused(tmp_path):
    pairs = write_layout("Haze4K", "Haze4K/test/{haze,gt}", tmp_path)
    other = save(pairs[0][1].with_suffix(".jpg"))
    with pytest.raises(
        UserError, match=r"1_0\.79_1\.44\.png: has two ground truths, .*1\.(png|jpg) and .*1\.(png|jpg); keep"
    ):
        find(["Haze4K"], tmp_path)
    other.unlink()
    save(pairs[0][0].with_suffix(".bmp"))
    with pytest.raises(UserError, match=r"1_0\.79_1\.44\.bmp and .*1_0\.79_1\.44\.png are hazy images of one name"):
        find(["Haze4K"], tmp_path)


def sizes(root: Path, name: str, hazy: tuple[int, int], truth: tuple[int, int]):
    """A set whose first pair has these sizes."""
    pairs = write_layout(name, BENCHMARKS[name].all_layouts()[0], root)
    for k in range(BENCHMARKS[name].each):
        save(pairs[k][0], hazy)
    save(pairs[0][1], truth)
    return find([name], root)[0]


def test_border_rule(tmp_path):
    found = sizes(tmp_path / "a", "SOTS-indoor", (20, 10), (40, 30))
    items = found.items()
    assert isinstance(items, Paired)
    assert items.border == 10
    assert items[0]["clear"].shape == items[0]["hazy"].shape == (3, 10, 20)
    assert items[0]["name"] == "1400_1.png"
    sizes(tmp_path / "b", "SOTS-indoor", (20, 10), (20, 10))  # some copies come cropped
    with pytest.raises(
        UserError, match=r"1400_1\.png is 20x10 but .*1400\.png is 40x10 \(and 9 more .* 10 pixels larger"
    ):
        sizes(tmp_path / "c", "SOTS-indoor", (20, 10), (40, 10))
    with pytest.raises(UserError, match=r"is 20x10 but its ground truth .*1\.png is 40x30; sizes must be equal, and"):
        sizes(tmp_path / "d", "Haze4K", (20, 10), (40, 30))


@pytest.mark.parametrize("extension", ["jpg", "png", "webp"])
def test_sizes_respect_exif_orientation(tmp_path, extension):
    exif = Image.Exif()
    exif[0x0112] = 6
    save(tmp_path / f"PhoneHazy/hazy/1.{extension}", (5, 3), exif=exif)
    save(tmp_path / "PhoneHazy/gt/1.png", (3, 5))
    found = find(["PhoneHazy"], tmp_path)[0]
    assert found.items()[0]["clear"].shape == (3, 5, 3)
    assert any("not aligned: full-reference figures mean little" in remark for remark in found.remarks)


@pytest.mark.filterwarnings("error")
def test_sizes_are_read_from_headers(tmp_path):
    """Content decides, not the extension; pixels that are not there do not matter, nor does what has no header."""
    pairs = write_layout("HSTS-synthetic", "HSTS/synthetic/{synthetic,original}", tmp_path)
    pairs[0][1].write_bytes(b"junk")
    for size in ((4, 3), (5, 3)):
        save(pairs[1][1], size, format="PNG")
        pairs[1][1].write_bytes(pairs[1][1].read_bytes()[:45])
        if size == (4, 3):
            assert find(["HSTS"], tmp_path)[0].pairs == pairs
    with pytest.raises(UserError, match=r"0002\.jpg is 4x3 but its ground truth .*0002\.jpg is 5x3"):
        find(["HSTS"], tmp_path)


def test_items_without_ground_truth(tmp_path):
    write_layout("RTTS", "RTTS/JPEGImages", tmp_path)
    items = find(["RTTS"], tmp_path)[0].items()
    assert isinstance(items, Folder)
    assert items.names == ["1.png", "2.png"]


def test_flat_sets_do_not_score_their_ground_truths(tmp_path):
    pairs = write_layout("NH-HAZE", "NH-HAZE", tmp_path)
    (found,) = find(["NH-HAZE"], tmp_path)
    assert found.pairs == pairs
    assert found.items().names == ["51_hazy.png", "52_hazy.png"]


def test_folders_that_cannot_be_listed_are_skipped(tmp_path):
    write_layout("RTTS", "RTTS", tmp_path)
    closed = tmp_path / "closed"
    closed.mkdir(mode=0)
    assert len(find(["RTTS"], tmp_path)[0].pairs) == 2
    closed.chmod(0o700)  # so that it can be removed


def test_listing_names_all_and_fits_the_terminal():
    text = table.listing()
    assert max(map(len, text.splitlines())) <= 120
    for name, b in BENCHMARKS.items():
        row = next(line for line in text.splitlines() if line.startswith(f"{b.name} "))
        words = [b.metrics, b.airlight] if name in GROUPS["all"] else ["train" if b.to_train_on() else b.metrics, "-"]
        assert all(word in row.split() for word in (str(b.hazy or "-"), *words))
        assert b.paper.title in " ".join(text.split())
        assert b.paper.where in text
    assert all(group in text for group in GROUPS)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_one_set_alone_may_be_the_root_itself_whatever_its_name(tmp_path, name):
    root = tmp_path / "mine"
    without = BENCHMARKS[name].truth == "none"
    pairs = write_layout(name, "mine" if without else "mine/{hazy,gt}", tmp_path)
    (found,) = find([name], root)
    assert found.pairs == pairs
    if not without:  # with another set beside it, it could be either
        with pytest.raises(UserError, match=f"{name}.*not under"):
            find([name, "URHI"], root)


def test_a_root_of_another_set_is_refused(tmp_path):
    write_layout("SOTS-indoor", "SOTS/indoor/{hazy,gt}", tmp_path)
    for name in ("SOTS-outdoor", "HSTS-synthetic", "O-HAZE", "RTTS"):
        with pytest.raises(UserError, match=f"{name}: not under"):
            find([name], tmp_path / "SOTS" / "indoor")
    write_layout("SOTS-outdoor", "mine/{hazy,gt}", tmp_path)
    with pytest.raises(UserError, match="SOTS-indoor: not under"):  # its numbers are 1400 and more
        find(["SOTS-indoor"], tmp_path / "mine")
