from utils import columns


def test_a_table_in_markdown():
    rows = [["method", "PSNR"], ["a|b ", "20.1"]]
    assert columns.markdown(rows) == ["| method | PSNR |", "| --- | --- |", "| a\\|b | 20.1 |"]
    assert columns.markdown(rows, numbers=True)[1] == "| --- | ---: |"


def test_an_aligned_table():
    rows = [["method", "PSNR", ""], ["dcp", "9.5", "better"]]
    assert columns.aligned(rows, "<><", "  ") == ["  method  PSNR", "  dcp      9.5  better"]
    assert columns.aligned([row[:2] for row in rows]) == ["method  PSNR", "dcp      9.5"]
