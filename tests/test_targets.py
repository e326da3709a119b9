import warnings
from unittest.mock import Mock

import pytest
import torch

import groupdetr_fast as gd
from groupdetr_fast import targets as targets_module


def test_packing():
    packed = gd.PackedTargets.from_list(
        [
            {"labels": torch.tensor([3, 1]), "boxes": torch.rand(2, 4)},
            {"labels": torch.tensor([], dtype=torch.int64), "boxes": torch.zeros(0, 4)},
            {"labels": torch.tensor([2]), "boxes": torch.rand(1, 4), "extra": "ignored"},
        ]
    )
    assert packed.labels.tolist() == [[3, 1], [0, 0], [2, 0]]
    assert packed.boxes.shape == (3, 2, 4)
    assert not packed.boxes[1].any()
    assert packed.num_targets.tolist() == [2, 0, 1]
    assert packed.sizes == (2, 0, 1)
    assert packed.valid.tolist() == [[True, True], [False, False], [True, False]]
    assert (packed.batch_size, packed.max_targets, packed.masks) == (3, 2, None)


def test_sizes_go_to_a_gpu_from_pinned_memory(monkeypatch):
    """A copy from other memory waits for the GPU."""
    tensor = Mock()
    monkeypatch.setattr(torch, "tensor", tensor)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for device, pinned in (("cuda", True), ("cpu", False), ("meta", False)):
        targets_module.tensor_on((2, 1), torch.device(device))
        tensor.assert_called_with((2, 1), pin_memory=pinned)
        tensor.return_value.to.assert_called_with(torch.device(device), non_blocking=pinned)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_packing_on_cuda_does_not_wait():
    targets = [
        {"labels": torch.zeros(size, device="cuda").long(), "boxes": torch.rand(size, 4).cuda()} for size in (2, 1)
    ]
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        packed = gd.PackedTargets.from_list(targets)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert packed.num_targets.tolist() == [2, 1]


def test_masks_and_device():
    targets = [{"labels": torch.tensor([0]), "boxes": torch.rand(1, 4), "masks": torch.ones(1, 5, 6, dtype=torch.bool)}]
    moved = gd.PackedTargets.from_list(targets).to("meta")
    assert moved.device.type == "meta"
    assert moved.masks[0].shape == (1, 5, 6)
    assert moved.masks[0].device.type == "meta"


def test_nothing_but_empty_images():
    packed = gd.PackedTargets.from_list([{"labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)}] * 2)
    assert packed.labels.shape == (2, 0)
    assert packed.valid.shape == (2, 0)


LABELS, BOXES = torch.tensor([0, 1]), torch.rand(2, 4)
GOOD = {"labels": LABELS, "boxes": BOXES}


@pytest.mark.parametrize(
    ("targets", "error", "message"),
    [
        ([], ValueError, "targets must hold at least one image"),
        ([{"labels": LABELS}], ValueError, r'targets\[0\] lacks the key "boxes"'),
        ([{"labels": LABELS, "boxes": BOXES[:1]}], ValueError, r"boxes must have shape \[2, 4\], got \[1, 4\]"),
        ([{"labels": LABELS[:, None], "boxes": BOXES}], ValueError, r"labels must have shape \[T\]"),
        ([{"labels": LABELS.float(), "boxes": BOXES}], TypeError, "labels must be integers, got torch.float32"),
        ([{"labels": LABELS, "boxes": BOXES.long()}], TypeError, "boxes must be floating point, got torch.int64"),
        (
            [{"labels": LABELS, "boxes": BOXES}, {"labels": LABELS, "boxes": BOXES.to("meta")}],
            ValueError,
            r"targets\[1\]: labels and boxes must lie on cpu",
        ),
        (
            [GOOD, {"labels": torch.tensor([0, -1]), "boxes": BOXES}],
            ValueError,
            r"targets\[1\], row 1: labels .* got -1",
        ),
        (
            [{"labels": LABELS, "boxes": torch.tensor([[0.5, 0.5, 0.1, 0.1], [50, 50, 20, 10]])}],
            ValueError,
            r"targets\[0\], row 1: boxes must be \(cx, cy, width, height\) divided by .* got \(50, 50, 20, 10\)",
        ),
        (
            [GOOD, {"labels": LABELS, "boxes": torch.tensor([[0.5, 0.5, -0.1, 0.1], [0.5, 0.5, 0.1, 0.1]])}],
            ValueError,
            r"targets\[1\], row 0: boxes .* got \(0\.5, 0\.5, -0\.1, 0\.1\)",
        ),
        (
            [{"labels": LABELS, "boxes": torch.tensor([[0.5, 0.5, 0.1, 0.1], [0.5, float("nan"), 0.1, 0.1]])}],
            ValueError,
            r"targets\[0\], row 1: boxes .* got \(0\.5, nan",
        ),
        (
            [{"labels": LABELS, "boxes": BOXES, "masks": torch.ones(1, 2, 2)}],
            ValueError,
            r"masks must have shape \[2, H, W\]",
        ),
        (
            [{"labels": LABELS, "boxes": BOXES, "masks": torch.ones(2, 2, 2)}],
            TypeError,
            r"targets\[0\]: masks must be bool, got torch.float32",
        ),
        ([{"labels": [3, 1], "boxes": BOXES}], TypeError, r"targets\[0\]: labels must be a tensor, got a list"),
        ([{"labels": LABELS, "boxes": BOXES.numpy()}], TypeError, "boxes must be a tensor, got a ndarray"),
        ([{**GOOD, "masks": None}], TypeError, "masks must be a tensor, got a NoneType"),
        (GOOD, TypeError, "targets must be a list with one dictionary for each image, got a dictionary"),
    ],
)
def test_wrong_targets_are_refused(targets, error, message):
    with pytest.raises(error, match=message):
        gd.PackedTargets.from_list(targets)


def test_rounded_boxes_and_empty_ones_are_taken():
    boxes = torch.tensor([[0.5, 0.5, 1.004, 1.0], [0.5, -0.002, 0.0, 0.1]], dtype=torch.bfloat16)
    assert gd.PackedTargets.from_list([{"labels": LABELS, "boxes": boxes}]).sizes == (2,)


@pytest.mark.parametrize(
    ("boxes", "warns"),
    [
        ([[[0.1, 0.1, 0.9, 0.9], [0.7, 0.2, 0.8, 0.4]], [[0.5, 0.6, 0.7, 0.9]]], True),  # corners
        ([[[0.1, 0.1, 0.9, 0.9], [0.5, 0.5, 0.1, 0.2]], []], False),  # one that is not clipped, and another
        ([[[0.5, 0.5, 1.0, 1.0], [0.4, 0.4, 0.8, 0.8]], []], False),  # large ones, within the image
        ([[[0.1, 0.1, 0.9, 0.9]], []], False),  # one alone says little
    ],
)
def test_corners_in_the_place_of_centres_give_a_warning(boxes, warns):
    tensors = [torch.tensor(each).reshape(-1, 4) for each in boxes]
    targets = [{"labels": torch.zeros(len(each), dtype=torch.int64), "boxes": each} for each in tensors]
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        gd.PackedTargets.from_list(targets)
    assert [str(each.message)[:46] for each in found] == [
        "all boxes of a batch look like (x1, y1, x2, y2)"[:46]
    ] * warns


def test_values_on_other_devices_are_not_looked_at():
    targets = {"labels": torch.zeros(2, dtype=torch.int64, device="meta"), "boxes": torch.zeros(2, 4, device="meta")}
    packed = gd.PackedTargets.from_list([targets])
    assert packed.largest_label is None
    packed.check_labels(1)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_labels_are_compared_with_the_classes(device):
    packed = gd.PackedTargets.from_list([GOOD, {"labels": torch.tensor([3, 7]), "boxes": BOXES}])
    assert packed.to(device).largest_label == 7
    packed.check_labels(8)
    with pytest.raises(ValueError, match=r"targets\[1\], row 1: the label 7 is not in 0 \.\.\. 6, the model's"):
        packed.check_labels(7)


@pytest.mark.parametrize("name", ["conditional_detr_r50", "dn_detr_r50", "mask2former_r50"])
def test_models_and_criteria_refuse_other_targets(name):
    sizes = {"num_queries": 4, "d_model": 16, "num_heads": 2, "encoder_layers": 1, "decoder_layers": 1}
    stages = "conv:8-16-16-16" if name == "mask2former_r50" else "conv:8-16"
    model = gd.build_model(name, num_classes=3, num_groups=2, dim_feedforward=16, backbone=stages, **sizes)
    criterion, images = gd.build_criterion(model), torch.rand(1, 3, 32, 32)
    target = {"labels": LABELS, "boxes": BOXES, "masks": torch.ones(2, 32, 32, dtype=torch.bool)}
    with pytest.raises(TypeError, match=r"targets must be packed by PackedTargets.from_list\(targets\), got a list"):
        model(images, targets=[target])
    with pytest.raises(TypeError, match=r"targets must be packed by PackedTargets.from_list\(targets\), got a list"):
        criterion(model(images, targets=gd.PackedTargets.from_list([target])), [target])
    wrong = gd.PackedTargets.from_list([{**target, "labels": torch.tensor([0, 3])}])
    with pytest.raises(ValueError, match=r"targets\[0\], row 1: the label 3 is not in 0 ... 2"):
        criterion(model(images, targets=wrong), wrong)
