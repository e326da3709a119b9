"""The loss of masks against transformers' loss of each group and against a plain loop over pixels."""

import itertools
import math

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import groupdetr_fast as gd
from groupdetr_fast.losses.mask_criterion import MaskCriterion
from groupdetr_fast.losses.mask_matcher import MaskMatcher

LAYERS, CLASSES, DIM = 3, 5, 8
FRAME, CELLS = (40, 48), (10, 12)


def predictions(groups, batch=3, *, requires_grad=True):
    logits = torch.randn(LAYERS, batch, groups.length, CLASSES + 1) * 2
    embeddings = torch.randn(LAYERS, batch, groups.length, DIM)
    features = torch.randn(batch, DIM, *CELLS) * 2
    tensors = [tensor.requires_grad_(requires_grad) for tensor in (logits, embeddings, features)]
    return gd.SegmentationOutput(*tensors, torch.zeros(batch, *FRAME, dtype=torch.bool), groups)


def random_targets(sizes, image_sizes=None):
    """Blobs in images of several sizes, none larger than the frame."""
    targets = []
    for index, size in enumerate(sizes):
        height, width = (image_sizes or [FRAME] * len(sizes))[index]
        smooth = F.interpolate(torch.randn(1, size, 5, 6), (height, width), mode="bilinear")[0] if size else None
        masks = smooth > 0.2 if size else torch.zeros(0, height, width, dtype=torch.bool)
        targets.append({"labels": torch.randint(CLASSES, (size,)), "boxes": torch.zeros(size, 4), "masks": masks})
    return targets


def criterion_of(points=200, **settings):
    return MaskCriterion(MaskMatcher(num_points=points), num_points=points, **settings)


@pytest.fixture
def same_points_for_all(monkeypatch):
    """Make ``torch.rand(N, P, 2)`` depend on P alone: what is drawn is then the same, however the work is ordered."""

    def rand(*size, **options):
        assert len(size) == 3
        generator = torch.Generator().manual_seed(size[1])
        return torch.empty(size[1:]).uniform_(generator=generator).repeat(size[0], 1, 1).to(options.get("device"))

    monkeypatch.setattr(torch, "rand", rand)


def mean_of_their_groups(out, targets, points):
    """transformers' loss (one group, one layer, a scipy loop) of every group and layer, averaged over groups."""
    transformers = pytest.importorskip("transformers")
    modeling = pytest.importorskip("transformers.models.mask2former.modeling_mask2former")
    config = transformers.Mask2FormerConfig(num_labels=CLASSES, train_num_points=points)
    theirs = modeling.Mask2FormerLoss(config, {})
    masks = []
    for target in targets:  # theirs wants masks as large as the frame
        height, width = target["masks"].shape[1:]
        masks.append(F.pad(target["masks"], (0, FRAME[1] - width, 0, FRAME[0] - height)).float())
    names = {}
    for layer in range(LAYERS):
        suffix = "" if layer == LAYERS - 1 else f"_{layer}"
        for group in range(out.groups.num_groups):
            rows = slice(*out.groups.group_range(group))
            mask_logits = torch.einsum("bqd,bdhw->bqhw", out.mask_embeddings[layer, :, rows], out.mask_features)
            labels = [target["labels"] for target in targets]
            for name, value in theirs(mask_logits, out.logits[layer, :, rows], masks, labels).items():
                name = name.replace("cross_entropy", "ce") + suffix
                names[name] = names.get(name, 0) + value / out.groups.num_groups
    return names


@pytest.mark.parametrize(
    ("num_groups", "size", "targets"), [(1, 8, (3, 5, 1)), (3, 8, (3, 5, 1)), (2, 7, (0, 4, 7)), (3, 5, (1, 0, 0))]
)
def test_losses_equal_transformers(num_groups, size, targets, same_points_for_all):
    out = predictions(gd.QueryGroups(num_groups, size))
    targets = random_targets(targets, image_sizes=[(40, 48), (33, 48), (40, 31)])
    losses = criterion_of()(out, gd.PackedTargets.from_list(targets))
    expected = mean_of_their_groups(out, targets, 200)
    assert set(losses) == {"loss", *expected}
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: name + text)
    weights = {"loss_ce": 2, "loss_mask": 5, "loss_dice": 5}
    total = sum(weights[name.rpartition("_")[0] if name[-1].isdigit() else name] * v for name, v in expected.items())
    torch.testing.assert_close(losses["loss"], total, rtol=1e-5, atol=1e-5)
    inputs = (out.logits, out.mask_embeddings, out.mask_features)
    ours = torch.autograd.grad(losses["loss"], inputs, retain_graph=True)
    for a, b in zip(ours, torch.autograd.grad(total, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_losses_equal_a_loop_over_all_pixels(monkeypatch):
    """With the pixels' centres as points, sampling is exact, and the loss is the dense one of the paper."""
    height, width = FRAME
    y, x = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij")
    centres = torch.stack((x, y), dim=-1).flatten(0, 1)
    monkeypatch.setattr(torch, "rand", lambda *size, device=None: centres[: size[1]].expand(size))
    groups = gd.QueryGroups(2, 4)
    out = predictions(groups, batch=2, requires_grad=False)
    out.mask_features = torch.randn(2, DIM, *FRAME)  # as many cells as pixels
    targets = random_targets((2, 3))
    criterion = criterion_of(points=height * width, importance_ratio=0.0, oversample_ratio=1.0)
    losses = criterion(out, gd.PackedTargets.from_list(targets))

    def bce(x, y):
        return torch.where(y, -x.sigmoid().log(), -(1 - x.sigmoid()).log()).mean()

    def dice(x, y):
        return 1 - (2 * (x.sigmoid() * y).sum() + 1) / (x.sigmoid().sum() + y.sum() + 1)

    sums = {"loss_mask": 0.0, "loss_dice": 0.0}
    entropy = weights = 0.0
    for image, group in itertools.product(range(2), range(2)):
        start, stop = groups.group_range(group)
        masks = torch.einsum("qd,dhw->qhw", out.mask_embeddings[-1, image, start:stop], out.mask_features[image])
        probability = out.logits[-1, image, start:stop].softmax(-1)
        labels, truth = targets[image]["labels"], targets[image]["masks"]
        best, chosen = math.inf, None
        for queries in itertools.permutations(range(4), len(labels)):
            cost = sum(
                5 * bce(masks[q], truth[t]) + 5 * dice(masks[q], truth[t]) - 2 * probability[q, labels[t]]
                for t, q in enumerate(queries)
            )
            if cost < best:
                best, chosen = cost, queries
        classes = dict.fromkeys(range(4), CLASSES) | {q: int(labels[t]) for t, q in enumerate(chosen)}
        for query, label in classes.items():
            weight = 0.1 if label == CLASSES else 1.0
            entropy, weights = entropy - weight * probability[query, label].log(), weights + weight
        for target, query in enumerate(chosen):
            sums["loss_mask"] += bce(masks[query], truth[target])
            sums["loss_dice"] += dice(masks[query], truth[target])
    torch.testing.assert_close(losses["loss_ce"], entropy / weights, rtol=1e-4, atol=1e-5)
    for name, total in sums.items():
        torch.testing.assert_close(losses[name], total / (2 * 5), rtol=1e-4, atol=1e-5)


def test_importance_sampling_finds_the_uncertain_points():
    """Near the edge of a mask its entropy is high, so that most points there raise the loss."""
    out = predictions(gd.QueryGroups(1, 4), requires_grad=False)
    targets = gd.PackedTargets.from_list(random_targets((3, 3, 3)))
    torch.manual_seed(0)
    uncertain = criterion_of(points=400)(out, targets)["loss_mask"]
    torch.manual_seed(0)
    uniform = criterion_of(points=400, importance_ratio=0.0)(out, targets)["loss_mask"]
    assert uncertain < 0.8 * uniform  # these predictions are random: far from their edges they are mostly wrong


def test_images_without_objects():
    out = predictions(gd.QueryGroups(2, 4))
    targets = gd.PackedTargets.from_list(random_targets((0, 0, 0)))
    losses = criterion_of()(out, targets)
    assert losses["loss_mask"] == losses["loss_dice"] == 0
    expected = F.cross_entropy(out.logits[-1].flatten(0, 1), torch.full((24,), CLASSES))
    torch.testing.assert_close(losses["loss_ce"], expected)
    losses["loss"].backward()
    for tensor in (
        out.mask_embeddings,
        out.mask_features,
    ):  # every parameter gets a gradient, as several processes need
        assert tensor.grad is not None
        assert not tensor.grad.any()


def test_more_objects_than_queries():
    out = predictions(gd.QueryGroups(2, 3))
    targets = gd.PackedTargets.from_list(random_targets((7, 2, 3)))
    losses = criterion_of()(out, targets)
    assert all(torch.isfinite(loss) for loss in losses.values())
    matching = criterion_of().matcher(
        out.logits, out.mask_embeddings, out.mask_features, targets, out.groups, tuple(out.padding.shape[1:])
    )
    matched = matching.matched.view(LAYERS, 3, 2, 7).sum(-1)
    assert matched[:, 0].unique().tolist() == [3]
    assert matched[:, 1].unique().tolist() == [2]


def test_gradients_stay_inside_matched_queries():
    """Each group gets the gradient of its own matches: that of the group alone, divided by the number of groups."""
    out = predictions(gd.QueryGroups(3, 5), batch=2)
    targets = gd.PackedTargets.from_list(random_targets((2, 4)))
    torch.manual_seed(0)
    loss = criterion_of()(out, targets)["loss_dice"]
    (grad,) = torch.autograd.grad(loss, out.mask_embeddings)
    assert not grad[:-1].any()
    used = grad[-1].abs().sum(-1) > 0
    assert used.view(2, 3, 5).sum(-1).tolist() == [[2] * 3, [4] * 3]


@pytest.mark.parametrize("sizes", [(3, 5, 1), (0, 0, 0)])
def test_compiles_without_a_break(sizes):
    """A full graph exists only if no shape, branch or copy depends on what the tensors hold."""
    out = predictions(gd.QueryGroups(2, 6))
    targets = gd.PackedTargets.from_list(random_targets(sizes))
    criterion = criterion_of()
    inputs = (out.logits, out.mask_embeddings, out.mask_features)

    def loss(*tensors):
        return criterion(gd.SegmentationOutput(*tensors, out.padding, out.groups), targets)

    torch._dynamo.reset()
    results = []
    for function in (torch.compile(loss, backend="aot_eager", fullgraph=True), loss):
        torch.manual_seed(3)
        losses = function(*inputs)
        results.append((losses, torch.autograd.grad(losses["loss"], inputs)))
    (compiled, compiled_grads), (eager, eager_grads) = results
    for name, value in eager.items():
        torch.testing.assert_close(compiled[name], value)
    for a, b in zip(compiled_grads, eager_grads, strict=True):
        torch.testing.assert_close(a, b)


def test_never_waits_for_the_device():
    """Fake CUDA tensors have no data to wait for: whatever needs it fails."""
    with FakeTensorMode():
        device = torch.device("cuda")
        out = gd.SegmentationOutput(
            torch.empty(LAYERS, 2, 12, CLASSES + 1, device=device, requires_grad=True),
            torch.empty(LAYERS, 2, 12, DIM, device=device, requires_grad=True),
            torch.empty(2, DIM, *CELLS, device=device, requires_grad=True),
            torch.empty(2, *FRAME, dtype=torch.bool, device=device),
            gd.QueryGroups(3, 4),
        )
        targets = gd.PackedTargets(
            torch.empty(2, 5, dtype=torch.int64, device=device),
            torch.empty(2, 5, 4, device=device),
            torch.empty(2, dtype=torch.int64, device=device),
            (5, 2),
            tuple(torch.empty(size, 33, 48, dtype=torch.bool, device=device) for size in (5, 2)),
        )
        assert criterion_of()(out, targets)["loss"].device.type == "cuda"


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returns."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.size = max(self.size, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


def test_masks_of_all_queries_are_never_made():
    groups = gd.QueryGroups(11, 100)
    out = predictions(groups, batch=1)
    out.mask_features = torch.randn(1, DIM, 64, 64, requires_grad=True)
    targets = gd.PackedTargets.from_list(random_targets((4,)))
    with LargestTensor() as largest:
        criterion_of(points=100)(out, targets)["loss"].backward()
    matched_masks, all_masks = 4 * 11 * 64 * 64, 1100 * 64 * 64
    assert matched_masks <= largest.size < 0.1 * all_masks


def test_targets_without_masks_are_refused():
    out = predictions(gd.QueryGroups(2, 4))
    targets = [{"labels": torch.tensor([1]), "boxes": torch.rand(1, 4)}] * 3
    with pytest.raises(ValueError, match="targets must have masks"):
        criterion_of()(out, gd.PackedTargets.from_list(targets))


def test_wrong_number_of_queries_is_refused():
    out = predictions(gd.QueryGroups(2, 4))
    out.groups = gd.QueryGroups(3, 4)
    with pytest.raises(ValueError, match=r"logits must have 3 \* 4 = 12 queries"):
        criterion_of()(out, gd.PackedTargets.from_list(random_targets((1, 1, 1))))


def test_criterion_of_a_model_takes_its_settings():
    config = gd.models.model_config("mask2former_r50", mask_loss=3.0, dice_cost=7.0, loss_points=99)
    criterion = gd.build_criterion(config)
    assert criterion.weights == {"loss_ce": 2.0, "loss_mask": 3.0, "loss_dice": 5.0}
    assert (criterion.matcher.dice_cost, criterion.matcher.num_points, criterion.num_points) == (7.0, 99, 99)
    assert isinstance(gd.build_criterion(Wrapper(config)), MaskCriterion)


class Wrapper(torch.nn.Module):
    """A wrapper such as DistributedDataParallel."""

    def __init__(self, config):
        super().__init__()
        self.module = gd.models.Detector(config)
