"""What messages quote."""

import os
import warnings
from pathlib import Path

import pytest

from utils import errors, files
from utils.errors import UserError, quoted


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("a b", "a b"),
        ("two\nlines\0\x1b[31m", r"two\nlines\x00\x1b[31m"),
        (os.fsdecode(b"na\xefve"), r"na\xefve"),
        ("\ud800", r"\ud800"),
        ("\u202eevil", r"\u202eevil"),
        ("n\u00e4he", "n\u00e4he"),
        (Path("a/b"), "a/b"),
        ([1, "x"], "[1, 'x']"),
    ],
)
def test_quoted_text_is_printable(value, words):
    assert quoted(value) == words
    assert str(UserError(f"x: {words}")) == f"x: {words}"


def test_numbers_of_thousands_of_digits_are_described():
    assert quoted(10**5000) == quoted([10**5000]) == "a number of thousands of digits"


def test_quoted_text_is_shortened_in_its_middle():
    assert quoted("a" * 120) == "a" * 120
    assert quoted("a" * 500 + "b" * 500, 20) == "aaaaaaaaa ... bbbbbb"
    assert len(quoted("\0" * 10_000)) == 120


def test_messages_have_one_line():
    error = UserError(f"a\nb: {'x' * 10**5}; mend it")
    assert str(error).startswith(r"a\nb: xxx")
    assert str(error).endswith("xxx; mend it")
    assert len(str(error)) == errors.LONGEST


def test_nearest_accepts_names_of_any_type():
    assert errors.nearest("nerd", ["nedr", "d4"]) == "; did you mean 'nedr'?"
    for name in (7, 10**5000, "x" * 10**6):
        assert errors.nearest(name, ["nedr", "d4"]) == "; known: d4, nedr"


def test_warnings_about_damaged_files_are_not_shown():
    """Those of PyTorch and of the networks are."""

    def main():
        for module in ("PIL.TiffImagePlugin", "torch.nn"):
            warnings.warn_explicit(f"of {module}", UserWarning, "a.py", 1, module)
        warnings.warn_explicit("of data.depth", RuntimeWarning, "a.py", 1, "data.depth")

    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        with pytest.raises(SystemExit):
            errors.run(main)
    assert [str(each.message) for each in shown] == ["of torch.nn"]


def test_temporary_names_are_distinct_and_short_enough(tmp_path):
    wanted = ["x.1.png", "x_1.png", "x" * 254 + "a", "x" * 254 + "b", "\U0001f32b" * 63]
    names = {files.temporary_path(tmp_path / name).name for name in wanted}
    assert len(names) == len(wanted)
    assert max(len(os.fsencode(name)) for name in names) < 255
    assert {name.rpartition(".")[0] for name in names} == {".unfinished"}


def test_an_error_is_one_printable_line_whatever_is_quoted_in_it():
    assert str(UserError("a\nb\033[31m \u2028ü \udcff")) == r"a\nb\x1b[31m \u2028ü \xff"
    assert str(UserError("a" * 10**6 + "the remedy")).endswith("the remedy")
    assert len(str(UserError("a" * 10**6))) <= errors.LONGEST
