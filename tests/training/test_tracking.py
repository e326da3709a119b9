"""Trackers, each by its real library where that is installed."""

import io
import json

import numpy as np
import pytest
from accelerate import Accelerator
from PIL import Image

from groupdetr_fast.data.images import as_rgb
from groupdetr_fast.training.tracking import check_trackers, log_picture, start_trackers

# With transparency, as matplotlib saves pictures; trackers get the colours.
PIXELS = np.random.default_rng(0).integers(256, size=(4, 6, 4), dtype=np.uint8)
SETTINGS = {"optimization.lr": 1e-4, "model.load": None, "augmentation.short_sides": (480, 800), "tf32": True}


def train_twice(name, run):
    """Two beginnings of one run, as an interruption makes them: curves, a picture, and settings once."""
    run.mkdir(exist_ok=True)
    Image.fromarray(PIXELS).save(run / "predictions.png")
    for step in (1, 2):
        accelerator = Accelerator(cpu=True)
        start_trackers(accelerator, (name,), run, SETTINGS)
        accelerator.log({"train/loss": 10.0 / step}, step=step)
        log_picture(accelerator, "predictions", run / "predictions.png", step, read=as_rgb)
        accelerator.end_training()
    return json.loads((run / "trackers.json").read_text())[name]


@pytest.mark.filterwarnings("error:The image decoding and encoding capabilities of TorchVision are deprecated")
def test_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train_twice("tensorboard", tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 10.0), (2, 5.0)]
    assert [event.step for event in events.Images("predictions")] == [1, 2]
    with Image.open(io.BytesIO(events.Images("predictions")[0].encoded_image_string)) as picture:
        np.testing.assert_array_equal(np.asarray(picture), PIXELS[..., :3])
    assert all(path.name.startswith("events.") for path in (tmp_path / "run" / "tensorboard").iterdir())


def test_wandb(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    identity = train_twice("wandb", tmp_path / "run")
    folders = list((tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert folders
    assert all(folder.name.endswith(identity) for folder in folders)
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/files/media/images/predictions_*.png"))


def test_mlflow(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # the store that mlflow-skinny has, too
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    identity = train_twice("mlflow", tmp_path / "run")
    client = mlflow.MlflowClient()
    found = client.get_run(identity)
    assert found.info.run_name == "run"
    assert found.data.params["optimization.lr"] == "0.0001"
    assert [metric.value for metric in client.get_metric_history(identity, "train/loss")] == [10.0, 5.0]
    assert [file.path for file in client.list_artifacts(identity)] == ["predictions.png"]


def test_trackio(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio")
    identity = train_twice("trackio", tmp_path / "run")
    runs = trackio.Api().runs("groupdetr_fast")
    assert [run.name for run in runs] == [f"run-{identity}"]


def test_none_and_several(tmp_path):
    assert check_trackers(("none",)) == ()
    assert check_trackers(("tensorboard", "tensorboard")) == ("tensorboard",)
    accelerator = Accelerator(cpu=True)
    start_trackers(accelerator, ("none",), tmp_path, SETTINGS)
    accelerator.log({"train/loss": 1.0}, step=1)
    assert accelerator.trackers == []


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("comet",), "track must be of tensorboard, wandb, mlflow, trackio, none; got 'comet'"),
        (("none", "wandb"), "track must be none or others, got none, wandb"),
    ],
)
def test_names_are_checked(names, message):
    with pytest.raises(ValueError, match=message):
        check_trackers(names)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr("groupdetr_fast.training.tracking.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="track wandb needs its package: pip install wandb"):
        check_trackers(("wandb",))
