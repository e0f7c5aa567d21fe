"""Files are written whole or not at all, and errors are quoted in one line."""

import pytest

from ewavit.errors import Diverged, EwavitError, first_line
from ewavit.files import replacing


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


def test_the_first_line_of_an_error_is_short_unless_it_is_our_own():
    assert first_line(KeyError()) == "KeyError"
    assert first_line(RuntimeError("\n  one\ntwo")) == "one"
    assert first_line(RuntimeError("x" * 500)) == "x" * 200
    assert first_line(Diverged("x" * 500 + "\ny")) == "x" * 500
    assert issubclass(Diverged, EwavitError)
