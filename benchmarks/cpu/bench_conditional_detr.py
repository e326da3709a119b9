"""Conditional DETR with a ResNet-50: this package against transformers, and many groups against one.

A training step is the forward pass, the loss and the backward pass; the optimiser is torch's and the same for all.
Dropout is off, since results with it could not be compared; but one comparison is of dropout. Steps keep the memory
that they free, as they do in this package's training loop; those of the contenders do so, too.
"""

import functools
from unittest import mock

import pytest
import torch

import groupdetr_fast as gd
from groupdetr_fast import ops
from groupdetr_fast.ops import _dropout
from groupdetr_fast.training.host_memory import keep_freed_memory
from harness import cases, naive
from harness.results import OURS

CASES = cases.DETECTION
BASE = CASES[0]
TORCHS = "torch's dropout and attention"


def build(case, dropout=0.0):
    torch.manual_seed(0)
    return gd.build_model(
        "conditional_detr_r50",
        num_classes=case.classes,
        num_groups=case.num_groups,
        num_queries=case.num_queries,
        dropout=dropout,
        class_loss=1.0,  # as in transformers, whose cls_loss_coefficient has no effect
    )


def build_theirs(case):
    import transformers

    torch.manual_seed(0)
    config = transformers.ConditionalDetrConfig(
        num_queries=case.num_queries, num_labels=case.classes, dropout=0.0, auxiliary_loss=True
    )
    return transformers.ConditionalDetrForObjectDetection(config)


def pair(case):
    """Both models with the same weights."""
    theirs, ours = build_theirs(case), build(case)
    with torch.no_grad():  # it starts at zero, and then no gradient passes through it
        theirs.bbox_predictor.layers[-1].weight.normal_(std=0.02)
    report = gd.load_checkpoint(ours, theirs.state_dict())
    assert not report.missing, str(report)
    assert not report.dropped, str(report)
    return ours, theirs


def prepare_inference(case):
    images, masks, _ = case.make()
    ours, theirs = (model.eval() for model in pair(case))

    @torch.inference_mode()
    def run_ours():
        out = ours(images, masks)
        return out.logits[-1], out.boxes[-1]

    @torch.inference_mode()
    def run_theirs():
        out = theirs(pixel_values=images, pixel_mask=(~masks).long())
        return out.logits, out.pred_boxes

    return {OURS: run_ours, "transformers": run_theirs}, close_to(run_ours, 1e-4)


# Parameters whose gradients are compared, in this package and in transformers: the last and the first that are trained.
COMPARED = {
    "query_embed.weight": "model.query_position_embeddings.weight",
    "backbone.body.layer2.0.conv1.weight": "model.backbone.model.layer2.0.conv1.weight",
}


def prepare_training(case):
    images, masks, targets = case.make()
    labels = [{"class_labels": target["labels"], "boxes": target["boxes"]} for target in targets]
    ours, theirs = (model.train() for model in pair(case))
    criterion = gd.build_criterion(ours)

    def run_ours():
        loss = criterion(ours(images, masks), gd.PackedTargets.from_list(targets))["loss"]
        return loss.detach(), *gradients(loss, ours, COMPARED.keys())

    def run_theirs():
        loss = theirs(pixel_values=images, pixel_mask=(~masks).long(), labels=labels).loss
        return loss.detach(), *gradients(loss, theirs, COMPARED.values())

    return {OURS: run_ours, "transformers": run_theirs}, close_to(run_ours, 1e-3)


def prepare(case):
    """Training steps with groups: with the op, and with a block mask in its place."""
    images, masks, targets = case.make()
    model = build(case).train()
    criterion = gd.build_criterion(model)

    def run(attend):
        def grouped_attention(query, key, value, groups, *, dropout_p):
            assert dropout_p == 0
            return attend(query, key, value, groups)

        with mock.patch.object(ops, "grouped_attention", grouped_attention):
            loss = criterion(model(images, masks), gd.PackedTargets.from_list(targets))["loss"]
        return loss.detach(), *gradients(loss, model, COMPARED.keys())

    op = ops.grouped_attention
    attentions = {
        OURS: op,
        "masked SDPA": naive.masked_sdpa,
        "explicit mask": naive.explicit_mask_attention,
    }
    runs = {name: functools.partial(run, attend) for name, attend in attentions.items()}
    return runs, close_to(runs[OURS], 1e-3)


def prepare_dropout(case):
    """Training steps with the paper's dropout, and with torch's own and its attention in the layers."""
    images, masks, targets = case.make()
    packed = gd.PackedTargets.from_list(targets)
    model, quiet = build(case, dropout=0.1).train(), build(case).train()
    criterion = gd.build_criterion(model)

    def run():
        loss = criterion(model(images, masks), packed)["loss"]
        gradients(loss, model, COMPARED.keys())
        return loss.detach()

    def run_torchs():
        with mock.patch.object(_dropout, "has_kernel", return_value=False):
            return run()

    @functools.cache
    def without():
        return criterion(quiet(images, masks), packed)["loss"].detach()

    def check(loss):
        torch.testing.assert_close(loss, without(), rtol=0.2, atol=0)

    return {OURS: run, TORCHS: run_torchs}, check


def gradients(loss, model, names):
    """Those of all trained parameters are computed, those of ``names`` are returned."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    grads = dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))
    return [grads[name] for name in names]


def close_to(run, tolerance):
    """A check of results: equal to those of ``run`` up to ``tolerance`` times the largest value."""
    expected = functools.cache(run)

    def check(result):
        for found, wanted in zip(result, expected(), strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance * wanted.abs().max().item())

    return check


@pytest.mark.parametrize("contender", [OURS, "transformers"])
def bench_inference(comparison, contender):
    comparison("inference", BASE, contender, prepare_inference, seconds=25)


@pytest.mark.parametrize("contender", [OURS, "transformers"])
def bench_training_step(comparison, contender):
    keep_freed_memory()
    comparison("training_step", BASE, contender, prepare_training, seconds=60)


CONTENDERS = (OURS, "masked SDPA", "explicit mask")


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("case", CASES, ids=str)
def bench_training_step_with_groups(comparison, case, contender):
    keep_freed_memory()
    # All in one run, since what K groups cost is the ratio of two cases.
    comparison("training_step_with_groups", case, contender, prepare, x="num_groups", seconds=240, together=CASES)


@pytest.mark.parametrize("contender", [OURS, TORCHS])
@pytest.mark.parametrize("case", CASES, ids=str)
def bench_training_step_with_dropout(comparison, case, contender):
    keep_freed_memory()
    comparison(
        "training_step_with_dropout", case, contender, prepare_dropout, x="num_groups", seconds=120, together=CASES
    )


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("case", CASES, ids=str)
def bench_memory_of_training_step(memory, case, contender):
    memory("training_step_memory", case, contender, __name__, x="num_groups")
