"""The table of test and training sets: layout, pairing, metrics, citation and source of each.

A layout is the end of a folder's path; case, ``-``, ``_`` and blanks are ignored. ``{hazy,gt}`` are sibling folders of
hazy images and of ground truths, under these or other usual names (`HAZY`, `TRUTH`); without braces everything is in
one folder; ``*`` is a further word, as in RTTS-sample. For sets of snow and blur, "hazy" means degraded.
"""

import functools
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from data.pictures import SOTS_BORDER

HAZY = ("hazy", "haze", "hazy-images", "haze-images", "hazy-image", "foggy", "input", "inputs", "in", "lq")
TRUTH = (
    *("gt", "gts", "clear", "clean", "ground-truth", "target", "targets", "non-hazy", "haze-free", "original"),
    *("clear-images", "clear-image", "clean-images", "gt-images", "gt-image", "ground-truths", "hq", "reference"),
)

SCENE = "1400_1 -> 1400"
SAME = "0586 -> 0586"
GT = "01_hazy -> 01_GT"
ORDER = "the first to the first"  # used if no two files have the same name
RULES: dict[str, Callable[[str], str]] = {  # stem of the hazy image -> stem of its ground truth, in lower case
    SCENE: lambda stem: stem.split("_")[0],
    SAME: lambda stem: stem,
    GT: lambda stem: re.sub("_hazy$", "_gt", stem),
    ORDER: lambda stem: stem,
}


WHOLE = "all"  # in place of the numbers of a split


@dataclass(frozen=True)
class Paper:
    """The publication to cite for a set; ``url`` is the official page of its data, empty if uncertain."""

    authors: str
    title: str
    venue: str
    year: int
    url: str = ""

    def __str__(self) -> str:
        return f"{self.authors}: {self.title}. {self.venue}, {self.year}"

    @property
    def where(self) -> str:
        return self.url or f'search for "{self.title.partition(":")[0]}"'


@dataclass(frozen=True)
class Benchmark:
    """One set. ``hazy`` and ``truths`` count its images, ``numbers`` are their numbers in file names ("01-25 31-35").

    ``each`` hazy images share a number; ``train`` and ``test`` are the numbers of its splits, `WHOLE` if the set is
    such a split itself; ``held_out`` are the last numbers of a training set, for validation; ``border`` is by how many
    pixels a ground truth may be larger on every side; ``airlight`` and ``guided_filter`` are the test settings of the
    released D4 and NeDR. ``hazy`` is 0 if there is no agreed number. ``aliases`` are its other names. ``shared`` are
    layouts that other sets have too; the image numbers then decide.
    A repackaged set may repeat the ground truth under the name of every hazy image.
    """

    name: str
    hazy: int
    truths: int
    rule: str
    paper: Paper
    layouts: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    truth: Literal["aligned", "unaligned", "none"] = "aligned"
    numbers: str = ""
    each: int = 1
    train: str = ""
    test: str = ""
    held_out: str = ""
    border: int = 0
    airlight: Literal["max", "dark_channel"] = "dark_channel"
    guided_filter: bool = True
    degradation: Literal["haze", "snow", "defocus"] = "haze"
    note: str = ""

    @property
    def splits(self) -> dict[str, str]:
        """The numbers of every split: "all"; "train" and "test" where the field agrees on them; "validation"."""
        parts = {"train": self.train, "test": self.test, "validation": self.held_out}
        if self.held_out:
            parts["train"] = f"{unroll(self.numbers)[0]}-{unroll(self.held_out)[0] - 1}"
        return {"all": self.numbers} | {k: self.numbers if v == WHOLE else v for k, v in parts.items() if v}

    @property
    def metrics(self) -> str:
        """The metrics that apply: ``full-reference``, ``no-reference``, or ``doubtful`` if pairs are not aligned."""
        return {"aligned": "full-reference", "unaligned": "doubtful", "none": "no-reference"}[self.truth]

    def to_train_on(self, split: str = "all") -> bool:
        """Whether the images of a split are for training, not for scoring."""
        return split == "train" or self.train == WHOLE

    def all_layouts(self, split: str = "all") -> tuple[str, ...]:
        """All layouts, the best first: as shipped and repackaged, then the plain ones under the set's name."""
        names = (self.name.partition(":")[0], *self.aliases)
        inside = ("/train/{hazy,gt}", "-train/{hazy,gt}", "/{trainA,trainB}", "/{hazy/train,gt/train}")
        training = [name + folder for name in names for folder in inside if self.to_train_on(split)]
        if self.train == WHOLE:
            return tuple(dict.fromkeys((*self.layouts, *training)))
        folders = ("/hazy", "", "/images") if self.truth == "none" else ("/{hazy,gt}", "/test/{hazy,gt}")
        folders += ("",) if self.rule == GT else ()
        folders += ("/{testA,testB}", "/{hazy/test,gt/test}") if self.truth != "none" else ()
        plain = (start + folder for name in names for start in (name, f"{name}*") for folder in folders)
        return tuple(dict.fromkeys((*training, *self.layouts, *plain, *self.shared)))


# fmt: off
RESIDE = Paper(
    "Li, Ren, Fu, Tao, Feng, Zeng and Wang", "Benchmarking Single-Image Dehazing and Beyond",
    "IEEE Transactions on Image Processing", 2019, "https://sites.google.com/view/reside-dehaze-datasets")
I_HAZE = Paper(
    "Ancuti, Ancuti, Timofte and De Vleeschouwer",
    "I-HAZE: A Dehazing Benchmark with Real Hazy and Haze-Free Indoor Images",
    "ACIVS", 2018, "https://data.vision.ee.ethz.ch/cvl/ntire18/i-haze/")
O_HAZE = Paper(
    "Ancuti, Ancuti, Timofte and De Vleeschouwer",
    "O-HAZE: A Dehazing Benchmark with Real Hazy and Haze-Free Outdoor Images",
    "CVPR Workshops", 2018, "https://data.vision.ee.ethz.ch/cvl/ntire18/o-haze/")
NH_HAZE = Paper(
    "Ancuti, Ancuti and Timofte",
    "NH-HAZE: An Image Dehazing Benchmark with Non-Homogeneous Hazy and Haze-Free Images",
    "CVPR Workshops", 2020, "https://data.vision.ee.ethz.ch/cvl/ntire20/nh-haze/")
DENSE_HAZE = Paper(
    "Ancuti, Ancuti, Sbert and Timofte",
    "Dense-Haze: A Benchmark for Image Dehazing with Dense-Haze and Haze-Free Images",
    "ICIP", 2019, "https://data.vision.ee.ethz.ch/cvl/ntire19/dense-haze/")
NTIRE_2021 = Paper(
    "Ancuti, Ancuti, Vasluianu, Timofte et al.", "NTIRE 2021 NonHomogeneous Dehazing Challenge Report",
    "CVPR Workshops", 2021)
HAZE_4K = Paper(
    "Liu, Zhu, Pei, Fu, Qin, Zhang, Wan and Feng",
    "From Synthetic to Real: Image Dehazing Collaborating with Unlabeled Real Data",
    "ACM Multimedia", 2021, "https://github.com/liuye123321/DMT-Net")
COLOR_LINES = Paper(
    "Fattal", "Dehazing Using Color-Lines",
    "ACM Transactions on Graphics", 2014, "https://www.cs.huji.ac.il/~raananf/projects/dehaze_cl/")
NON_ALIGNED = Paper(
    "Fan, Guo, Qian, Li, Li and Yang", "Non-aligned Supervision for Real Image Dehazing", "arXiv 2303.04940", 2023)
CSD = Paper(
    "Chen, Fang, Hsieh, Tsai, Chen, Ding and Kuo",
    "ALL Snow Removed: Single Image Desnowing Algorithm Using Hierarchical Dual-Tree Complex Wavelet Representation "
    "and Contradict Channel Loss",
    "ICCV", 2021)
JSTASR = Paper(
    "Chen, Fang, Ding, Tsai and Kuo",
    "JSTASR: Joint Size and Transparency-Aware Snow Removal Algorithm Based on Modified Partial Convolution and "
    "Veiling Effect Removal",
    "ECCV", 2020)
DESNOWNET = Paper(
    "Liu, Jaw, Huang and Hwang", "DesnowNet: Context-Aware Deep Network for Snow Removal",
    "IEEE Transactions on Image Processing", 2018)
DUAL_PIXEL = Paper("Abuolaim and Brown", "Defocus Deblurring Using Dual-Pixel Data", "ECCV", 2020)

# Paths that do not tell indoor from outdoor; PromptIR and its successors use test/dehaze.
SOTS_EITHER = ("test/dehaze/{hazy,gt}", "SOTS/{hazy,gt}", "SOTS/test/{hazy,gt}")

TABLE = (
    Benchmark(
        "SOTS-indoor", 500, 50, SCENE, RESIDE,
        ("SOTS/indoor/{hazy,gt}", "SOTS/indoor/nyuhaze500/{hazy,gt}", "SOTS/nyuhaze500/{hazy,gt}",
         "RESIDE-IN/test/{hazy,gt}", "reside-indoor/test/{hazy,gt}", "SOTS/indoor/indoor/{hazy,gt}",
         "RESIDE/test/indoor/{hazy,gt}", "RESIDE/indoor/test/{hazy,gt}", "SOTS/test/indoor/{hazy,gt}",
         "ITS/test/{hazy,gt}"),
        shared=SOTS_EITHER, numbers="1400-1449", each=10, border=SOTS_BORDER, airlight="max", guided_filter=False,
        note="Official ground truth is 640x480 against 620x460: 10 pixels are cut off every side, nothing is resized.",
    ),
    Benchmark(
        "SOTS-outdoor", 500, 492, SCENE, RESIDE,
        ("SOTS/outdoor/{hazy,gt}", "RESIDE-OUT/test/{hazy,gt}", "reside-outdoor/test/{hazy,gt}",
         "SOTS/outdoor/outdoor/{hazy,gt}", "RESIDE/test/outdoor/{hazy,gt}", "RESIDE/outdoor/test/{hazy,gt}",
         "SOTS/test/outdoor/{hazy,gt}", "OTS/test/{hazy,gt}"),
        shared=SOTS_EITHER,
        note="The mean is over the hazy images. They are JPEG: versions of the decoder move the figures. Some "
        "collections of OTS hold scenes of this set: do not train on those.",
    ),
    Benchmark(
        "HSTS-synthetic", 10, 10, SAME, RESIDE,
        ("HSTS/synthetic/{synthetic,original}", "HSTS/synthetic/{hazy,gt}", "HSTS/{synthetic,original}",
         "HSTS/{hazy,gt}", "HSTS-synthetic/{synthetic,original}"),
        note="Hazy images lie in `synthetic`. Two ground truths are PNG data named .jpg, which is fine here. "
        "Shares scenes with OTS.",
    ),
    Benchmark("HSTS-real", 10, 0, SAME, RESIDE, ("HSTS/real-world", "HSTS/real", "HSTS/real/hazy"), truth="none"),
    Benchmark(
        "I-HAZE", 30, 30, GT, I_HAZE, ("I-HAZY NTIRE 2018/{hazy,gt}",), ("I-HAZY",), numbers="01-25 31-35",
        train="01-25", test="31-35",
        note="There are no 26-30. Unpaired methods average all 30 images, others 31-35.",
    ),
    Benchmark(
        "O-HAZE", 45, 45, GT, O_HAZE, ("O-HAZY NTIRE 2018/{hazy,gt}",), ("O-HAZY",), numbers="01-45",
        train="01-40", test="41-45",
        note="Up to 5436x3612. Unpaired methods average all 45 images, supervised ones 41-45.",
    ),
    Benchmark(
        "NH-HAZE", 55, 55, GT, NH_HAZE, ("NH-HAZE",), ("NH-HAZE-2020", "NH-HAZE-20"),
        numbers="01-55", train="01-50", test="51-55",
        note="Comes flat: 01_hazy.png beside 01_GT.png. Supervised methods use 51-55.",
    ),
    Benchmark(
        "Dense-HAZE", 55, 55, GT, DENSE_HAZE, ("Dense_Haze_NTIRE19/{hazy,gt}",), ("Dense-HAZE-2019", "Dense-HAZE-19"),
        numbers="01-55", train="01-50", test="51-55",
    ),
    Benchmark(
        "NH-HAZE2", 25, 25, GT, NTIRE_2021,
        ("NTIRE2021_Train_{Hazy,GT}",), ("NH-HAZE-2021", "NH-HAZE-21"),
        numbers="01-25", train="01-20", test="21-25",
        note="The public training part of the challenge; ground truth bears the name of the hazy image.",
    ),
    Benchmark("Haze4K", 1000, 1000, SCENE, HAZE_4K, ("Haze4K/test/{haze,gt}",), numbers="1-1000", test=WHOLE),
    Benchmark("RTTS", 4322, 0, SAME, RESIDE, ("RTTS/JPEGImages",), truth="none"),
    Benchmark(
        "URHI", 4807, 0, SAME, RESIDE,
        ("URHI", "URHI/*", "UnannotatedHazyImages", "UnannotatedRealHazyImages"), truth="none",
    ),
    Benchmark("Fattal", 31, 0, SAME, COLOR_LINES, truth="none", note="Only the hazy inputs may be in the folder."),
    Benchmark(
        "PhoneHazy", 415, 415, SAME, NON_ALIGNED, truth="unaligned",
        note="Pairs are not aligned: full-reference figures mean little.",
    ),
    Benchmark(
        "ITS", 13_990, 1_399, SCENE, RESIDE,
        ("ITS/{hazy,gt}", "ITS/train/{ITS_haze,ITS_clear}", "ITS/{ITS_haze,ITS_clear}", "RESIDE-IN/train/{hazy,gt}",
         "reside-indoor/train/{hazy,gt}", "RESIDE/train/indoor/{hazy,gt}", "RESIDE/indoor/train/{hazy,gt}"),
        numbers="1-1399", each=10, train=WHOLE, held_out="1380-1399", border=SOTS_BORDER,
        note="ITS:validation, 1380-1399, is to choose weights on, ITS:train the rest; the split is this project's. "
        "Some copies have ground truth of 640x480 against 620x460: 10 pixels are cut off every side.",
    ),
    Benchmark(
        "OTS", 72_135, 2_061, SCENE, RESIDE,
        ("OTS/{hazy,gt}", "OTS_ALPHA/{haze/OTS,clear/clear_images}", "OTS_ALPHA/{haze,clear}", "OTS/{,clear}",
         "RESIDE-OUT/train/{hazy,gt}", "reside-outdoor/train/{hazy,gt}", "RESIDE/train/outdoor/{hazy,gt}",
         "RESIDE/outdoor/train/{hazy,gt}", "train/dehaze/{synthetic,original}", "train/dehaze/{hazy,gt}"),
        train=WHOLE,
        note="Hazy images may lie in folders part1 to part4. Repackagings may hold more images than RESIDE.",
    ),
    Benchmark("Haze4K:train", 3000, 3000, SCENE, HAZE_4K, ("Haze4K/train/{haze,gt}",), train=WHOLE),
    Benchmark(
        "CSD", 2000, 2000, SAME, CSD, ("CSD/Test/{Snow,gt}", "CSD/test2000/{Snow,gt}"), test=WHOLE, degradation="snow",
    ),
    Benchmark(
        "CSD:train", 8000, 8000, SAME, CSD, ("CSD/Train/{Snow,gt}", "CSD/train2500/{Snow,gt}"),
        train=WHOLE, degradation="snow",
    ),
    Benchmark(
        "SRRS", 2000, 2000, SAME, JSTASR, ("SRRS/test/{Snow,gt}", "SRRS/test/{Syn,gt}", "SRRS/test2000/{Snow,gt}"),
        test=WHOLE, degradation="snow", note="Comes without splits: papers test on 2,000 images of their own choice.",
    ),
    Benchmark(
        "SRRS:train", 0, 0, SAME, JSTASR,
        ("SRRS/train/{Snow,gt}", "SRRS/train/{Syn,gt}", "SRRS/train2500/{Snow,gt}", "SRRS/{Syn,gt}"),
        train=WHOLE, degradation="snow",
    ),
    *(
        Benchmark(
            f"Snow100K-{size}", number, number, SAME, DESNOWNET,
            (f"Snow100K-{size}/{{synthetic,gt}}",), test=WHOLE, degradation="snow",
        )
        for size, number in (("S", 16_611), ("M", 16_588), ("L", 16_801))
    ),
    Benchmark(
        "Snow100K:train", 50_000, 50_000, SAME, DESNOWNET,
        ("Snow100K/train/{synthetic,gt}", "Snow100K-training/{synthetic,gt}", "Snow100K-training/all/{synthetic,gt}",
         "Snow100K/all/{synthetic,gt}", "Snow100K/train2500/{Snow,gt}"),
        train=WHOLE, degradation="snow",
    ),
    Benchmark(
        "DPDD", 76, 76, ORDER, DUAL_PIXEL,
        ("dd_dp_dataset*/test_c/{source,target}", "DPDD/test_c/{source,target}", "DPDD/test/{inputC,target}",
         "test/DPDD/{inputC,target}"),
        test=WHOLE, degradation="defocus",
        note="The combined (not the dual-pixel) images. Source and target have different names and pair in order.",
    ),
    Benchmark(
        "DPDD:train", 350, 350, ORDER, DUAL_PIXEL,
        ("dd_dp_dataset*/train_c/{source,target}", "DPDD/train_c/{source,target}", "DPDD/train/{inputC,target}",
         "train/DPDD/{inputC,target}"),
        train=WHOLE, degradation="defocus",
    ),
)
# fmt: on
BENCHMARKS = {benchmark.name: benchmark for benchmark in TABLE}
GROUPS = {
    "SOTS": ("SOTS-indoor", "SOTS-outdoor"),
    "HSTS": ("HSTS-synthetic", "HSTS-real"),
    "Snow100K": ("Snow100K-S", "Snow100K-M", "Snow100K-L"),
    "all": tuple(b.name for b in TABLE if b.degradation == "haze" and not b.to_train_on()),
}


@functools.cache
def unroll(text: str) -> tuple[int, ...]:
    """Expand a list of ranges such as "01-03 7" to 1, 2, 3, 7."""
    runs = (run.partition("-") for run in text.split())
    return tuple(n for first, _, last in runs for n in range(int(first), int(last or first) + 1))


def listing() -> str:
    """All sets as text of at most 120 columns: sizes, splits, test settings, layouts, notes and sources."""
    row = "{:15}{:>6}{:>7}  {:15}{:7}{:7}{:22}{}".format
    lines = [row("set", "hazy", "truths", "metrics", ":train", ":test", "airlight (filter)", "layout, e.g.")]
    for b in TABLE:
        light = b.airlight + " (guided)" * b.guided_filter if b.name in GROUPS["all"] else "-"
        use = "(to train on)" if b.to_train_on() else b.metrics
        parts = (part or "-" for part in (b.hazy, b.truths, use, b.train, b.test))
        lines.append(row(b.name, *parts, light, b.all_layouts()[0]))
    usage = (
        "Names may be in any case, - and _ alike. SOTS, HSTS, Snow100K and all are groups; O-HAZE:test is a split. The "
        "group all has every set of haze but those to train on; CSD, SRRS and Snow100K are of snow, DPDD of defocus. "
        "train.py takes sets and splits as data.pairs and data.validation_pairs. Airlight and guided filter are the "
        "test settings of the released D4 and NeDR. Other usual layouts are found too, among them NAME/{hazy,gt}, "
        "NAME/train/{hazy,gt} and, without ground truth, NAME/hazy or NAME itself."
    )
    lines += ["", *_wrapped(usage)]
    lines += ["", *(line for b in TABLE if b.note for line in _wrapped(f"{b.name:16}{b.note}", 16)), ""]
    for paper in dict.fromkeys(b.paper for b in TABLE):
        lines += _wrapped(", ".join(b.name for b in TABLE if b.paper == paper))
        lines += [*_wrapped(f"    {paper}", 4), f"    {paper.where}"]
    return "\n".join(lines)


def _wrapped(text: str, indent: int = 0) -> list[str]:
    return textwrap.wrap(text, 110, subsequent_indent=" " * indent, break_on_hyphens=False, break_long_words=False)
