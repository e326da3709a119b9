"""Whole runs on a few small images: what they leave behind, and what their settings do."""

import gc
import json
import shutil
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from digit_runs import weights

from groupdetr_fast.data.config import DataConfig
from groupdetr_fast.models.checkpoints import read_header
from groupdetr_fast.runs.config import CocoTrainingConfig
from groupdetr_fast.runs.config_file import from_yaml
from groupdetr_fast.runs.demo import digits_demo
from groupdetr_fast.runs.find_rate import find_rate
from groupdetr_fast.runs.train import train
from groupdetr_fast.training import engine
from groupdetr_fast.training.checkpoint import latest_checkpoint
from groupdetr_fast.training.faults import TrainingError

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_coco.py"


@pytest.mark.parametrize("begin", [train, find_rate], ids=["train", "find_rate"])
@pytest.mark.parametrize("of_transformers", [True, False])
def test_models_of_transformers_do_without_cudnn_attention(begin, of_transformers, config, monkeypatch):
    def build(*arguments, cudnn_attention):
        raise InterruptedError(cudnn_attention)

    monkeypatch.setattr("groupdetr_fast.runs.trainer.build_accelerator", build)
    monkeypatch.setattr(type(config.model), "of_transformers", property(lambda model: of_transformers))
    with pytest.raises(InterruptedError, match=str(not of_transformers)):
        begin(config)


def test_a_run_leaves_everything_it_promises(config, capsys):
    config = replace(config, pictures=2, report=True, track=("tensorboard",))
    results = train(config)
    assert "Average Precision" in capsys.readouterr().out
    assert [row["epoch"] for row in results["epochs"]] == [1, 2, 3]
    assert json.loads((config.output / "results.json").read_text()) == json.loads(json.dumps(results))
    losses = [row["train"]["loss"] for row in results["epochs"]]
    assert losses[-1] < losses[0]
    assert {"loss_ce", "loss_bbox", "loss_giou", "loss_ce_0"} <= set(results["epochs"][0]["train"])
    assert {"AP", "AP50", "per_category"} <= set(results["epochs"][-1]["metrics"])
    header = read_header(config.output / "checkpoints" / "epoch_0003")
    assert (header.epoch, header.AP) == (3, results["epochs"][-1]["metrics"]["AP"])
    described = {name: value for name, value in header.to_json().items() if name not in ("epoch", "AP")}
    assert described == {name: json.loads((config.output / "results.json").read_text())[name] for name in described}
    assert (config.output / "predictions.png").stat().st_size > 1000
    assert (config.output / "index.html").is_file()
    assert isinstance(json.loads((config.output / "detections.json").read_text()), list)
    assert list(config.output.glob("tensorboard/**/*events*"))
    assert [path.parent.name for path in sorted(config.output.glob("checkpoints/*/model.safetensors"))] == [
        "best",
        "epoch_0001",
        "epoch_0002",
        "epoch_0003",
    ]
    assert sorted(path.parent.name for path in config.output.glob("checkpoints/*/state.pt")) == [
        "epoch_0002",
        "epoch_0003",
    ]


def test_the_same_seed_gives_the_same_run(config, tmp_path):
    train(config)
    train(replace(config, output=tmp_path / "again"))
    first, second = weights(config.output, 3), weights(tmp_path / "again", 3)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_accumulation_takes_one_step_for_several_batches(config):
    optimization = replace(config.optimization, epochs=1, batch_size=2, accumulate=2)
    train(replace(config, optimization=optimization))
    state = torch.load(latest_checkpoint(config.output) / "state.pt", weights_only=True)
    assert state["optimizer"]["state"][0]["step"] == 3  # 10 images: 5 batches, of which the last stands alone


def test_mixed_precision_trains(config):
    results = train(replace(config, optimization=replace(config.optimization, precision="bf16")))
    losses = [row["train"]["loss"] for row in results["epochs"]]
    assert losses[-1] < losses[0]
    assert {tensor.dtype for tensor in weights(config.output, 3).values()} <= {torch.float32, torch.int64}


def test_a_loss_of_weight_zero_moves_nothing(config):
    model = replace(config.model, class_loss=0.0)
    results = train(replace(config, model=model, optimization=replace(config.optimization, weight_decay=0.0)))
    assert results["model_config"]["class_loss"] == 0
    trained, initial = weights(config.output, 3), model.build(10).state_dict()
    assert torch.equal(trained["class_embed.bias"], initial["class_embed.bias"])
    assert not torch.equal(trained["bbox_embed.layers.0.bias"], initial["bbox_embed.layers.0.bias"])


def test_masks_train_and_are_evaluated(config, digits, tmp_path):
    paths = {"train": digits.train_annotations, "val": digits.val_annotations}
    for split, path in paths.items():
        content = json.loads(path.read_text())
        for entry in content["annotations"]:
            x, y, width, height = entry["bbox"]
            entry["segmentation"] = [[x, y, x + width, y, x + width, y + height, x, y + height]]
        paths[split] = tmp_path / f"{split}.json"
        paths[split].write_text(json.dumps(content))
    data = replace(config.data, train_annotations=paths["train"], val_annotations=paths["val"])
    model = replace(
        config.model,
        model="mask2former_r50",
        backbone="conv:8-16-16-16",
        encoder_dim_feedforward=32,
        loss_points=64,
    )
    augmentation = replace(config.augmentation, jitter_size=48, jitter_scale=(0.5, 1.5))
    results = train(replace(config, data=data, model=model, augmentation=augmentation, pictures=2))
    losses = [row["train"]["loss"] for row in results["epochs"]]
    assert losses[-1] < losses[0]
    assert {"loss_ce", "loss_mask", "loss_dice", "loss_dice_0"} <= set(results["epochs"][0]["train"])
    assert {"AP", "AP50", "per_category"} <= set(results["epochs"][-1]["metrics"])
    assert (config.output / "predictions.png").stat().st_size > 1000
    detections = json.loads((config.output / "detections.json").read_text())
    assert detections[0]["segmentation"]["size"] == [48, 48]


def test_nothing_of_a_training_waits_for_the_garbage_collector(config, monkeypatch):
    """Which may come at the end of the interpreter, when the threads of a process group must be gone."""
    trainers = []
    begin = engine.Trainer.__init__

    def note(trainer, *arguments, **options):
        trainers.append(weakref.ref(trainer))
        begin(trainer, *arguments, **options)

    monkeypatch.setattr(engine.Trainer, "__init__", note)
    gc.collect()
    gc.disable()
    try:
        train(config)
        assert [trainer() for trainer in trainers] == [None]
    finally:
        gc.enable()


def write_yolo(digits, folder):
    """The digits in YOLO's layout."""
    for part, images, annotations in (("train", *digits[:2]), ("val", *digits[2:])):
        shutil.copytree(images, folder / "images" / part)
        (folder / "labels" / part).mkdir(parents=True)
        content = json.loads(annotations.read_text())
        for image in content["images"]:
            side = image["width"]
            lines = [
                f"{entry['category_id'] - 1} {(x + w / 2) / side} {(y + h / 2) / side} {w / side} {h / side}\n"
                for entry in content["annotations"]
                if entry["image_id"] == image["id"]
                for x, y, w, h in [entry["bbox"]]
            ]
            (folder / "labels" / part / image["file_name"]).with_suffix(".txt").write_text("".join(lines))
    names = [str(number) for number in range(10)]
    (folder / "data.yaml").write_text(f"train: images/train\nval: images/val\nnames: {names}\n")


@pytest.mark.parametrize("layout", ["coco", "yolo"])
def test_a_folder_is_trained_on_as_the_files_that_it_holds(config, digits, tmp_path, monkeypatch, layout):
    config = replace(config, optimization=replace(config.optimization, epochs=1), pictures=0)
    expected = train(config)["epochs"][0]
    folder = digits.train_images.parent
    if layout == "yolo":
        monkeypatch.setenv("GROUPDETR_FAST_CACHE", str(tmp_path / "cache"))
        folder = tmp_path / "yolo"
        write_yolo(digits, folder)
    found = train(replace(config, data=DataConfig(data_path=folder, workers=0), output=tmp_path / "again"))["epochs"][0]
    assert found["train"] == pytest.approx(expected["train"], rel=1e-4)
    assert found["metrics"]["per_category"].keys() == expected["metrics"]["per_category"].keys()  # the classes' names


def test_a_lack_of_memory_is_one_sentence_that_names_what_helps(config, monkeypatch):
    def run_out(trainer, batches):
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of ..."
        )

    monkeypatch.setattr(engine.Trainer, "run_step", run_out)
    with pytest.raises(TrainingError) as caught:
        train(config)
    message = str(caught.value)
    assert all(
        name in message for name in ("--groups-per-pass", "--recompute-layers", "--batch-size 4", "--accumulate")
    )
    assert message.endswith("(CUDA out of memory)")


def run_example(*arguments, cwd):
    return subprocess.run(
        [sys.executable, str(EXAMPLE), *map(str, arguments)], capture_output=True, text=True, cwd=cwd, timeout=300
    )


@pytest.mark.slow
def test_the_example_trains_and_its_errors_are_one_sentence(config, digits, tmp_path):
    data = [f"--{name.replace('_', '-')}={path}" for name, path in digits._asdict().items()]
    sizes = ["--backbone=conv:8-16", "--num-queries=5", "--num-groups=2", "--d-model=32", "--num-heads=2"]
    sizes += ["--encoder-layers=1", "--decoder-layers=1", "--dim-feedforward=32", "--epochs=1", "--workers=0"]
    done = run_example(*data, *sizes, "--short-sides", "48", "--eval-short-side=48", "--crop=0", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Average Precision" in done.stdout
    assert (tmp_path / "runs" / "coco" / "results.json").is_file()

    failed = run_example(*data[1:], "--train-images=nowhere", "--overwrite", *sizes, cwd=tmp_path)
    assert failed.returncode == 1
    assert failed.stderr.strip().splitlines()[-1].startswith("error: image folder nowhere does not exist")
    assert "Traceback" not in failed.stderr


def test_the_demo_is_the_same_code_with_smaller_sizes():
    config = digits_demo()
    assert config.model.model == "conditional_detr_r50"
    assert config.model.num_groups > 1
    assert config.data.train_annotations.is_file()


def test_a_run_without_trackers_leaves_no_curves(config, tmp_path):
    config = replace(config, track=("none",), optimization=replace(config.optimization, epochs=1))
    train(config)
    assert not (config.output / "tensorboard").exists()
    assert from_yaml(CocoTrainingConfig, config.output / "config.yaml").track == ("none",)
    with pytest.raises(ValueError, match="track must be none or others"):
        train(replace(config, track=("none", "tensorboard"), output=tmp_path / "another"))
    assert not (tmp_path / "another").exists()


@pytest.mark.parametrize("new_class_head", [False, True])
def test_a_class_head_of_other_classes_is_warned_about(config, digits, tmp_path, caplog, new_class_head):
    config = replace(config, optimization=replace(config.optimization, epochs=1), pictures=0, report=False)
    train(config)
    files = {}
    for part in ("train", "val"):
        content = json.loads(getattr(digits, f"{part}_annotations").read_text())
        content["categories"][3]["name"] = "another"
        files[f"{part}_annotations"] = tmp_path / f"{part}.json"
        files[f"{part}_annotations"].write_text(json.dumps(content))
    model = replace(config.model, load=config.output, new_class_head=new_class_head)
    other = replace(config, data=replace(config.data, **files), model=model, output=tmp_path / "other")
    train(other)
    said = (
        f"{config.output} was trained on other categories than those of {tmp_path / 'val.json'} (category 4 is '3' in "
        "the checkpoint and 'another' in the data): its class head is kept, and learns those of the data anew"
    )
    assert caplog.text.count(said) == 1
    caplog.clear()
    train(replace(other, resume=True))
    train(replace(config, model=model, output=tmp_path / "same"))
    assert "other categories" not in caplog.text
