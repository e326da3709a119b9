"""Training steps of transformers' models, as they are and after ``integrations.transformers.accelerate``.

A step is the forward pass, the loss and the backward pass. Weights are random, K = 13 groups where a model has groups.
"""

import functools

import pytest
import torch

from harness import cases
from harness.results import OURS

CLASSES = 80


def config_of(case):
    import transformers

    options = {"num_labels": CLASSES}
    if case.model in ("ConditionalDetr", "DeformableDetr"):
        options |= {"dropout": 0.0, "auxiliary_loss": True}
    elif case.model == "Mask2Former":  # with the backbone of the smallest published model
        stages = [f"stage{index}" for index in range(1, 5)]
        options["backbone_config"] = transformers.SwinConfig(depths=[2, 2, 6, 2], drop_path_rate=0, out_features=stages)
    elif case.model == "LwDetr":
        options["projector_scale_factors"] = [1.0]  # as in the smaller published models
    elif case.model == "RfDetr":  # of the smallest published model, whose images must be multiples of 32 pixels
        options["backbone_config"] = transformers.RfDetrDinov2Config(
            hidden_size=384, num_attention_heads=6, patch_size=16, num_windows=2, out_indices=[3, 6, 9, 12]
        )
        options |= {"dropout": 0.0, "decoder_layers": 2, "decoder_n_points": 2}
    return getattr(transformers, f"{case.model}Config")(**options)


def build(case):
    import transformers

    torch.manual_seed(0)
    task = "UniversalSegmentation" if case.model == "Mask2Former" else "ObjectDetection"
    model = getattr(transformers, f"{case.model}For{task}")(config_of(case)).train()
    for name, parameter in model.named_parameters():
        if "sampling_offsets" in name:  # they start with samples on centers of pixels, where slopes jump
            torch.nn.init.normal_(parameter, std=0.02 if parameter.dim() > 1 else 1.0)
    return model


def inputs_of(case):
    images, targets = case.make(CLASSES)
    if case.model == "Mask2Former":
        labels = {"class_labels": [target["labels"] for target in targets]}
        labels["mask_labels"] = [target["masks"] for target in targets]
    else:
        labels = {"labels": [{"class_labels": target["labels"], "boxes": target["boxes"]} for target in targets]}
    return {"pixel_values": images, **labels}


def prepare(case):
    from groupdetr_fast.integrations.transformers import accelerate

    inputs = inputs_of(case)

    def run(model):
        torch.manual_seed(1)  # of noise and of points at which masks are compared
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        loss = model(**inputs).loss.sum()
        gradients = torch.autograd.grad(loss, trained, allow_unused=True)
        # Biases before a normalisation have gradients that cancel, and so those of the rounding errors.
        norms = [gradient.norm() for gradient in gradients if gradient is not None and gradient.dim() > 1]
        return loss.detach(), torch.stack(norms)

    theirs = build(case)
    ours = accelerate(build(case))
    expected = functools.cache(functools.partial(run, theirs))

    def check(result):
        for found, wanted in zip(result, expected(), strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-3 * wanted.abs().max().item())

    return {OURS: functools.partial(run, ours), "transformers": functools.partial(run, theirs)}, check


@pytest.mark.parametrize("contender", [OURS, "transformers"])
@pytest.mark.parametrize("case", cases.TRANSFORMERS, ids=str)
def bench_transformers_step(comparison, case, contender):
    comparison("transformers_step", case, contender, prepare, seconds=15)
