"""``check_groups`` finds the faults that public code has had, and none where there is none."""

import json
from dataclasses import asdict

import pytest
import torch
from faulty_detectors import (
    AllQueriesTogether,
    BatchAndSequenceExchanged,
    DetachedMean,
    Interleaved,
    NormOverQueries,
    SelfAttention,
    ShapeFromBeforeTheSplit,
    SmallDetector,
    broken,
    loss_of,
    mixed_groups,
    no_model,
    sound,
    targets_of,
    with_inputs,
)

import groupdetr_fast as gd
from groupdetr_fast.models.checkpoints import CheckpointHeader
from groupdetr_fast.training.checkpoint import write_weights


def detector(*args, **kwargs):
    torch.manual_seed(0)
    return SmallDetector(*args, **kwargs)


def check(model, **kwargs):
    return gd.check_groups(model, **{"image_size": (32, 32), **kwargs})


def numbers(report, name):
    return {output.name: getattr(output, name) for output in report.outputs}


def test_a_sound_detector_passes():
    report = check(sound())
    assert report.ok
    assert (report.num_groups, report.queries_per_group, report.evaluation_group) == (3, 5, 0)
    assert report.parameters == ("query_embed.weight",)
    assert set(numbers(report, "shape")) == {"pred_logits", "pred_boxes", "of_training"}
    for kind in ("group_gradient", "group_change", "image_gradient", "image_change"):
        assert set(numbers(report, kind).values()) == {0.0}, kind
    assert all(own > 0 for own in numbers(report, "own_gradient").values())
    assert any("training mode alone has of_training" in note for note in report.notes)
    assert any("dropout was off in 2 modules" in note for note in report.notes)
    assert "no loss is known" in report.not_checked["loss of evaluation mode"]
    text = str(report)
    assert text.startswith("SmallDetector: 3 groups of 5 queries; evaluation uses group 0\n")
    assert text.endswith("\nno group sees another")


def test_queries_of_all_groups_in_one_attention():
    report = check(detector(AllQueriesTogether))
    assert not report.ok
    for kind in ("group_gradient", "group_change"):
        assert min(numbers(report, kind).values()) > 1e-6, kind
    for kind in ("image_gradient", "image_change"):
        assert set(numbers(report, kind).values()) == {0.0}, kind
    (fault,) = report.faults
    assert fault.startswith("groups see each other in pred_logits, pred_boxes, of_training: group ")


@pytest.mark.parametrize("batch_size", [2, 3])
def test_a_shape_from_before_the_split_mixes_groups_and_images(batch_size):
    report = check(detector(ShapeFromBeforeTheSplit), batch_size=batch_size)
    assert [fault.split()[0] for fault in report.faults] == ["groups", "images"]
    for kind in ("group_gradient", "group_change", "image_gradient", "image_change"):
        assert min(numbers(report, kind).values()) > 1e-6, kind


def test_images_that_attend_to_each_other():
    report = check(detector(BatchAndSequenceExchanged, groups=1))
    assert [fault.split()[0] for fault in report.faults] == ["images"]
    for kind in ("image_gradient", "image_change"):
        assert min(numbers(report, kind).values()) > 1e-6, kind


def test_what_has_no_gradient_shows_as_a_change():
    report = check(detector(DetachedMean))
    assert set(numbers(report, "group_gradient").values()) == {0.0}
    assert min(numbers(report, "group_change").values()) > 1e-6
    assert not report.ok


def test_batch_norms_are_frozen_and_told():
    report = check(detector(NormOverQueries))
    assert set(numbers(report, "group_gradient").values()) == {0.0}
    (fault,) = report.faults
    assert fault.startswith("groups see each other by the statistics of batch norms")
    assert any("1 batch norm frozen" in note for note in report.notes)


def test_targets_that_reach_the_groups():
    batch = {"images": torch.randn(2, 3, 32, 32), "targets": targets_of()}
    report = check(detector(mask_denoising=False), inputs=batch)
    assert [fault.split()[1] for fault in report.faults] == ["targets"]
    assert numbers(report, "target_change")["pred_logits"] > 1e-6
    assert numbers(report, "target_change")["of_training"] is None
    report = check(detector(), inputs=batch)
    assert report.ok
    assert numbers(report, "target_change")["pred_logits"] == 0
    for masked in (True, False):
        report = check(detector(groups=1, mask_denoising=masked), inputs=batch)
        assert (report.num_groups, report.ok) == (1, masked)


def test_groups_that_are_interleaved():
    report = check(detector(Interleaved))
    assert report.ok
    assert any("interleaved" in note for note in report.notes)


def test_heads_of_each_group_are_theirs():
    report = check(detector(heads_of_groups=True))
    assert report.ok
    assert {f"encoder_heads.{group}.weight" for group in range(3)} <= set(report.parameters)
    assert numbers(report, "group_gradient")["enc_logits"] == 0
    assert numbers(report, "own_gradient")["enc_logits"] > 0


def test_as_many_layers_as_groups_are_no_heads_of_groups():
    """Heads of decoder layers, of which evaluation returns the last one's output, and a table of as many rows."""

    class Layers(SmallDetector):
        def __init__(self):
            super().__init__()
            self.heads = torch.nn.ModuleList(torch.nn.Linear(16, 4) for _ in range(3))
            self.positions = torch.nn.Embedding(15, 4)

        def forward(self, images):
            out = super().forward(images)
            refined = [head(out["pred_logits"] @ self.class_embed.weight) for head in self.heads]
            last = refined[-1] + self.positions.weight[:4].sum(0)
            return {**out, "last": last, **({"every": torch.stack(refined)} if self.training else {})}

    torch.manual_seed(0)
    report = check(Layers())
    assert report.ok, report
    assert report.parameters == ("query_embed.weight",)
    assert "no more than evaluation" in report.not_checked["positions.weight"]


def test_losses_alone_cannot_be_checked():
    class Losses(SmallDetector):
        def forward(self, images):
            out = super().forward(images)
            return {"loss": out["pred_logits"].sum()} if self.training else out

    with pytest.raises(ValueError, match="its forward must return predictions, such as logits and boxes"):
        check(Losses())


def test_outputs_that_see_no_query_are_named():
    class WithFeatures(SmallDetector):
        def forward(self, images):
            flat = self.backbone(images).flatten()
            return {**super().forward(images), "features": self.backbone(images), "flat": flat}

    torch.manual_seed(0)
    report = check(WithFeatures())
    assert report.ok
    assert numbers(report, "group_gradient")["features"] is None
    assert numbers(report, "image_gradient")["features"] == 0
    assert "no dimension" in report.not_checked["flat"]


def test_both_modes_with_all_groups_need_their_number():
    class Explicit(SmallDetector):
        def forward(self, images):
            content = self.query_embed.weight.expand(len(images), -1, -1)
            self.attention.training = True
            return self.class_embed(content + self.attention(content)) + self.backbone(images).mean((2, 3))[:, None, :4]

    for attention, ok in ((SelfAttention, True), (AllQueriesTogether, False)):
        torch.manual_seed(0)
        model = Explicit(attention)
        assert check(model).num_groups == 1
        report = check(model, num_groups=3)
        assert (report.num_groups, report.queries_per_group, report.ok) == (3, 5, ok)


def test_one_group_leaves_the_images():
    report = check(detector(groups=1))
    assert report.ok
    assert (report.num_groups, report.queries_per_group) == (1, None)
    assert set(numbers(report, "image_change").values()) == {0.0}
    assert any("with one group, images are compared" in note for note in report.notes)


@pytest.mark.parametrize("groups_in_evaluation", [1, 3])
def test_the_loss_of_evaluation(groups_in_evaluation):
    """With 3 the six queries of evaluation are matched as three groups of two, as LW-DETR's are in transformers."""
    model = detector(queries=6)

    def loss(outputs):
        return loss_of(outputs, 3 if model.training else groups_in_evaluation)

    report = check(model, loss=loss)
    counted = report.evaluation_loss
    assert counted.output == "pred_boxes"
    assert counted.matched_training == 6
    assert counted.matched_evaluation == 2 * groups_in_evaluation
    assert counted.is_of_one_group == report.ok == (groups_in_evaluation == 1)


def test_functions_and_what_they_give():
    assert gd.check_groups(with_inputs).evaluation_loss.is_of_one_group
    assert not check(mixed_groups).ok
    assert not check("faulty_detectors:mixed_groups").ok
    assert check(lambda: (sound(), {"images": torch.randn(3, 3, 24, 24)})).outputs[0].shape[0] == 3


def test_images_in_a_list_that_the_model_copies():
    """As nested_tensor_from_tensor_list of DETR's code bases, where pixels can have no gradient."""

    class Copies(SmallDetector):
        def forward(self, images):
            batch = torch.zeros(len(images), 3, 32, 32)
            for image, place in zip(images, batch, strict=True):
                place[:, : image.shape[1], : image.shape[2]].copy_(image)
            return super().forward(batch)

    torch.manual_seed(0)
    report = check(Copies(), inputs=([torch.randn(3, 32, 32), torch.randn(3, 24, 32)],))
    assert report.ok
    assert set(numbers(report, "image_gradient").values()) == {None}
    assert set(numbers(report, "image_change").values()) == {0.0}
    assert "images were exchanged instead" in report.not_checked["gradients to pixels"]


def test_the_model_is_left_as_it_was():
    model = detector(NormOverQueries).eval()
    model.dropout.train()
    model.backbone.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    check(model)
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.training
    assert model.dropout.training
    assert model.cross.dropout == 0.1
    assert not model.backbone.weight.requires_grad
    assert model.bbox_embed.weight.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


def test_reports_do_not_depend_on_the_state_of_chance():
    model, first = detector(AllQueriesTogether), None
    for seed in (1, 2):
        torch.manual_seed(seed)
        report = check(model).to_json()
        first = first or report
    assert report == first


def test_the_report_as_json():
    content = json.loads(json.dumps(check(detector(AllQueriesTogether)).to_json()))
    assert content["ok"] is False
    assert content["num_groups"] == 3
    assert content["outputs"][0]["group_gradient"] > 0
    report = gd.check_groups(with_inputs)
    assert json.loads(json.dumps(report.to_json()))["evaluation_loss"]["is_of_one_group"] is True


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("no_such_model", {}, "there is no model 'no_such_model': give one of conditional_detr_r50"),
        ("faulty_detectors:nothing", {}, "there is no function faulty_detectors:nothing"),
        ("no_such_module:sound", {}, "there is no function no_such_module:sound"),
        ("faulty_detectors:DIM", {}, "must be a function that builds a model, got a int"),
        (no_model, {}, r"no_model must return a module, \(module, inputs\)"),
        (broken, {}, "broken builds no model: RuntimeError: no weights$"),
        (sound, {"batch_size": 1}, "batch_size must be at least 2"),
        (sound, {"image_size": (64, 0)}, "image_size must be a height and a width from 1 on"),
        (sound, {"num_groups": 0}, "num_groups must be at least 1"),
        (sound, {"num_groups": 4}, "SmallDetector has no 4 groups"),
        (sound, {"image_size": (4, 4)}, "SmallDetector fails in evaluation mode on the check's batch"),
        (sound, {"inputs": torch.randn(1, 3, 32, 32)}, "hold one image"),
        (sound, {"inputs": torch.zeros(2)}, "hold no images"),
        ("RFDETRNoSuchSize", {}, "rfdetr"),
    ],
)
def test_faults_of_the_caller_are_one_sentence(source, options, message):
    with pytest.raises(ValueError, match=message) as raised:
        check(source, **options)
    assert "\n" not in str(raised.value)


def test_what_has_no_backward_pass():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, images):
            return images.clone()

        @staticmethod
        def backward(ctx, grad):
            raise RuntimeError("not\nhere")

    class OneWay(SmallDetector):
        def forward(self, images):
            return {name: Once.apply(value) for name, value in super().forward(images).items()}

    torch.manual_seed(0)
    with pytest.raises(ValueError, match=r"gradients of OneWay cannot be taken: RuntimeError: not$"):
        check(OneWay())


def test_what_is_no_model():
    with pytest.raises(TypeError, match=r"model must be a module, a gd\.Detector, a function that builds one"):
        gd.check_groups(3)


def test_a_detector_of_the_class_is_checked_with_the_groups_of_its_training(tmp_path):
    sizes = {"num_queries": 4, "d_model": 32, "num_heads": 4, "encoder_layers": 1, "decoder_layers": 2}
    built = gd.Detector(num_groups=3, dim_feedforward=32, backbone="conv:8-16", **sizes)
    report = gd.check_groups(built, image_size=(32, 32))
    assert report.ok, report
    assert (report.model, report.num_groups, report.queries_per_group) == ("ConditionalDetr", 3, 4)

    header = CheckpointHeader(model="conditional_detr_r50", model_config=asdict(built.in_training().config))
    weights = built.in_training().state_dict()
    write_weights(tmp_path / "model.safetensors", weights, header.to_json())
    loaded = gd.Detector.from_pretrained(tmp_path, device="cpu")
    before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    assert gd.check_groups(lambda: loaded, image_size=(32, 32)).num_groups == 3
    assert not loaded.model.training
    assert all(torch.equal(value, before[name]) for name, value in loaded.model.state_dict().items())
    trained = loaded.in_training().state_dict()
    assert all(torch.equal(trained[name], value) for name, value in weights.items())
