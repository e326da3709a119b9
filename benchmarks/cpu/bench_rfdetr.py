"""RF-DETR in training, as it is and after ``integrations.rfdetr.accelerate``.

Its smallest published model, 13 groups, random weights: matching and losses with their backward pass alone, and a
training step, which is the forward pass, the losses and the backward pass. Of the step also the peak memory, with all
groups at once, with one group at a time, and of a model that has one group.
"""

import functools
import logging
import warnings
from dataclasses import replace

import pytest
import torch

from harness import cases
from harness.results import OURS

CASES = cases.RFDETR
AT_ONCE, THEIRS, ONE_GROUP = f"{OURS}, at once", "rfdetr", "rfdetr, one group"


def build(case):
    """Its Lightning module, in training mode and without a trainer, to which it would report."""
    from rfdetr.config import RFDETRNanoConfig, TrainConfig
    from rfdetr.training.module_model import RFDETRModelModule

    torch.manual_seed(0)
    logging.getLogger("rf-detr").setLevel(logging.ERROR)
    options = {"num_classes": case.classes, "num_queries": case.num_queries, "num_select": case.num_queries}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there are no pretrained weights
        config = RFDETRNanoConfig(pretrain_weights=None, device="cpu", group_detr=case.num_groups, **options)
        module = RFDETRModelModule(config, TrainConfig(dataset_dir=".", output_dir=".")).train()
    module.log = module.log_dict = lambda *args, **kwargs: None
    return module


def batch_of(case):
    from rfdetr.utilities.tensors import NestedTensor

    images, targets = case.make()
    return NestedTensor(images, torch.zeros(case.batch, case.size, case.size, dtype=torch.bool)), targets


def prepare_step(case):
    from groupdetr_fast.integrations.rfdetr import accelerate

    batch = batch_of(case)
    modules = {
        OURS: accelerate(build(case), groups_per_pass=1),
        AT_ONCE: accelerate(build(case)),
        THEIRS: build(case),
        ONE_GROUP: build(replace(case, num_groups=1)),
    }

    def run(name):
        modules[name].zero_grad()
        loss = modules[name].training_step(batch, 0)
        loss.backward()
        return name, loss.detach()

    expected = functools.cache(run)

    def check(result):
        name, loss = result
        # Of proposals with nearly the same score another one may come first.
        torch.testing.assert_close(loss, expected(ONE_GROUP if name == ONE_GROUP else THEIRS)[1], rtol=1e-3, atol=0)

    return {name: functools.partial(run, name) for name in modules}, check


prepare = prepare_step  # whose memory is measured


def prepare_criterion(case):
    from groupdetr_fast.integrations.rfdetr import accelerate

    theirs = build(case)
    images, targets = batch_of(case)
    with torch.no_grad():
        outputs = theirs.model(images)
    layers = [outputs, *outputs["aux_outputs"], outputs["enc_outputs"]]
    inputs = [layer[name].requires_grad_() for layer in layers for name in ("pred_logits", "pred_boxes")]

    def run(criterion):
        losses = criterion(outputs, targets)
        loss = sum(losses[name] * weight for name, weight in criterion.weight_dict.items())
        return loss.detach(), torch.autograd.grad(loss, inputs)

    runs = {OURS: functools.partial(run, accelerate(build(case)).criterion)}
    runs[THEIRS] = functools.partial(run, theirs.criterion)
    expected = functools.cache(runs[THEIRS])

    def check(result):
        torch.testing.assert_close(result, expected(), rtol=1e-4, atol=1e-6)

    return runs, check


@pytest.mark.parametrize("contender", [OURS, THEIRS])
@pytest.mark.parametrize("case", CASES, ids=str)
def bench_rfdetr_criterion(comparison, case, contender):
    comparison("rfdetr_criterion", case, contender, prepare_criterion, x="batch")


@pytest.mark.parametrize("contender", [OURS, AT_ONCE, THEIRS, ONE_GROUP])
@pytest.mark.parametrize("case", CASES[:1], ids=str)
def bench_rfdetr_step(comparison, case, contender):
    comparison("rfdetr_step", case, contender, prepare_step, x="batch", seconds=60)


@pytest.mark.parametrize("contender", [OURS, AT_ONCE, THEIRS, ONE_GROUP])
@pytest.mark.parametrize("case", CASES, ids=str)
def bench_memory_of_rfdetr_step(memory, case, contender):
    memory("rfdetr_step_memory", case, contender, __name__, x="batch")
