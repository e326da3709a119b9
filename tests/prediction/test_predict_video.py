"""Detections in the frames of a video, and what is in memory meanwhile."""

import re
import socket
import threading
import time
import weakref

import pytest
import torch
from blob_detector import BlobDetector
from video_files import objects_at, write_video

import groupdetr_fast as gd
from groupdetr_fast.data import DataError
from groupdetr_fast.prediction.batches import prefetched

pytest.importorskip("av", reason="PyAV (extra video) is not installed")


def model():
    return BlobDetector(square=False, eval_short_side=64, eval_max_size=None)


def assert_found(detection, index):
    """What is in a frame, within what a codec blurs."""
    expected = objects_at(index)
    rows = sorted(zip(detection["labels"].tolist(), detection["boxes"].tolist(), strict=True))
    assert [label for label, _ in rows] == [each[0] for each in expected]
    for (_, box), each in zip(rows, expected, strict=True):
        assert box == pytest.approx(each[1:], abs=2)


def test_every_frame_in_order(tmp_path):
    path = write_video(tmp_path / "a.mp4")
    detector = model()
    found = list(gd.predict_video(detector, path, batch_size=5))
    assert [index for index, _, _ in found] == list(range(12))
    assert [seconds for _, seconds, _ in found] == pytest.approx([index / 10 for index in range(12)], abs=2e-3)
    for index, _, detection in found:
        assert_found(detection, index)
        assert detection["class_names"][0] in ("red", "green")
    assert [shape[0] for shape in detector.batches] == [5, 5, 2]


def test_frames_come_with_their_detections(tmp_path):
    path = write_video(tmp_path / "a.mp4")
    for index, _, detection, frame in gd.predict_video(model(), str(path), every=4, frames=True):
        assert frame.shape == (3, 64, 96)
        again = gd.predict(model(), frame)
        assert torch.equal(detection["boxes"], again["boxes"])
        assert_found(detection, index)


def test_the_arguments_of_predict(tmp_path):
    path = write_video(tmp_path / "a.mp4")
    first, second = gd.predict_video(model(), path, every=8, max_frames=2, classes="green")
    assert (first[0], second[0]) == (0, 8)
    assert (first[2]["class_names"], second[2]["class_names"]) == ([], ["green"])
    detector = model()
    list(gd.predict_video(detector, path, max_frames=1, tile=64, batch_size=8))
    assert detector.batches[0][0] == 3, "two tiles and the whole frame"
    for wrong, message in (
        ({"classes": "gren"}, "did you mean 'green'"),
        ({"every": 0}, "every must be at least 1"),
        ({"every": 1, "fps": 1.0}, "give every or fps, not both"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):  # at once, not with the first frame
            gd.predict_video(model(), path, **wrong)
    with pytest.raises(DataError, match=r"nowhere.mp4 does not exist"):
        gd.predict_video(model(), "nowhere.mp4")


def test_thresholds_are_read_once(tmp_path):
    thresholds = tmp_path / "thresholds.json"
    thresholds.write_text('{"green": 1.0}')
    found = gd.predict_video(model(), write_video(tmp_path / "a.mp4"), class_thresholds=thresholds)
    thresholds.unlink()
    assert {name for *_, detection in found for name in detection["class_names"]} == {"red"}


def test_a_video_is_no_image(tmp_path):
    with pytest.raises(ValueError, match=r"a.mp4 is a video: predict_video goes through its frames"):
        gd.predict(model(), tmp_path / "a.mp4")


def test_what_is_damaged_is_said_after_the_last_frame(tmp_path, caplog):
    whole = write_video(tmp_path / "a.mp4", frames=60, movflags="faststart").read_bytes()
    (tmp_path / "b.mp4").write_bytes(whole[: int(0.75 * len(whole))])
    found = list(gd.predict_video(model(), tmp_path / "b.mp4"))
    assert 5 < len(found) < 55
    for index, _, detection in found:
        assert detection["class_names"], index
    assert re.search(rf"b.mp4: \d of its frames cannot be read, and it ends after {len(found)} of 60 fr", caplog.text)


def test_the_video_is_never_in_memory_as_a_whole(tmp_path):
    """Of 300 frames no more than some batches are alive."""
    path = write_video(tmp_path / "a.mp4", frames=300)
    alive, most = weakref.WeakSet(), 0
    for *_, frame in gd.predict_video(model(), path, frames=True, batch_size=4):
        alive.add(frame)
        most = max(most, len(alive))
        del frame
    assert most <= 8


def test_a_prediction_that_is_left_closes_the_video(tmp_path):
    threads = set(threading.enumerate())
    frames = gd.predict_video(model(), write_video(tmp_path / "a.mp4", frames=100))
    next(frames)
    assert set(threading.enumerate()) - threads
    frames.close()
    assert not set(threading.enumerate()) - threads  # others may have ended meanwhile


def test_of_a_stream_the_newest_frame_is_taken(tmp_path):
    """A slow model leaves frames out instead of falling behind."""
    write_video(tmp_path / "a.ts", frames=60)
    content = (tmp_path / "a.ts").read_bytes()
    server = socket.create_server(("127.0.0.1", 0))
    sent = threading.Event()

    def send():
        connection, _ = server.accept()
        with connection:
            connection.sendall(content)
        sent.set()

    sender = threading.Thread(target=send)
    sender.start()
    detector = model()
    indices = []
    for index, _, detection in gd.predict_video(detector, f"tcp://127.0.0.1:{server.getsockname()[1]}", batch_size=4):
        sent.wait(10)
        time.sleep(0.3)
        if index < 36:  # later the square has left the picture
            assert_found(detection, index)
        indices.append(index)
    sender.join()
    server.close()
    assert len(indices) < 30
    assert indices == sorted(set(indices))
    assert {shape[0] for shape in detector.batches} == {1}


def test_items_that_are_fetched_ahead_keep_their_order_and_their_error():
    def items():
        yield from range(5)
        raise OSError("broken")

    fetched = prefetched(items(), 2)
    assert [next(fetched) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(OSError, match="broken"):
        next(fetched)


def test_the_newest_of_what_comes():
    given = threading.Event()

    def items():
        yield 0
        yield from range(1, 50)
        given.set()

    fetched = prefetched(items(), 1, newest=True)
    got = [next(fetched)]
    given.wait(10)
    got += fetched
    assert got == sorted(set(got))
    assert len(got) <= 3
    assert got[-1] == 49
