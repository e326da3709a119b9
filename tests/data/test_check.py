"""Every fault that is planted is found, and a sound data set has none."""

import re

import pytest
from PIL import Image

from groupdetr_fast.data.annotations import read_coco
from groupdetr_fast.data.check import check_part, compare_parts


@pytest.fixture
def check(write):
    """A function that writes a changed annotation file, ``content`` of conftest, and checks it."""

    def run(content, **settings):
        folder, path = write(content)
        return check_part("train", folder, read_coco(path), **settings)

    return run


def found(messages):
    return {kind: texts for kind, texts in messages.items() if texts}


def test_a_sound_set_has_statistics_and_no_faults(check, content):
    findings = check(content, num_queries=2)
    assert found(findings.errors) == {}
    assert found(findings.warnings) == {"class": ["train: category 17 (cat) has no objects"]}  # crowds alone
    statistics = findings.statistics
    assert (statistics.images, statistics.without_objects, statistics.objects, statistics.crowds) == (4, 2, 3, 2)
    assert (statistics.most_objects, statistics.fullest_image) == (2, 7)
    assert sum(statistics.per_category.values()) == 3
    assert statistics.sizes == (3, 0, 0)


def change(content, table, index, **values):
    content[table][index].update(values)


@pytest.mark.parametrize(
    ("table", "values", "level", "message"),
    [
        ("images", {"file_name": "none.png"}, "errors", "none.png does not exist"),
        ("images", {"width": 5}, "errors", "but its entry says 5 x"),
        ("images", {"id": "7"}, "errors", "has the id '7', not an integer"),
        ("annotations", {"category_id": 1}, "errors", "category_id 1, which is not in the table"),
        ("annotations", {"image_id": 1}, "errors", "image_id 1, which is not in the table"),
        ("annotations", {"image_id": [7]}, "errors", r"image_id \[7\], which is not in the table"),
        ("annotations", {"bbox": [1, 2, 3]}, "errors", r"annotation 12 has the bbox \[1, 2, 3\]"),
        ("annotations", {"bbox": [1, 2, 10**400, 5]}, "errors", r"annotation 12 has the bbox \[1, 2, 1000.*\.\.\..*\]"),
        ("annotations", {"bbox": [1, 2, 0, 5]}, "warnings", "annotation 12 has the empty bbox"),
        ("annotations", {"bbox": [1, 2, float("nan"), 5]}, "warnings", "annotation 12 has the empty bbox"),
        ("annotations", {"bbox": [1000, 2, 4, 5]}, "warnings", "annotation 12 lies outside its image 7"),
        ("annotations", {"bbox": [1, 2, 400, 5]}, "warnings", "annotation 12 reaches beyond its image 7"),
        ("annotations", {"id": 13}, "errors", "the id 13 occurs more than once among the annotation entries"),
    ],
)
def test_planted_faults(check, content, table, values, level, message):
    change(content, table, 1 if table == "annotations" else 0, **values)
    texts = [text for kind in found(getattr(check(content), level)).values() for text in kind]
    assert any(re.search(message, text) for text in texts), texts


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "C:\\a.png", "", 7, "a\0.png"])
def test_nothing_outside_the_folder_is_opened(content, write, name, monkeypatch):
    folder, path = write(content)
    Image.new("RGB", (60, 40)).save(folder.parent / "secret.png")
    entries = read_coco(path)
    entries["images"] = entries["images"][:1]
    entries["images"][0]["file_name"] = name
    monkeypatch.setattr("groupdetr_fast.data.check.open_image", lambda path: pytest.fail(f"{path} was opened"))
    findings = check_part("train", folder, entries)
    assert re.search("image 7: the file name .* is no path inside the image folder", *findings.errors["image"])


def test_damaged_images_are_found_by_decoding(check, content, write):
    folder, path = write(content)
    file = folder / content["images"][0]["file_name"]
    file.write_bytes(file.read_bytes()[:-40])
    decoded = check_part("train", folder, read_coco(path))
    assert "cannot be read" in decoded.errors["image"][0]
    assert not check_part("train", folder, read_coco(path), decode=False).errors["image"]


@pytest.mark.parametrize("decode", [True, False])
def test_images_turned_by_exif_are_counted_and_measured_upright(content, write, decode):
    folder, path = write(content)
    for image_id, orientation in ((7, 6), (5, 3)):
        with Image.open(folder / "sub" / f"{image_id}.png") as image:
            exif = image.getexif()
            exif[0x0112] = orientation
            image.save(folder / "sub" / f"{image_id}.png", exif=exif)
    findings = check_part("train", folder, read_coco(path), decode=decode)
    assert findings.statistics.turned == 2
    assert len(findings.errors["size"]) == 1
    assert re.search(
        "image 7: .* is 40 x 60 pixels, but .* fits the pixels as they are stored", *findings.errors["size"]
    )


def test_classes_without_objects_and_images_with_many(check, content):
    content["categories"].append({"id": 99, "name": "nothing"})
    findings = check(content, num_queries=1)
    assert findings.warnings["class"][-1] == "train: category 99 (nothing) has no objects"
    assert findings.warnings["queries"] == [
        "train: image 7 has 2 objects, and a group has 1 queries: 1 of them stay unmatched"
    ]


def test_categories_of_one_name(check, content):
    content["categories"].append({"id": 4, "name": "car"})
    findings = check(content)
    assert findings.warnings["name"] == ["train: categories 3, 4 have the same name car"]
    assert not findings.errors["name"]
    content["annotations"][1]["category_id"] = 4
    assert check(content).errors["name"] == ["train: categories 3, 4 have the same name car"]


def test_a_set_without_objects_is_an_error(check, content):
    content["annotations"] = [entry for entry in content["annotations"] if entry["iscrowd"]]
    assert check(content).errors["empty"] == ["train: no image has an object that can be used"]


def test_images_in_both_parts_and_other_categories(check, content, tmp_path):
    train = check(content)
    shared = tmp_path / "images" / content["images"][0]["file_name"]
    other = tmp_path / "other"
    other.mkdir()
    (other / "copy.png").write_bytes(shared.read_bytes())
    Image.new("RGB", (3, 3)).save(other / "new.png")
    entries = [("copy.png", content["images"][0]["width"], content["images"][0]["height"]), ("new.png", 3, 3)]
    images = [{"id": i, "file_name": name, "width": w, "height": h} for i, (name, w, h) in enumerate(entries)]
    val = check_part("val", other, {"images": images, "annotations": [], "categories": [{"id": 3, "name": "car"}]})
    compare_parts(train, val)
    assert val.warnings["leak"] == [f"image 0 of val is the same file as image {content['images'][0]['id']} of train"]
    lacking = {entry["id"]: entry["name"] for entry in content["categories"] if entry["id"] != 3}
    assert val.errors["categories"] == [
        f"category {number}, {lacking[number]!r}, is in train and not in val" for number in sorted(lacking)
    ]


def test_categories_of_one_id_and_two_names(check, content):
    """Which training refuses, since the model would learn one thing and be judged by another."""
    train = check(content)
    content["categories"][1]["name"] = "lorry"
    val = check(content)
    val.name = "val"
    compare_parts(train, val)
    assert val.errors["categories"] == ["category 3 is 'car' in train and 'lorry' in val"]
