"""metrics.csv after another program has changed it: what can be read is kept, and of the rest a copy and one line tell."""

import warnings

import pytest

from lowrank_pretrain.core.files import read_table
from lowrank_pretrain.loggers import csv as csv_log
from lowrank_pretrain.report.runs import read_series
from tests.conftest import SHORT, VIT

ROWS = b"loss,step\r\n1.0,3\r\n0.9,4\r\n0.8,5\r\n"
KEPT = ["loss,step", "1.0,3", "0.9,4"]


@pytest.mark.parametrize(("content", "kept", "said"), [
    (ROWS + b"k\xe4se", KEPT, "some letters of metrics.csv"),
    (ROWS.replace(b"0.9,4", b"0.9,4\r\nxxxxxxxxxx"), KEPT, "1 row"),
    (ROWS.replace(b"0.9,4", b'0.9,4\r\n"x'), KEPT, "1 row"),
    (ROWS.replace(b"0.9,4", b"0.9,4\r\n0.5,\xb2"), KEPT, "1 row"),
    (ROWS.replace(b"0.9,4", b"\0" * 5), KEPT[:2], "1 row"),
    (ROWS + b"\0" * 100, KEPT, "some letters"),
    (ROWS.replace(b"0.9,4", b'0.9,4\r\n"' + b"x" * 200_000), KEPT, "1 row"),
    (ROWS.replace(b"step", b"st\xe4p"), None, "4 row"),
    (ROWS.replace(b",", b";"), None, "4 row"),
    (ROWS.decode().encode("utf-16"), None, "row"),
    (b"\xff\x00garbage", None, "some letters"),
])  # fmt: skip
def test_what_cannot_be_read_stays_in_a_copy_and_one_line_says_so(tmp_path, content, kept, said):
    path = tmp_path / "metrics.csv"
    for number in range(2):  # the second copy leaves the first alone
        path.write_bytes(content)
        with pytest.warns(UserWarning, match=said) as warned:
            csv_log.forget_after(path, 5)
        copy = tmp_path / ("metrics.csv.damaged", "metrics.csv.damaged-2")[number]
        assert copy.read_bytes() == content
        assert len(warned) == 1 and copy.name in (line := str(warned[0].message)) and "\n" not in line
        assert (path.read_text().split() if path.exists() else None) == kept
    read_series(copy)


@pytest.mark.parametrize("content", [
    ROWS.replace(b"3\r", b"3.0\r").replace(b"4\r", b"4.0\r").replace(b"5\r", b"5.0\r"),  # as pandas writes it
    b"\xef\xbb\xbf" + ROWS,  # as a spreadsheet saves it
    ROWS.replace(b"\r", b""), ROWS + b"0.7,", ROWS + b"0.7,6", ROWS + b"\r\n\r\n",
])  # fmt: skip
def test_what_can_be_read_needs_no_copy(tmp_path, content):
    path = tmp_path / "metrics.csv"
    path.write_bytes(content)
    assert [point for point in read_series(path)["loss"] if point[0] <= 6] == [(4.0, 1.0), (5.0, 0.9), (6.0, 0.8)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        csv_log.forget_after(path, 5)
    assert path.read_text().split() == KEPT and [*tmp_path.iterdir()] == [path]


def test_a_run_goes_on_while_another_program_writes_into_its_file(tmp_path):
    path = tmp_path / "metrics.csv"
    logger = csv_log.RunCSVLogger(tmp_path)
    logger.log_metrics({"train/loss": 1.0}, step=0)
    path.write_bytes(b"note," + path.read_bytes().replace(b"\n", b"\n,", 1) + b"k\xe4se\r\n")
    with pytest.warns(UserWarning, match=r"1 row\(s\) of metrics.csv could not be read"):
        logger.log_metrics({"val/loss": 2.0}, step=1)
    columns, rows = read_table(path)
    assert {*columns} == {"note", "train/loss", "val/loss", "step"}
    assert [(row["train/loss"], row["val/loss"], row["step"]) for row in rows] == [("1.0", "", "0"), ("", "2.0", "1")]
    path.write_bytes(path.read_bytes() + b"2,k\xe4se,3.0,\r\n")
    assert columns[:3] == ["step", "train/loss", "val/loss"]
    assert csv_log.final_metrics(path) == {"train/loss": 1.0, "val/loss": 3.0}


def test_a_run_resumes_past_a_damaged_file(run, tmp_path):
    first = [*SHORT, *VIT, "method=full", "trainer.limit_train_batches=2"]
    run("run", "trainer.max_epochs=1", base=first)
    path = tmp_path / "run" / "metrics.csv"
    path.write_bytes(path.read_bytes() + b"k\xe4se\r\n")
    with pytest.warns(UserWarning, match=r"1 row\(s\) of metrics.csv could not be read"):
        run("run", "trainer.max_epochs=2", "ckpt_path=last", base=first)
    assert {int(row["step"]) for row in read_table(path)[1]} >= {1, 3}
