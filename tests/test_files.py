"""Files are whole or not there."""

import os

import pytest

from groupdetr_fast.files import read_json, write_json, write_whole


def test_a_half_written_file_counts_as_none(tmp_path):
    path = tmp_path / "file.json"
    assert read_json(path) is None
    write_json(path, {"a": [1, None]})
    assert read_json(path) == {"a": [1, None]}
    path.write_text(path.read_text()[:-4])
    assert read_json(path) is None


def test_a_failure_leaves_the_old_text(tmp_path, monkeypatch):
    path = tmp_path / "file.txt"
    write_whole(path, "old")

    def fail(descriptor):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="No space"):
            write_whole(path, "new")
    assert path.read_text() == "old"
    write_whole(path, "new")
    assert [entry.read_text() for entry in tmp_path.iterdir()] == ["new"]
