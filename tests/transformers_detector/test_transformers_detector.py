"""Detectors of transformers as this package calls them, judged by transformers itself."""

import copy
import dataclasses
from contextlib import contextmanager, nullcontext
from functools import partial

import pytest
import torch
from safetensors.torch import save_file
from tiny_detectors import CLASSES, NAMES, QUERIES, batch_of, detector_of, model_like, processor_of, targets_of
from torch.testing import assert_close
from transformers import AutoModelForObjectDetection

import groupdetr_fast as gd
from groupdetr_fast.models import postprocess
from groupdetr_fast.targets import PackedTargets, StepTotals
from groupdetr_fast.training.config import OptimizationConfig
from groupdetr_fast.training.half_weights import HalfWeights
from groupdetr_fast.training.optimization import build_optimizer
from groupdetr_fast.training.recompute import recompute_decoder_layers

HYBRIDS = ["RTDetr", "RTDetrV2", "DFine", "Deimv2"]
PT = {"format": "pt"}  # which transformers wants to be told
EVERY = pytest.mark.parametrize("name", NAMES)


def loss_and_gradients(detector, batches, precision=nullcontext):
    """Losses and gradients of a step on some batches, as the training loop computes them."""
    detector.zero_grad()
    criterion = gd.build_criterion(detector)
    totals = StepTotals.of([targets for _, targets in batches])
    parts = []
    for images, targets in batches:
        with precision():
            out = detector(images, None, targets)
        losses = criterion(out, targets, totals)
        losses["loss"].backward()
        parts.append({name: value.detach() for name, value in losses.items()})
    gradients = {name: weight.grad for name, weight in detector.named_parameters() if weight.grad is not None}
    return {name: sum(part[name] for part in parts) for name in parts[0]}, gradients


def assert_gradients(found, expected):
    """Compare gradients; some are sums whose terms cancel, so that what counts is the largest of all."""
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_close(
            found[name], gradient, rtol=1e-3, atol=1e-5 * largest, msg=lambda text, name=name: f"{name}: {text}"
        )


def joined(batches):
    images = torch.cat([images for images, _ in batches])
    each = [
        {"labels": targets.labels[index, :size], "boxes": targets.boxes[index, :size]}
        for _, targets in batches
        for index, size in enumerate(targets.sizes)
    ]
    return images, PackedTargets.from_list(each)


def labels_of(targets):
    return [
        {"class_labels": targets.labels[index, :size], "boxes": targets.boxes[index, :size]}
        for index, size in enumerate(targets.sizes)
    ]


@EVERY
@pytest.mark.parametrize("accelerate_kernels", [True, False])
def test_the_loss_of_a_step_of_one_batch_is_that_of_transformers(name, accelerate_kernels):
    detector = detector_of(name, accelerate_kernels=accelerate_kernels)
    model = model_like(detector, name)
    images, targets = batch_of((3, 1))
    expected = model(pixel_values=images, labels=labels_of(targets))
    expected.loss.backward()
    losses, gradients = loss_and_gradients(detector, [(images, targets)])
    assert_close(losses["loss"], expected.loss.detach(), rtol=1e-4, atol=1e-4)
    for key, value in expected.loss_dict.items():
        assert_close(losses[key], value.detach(), rtol=1e-4, atol=1e-4)
    assert_gradients(
        gradients, {f"model.{key}": weight.grad for key, weight in model.named_parameters() if weight.grad is not None}
    )


@EVERY
@pytest.mark.parametrize("counts", [((3, 1), (1, 0)), ((2, 5), (0, 0))], ids=["some", "none in one"])
def test_batches_of_a_step_add_up_to_one_batch(name, counts):
    detector = detector_of(name, accelerate_kernels=name != "ConditionalDetr")
    batches = [batch_of(each, seed=index) for index, each in enumerate(counts)]
    added, gradients = loss_and_gradients(detector, batches)
    together, expected = loss_and_gradients(detector, [joined(batches)])
    if name == "DFine":  # its loss_ddf is a mean over a batch, whose weights depend on the batch
        assert added["loss_ddf_aux_0"] > 0
        for key in added.keys() - {"loss", "loss_ddf_aux_0"}:
            assert_close(added[key], together[key], rtol=1e-4, atol=1e-5)
        return
    if name == "Deimv2":
        assert_close(added["loss_mal"], together["loss_mal"], rtol=1e-4, atol=1e-5)
        return
    for key in together:
        assert_close(added[key], together[key], rtol=1e-4, atol=1e-5)
    assert_gradients(gradients, expected)


def test_the_mean_of_dfine_is_taken_over_images():
    detector = detector_of("DFine")
    batches = [batch_of((2, 1), seed=seed) for seed in (0, 1)]  # with as many objects, so that its weights are the same
    added, gradients = loss_and_gradients(detector, batches)
    together, expected = loss_and_gradients(detector, [joined(batches)])
    for key in together:
        assert_close(added[key], together[key], rtol=1e-4, atol=1e-5)
    assert_gradients(gradients, expected)


@pytest.mark.parametrize("name", ["RTDetr", "DFine"])
def test_denoising_queries_are_in_the_loss_and_not_in_the_output(name):
    detector = detector_of(name, num_denoising=10)
    model = model_like(detector, name, num_denoising=10)
    images, targets = batch_of((3, 1))
    torch.manual_seed(5)
    expected = model(pixel_values=images, labels=labels_of(targets))
    torch.manual_seed(5)
    out = detector(images, None, targets)
    losses = gd.build_criterion(detector)(out, targets)
    assert_close(losses["loss"], expected.loss, rtol=1e-4, atol=1e-4)
    assert out.logits.shape == (1, 2, QUERIES, CLASSES)
    assert out.boxes.shape == (1, 2, QUERIES, 4)
    images, targets = batch_of((0, 0))  # there are no denoising queries then, and DDP waits for all gradients
    detector.zero_grad()
    gd.build_criterion(detector)(detector(images, None, targets), targets)["loss"].backward()
    lacking = [name for name, weight in detector.named_parameters() if weight.requires_grad and weight.grad is None]
    assert not [name for name in lacking if "denoising" in name]


@EVERY
def test_every_trained_weight_has_a_gradient_and_the_backbone_its_rate(name):
    detector = detector_of(name)
    _, gradients = loss_and_gradients(detector, [batch_of((3, 1))])
    trained = {key for key, weight in detector.named_parameters() if weight.requires_grad}
    assert trained == set(gradients)
    optimizer = build_optimizer(detector, OptimizationConfig(lr=1.0, backbone_lr=0.5))
    slow = [weight for group in optimizer.param_groups if group["lr"] == 0.5 for weight in group["params"]]
    backbone = [key for key in trained if "backbone." in key or "conv_encoder." in key]
    backbone = [key for key in backbone if "projector" not in key and "input_proj" not in key]
    assert {id(weight) for weight in slow} == {id(detector.get_parameter(key)) for key in backbone}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(trained)


@EVERY
def test_learned_queries_have_their_rate_if_asked(name):
    detector = detector_of(name)
    config = OptimizationConfig(lr=1.0, backbone_lr=0.5, query_lr=2.0)
    if name in HYBRIDS:
        with pytest.raises(ValueError, match="query_lr is the rate of learned queries, of which TransformersDetector"):
            build_optimizer(detector, config)
        return
    fast = [g["params"] for g in build_optimizer(detector, config).param_groups if g["lr"] == 2.0]
    rows = [len(weight) for weights in fast for weight in weights]
    assert rows == [QUERIES * detector.config.num_groups] * (2 if name in ("LwDetr", "RfDetr") else 1)


@pytest.mark.parametrize("evaluating", [False, True])
def test_groups_that_were_added_begin_near_the_first(evaluating):
    detector = detector_of("DeformableDetr", num_groups=3).train(not evaluating)
    key = "model.query_position_embeddings.weight"
    before = detector.model.state_dict()[key].chunk(3)
    before = [rows.clone() for rows in before]
    detector.start_groups_near_first(0.0, trained=2)
    first, second, third = detector.model.state_dict()[key].chunk(3)
    assert torch.equal(first, before[0])
    assert torch.equal(second, before[1])
    assert torch.equal(third, before[0])
    with pytest.raises(ValueError, match="the groups of LwDetrForObjectDetection are its own and trained"):
        detector_of("LwDetr").start_groups_near_first(0.1)
    detector_of("Detr").start_groups_near_first(0.1)  # whose one group is group 0


@EVERY
def test_detections_are_those_of_the_processor(name):
    detector = detector_of(name).eval()
    images, _ = batch_of((0, 0))
    sizes = torch.tensor([[100, 200], [60, 50]])
    with torch.no_grad():
        out = detector(images)
        theirs = detector.model(pixel_values=images)
    expected = processor_of(name).post_process_object_detection(theirs, threshold=0.0, target_sizes=sizes)
    found = postprocess(out, sizes, top_k=len(expected[0]["scores"]))  # RT-DETR's gives as many as there are queries
    for ours, each in zip(found, expected, strict=True):
        order = each["scores"].argsort(descending=True, stable=True)
        assert_close(ours["scores"], each["scores"][order])
        assert_close(ours["boxes"], each["boxes"][order], rtol=1e-4, atol=1e-3)
        assert torch.equal(ours["labels"], each["labels"][order])


@EVERY
def test_boxes_are_relative_to_the_image_in_its_padding(name):
    detector = detector_of(name).eval()
    images, _ = batch_of((0, 0), size=(50, 70))
    masks = torch.zeros(2, 50, 70, dtype=torch.bool)
    masks[1, 40:] = True
    masks[1, :, 35:] = True
    given = {}
    detector.model.register_forward_hook(
        lambda module, args, keywords, out: given.update(keywords, boxes=out.pred_boxes), with_kwargs=True
    )
    with torch.no_grad():
        out = detector(images, masks)
    height, width = given["pixel_values"].shape[-2:]
    assert_close(given["pixel_values"][..., :50, :70], images)
    if name in HYBRIDS:
        assert (height, width) == (64, 96)
        share = torch.tensor([[70, 50], [35, 40]]) / torch.tensor([width, height])
        assert_close(out.boxes[0] * share.repeat(1, 2)[:, None], given["boxes"])
    else:
        assert given["pixel_mask"].sum((1, 2)).tolist() == [50 * 70, 40 * 35]
        assert_close(out.boxes[0], given["boxes"])


@EVERY
def test_the_state_dict_is_what_transformers_reads(name, tmp_path):
    detector = detector_of(name)
    state = detector.state_dict()
    assert len({(tensor.data_ptr(), tensor.shape) for tensor in state.values() if tensor.numel()}) == len(
        [tensor for tensor in state.values() if tensor.numel()]
    )
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, tmp_path / "model.safetensors", PT)
    for file, text in detector.files().items():
        (tmp_path / file).write_text(text)
    model = AutoModelForObjectDetection.from_pretrained(tmp_path).eval()
    images, _ = batch_of((0, 0))
    with torch.no_grad():
        expected, out = detector.eval()(images), model(pixel_values=images)
    assert_close(out.logits, expected.logits[0], rtol=1e-4, atol=1e-4)
    assert_close(out.pred_boxes, expected.boxes[0], rtol=1e-4, atol=1e-4)
    other = detector_of(name)
    with torch.no_grad():
        for weight in other.parameters():
            weight.add_(1)
    other.load_state_dict(state)
    assert all(torch.equal(value, state[key]) for key, value in other.state_dict().items())
    with pytest.raises(RuntimeError, match=r"class_embed|class_labels|Missing"):
        other.load_state_dict({key: value for key, value in state.items() if "class_" not in key})


@pytest.mark.parametrize("name", ["ConditionalDetr", "DabDetr", "DeformableDetr"])
def test_groups_can_be_added(name):
    torch.manual_seed(0)
    detector = detector_of(name, num_groups=3)
    batches = [batch_of((3, 1), seed=0), batch_of((1, 0), seed=1)]
    added, _ = loss_and_gradients(detector, batches)
    together, _ = loss_and_gradients(detector, [joined(batches)])
    assert_close(added["loss"], together["loss"], rtol=1e-4, atol=1e-4)
    images, targets = batches[0]
    assert detector(images, None, targets).groups == gd.QueryGroups(3, QUERIES)
    state = {key: value.clone() for key, value in detector.state_dict().items()}
    detector.eval()
    with torch.no_grad():
        first, second = detector(images), detector(images, inference_group=1)
    assert not torch.allclose(first.boxes, second.boxes)
    alone = detector_of(name)
    alone.load_state_dict(state)
    with torch.no_grad():
        assert_close(alone.eval()(images).boxes, first.boxes, rtol=1e-4, atol=1e-5)
    again = detector_of(name, num_groups=3)
    again.load_state_dict(state)
    with torch.no_grad():
        assert_close(again.eval()(images, inference_group=1).boxes, second.boxes, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"inference_group must be in \[0, 3\), got 3"):
        detector(images, inference_group=3)


def test_what_a_model_cannot_do_is_refused():
    with pytest.raises(
        ValueError, match="DetrForObjectDetection trains with one group of queries that it has: set num"
    ):
        detector_of("Detr", num_groups=2)
    with pytest.raises(ValueError, match="LwDetrForObjectDetection trains with the 3 groups of queries"):
        detector_of("LwDetr", num_groups=2)
    detector = detector_of("RTDetr")
    images, targets = batch_of((1, 1))
    with pytest.raises(ValueError, match="num_groups must be 1 in this mode"):
        detector(images, num_groups=2)
    with pytest.raises(ValueError, match="training mode"):
        gd.build_criterion(detector)(detector.eval()(images), targets)
    with pytest.raises(TypeError, match="packed"):
        detector.train()(images, None, labels_of(targets))
    wrong = dataclasses.replace(targets_of((1, 1)), largest_label=CLASSES, labels=torch.full((2, 1), CLASSES))
    with pytest.raises(ValueError, match=f"label {CLASSES} is not in 0"):
        detector(images, None, wrong)
    with pytest.raises(ValueError, match="the default assignment"):
        gd.build_criterion(detector, assignment="one_to_one")


@EVERY
def test_weights_that_are_cast_at_once_give_what_autocast_gives(name):
    detector, batches = detector_of(name), [batch_of((2, 1))]
    weights = HalfWeights(detector, torch.bfloat16)

    @contextmanager
    def precision(cast):
        with torch.autocast("cpu", torch.bfloat16), cast():
            yield

    found = []
    for cast in (nullcontext, weights.cast, weights.cast):  # the first pass finds out which ones autocast casts
        torch.manual_seed(0)
        found.append(loss_and_gradients(detector, batches, partial(precision, cast)))
    expected, _, (losses, gradients) = found
    for found_of, expected_of in zip((losses, gradients), expected, strict=True):
        assert found_of.keys() == expected_of.keys()
        for key, value in expected_of.items():
            assert torch.equal(found_of[key], value), key


@pytest.mark.parametrize("name", ["DFine", "LwDetr", "DabDetr"])
def test_decoder_layers_can_be_computed_again(name):
    detector = detector_of(name)
    again = copy.deepcopy(detector)
    recompute_decoder_layers(again)
    batches = [batch_of((2, 1))]
    _, expected = loss_and_gradients(detector, batches)
    _, gradients = loss_and_gradients(again, batches)
    assert_gradients(gradients, expected)


def test_images_too_small_for_the_queries_are_refused_in_one_sentence():
    detector = detector_of("LwDetr").eval()
    with pytest.raises(ValueError, match=rf"fewer places than the model chooses for its {QUERIES} queries"):
        detector(torch.rand(1, 3, 8, 8))
