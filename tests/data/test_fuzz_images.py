"""Image files that are damaged or meant to do harm end in one sentence, without being decoded where they are huge."""

import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image, ImageFile
from torch.utils.data import DataLoader

import groupdetr_fast
from groupdetr_fast.data import CocoDataset, DataError, SkipUnreadable, collate
from groupdetr_fast.data.annotations import read_coco
from groupdetr_fast.data.check import check_part
from groupdetr_fast.data.images import as_rgb, decode_rgb
from groupdetr_fast.data.yolo import read_yolo

SIZE = 64


def png_of(width, height):
    """A PNG of a few kilobytes, all of one colour, whatever its size."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    row = zlib.compressobj(9)
    zeros = bytes(1 + width // 8 + 1)
    content = b"".join(row.compress(zeros) for _ in range(min(height, 2000))) + row.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", content) + chunk(b"IEND", b"")


def jpeg():
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def dataset_of(folder, files, width=SIZE, height=SIZE):
    """A data set of these ``{name: bytes}``, whose annotation file says that all have one size."""
    (folder / "images").mkdir(exist_ok=True)
    images = []
    for index, (name, content) in enumerate(files.items()):
        (folder / "images" / name).write_bytes(content)
        images.append({"id": index + 1, "file_name": name, "width": width, "height": height})
    content = {"images": images, "annotations": [], "categories": [{"id": 1, "name": "a"}]}
    (folder / "instances.json").write_text(json.dumps(content))
    return CocoDataset(folder / "images", folder / "instances.json")


def test_a_huge_image_in_a_small_file_is_refused_by_its_header(tmp_path, monkeypatch):
    bomb = png_of(13_000, 13_000)  # 169 million pixels, fewer than Pillow refuses; half a gigabyte once decoded
    assert len(bomb) < 10_000
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda *_: pytest.fail("the image was decoded"))
    with pytest.raises(DataError, match=r"bomb\.png \(image id 1\) is 13000 x 13000 pixels, but .* says 64 x 64"):
        dataset_of(tmp_path, {"bomb.png": bomb})[0]


def test_a_bomb_whose_annotations_agree_is_refused_by_pillow(tmp_path, monkeypatch):
    # Pillow's own limit, in a process in which others have raised it, too: importing rfdetr does.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1024**3 // 4 // 3)
    dataset = dataset_of(tmp_path, {"bomb.png": png_of(60_000, 60_000)}, 60_000, 60_000)
    with pytest.raises(DataError, match=r"bomb\.png .* cannot be read \(.*decompression bomb"):
        dataset[0]


@pytest.mark.parametrize("kept", [0, 1, 2, 20, 300, 1000, -20, -2])
def test_a_truncated_jpeg_is_no_image(tmp_path, kept):
    dataset = dataset_of(tmp_path, {"cut.jpg": jpeg()[:kept]})
    with pytest.raises(DataError, match=r"image file .*cut\.jpg \(image id 1\) cannot be read \("):
        dataset[0]


def test_training_goes_on_without_them(tmp_path):
    whole = jpeg()
    files = {"1.jpg": whole, "2.jpg": whole[:500], "3.png": png_of(13_000, 13_000), "4.jpg": whole}
    dataset = SkipUnreadable(dataset_of(tmp_path, files), limit=2)
    batches = list(DataLoader(dataset, 2, sampler=[(0, index) for index in range(4)], collate_fn=collate))
    assert [batch.image_ids for batch in batches] == [[1, 4], [4, 4]]
    assert dataset.unreadable == [1, 2]


EPS = f"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 {SIZE} {SIZE}
%%EndComments
showpage
%%EOF
""".encode()


def test_an_eps_runs_no_other_program_whatever_it_is_called(tmp_path, monkeypatch):
    """Pillow has Ghostscript draw it, which runs what the file says."""
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was started"))
    dataset = dataset_of(tmp_path, {"photo.jpg": EPS})
    folder = tmp_path / "images"
    with pytest.raises(DataError, match=r"photo\.jpg .* cannot be read \(it is none of BMP, GIF, JPEG"):
        dataset[0]
    with pytest.raises(DataError, match=r"photo\.jpg cannot be read \(it is none of"):
        as_rgb(folder / "photo.jpg")
    findings = check_part("train", folder, read_coco(tmp_path / "instances.json"))
    assert "photo.jpg cannot be read (it is none of" in findings.errors["image"][0]
    (tmp_path / "data.yaml").write_text("train: images\nnames: [a]\n")
    assert "photo.jpg cannot be read (it is none of" in read_yolo(tmp_path / "data.yaml", "train").faults[-1]


def test_all_images_are_opened_in_one_place():
    package = Path(groupdetr_fast.__file__).parent
    files = {
        path.relative_to(package).as_posix() for path in package.rglob("*.py") if "Image.open(" in path.read_text()
    }
    assert files == {"data/images.py"}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"])
def test_spoiled_files_of_every_kind_are_read_or_refused(tmp_path, kind):
    rng = np.random.default_rng(0)
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)).save(file, kind)
    files = {}
    for index in range(60):
        content = np.frombuffer(file.getvalue(), dtype=np.uint8).copy()
        # The beginning says what the rest means.
        spoiled = rng.integers(0, min(len(content), 64 if index % 2 else len(content)), rng.integers(1, 9))
        content[spoiled] = rng.integers(0, 256, len(spoiled))
        files[f"{index}.{kind}"] = content.tobytes()
    dataset = dataset_of(tmp_path, files)
    refused = 0
    for index in range(len(dataset)):
        try:
            assert dataset[index][0].shape == (3, SIZE, SIZE)
        except DataError:
            refused += 1
    assert 0 < refused < len(dataset)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of Pillow, of tags that it leaves out
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_spoiled_tags_leave_the_pixels_as_they_are(kind):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    plain, tags = io.BytesIO(), Image.Exif()
    image.save(plain, kind)
    expected = decode_rgb(Image.open(plain))
    turned = [each.rot90(turns, (1, 2)) for each in (expected, expected.flip(1)) for turns in range(4)]
    tags.update({0x0112: 6, 0x010E: "a text", 0x011A: 1.5, 0x8769: {0x9003: "2020:01:01 00:00:00"}})
    whole, unturned = np.frombuffer(tags.tobytes(), dtype=np.uint8), 0
    for _ in range(300):
        content = whole[: rng.integers(7, len(whole) + 1)].copy()
        spoiled = rng.integers(6, len(content), rng.integers(1, 6))
        content[spoiled] = rng.integers(0, 256, len(spoiled))
        file = io.BytesIO()
        image.save(file, kind, exif=content.tobytes())
        found = decode_rgb(Image.open(file))
        assert any(torch.equal(found, each) for each in turned)
        unturned += torch.equal(found, expected)
    assert 0 < unturned < 300


def test_a_link_out_of_the_folder_is_the_users_own(tmp_path):
    """What a json names stays inside the folder; where the folder's own links lead is up to whoever made it."""
    dataset = dataset_of(tmp_path, {"link.jpg": b""})
    (tmp_path / "elsewhere.jpg").write_bytes(jpeg())
    (tmp_path / "images" / "link.jpg").unlink()
    (tmp_path / "images" / "link.jpg").symlink_to(tmp_path / "elsewhere.jpg")
    assert dataset[0][0].shape == (3, SIZE, SIZE)
