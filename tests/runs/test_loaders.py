"""The loaders of a run."""

import json
import os
import time
from dataclasses import replace

import pytest
import torch
from PIL import Image

from groupdetr_fast.data import CocoDataset, DataError
from groupdetr_fast.data import config as data_config
from groupdetr_fast.data.config import DataConfig
from groupdetr_fast.runs.config import CocoTrainingConfig
from groupdetr_fast.runs.loaders import evaluation_loader, training_loader
from groupdetr_fast.runs.recipes import find_recipe
from groupdetr_fast.training.config import OptimizationConfig


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


@pytest.mark.parametrize(("workers", "accumulate"), [(2, 8), (2, 7), (1, 1)])
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


@pytest.mark.parametrize(
    ("cores", "limit", "processes", "expected"),
    [
        (2, "max 100000", 1, 2),
        (2, None, 4, 1),
        (64, None, 4, 8),
        (24, "max 100000", 8, 3),
        (64, "300000 100000", 1, 3),  # a container that gets the time of three cores
        (64, "50000 100000", 1, 1),
    ],
)
def test_workers_fit_the_machine(monkeypatch, tmp_path, cores, limit, processes, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    monkeypatch.setattr(data_config, "_CPU_LIMIT", tmp_path / "cpu.max")
    if limit is not None:
        (tmp_path / "cpu.max").write_text(f"{limit}\n")
    assert DataConfig().resolved_workers() == expected
    assert training_loader(CountedSamples(), CocoTrainingConfig()).num_workers == expected
    assert [DataConfig(workers=number).resolved_workers() for number in (0, 5)] == [0, 5]


def test_batches_loaded_ahead_are_a_setting():
    config = CocoTrainingConfig(optimization=OptimizationConfig(accumulate=5))
    for settings, expected in (
        ({"workers": 2}, 4),
        ({"workers": 2, "prefetch_factor": 7}, 7),
        ({"workers": 0, "prefetch_factor": 7}, None),
    ):
        loader = training_loader(CountedSamples(), replace(config, data=DataConfig(**settings)))
        assert loader.prefetch_factor == expected
    with pytest.raises(ValueError, match="prefetch_factor must be at least 1, got 0"):
        DataConfig(prefetch_factor=0)
    with pytest.raises(ValueError, match="workers must not be negative, got -1"):
        DataConfig(workers=-1)


@pytest.fixture
def some_empty(tmp_path):
    """Five images: 1 and 4 have objects, 2 a crowd region, 3 and 5 nothing."""
    images = [{"id": number, "file_name": f"{number}.png", "width": 8, "height": 8} for number in range(1, 6)]
    for image in images:
        Image.new("RGB", (8, 8)).save(tmp_path / image["file_name"])
    box = {"category_id": 1, "bbox": [1, 1, 4, 4], "area": 16}
    annotations = [
        {"id": number, "image_id": image_id, "iscrowd": int(image_id == 2), **box}
        for number, image_id in enumerate((1, 4, 4, 2), start=1)
    ]
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "a"}]}
    (tmp_path / "instances.json").write_text(json.dumps(content))
    return CocoDataset(tmp_path, tmp_path / "instances.json")


def test_images_without_objects_are_left_out(some_empty):
    for filter_empty, expected in ((False, [1, 2, 3, 4, 5]), (True, [1, 4])):
        config = CocoTrainingConfig(data=DataConfig(workers=0, filter_empty=filter_empty))
        loader = training_loader(some_empty, config)
        assert sorted(image_id for batch in loader for image_id in batch.image_ids) == expected
        assert len(loader) == -(-len(expected) // 2)


def test_a_set_without_objects_is_not_emptied(some_empty):
    content = json.loads(some_empty.annotation_file.read_text())
    some_empty.annotation_file.write_text(json.dumps({**content, "annotations": []}))
    with pytest.raises(DataError, match="no image with objects"):
        CocoDataset(some_empty.image_folder, some_empty.annotation_file).indices_with_objects()


def test_evaluation_has_a_batch_size_of_its_own(some_empty):
    config = CocoTrainingConfig(data=DataConfig(workers=0), optimization=OptimizationConfig(batch_size=3))
    for size, expected in ((None, [[1, 2, 3], [4, 5]]), (1, [[1], [2], [3], [4], [5]])):
        loader = evaluation_loader(some_empty, replace(config, eval_batch_size=size))
        assert [batch.image_ids for batch in loader] == expected
    assert [batch.image_ids for batch in evaluation_loader(some_empty, config, images=2)] == [[1, 2]]
    with pytest.raises(ValueError, match="eval_batch_size must be at least 1"):
        replace(config, eval_batch_size=0)


def test_recipes_read_their_data_as_the_originals_do():
    mask2former, dab, conditional = (
        find_recipe(f"group_{name}_r50_12e").config() for name in ("mask2former", "dab_detr", "conditional_detr")
    )
    assert [each.data.filter_empty for each in (mask2former, dab, conditional)] == [True, False, False]
    assert [each.eval_batch_size for each in (mask2former, dab, conditional)] == [1, 1, None]
