"""Batches of images that lie on a device are those that are loaded from files."""

import json
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from PIL import Image

from groupdetr_fast.data import (
    AugmentationConfig,
    CocoDataset,
    DataError,
    collate,
    device_images,
    eval_transforms,
    train_transforms,
)
from groupdetr_fast.data.device_images import CacheRefused, DeviceImages, as_it_is

SIZES = [(24, 32), (40, 20), (32, 32), (16, 48), (24, 32)]  # width, height of the images
FIXED = AugmentationConfig(short_sides=(24,), max_size=40, crop=0, flip=0.5, eval_short_side=28, eval_max_size=None)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Five noisy images of several sizes, with 0 to 4 objects of three classes."""
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    images, annotations = [], []
    for number, (width, height) in enumerate(SIZES):
        Image.fromarray(random.integers(256, size=(height, width, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        images.append({"id": 10 + number, "file_name": f"{number}.png", "width": width, "height": height})
        for _ in range(number):
            x, y = (int(random.integers(side // 2)) for side in (width, height))
            box = [x, y, *(int(random.integers(4, side // 2)) for side in (width, height))]
            entry = {"image_id": 10 + number, "category_id": int(random.integers(3)) + 1, "bbox": box, "iscrowd": 0}
            annotations.append({"id": len(annotations) + 1, "area": box[2] * box[3], **entry})
    categories = [{"id": number, "name": str(number)} for number in (1, 2, 3)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "instances.json").write_text(json.dumps(content))
    return folder


def on_host(folder, transforms, **options):
    return CocoDataset(folder, folder / "instances.json", transforms, seed=3, **options)


def assert_equal(found, expected):
    assert found.image_ids == expected.image_ids
    assert found.normalization == expected.normalization
    for name in ("images", "masks", "original_sizes"):
        first, second = getattr(found, name), getattr(expected, name)
        assert first.dtype == second.dtype, name
        assert torch.equal(first, second), name
    for each in fields(expected.targets):
        first, second = getattr(found.targets, each.name), getattr(expected.targets, each.name)
        if isinstance(second, torch.Tensor):
            assert first.dtype == second.dtype, each.name
            assert first.is_contiguous()
            assert torch.equal(first, second), each.name
        else:
            assert first == second, each.name


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"flip": 0.0},
        {"flip": 1.0},
        {"square": True},
        {"image_mean": (0.5, 0.4, 0.3)},
        {"max_size": None},
    ],
)
def test_batches_are_those_of_the_host(folder, changes):
    config = replace(FIXED, **changes)
    dataset = on_host(folder, train_transforms(config))
    held = DeviceImages(dataset, config, CPU, training=True)
    assert len(held) == len(dataset) == 5
    flips = 0
    for epoch in range(4):
        for indices in ([0, 1, 2, 3, 4], [3, 1], [0], [4, 4, 0]):
            keys = [(epoch, index) for index in indices]
            expected = collate([dataset[key] for key in keys])
            found = as_it_is(held.__getitems__(keys))
            assert_equal(found, expected)
            assert_equal(found.to("cpu"), expected.to("cpu"))
            flips += sum(held._row(*key) >= 5 for key in keys)
    assert (flips > 0) == (config.flip > 0)
    assert_equal(held[1, 3], collate([dataset[1, 3]]))


def test_batches_of_images_of_one_size_are_those_of_the_host(folder):
    config = replace(FIXED, square=True)
    dataset = on_host(folder, eval_transforms(config))
    held = DeviceImages(dataset, config, CPU, training=False)
    assert held.nbytes == 5 * 3 * 28 * 28
    keys = [(0, index) for index in (2, 0, 3)]
    assert_equal(held.__getitems__(keys), collate([dataset[key] for key in keys]))
    assert not held.__getitems__(keys).masks.any()


def test_batches_of_evaluation_are_those_of_the_host(folder):
    dataset = on_host(folder, eval_transforms(FIXED))
    held = DeviceImages(dataset, FIXED, CPU, training=False)
    keys = [(7, index) for index in range(5)]
    assert_equal(held.__getitems__(keys), collate([dataset[key] for key in keys]))


def test_nothing_is_read_twice(folder, monkeypatch):
    """Neither files nor random numbers of the process are touched by a batch."""
    held = DeviceImages(on_host(folder, train_transforms(FIXED)), FIXED, CPU, training=True)
    monkeypatch.setattr(CocoDataset, "__getitem__", None)
    monkeypatch.setattr(CocoDataset, "image", None)
    before = torch.get_rng_state()
    held.__getitems__([(2, index) for index in range(5)])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crop": 0.5}, r"and crop=0\.5 makes another one each time: set crop to 0; or leave cache_on at host"),
        ({"short_sides": (24, 32)}, r"short_sides=\(24, 32\) makes another one each time: give short_sides one size"),
        ({"jitter_size": 32}, "jitter_size=32 makes another one each time: leave jitter_size out"),
        ({"copy_paste": 0.5}, r"copy_paste=0\.5 .* set copy_paste to 0"),
        ({"transforms": "own.py:build"}, r"transforms=own\.py:build .* leave transforms out"),
    ],
)
def test_what_has_too_many_outcomes_is_refused_by_name(folder, changes, message):
    config = replace(FIXED, **changes)
    with pytest.raises(CacheRefused, match=f"cache_on device holds each image as it is and mirrored, .*{message}"):
        DeviceImages(on_host(folder, train_transforms(FIXED)), config, CPU, training=True)
    assert len(DeviceImages(on_host(folder, None), config, CPU, training=False)) == 5  # evaluation draws nothing


def test_images_that_take_more_than_half_of_the_free_memory_are_refused_before_one_is_read(folder, monkeypatch):
    dataset = on_host(folder, train_transforms(FIXED))
    monkeypatch.setattr(CocoDataset, "__getitem__", None)
    monkeypatch.setattr(device_images, "_GIB", 2**10)
    monkeypatch.setattr(device_images, "_free_memory", lambda device: 25 * 2**10)
    nbytes = 2 * 3 * sum(height * width for height, width in [(32, 24), (20, 40), (24, 24), (40, 13), (32, 24)])
    with pytest.raises(
        CacheRefused, match=rf"10 images take {nbytes / 2**10:.2f} GiB, which is more than .*\(12.50 GiB"
    ):
        DeviceImages(dataset, FIXED, CPU, training=True)


@pytest.mark.parametrize("part", ["_Pixels", "_Targets"])
def test_a_device_without_memory_left_refuses_them(folder, monkeypatch, part):
    def refuse(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")

    monkeypatch.setattr(getattr(device_images, part), "of", refuse)
    with pytest.raises(CacheRefused, match=r"cache_on device: cpu is out of memory for 10 images of .* leave cache_on"):
        DeviceImages(on_host(folder, train_transforms(FIXED)), FIXED, CPU, training=True)


def test_a_damaged_image_is_named(folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "3.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"3\.png \(image id 13\) cannot be read"):
        DeviceImages(on_host(tmp_path, None), FIXED, CPU, training=True)


def test_detectors_of_masks_are_refused(folder, tmp_path):
    content = json.loads((folder / "instances.json").read_text())
    for entry in content["annotations"]:
        x, y, width, height = entry["bbox"]
        entry["segmentation"] = [[x, y, x + width, y, x + width, y + height]]
    (tmp_path / "masks.json").write_text(json.dumps(content))
    dataset = CocoDataset(folder, tmp_path / "masks.json", masks=True)
    with pytest.raises(CacheRefused, match="cache_on device is for detectors of boxes"):
        DeviceImages(dataset, FIXED, CPU, training=True)


@pytest.mark.gpu
def test_batches_on_a_gpu_are_those_of_the_host(folder):
    for training, transforms in ((True, train_transforms(FIXED)), (False, eval_transforms(FIXED))):
        dataset = on_host(folder, transforms)
        held = DeviceImages(dataset, FIXED, torch.device("cuda"), training=training)
        keys = [(1, index) for index in range(5)]
        found, expected = held.__getitems__(keys), collate([dataset[key] for key in keys])
        assert found.images.device.type == found.targets.boxes.device.type == "cuda"
        assert_equal(
            replace(
                found,
                images=found.images.cpu(),
                masks=found.masks.cpu(),
                original_sizes=found.original_sizes.cpu(),
                targets=found.targets.to("cpu"),
            ),
            expected,
        )
        torch.testing.assert_close(found.to("cuda").images.cpu(), expected.to("cpu").images, rtol=0, atol=1e-6)
