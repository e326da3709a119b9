"""The loaders of a run."""

import time
from dataclasses import replace

import pytest
import torch

from groupdetr_fast.data.config import DataConfig
from groupdetr_fast.runs.config import CocoTrainingConfig
from groupdetr_fast.runs.loaders import training_loader
from groupdetr_fast.training.optimization import OptimizationConfig


class CountedSamples:
    """Samples that processes count together as they are loaded."""

    def __init__(self):
        self.loaded = torch.zeros(100, dtype=torch.bool).share_memory_()

    def __len__(self):
        return len(self.loaded)

    def __getitem__(self, key):
        self.loaded[key[1]] = True
        size = torch.tensor([4, 4])
        target = {"labels": torch.zeros(1, dtype=torch.int64), "boxes": torch.rand(1, 4), "image_id": key[1]}
        return torch.zeros(3, 4, 4), {**target, "original_size": size}


@pytest.mark.parametrize(("workers", "accumulate"), [(2, 8), (3, 7), (2, 1)])
def test_the_batches_of_the_next_step_are_loaded_while_one_is_computed(workers, accumulate):
    config = replace(
        CocoTrainingConfig(),
        data=DataConfig(workers=workers),
        optimization=OptimizationConfig(batch_size=2, accumulate=accumulate),
    )
    dataset = CountedSamples()
    batches = iter(training_loader(dataset, config))
    for _ in range(accumulate):
        next(batches)
    deadline = time.monotonic() + 30
    while dataset.loaded.sum() < 2 * 2 * accumulate and time.monotonic() < deadline:
        time.sleep(0.05)
    assert dataset.loaded.sum() >= 2 * 2 * accumulate  # of two steps, two images a batch
