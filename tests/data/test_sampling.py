import pytest
import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader, Dataset

from groupdetr_fast.data import Batch, EpochSampler, collate


class Keys(Dataset):
    """Samples that record the key they were asked for."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, key):
        epoch, index = key
        return torch.full((3, 2 + index % 2, 2), float(epoch)), {
            "labels": torch.tensor([index]),
            "boxes": torch.full((1, 4), 0.5),
            "image_id": index,
            "original_size": torch.tensor([4, 4]),
        }


def epochs_and_ids(loader):
    return [(int(batch.images[0, 0, 0, 0]), batch.image_ids) for batch in loader]


def test_every_sample_once_in_an_order_of_seed_and_epoch():
    sampler = EpochSampler(range(20), seed=5)
    first = list(sampler)
    assert len(sampler) == 20
    assert [epoch for epoch, _ in first] == [0] * 20
    assert sorted(index for _, index in first) == list(range(20))
    assert list(sampler) == first
    assert list(EpochSampler(range(20), seed=5)) == first
    assert list(EpochSampler(range(20), seed=6)) != first
    sampler.set_epoch(1)
    assert [epoch for epoch, _ in sampler] == [1] * 20
    assert [index for _, index in sampler] != [index for _, index in first]


def test_unshuffled_order():
    sampler = EpochSampler(range(3), shuffle=False)
    sampler.set_epoch(2)
    assert list(sampler) == [(2, 0), (2, 1), (2, 2)]


def test_negative_numbers_are_refused():
    with pytest.raises(ValueError, match="seed must not be negative"):
        EpochSampler(range(3), seed=-1)
    with pytest.raises(ValueError, match="epoch must not be negative"):
        EpochSampler(range(3)).set_epoch(-1)


def test_prepared_loader_advances_the_epoch_and_moves_batches():
    dataset = Keys(5)
    loader = DataLoader(dataset, batch_size=2, sampler=EpochSampler(dataset, seed=1), collate_fn=collate)
    prepared = Accelerator(cpu=True).prepare(loader)
    epochs = [epochs_and_ids(prepared) for _ in range(3)]
    for epoch, batches in enumerate(epochs):
        assert [number for number, _ in batches] == [epoch] * 3
        assert sorted(image_id for _, ids in batches for image_id in ids) == list(range(5))
    assert epochs[0] != epochs[1]
    prepared.set_epoch(1)
    assert epochs_and_ids(prepared) == epochs[1]
    assert all(isinstance(batch, Batch) for batch in prepared)


@pytest.mark.parametrize(("size", "drawn"), [(12, 12), (13, 18)])
def test_processes_share_one_epoch(size, drawn):
    """As accelerate shards for two processes: together they see every sample, each batch in one of them."""
    dataset = Keys(size)
    shards = []
    for process in range(2):
        loader = DataLoader(dataset, batch_size=3, sampler=EpochSampler(dataset, seed=1), collate_fn=collate)
        prepared = prepare_data_loader(loader, num_processes=2, process_index=process, put_on_device=False)
        prepared.set_epoch(4)
        shards.append(epochs_and_ids(prepared))
    assert {epoch for shard in shards for epoch, _ in shard} == {4}
    assert len(shards[0]) == len(shards[1])
    seen = [image_id for shard in shards for _, ids in shard for image_id in ids]
    assert set(seen) == set(range(size))
    # The last batches are filled up with samples of the same epoch; nothing else is repeated.
    assert len(seen) == drawn
