from utils.errors import LONGEST, UserError


def test_an_error_is_one_printable_line_whatever_is_quoted_in_it():
    assert str(UserError("a\nb\033[31m \u2028ü \udcff")) == r"a\nb\x1b[31m \u2028ü \udcff"
    assert str(UserError("a" * 10**6 + "the remedy")).endswith("the remedy")
    assert len(str(UserError("a" * 10**6))) <= LONGEST
