import logging

import pytest
import torch
from torch.utils.data import DataLoader

from groupdetr_fast.data import CocoDataset, DataError, SkipUnreadable


@pytest.fixture
def dataset(content, write):
    folder, path = write(content)
    (folder / "sub" / "5.png").write_bytes(b"no image")  # index 1
    (folder / "sub" / "9.png").unlink()  # index 2
    return CocoDataset(folder, path)


def test_the_next_readable_sample_stands_in(dataset, caplog):
    readable = SkipUnreadable(dataset, limit=2)
    with caplog.at_level(logging.WARNING):
        ids = [[readable[epoch, index][1]["image_id"] for index in range(4)] for epoch in range(2)]
    assert len(readable) == 4
    assert ids == [[7, 2, 2, 2]] * 2
    assert readable.unreadable == [1, 2]
    assert len(caplog.records) == 2  # one for each image, whatever the epoch
    assert "5.png" in caplog.text
    assert "9.png" in caplog.text


def test_the_sample_after_the_last_is_the_first(content, write):
    folder, path = write(content)
    (folder / "sub" / "2.png").unlink()
    assert SkipUnreadable(CocoDataset(folder, path), limit=1)[0, 3][1]["image_id"] == 7


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_count_together(dataset, workers):
    readable = SkipUnreadable(dataset, limit=2)
    keys = [(0, index) for index in range(4)]
    loader = DataLoader(readable, batch_size=1, sampler=keys, num_workers=workers, collate_fn=lambda batch: batch)
    assert [batch[0][1]["image_id"] for batch in loader] == [7, 2, 2, 2]
    assert readable.unreadable == [1, 2]


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        (0, r"^image file .*5\.png .*cannot be read"),
        (1, "^2 of 4 images cannot be read, and 1 are allowed; the last: "),
    ],
)
def test_too_many_are_refused(dataset, limit, message):
    readable = SkipUnreadable(dataset, limit)
    with pytest.raises(DataError, match=message):
        torch.stack([readable[0, index][0] for index in range(4)])


def test_a_set_without_a_readable_sample_is_refused(dataset):
    for path in dataset.image_folder.rglob("*.png"):
        path.unlink()
    with pytest.raises(DataError, match="4 of 4 images cannot be read"):
        SkipUnreadable(dataset, limit=100)[0, 0]
