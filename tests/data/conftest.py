import json

import numpy as np
import pytest
from PIL import Image

# Sparse ids, out of order, as COCO's own.
CATEGORIES = [{"id": 90, "name": "toothbrush"}, {"id": 3, "name": "car"}, {"id": 17, "name": "cat"}]
SIZES = {7: (40, 60), 5: (48, 48), 9: (64, 32), 2: (30, 50)}  # id: (height, width)


def annotation(annotation_id, image_id, category_id, bbox, iscrowd=0):
    return {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": category_id,
        "bbox": bbox,
        "area": bbox[2] * bbox[3],
        "iscrowd": iscrowd,
    }


@pytest.fixture
def content():
    """A valid annotation file: image 7 with two objects, 5 with a crowd and one object, 9 empty, 2 only a crowd."""
    return {
        "images": [
            {"id": image_id, "file_name": f"sub/{image_id}.png", "height": height, "width": width}
            for image_id, (height, width) in SIZES.items()
        ],
        "annotations": [
            annotation(11, 5, 17, [0, 0, 48, 24], iscrowd=1),
            annotation(12, 7, 90, [10, 5, 20, 30]),
            annotation(13, 5, 3, [8.5, 4, 12, 10]),
            annotation(14, 7, 3, [1, 2, 3, 4]),
            annotation(15, 2, 17, [3, 3, 20, 10], iscrowd=1),
        ],
        "categories": [dict(category) for category in CATEGORIES],
    }


@pytest.fixture
def write(tmp_path):
    """A function that writes the images and an annotation file; returns the arguments of CocoDataset."""

    def write_files(content):
        folder = tmp_path / "images"
        (folder / "sub").mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(0)
        for image_id, (height, width) in SIZES.items():
            pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "sub" / f"{image_id}.png")
        path = tmp_path / "instances.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return folder, path

    return write_files
