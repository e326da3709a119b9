"""Ways to use a model's queries in inference."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

import groupdetr_fast as gd
from groupdetr_fast.analysis.experiments import with_groups
from groupdetr_fast.analysis.inference import evaluate_groups, evaluate_usages, inference_groups, suppress_duplicates
from groupdetr_fast.runs.train import train
from groupdetr_fast.training.checkpoint import latest_checkpoint


def test_suppression_inside_each_class():
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 9.0], [0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 5.0]])
    detections = {"boxes": boxes, "scores": torch.tensor([0.9, 0.8, 0.7, 0.6]), "labels": torch.tensor([1, 1, 2, 1])}
    # IoU with the first box: 0.9 (same class), 1 (another class), 0.5 (same class)
    left = suppress_duplicates(detections, 0.7)
    assert left["scores"].tolist() == pytest.approx([0.9, 0.7, 0.6])
    assert left["labels"].tolist() == [1, 2, 1]
    assert torch.equal(left["boxes"], boxes[[0, 2, 3]])
    assert suppress_duplicates(detections, 0.4)["scores"].tolist() == pytest.approx([0.9, 0.7])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"separate": True, "assignment": "group"}, (3, 5)),
        ({"separate": False, "assignment": "group"}, (3, 5)),  # table 7c uses one group, too
        ({"separate": True, "assignment": "one_to_many"}, (3, 5)),
        ({"separate": False, "assignment": "one_to_many"}, (1, 15)),
        ({"separate": False, "assignment": "one_to_one"}, (1, 15)),
    ],
)
def test_what_inference_may_keep(training, settings, expected):
    assert inference_groups(with_groups(training, 3, **settings)) == gd.QueryGroups(*expected)


@pytest.fixture
def trained(training):
    """A grouped training, with the metrics of its own evaluation and its checkpoint."""
    results = train(training)
    return training, results["epochs"][-1]["metrics"], latest_checkpoint(training.output)


def test_one_group_is_what_the_training_evaluates(trained):
    config, metrics, checkpoint = trained
    usages = evaluate_usages(config, checkpoint, 0.7)
    assert set(usages) == {"one_group", "one_group_nms", "all_queries", "all_queries_nms"}
    assert usages["one_group"] == metrics
    assert evaluate_groups(config, checkpoint)[0] == metrics


def test_a_checkpoint_brings_the_weights_of_its_backbone(training, tmp_path, caplog):
    """Neither a file that the training started from is needed, nor is there a warning that there is none."""
    model = replace(training.model, backbone="resnet18", backbone_stages=2)
    save_file(model.build_untrained(10).state_dict(), tmp_path / "model.safetensors")
    config = replace(training, model=replace(model, backbone_weights=str(tmp_path / "deleted.pth")))
    assert len(evaluate_groups(config, tmp_path)) == config.model.num_groups
    assert not caplog.records


def test_a_threshold_of_one_keeps_everything(trained):
    config, _, checkpoint = trained
    usages = evaluate_usages(config, checkpoint, 1.0)
    for usage in ("one_group", "all_queries"):
        assert usages[f"{usage}_nms"] == usages[usage]


def test_the_same_weights_with_shared_and_with_separate_attention(trained, tmp_path):
    """Seen as one sequence, all queries attend to each other; one group alone is the same in both views."""
    config, metrics, checkpoint = trained
    shared = replace(with_groups(config, 2, separate=False), output=tmp_path / "shared")
    usages = evaluate_usages(shared, checkpoint, 0.7)
    assert usages["one_group"] == metrics
    one_sequence = replace(shared, assignment="one_to_many")
    usages = evaluate_usages(one_sequence, checkpoint, 0.7)
    assert usages["one_group"] == usages["all_queries"]
