import pytest
import torch
import torchvision

from groupdetr_fast.boxes import (
    aligned_generalized_box_iou,
    aligned_generalized_box_iou_of_centers,
    box_area,
    cxcywh_to_xyxy,
    pairwise_generalized_box_iou,
    xyxy_to_cxcywh,
)


def random_boxes(*shape):
    return torch.rand(*shape, 4, dtype=torch.float64) * 0.5 + 0.2


def test_conversions_equal_torchvision():
    boxes = random_boxes(3, 5)
    expected = torchvision.ops.box_convert(boxes, "cxcywh", "xyxy")
    torch.testing.assert_close(cxcywh_to_xyxy(boxes), expected)
    torch.testing.assert_close(xyxy_to_cxcywh(expected), boxes)
    torch.testing.assert_close(box_area(expected[0]), torchvision.ops.box_area(expected[0]))


def test_generalized_iou_equals_torchvision():
    first, second = cxcywh_to_xyxy(random_boxes(6)), cxcywh_to_xyxy(random_boxes(4))
    expected = torchvision.ops.generalized_box_iou(first, second)
    torch.testing.assert_close(pairwise_generalized_box_iou(first, second), expected)
    torch.testing.assert_close(aligned_generalized_box_iou(first[:4], second), expected[:4].diag())


@pytest.mark.parametrize("boxes", [[0.0, 0.0, 0.0, 0.0], [0.3, 0.4, 0.3, 0.4]])
def test_empty_boxes_give_zero_and_no_nan_gradient(boxes):
    boxes = torch.tensor(boxes, requires_grad=True)
    value = aligned_generalized_box_iou(boxes, boxes.detach())
    value.backward()
    assert value == 0
    assert torch.isfinite(boxes.grad).all()


def test_generalized_iou_gradient():
    first, second = cxcywh_to_xyxy(random_boxes(5)), cxcywh_to_xyxy(random_boxes(5))
    assert torch.autograd.gradcheck(aligned_generalized_box_iou, (first.requires_grad_(), second))


def test_generalized_iou_of_centers_is_that_of_corners_bit_for_bit():
    """Of boxes that overlap, do not, are equal or empty; and its gradient."""
    first, second = (torch.rand(2, 200, 4) * 0.5 for _ in range(2))
    second[0, :20] = first[0, :20]
    first[1, :20, 2:] = 0
    second[1, :10, 2:] = 0
    gradients, values = [], []
    for run in (
        aligned_generalized_box_iou_of_centers,
        lambda *boxes: aligned_generalized_box_iou(*map(cxcywh_to_xyxy, boxes)),
    ):
        boxes = first.clone().requires_grad_()
        values.append(run(boxes, second))
        gradients.append(torch.autograd.grad(values[-1].sum(), boxes)[0])
    assert torch.equal(*values)
    torch.testing.assert_close(*gradients)
    assert torch.isfinite(gradients[0]).all()
