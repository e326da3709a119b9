"""lap and lapx have one name and live side by side."""

import sys

import pytest

from harness import peers


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "FOLDER", tmp_path)
    peers.lapx.cache_clear()
    yield tmp_path
    peers.lapx.cache_clear()


def test_lapx_does_not_take_the_place_of_lap(folder, monkeypatch):
    (folder / "lap").mkdir()
    (folder / "lap" / "__init__.py").write_text("from .part import lapjvr_batch\n")
    (folder / "lap" / "part.py").write_text("lapjvr_batch = 'of lapx'\n")
    other = type(sys)("lap")
    monkeypatch.setitem(sys.modules, "lap", other)
    assert peers.lapx().lapjvr_batch == "of lapx"
    assert sys.modules["lap"] is other
    assert "lap.part" not in sys.modules
    assert str(folder) not in sys.path


def test_missing_lapx_says_what_to_do(folder):
    with pytest.raises(ImportError, match="run make bench"):
        peers.lapx()
