"""Peak memory of a training step of Mask2Former with a ResNet-50: many groups against one."""

import pytest
import torch

import groupdetr_fast as gd
from harness import cases
from harness.results import OURS

CASES = cases.SEGMENTATION


def prepare(case):
    torch.manual_seed(0)
    model = gd.build_model(
        "mask2former_r50",
        num_classes=case.classes,
        num_groups=case.num_groups,
        num_queries=case.num_queries,
        loss_points=case.points,
    )
    criterion = gd.build_criterion(model)
    images, targets = case.make_images(), gd.PackedTargets.from_list(case.make_targets())

    def run():
        loss = criterion(model(images), targets)["loss"]
        loss.backward()
        return loss.detach()

    def check(loss):
        assert torch.isfinite(loss)

    return {OURS: run}, check


@pytest.mark.parametrize("case", CASES, ids=str)
def bench_memory_of_training_step(memory, case):
    memory("mask2former_step_memory", case, OURS, __name__, x="num_groups")
