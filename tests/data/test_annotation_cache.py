"""The annotations of large files, kept as arrays."""

import json
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from groupdetr_fast.data import CocoDataset, DataError, annotation_cache
from groupdetr_fast.data.annotations import read_annotations


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder of the cache, which keeps files of any size."""
    monkeypatch.setenv("GROUPDETR_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(annotation_cache, "WORTH_CACHING", 0)
    return tmp_path / "cache" / "annotations"


@pytest.fixture
def reads(monkeypatch):
    """The files that are read as json."""
    seen = []

    def read(path, **settings):
        seen.append(path)
        return read_annotations(path, **settings)

    monkeypatch.setattr(annotation_cache, "read_annotations", read)
    return seen


@pytest.fixture
def with_masks(content):
    """Polygons, run lengths of both kinds, one object without a segmentation, and a box that is dropped."""
    forms = {
        12: [[10, 5, 30, 5, 30, 35, 10, 35], [1, 1, 4, 1, 4, 4]],
        13: {"size": [48, 48], "counts": [500, 10, 1794]},
        14: {"size": [40, 60], "counts": "0P2"},
    }
    for entry in content["annotations"]:
        entry["segmentation"] = forms.get(entry["id"], [])
    content["annotations"] += [
        {**content["annotations"][1], "id": 20, "segmentation": []},
        {**content["annotations"][1], "id": 21, "bbox": [5, 5, 0, 3]},
    ]
    content["annotations"][3]["segmentation"] = {"size": [40, 60], "counts": [100, 7, 2293]}
    return content


def truths(dataset):
    return [dataset.ground_truth(index) for index in range(len(dataset))]


def same(first, second):
    return all(
        one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
        for one, two in zip(first, second, strict=True)
    )


@pytest.mark.parametrize("masks", [False, True])
def test_a_file_is_read_once(with_masks, write, cache, reads, masks, caplog):
    files = write(with_masks)
    expected = CocoDataset(*files, masks=masks)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1 + masks
    for labels in ("contiguous", "category_id"):
        caplog.clear()
        again = CocoDataset(*files, masks=masks, labels=labels)
        assert [record.getMessage() for record in caplog.records] == said
        assert same(truths(CocoDataset(*files, masks=masks)), truths(expected))
        assert again.image_ids == expected.image_ids
        assert again.categories == expected.categories
        assert again.num_objects == expected.num_objects
        assert torch.equal(again[2][0], expected[2][0])  # found by the name of its file
    assert len(reads) == 1


def test_what_is_kept_is_what_is_read(with_masks, write, cache):
    path = write(with_masks)[1]
    annotation_cache.load_annotations(path, segmentations=True)
    kept, read = annotation_cache.load_annotations(path, segmentations=True), read_annotations(path, segmentations=True)
    for name in ("image_ids", "image_sizes", "offsets"):
        np.testing.assert_array_equal(getattr(kept, name), getattr(read, name))
    assert torch.equal(kept.boxes, read.boxes)
    assert torch.equal(kept.category_ids, read.category_ids)
    assert [kept.file_names[i] for i in range(4)] == [entry["file_name"] for entry in with_masks["images"]]
    assert (kept.categories, kept.warnings, len(kept.file_names)) == (read.categories, read.warnings, 4)


def test_a_file_that_changes_is_read_again(content, write, cache, reads):
    folder, path = write(content)
    CocoDataset(folder, path)
    before = path.stat()
    changed = path.read_text().replace("[10, 5, 20, 30]", "[11, 5, 20, 30]")
    path.write_text(changed)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    assert CocoDataset(folder, path).ground_truth(0)["boxes"][0].tolist() == [11, 5, 31, 35]
    copy = path.with_name("copy.json")
    copy.write_text(changed)
    assert CocoDataset(folder, copy).annotation_file == copy
    assert len(reads) == 2


@pytest.mark.parametrize("damage", ["truncated", "missing", "not json"])
def test_damaged_arrays_are_made_again(content, write, cache, reads, damage, caplog):
    files = write(content)
    expected = truths(CocoDataset(*files))
    (kept,) = (folder for folder in cache.iterdir() if folder.is_dir())
    boxes = kept / "boxes.npy"
    if damage == "truncated":
        boxes.write_bytes(boxes.read_bytes()[:-4])
    elif damage == "missing":
        boxes.unlink()
    else:
        (kept / "rest.json").write_text("{")
    assert same(truths(CocoDataset(*files)), expected)
    assert "are damaged" in caplog.text
    assert same(truths(CocoDataset(*files)), expected)
    assert same(truths(CocoDataset(*files)), expected)
    assert len(reads) == 3  # at first, in place of what was damaged, and once more to keep it


def test_without_a_cache_the_file_is_read(content, write, cache, reads, caplog):
    cache.parent.write_text("a file in place of the folder")
    files = write(content)
    for times in (1, 2):
        assert len(CocoDataset(*files)) == 4
        assert len(reads) == times
    assert "cannot be kept in the cache" in caplog.text


def test_of_several_processes_one_reads(content, write, cache, reads):
    files = write(content)
    with ThreadPoolExecutor(4) as pool:
        datasets = list(pool.map(lambda _: CocoDataset(*files), range(4)))
    assert len(reads) == 1
    assert all(same(truths(each), truths(datasets[0])) for each in datasets)


def test_a_faulty_file_leaves_nothing(content, write, cache):
    content["annotations"][0]["image_id"] = 99
    for _ in range(2):
        with pytest.raises(DataError, match="annotation 11 has image_id 99"):
            CocoDataset(*write(content))
    assert not [folder for folder in cache.iterdir() if folder.is_dir()]
    with pytest.raises(DataError, match=r"none\.json does not exist"):
        annotation_cache.load_annotations(cache / "none.json")


def test_small_files_are_not_kept(content, write, tmp_path, monkeypatch):
    monkeypatch.setenv("GROUPDETR_FAST_CACHE", str(tmp_path / "cache"))
    CocoDataset(*write(json.dumps(content)))
    assert not (tmp_path / "cache").exists()
