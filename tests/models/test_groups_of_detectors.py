"""What every detector must do with its groups: keep them apart, each the base model, in any mode and precision."""

import pytest
import torch
from small_detectors import SMALL, outputs, padded_batch, random_targets, small_detector, train_on_digits

import groupdetr_fast as gd
from groupdetr_fast.models import Detector
from groupdetr_fast.training.passes import DecodesGroups

DETECTORS = ("conditional_detr_r50", "dab_detr_r50", "dn_detr_r50", "dab_deformable_detr_r50", "dino_4scale_r50")
MODELS = (*DETECTORS, "mask2former_r50")
SIZE = SMALL["num_queries"]


def forwards(model, images, masks):
    """The model in training mode, and in evaluation mode with an explicit number of groups."""
    torch.manual_seed(2)
    yield "train", model(images, masks)
    for module in model.modules():
        module.eval()
    yield "eval", model(images, masks, num_groups=model.config.num_groups)


@pytest.mark.parametrize("name", MODELS)
def test_every_detector_is_called_alike(name):
    model = small_detector(name)
    assert type(model).forward is Detector.forward
    assert isinstance(model, DecodesGroups)
    assert set(model.group_parameters) <= {parameter for parameter, _ in model.named_parameters()}
    assert len(model.decoder.layers) == model.config.decoder_layers


@pytest.mark.parametrize("name", MODELS)
def test_no_gradient_between_groups_or_images(name):
    model = small_detector(name, dropout=0.1)
    images, masks = padded_batch()
    images.requires_grad_()
    queries = [model.get_parameter(parameter) for parameter in model.group_parameters]
    for mode, out in forwards(model, images, masks):
        assert out.groups == gd.QueryGroups(3, SIZE), mode
        for image in range(2):
            for group in range(3):
                # A random weighting: the sum of a layer norm's outputs would have no gradient at all.
                output = outputs(out)[:, image, group * SIZE : (group + 1) * SIZE]
                loss = (output * torch.randn_like(output)).sum()
                image_grad, *query_grads = torch.autograd.grad(loss, (images, *queries), retain_graph=True)
                assert image_grad[image].abs().max() > 0, mode
                assert not image_grad[1 - image].any(), f"{mode}: image {1 - image} leaks into image {image}"
                others = [g for g in range(3) if g != group]
                for grad in query_grads:
                    by_group = grad.unflatten(0, (3, -1))
                    assert by_group[group].abs().max() > 0, mode
                    assert not by_group[others].any(), f"{mode}: other groups leak into group {group}"


@pytest.mark.parametrize("name", MODELS)
def test_groups_together_equal_groups_apart(name):
    model = small_detector(name).eval()
    images, masks = padded_batch()
    together = outputs(model(images, masks, num_groups=3)).chunk(3, dim=2)
    for group in range(3):
        apart = outputs(model(images, masks, inference_group=group))
        torch.testing.assert_close(together[group], apart, rtol=1e-5, atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_one_group_is_the_base_model(name):
    """Group 0 of a grouped model computes what a model with one group and the same weights computes."""
    grouped, base = small_detector(name, num_groups=3), small_detector(name, num_groups=1)
    state = grouped.state_dict()
    for parameter in grouped.group_parameters:
        state[parameter] = state[parameter].chunk(3)[0]
    base.load_state_dict(state)
    images, masks = padded_batch()
    expected = outputs(base.eval()(images, masks, num_groups=1))
    out = grouped.eval()(images, masks)
    assert torch.equal(outputs(out), expected)
    assert out.groups == gd.QueryGroups(1, SIZE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_groups": 4}, r"num_groups must be in \[1, 3\]"),
        ({"num_groups": 0}, r"num_groups must be in \[1, 3\]"),
        ({"inference_group": 3}, r"inference_group must be in \[0, 3\)"),
    ],
)
@pytest.mark.parametrize("name", MODELS)
def test_impossible_groups_are_refused(name, arguments, message):
    model = small_detector(name).eval()
    with pytest.raises(ValueError, match=message):
        model(torch.randn(1, 3, 32, 32), **arguments)


@pytest.mark.parametrize("name", MODELS)
def test_unpadded_batch_needs_no_mask(name):
    model = small_detector(name).eval()
    images = torch.randn(2, 3, 48, 64)
    masks = torch.zeros(2, 48, 64, dtype=torch.bool)
    torch.testing.assert_close(outputs(model(images)), outputs(model(images, masks)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", DETECTORS)
def test_bfloat16_autocast_trains(name):
    """All losses and gradients are finite, and the predictions are those of float32 to the precision of bfloat16."""
    model = small_detector(name, dropout=0.0)
    images, masks = padded_batch()
    targets = random_targets(3, 1)
    criterion = gd.build_criterion(model)
    expected = outputs(model(images, masks))
    with torch.autocast("cpu", torch.bfloat16):
        assert (outputs(model(images, masks)) - expected).abs().mean() < 0.05 * expected.abs().mean()
        losses = criterion(model(images, masks, targets), targets)
    losses["loss"].backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert torch.isfinite(parameter.grad).all(), parameter_name


class Inference(torch.nn.Module):
    """A detector with tensors as its only outputs."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images, masks):
        out = self.model(images, masks)
        return out.logits[-1], out.boxes[-1]


@pytest.mark.parametrize("name", DETECTORS)
def test_inference_with_one_group_exports(name):
    model = Inference(small_detector(name)).eval()
    images, masks = padded_batch()
    exported = torch.export.export(model, (images, masks)).module()
    other, other_masks = images.flip(0), masks.flip(0)
    for a, b in zip(exported(other, other_masks), model(other, other_masks), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", DETECTORS)
def test_a_few_steps_lower_the_losses(name, tmp_path):
    torch.manual_seed(0)
    model = gd.build_model(name, num_classes=10, num_groups=2, **SMALL)
    history = train_on_digits(model, tmp_path, steps=40)
    for key in ("loss", "loss_ce", "loss_bbox", "loss_giou"):
        first, last = (sum(step[key] for step in part) / 5 for part in (history[:5], history[-5:]))
        assert last < 0.9 * first, key
