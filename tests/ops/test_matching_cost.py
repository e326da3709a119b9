"""matching_cost against an independent float64 formula, transformers' matcher, and its reference."""

import pytest
import torch
import torchvision
from torch._subclasses.fake_tensor import FakeTensorMode

from groupdetr_fast import PackedTargets, ops
from groupdetr_fast.ops.matching_cost.reference import matching_cost_reference
from groupdetr_fast.testing import assert_matches_reference, poisoned_memory

OP = torch.ops.groupdetr_fast.matching_cost.default
DEFAULTS = (2.0, 5.0, 2.0, 0.25, 2.0)  # class_weight, l1_weight, giou_weight, alpha, gamma
NAN, INF = float("nan"), float("inf")


def make_boxes(*shape, dtype=torch.float32):
    return torch.cat((torch.rand(*shape, 2), torch.rand(*shape, 2) * 0.5 + 0.01), dim=-1).to(dtype)


def make_targets(sizes, classes, device, dtype=torch.float32):
    return PackedTargets.from_list(
        [{"labels": torch.randint(0, classes, (size,)), "boxes": make_boxes(size, dtype=dtype)} for size in sizes]
    ).to(device)


def make_inputs(device, leading=(2,), sizes=(3, 0, 5), queries=20, classes=7, dtype=torch.float32):
    logits = torch.randn(*leading, len(sizes), queries, classes, dtype=dtype, device=device) * 3
    boxes = make_boxes(*leading, len(sizes), queries, dtype=dtype).to(device)
    return logits, boxes, make_targets(sizes, classes, device, dtype)


def op_inputs(logits, boxes, targets, parameters=DEFAULTS):
    return logits, boxes, targets.labels, targets.boxes, targets.num_targets, *parameters


def plain_cost(logits, boxes, labels, target_boxes, class_weight, l1_weight, giou_weight, alpha, gamma):
    """[T, Q] in float64 for one image: logits [Q, C], boxes [Q, 4], labels [T], target_boxes [T, 4]."""
    p = logits.double().sigmoid()[:, labels].t()
    present = alpha * (1 - p) ** gamma * -p.log()
    absent = (1 - alpha) * p**gamma * -(1 - p).log()
    boxes, target_boxes = boxes.double(), target_boxes.double()
    l1 = sum((target_boxes[:, None, i] - boxes[None, :, i]).abs() for i in range(4))
    giou = torchvision.ops.generalized_box_iou(
        torchvision.ops.box_convert(target_boxes, "cxcywh", "xyxy"),
        torchvision.ops.box_convert(boxes, "cxcywh", "xyxy"),
    )
    return class_weight * (present - absent) + l1_weight * l1 - giou_weight * giou


@pytest.mark.parametrize("parameters", [DEFAULTS, (1.0, 0.5, 3.0, 0.4, 1.5), (1.0, 0.0, 0.0, 0.25, 0.0)], ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-11)], ids=str)
def test_formula(device, parameters, dtype, tolerance):
    logits, boxes, targets = make_inputs(device, leading=(2, 2), queries=300, dtype=dtype)
    names = ("class_weight", "l1_weight", "giou_weight", "alpha", "gamma")
    cost = ops.matching_cost(logits, boxes, targets, **dict(zip(names, parameters, strict=True)))
    assert cost.shape == (2, 2, 3, 5, 300)
    assert cost.dtype == dtype
    assert cost.is_contiguous()
    for layer in [(0, 0), (0, 1), (1, 0), (1, 1)]:
        for image, size in enumerate(targets.sizes):
            own = targets.labels[image, :size], targets.boxes[image, :size]
            expected = plain_cost(logits[layer][image], boxes[layer][image], *own, *parameters)
            torch.testing.assert_close(cost[layer][image, :size].double(), expected, rtol=tolerance, atol=tolerance)
            assert (cost[layer][image, size:] == 0).all()


def test_equals_transformers(device, monkeypatch):
    module = pytest.importorskip("transformers.loss.loss_deformable_detr")
    seen = []

    def remember(cost):
        seen.append(torch.as_tensor(cost))
        return [0], [0]

    monkeypatch.setattr(module, "linear_sum_assignment", remember)
    logits, boxes, targets = make_inputs(device, leading=(), sizes=(4, 9), queries=50, classes=11)
    logits = logits.clamp(-4, 4)  # beyond, the 1e-8 that transformers adds to p shows
    matcher = module.DeformableDetrHungarianMatcher(class_cost=2, bbox_cost=5, giou_cost=2)
    packed = zip(targets.labels, targets.boxes, targets.sizes, strict=True)
    listed = [{"class_labels": labels[:size], "boxes": boxes[:size]} for labels, boxes, size in packed]
    matcher({"logits": logits, "pred_boxes": boxes}, listed)
    cost = ops.matching_cost(logits, boxes, targets).cpu()
    assert len(seen) == 2
    for image, size in enumerate(targets.sizes):
        torch.testing.assert_close(cost[image, :size].t(), seen[image], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("parameters", [DEFAULTS, (0.7, 1.3, 2.1, 0.6, 0.8), (1.0, 1.0, 1.0, 0.0, 0.0)], ids=str)
@pytest.mark.parametrize(
    ("leading", "sizes", "queries", "classes"),
    [
        ((), (1,), 1, 1),
        ((3,), (4, 2), 7, 3),
        ((1, 2), (2, 6, 1), 255, 91),
        ((), (30,), 256, 4),
        ((2,), (5, 0), 700, 20),
    ],
    ids=str,
)
def test_reference(device, leading, sizes, queries, classes, parameters, dtype):
    inputs = op_inputs(*make_inputs(device, leading, sizes, queries, classes, dtype), parameters)
    assert_matches_reference(OP(*inputs), matching_cost_reference, *inputs)


def class_terms(logits):
    """The two focal terms of every logit, each apart (alpha 1 and alpha 0)."""
    targets = PackedTargets.from_list(
        [{"labels": torch.tensor([0]), "boxes": torch.full((1, 4), 0.5).to(logits.dtype)}]
    )
    boxes = torch.full((1, len(logits), 4), 0.5, dtype=logits.dtype, device=logits.device)
    inputs = logits.view(1, -1, 1), boxes, targets.to(logits.device)
    return [ops.matching_cost(*inputs, class_weight=1, l1_weight=0, giou_weight=0, alpha=alpha) for alpha in (1, 0)]


def test_class_term_is_accurate_everywhere(device):
    logits = torch.linspace(-40, 40, 20001, device=device)
    for term, expected in zip(class_terms(logits), class_terms(logits.double()), strict=True):
        # The original's log(p + 1e-8) is off by 100 % at a logit of -18. A GPU's quotients are off by two units each.
        units = 12 if device.type == "cpu" else 24
        torch.testing.assert_close(term.double(), expected, rtol=units * 2**-23, atol=1e-37)


def test_extreme_logits_stay_finite(device):
    logits = torch.tensor([-1e4, -200.0, -88.0, 0.0, 88.0, 200.0, 1e4], device=device)
    for term, expected in zip(class_terms(logits), class_terms(logits.double()), strict=True):
        torch.testing.assert_close(term.double(), expected, rtol=1e-6, atol=1e-30)
        assert torch.isfinite(term).all()


def test_degenerate_boxes(device):
    boxes = torch.tensor([[0.5, 0.5, 0, 0], [0.5, 0.5, 0.2, 0], [0.2, 0.3, 0, 0], [0.5, 0.5, 0.3, 0.4]])
    targets = PackedTargets.from_list([{"labels": torch.zeros(4, dtype=torch.int64), "boxes": boxes}]).to(device)
    logits = torch.zeros(1, 4, 1, device=device)
    only_giou = {"class_weight": 0, "l1_weight": 0, "giou_weight": 1}
    cost = ops.matching_cost(logits, boxes[None].to(device), targets, **only_giou)[0].cpu()
    inputs = op_inputs(logits, boxes[None].to(device), targets, (0.0, 0.0, 1.0, 0.25, 2.0))
    assert_matches_reference(OP(*inputs), matching_cost_reference, *inputs)
    assert cost[0, 0] == 0  # two equal points: no overlap, no hull
    assert cost[0, 2] == pytest.approx(1)  # two different points: a hull without union
    assert cost[3, 3] == pytest.approx(-1)


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
def test_strides(device, view):
    logits, boxes, targets = make_inputs(device, queries=31)
    logits, boxes = view(logits), view(boxes)
    expected = ops.matching_cost(logits.contiguous(), boxes.contiguous(), targets)
    assert torch.equal(ops.matching_cost(logits, boxes, targets), expected)
    inputs = op_inputs(logits, boxes, targets)
    assert_matches_reference(OP(*inputs), matching_cost_reference, *inputs)


def test_strides_of_targets(device):
    logits, boxes, targets = make_inputs(device)
    labels = targets.labels.t().contiguous().t()
    target_boxes = targets.boxes.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    num_targets = torch.stack((targets.num_targets, targets.num_targets), dim=1)[:, 0]
    expected = OP(*op_inputs(logits, boxes, targets))
    assert torch.equal(OP(logits, boxes, labels, target_boxes, num_targets, *DEFAULTS), expected)


@pytest.mark.parametrize(
    ("leading", "sizes", "queries"), [((2,), (0, 0), 5), ((0,), (2, 1), 5), ((), (2,), 0)], ids=str
)
def test_empty(device, leading, sizes, queries):
    logits, boxes, targets = make_inputs(device, leading, sizes, queries)
    cost = ops.matching_cost(logits, boxes, targets)
    assert cost.shape == (*leading, len(sizes), max(sizes), queries)


def test_not_a_number_reaches_its_own_pairs_only(device):
    logits, boxes, targets = make_inputs(device, leading=(), sizes=(4, 4), queries=40)
    clean = ops.matching_cost(logits, boxes, targets)
    logits[0, 3] = NAN
    boxes[0, 5, 2] = NAN
    boxes[0, 6, 0] = INF
    targets.boxes[1, 2, 1] = NAN
    cost = ops.matching_cost(logits, boxes, targets)
    bad = torch.zeros_like(cost, dtype=torch.bool)
    bad[0, :, [3, 5, 6]] = True
    bad[1, 2] = True
    assert not torch.isfinite(cost[bad]).any()
    assert cost[0, :, [3, 5]].isnan().all()
    assert torch.equal(cost[~bad], clean[~bad])


def test_infinite_logits_are_not_finite_costs(device):
    terms = class_terms(torch.tensor([INF, -INF, NAN], device=device))
    present, absent = (term.flatten().tolist() for term in terms)
    assert present[1] == INF
    assert absent[0] == -INF
    assert present[2] != present[2]
    assert absent[2] != absent[2]


@pytest.mark.parametrize("label", [-1, 7, 2**62, -(2**63)])
def test_label_outside_the_classes(device, label):
    logits, boxes, targets = make_inputs(device)
    clean = ops.matching_cost(logits, boxes, targets)
    targets.labels[2, 1] = label
    cost = ops.matching_cost(logits, boxes, targets)
    assert cost[:, 2, 1].isnan().all()
    cost[:, 2, 1] = clean[:, 2, 1]
    assert torch.equal(cost, clean)
    reference = matching_cost_reference(*op_inputs(logits, boxes, targets))
    assert reference[:, 2, 1].isnan().all()


def test_padding_is_zero_whatever_it_holds(device):
    logits, boxes, targets = make_inputs(device)
    expected = ops.matching_cost(logits, boxes, targets)
    targets.boxes[1] = NAN
    targets.labels[1] = 99
    targets.boxes[0, 3:] = INF
    cost = ops.matching_cost(logits, boxes, targets)
    assert torch.equal(cost, expected)
    assert (cost[:, 1] == 0).all()
    assert torch.equal(matching_cost_reference(*op_inputs(logits, boxes, targets))[:, 1], cost[:, 1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_converted(device, dtype):
    logits, boxes, targets = make_inputs(device)
    logits = logits.to(dtype)
    cost = ops.matching_cost(logits, boxes, targets)
    assert cost.dtype == torch.float32
    assert torch.equal(cost, ops.matching_cost(logits.float(), boxes, targets))
    inputs = op_inputs(logits, boxes, targets)
    assert_matches_reference(OP(*inputs), matching_cost_reference, *inputs)
    torch.library.opcheck(OP, inputs)


def test_mixed_dtypes_give_the_wider_one(device):
    logits, boxes, targets = make_inputs(device)
    assert ops.matching_cost(logits, boxes.double(), targets).dtype == torch.float64
    assert ops.matching_cost(logits.double(), boxes.half(), targets).dtype == torch.float64


def test_gradients_are_refused(device):
    logits, boxes, targets = make_inputs(device)
    for requiring in (logits, boxes):
        requiring.requires_grad_()
        with pytest.raises(RuntimeError, match="no gradient"):
            ops.matching_cost(logits, boxes, targets)
        with torch.no_grad():
            assert not ops.matching_cost(logits, boxes, targets).requires_grad
        assert not ops.matching_cost(logits.detach(), boxes.detach(), targets).requires_grad
        requiring.requires_grad_(False)


def test_opcheck(device):
    logits, boxes, targets = make_inputs(device)
    torch.library.opcheck(OP, op_inputs(logits, boxes, targets))
    permuted = logits.transpose(0, 1).contiguous().transpose(0, 1), boxes.flip(-2).transpose(0, 1).contiguous()
    torch.library.opcheck(OP, op_inputs(permuted[0], permuted[1].transpose(0, 1), targets))


def test_uninitialised_memory_is_not_used(device):
    inputs = make_inputs(device, queries=300)
    expected = ops.matching_cost(*inputs)
    with poisoned_memory():
        assert torch.equal(ops.matching_cost(*inputs), expected)


def test_threads_and_runs_agree():
    inputs = make_inputs("cpu", leading=(6,), sizes=(12, 5), queries=700, classes=30)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            results.append(ops.matching_cost(*inputs))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


def test_compiles_as_one_graph(device):
    compiled = torch.compile(ops.matching_cost, fullgraph=True, backend="aot_eager")
    for sizes in ((3, 0, 5), (1, 2, 6)):
        logits, boxes, targets = make_inputs(device, sizes=sizes)
        cost = ops.matching_cost(logits.bfloat16(), boxes, targets, gamma=1.5)
        assert torch.equal(compiled(logits.bfloat16(), boxes, targets, gamma=1.5), cost)


@pytest.mark.parametrize("fake_device", ["cpu", "cuda"])
def test_fake_tensors(fake_device):
    with FakeTensorMode(), torch.device(fake_device):
        logits, boxes = torch.empty(3, 6, 2, 9, 5).permute(1, 0, 2, 3, 4), torch.empty(6, 3, 2, 9, 4)
        labels, target_boxes = torch.empty(2, 4, dtype=torch.int64), torch.empty(2, 4, 4)
        targets = PackedTargets(labels, target_boxes, torch.empty(2, dtype=torch.int64), (1, 4))
        cost = ops.matching_cost(logits, boxes, targets)
    assert cost.shape == (6, 3, 2, 4, 9)
    assert cost.is_contiguous()
    assert cost.device.type == fake_device


def test_cost_and_assignment_of_groups(device):
    layers, groups, per_group = 3, 4, 25
    logits, boxes, targets = make_inputs(device, (layers,), (6, 1), groups * per_group)
    cost = ops.matching_cost(logits, boxes, targets).unflatten(-1, (groups, per_group)).transpose(-2, -3)
    assigned = ops.linear_assignment(cost, targets.num_targets[:, None])  # [L, B, K, T]
    for layer in range(layers):
        for group in range(groups):
            rows = slice(group * per_group, (group + 1) * per_group)
            alone = ops.matching_cost(logits[layer, :, rows], boxes[layer, :, rows], targets)
            assert torch.equal(assigned[layer, :, group], ops.linear_assignment(alone, targets.num_targets))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"targets": [{}]}, TypeError, "targets must be packed by PackedTargets.from_list.*got a list"),
        ({"logits": torch.zeros(3, 20, 7).long()}, TypeError, "logits must be floating point, got torch.int64"),
        ({"boxes": torch.zeros(3, 20, 4).int()}, TypeError, "boxes must be floating point, got torch.int32"),
        ({"logits": torch.zeros(20, 7)}, ValueError, r"logits must have shape \[..., B, Q, C\].*got \[20, 7\]"),
        ({"logits": torch.zeros(3, 20, 0)}, ValueError, r"C at least 1, got \[3, 20, 0\]"),
        ({"boxes": torch.zeros(3, 20, 5)}, ValueError, r"boxes must have shape \[3, 20, 4\].*got \[3, 20, 5\]"),
        ({"boxes": torch.zeros(3, 21, 4)}, ValueError, r"boxes must have shape \[3, 20, 4\].*got \[3, 21, 4\]"),
        ({"boxes": torch.zeros(3, 20, 4, device="meta")}, ValueError, "boxes must lie on the device.*got meta"),
        ({"logits": torch.zeros(2, 20, 7), "boxes": torch.zeros(2, 20, 4)}, ValueError, "2 images, but targets of 3"),
        ({"gamma": -1.0}, ValueError, "gamma must not be negative, got -1.0"),
    ],
)
def test_errors(change, error, message):
    logits, boxes, targets = make_inputs("cpu", leading=())
    arguments = {"logits": logits, "boxes": boxes, "targets": targets, **change}
    with pytest.raises(error, match=message):
        ops.matching_cost(**arguments)


def test_kernel_rejects_what_it_would_misread():
    if ops.backends()["matching_cost"]["cpu"] != "C++":
        pytest.skip("the C++ kernel is not built")
    logits, boxes, labels, target_boxes, num_targets = op_inputs(*make_inputs("cpu"))[:5]
    with pytest.raises(RuntimeError, match="dtype of logits"):
        OP(logits, boxes.double(), labels, target_boxes, num_targets, *DEFAULTS)
    with pytest.raises(RuntimeError, match="int64"):
        OP(logits, boxes, labels.int(), target_boxes, num_targets, *DEFAULTS)
    with pytest.raises(RuntimeError, match="images of logits"):
        OP(logits, boxes, labels[:2], target_boxes, num_targets, *DEFAULTS)
    with pytest.raises(RuntimeError, match="4 coordinates"):
        OP(logits, boxes[..., :3], labels, target_boxes, num_targets, *DEFAULTS)
