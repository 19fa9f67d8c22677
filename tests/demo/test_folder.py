"""A checkpoint's folder appears whole or stays as it was."""

import pytest

from scripts.demo_model.folder import size_of, whole_folder


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_new_folder_appears_complete(tmp_path):
    with whole_folder(tmp_path / "made") as folder:
        (folder / "weights").write_bytes(b"1234")
        assert not (tmp_path / "made").exists()
    assert names(tmp_path) == ["made"]
    assert names(tmp_path / "made") == ["weights"]
    assert size_of(tmp_path / "made") == 4


def test_an_old_folder_is_replaced_as_a_whole(tmp_path):
    target = tmp_path / "made"
    target.mkdir()
    (target / "stale").touch()
    with whole_folder(target) as folder:
        (folder / "fresh").touch()
    assert names(tmp_path) == ["made"]
    assert names(target) == ["fresh"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, OSError])
def test_an_interrupted_run_leaves_the_old_folder_and_nothing_else(tmp_path, error):
    target = tmp_path / "made"
    target.mkdir()
    (target / "old").touch()

    def half():
        with whole_folder(target) as folder:
            (folder / "half").touch()
            raise error

    with pytest.raises(error):
        half()
    assert names(tmp_path) == ["made"]
    assert names(target) == ["old"]


def test_what_an_earlier_crash_left_is_cleared(tmp_path):
    left = tmp_path / ".made.partial"
    left.mkdir()
    (left / "half").touch()
    with whole_folder(tmp_path / "made") as folder:
        (folder / "whole").touch()
    assert names(tmp_path) == ["made"]
    assert names(tmp_path / "made") == ["whole"]
