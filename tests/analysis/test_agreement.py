import pytest
import torch

import groupdetr_fast as gd
from groupdetr_fast.analysis.agreement import gradient_agreement
from groupdetr_fast.data import Batch

SIZES = {"d_model": 32, "num_heads": 2, "encoder_layers": 1, "decoder_layers": 2, "dim_feedforward": 32}
BACKBONES = {"mask2former_r50": "conv:8-8-8-8", "dino_4scale_r50": "conv:8-8-8", "conditional_detr_r50": "conv:8-8"}


def small(name, num_groups=3):
    torch.manual_seed(0)
    sizes = {**SIZES, "encoder_dim_feedforward": 32, "loss_points": 32} if name == "mask2former_r50" else SIZES
    model = gd.build_model(
        name, num_classes=3, num_groups=num_groups, num_queries=4, backbone=BACKBONES[name], dropout=0.1, **sizes
    )
    return model.double(), gd.build_criterion(model)


def two_images(masks=False):
    generator = torch.Generator().manual_seed(0)
    objects = []
    for count in (2, 1):
        boxes = torch.rand(count, 4, generator=generator, dtype=torch.float64) * 0.4 + 0.2
        entry = {"labels": torch.arange(count), "boxes": boxes}
        if masks:
            entry["masks"] = torch.rand(count, 32, 64, generator=generator) > 0.5
        objects.append(entry)
    images = torch.randn(2, 3, 32, 64, generator=generator, dtype=torch.float64)
    padding = torch.zeros(2, 32, 64, dtype=torch.bool)
    return Batch(images, padding, gd.PackedTargets.from_list(objects), [1, 2], torch.tensor([[32, 64]] * 2))


@pytest.mark.parametrize("name", BACKBONES)
def test_groups_that_are_copies_agree(name):
    model, criterion = small(name)
    state = model.state_dict()
    for key in model.group_parameters:
        rows = state[key].chunk(3)
        state[key] = torch.cat([rows[0]] * 3)
    model.load_state_dict(state)
    model.train()
    found = gradient_agreement(model, criterion, two_images(name == "mask2former_r50"))
    assert found["decoder"] == pytest.approx(1, abs=1e-9)
    assert found["memory"] == pytest.approx(1, abs=1e-9)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", ["conditional_detr_r50", "dino_4scale_r50"])
def test_the_cosine_follows_from_the_gradients_of_groups_trained_alone(name):
    """Each group as a model of its own, with the ordinary forward pass."""
    model, criterion = small(name)
    batch = two_images()
    found = gradient_agreement(model, criterion, batch)
    model.eval()
    vectors, losses = [], []
    for group in range(3):
        model.zero_grad()
        output = model(batch.images, batch.masks, inference_group=group)
        loss = criterion(output, batch.targets)["loss"]
        loss.backward()
        losses.append(loss.item())
        vectors.append(
            torch.cat(
                [
                    parameter.grad.flatten()
                    for key, parameter in model.named_parameters()
                    if key not in model.group_parameters
                    and not key.startswith(("backbone", "encoder", "input_proj", "level_embed"))
                    and parameter.grad is not None
                ]
            )
        )
    pairs = [torch.cosine_similarity(vectors[a], vectors[b], dim=0) for a, b in ((0, 1), (0, 2), (1, 2))]
    assert found["decoder"] == pytest.approx(torch.stack(pairs).mean().item(), abs=1e-9)
    assert found["loss"] == pytest.approx(sum(losses) / 3)
    assert found["decoder"] < 0.999


def test_one_group_is_refused():
    model, criterion = small("conditional_detr_r50", num_groups=1)
    with pytest.raises(ValueError, match="needs at least 2 groups, got 1"):
        gradient_agreement(model, criterion, two_images())
