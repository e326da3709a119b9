import pytest

from groupdetr_fast.training.checkpoint import CheckpointError, mark_best
from groupdetr_fast.training.selection import best_epoch, epochs_without_gain


def history(*aps):
    """One entry per epoch; None for an epoch that was not evaluated."""
    return [
        {"epoch": epoch, **({} if ap is None else {"metrics": {"AP": ap}})} for epoch, ap in enumerate(aps, start=1)
    ]


@pytest.mark.parametrize(
    ("aps", "delta", "expected"),
    [
        ((), 0.0, 0),
        ((None, None), 0.0, 0),
        ((0.1, 0.2), 0.0, 0),
        ((0.2, 0.1, 0.2), 0.0, 2),
        ((None, 0.2, None, 0.1, None), 0.0, 2),  # as far as it was evaluated
        ((0.1, 0.14, 0.18), 0.05, 0),  # two small rises make one that counts
        ((0.1, 0.14, 0.15), 0.05, 2),
        ((-1.0, -1.0), 0.0, 1),  # no ground truth to count
    ],
)
def test_epochs_without_gain(aps, delta, expected):
    assert epochs_without_gain(history(*aps), delta) == expected


def test_the_best_epoch_is_the_first_with_the_highest_ap():
    assert best_epoch(history(0.1, None, 0.3, 0.3, 0.2))["epoch"] == 3
    assert best_epoch(history(None)) is None


def write_epochs(run, *epochs):
    for epoch in epochs:
        folder = run / "checkpoints" / f"epoch_{epoch:04d}"
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_text(f"weights {epoch}")


@pytest.mark.parametrize("links", [True, False])
def test_the_best_weights_are_a_name_or_a_copy(tmp_path, monkeypatch, links):
    if not links:

        def refuse(*paths):
            raise PermissionError("no hard links here")

        monkeypatch.setattr("os.link", refuse)
    write_epochs(tmp_path, 1, 2)
    best = tmp_path / "checkpoints" / "best" / "model.safetensors"
    for epoch in (1, 2, 2, 1):
        mark_best(tmp_path, epoch)
        assert best.read_text() == f"weights {epoch}"
        source = tmp_path / "checkpoints" / f"epoch_{epoch:04d}" / "model.safetensors"
        assert best.samefile(source) == links
    assert [path.name for path in best.parent.iterdir()] == ["model.safetensors"]
    mark_best(tmp_path, 7)  # whose weights are gone
    assert best.read_text() == "weights 1"


def test_a_full_disk_is_told_in_one_sentence(tmp_path, monkeypatch):
    write_epochs(tmp_path, 1)

    def fail(*paths):
        raise OSError("No space left on device")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(CheckpointError, match=r"best/model.safetensors cannot be written: No space left"):
        mark_best(tmp_path, 1)
