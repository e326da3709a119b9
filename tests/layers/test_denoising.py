"""Denoising queries: their layout, the statistics of their noise, and batches at the edge."""

import pytest
import torch
from torch import nn

import groupdetr_fast as gd
from groupdetr_fast.layers.denoising import make_denoising_queries

CLASSES = 7
GROUPS = gd.QueryGroups(3, 5)


def packed_targets(*sizes, classes=CLASSES):
    return gd.PackedTargets.from_list(
        [
            {
                "labels": torch.randint(classes, (size,)),
                "boxes": torch.cat((torch.rand(size, 2) * 0.4 + 0.3, torch.rand(size, 2) * 0.2 + 0.1), dim=1),
            }
            for size in sizes
        ]
    )


def make(targets, groups=GROUPS, **settings):
    defaults = {"num_classes": CLASSES, "number": 12, "label_noise": 0.2, "box_noise": 0.4}
    return make_denoising_queries(targets, groups, **{**defaults, **settings})


def of_objects(queries, targets):
    """Boxes and labels of the objects that the existing queries were made from, and a mask of those queries."""
    boxes = targets.boxes.gather(1, queries.target[..., None].expand(-1, -1, 4))
    return boxes, targets.labels.gather(1, queries.target), queries.exists


@pytest.mark.parametrize("scope", ["first", "every"])
@pytest.mark.parametrize("contrastive", [False, True])
@pytest.mark.parametrize("sizes", [(3, 1), (0, 4), (2,), (12, 1), (40, 0, 7)])
def test_layout(sizes, contrastive, scope):
    """Every object once in every denoising group, in its image's order; then, contrastive, once more as a negative."""
    targets = packed_targets(*sizes)
    queries = make(targets, contrastive=contrastive, scope=scope)
    largest, sets = max(sizes), 1 if scope == "first" else 3
    layout = queries.groups
    assert (layout.num_groups, layout.queries_per_group, layout.denoising_sets) == (3, 5, sets)
    assert layout.denoising_groups == max(1, 12 // largest)
    assert layout.queries_per_denoising_group == largest * (2 if contrastive else 1)
    shape = (len(sizes), layout.denoising_length)
    assert queries.boxes.shape == (*shape, 4)
    for image, size in enumerate(sizes):
        row = 0
        for _ in range(sets * layout.denoising_groups):
            for kind in ("positive", "negative") if contrastive else ("positive",):
                for target in range(largest):
                    assert queries.exists[image, row] == (target < size)
                    assert queries.target[image, row] == target
                    assert queries.positive[image, row] == (kind == "positive" and target < size)
                    # DINO's repository trains padding as background, DN-DETR's does not train it
                    assert queries.negative[image, row] == (contrastive and not queries.positive[image, row])
                    row += 1
        assert row == shape[1]


def test_no_objects_or_no_number_give_none():
    assert make(packed_targets(0, 0)) is None
    assert make(packed_targets(2, 1), number=0) is None


def test_padding_is_zero_content_at_the_middle_anchor():
    """As in both repositories: zeros before the sigmoid."""
    queries = make(packed_targets(4, 1), label_noise=1.0)
    embedding = nn.Embedding(CLASSES + 1, 6)
    padding = ~queries.exists
    assert padding[1].sum() == 3 * queries.groups.denoising_groups
    assert not queries.content(embedding)[padding].any()
    assert not queries.anchors[padding].any()
    assert torch.equal(queries.content(embedding)[~padding], embedding(queries.labels[~padding]))


def test_anchors_are_the_boxes_before_the_sigmoid():
    queries = make(packed_targets(4, 1))
    torch.testing.assert_close(queries.anchors.sigmoid(), queries.boxes.clamp(1e-3, 1 - 1e-3), rtol=1e-4, atol=1e-5)


def test_without_noise_queries_are_the_objects():
    targets = packed_targets(4, 2)
    for contrastive in (False, True):
        queries = make(targets, label_noise=0.0, box_noise=0.0, contrastive=contrastive)
        boxes, labels, exists = of_objects(queries, targets)
        torch.testing.assert_close(queries.boxes[exists], boxes[exists])
        assert torch.equal(queries.labels[exists], labels[exists])


def test_labels_are_replaced_with_the_given_probability():
    classes = 4
    targets = packed_targets(50, 30, classes=classes)
    queries = make(targets, num_classes=classes, number=20000, label_noise=0.3)
    _, labels, exists = of_objects(queries, targets)
    changed = (queries.labels != labels)[exists].float()
    assert len(changed) == 400 * 80
    # one of four replacements is the same label
    assert changed.mean() == pytest.approx(0.3 * 3 / 4, abs=0.01)
    replacements = queries.labels[exists][changed.bool()]
    assert (replacements.bincount(minlength=classes) / len(replacements)).min() > 0.2


def test_noise_of_dn_detr():
    """The centre moves by up to half the noise, the size changes by up to the noise, in units of the size."""
    targets = packed_targets(50, 30)
    queries = make(targets, number=20000, box_noise=0.4)
    boxes, _, exists = of_objects(queries, targets)
    moved = ((queries.boxes - boxes) / boxes[..., 2:].repeat(1, 1, 2))[exists]
    for column, reach in enumerate((0.2, 0.2, 0.4, 0.4)):
        assert moved[:, column].abs().max() == pytest.approx(reach, abs=0.002)
        assert moved[:, column].mean() == pytest.approx(0, abs=0.01 * reach)
        assert moved[:, column].std() == pytest.approx(reach / 3**0.5, rel=0.02)  # uniform
    correlation = torch.corrcoef(moved.T) - torch.eye(4)
    assert correlation.abs().max() < 0.03


def test_noise_of_dino():
    """Each side moves on its own: of positives by up to half the noise, of negatives by once to twice that."""
    targets = packed_targets(50, 30)
    queries = make(targets, number=20000, box_noise=0.4, contrastive=True)
    boxes, _, exists = of_objects(queries, targets)
    size = boxes[..., 2:].repeat(1, 1, 2)
    moved = (corners(queries.boxes) - corners(boxes)) / size
    for kind, low, high in (("positive", 0.0, 0.2), ("negative", 0.2, 0.4)):
        sides = moved[exists & getattr(queries, kind)]
        assert len(sides) == 400 * 80
        for column in range(4):
            amount = sides[:, column].abs()
            assert amount.min() == pytest.approx(low, abs=0.002)
            assert amount.max() == pytest.approx(high, abs=0.002)
            assert amount.mean() == pytest.approx((low + high) / 2, rel=0.02)
            assert (sides[:, column] > 0).float().mean() == pytest.approx(0.5, abs=0.02)
        assert (torch.corrcoef(sides.T) - torch.eye(4)).abs().max() < 0.03


def corners(boxes):
    x, y, w, h = boxes.unbind(-1)
    return torch.stack((x - w / 2, y - h / 2, x + w / 2, y + h / 2), dim=-1)


@pytest.mark.parametrize("contrastive", [False, True])
def test_boxes_stay_inside_the_image(contrastive):
    """DN-DETR keeps the four numbers of a box in [0, 1], DINO its corners."""
    edge = torch.tensor([[0.02, 0.98, 0.9, 0.9], [0.99, 0.01, 1.0, 1.0]])
    targets = gd.PackedTargets.from_list([{"labels": torch.zeros(2, dtype=torch.int64), "boxes": edge}])
    queries = make(targets, number=2000, contrastive=contrastive)
    checked = corners(queries.boxes) if contrastive else queries.boxes
    assert checked.min() >= -1e-6
    assert checked.max() <= 1 + 1e-6


def test_much_noise_gives_no_negative_sizes():
    queries = make(packed_targets(4, 2), number=2000, box_noise=1.0, contrastive=True)
    assert queries.boxes.min() == 0
    assert torch.isfinite(queries.anchors).all()


def test_sets_have_noise_of_their_own():
    queries = make(packed_targets(4, 2), scope="every", number=4)
    sets = queries.boxes.unflatten(1, (3, 4))
    assert (sets[0, 0] - sets[0, 1]).abs().min() > 0


def test_traces_with_fake_gpu_tensors():
    """On tensors without data, anything that waits for the device raises."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        device = torch.device("cuda")
        targets = gd.PackedTargets(
            torch.empty(2, 5, dtype=torch.int64, device=device),
            torch.empty(2, 5, 4, device=device),
            torch.empty(2, dtype=torch.int64, device=device),
            (5, 2),
        )
        for contrastive in (False, True):
            queries = make(targets, contrastive=contrastive)
            assert queries.anchors.device.type == "cuda"
