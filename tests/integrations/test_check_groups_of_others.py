"""``check_groups`` on models of transformers and rfdetr."""

from dataclasses import asdict

import pytest
import torch
from tiny_transformers import GROUPS, QUERIES, model_of

import groupdetr_fast as gd
from groupdetr_fast.integrations.transformers import accelerate, add_groups
from groupdetr_fast.models.checkpoints import CheckpointHeader
from groupdetr_fast.training.checkpoint import write_weights

compiled = pytest.mark.skipif(gd.ops.backends()["linear_assignment"]["cpu"] != "C++", reason="no compiled kernels")


@pytest.mark.parametrize("name", ["LwDetr", "RfDetr"])
def test_groups_are_apart_and_the_loss_of_evaluation_is_not_that_of_one(name):
    report = gd.check_groups(model_of(name))
    assert (report.num_groups, report.queries_per_group, report.evaluation_group) == (GROUPS, QUERIES, 0)
    assert any(each.startswith("model.enc_out_class_embed.2.") for each in report.parameters)
    for output in report.outputs:
        assert not output.group_gradient, output
        assert not output.group_change, output
    checked = {output.name for output in report.outputs if output.group_gradient is not None}
    assert {"logits", "pred_boxes", "enc_outputs_class", "enc_outputs_coord_logits"} <= checked
    (fault,) = report.faults
    assert fault.startswith("the loss of evaluation mode is not that of one group")
    loss = report.evaluation_loss
    assert (loss.matched_training, loss.matched_evaluation) == (GROUPS * 5, 6)
    assert abs(loss.value - loss.one_group) > 1


@compiled
@pytest.mark.parametrize("name", ["LwDetr", "RfDetr"])
def test_accelerate_mends_the_loss_of_evaluation(name):
    report = gd.check_groups(accelerate(model_of(name)))
    assert report.ok, report
    assert report.evaluation_loss.value == pytest.approx(report.evaluation_loss.one_group, rel=1e-5)


@pytest.mark.parametrize("name", ["ConditionalDetr", "DabDetr", "DeformableDetr"])
def test_added_groups_are_apart(name):
    report = gd.check_groups(add_groups(model_of(name), 3))
    assert report.ok, report
    assert (report.num_groups, report.queries_per_group) == (3, QUERIES)
    assert report.evaluation_loss.is_of_one_group


def test_denoising_queries_of_a_model_with_one_group():
    report = gd.check_groups(model_of("RTDetr"))
    assert report.ok
    assert report.num_groups == 1


def test_detectors_of_transformers_of_the_class_and_of_a_run(tmp_path):
    """With the groups that they are trained with, of which transformers knows the first alone."""
    model_of("DeformableDetr").save_pretrained(tmp_path / "pretrained")
    name = f"transformers:{tmp_path / 'pretrained'}"
    assert gd.check_groups(name).num_groups == 1
    built = gd.Detector(name, num_groups=3)
    trained = built.in_training()
    header = CheckpointHeader(model=name, model_config=asdict(trained.config), transformers=trained.describe())
    best = tmp_path / "run" / "checkpoints" / "best"
    best.mkdir(parents=True)
    write_weights(best / "model.safetensors", trained.state_dict(), header.to_json())
    for file, text in trained.files().items():
        (best / file).write_text(text)
    for source in (built, tmp_path / "run", best, gd.Detector.from_pretrained(best, device="cpu")):
        report = gd.check_groups(source)
        assert report.ok, report
        assert (report.model, report.num_groups) == ("DeformableDetrForObjectDetection", 3)
        assert report.evaluation_loss.is_of_one_group


def test_a_directory_with_a_configuration_alone(tmp_path):
    model = model_of("LwDetr")
    model.config.architectures = ["LwDetrForObjectDetection"]
    model.config.save_pretrained(tmp_path)
    assert gd.check_groups(tmp_path).num_groups == GROUPS
    model.save_pretrained(tmp_path)
    report = gd.check_groups(str(tmp_path))
    assert report.model == "LwDetrForObjectDetection"
    assert report.evaluation_loss.matched_evaluation == 6


def keypoint_config(**overrides):
    config = pytest.importorskip("rfdetr.config", reason="rfdetr is not installed")
    sizes = {"dec_layers": 2, "num_queries": 9, "num_select": 9, "group_detr": 2, "num_windows": 1}
    return config.RFDETRKeypointPreviewConfig(device="cpu", resolution=48, **{**sizes, **overrides})


@pytest.mark.slow
@pytest.mark.parametrize("leaks", [False, True])
def test_keypoints_of_rfdetr_that_attend_to_other_instances(leaks):
    """In rfdetr 1.11.2 ``inter_instance_kp_attn`` lets the keypoints of all groups attend to each other."""
    torch.manual_seed(0)
    report = gd.check_groups(keypoint_config(inter_instance_kp_attn=leaks))
    assert (report.num_groups, report.queries_per_group) == (2, 9)
    assert report.ok == (not leaks), report
    assert report.evaluation_loss.is_of_one_group
    gradients = {output.name: output.group_gradient for output in report.outputs}
    assert (gradients["pred_keypoints"] > 1e-4) == leaks


@pytest.mark.slow
def test_fewer_tokens_than_queries_in_rfdetr():
    """4 tokens are selected for the 9 queries of each of 2 groups, and all 8 serve the first 8 rows."""
    report = gd.check_groups(keypoint_config(use_grouppose_keypoints=False), image_size=(24, 24))
    assert [fault.split()[0] for fault in report.faults] == ["groups"]
    assert "[2, 8, 91] in training mode and [2, 4, 91]" in report.not_checked["enc_outputs.pred_logits"]


@pytest.mark.slow
def test_names_of_rfdetr():
    pytest.importorskip("rfdetr.config", reason="rfdetr is not installed")
    with pytest.raises(ValueError, match="rfdetr has no configuration RFDETRNone"):
        gd.check_groups("RFDETRNone")
