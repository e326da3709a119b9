"""Peak memory of Mask2Former's matching and loss with its backward pass: this package against transformers.

transformers wants the masks of all queries of all layers at a quarter of the image's resolution, as the original
repository does, and has no groups: its loss is called for one group after the other. Both draw points at random, so
that their losses are close but not equal.
"""

import pytest
import torch

import groupdetr_fast as gd
from harness import cases
from harness.results import OURS

CASES = cases.MASKS


def prepare(case):
    out, targets = case.make_predictions(), gd.PackedTargets.from_list(case.make_targets())
    config = gd.models.model_config("mask2former_r50", num_classes=case.classes, loss_points=case.points)
    criterion = gd.build_criterion(config)

    def run_ours():
        losses = criterion(out, targets)
        losses["loss"].backward()
        return losses["loss"].detach()

    def run_theirs():
        from transformers import Mask2FormerConfig
        from transformers.models.mask2former.modeling_mask2former import Mask2FormerLoss

        theirs = Mask2FormerLoss(Mask2FormerConfig(num_labels=case.classes, train_num_points=case.points), {})
        masks = [torch.einsum("bqd,bdhw->bqhw", layer, out.mask_features) for layer in out.mask_embeddings]
        mask_labels, labels = [mask.float() for mask in targets.masks], list(targets.labels)
        total = 0.0
        for logits, of_layer in zip(out.logits, masks, strict=True):
            for group in range(case.num_groups):
                rows = slice(*out.groups.group_range(group))
                losses = theirs(of_layer[:, rows], logits[:, rows], mask_labels, labels)
                weighted = 2 * losses["loss_cross_entropy"] + 5 * losses["loss_mask"] + 5 * losses["loss_dice"]
                total = total + weighted / case.num_groups
        total.backward()
        return total.detach()

    expected = []

    def check(loss):
        if not expected:
            expected.append(run_ours())
        torch.testing.assert_close(loss, expected[0], rtol=0.03, atol=0)

    return {OURS: run_ours, "transformers": run_theirs}, check


@pytest.mark.parametrize("contender", [OURS, "transformers"])
@pytest.mark.parametrize("case", CASES, ids=str)
def bench_memory_of_mask_loss(memory, case, contender):
    memory("mask_loss_memory", case, contender, __name__, x="num_groups")
