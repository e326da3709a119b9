"""Matching and the whole loss with its backward pass: this package against transformers' LW-DETR (13 groups' code)."""

import cases
import pytest
import torch

import groupdetr_fast as gd

lw_detr = pytest.importorskip("transformers.loss.loss_lw_detr")

CASES = [case for case in cases.MATCHING if case.targets in (20, 100)]


def match_with_op(case, out, targets):
    criterion = gd.build_criterion("conditional_detr_r50")
    packed = gd.PackedTargets.from_list(targets)
    matching = criterion.matcher(out.logits, out.boxes, packed, out.groups)
    return matching.queries.view(case.layers, case.batch, case.num_groups, case.targets)


def match_with_transformers(case, out, targets):
    matcher = lw_detr.LwDetrHungarianMatcher(class_cost=2, bbox_cost=5, giou_cost=2)
    labels = [{"class_labels": target["labels"], "boxes": target["boxes"]} for target in targets]
    queries = torch.empty(case.layers, case.batch, case.num_groups, case.targets, dtype=torch.int64)
    for layer in range(case.layers):
        outputs = {"logits": out.logits[layer], "pred_boxes": out.boxes[layer]}
        for image, (rows, columns) in enumerate(matcher(outputs, labels, case.num_groups)):
            for group in range(case.num_groups):
                inside = slice(group * case.targets, (group + 1) * case.targets)
                queries[layer, image, group, columns[inside]] = rows[inside]
    return queries


def total_cost(case, out, targets, queries):
    cost = gd.ops.matching_cost(out.logits, out.boxes, gd.PackedTargets.from_list(targets)).double()
    return cost.gather(-1, queries.movedim(-1, -2).flatten(-1).transpose(-1, -2).reshape(*cost.shape[:-1], -1)).sum()


@pytest.mark.parametrize("match", [match_with_op, match_with_transformers])
@pytest.mark.parametrize("case", CASES, ids=str)
def bench_matching(benchmark, case, match, threads):
    benchmark.group = f"matching {case}, {threads} threads"
    out, targets = case.make()
    queries, best = match(case, out, targets), match_with_op(case, out, targets)
    torch.testing.assert_close(
        total_cost(case, out, targets, queries), total_cost(case, out, targets, best), rtol=1e-6, atol=0
    )
    benchmark.pedantic(match, (case, out, targets), rounds=5, warmup_rounds=1)


def loss_with_op(case, out, targets):
    return gd.build_criterion("conditional_detr_r50")(out, gd.PackedTargets.from_list(targets))


def loss_with_transformers(case, out, targets):
    matcher = lw_detr.LwDetrHungarianMatcher(class_cost=2, bbox_cost=5, giou_cost=2)
    criterion = lw_detr.LwDetrImageLoss(matcher, case.classes, 0.25, ["labels", "boxes"], case.num_groups)
    labels = [{"class_labels": target["labels"], "boxes": target["boxes"]} for target in targets]
    layers = [{"logits": a, "pred_boxes": b} for a, b in zip(out.logits, out.boxes, strict=True)]
    losses = criterion({**layers[-1], "auxiliary_outputs": layers[:-1]}, labels)
    losses["loss"] = sum(losses.values())
    return losses


def backward(loss, case, out, targets):
    return torch.autograd.grad(loss(case, out, targets)["loss"], (out.logits, out.boxes))


@pytest.mark.parametrize("loss", [loss_with_op, loss_with_transformers])
@pytest.mark.parametrize("case", CASES, ids=str)
def bench_criterion(benchmark, case, loss, threads):
    benchmark.group = f"criterion {case}, {threads} threads"
    out, targets = case.make()
    out.logits.requires_grad_()
    out.boxes.requires_grad_()
    found, expected = loss(case, out, targets), loss_with_op(case, out, targets)
    for name in ("loss_bbox", "loss_giou", "loss_bbox_0", "loss_giou_0"):  # its class loss is another one
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5)
    benchmark.pedantic(backward, (loss, case, out, targets), rounds=5, warmup_rounds=1)
