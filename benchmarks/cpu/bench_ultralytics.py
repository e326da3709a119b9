"""Ultralytics' RT-DETR in training, as it is and after ``integrations.ultralytics.accelerate``.

RT-DETR-L with random weights and Ultralytics' denoising queries: matching and losses with their backward pass alone,
and a training step, which is the forward pass, the losses and the backward pass.
"""

import functools

import pytest
import torch

from harness import cases
from harness.results import OURS

CASES = cases.ULTRALYTICS
THEIRS = "ultralytics"


def build(case):
    from ultralytics.nn.tasks import RTDETRDetectionModel
    from ultralytics.utils import LOGGER

    LOGGER.setLevel("ERROR")
    torch.manual_seed(0)
    model = RTDETRDetectionModel(case.model, nc=case.classes, verbose=False).train()
    for name, parameter in model.named_parameters():
        if "sampling_offsets" in name:  # they start with samples on centers of pixels, where slopes jump
            torch.nn.init.normal_(parameter, std=0.02 if parameter.dim() > 1 else 1.0)
    model.nc = case.classes  # which a trainer sets
    return model


def batch_of(case):
    """As Ultralytics' loader makes it."""
    images, targets = case.make()
    numbers = torch.tensor([len(target["labels"]) for target in targets])
    return {
        "img": images,
        "cls": torch.cat([target["labels"] for target in targets])[:, None].float(),
        "bboxes": torch.cat([target["boxes"] for target in targets]),
        "batch_idx": torch.arange(len(targets)).repeat_interleave(numbers).float(),
    }


def prepare_step(case):
    from groupdetr_fast.integrations.ultralytics import accelerate

    batch = batch_of(case)
    models = {OURS: accelerate(build(case)), THEIRS: build(case)}

    def run(name):
        torch.manual_seed(1)  # of denoising queries
        models[name].zero_grad()
        loss, _ = models[name](dict(batch))
        loss.backward()
        return loss.detach()

    expected = functools.cache(functools.partial(run, THEIRS))

    def check(result):
        # Of positions with nearly the same score another one may come first.
        torch.testing.assert_close(result, expected(), rtol=1e-3, atol=0)

    return {name: functools.partial(run, name) for name in models}, check


def prepare_criterion(case):
    from groupdetr_fast.integrations.ultralytics import accelerate

    theirs, batch = build(case), batch_of(case)
    calls = []
    theirs.criterion = lambda *args, **kwargs: (
        calls.append((args, kwargs)) or {f"loss_{kind}": torch.zeros(()) for kind in ("class", "bbox", "giou")}
    )
    with torch.no_grad():
        theirs(batch)
    ((((boxes, logits), targets), options),) = calls
    inputs = [x.requires_grad_() for x in (boxes, logits, options["dn_bboxes"], options["dn_scores"])]

    def run(criterion):
        loss = sum(criterion((boxes, logits), targets, **options).values())
        return loss.detach(), torch.autograd.grad(loss, inputs)

    ours = accelerate(build(case))
    runs = {
        OURS: functools.partial(run, ours.init_criterion()),
        THEIRS: functools.partial(run, theirs.init_criterion()),
    }
    expected = functools.cache(runs[THEIRS])

    def check(result):
        torch.testing.assert_close(result, expected(), rtol=1e-4, atol=1e-6)

    return runs, check


@pytest.mark.parametrize("contender", [OURS, THEIRS])
@pytest.mark.parametrize("case", CASES, ids=str)
def bench_ultralytics_criterion(comparison, case, contender):
    comparison("ultralytics_criterion", case, contender, prepare_criterion, x="targets")


@pytest.mark.parametrize("contender", [OURS, THEIRS])
@pytest.mark.parametrize("case", CASES[:1], ids=str)
def bench_ultralytics_step(comparison, case, contender):
    comparison("ultralytics_step", case, contender, prepare_step, x="targets", seconds=30)
