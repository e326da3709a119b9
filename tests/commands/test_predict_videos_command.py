"""``groupdetr predict`` on videos, tiles and chosen classes, with a detector whose answers are known."""

import importlib
import json
import re
import signal
import sys

import numpy as np
import pytest
from blob_detector import BlobDetector, draw
from PIL import Image
from pycocotools.coco import COCO
from small_checkpoint import write_checkpoint
from video_files import objects_at, write_video

from groupdetr_fast import cli
from groupdetr_fast.commands.predict.progress import Bar
from groupdetr_fast.commands.predict.sources import find_sources
from groupdetr_fast.commands.predict.videos import stem_of
from groupdetr_fast.data.videos import Video

pytest.importorskip("av", reason="PyAV (extra video) is not installed")

CATEGORIES = [{"id": 3, "name": "red"}, {"id": 5, "name": "green"}, {"id": 8, "name": "blue"}]


@pytest.fixture
def interruptible():
    """Ctrl-C interrupts, though the tests may run in the background, where shells have it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the command with the detector of known answers; returns the folder of results."""
    command = importlib.import_module("groupdetr_fast.commands.predict.command")
    model = BlobDetector(square=False, eval_short_side=64, eval_max_size=None)
    monkeypatch.setattr(command, "load_model", lambda *_, **__: model)

    def call(*arguments):
        cli.main(["predict", "any.pth", *map(str, arguments), "--output", str(tmp_path / "out")])
        return tmp_path / "out"

    call.model = model
    return call


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_entries(entries, index):
    """The detections in a frame."""
    expected = objects_at(index)
    entries = sorted(entries, key=lambda entry: entry["category_id"])
    assert [entry["category_id"] for entry in entries] == [CATEGORIES[each[0]]["id"] for each in expected]
    for entry, (_, x1, y1, x2, y2) in zip(entries, expected, strict=True):
        assert entry["bbox"] == pytest.approx([x1, y1, x2 - x1, y2 - y1], abs=3)
        assert entry["area"] == pytest.approx(entry["bbox"][2] * entry["bbox"][3])


def test_a_video_becomes_a_video_and_lines_of_json(run, tmp_path, capsys):
    path = write_video(tmp_path / "clip.mp4")
    output = run(path)
    rows = lines(output / "videos" / "clip.jsonl")
    assert [row["frame"] for row in rows] == list(range(12))
    assert [row["time"] for row in rows] == pytest.approx([index / 10 for index in range(12)], abs=2e-3)
    for row in rows:
        assert (row["video"], row["width"], row["height"]) == (str(path), 96, 64)
        assert_entries(row["detections"], row["frame"])
        assert {each["category"] for each in row["detections"]} <= {"red", "green"}
    with Video(output / "videos" / "clip.mp4") as video, Video(path) as original:
        drawn, plain = list(video.frames()), list(original.frames())
    assert [frame.time for frame in drawn] == pytest.approx([row["time"] for row in rows], abs=2e-3)
    changed = (drawn[8].image.float() - plain[8].image.float()).abs().sum(0) > 150
    assert changed[38:63, 8:33].any(), "the outline of the green square"
    assert not changed[:, 85:].any(), "neither an object nor a name"
    said = capsys.readouterr().out
    assert f"19 detections in 12 frames of {path}: {output}/videos/clip.jsonl, {output}/videos/clip.mp4" in said
    assert not (output / "predictions.json").exists(), "there are no images"


def test_a_video_as_a_coco_file(run, tmp_path):
    output = run(write_video(tmp_path / "clip.mp4"), "--frame-format=coco", "--every=3", "--no-annotated")
    assert [path.name for path in (output / "videos").iterdir()] == ["clip.json"]
    coco = COCO(str(output / "videos" / "clip.json"))
    assert [image["frame_id"] for image in coco.imgs.values()] == [0, 3, 6, 9]
    assert [image["time"] for image in coco.imgs.values()] == pytest.approx([0, 0.3, 0.6, 0.9], abs=2e-3)
    assert coco.dataset["videos"] == [{"id": 1, "file_name": str(tmp_path / "clip.mp4"), "width": 96, "height": 64}]
    assert coco.dataset["categories"] == CATEGORIES
    for image_id, image in coco.imgs.items():
        assert (image["video_id"], image["file_name"]) == (1, f"clip_{image['frame_id']:06d}.jpg")
        assert_entries(coco.imgToAnns[image_id], image["frame_id"])


@pytest.mark.parametrize(
    ("flags", "frames"),
    [
        (["--every=5"], [0, 5, 10]),
        (["--fps=5", "--max-frames=3"], [0, 2, 4]),
        (["--max-frames=2", "--batch-size=1"], [0, 1]),
    ],
)
def test_some_frames_play_as_fast_as_all(run, tmp_path, flags, frames):
    output = run(write_video(tmp_path / "clip.mp4"), *flags)
    assert [row["frame"] for row in lines(output / "videos" / "clip.jsonl")] == frames
    with Video(output / "videos" / "clip.mp4") as video:
        assert [frame.time for frame in video.frames()] == pytest.approx([index / 10 for index in frames], abs=2e-3)


def test_images_and_videos_of_a_folder(run, tmp_path, capsys):
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    write_video(folder / "a.mp4", frames=2)
    write_video(folder / "sub" / "a.mkv", frames=3)
    Image.fromarray(draw(64, 64, objects_at(0)).permute(1, 2, 0).numpy()).save(folder / "a.png")
    (folder / "notes.txt").touch()
    output = run(folder, folder / "sub", "--tile=48", "--classes=red")
    assert len(lines(output / "videos" / "a.jsonl")) == 2
    assert len(lines(output / "videos" / "a_2.jsonl")) == 3
    content = json.loads((output / "predictions.json").read_text())
    assert [image["file_name"] for image in content["images"]] == [str(folder / "a.png")]
    assert [each["category_id"] for each in content["annotations"]] == [3]
    assert "1 detections in 1 images" in capsys.readouterr().out


def test_what_is_damaged_is_said_and_the_rest_done(run, tmp_path):
    whole = write_video(tmp_path / "a.mp4", frames=60, movflags="faststart").read_bytes()
    (tmp_path / "b.mp4").write_bytes(whole[: int(0.75 * len(whole))])
    (tmp_path / "c.mp4").write_bytes(b"no video")
    with pytest.raises(SystemExit) as ended:
        run(tmp_path / "c.mp4", tmp_path / "none.mp4", tmp_path / "b.mp4", tmp_path / "a.mp4", "--max-frames=50")
    for said in (
        r"error: video \S*c.mp4 cannot be opened \(.*\); video \S*none.mp4 does not exist; ",
        r"video \S*b.mp4: \d of its frames cannot be read, and it ends after \d+ of 60 frames; the rest is done$",
    ):
        assert re.search(said, str(ended.value))
    videos = tmp_path / "out" / "videos"
    found = lines(videos / "b.jsonl")
    assert 5 < len(found) < 50
    with Video(videos / "b.mp4") as video:
        assert len(list(video.frames())) == len(found)
    assert len(lines(videos / "a.jsonl")) == 50


@pytest.mark.parametrize("form", ["jsonl", "coco"])
def test_ctrl_c_leaves_whole_files(run, interruptible, tmp_path, monkeypatch, form):
    videos = importlib.import_module("groupdetr_fast.commands.predict.videos")
    path, drawn, draw_frame = write_video(tmp_path / "clip.mp4", frames=40), [], videos.draw_frame

    def interrupted(*arguments):
        drawn.append(None)
        if len(drawn) == 9:
            signal.raise_signal(signal.SIGINT)
        return draw_frame(*arguments)

    monkeypatch.setattr(videos, "draw_frame", interrupted)
    with pytest.raises(SystemExit) as ended:
        run(path, f"--frame-format={form}")
    assert ended.value.code == 130
    folder = tmp_path / "out" / "videos"
    if form == "jsonl":
        indices = [row["frame"] for row in lines(folder / "clip.jsonl")]
    else:
        indices = [image["frame_id"] for image in COCO(str(folder / "clip.json")).imgs.values()]
    assert indices == list(range(len(indices)))
    assert 9 <= len(indices) < 40
    with Video(folder / "clip.mp4") as video:
        # Of the frame at which it happened, the line may be written and the picture not yet.
        assert len(list(video.frames())) in (len(indices), len(indices) - 1)
        assert video.damage is None


def test_ctrl_c_among_images_keeps_those_that_are_done(run, interruptible, tmp_path, monkeypatch):
    images = importlib.import_module("groupdetr_fast.commands.predict.images")
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(12):
        Image.fromarray(draw(64, 64, objects_at(number % 4)).permute(1, 2, 0).numpy()).save(folder / f"{number:02}.png")
    done, as_entries = [], images.as_entries

    def interrupted(*arguments):
        if len(done) == 5:
            signal.raise_signal(signal.SIGINT)
        done.append(None)
        return as_entries(*arguments)

    monkeypatch.setattr(images, "as_entries", interrupted)
    with pytest.raises(SystemExit) as ended:
        run(folder, "--contact-sheet=2")
    assert ended.value.code == 130
    content = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert len(content["images"]) == 5
    assert (tmp_path / "out" / "contact_sheet.png").exists()
    assert len(list((tmp_path / "out" / "images").iterdir())) == 5


@pytest.mark.parametrize("form", ["jsonl", "coco"])
@pytest.mark.parametrize("broken", ["draw_frame", "as_entries"])
def test_an_error_leaves_whole_files(run, tmp_path, monkeypatch, form, broken):
    """In the thread that draws, after the last frame was detected in, and between the frames."""
    videos = importlib.import_module("groupdetr_fast.commands.predict.videos")
    path, calls, function = write_video(tmp_path / "clip.mp4"), [], getattr(videos, broken)

    def fails(*arguments):
        calls.append(None)
        if len(calls) >= 10:
            raise OSError("no space")
        return function(*arguments)

    monkeypatch.setattr(videos, broken, fails)
    with pytest.raises(SystemExit, match=r"^error: no space$"):
        run(path, f"--frame-format={form}")
    folder = tmp_path / "out" / "videos"
    rows = lines(folder / "clip.jsonl") if form == "jsonl" else COCO(str(folder / "clip.json")).imgs
    assert len(rows) == (12 if broken == "draw_frame" else 9)
    with Video(folder / "clip.mp4") as video:
        assert len(list(video.frames())) == 9
        assert video.damage is None


@pytest.mark.parametrize("broken", ["draw_image", "as_entries"])
def test_an_error_among_images_keeps_those_that_are_done(run, tmp_path, monkeypatch, broken):
    images = importlib.import_module("groupdetr_fast.commands.predict.images")
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(6):
        Image.fromarray(draw(64, 64, objects_at(number % 4)).permute(1, 2, 0).numpy()).save(folder / f"{number}.png")
    calls, function = [], getattr(images, broken)

    def fails(*arguments):
        calls.append(None)
        if len(calls) >= 5:
            raise OSError("no space")
        return function(*arguments)

    monkeypatch.setattr(images, broken, fails)
    with pytest.raises(SystemExit, match=r"^error: no space$"):
        run(folder)
    content = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert len(content["images"]) == (6 if broken == "draw_image" else 4)
    assert len(list((tmp_path / "out" / "images").iterdir())) == 4
    assert (tmp_path / "out" / "contact_sheet.png").exists()


def test_classes_and_their_thresholds(run, tmp_path):
    path = tmp_path / "a.png"
    scene = draw(64, 96, [(0, 2, 2, 12, 12), (1, 20, 20, 50, 50), (2, 60, 2, 80, 22)])
    Image.fromarray(scene.permute(1, 2, 0).numpy()).save(path)

    def found(*flags):
        content = json.loads((run(path, *flags) / "predictions.json").read_text())
        return {each["category_id"]: each["score"] for each in content["annotations"]}

    scores = found()
    assert set(scores) == {3, 5, 8}
    assert set(found("--classes=red,2")) == {3, 8}
    others = [{"id": 1, "name": "bus, red"}, {"id": 2, "name": "green"}, {"id": 3, "name": "blue"}]
    (tmp_path / "others.json").write_text(json.dumps({"images": [], "annotations": [], "categories": others}))
    named = ["--categories", tmp_path / "others.json", "--labels=contiguous"]
    assert set(found(*named, "--classes", "bus, red")) == {1}
    assert set(found("--classes", "bus, red", *named, "--classes=2")) == {1, 3}
    assert set(found(*named, "--classes=green,blue")) == {2, 3}
    with pytest.raises(SystemExit, match="error: there is no class 'green,blue': did you mean 'green'"):
        run(path, *named, "--classes=bus, red", "--classes=green,blue")
    (tmp_path / "thresholds.yaml").write_text(f"red: {scores[3] + 0.01}\ngreen: null\n")
    assert set(found("--class-thresholds", tmp_path / "thresholds.yaml")) == {5, 8}
    assert set(found("--class-thresholds=red=0.1", "--score-threshold=1")) == {3}
    for flag, message in (
        ("--classes=gren", "there is no class 'gren': did you mean 'green'\\?"),
        ("--class-thresholds=gren=0.5", "there is no class 'gren': did you mean 'green'\\?"),
        ("--class-thresholds=0.5", "class_thresholds must look like"),
        ("--tile=2", "tile must be at least 8 pixels"),
        ("--every=0", "every must be at least 1"),
        ("--workers=-1", "workers must not be negative"),
    ):
        with pytest.raises(SystemExit, match=f"^error: {message}"):
            run(path, flag)


def test_small_objects_of_a_large_image(run, tmp_path):
    objects = [
        (number % 3, 40 * number + 3, 30 * number + 5, 40 * number + 11, 30 * number + 13) for number in range(9)
    ]
    Image.fromarray(draw(300, 400, objects).permute(1, 2, 0).numpy()).save(tmp_path / "a.png")
    plain = json.loads((run(tmp_path / "a.png") / "predictions.json").read_text())
    assert plain["annotations"] == []
    tiled = json.loads((run(tmp_path / "a.png", "--tile=64") / "predictions.json").read_text())
    boxes = sorted(entry["bbox"] for entry in tiled["annotations"])
    for box, (_, x, y, *_) in zip(boxes, objects, strict=True):
        assert box == pytest.approx([x, y, 8, 8], abs=1)
    shapes = {shape[2:] for shape in run.model.batches}
    assert (64, 64) in shapes


def test_sources_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b.mp4", "a.MOV", "c.jpg", "d.txt"):
        (tmp_path / name).touch()
    found = find_sources([".", "0", "rtsp://host/live/door", "x.mkv", "*.mp4", "y.png"])
    assert [str(path) for path in found.images] == ["c.jpg", "y.png"]
    assert list(found.videos) == ["a.MOV", "b.mp4", "0", "rtsp://host/live/door", "x.mkv"]
    assert [stem_of(video) for video in found.videos] == ["a", "b", "camera_0", "door", "x"]
    assert stem_of("rtsp://user:secret@host:554") == "host"


def test_a_camera_that_is_not_there(tmp_path):
    with pytest.raises(SystemExit, match=r"^error: camera 97 .*cannot be opened"):
        cli.main(["predict", str(write_checkpoint(tmp_path)), "97", "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_without_pyav_the_extra_is_named_at_once(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "a.mp4").touch()
    with pytest.raises(SystemExit, match=r"^error: videos need PyAV: pip install 'groupdetr_fast\[train,video\]'"):
        cli.main(["predict", "nowhere.pth", str(tmp_path / "a.mp4")])


def test_masks_of_a_video(tmp_path):
    settings = {"backbone": "conv:8-16-16-16", "encoder_dim_feedforward": 16}
    checkpoint = write_checkpoint(tmp_path, "mask2former_r50", **settings)
    path = write_video(tmp_path / "clip.mp4", frames=2)
    flags = ["--score-threshold=0", "--top-k=3", "--output", str(tmp_path / "out")]
    cli.main(["predict", str(checkpoint), str(path), *flags])
    rows = lines(tmp_path / "out" / "videos" / "clip.jsonl")
    assert [len(row["detections"]) for row in rows] == [3, 3]
    assert rows[0]["detections"][0]["segmentation"]["size"] == [64, 96]
    with Video(tmp_path / "out" / "videos" / "clip.mp4") as video:
        assert len(list(video.frames())) == 2


def test_progress_without_a_terminal_is_a_line_every_half_minute(capsys, monkeypatch):
    progress = importlib.import_module("groupdetr_fast.commands.predict.progress")
    now = iter(np.arange(0.0, 1000.0, 20.0).tolist())
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(now))
    with Bar("frames of a", 4) as bar:
        for _ in range(4):
            bar.advance()
    said = capsys.readouterr().err
    assert said.splitlines() == ["frames of a: 2 of 4, 0.1/s", "frames of a: 4 of 4, 0.1/s"]
