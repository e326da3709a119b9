"""Files are read ahead, images of similar size share a batch, and the host waits for the device once a batch."""

import importlib
import threading
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from blob_detector import BlobDetector, draw
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import groupdetr_fast as gd
from groupdetr_fast.data import DataError, config
from groupdetr_fast.models import DetectorOutput
from groupdetr_fast.prediction.batches import batches_by_size, default_workers, read_ahead

images_module = importlib.import_module("groupdetr_fast.prediction.images")


@dataclass(frozen=True)
class Sample:
    number: int
    size: tuple[int, int]


def batches(sizes, batch_size, **settings):
    samples = (Sample(number, size) for number, size in enumerate(sizes))
    return [[each.number for each in batch] for batch in batches_by_size(samples, batch_size, **settings)]


def test_images_of_one_size_keep_their_order_and_do_not_wait_for_others():
    taken = []

    def samples():
        for number in range(7):
            taken.append(number)
            yield Sample(number, (8, 8))

    found = batches_by_size(samples(), 3)
    assert [each.number for each in next(found)] == [0, 1, 2]
    assert taken == [0, 1, 2]
    assert [[each.number for each in batch] for batch in found] == [[3, 4, 5], [6]]


def test_images_of_similar_size_share_a_batch():
    tall, wide = (12, 8), (8, 12)
    assert batches([tall, wide] * 4, 4) == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert batches([tall, wide] * 4, 4, ordered=True) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert batches([(8, 9), (20, 8), (8, 10), (21, 8)], 2) == [[0, 2], [1, 3]]


@pytest.mark.parametrize("ordered", [False, True])
def test_every_image_is_in_one_batch_and_the_oldest_in_the_next(ordered):
    rng = np.random.default_rng(0)
    sizes = [tuple(int(side) for side in rng.integers(1, 50, 2)) for _ in range(101)]
    found = batches(sizes, 4, ordered=ordered)
    assert sorted(number for batch in found for number in batch) == list(range(101))
    assert all(len(batch) == 4 for batch in found[:-1])
    left = set(range(101))
    for batch in found:
        assert min(left) in batch
        left -= set(batch)


def padded_pixels(model):
    return sum(count * height * width for count, _, height, width in model.batches)


def test_less_is_padded_and_the_results_keep_their_order():
    tall = [draw(96, 64, [(0, 4, 4, 24, 24 + number)]) for number in range(4)]
    wide = [draw(64, 96, [(1, 4, 4, 24 + number, 24)]) for number in range(4)]
    mixed = [image for pair in zip(tall, wide, strict=True) for image in pair]
    model = BlobDetector(square=False, eval_short_side=64, eval_max_size=None)
    found = gd.predict(model, mixed, batch_size=4)
    assert [each["class_names"] for each in found] == [["red"], ["green"]] * 4
    for number, each in enumerate(found):
        size = (each["boxes"][0, 2:] - each["boxes"][0, :2]).tolist()
        assert max(size) == pytest.approx(20 + number // 2, abs=0.1)
    assert padded_pixels(model) == 8 * 64 * 96


@pytest.fixture
def folder(tmp_path):
    for number in range(9):
        scene = draw(64, 64, [(number % 3, 4, 4, 24 + number, 24)])
        Image.fromarray(scene.permute(1, 2, 0).numpy()).save(tmp_path / f"{number}.png")
    return sorted(tmp_path.iterdir())


@pytest.mark.parametrize("workers", [0, 1, 4, None])
def test_threads_change_no_result(folder, workers):
    found = gd.predict(BlobDetector(), folder, batch_size=2, workers=workers)
    assert [each["labels"].tolist() for each in found] == [[number % 3] for number in range(9)]
    assert [round(float(each["boxes"][0, 2])) for each in found] == [24 + number for number in range(9)]


def test_files_are_read_while_others_are(folder, monkeypatch):
    """Reading one image after another would never bring two threads here."""
    together = threading.Barrier(2, timeout=30)
    read = images_module.as_rgb

    def slowly(image, **settings):
        together.wait()
        return read(image, **settings)

    monkeypatch.setattr(images_module, "as_rgb", slowly)
    assert len(gd.predict(BlobDetector(), folder[:4], workers=2)) == 4


def test_a_file_that_cannot_be_read_is_named_when_its_turn_comes(folder):
    folder[5].write_bytes(b"damaged")
    model = BlobDetector()
    with pytest.raises(DataError, match=r"image file .*5.png cannot be read"):
        gd.predict(model, folder, batch_size=2, workers=2)
    assert len(model.batches) == 2, "those before it"
    threads = [thread.name for thread in threading.enumerate() if thread.name.startswith("read-images")]
    assert not threads


def test_what_is_read_ahead_is_bounded():
    started = []

    def read(number, item):
        assert number == item
        started.append(item)
        return item

    items = read_ahead(range(100), read, workers=2, ahead=5, in_thread=lambda _: True)
    assert next(items) == 0
    assert next(items) == 1
    assert len(started) <= 6
    items.close()
    assert list(read_ahead(range(20), read, workers=3, ahead=4, in_thread=lambda item: item % 2 == 0)) == list(
        range(20)
    )


@pytest.mark.parametrize("workers", [-1, -5])
def test_a_negative_number_of_threads_is_refused(workers):
    with pytest.raises(ValueError, match="workers must not be negative"):
        gd.predict(BlobDetector(), [], workers=workers)


def test_threads_are_as_many_as_the_control_group_gets_time_of(tmp_path, monkeypatch):
    monkeypatch.setattr(config.os, "sched_getaffinity", lambda _: range(32), raising=False)
    monkeypatch.setattr(config, "_CPU_LIMIT", tmp_path / "cpu.max")
    assert default_workers() == 8
    (tmp_path / "cpu.max").write_text("200000 100000\n")
    assert default_workers() == 2


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.copies, self.reads = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.name()
        given = [each for each in args if isinstance(each, torch.Tensor)]
        if name == "aten::_to_copy" and given[0].device.type == "cuda" and result.device.type == "cpu":
            self.copies += 1
        self.reads += name in ("aten::_local_scalar_dense", "aten::nonzero") and given[0].device.type == "cuda"
        return result


@pytest.mark.parametrize("no_object", [False, True])
@pytest.mark.parametrize("by_class", [False, True])
def test_the_host_waits_once_for_the_boxes_of_a_batch(by_class, no_object):
    with FakeTensorMode():
        logits = torch.randn(2, 8, 20, 5 + no_object, device="cuda")
        out = DetectorOutput(logits, torch.rand(2, 8, 20, 4, device="cuda"), gd.QueryGroups(1, 20), no_object=no_object)
        threshold = torch.rand(5, device="cuda") if by_class else 0.0
        sizes = torch.ones(8, 2, dtype=torch.int64)
        with Waits() as waits:
            try:
                found = gd.postprocess(out, sizes, score_threshold=threshold, device="cpu")
                assert len(found) == 8
                assert found[0]["boxes"].device.type == "cpu"
            except torch._subclasses.fake_tensor.DataDependentOutputException:
                assert by_class, "the numbers of detections, which are counted on the host"
    assert (waits.copies, waits.reads) == (1, 0)
