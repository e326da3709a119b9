"""Frames of videos: all of them or some, whole files and damaged ones, and files of frames."""

import socket
import sys
import threading

import pytest
import torch
from blob_detector import draw
from video_files import objects_at, turn, write_video

from groupdetr_fast.data import DataError
from groupdetr_fast.data.video_writer import VideoWriter
from groupdetr_fast.data.videos import FrameChoice, Video, is_stream

av = pytest.importorskip("av", reason="PyAV (extra video) is not installed")


def assert_shows(image, objects, tolerance=40):
    """Codecs blur edges, and store colours for two pixels at once."""
    difference = (image.float() - draw(*image.shape[1:], objects).float()).abs()
    assert difference.mean() < tolerance / 8
    assert (difference > 100).float().mean() < 0.03


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi", ".ts", ".webm"])
def test_every_frame_with_its_time(tmp_path, suffix):
    with Video(write_video(tmp_path / f"a{suffix}")) as video:
        assert not video.live
        frames = list(video.frames())
        assert video.damage is None
        assert video.length in (12, None) or suffix == ".ts"
    assert [frame.index for frame in frames] == list(range(12))
    assert [frame.time for frame in frames] == pytest.approx([index / 10 for index in range(12)], abs=2e-3)
    for frame in (frames[0], frames[11]):
        assert frame.image.shape == (3, 64, 96)
        assert frame.image.dtype == torch.uint8
        assert_shows(frame.image, objects_at(frame.index))


def test_frames_at_uneven_times(tmp_path):
    times = [0, 0.1, 0.15, 0.5, 2.0, 2.01]
    with Video(write_video(tmp_path / "a.mp4", times=times)) as video:
        assert [frame.time for frame in video.frames()] == pytest.approx(times, abs=2e-3)


@pytest.mark.parametrize(
    ("choice", "indices"),
    [
        ({"every": 5}, [0, 5, 10]),
        ({"most": 3}, [0, 1, 2]),
        ({"every": 4, "most": 2}, [0, 4]),
        ({"fps": 5}, [0, 2, 4, 6, 8, 10]),
        ({"fps": 3}, [0, 4, 7, 10]),
        ({"fps": 60}, list(range(12))),
    ],
)
def test_some_of_the_frames(tmp_path, choice, indices):
    with Video(write_video(tmp_path / "a.mp4")) as video:
        assert [frame.index for frame in video.frames(FrameChoice(**choice))] == indices
        assert video.damage is None
        assert FrameChoice(**choice).expected(video.length, video.rate) == len(indices)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"every": 0}, "every must be at least 1, got 0"),
        ({"most": 0}, "max_frames must be at least 1, got 0"),
        ({"fps": 0}, "fps must be positive, got 0"),
        ({"fps": float("nan")}, "fps must be positive"),
        ({"every": 2, "fps": 3}, "give every or fps, not both"),
    ],
)
def test_choices_that_cannot_be(choice, message):
    with pytest.raises(ValueError, match=message):
        FrameChoice(**choice)


def test_frames_are_the_right_way_up(tmp_path):
    path = write_video(tmp_path / "a.mp4")
    with Video(path) as stored, Video(turn(path, tmp_path / "b.mp4")) as turned:
        expected = torch.rot90(next(stored.frames()).image, -1, (1, 2))
        assert torch.equal(next(turned.frames()).image, expected)


def test_a_file_that_ends_early_gives_what_it_has(tmp_path):
    whole = write_video(tmp_path / "a.mp4", frames=60, movflags="faststart").read_bytes()
    (tmp_path / "b.mp4").write_bytes(whole[: int(0.75 * len(whole))])
    with Video(tmp_path / "b.mp4") as video:
        frames = list(video.frames())
        assert 5 < len(frames) < 55
        assert f"it ends after {len(frames)} of 60 frames" in video.damage
    with Video(tmp_path / "b.mp4") as video:
        assert len(list(video.frames(FrameChoice(most=3)))) == 3
        assert video.damage is None, "of the part that was asked for"


def test_a_file_that_only_says_how_long_it_is(tmp_path):
    whole = write_video(tmp_path / "a.mkv", frames=60).read_bytes()
    (tmp_path / "b.mkv").write_bytes(whole[: len(whole) // 2])
    with Video(tmp_path / "b.mkv") as video:
        frames = list(video.frames())
        assert 5 < len(frames) < 55
        assert f"it ends after {frames[-1].time:.1f} of 6.0 seconds" in video.damage


def test_a_file_with_a_hole_gives_what_is_around_it(tmp_path):
    content = bytearray(write_video(tmp_path / "a.ts", frames=60).read_bytes())
    middle = len(content) // 2
    content[middle : middle + 188 * 12] = bytes(188 * 12)
    (tmp_path / "b.ts").write_bytes(content)
    with Video(tmp_path / "b.ts") as video:
        indices = [frame.index for frame in video.frames()]
        assert 40 < len(indices) < 60
        assert "of its frames cannot be read" in video.damage
    with Video(tmp_path / "b.ts") as video:
        assert len(list(video.frames(FrameChoice(most=40)))) == 40
        assert "of its frames cannot be read" in video.damage, "which were asked for"
    with Video(tmp_path / "b.ts") as video:
        assert len(list(video.frames(FrameChoice(most=5)))) == 5
        assert video.damage is None, "of the part that was asked for"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nowhere.mp4", None, "video .*nowhere.mp4 does not exist"),
        ("text.mp4", b"no video", "video .*text.mp4 cannot be opened"),
        ("empty.mp4", b"", "video .*empty.mp4 cannot be opened"),
    ],
)
def test_what_is_no_video(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        Video(tmp_path / name)
    assert "\n" not in str(error.value)


def test_a_file_of_sound_has_no_pictures(tmp_path):
    with av.open(str(tmp_path / "a.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        stream.layout = "mono"
        frame = av.AudioFrame(format="s16", layout="mono", samples=800)
        frame.sample_rate, frame.pts = 8000, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(DataError, match=r"video .*a.wav has no pictures in it"):
        Video(tmp_path / "a.wav")


def test_cameras_and_addresses_are_told_from_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_stream("0")
    assert is_stream(2)
    assert is_stream("rtsp://host/path")
    assert not is_stream("a.mp4")
    (tmp_path / "0").mkdir()
    assert not is_stream("0"), "a folder of that name"
    with pytest.raises(DataError, match=r"camera 97 .*cannot be opened"):
        Video(97)
    for password in ("secret", "p@secret", "secret@p", ":@secret@"):
        with pytest.raises(DataError, match=r"^video rtsp://127\.0\.0\.1:1/x cannot be opened") as error:
            Video(f"rtsp://user:{password}@127.0.0.1:1/x")
        assert "secret" not in str(error.value)


def test_what_a_camera_is_called(monkeypatch):
    opened = []

    class Stop(OSError):
        pass

    def remember(file, **settings):
        opened.append((file, settings["format"]))
        raise Stop("no camera in a test")

    monkeypatch.setattr(av, "open", remember)
    for platform in ("linux", "darwin", "win32"):
        monkeypatch.setattr(sys, "platform", platform)
        with pytest.raises(DataError):
            Video(3)
    assert opened == [("/dev/video3", "v4l2"), ("3", "avfoundation")]


def test_a_stream_is_live(tmp_path):
    write_video(tmp_path / "a.ts", frames=30)
    server = socket.create_server(("127.0.0.1", 0))
    address = f"tcp://127.0.0.1:{server.getsockname()[1]}"

    def send():
        connection, _ = server.accept()
        with connection:
            connection.sendall((tmp_path / "a.ts").read_bytes())

    thread = threading.Thread(target=send)
    thread.start()
    with Video(address) as video:
        assert video.live
        assert video.length is None
        assert [frame.index for frame in video.frames()] == list(range(30))
        assert video.damage is None
    thread.join()
    server.close()


@pytest.mark.parametrize("codec", ["h264", "mpeg4"])
@pytest.mark.parametrize(("height", "width"), [(48, 64), (47, 63), (1, 1)])
def test_frames_are_written_and_read_again(tmp_path, monkeypatch, height, width, codec):
    if codec == "mpeg4":
        monkeypatch.setattr(av, "codecs_available", {"mpeg4"})
    elif "libx264" not in av.codecs_available:
        pytest.skip("this build of PyAV has no libx264")
    writer = VideoWriter(tmp_path / "a.mp4", 10)
    times = [0.0, 0.1, 0.35, 0.35, 1.0]
    for index, time in enumerate(times):
        writer.add(torch.full((3, height, width), 50 * index, dtype=torch.uint8), time)
    writer.close()
    with Video(tmp_path / "a.mp4") as video:
        frames = list(video.frames())
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.video[0].codec_context.name == codec
    assert [frame.time for frame in frames] == pytest.approx(times, abs=1e-3)
    assert frames[0].image.shape == (3, height + height % 2, width + width % 2)
    for index, frame in enumerate(frames):
        assert frame.image.float().mean().item() == pytest.approx(50 * index, abs=4)


def test_a_video_of_a_frame_in_an_hour(tmp_path):
    writer = VideoWriter(tmp_path / "a.mp4", 1 / 3600)
    for index in range(3):
        writer.add(torch.full((3, 16, 16), 80 * index, dtype=torch.uint8), 3600.0 * index)
    writer.close()
    with Video(tmp_path / "a.mp4") as video:
        assert [frame.time for frame in video.frames()] == pytest.approx([0, 3600, 7200])
        assert video.rate == pytest.approx(3 / 8201), "the last frame lasts for 1001 seconds, as long as can be"


def test_a_video_without_frames_leaves_no_file(tmp_path):
    VideoWriter(tmp_path / "a.mp4", 10).close()
    assert not (tmp_path / "a.mp4").exists()


def test_a_frame_of_another_size_is_resized(tmp_path):
    writer = VideoWriter(tmp_path / "a.mp4", None)
    for side in (32, 64):
        writer.add(torch.full((3, side, 2 * side), 200, dtype=torch.uint8), side / 32)
    writer.close()
    with Video(tmp_path / "a.mp4") as video:
        assert [frame.image.shape for frame in video.frames()] == [(3, 32, 64)] * 2


def test_without_pyav_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ValueError, match=r"^videos need PyAV: pip install 'groupdetr_fast\[train,video\]'$"):
        Video("a.mp4")
