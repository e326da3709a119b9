"""The order of samples, and random numbers that depend on nothing but seed, epoch and sample."""

import random
from collections.abc import Iterator, Sequence, Sized
from contextlib import contextmanager

import numpy as np
import torch
from torch.utils.data import Sampler

__all__ = ["EpochSampler", "seeded"]


class EpochSampler(Sampler[tuple[int, int]]):
    """Yields ``(epoch, index)`` for every sample of ``dataset`` once.

    The order is a function of ``seed`` and the epoch. Since the epoch travels in the key, :class:`CocoDataset` draws
    the same augmentation for it in every process and worker, persistent or not.

    Works with ``accelerator.prepare(DataLoader(dataset, sampler=EpochSampler(dataset), ...))``: every process runs
    through the same order and keeps its share of the batches. Accelerate counts the epochs itself and calls
    :meth:`set_epoch` at the start of each; to start elsewhere (on resuming) call ``loader.set_epoch(epoch)``, since
    the prepared loader overrides what was set on the sampler.

    Args:
        dataset: anything with a length.
        shuffle: False for the order of the data set.
        seed: not negative.
        indices: of the samples to yield; None for all.

    Raises:
        ValueError: for a negative seed or epoch.
    """

    def __init__(self, dataset: Sized, shuffle: bool = True, seed: int = 0, indices: Sequence[int] | None = None):
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        self.dataset = dataset
        self.shuffle = shuffle
        self.seed = seed
        self.indices = range(len(dataset)) if indices is None else indices
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration, counted from 0."""
        if epoch < 0:
            raise ValueError(f"epoch must not be negative, got {epoch}")
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch, size = self.epoch, len(self.indices)
        if self.shuffle:
            generator = torch.Generator().manual_seed(_mix(self.seed, epoch))
            order = torch.randperm(size, generator=generator).tolist()
        else:
            order = list(range(size))
        for index in order:
            yield epoch, self.indices[index]


@contextmanager
def seeded(seed: int, epoch: int, index: int) -> Iterator[None]:
    """Inside, the CPU generators of torch, numpy and ``random`` depend on these three numbers alone.

    Their states are restored afterwards; GPU generators are not touched.
    """
    value = _mix(seed, epoch, index + 1)
    # torch.manual_seed would also seed the GPUs, and so tie a model's dropout to its data.
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    torch.default_generator.manual_seed(value)
    np.random.seed(value % 2**32)  # noqa: NPY002 (what a user's transform may draw from)
    random.seed(value)
    try:
        yield
    finally:
        torch.set_rng_state(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        random.setstate(before[2])


def _mix(*numbers: int) -> int:
    """A well spread 64-bit number from small ones."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
