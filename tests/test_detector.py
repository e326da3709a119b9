"""The class that does everything: the same runs as the command line's."""

import json
import shutil

import pytest
import torch
from small_sizes import SIZES
from video_files import write_video

import groupdetr_fast as gd
from groupdetr_fast.data import DigitsConfig, digits_dataset
from groupdetr_fast.models.checkpoints import read_header

AUGMENTATION = {"short_sides": (48,), "crop": 0.0, "eval_short_side": 48}


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    size = DigitsConfig(image_size=48, train_images=6, val_images=4, max_objects=3, min_digit=12, max_digit=24)
    return digits_dataset(tmp_path_factory.mktemp("digits"), config=size)._asdict()


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory):
    """A detector that was trained, the results, and the folder of the run."""
    folder = tmp_path_factory.mktemp("run")
    detector = gd.Detector(num_groups=3, **SIZES)
    results = detector.train(**digits, **AUGMENTATION, epochs=1, lr=1e-2, workers=0, output=folder)
    return detector, results, folder


def test_a_detector_is_trained_evaluated_and_loaded(trained, digits, tmp_path, monkeypatch):
    detector, results, folder = trained
    monkeypatch.chdir(tmp_path)
    assert json.loads(json.dumps(results)) == json.loads((folder / "results.json").read_text())
    assert detector.checkpoint.is_relative_to(folder)
    evaluation = {name: digits[name] for name in ("val_images", "val_annotations")}
    metrics = detector.evaluate(**evaluation, workers=0)
    assert metrics == results["epochs"][-1]["metrics"]
    assert (tmp_path / "runs/eval/index.html").exists()
    (tmp_path / "data/annotations").mkdir(parents=True)
    shutil.copy(digits["val_annotations"], tmp_path / "data/annotations/test.json")
    (tmp_path / "data/test").symlink_to(digits["val_images"])
    assert detector.evaluate("data", split="test", workers=0, report=False) == metrics

    again = gd.Detector.from_pretrained(folder)
    image = torch.rand(3, 40, 60)
    first, second = (each.predict(image, score_threshold=0.0) for each in (detector, again))
    assert first.keys() == second.keys()
    torch.testing.assert_close(first["boxes"], second["boxes"], rtol=0, atol=0)
    assert len(first["boxes"]) == 50  # pairs of 5 queries, those of one group, and 10 classes


def test_what_is_saved_is_what_is_loaded(trained, tmp_path):
    detector, *_ = trained
    detector.save_pretrained(tmp_path / "saved")
    header = read_header(tmp_path / "saved")
    assert (header.model, header.model_config["num_groups"]) == ("conditional_detr_r50", 1)
    image = torch.rand(3, 40, 60)
    again = gd.Detector.from_pretrained(tmp_path / "saved")
    expected, found = (each.predict(image, score_threshold=0.0) for each in (detector, again))
    torch.testing.assert_close(found["scores"], expected["scores"], rtol=0, atol=0)
    assert found["class_names"] == expected["class_names"]


def test_one_group_does_not_replace_a_checkpoint_of_a_run(trained, tmp_path):
    detector, _, folder = trained
    best = tmp_path / "run" / "checkpoints" / "best"
    shutil.copytree(folder / "checkpoints" / "best", best)
    (best / "config.json").write_text("{}")  # as a detector of transformers has it, and the hub's mixin removes it
    before = {path.name: path.read_bytes() for path in best.iterdir()}
    with pytest.raises(
        ValueError, match="best is a checkpoint of a run, with all groups: save this one group elsewhere"
    ):
        detector.save_pretrained(best)
    assert {path.name: path.read_bytes() for path in best.iterdir()} == before
    for _ in range(2):
        detector.save_pretrained(tmp_path / "checkpoints" / "mine")
    assert read_header(tmp_path / "checkpoints" / "mine").model_config["num_groups"] == 1


def test_a_detector_goes_on_with_a_run(digits, tmp_path):
    detector = gd.Detector(num_groups=2, **SIZES)
    settings = {**digits, **AUGMENTATION, "workers": 0, "pictures": 0, "report": False, "track": ()}
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "mine.safetensors").touch()  # of the user's
    for epochs, resume in ((1, False), (2, True)):
        results = detector.train(**settings, epochs=epochs, resume=resume, output=tmp_path / "run")
        assert [row["epoch"] for row in results["epochs"]] == list(range(1, epochs + 1))
        assert detector.checkpoint == tmp_path / "run" / "checkpoints" / "best"

    other = gd.Detector()  # of other sizes, as after a crash
    results = other.train(output=tmp_path / "run", resume=True, epochs=3)
    assert [row["epoch"] for row in results["epochs"]] == [1, 2, 3]
    assert other.model.config == detector.model.config
    with pytest.raises(ValueError, match="resume goes on with the run in output: give output"):
        detector.train(**settings, resume=True)
    with pytest.raises(ValueError, match="recipe no_such_recipe is for a new run"):
        detector.train(output=tmp_path / "run", resume=True, recipe="no_such_recipe")


def test_frames_of_a_video(trained, tmp_path):
    pytest.importorskip("av", reason="PyAV (extra video) is not installed")
    detector, *_ = trained
    path = write_video(tmp_path / "a.mp4", frames=3)
    found = list(detector.predict_video(path, score_threshold=0.0, frames=True, classes=["3", 4]))
    assert [index for index, *_ in found] == [0, 1, 2]
    for *_, detection, frame in found:
        again = detector.predict(frame, score_threshold=0.0, classes="3,4")
        assert set(detection["class_names"]) <= {"3", "4"}
        torch.testing.assert_close(detection["scores"], again["scores"], rtol=1e-4, atol=1e-5)


def test_sharing_uploads_the_file(trained, monkeypatch):
    detector, *_ = trained
    uploaded = {}

    class Hub:
        def __init__(self, **_):
            pass

        def create_repo(self, repo_id, **_):
            return type("Url", (), {"repo_id": repo_id})()

        def upload_folder(self, *, repo_id, folder_path, **_):
            uploaded[repo_id] = sorted(path.name for path in folder_path.iterdir())
            return repo_id

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Hub)
    detector.push_to_hub("somebody/digits")
    assert uploaded == {"somebody/digits": ["README.md", "config.json", "model.safetensors"]}


def test_a_repository_is_downloaded(trained, monkeypatch, tmp_path):
    detector, *_ = trained
    detector.save_pretrained(tmp_path / "saved")
    asked = {}

    def download(repository, **options):
        asked[repository] = options["revision"]
        return str(tmp_path / "saved")

    monkeypatch.setattr("groupdetr_fast.detector.snapshot_download", download)
    again = gd.Detector.from_pretrained("somebody/digits", revision="v1")
    assert asked == {"somebody/digits": "v1"}
    assert again.model.config == detector.model.config


def test_training_goes_on_with_all_groups_and_other_classes_in_a_new_folder(trained, digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "train").mkdir(parents=True)
    detector = gd.Detector.from_pretrained(trained[2])
    for part in ("train", "val"):
        content = json.loads(digits[f"{part}_annotations"].read_text())
        content["categories"].append({"id": 99, "name": "other"})
        (tmp_path / f"{part}.json").write_text(json.dumps(content))
    files = {**digits, "train_annotations": tmp_path / "train.json", "val_annotations": tmp_path / "val.json"}
    detector.train(**files, **AUGMENTATION, epochs=1, workers=0, pictures=0, report=False)
    assert read_header(tmp_path / "runs/train-2").model_config["num_groups"] == 3
    assert detector.checkpoint.is_relative_to("runs/train-2")
    assert detector.model.config.num_classes == 11


@pytest.mark.parametrize("name", ["model.onnx", "model.pt2"])
def test_export(trained, tmp_path, name):
    detector, *_ = trained
    assert detector.export(tmp_path / name, (48, 48)).stat().st_size > 10_000


def test_what_does_not_work_ends_in_a_sentence(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="unknown model 'yolo'"):
        gd.Detector("yolo")
    detector = gd.Detector(num_groups=2)
    for call in (
        lambda: detector.evaluate("data"),
        lambda: detector.predict("photo.jpg"),
        lambda: detector.predict_video("clip.mp4"),
        lambda: detector.export("model.onnx"),
        lambda: detector.save_pretrained(tmp_path / "saved"),
    ):
        with pytest.raises(ValueError, match=r"only random weights to .*: call train first, or from_pretrained"):
            call()
    with pytest.raises(ValueError, match="there is no setting 'epoch': did you mean 'epochs'"):
        detector.train("data", epoch=3)
    with pytest.raises(ValueError, match=r"num_groups must be an integer, got 3\.0"):
        gd.Detector(num_groups=3.0)
    with pytest.raises(ValueError, match="batch_size must be an integer or auto, got '4'"):
        detector.train("data", batch_size="4")
    with pytest.raises(ValueError, match="rate_steps must be an integer, got '200'"):
        detector.find_rate("data", rate_steps="200")
    with pytest.raises(FileNotFoundError, match=r"no/such/file.pth does not exist, and is no id of a repository"):
        gd.Detector.from_pretrained("no/such/file.pth")
    with pytest.raises(FileNotFoundError, match=r"somebody/nothing does not exist, and cannot be downloaded"):
        gd.Detector.from_pretrained("somebody/nothing", local_files_only=True, cache_dir=tmp_path)
