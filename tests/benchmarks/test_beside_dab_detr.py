"""``python benchmarks beside_dab_detr``. The comparison itself needs a checkout of the original."""

import pytest

from cpu import beside_dab_detr


def test_a_folder_without_the_original_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["benchmarks beside_dab_detr", "--original", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"error: .* is no checkout of https://github.com/IDEA-Research/DAB-DETR"):
        beside_dab_detr.main()


def test_both_begin_with_the_same_losses(monkeypatch, capsys, checkout):
    arguments = ["--original", str(checkout("DAB-DETR")), "--steps", "3", "--every", "1"]
    monkeypatch.setattr("sys.argv", ["benchmarks beside_dab_detr", *arguments])
    beside_dab_detr.main()
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0] for row in rows] == ["1", "2", "3"]
    for _, ours, theirs, difference, content, their_content, box, their_box in rows:
        assert float(ours) == pytest.approx(float(theirs), rel=1e-5)
        assert float(difference) < 1e-5
        assert (content, box) == (their_content, their_box)
