"""The drop-in matcher and criterion against transformers' losses, which are those of the DETR family."""

import pytest
import torch

from groupdetr_fast.integrations.detr import HungarianMatcher, SetCriterion

CLASSES, LAYERS = 7, 3
WEIGHTS = {"loss_ce": 1, "loss_bbox": 5, "loss_giou": 2}
COSTS = (2, 5, 2)
# (K, N, objects of each image)
SIZES = [(1, 8, (3, 5, 1)), (4, 8, (3, 5, 1)), (3, 8, (0, 4, 8)), (2, 5, (7, 0, 2)), (3, 1, (1, 1, 0)), (2, 4, (0, 0))]


def random_layer(batch, queries, dtype=torch.float32):
    return {
        "pred_logits": (torch.randn(batch, queries, CLASSES) * 2).to(dtype).requires_grad_(),
        "pred_boxes": torch.randn(batch, queries, 4).sigmoid().to(dtype).requires_grad_(),
    }


def random_outputs(batch, queries, dtype=torch.float32):
    outputs = random_layer(batch, queries, dtype)
    outputs["aux_outputs"] = [random_layer(batch, queries, dtype) for _ in range(LAYERS - 1)]
    outputs["enc_outputs"] = random_layer(batch, queries, dtype)
    return outputs


def random_targets(sizes):
    return [
        {
            "labels": torch.randint(CLASSES, (size,)),
            "boxes": torch.cat((torch.rand(size, 2) * 0.6 + 0.2, torch.rand(size, 2) * 0.3 + 0.05), dim=1),
        }
        for size in sizes
    ]


def tensors_of(outputs):
    layers = [outputs, *outputs["aux_outputs"], outputs["enc_outputs"]]
    return [layer[name] for layer in layers for name in ("pred_logits", "pred_boxes")]


def in_their_words(outputs, targets):
    """The same, under the keys of transformers."""

    def layer(ours):
        return {"logits": ours["pred_logits"], "pred_boxes": ours["pred_boxes"]}

    theirs = layer(outputs)
    theirs["auxiliary_outputs"] = [layer(ours) for ours in outputs["aux_outputs"]]
    theirs["enc_outputs"] = layer(outputs["enc_outputs"])
    return theirs, [{"class_labels": target["labels"], "boxes": target["boxes"]} for target in targets]


def lw_detr_loss(num_groups, losses=("labels", "boxes")):
    """transformers' criterion of LW-DETR: groups, layers and images in Python loops around scipy."""
    theirs = pytest.importorskip("transformers.loss.loss_lw_detr")
    matcher = theirs.LwDetrHungarianMatcher(*COSTS)
    return theirs.LwDetrImageLoss(matcher, CLASSES, 0.25, losses, num_groups)


def focal_loss_of(num_groups):
    """The same with the focal loss of Deformable DETR, as Conditional DETR has it."""
    theirs = pytest.importorskip("transformers.loss.loss_deformable_detr")
    criterion = lw_detr_loss(num_groups)
    focal = theirs.DeformableDetrImageLoss(None, CLASSES, 0.25, ["labels"])
    criterion.loss_labels = focal.loss_labels
    return criterion


def criterion_of(num_groups, **options):
    return SetCriterion(CLASSES, HungarianMatcher(*COSTS), WEIGHTS, focal_alpha=0.25, group_detr=num_groups, **options)


def total(losses):
    return sum(WEIGHTS["_".join(name.split("_")[:2])] * value for name, value in losses.items() if "loss" in name)


def assert_equal_losses(ours, theirs, outputs):
    assert {name for name in ours if "loss" in name} == set(theirs)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-5)
    inputs = tensors_of(outputs)
    gradients = [torch.autograd.grad(total(losses), inputs, retain_graph=True) for losses in (ours, theirs)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("num_groups", "size", "objects"), SIZES)
@pytest.mark.parametrize("ia_bce_loss", [False, True])
def test_losses_and_gradients_equal_transformers(num_groups, size, objects, ia_bce_loss):
    outputs, targets = random_outputs(len(objects), num_groups * size), random_targets(objects)
    ours = criterion_of(num_groups, ia_bce_loss=ia_bce_loss)(outputs, targets)
    theirs = (lw_detr_loss if ia_bce_loss else focal_loss_of)(num_groups)(*in_their_words(outputs, targets))
    assert_equal_losses(ours, theirs, outputs)


def test_evaluation_has_one_group():
    outputs, targets = random_outputs(2, 8), random_targets((3, 2))
    ours = criterion_of(4, ia_bce_loss=True).eval()(outputs, targets)
    theirs = lw_detr_loss(4).eval()(*in_their_words(outputs, targets))
    assert_equal_losses(ours, theirs, outputs)


def test_sum_of_group_losses():
    outputs, targets = random_outputs(2, 12), random_targets((3, 2))
    mean = criterion_of(3)(outputs, targets)
    summed = criterion_of(3, sum_group_losses=True)(outputs, targets)
    for name in mean:
        factor = 3 if "loss" in name else 1
        torch.testing.assert_close(summed[name], factor * mean[name])


def test_given_number_of_boxes():
    outputs, targets = random_outputs(2, 12), random_targets((3, 2))
    criterion = criterion_of(3)
    assert criterion.num_boxes_for_targets(outputs, targets) == 15
    torch.testing.assert_close(
        criterion(outputs, targets, num_boxes=1.0)["loss_ce"], 15 * criterion(outputs, targets)["loss_ce"]
    )


@pytest.mark.parametrize(("num_groups", "size", "objects"), SIZES)
def test_matches_equal_transformers(num_groups, size, objects):
    theirs = pytest.importorskip("transformers.loss.loss_lw_detr").LwDetrHungarianMatcher(*COSTS)
    layer, targets = random_layer(len(objects), num_groups * size), random_targets(objects)
    ours = HungarianMatcher(*COSTS)(layer, targets, group_detr=num_groups)
    labels = [{"class_labels": target["labels"], "boxes": target["boxes"]} for target in targets]
    expected = theirs({"logits": layer["pred_logits"], "pred_boxes": layer["pred_boxes"]}, labels, num_groups)
    assert len(ours) == len(expected) == len(objects)
    for pair, expected_pair in zip(ours, expected, strict=True):
        for indices, expected_indices in zip(pair, expected_pair, strict=True):
            assert indices.dtype == torch.int64
            assert indices.device.type == "cpu"
            assert torch.equal(indices, expected_indices)


@pytest.mark.parametrize(("num_groups", "size", "objects"), SIZES)
def test_logged_errors_equal_a_plain_loop(num_groups, size, objects):
    outputs, targets = random_outputs(len(objects), num_groups * size), random_targets(objects)
    criterion = criterion_of(num_groups)
    losses = criterion(outputs, targets)
    wrong = [
        outputs["pred_logits"][image, query].argmax() != targets[image]["labels"][index]
        for image, pairs in enumerate(criterion.matcher(outputs, targets, group_detr=num_groups))
        for query, index in zip(*pairs, strict=True)
    ]
    expected = 100 * sum(wrong) / len(wrong) if wrong else 100.0
    torch.testing.assert_close(losses["class_error"], torch.as_tensor(expected))
    assert [name for name in losses if name.startswith("class_error")] == ["class_error"]
    layers = {"": outputs, "_0": outputs["aux_outputs"][0], "_1": outputs["aux_outputs"][1]}
    for suffix, layer in {**layers, "_enc": outputs["enc_outputs"]}.items():
        predicted = [sum(int(query.argmax()) != CLASSES - 1 for query in image) for image in layer["pred_logits"]]
        error = sum(abs(a - b) for a, b in zip(predicted, objects, strict=True)) / len(objects)
        assert losses[f"cardinality_error{suffix}"].item() == pytest.approx(error)


def test_only_the_losses_asked_for():
    outputs, targets = random_layer(2, 6), random_targets((3, 1))
    assert set(criterion_of(2, losses=["labels"])(outputs, targets)) == {"loss_ce", "class_error"}
    assert set(criterion_of(2, losses=["boxes"])(outputs, targets)) == {"loss_bbox", "loss_giou"}
    assert set(criterion_of(2, losses=["cardinality"])(outputs, targets)) == {"cardinality_error"}


@pytest.mark.parametrize("ia_bce_loss", [False, True])
def test_half_precision_predictions(ia_bce_loss):
    outputs, targets = random_outputs(2, 12, torch.bfloat16), random_targets((3, 2))
    losses = criterion_of(3, ia_bce_loss=ia_bce_loss)(outputs, targets)
    assert losses["loss_ce"].dtype == torch.float32
    total(losses).backward()
    assert all(torch.isfinite(tensor.grad).all() for tensor in tensors_of(outputs))


def test_certain_scores_leave_the_loss_finite():
    outputs, targets = random_outputs(2, 12), random_targets((3, 2))
    with torch.no_grad():
        outputs["pred_logits"][0] = 200.0
        outputs["pred_logits"][1] = -200.0
    losses = criterion_of(3, ia_bce_loss=True)(outputs, targets)
    total(losses).backward()
    assert all(torch.isfinite(tensor.grad).all() for tensor in tensors_of(outputs))


@pytest.mark.parametrize("ia_bce_loss", [False, True])
def test_traces_with_fake_gpu_tensors(ia_bce_loss):
    """On tensors without data, reading a value back to the host (item, cpu, nonzero, boolean indexing) raises."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    criterion = criterion_of(3, ia_bce_loss=ia_bce_loss)
    with FakeTensorMode():

        def layer():
            options = {"device": "cuda", "requires_grad": True}
            return {
                "pred_logits": torch.empty(2, 18, CLASSES, **options),
                "pred_boxes": torch.empty(2, 18, 4, **options),
            }

        outputs = {**layer(), "aux_outputs": [layer()], "enc_outputs": layer()}
        targets = [
            {
                "labels": torch.empty(size, dtype=torch.int64, device="cuda"),
                "boxes": torch.empty(size, 4, device="cuda"),
            }
            for size in (5, 0)
        ]
        losses = criterion(outputs, targets)
        assert all(value.device.type == "cuda" and value.dim() == 0 for value in losses.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_varifocal_loss": True}, "does not support use_varifocal_loss"),
        ({"use_position_supervised_loss": True}, "does not support use_position_supervised_loss"),
        ({"eos_coef": 0.1}, "does not support eos_coef"),
        ({"num_keypoints_per_class": [17]}, "does not support num_keypoints_per_class"),
        ({"losses": ["labels", "masks"]}, "losses must be among labels, boxes, cardinality, got masks"),
    ],
)
def test_what_is_not_supported_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        criterion_of(2, **options)


def test_options_that_are_off_are_taken():
    criterion_of(2, use_varifocal_loss=False, num_keypoints_per_class=None)
    HungarianMatcher(use_pos_only=False, keypoint_l1_loss_coef=0.0)


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="does not support cost_mask_dice"):
        HungarianMatcher(cost_mask_dice=1)
    with pytest.raises(ValueError, match="must not all be 0"):
        HungarianMatcher(0, 0, 0)
    with pytest.raises(TypeError, match="matcher must be a HungarianMatcher of groupdetr_fast"):
        SetCriterion(CLASSES, torch.nn.Identity(), WEIGHTS)
    with pytest.raises(ValueError, match="group_detr must divide the number of queries, 10, got 3"):
        criterion_of(3)(random_layer(1, 10), random_targets((1,)))
    padded = [{**target, "valid": torch.ones(2, dtype=torch.bool)} for target in random_targets((2,))]
    with pytest.raises(ValueError, match="targets padded to a fixed size"):
        criterion_of(2)(random_layer(1, 10), padded)


@pytest.mark.parametrize("group_detr", [0, -3, 2.0])
def test_a_number_of_groups_that_is_none_is_refused(group_detr):
    message = f"group_detr must be an integer of at least 1, got {group_detr}"
    with pytest.raises(ValueError, match=message):
        criterion_of(group_detr)
    with pytest.raises(ValueError, match=message):
        HungarianMatcher(*COSTS)(random_layer(1, 10), random_targets((1,)), group_detr=group_detr)


def test_outputs_and_targets_of_other_kinds_are_refused():
    criterion, outputs, targets = criterion_of(2), random_layer(1, 10), random_targets((1,))
    other = random_layer(1, 8)
    with pytest.raises(ValueError, match=r"pred_logits of aux_outputs\[0\] must have shape .* last layer, got \[1, 8"):
        criterion({**outputs, "aux_outputs": [other]}, targets)
    with pytest.raises(ValueError, match=r"pred_boxes of outputs must have shape \[1, 10, 4\], got \[1, 8, 4\]"):
        criterion({**outputs, "pred_boxes": other["pred_boxes"]}, targets)
    with pytest.raises(ValueError, match=r"pred_logits of outputs must have shape \[B, K \* N, C\]"):
        criterion({name: value[0] for name, value in outputs.items()}, targets)
    with pytest.raises(TypeError, match=r"outputs must be a dictionary with pred_logits and pred_boxes, got logits"):
        criterion({"logits": outputs["pred_logits"]}, targets)
    with pytest.raises(TypeError, match=r"outputs must be a dictionary .*, got a Tensor"):
        HungarianMatcher(*COSTS)(outputs["pred_logits"], targets)
    with pytest.raises(TypeError, match=r"targets must be a list with a dictionary .* for each image, got a dict"):
        criterion(outputs, targets[0])
    with pytest.raises(ValueError, match=r'targets\[0\] lacks the key "labels": give what is in "class_labels" under'):
        criterion(outputs, [{"class_labels": target["labels"], "boxes": target["boxes"]} for target in targets])
    with pytest.raises(ValueError, match=r"10, got 3; after criterion\.eval\(\) there is one"):
        criterion_of(3)(outputs, targets)


@pytest.mark.parametrize("fourth", [0.1, ["labels", "boxes"]])
def test_what_the_repositories_order_differently_is_taken_by_name(fourth):
    """DETR has eos_coef in fourth place, Deformable DETR losses, and Conditional DETR focal_alpha."""
    with pytest.raises(TypeError, match=r"takes what follows weight_dict by name: in fourth place DETR has eos_coef"):
        SetCriterion(CLASSES, HungarianMatcher(*COSTS), WEIGHTS, fourth, ["labels", "boxes", "cardinality"])
