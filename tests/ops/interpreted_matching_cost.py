"""The Triton kernel of matching_cost against its reference; see test_triton_interpreted.py."""

import pytest
import torch

from groupdetr_fast.ops.matching_cost import triton_kernels
from groupdetr_fast.ops.matching_cost.reference import matching_cost_reference
from groupdetr_fast.testing import assert_matches_reference, poisoned_memory

DEFAULTS = (2.0, 5.0, 2.0, 0.25, 2.0)  # class_weight, l1_weight, giou_weight, alpha, gamma
NAN, INF = float("nan"), float("inf")


def make_inputs(leading=(2,), sizes=(3, 0, 5), queries=20, classes=7, dtype=torch.float32, parameters=DEFAULTS):
    box_dtype = torch.promote_types(dtype, torch.float32)

    def boxes(*shape):
        return torch.cat((torch.rand(*shape, 2), torch.rand(*shape, 2) * 0.5 + 0.01), dim=-1).to(box_dtype)

    images, max_targets = len(sizes), max(sizes)
    logits = (torch.randn(*leading, images, queries, classes) * 3).to(dtype)
    labels = torch.randint(classes, (images, max_targets))
    targets = (labels, boxes(images, max_targets), torch.tensor(sizes))
    return logits, boxes(*leading, images, queries), *targets, *parameters


def check(*inputs):
    with poisoned_memory():
        cost = triton_kernels.forward(*inputs)
    assert cost.is_contiguous()
    assert_matches_reference(cost, matching_cost_reference, *inputs)
    return cost


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("parameters", [DEFAULTS, (0.7, 1.3, 2.1, 0.6, 0.8), (1.0, 1.0, 1.0, 0.0, 0.0)], ids=str)
def test_matches_reference(dtype, parameters):
    cost = check(*make_inputs(dtype=dtype, parameters=parameters))
    assert (cost[:, 1] == 0).all()
    assert (cost[:, 0, 3:] == 0).all()


@pytest.mark.parametrize(
    ("leading", "sizes", "queries", "classes"),
    [
        ((), (1,), 1, 1),
        ((3,), (2, 2), 63, 91),
        ((1, 2), (2, 4, 1), 64, 3),
        ((), (15,), 65, 4),
        ((), (16, 3), 128, 20),
        ((2,), (17, 0), 129, 20),
        ((), (33, 40), 3, 5),
    ],
    ids=str,
)
def test_block_edges(leading, sizes, queries, classes):
    check(*make_inputs(leading, sizes, queries, classes))


@pytest.mark.parametrize("sizes", [(8, 3), (9, 0), (17,)], ids=str)
def test_block_edges_in_float64(sizes):
    check(*make_inputs((), sizes, 65, dtype=torch.float64))


@pytest.mark.parametrize(
    ("leading", "sizes", "queries"), [((2,), (0, 0), 5), ((0,), (2, 1), 5), ((), (2,), 0)], ids=str
)
def test_empty(leading, sizes, queries):
    cost = triton_kernels.forward(*make_inputs(leading, sizes, queries))
    assert cost.shape == (*leading, len(sizes), max(sizes), queries)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[..., 5:, :],
        lambda x: x.flip(-2)[:, :, ::2],
        lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: x[:1].expand(4, -1, -1, -1),
    ],
    ids=["after denoising queries", "every other query", "class-major", "image-major", "expanded"],
)
def test_strides(view):
    logits, boxes, labels, target_boxes, num_targets, *parameters = make_inputs(queries=31)
    logits, boxes = view(logits), view(boxes)
    cost = check(logits, boxes, labels, target_boxes, num_targets, *parameters)
    targets = (
        labels.t().contiguous().t(),
        target_boxes.permute(2, 1, 0).contiguous().permute(2, 1, 0),
        torch.stack((num_targets, num_targets), dim=1)[:, 0],
    )
    assert torch.equal(triton_kernels.forward(logits, boxes, *targets, *parameters), cost)


@pytest.mark.parametrize("label", [-1, 7, 2**62, -(2**63)])
def test_label_outside_the_classes(label):
    inputs = make_inputs()
    clean = triton_kernels.forward(*inputs)
    inputs[2][2, 1] = label
    cost = triton_kernels.forward(*inputs)
    assert cost[:, 2, 1].isnan().all()
    cost[:, 2, 1] = clean[:, 2, 1]
    assert torch.equal(cost, clean)


@pytest.mark.parametrize("number", [-3, 6, 2**40])
def test_number_of_targets_outside_the_rows(number):
    inputs = make_inputs()
    expected = inputs[4].clone()
    expected[1] = min(max(number, 0), 5)
    inputs[4][1] = number
    cost = triton_kernels.forward(*inputs)
    assert torch.equal(cost, triton_kernels.forward(*inputs[:4], expected, *DEFAULTS))


def test_not_a_number_reaches_its_own_pairs_only():
    inputs = make_inputs(leading=(), sizes=(4, 4), queries=40)
    clean = triton_kernels.forward(*inputs)
    inputs[0][0, 3] = NAN
    inputs[1][0, 5, 2] = NAN
    inputs[1][0, 6, 0] = INF
    inputs[3][1, 2, 1] = NAN
    cost = triton_kernels.forward(*inputs)
    bad = torch.zeros_like(cost, dtype=torch.bool)
    bad[0, :, [3, 5, 6]] = True
    bad[1, 2] = True
    assert not torch.isfinite(cost[bad]).any()
    assert cost[0, :, [3, 5]].isnan().all()
    assert torch.equal(cost[~bad], clean[~bad])


def test_padding_is_zero_whatever_it_holds():
    inputs = make_inputs()
    expected = triton_kernels.forward(*inputs)
    inputs[3][1], inputs[2][1] = NAN, 99
    inputs[3][0, 3:] = INF
    assert torch.equal(triton_kernels.forward(*inputs), expected)


def test_degenerate_boxes_and_extreme_logits():
    boxes = torch.tensor([[0.5, 0.5, 0, 0], [0.5, 0.5, 0.2, 0], [0.2, 0.3, 0, 0], [0.5, 0.5, 0.3, 0.4]])
    logits = torch.tensor([-1e4, -200.0, 200.0, 1e4]).view(1, 4, 1)
    targets = torch.zeros(1, 4, dtype=torch.int64), boxes[None], torch.tensor([4])
    check(logits, boxes[None], *targets, *DEFAULTS)
    giou = triton_kernels.forward(logits, boxes[None], *targets, 0.0, 0.0, 1.0, 0.25, 2.0)[0]
    assert giou[0, 0] == 0  # two equal points: no overlap, no hull
    assert giou[0, 2] == 1  # two different points: a hull without union
    assert giou[3, 3] == pytest.approx(-1)
