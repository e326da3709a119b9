"""Matching, and the whole loss with its backward pass: this package against the matchers and losses of LW-DETR.

transformers has LW-DETR's, RF-DETR its own descendant of them. Both have the same costs, box losses and treatment of
groups as this package; their class loss is another one, of similar work. The targets arrive as a data loader makes
them: a list of dictionaries for the peers, and packed for this package; packing is timed too.
"""

import functools

import pytest
import torch

import groupdetr_fast as gd
from harness import cases
from harness.results import OURS

MODEL = "conditional_detr_r50"


class Ours:
    def __init__(self, case):
        self.case = case
        self.criterion = gd.build_criterion(MODEL)

    def match(self, out, targets):
        return self.criterion.matcher(out.logits, out.boxes, gd.PackedTargets.from_list(targets), out.groups)

    def queries(self, matching):
        return matching.queries.unflatten(-1, (self.case.num_groups, self.case.targets))

    def loss(self, out, targets):
        return self.criterion(out, gd.PackedTargets.from_list(targets))


class Peer:
    """A matcher that returns (queries, targets) per image and layer, and a loss that calls it."""

    def __init__(self, case):
        self.case = case

    def queries(self, matching):
        """``[layers, B, K, T]`` from the peer's pairs."""
        case = self.case
        queries = torch.empty(case.layers, case.batch, case.num_groups, case.targets, dtype=torch.int64)
        for layer, of_images in enumerate(matching):
            for image, (rows, columns) in enumerate(of_images):
                queries[layer, image, rows // case.num_queries, columns] = rows
        return queries

    def weigh(self, losses):
        losses["loss"] = sum(
            weight * value
            for name, value in losses.items()
            for loss, weight in (("loss_ce", 2.0), ("loss_bbox", 5.0), ("loss_giou", 2.0))
            if name.startswith(loss)
        )
        return losses


class Transformers(Peer):
    def __init__(self, case):
        from transformers.loss import loss_lw_detr

        super().__init__(case)
        self.matcher = loss_lw_detr.LwDetrHungarianMatcher(class_cost=2, bbox_cost=5, giou_cost=2)
        names = ["labels", "boxes", "cardinality"]
        self.criterion = loss_lw_detr.LwDetrImageLoss(self.matcher, case.classes, 0.25, names, case.num_groups)

    def match(self, out, targets):
        return [self.matcher(layer, self._labels(targets), self.case.num_groups) for layer in self._layers(out)]

    def loss(self, out, targets):
        *others, last = self._layers(out)
        return self.weigh(self.criterion({**last, "auxiliary_outputs": others}, self._labels(targets)))

    @staticmethod
    def _layers(out):
        return [{"logits": a, "pred_boxes": b} for a, b in zip(out.logits, out.boxes, strict=True)]

    @staticmethod
    def _labels(targets):
        return [{"class_labels": target["labels"], "boxes": target["boxes"]} for target in targets]


class RfDetr(Peer):
    def __init__(self, case):
        from rfdetr.models.criterion import SetCriterion
        from rfdetr.models.matcher import HungarianMatcher

        super().__init__(case)
        self.matcher = HungarianMatcher(cost_class=2, cost_bbox=5, cost_giou=2, focal_alpha=0.25)
        names = ["labels", "boxes", "cardinality"]
        self.criterion = SetCriterion(
            case.classes, self.matcher, {}, 0.25, names, group_detr=case.num_groups, ia_bce_loss=True
        )

    def match(self, out, targets):
        # All layers in one call, as its criterion does it.
        return self.matcher._match_many(self._layers(out), targets, self.case.num_groups)

    def loss(self, out, targets):
        *others, last = self._layers(out)
        return self.weigh(self.criterion({**last, "aux_outputs": others}, targets))

    @staticmethod
    def _layers(out):
        return [{"pred_logits": a, "pred_boxes": b} for a, b in zip(out.logits, out.boxes, strict=True)]


CONTENDERS = {OURS: Ours, "transformers": Transformers, "rfdetr": RfDetr}


def each_contender(run, case):
    """``run`` of a function that makes a contender at the first call, as one that is missing fails only then."""
    makers = {name: functools.cache(functools.partial(make, case)) for name, make in CONTENDERS.items()}
    return {name: functools.partial(run, make) for name, make in makers.items()}


def prepare_matching(case):
    out, targets = case.make()

    def total_cost(queries):
        cost = gd.ops.matching_cost(out.logits, out.boxes, gd.PackedTargets.from_list(targets)).double()
        return cost.gather(-1, queries.movedim(-1, -2)).sum()

    def check(result):
        contender, matching = result
        queries = contender.queries(matching)
        size = case.num_queries
        groups = torch.arange(case.num_groups)[:, None]
        assert (queries // size == groups).all(), "a target is matched to a query of another group"
        assert all(len(set(row.tolist())) == case.targets for row in queries.flatten(0, 2)), "a query is matched twice"
        ours = Ours(case)
        best = total_cost(ours.queries(ours.match(out, targets)))
        torch.testing.assert_close(total_cost(queries), best, rtol=1e-6, atol=0)

    def run(make):
        contender = make()
        return contender, contender.match(out, targets)

    return each_contender(run, case), check


def prepare_criterion(case):
    out, targets = case.make()
    out.logits.requires_grad_()
    out.boxes.requires_grad_()

    def run(make):
        losses = make().loss(out, targets)
        return losses, torch.autograd.grad(losses["loss"], (out.logits, out.boxes))

    def check(result):
        losses, _ = result
        expected = Ours(case).loss(out, targets)
        for name in [name for name in expected if name.startswith(("loss_bbox", "loss_giou"))]:
            torch.testing.assert_close(losses[name], expected[name], rtol=1e-5, atol=1e-5)

    return each_contender(run, case), check


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("case", cases.MATCHING, ids=str)
def bench_matching(comparison, case, contender):
    comparison("matching", case, contender, prepare_matching, x="targets")


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("case", cases.MATCHING, ids=str)
def bench_criterion(comparison, case, contender):
    comparison("criterion", case, contender, prepare_criterion, x="targets")
