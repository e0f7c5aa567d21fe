"""Files are written whole or not at all, tables hold no formula, and errors are quoted in one line."""

import csv
import io

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from comparisons import make_comparison
from ewavit.compare.report import write_results
from ewavit.errors import Diverged, EwavitError, first_line
from ewavit.files import csv_text, is_torch_file, replacing
from ewavit.tasks.classification import Classification
from ewavit.tasks.confusion import Confusion
from ewavit.tasks.task import Prediction
from ewavit.training.report import write_predictions


def test_a_file_is_replaced_when_the_new_one_is_whole(tmp_path):
    file = tmp_path / "file"
    file.write_text("old")
    with replacing(file) as partial:
        partial.write_text("new")
        assert file.read_text() == "old"
    assert file.read_text() == "new"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("folder", [False, True])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, folder):
    file = tmp_path / "file"
    file.write_text("old")

    def write():
        with replacing(file) as partial:
            if folder:
                partial.mkdir()
                partial /= "part"
            partial.write_text("ne")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        write()
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("folder", [False, True])
def test_what_a_killed_process_left_is_written_over_and_a_users_file_is_not(tmp_path, folder):
    with replacing(tmp_path / "file") as partial:
        partial.mkdir() if folder else partial.touch()
        left = partial
    (tmp_path / "file").rename(left)
    (tmp_path / "file.partial").write_text("mine")
    with replacing(tmp_path / "file") as partial:
        assert not partial.exists()
        partial.write_text("new")
    assert (tmp_path / "file.partial").read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 2


# --- tables

FORMULAS = ("=1+1", "+cmd|' /C calc'!A0", "-2+3+cmd|''!A0", "@SUM(1)", "\t=1", "\r=1", "\n=1", "'=1", "''-x")
HARMLESS = ("cat", "", "'", "'quoted'", "a=b", "a-b", " =", "-0.5", "+1", "-1e-5", ".5", "1.", "night stand")


def as_read(cell):
    """The text of a cell, by the rule of the documentation."""
    rest = cell.lstrip("'")
    return cell[1:] if cell[:1] == "'" and rest[:1] in tuple("=+-@\t\r\n") else cell


def is_formula(cell):
    if cell[:1] not in tuple("=+-@\t\r\n"):
        return False
    try:
        float(cell)
    except ValueError:
        return True
    return False


@given(st.one_of(st.text(), st.text("=+-@'\t\r\n1.e", max_size=6)))
@example("")
def test_a_text_in_a_table_is_no_formula_and_is_found_again(text):
    cell = csv_text(text)
    assert not is_formula(cell)
    assert as_read(cell) == text


def test_formulas_get_a_quote_and_other_text_and_numbers_do_not():
    assert [csv_text(text) for text in FORMULAS] == [f"'{text}" for text in FORMULAS]
    assert [csv_text(text) for text in HARMLESS] == list(HARMLESS)


def cells(file):
    return list(csv.reader(io.StringIO(file.read_bytes().decode(), newline="")))


def test_class_names_and_paths_are_no_formulas_in_the_table_of_predictions(tmp_path):
    names = (*FORMULAS, *HARMLESS)
    rows = [
        Prediction(number, len(names) - 1 - number, 0.25, (number, 0), name)
        for number, name in enumerate(names)
    ]
    write_predictions(Classification(), rows, tmp_path / "predictions.csv", names, "points:nowhere")
    header, *found = cells(tmp_path / "predictions.csv")
    assert not any(is_formula(cell) for row in [header, *found] for cell in row)
    columns = [dict(zip(header, row, strict=True)) for row in found]
    assert tuple(as_read(row["class"]) for row in columns) == names
    assert tuple(as_read(row["predicted_class"]) for row in columns) == names[::-1]
    assert tuple(as_read(row["input"]) for row in columns) == names
    assert [as_read(row["top5"]) for row in columns] == [f"{name}|{names[0]}" for name in names]
    assert {row["probability"] for row in columns} == {"0.2500"}


def test_class_names_are_no_formulas_in_a_confusion_matrix(tmp_path):
    names = (*FORMULAS, *HARMLESS)
    counts = np.arange(len(names) ** 2).reshape(len(names), -1)
    Confusion(names, counts, "images").write(tmp_path / "confusion.csv")
    header, *rows = cells(tmp_path / "confusion.csv")
    assert not any(is_formula(cell) for row in [header, *rows] for cell in row)
    assert tuple(map(as_read, header[1:])) == names
    assert tuple(as_read(row[0]) for row in rows) == names
    assert [[int(cell) for cell in row[1:]] for row in rows] == counts.tolist()


@pytest.mark.parametrize("name", FORMULAS)
def test_errors_and_names_are_no_formulas_in_the_results_of_a_comparison(tmp_path, name):
    failed = {("dense", 0): name, (name, 1): name}
    write_results(make_comparison(("dense", name), 3, 3, failed=failed, layers=1), tmp_path)
    header, *found = cells(tmp_path / "results.csv")
    assert not any(is_formula(cell) for row in [header, *found] for cell in row)
    rows = [dict(zip(header, row, strict=True)) for row in found]
    assert [as_read(row["arm"]) for row in rows] == ["dense"] * 3 + [name] * 3
    assert [as_read(row["error"]) for row in rows] == [name, "", "", "", name, ""]


def test_an_error_with_undecodable_bytes_is_written(tmp_path):
    failed = {("dense", 0): "cannot read \udcff.png"}
    write_results(make_comparison(("dense", "ewa"), 3, 3, failed=failed, name="\udcff"), tmp_path)
    assert "cannot read \\udcff.png" in (tmp_path / "results.csv").read_text()
    assert "\\udcff" in (tmp_path / "report.html").read_text()


def test_the_first_line_of_an_error_is_short_unless_it_is_our_own():
    assert first_line(KeyError()) == "KeyError"
    assert first_line(RuntimeError("\n  one\ntwo")) == "one"
    assert first_line(RuntimeError("x" * 500)) == "x" * 200
    assert first_line(Diverged("x" * 500 + "\ny")) == "x" * 500
    assert issubclass(Diverged, EwavitError)


@pytest.mark.parametrize("spaces", [0x0280, 0x0580, 0x4B50])
def test_safetensors_with_a_header_of_any_length_are_no_torch_file(tmp_path, spaces):
    file = tmp_path / "a.safetensors"
    file.write_bytes(spaces.to_bytes(8, "little") + b"{}".ljust(spaces))
    assert not is_torch_file(file)
