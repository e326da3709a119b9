"""Whole runs on a few small images: training, resuming, evaluation, and what happens to wrong input."""

import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from groupdetr_fast.data import AugmentationConfig, DataError, DigitsConfig, digits_dataset
from groupdetr_fast.data.config import DataConfig
from groupdetr_fast.models.checkpoints import read_header
from groupdetr_fast.runs.config import CocoTrainingConfig, ModelConfig
from groupdetr_fast.runs.config_file import from_yaml
from groupdetr_fast.runs.evaluate import evaluate, evaluate_checkpoint
from groupdetr_fast.runs.recipes import digits_demo
from groupdetr_fast.runs.train import train
from groupdetr_fast.training import checkpoint, engine, progress
from groupdetr_fast.training.checkpoint import CheckpointError, latest_checkpoint
from groupdetr_fast.training.faults import StopRequest, TrainingError, TrainingStopped
from groupdetr_fast.training.optimization import OptimizationConfig

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_coco.py"


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    size = DigitsConfig(image_size=48, train_images=10, val_images=4, max_objects=3, min_digit=12, max_digit=24)
    return digits_dataset(tmp_path_factory.mktemp("digits"), config=size)


@pytest.fixture
def config(digits, tmp_path):
    return CocoTrainingConfig(
        data=DataConfig(**digits._asdict(), workers=0),
        model=ModelConfig(
            num_groups=2,
            num_queries=5,
            d_model=32,
            num_heads=2,
            encoder_layers=1,
            decoder_layers=2,
            dim_feedforward=32,
            dropout=0.1,
            backbone="conv:8-16",
        ),
        augmentation=AugmentationConfig(
            short_sides=(40, 48), crop_short_sides=(48,), crop_min=24, crop_max=48, flip=0.5, eval_short_side=48
        ),
        optimization=OptimizationConfig(epochs=3, lr_drop=(2,), lr=1e-3, backbone_lr=1e-3, batch_size=4),
        output=tmp_path / "run",
        pictures=2,
    )


def weights(run, epoch):
    return load_file(run / "checkpoints" / f"epoch_{epoch:04d}" / "model.safetensors")


def test_a_run_leaves_everything_it_promises(config, capsys):
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


def test_a_run_is_replaced_only_if_asked(config):
    short = replace(config, optimization=replace(config.optimization, epochs=1), pictures=0)
    train(config)
    with pytest.raises(ValueError, match="holds a run"):
        train(short)
    missing = replace(short.data, train_images=Path("missing"))
    with pytest.raises(DataError, match="missing"):
        train(replace(short, overwrite=True, data=missing))
    assert latest_checkpoint(config.output).name == "epoch_0003"  # a run that cannot begin replaces nothing
    train(replace(short, overwrite=True))
    assert [row["epoch"] for row in json.loads((config.output / "results.json").read_text())["epochs"]] == [1]
    assert sorted(path.name for path in config.output.glob("checkpoints/*")) == ["best", "epoch_0001"]


def test_the_same_seed_gives_the_same_run(config, tmp_path):
    train(config)
    train(replace(config, output=tmp_path / "again"))
    first, second = weights(config.output, 3), weights(tmp_path / "again", 3)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_resuming_continues_to_the_same_weights(config, tmp_path, monkeypatch):
    train(config)
    interrupted = replace(config, output=tmp_path / "interrupted")

    from groupdetr_fast.training import engine

    finish = engine.Trainer.finish_epoch

    def stop_after_the_first(trainer):
        finish(trainer)
        if trainer.state.epoch == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(engine.Trainer, "finish_epoch", stop_after_the_first)
    with pytest.raises(KeyboardInterrupt):
        train(interrupted)
    monkeypatch.undo()
    assert latest_checkpoint(interrupted.output).name == "epoch_0001"
    results = train(replace(interrupted, resume=True))
    assert [row["epoch"] for row in results["epochs"]] == [1, 2, 3]
    first, second = weights(config.output, 3), weights(interrupted.output, 3)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def rates(monkeypatch):
    """The learning rate of every step of the trainings of a test."""
    found = []
    run_step = engine.Trainer.run_step

    def recording(trainer, batches):
        found.append(trainer.state.optimizer.param_groups[0]["lr"])
        return run_step(trainer, batches)

    monkeypatch.setattr(engine.Trainer, "run_step", recording)
    return found


def after_one_epoch(config):
    """The run, its first of three epochs done: the rate drops after the second."""
    config = replace(config, evaluate_every=3, pictures=0)
    train(replace(config, optimization=replace(config.optimization, epochs=1)))
    return replace(config, resume=True)


def test_rates_follow_the_epochs_of_a_run_that_is_resumed_with_other_batches(config, rates):
    config = after_one_epoch(config)
    assert rates == [1e-3] * 3
    train(replace(config, optimization=replace(config.optimization, batch_size=2)))
    assert rates[3:] == pytest.approx([1e-3] * 5 + [1e-4] * 5)


def test_what_differs_on_resuming_is_applied_or_refused_by_name(config, rates, caplog):
    config = after_one_epoch(config)
    for change, name in (
        ({"model": replace(config.model, num_groups=3)}, "model.num_groups = 2, which cannot become 3"),
        ({"optimization": replace(config.optimization, seed=1)}, "optimization.seed = 42, which cannot become 1"),
    ):
        with pytest.raises(ValueError, match=f"was begun with {name} on resuming"):
            train(replace(config, **change))
    caplog.clear()
    train(replace(config, optimization=replace(config.optimization, lr=5e-3, lr_drop=(1,), weight_decay=0.5)))
    assert rates[3:] == pytest.approx([5e-4] * 6)
    warnings = [record.getMessage() for record in caplog.records if "resuming with" in record.getMessage()]
    assert warnings == [
        "resuming with optimization.epochs = 3, which was 1",
        "resuming with optimization.lr_drop = (1,), which was (2.0,)",
        "resuming with optimization.lr = 0.005, which was 0.001",
        "resuming with optimization.weight_decay = 0.5, which was 0.0001",
    ]
    state = torch.load(latest_checkpoint(config.output) / "state.pt", weights_only=True)
    assert {group["weight_decay"] for group in state["optimizer"]["param_groups"]} == {0.5}


def test_what_is_refused_on_resuming_changes_nothing(config):
    """The command that was meant still works."""
    config = after_one_epoch(config)
    files = {path: path.read_bytes() for path in config.output.rglob("*") if path.is_file() and path.suffix != ".log"}
    wider = replace(config, model=replace(config.model, d_model=64))
    with pytest.raises(ValueError, match=r"was begun with model.d_model = 32, which cannot become 64 on resuming"):
        train(wider)
    assert {path: path.read_bytes() for path in files} == files
    (config.output / "config.yaml").unlink()  # as in the runs of a version that wrote none
    with pytest.raises(CheckpointError) as error:
        train(wider)
    assert re.fullmatch(
        r"checkpoint \S+epoch_0001 does not belong to this training: its model differs in \d+ tensors "
        r"\(bbox_embed.layers.0.bias has shape \[32\] in it and \[64\] here, .*, \.\.\.\): "
        r"resume with the settings that the run was begun with",
        str(error.value),
    )
    assert len(str(error.value)) < 600
    assert len(train(config)["epochs"]) == 3


@pytest.mark.parametrize("change", ["name", "id"])
def test_a_run_is_not_resumed_with_other_classes(config, tmp_path, change):
    """Of which there are as many, so that the weights would fit."""
    config = after_one_epoch(config)
    files = {}
    for part in ("train", "val"):
        content = json.loads(getattr(config.data, f"{part}_annotations").read_text())
        for entry in content["categories"]:
            entry["name"] = f"part {entry['id']}" if change == "name" else entry["name"]
            entry["id"] += 3 * (change == "id")
        for entry in content["annotations"]:
            entry["category_id"] += 3 * (change == "id")
        files[f"{part}_annotations"] = tmp_path / f"{part}.json"
        files[f"{part}_annotations"].write_text(json.dumps(content))
    written = (config.output / "config.yaml").read_bytes()
    message = "begun with other categories than .*val.json " + (
        r"\(category 1 was '0' and is 'part 1'\)" if change == "name" else r"\(category 1 was '0' and is none\)"
    )
    with pytest.raises(ValueError, match=message):
        train(replace(config, data=replace(config.data, **files, labels="contiguous")))
    assert (config.output / "config.yaml").read_bytes() == written
    assert len(train(config)["epochs"]) == 3


def test_a_damaged_checkpoint_is_refused(config):
    train(replace(config, optimization=replace(config.optimization, epochs=1)))
    state = latest_checkpoint(config.output) / "state.pt"
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"checkpoint .*epoch_0001 cannot be read"):
        train(replace(config, resume=True))


def test_evaluation_of_saved_weights_gives_the_same_numbers(config):
    results = train(config)
    saved = config.output / "checkpoints" / "epoch_0003"
    model = replace(config.model, load=saved, num_groups=1)
    data = replace(config.data, train_images=None, train_annotations=None)
    metrics = evaluate_checkpoint(replace(config, data=data, model=model, output=config.output.parent / "eval"))
    assert metrics == results["epochs"][-1]["metrics"]


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
    results = train(replace(config, data=data, model=model, augmentation=augmentation))
    losses = [row["train"]["loss"] for row in results["epochs"]]
    assert losses[-1] < losses[0]
    assert {"loss_ce", "loss_mask", "loss_dice", "loss_dice_0"} <= set(results["epochs"][0]["train"])
    assert {"AP", "AP50", "per_category"} <= set(results["epochs"][-1]["metrics"])
    assert (config.output / "predictions.png").stat().st_size > 1000
    detections = json.loads((config.output / "detections.json").read_text())
    assert detections[0]["segmentation"]["size"] == [48, 48]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"val_images": None}, "give data_path, coco_path, or both val_images and val_annotations"),
        ({"train_annotations": None}, "give data_path, coco_path, or both train_images and train_annotations"),
        ({"coco_path": Path("coco")}, "only one"),
        ({"data_path": Path("set")}, "only one"),
        ({"train_images": Path("missing")}, "image folder missing does not exist"),
    ],
)
def test_wrong_data_settings_are_refused(config, change, message):
    with pytest.raises(DataError, match=message):
        train(replace(config, data=replace(config.data, **change)))


def test_different_category_tables_are_refused(config, digits, tmp_path):
    content = json.loads(digits.train_annotations.read_text())
    content["categories"].append({"id": 77, "name": "extra"})
    (tmp_path / "more.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"different category tables \(ids \[77\]"):
        train(replace(config, data=replace(config.data, train_annotations=tmp_path / "more.json")))


def interrupt(*_):
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.1)  # in which Python handles the signal


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


@pytest.fixture
def python_handles_ctrl_c():
    """Shells let what they start in the background ignore SIGINT."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.mark.usefixtures("python_handles_ctrl_c")
def test_ctrl_c_writes_a_checkpoint_and_ends_in_a_sentence(config):
    message = r"stopped as asked, .* a checkpoint is written, from which resuming goes on"
    with pytest.raises(TrainingStopped, match=message):
        train(config, observe=interrupt)
    assert latest_checkpoint(config.output) is not None
    with pytest.raises(KeyboardInterrupt):  # as before
        interrupt()


def test_a_second_ctrl_c_interrupts_at_once():
    with StopRequest() as stop:
        interrupt()
        assert stop.received
        with pytest.raises(KeyboardInterrupt):
            interrupt()


@pytest.mark.parametrize("part", ["train", "val"])
def test_data_without_objects_are_refused(config, tmp_path, part):
    content = json.loads(getattr(config.data, f"{part}_annotations").read_text()) | {"annotations": []}
    (tmp_path / "empty.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"empty\.json has no object that can be used; groupdetr check says why"):
        train(replace(config, data=replace(config.data, **{f"{part}_annotations": tmp_path / "empty.json"})))


def test_categories_of_other_names_are_refused(config, digits, tmp_path):
    content = json.loads(digits.val_annotations.read_text())
    content["categories"][3]["name"] = "another"
    (tmp_path / "val.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"category 4 is '3' in .*train.*json and 'another' in .*val.json: give both"):
        train(replace(config, data=replace(config.data, val_annotations=tmp_path / "val.json")))


def with_aps(monkeypatch, *aps):
    """Let the evaluations of runs find these APs, epoch by epoch."""
    measured = iter(aps)

    def evaluate_as_told(*arguments):
        return {**evaluate(*arguments), "AP": next(measured)}

    monkeypatch.setattr("groupdetr_fast.runs.train.evaluate", evaluate_as_told)


def best_metadata(run):
    header = read_header(run / "checkpoints" / "best")
    return header.epoch, header.AP


def test_a_run_stops_early_and_keeps_the_best(config, monkeypatch):
    with_aps(monkeypatch, 0.1, 0.4, 0.3, 0.4, 0.9)
    epochs = replace(config.optimization, epochs=5)
    results = train(replace(config, optimization=epochs, early_stopping=2, pictures=0))
    assert [row["epoch"] for row in results["epochs"]] == [1, 2, 3, 4]
    assert results["best_epoch"] == 2
    assert best_metadata(config.output) == (2, 0.4)
    best = load_file(config.output / "checkpoints" / "best" / "model.safetensors")
    assert all(torch.equal(tensor, best[name]) for name, tensor in weights(config.output, 2).items())


@pytest.mark.parametrize(
    ("keep", "kept"),
    [(1, ["best", "epoch_0004", "epoch_0005"]), (3, ["best", "epoch_0003", "epoch_0004", "epoch_0005"])],
)
def test_as_many_checkpoints_are_kept_as_asked(config, monkeypatch, keep, kept):
    with_aps(monkeypatch, 0.1, 0.4, 0.3, 0.2, 0.1)
    epochs = replace(config.optimization, epochs=5)
    config = replace(config, optimization=epochs, keep_checkpoints=keep, pictures=0)
    assert train(config)["best_epoch"] == 2
    assert sorted(path.name for path in config.output.glob("checkpoints/*")) == kept
    assert best_metadata(config.output) == (2, 0.4)  # though the epoch's own folder is gone
    assert train(replace(config, resume=True))["best_epoch"] == 2


@pytest.mark.parametrize("stopped_after", [1, 2, 3])
def test_early_stopping_and_the_best_epoch_survive_resuming(config, monkeypatch, stopped_after):
    aps = (0.3, 0.5, 0.52, 0.51, 0.9)
    config = replace(
        config,
        optimization=replace(config.optimization, epochs=5),
        early_stopping=2,
        early_stopping_delta=0.05,
        pictures=0,
    )
    original = checkpoint.mark_best

    def fail(run, epoch):  # at the worst moment: the epoch is saved, and not yet marked as the best
        if len(list((run / "checkpoints").glob("epoch_*"))) == stopped_after:
            raise KeyboardInterrupt
        original(run, epoch)

    with_aps(monkeypatch, *aps)
    monkeypatch.setattr(engine, "mark_best", fail)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    monkeypatch.setattr(engine, "mark_best", original)
    with_aps(monkeypatch, *aps[stopped_after:])
    results = train(replace(config, resume=True))
    assert [row["epoch"] for row in results["epochs"]] == [1, 2, 3, 4]
    assert best_metadata(config.output) == (3, 0.52)
    assert train(replace(config, resume=True)) == results  # nothing is left to do


def test_a_run_starts_again_from_its_configuration(config, tmp_path, capsys):
    short = replace(config, optimization=replace(config.optimization, epochs=1), pictures=0)
    train(short)
    again = from_yaml(CocoTrainingConfig, config.output / "config.yaml")
    assert again == short
    train(replace(again, output=tmp_path / "again"))
    first, second = weights(config.output, 1), weights(tmp_path / "again", 1)
    assert all(torch.equal(first[name], second[name]) for name in first)


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


def test_evaluating_with_other_categories_is_warned_about(config, digits, tmp_path, caplog):
    train(replace(config, optimization=replace(config.optimization, epochs=1), pictures=0))
    content = json.loads(digits.val_annotations.read_text())
    content["categories"][3]["name"] = "another"
    (tmp_path / "val.json").write_text(json.dumps(content))
    data = replace(config.data, train_images=None, train_annotations=None, val_annotations=tmp_path / "val.json")
    model = replace(config.model, load=config.output / "checkpoints" / "best", num_groups=1)
    evaluate_checkpoint(replace(config, data=data, model=model, output=tmp_path / "eval", pictures=0))
    assert "trained on other categories" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"early_stopping": -1}, "early_stopping must not be"),
        ({"evaluate_every": 0}, "evaluate_every must be at least"),
    ],
)
def test_wrong_settings_of_a_run_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        CocoTrainingConfig(**settings)


@pytest.mark.parametrize("within", [False, True], ids=["between epochs", "within one"])
def test_a_run_may_be_resumed_with_fewer_epochs_than_it_has(config, capsys, monkeypatch, within):
    config = replace(config, evaluate_every=10, pictures=0, checkpoint_every=1)
    stopped = "run_step" if within else "finish_epoch"
    original = getattr(engine.Trainer, stopped)

    def stop(trainer, *arguments):
        if within and trainer.state.batches == 8:  # two of the third epoch's three
            raise KeyboardInterrupt
        result = original(trainer, *arguments)
        if not within and trainer.state.epoch == 2:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(engine.Trainer, stopped, stop)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    monkeypatch.undo()
    capsys.readouterr()
    fewer = replace(config.optimization, epochs=1)
    results = train(replace(config, resume=True, optimization=fewer))
    assert [("metrics" in row) for row in results["epochs"]] == [False, not within]
    assert ("Average Precision" in capsys.readouterr().out) == (not within)


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


def test_a_line_every_so_many_steps_without_a_terminal_and_in_the_log(config, monkeypatch, capsys):
    monkeypatch.setattr(progress, "LINE_EVERY", 4)
    config = replace(config, pictures=0)
    train(config)
    printed = capsys.readouterr().err.splitlines()
    steps = [line for line in printed if "images/s" in line]
    # 9 steps of one batch; 10 images in batches of 4 make 3 batches an epoch
    pattern = (
        r"epoch {}/3  batch {}/3  loss \d+\.\d+  lr \S+  \d+\.\d images/s  waited \d+ % for data  "
        r"gradient \S+  \d+ MiB  0:\d\d:\d\d left"
    )
    assert len(steps) == 2
    for line, numbers in zip(steps, [(2, 1), (3, 2)], strict=True):
        assert re.fullmatch(pattern.format(*numbers), line), line
    log = (config.output / "train.log").read_text()
    assert all(line.strip() in log for line in printed if line.startswith("epoch "))
    train(replace(config, resume=True, optimization=replace(config.optimization, lr_drop=(1,))))
    log = (config.output / "train.log").read_text().splitlines()
    assert any(line.endswith("WARNING resuming with optimization.lr_drop = (1,), which was (2.0,)") for line in log)


def test_random_weights_are_not_evaluated(config):
    with pytest.raises(ValueError, match="nothing to evaluate but random weights: give load"):
        evaluate_checkpoint(config)


def test_an_evaluation_is_no_training(config):
    with pytest.raises(ValueError, match="eval_only is not a training"):
        train(replace(config, eval_only=True))


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
