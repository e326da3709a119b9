"""The order of samples, and random numbers that depend on nothing but seed, epoch and sample."""

import random
from collections.abc import Iterator, Sequence, Sized
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

__all__ = ["EpochSampler", "generator_of", "seeded"]

_COPY = 1_000_000  # epochs between a sample and the same once more in one epoch: no run has as many


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
        repeats: how often each of these comes in an epoch, on average: at least 1. An epoch has as many samples as
            their sum, rounded up. A sample that comes again is augmented in another way. None: each comes once.

    Raises:
        ValueError: for a negative seed or epoch, or repeats that do not fit or are less than 1.
    """

    def __init__(
        self,
        dataset: Sized,
        shuffle: bool = True,
        seed: int = 0,
        indices: Sequence[int] | None = None,
        repeats: Tensor | None = None,
    ):
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        self.dataset = dataset
        self.shuffle = shuffle
        self.seed = seed
        self.indices = range(len(dataset)) if indices is None else indices
        if repeats is not None and (repeats.shape != (len(self.indices),) or bool((repeats < 1).any())):
            raise ValueError(f"repeats must be {len(self.indices)} numbers of at least 1, one for each sample")
        self.repeats = repeats
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration, counted from 0."""
        if epoch < 0:
            raise ValueError(f"epoch must not be negative, got {epoch}")
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.indices) if self.repeats is None else int(self.repeats.double().sum().ceil())

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch, size = self.epoch, len(self.indices)
        generator = torch.Generator().manual_seed(_mix(self.seed, epoch))
        if self.repeats is not None:
            yield from self._repeated(self.repeats.double(), generator)
            return
        order = torch.randperm(size, generator=generator).tolist() if self.shuffle else range(size)
        for index in order:
            yield epoch, self.indices[index]

    def _repeated(self, repeats: Tensor, generator: torch.Generator) -> Iterator[tuple[int, int]]:
        """Keys of an epoch: each sample as often as its repeats say, rounded up or down at random.

        Systematic sampling: on a line with a stretch for each sample, as long as its repeats, the marks at distance 1
        choose. So there are as many in every epoch, and each sample has its repeats on average.
        """
        total = len(self)
        order = torch.randperm(len(repeats), generator=generator)
        ends = (repeats[order] * (total / repeats.sum())).cumsum(0)
        ends[-1] = total
        marks = (ends + torch.rand((), generator=generator, dtype=torch.float64)).floor().long()
        counts = torch.empty_like(marks).scatter_(0, order, marks.diff(prepend=marks.new_zeros(1)))
        samples = torch.arange(len(repeats)).repeat_interleave(counts)
        copies = torch.arange(total) - (counts.cumsum(0) - counts).repeat_interleave(counts)
        shuffled = torch.randperm(total, generator=generator) if self.shuffle else torch.arange(total)
        for place in shuffled.tolist():
            yield self.epoch + _COPY * int(copies[place]), self.indices[int(samples[place])]


@contextmanager
def seeded(seed: int, epoch: int, index: int) -> Iterator[None]:
    """Inside, the CPU generators of torch, numpy and ``random`` depend on these three numbers alone.

    Their states are restored afterwards; GPU generators are not touched.
    """
    value = _seed_of(seed, epoch, index)
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


def generator_of(seed: int, epoch: int, index: int) -> torch.Generator:
    """A generator that draws what torch's own one draws inside :func:`seeded`."""
    return torch.Generator().manual_seed(_seed_of(seed, epoch, index))


def _seed_of(seed: int, epoch: int, index: int) -> int:
    return _mix(seed, epoch, index + 1)


def _mix(*numbers: int) -> int:
    """A well spread 64-bit number from small ones."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
