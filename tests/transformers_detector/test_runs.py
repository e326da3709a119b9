"""Whole runs with detectors of transformers, through the command: training, resuming, evaluation, prediction."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from tiny_detectors import GROUPS, NAMES, QUERIES, batch_of, model_of, processor_of
from tiny_transformers import lw_detr_config
from torch.testing import assert_close
from transformers import AutoImageProcessor, AutoModelForObjectDetection, LwDetrForObjectDetection, LwDetrViTConfig

import groupdetr_fast as gd
from groupdetr_fast import cli
from groupdetr_fast.commands.eval import EvalCommand
from groupdetr_fast.commands.train import training_defaults
from groupdetr_fast.data import DigitsConfig, digits_dataset
from groupdetr_fast.models.checkpoints import CheckpointHeader
from groupdetr_fast.runs import batch_size as run_batch_size
from groupdetr_fast.runs.config import CocoTrainingConfig, ModelConfig
from groupdetr_fast.runs.train import train
from groupdetr_fast.training import batch_size
from groupdetr_fast.training.checkpoint import read_checkpoint
from groupdetr_fast.transformers_detector import build
from groupdetr_fast.transformers_detector.build import load_pretrained
from groupdetr_fast.transformers_detector.detector import TransformersDetector
from groupdetr_fast.transformers_detector.source import ModelSource, read_source

DIGITS = 10  # classes


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    size = DigitsConfig(image_size=64, train_images=6, val_images=3, max_objects=3, min_digit=16, max_digit=32)
    return digits_dataset(tmp_path_factory.mktemp("digits"), config=size)


@pytest.fixture
def saved(tmp_path):
    """A function that saves a tiny model as transformers does, and returns its folder."""

    def save(name, processor=True, **overrides):
        folder = tmp_path / "pretrained"
        model_of(name, **overrides).save_pretrained(folder)
        if processor:
            processor_of(name).save_pretrained(folder)
        return folder

    return save


def data_flags(digits):
    paths = digits._asdict()
    return [part for name, path in paths.items() for part in (f"--{name.replace('_', '-')}", str(path))]


def flags(folder, digits, output, *others):
    return [
        *("train", "--model", f"transformers:{folder}", *data_flags(digits), "--output", str(output)),
        *("--epochs", "1", "--batch-size", "3", "--workers", "0", "--lr-drop", "5"),
        *("--pictures", "0", "--no-report", "--track", "none", *others),
    ]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("DFine", {"num_denoising": 6}),
        ("DeformableDetr", {}),
        *(pytest.param(name, {}, marks=pytest.mark.slow) for name in NAMES if name not in ("DFine", "DeformableDetr")),
    ],
)
def test_a_run_needs_the_directory_only_at_its_beginning(name, settings, saved, digits, tmp_path, caplog, capsys):
    folder, run = saved(name, **settings), tmp_path / "run"
    groups = ["--num-groups", "2"] if name == "DeformableDetr" else ["--pictures", "1", "--report"]
    with caplog.at_level("INFO"):
        cli.main(flags(folder, digits, run, "--ema-decay", "0.9", *groups))
    assert f"a new class head for {DIGITS} classes, in place of one for 4" in caplog.text
    shutil.rmtree(folder)
    cli.main(flags(folder, digits, run, "--ema-decay", "0.9", *groups, "--epochs", "2", "--resume"))
    results = json.loads((run / "results.json").read_text())
    assert [row["epoch"] for row in results["epochs"]] == [1, 2]
    assert results["model"] == f"transformers:{folder}"

    best = run / "checkpoints" / "best"
    model = AutoModelForObjectDetection.from_pretrained(best).eval()
    assert model.config.id2label == {number: str(number) for number in range(DIGITS)}
    assert AutoImageProcessor.from_pretrained(best).to_dict()["size"] == dict(processor_of(name).to_dict()["size"])
    images, _ = batch_of((0, 0))
    detector = gd.load_model(run, device="cpu")
    with torch.no_grad():
        expected, out = model(pixel_values=images), detector(images)
    assert_close(out.logits[0], expected.logits, rtol=1e-4, atol=1e-4)
    assert_close(out.boxes[0], expected.pred_boxes, rtol=1e-4, atol=1e-4)

    evaluated = tmp_path / "evaluated"
    arguments = ["eval", str(run), "--val-images", str(digits.val_images), "--workers", "0", "--pictures", "0"]
    cli.main([*arguments, "--no-report", "--val-annotations", str(digits.val_annotations), "--output", str(evaluated)])
    metrics = json.loads((evaluated / "metrics.json").read_text())
    assert metrics["AP"] == pytest.approx(max(row["metrics"]["AP"] for row in results["epochs"]), abs=1e-6)
    cli.main(["predict", str(run), str(digits.val_images), "--output", str(tmp_path / "out"), "--score-threshold", "0"])
    predictions = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert {entry["name"] for entry in predictions["categories"]} <= set(map(str, range(DIGITS)))
    assert len(predictions["annotations"]) >= 3 * QUERIES
    capsys.readouterr()


@pytest.mark.parametrize("name", ["RTDetr"])
def test_a_run_that_was_interrupted_ends_as_one_that_was_not(name, saved, digits, tmp_path):
    folder = saved(name, num_denoising=6)
    cli.main(flags(folder, digits, tmp_path / "whole", "--epochs", "2"))
    cli.main(flags(folder, digits, tmp_path / "parts"))
    newest = tmp_path / "parts" / "checkpoints" / "epoch_0002"
    expected, _ = read_checkpoint(tmp_path / "whole" / "checkpoints" / newest.name)
    spoil = (lambda weights: weights.write_bytes(b"damaged"), lambda weights: weights.unlink(), lambda weights: None)
    for spoiled in spoil:  # so that the next time it goes back to the checkpoint before
        cli.main(flags(folder, digits, tmp_path / "parts", "--epochs", "2", "--resume"))
        found, _ = read_checkpoint(newest)
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
        spoiled(newest / "model.safetensors")


def test_the_largest_batch_of_a_run_that_is_resumed_needs_no_directory(saved, digits, tmp_path, monkeypatch):
    """And no weights either, which those of the checkpoint replace."""
    folder, run = saved("RTDetr", num_denoising=6), tmp_path / "run"
    cli.main(flags(folder, digits, run))
    shutil.rmtree(folder)
    read, tried = [], []
    monkeypatch.setattr(build, "read_checkpoint", lambda checkpoint: read.append(checkpoint))
    monkeypatch.setattr(run_batch_size, "found_batch_size", lambda *arguments: tried.append(arguments) or (2, 1))
    monkeypatch.setattr(batch_size, "memory_of", lambda device: None)
    again = [*flags(folder, digits, run), "--batch-size", "auto", "--images-per-step", "2", "--epochs", "2", "--resume"]
    cli.main(again)
    assert len(tried) == 1
    assert read == []
    assert len(json.loads((run / "results.json").read_text())["epochs"]) == 2


def test_a_run_in_the_folder_of_a_configuration_is_resumed_without_the_directory(saved, digits, tmp_path, monkeypatch):
    folder, run = saved("RTDetr", num_denoising=6), tmp_path / "run"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(f"output: {run}\nreport: false\n")
    command = [*flags(folder, digits, run), "--config", "mine.yaml"]
    del command[command.index("--output") : command.index("--output") + 2]
    cli.main(command)
    shutil.rmtree(folder)
    cli.main([*command, "--epochs", "2", "--resume"])
    assert len(json.loads((run / "results.json").read_text())["epochs"]) == 2


@pytest.mark.parametrize("accelerate_kernels", [True, False])
def test_the_kernels_of_this_package_are_a_choice_wherever_a_model_is_loaded(accelerate_kernels, saved):
    def is_accelerated(detector):
        return any(type(each).__module__.startswith("groupdetr_fast.integrations") for each in detector.model.modules())

    folder = saved("DeformableDetr")
    choice = {"accelerate_kernels": accelerate_kernels}
    detector = gd.Detector.from_pretrained(folder, device="cpu", **choice)
    evaluated = EvalCommand(checkpoint=folder, data_path=folder, **choice).config().model.build_untrained()
    for found in (detector.model, detector.in_training(), gd.load_model(folder, device="cpu", **choice), evaluated):
        assert is_accelerated(found) == accelerate_kernels


def test_defaults_are_those_of_the_model(saved):
    config = training_defaults(["--model", f"transformers:{saved('RTDetr')}"])
    augmentation = config.augmentation
    assert (config.model.num_groups, augmentation.square, augmentation.short_sides) == (1, True, (64,))
    assert (augmentation.image_mean, augmentation.image_std) == ((0, 0, 0), (1, 1, 1))
    config = training_defaults(["--model", f"transformers:{saved('LwDetr')}"])
    augmentation = config.augmentation
    assert (config.model.num_groups, augmentation.square, augmentation.eval_short_side) == (GROUPS, False, 64)
    assert augmentation.image_mean == (0.485, 0.456, 0.406)
    assert training_defaults([]).augmentation == CocoTrainingConfig().augmentation


@pytest.mark.parametrize(
    ("name", "size"), [("Detr", (800, 1333, False)), ("DFine", (640, None, True)), ("RfDetr", (800, 1333, False))]
)
def test_without_a_processor_the_defaults_of_the_architecture_count(name, size, saved):
    augmentation = read_source(f"transformers:{saved(name, processor=False)}").augmentation()
    assert (augmentation.eval_short_side, augmentation.eval_max_size, augmentation.square) == size
    if name == "Detr":  # whose augmentation is that of this package
        assert augmentation == CocoTrainingConfig().augmentation


def test_a_directory_of_transformers_is_evaluated_and_predicted_with_as_it_is(saved, digits, tmp_path, capsys):
    folder = saved("RTDetr", num_labels=DIGITS)
    arguments = ["--val-images", str(digits.val_images), "--val-annotations", str(digits.val_annotations)]
    arguments += ["--workers", "0", "--pictures", "0", "--labels", "contiguous"]
    for index, model in enumerate((["--model", f"transformers:{folder}"], [str(folder)], [f"transformers:{folder}"])):
        cli.main(["eval", *model, *arguments, "--output", str(tmp_path / str(index))])
    first, *others = [(tmp_path / str(index) / "detections.json").read_text() for index in range(3)]
    assert others == [first, first]
    detector = gd.load_model(f"transformers:{folder}", device="cpu")
    assert type(detector.model).__name__ == "RTDetrForObjectDetection"
    assert len(gd.predict(detector, sorted(digits.val_images.iterdir()), score_threshold=0.0)) == 3
    with pytest.raises(SystemExit, match="has a class head of 4 rows"):
        cli.main(["eval", str(saved("RTDetr")), *arguments, "--output", str(tmp_path / "wrong")])
    capsys.readouterr()


@pytest.mark.parametrize(
    ("name", "groups", "expected"), [("DeformableDetr", 3, 3), ("DeformableDetr", 1, 1), ("LwDetr", 1, GROUPS)]
)
def test_a_directory_of_transformers_gets_the_groups_that_are_asked_for(name, groups, expected, saved):
    """Models with groups of their own are evaluated by 1, and keep theirs."""
    folder = saved(name)
    for load in (folder, f"transformers:{folder}"):
        config = ModelConfig(model=f"transformers:{folder}", load=load, num_groups=groups)
        assert config.build(4).config.num_groups == expected
        assert gd.load_model(load, num_groups=groups, device="cpu").config.num_groups == expected
    with pytest.raises(ValueError, match=f"has a class head for 4 classes, and the data have {DIGITS}"):
        config.build(DIGITS)


def test_classes_of_a_checkpoint_are_replaced_if_asked(saved, digits, tmp_path, caplog):
    folder, run = saved("DeformableDetr", num_labels=DIGITS), tmp_path / "run"
    cli.main(flags(folder, digits, run, "--num-groups", "2"))
    caplog.set_level("INFO")
    config = ModelConfig(model=f"transformers:{folder}", load=run, num_groups=2)
    kept, replaced = (replace(config, new_class_head=True).build(classes) for classes in (DIGITS, 3))
    assert (kept.config.num_classes, replaced.config.num_classes) == (DIGITS, 3)
    assert caplog.text.count(f"a new class head for 3 classes, in place of one for {DIGITS}") == 1
    trained, weights = (detector.state_dict() for detector in (kept, replaced))
    assert "groupdetr_fast.other_groups" in trained  # the queries of the second group, which transformers does not load
    differing = {name for name in trained if not torch.equal(trained[name], weights[name])}
    assert differing
    assert all("class_embed" in name for name in differing)


@pytest.mark.parametrize(
    ("others", "sentence"),
    [
        (["--compile"], "compile is not for models of transformers"),
        (["--cuda-graphs", "2"], "cuda_graphs is not for models of transformers"),
        (["--groups-per-pass", "1"], "groups_per_pass is not for models of transformers"),
        (["--assignment", "one_to_one"], "assignment is not for models of transformers"),
        (["--num-groups", "3"], "RTDetrForObjectDetection trains with one group"),
        (["--d-model", "32"], "d_model cannot be set for a model of transformers"),
    ],
)
def test_what_cannot_be_is_said_in_one_sentence(others, sentence, saved, digits, tmp_path):
    with pytest.raises(SystemExit, match=f"^error: .*{sentence}"):
        cli.main(flags(saved("RTDetr"), digits, tmp_path / "run", *others))
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("name", ["DFine", "Detr"])
def test_what_the_architecture_freezes_is_not_trained(name, saved, caplog):
    folder = saved(name)
    built = {key for key, weight in model_of(name).named_parameters() if weight.requires_grad}
    detector = load_pretrained(f"transformers:{folder}")
    assert {key for key, weight in detector.model.named_parameters() if weight.requires_grad} == built
    assert ("freezes the whole backbone" in caplog.text) == (name == "Detr")  # with a ResNet of transformers itself


def test_weights_of_another_architecture_are_refused(saved, tmp_path):
    conditional = shutil.copytree(saved("ConditionalDetr"), tmp_path / "conditional")
    classes = len(read_source(f"transformers:{conditional}").class_names)
    deformable = saved("DeformableDetr")
    config = ModelConfig(model=f"transformers:{deformable}", num_groups=1, load=conditional)
    with pytest.raises(
        ValueError, match=r"conditional is a model conditional_detr, and transformers:.* deformable_detr"
    ):
        config.build(classes)
    shutil.rmtree(deformable)
    with pytest.raises(ValueError, match="has a class head for"):  # the directory may be gone; other things do not fit
        config.build(classes + 1)
    config.build(classes)


def test_models_that_cannot_be_loaded_are_named(saved, digits, tmp_path):
    with pytest.raises(SystemExit, match=r"transformers cannot load '.*nowhere'") as raised:
        cli.main(flags(tmp_path / "nowhere", digits, tmp_path / "run"))
    assert "\n" not in str(raised.value)
    folder = saved("RTDetr")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "decoder_layers": 3}))
    with pytest.raises(ValueError, match=r"lacks weights of its RTDetrForObjectDetection, such as"):
        load_pretrained(f"transformers:{folder}")
    (folder / "config.json").write_text(json.dumps({"model_type": "yolos"}))
    with pytest.raises(ValueError, match=r"is a model of type 'yolos'; those that are trained here are detr, cond"):
        load_pretrained(f"transformers:{folder}")


def test_the_class_trains_models_of_transformers_too(saved, digits, tmp_path, capsys):
    folder = saved("RTDetr")
    detector = gd.Detector(f"transformers:{folder}", accelerate_kernels=False)
    settings = {"epochs": 1, "batch_size": 3, "workers": 0, "pictures": 0, "report": False, "track": ()}
    detector.train(**digits._asdict(), **settings, output=tmp_path / "run")
    shutil.rmtree(folder)
    again = gd.Detector.from_pretrained(tmp_path / "run", device="cpu")
    images = sorted(digits.val_images.iterdir())
    (expected, *_), (found, *_) = (each.predict(images, score_threshold=0.0) for each in (detector, again))
    assert_close(found["scores"], expected["scores"], rtol=1e-4, atol=1e-4)
    capsys.readouterr()


def test_a_run_of_another_detector_is_not_resumed_with_one_of_transformers(digits, tmp_path):
    """Which need not be there: what the run was begun with is told first."""
    run = tmp_path / "run"
    sizes = "--num-groups 2 --num-queries 5 --d-model 32 --num-heads 2 --encoder-layers 1 --decoder-layers 1"
    sizes += " --dim-feedforward 32 --backbone conv:8-16 --epochs 1 --lr-drop 5 --batch-size 3 --workers 0 --pictures 0"
    sizes += " --short-sides 48 --eval-short-side 48 --crop 0"
    cli.main(["train", *data_flags(digits), *sizes.split(), "--output", str(run), "--no-report", "--track", "none"])
    resumed = ["train", "--config", str(run / "config.yaml"), "--output", str(run), "--resume"]
    message = r"was begun with model\.model = conditional_detr_r50, which cannot become transformers:nowhere/a on"
    with pytest.raises(SystemExit, match=message):
        cli.main([*resumed, "--model", "transformers:nowhere/a"])


def test_export_is_refused(saved, tmp_path):
    with pytest.raises(SystemExit, match="models of transformers are exported by other tools"):
        cli.main(["export", f"transformers:{saved('RTDetr')}", "--output", str(tmp_path / "a.onnx")])


def test_a_header_may_be_anybodys(saved):
    source = read_source(f"transformers:{saved('RTDetr')}")
    plain = json.loads(json.dumps(source.header().to_json()))
    assert ModelSource.of_header(CheckpointHeader.from_json(plain)).config == source.config
    for change in ({"decoder_layers": 10**6}, {"d_model": 10**7}, {"a": {"b": "c" * 1001}}, {"a": [0] * 1001}):
        wrong = {**plain, "transformers": {**plain["transformers"], "config": {**source.config, **change}}}
        with pytest.raises(ValueError, match="in the header must be"):
            CheckpointHeader.from_json(wrong)


@pytest.mark.slow
def test_lw_detr_learns_the_digits_that_it_is_shown(tmp_path):
    size = DigitsConfig(image_size=64, train_images=16, val_images=1, max_objects=2, min_digit=24, max_digit=44)
    digits = digits_dataset(tmp_path / "data", config=size)
    backbone = LwDetrViTConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=64,
        pretrain_image_size=64,
        patch_size=8,
        num_windows=4,
        window_block_indices=[0],
        out_indices=[1, 2],
    )
    folder = tmp_path / "random"
    overrides = {"backbone_config": backbone, "d_model": 64, "decoder_ffn_dim": 128, "num_queries": 10}
    model = LwDetrForObjectDetection(lw_detr_config("LwDetr", **overrides, num_labels=DIGITS))
    model.save_pretrained(folder)
    processor_of("LwDetr").save_pretrained(folder)
    config = CocoTrainingConfig().with_model(f"transformers:{folder}")
    config = config.with_settings(
        train_images=digits.train_images,
        train_annotations=digits.train_annotations,
        val_images=digits.train_images,
        val_annotations=digits.train_annotations,
        workers=0,
        cache_images=True,
        crop=0.0,
        flip=0.0,
        short_sides=(64,),
        pictures=0,
        epochs=150,
        lr_drop=(120,),
        lr=5e-4,
        backbone_lr=5e-4,
        warmup_steps=20,
        batch_size=8,
        evaluate_every=50,
        report=False,
        keep_checkpoints=1,
        output=tmp_path / "run",
    )
    results = train(config)
    aps = [row["metrics"]["AP50"] for row in results["epochs"] if "metrics" in row]
    assert aps[0] < aps[-1] - 0.1
    assert aps[-1] > 0.6


def test_a_frozen_backbone_stays_that_of_the_directory(saved, digits, tmp_path):
    folder, run = saved("DFine", num_denoising=6), tmp_path / "run"
    before = AutoModelForObjectDetection.from_pretrained(folder).state_dict()
    cli.main(flags(folder, digits, run, "--freeze", "backbone", "--repeat-factor-threshold", "0.5"))
    after = AutoModelForObjectDetection.from_pretrained(run / "checkpoints" / "best").state_dict()
    backbone = [name for name in before if name.startswith("model.backbone.")]
    assert len(backbone) > 5
    assert all(torch.equal(before[name], after[name]) for name in backbone)
    assert not torch.equal(before["model.enc_output.0.weight"], after["model.enc_output.0.weight"])
    with pytest.raises(SystemExit, match="freeze: no parameter matches 'backbones': did you mean backbone"):
        cli.main(flags(folder, digits, tmp_path / "other", "--freeze", "backbones"))


def test_the_largest_batch_and_a_rate_are_found(saved, digits, tmp_path, monkeypatch, capsys):
    class Memory:
        def clear(self):
            pass

        def peak(self):
            return 0.5

    original = TransformersDetector.forward

    def forward(self, images, *arguments, **options):
        if len(images) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")
        return original(self, images, *arguments, **options)

    monkeypatch.setattr(TransformersDetector, "forward", forward)
    monkeypatch.setattr(batch_size, "memory_of", lambda device: Memory())
    folder, run = saved("DFine", num_denoising=6), tmp_path / "run"
    command = flags(folder, digits, run, "--batch-size", "auto", "--images-per-step", "4")
    cli.main(command)
    assert "batch_size auto: 2 images, the largest that fits; accumulate 2" in capsys.readouterr().err
    assert "batch_size: 2\n" in (run / "config.yaml").read_text()
    cli.main(["find-rate", *command[1:], "--rate-steps", "10"])
    assert "suggested: --lr " in capsys.readouterr().out
    assert len((run / "rates.csv").read_text().splitlines()) == 11
