"""The benchmark of photographs: real cases in processes of their own, one table."""

import re

import pytest

from benchmarks import photographs
from utils.errors import UserError


@pytest.mark.slow
def test_the_table_of_real_photographs(capsys):
    methods = ["dcp", "dcp@dcp.guided_filter=false"]
    assert photographs.main([*methods, "--sizes", "40x30", "30x40"]) == 0
    out = capsys.readouterr().out
    assert "| method | 40x30 | 30x40 |" in out
    for method in methods:
        assert re.search(rf"\| {re.escape(method)} \| \d\.\d+ s, [\d,]+ MiB \| \d\.\d+ s, [\d,]+ MiB \|", out)


def test_file_names_may_contain_an_equals_sign(tmp_path, monkeypatch):
    file = tmp_path / "me@home, [1].pt"
    file.touch()
    with pytest.raises(UserError, match=r"me@home, \[1\]\.pt is empty"):
        photographs.main([str(file)])


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["dcp", "--sizes", "40"], "--sizes 40: write width x height"),
        (["dcp", "--sizes", "0x40"], "write width x height"),
        (["nowhere.pt"], "no checkpoint nowhere.pt"),
        (["nedr@nedr.drem=false"], "nedr.drem is fixed by training"),
        (["dcp@dcp.guided_filtre=true"], "did you mean 'guided_filter'"),
    ],
)
def test_mistakes_are_reported_before_anything_is_measured(arguments, why):
    with pytest.raises(UserError, match=re.escape(why)):
        photographs.main(arguments)
