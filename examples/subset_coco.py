"""Cut a COCO annotation file down to some images, to see whether a model can learn them by heart.

    python examples/subset_coco.py instances_val.json few.json --image-ids 285 2592
    python examples/subset_coco.py instances_val.json many.json --image-ids 285 2592 --repeat 20

The second file lists each image 20 times under new ids: an epoch over it is longer, for training. Categories and crowd
regions stay as they are.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass
class Arguments:
    """What to take, and where to."""

    source: tyro.conf.Positional[Path]
    """Annotation file."""
    target: tyro.conf.Positional[Path]
    """File to write."""
    image_ids: tuple[int, ...]
    """Ids of the images to keep."""
    repeat: int = 1
    """How often each image is listed."""


def subset(content: dict, image_ids: tuple[int, ...], repeat: int) -> dict:
    """The part of an annotation file that is about some images, ``repeat`` times."""
    images = {image["id"]: image for image in content["images"]}
    missing = sorted(set(image_ids) - set(images))
    if missing:
        raise SystemExit(f"error: the file has no image {missing[0]}")
    kept = {**content, "images": [], "annotations": []}
    for image_id in image_ids:
        annotations = [entry for entry in content["annotations"] if entry["image_id"] == image_id]
        for _ in range(repeat):
            new_id = image_id if repeat == 1 else len(kept["images"]) + 1
            kept["images"].append({**images[image_id], "id": new_id})
            for entry in annotations:
                kept["annotations"].append({**entry, "id": len(kept["annotations"]) + 1, "image_id": new_id})
    return kept


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    content = json.loads(arguments.source.read_text())
    arguments.target.write_text(json.dumps(subset(content, arguments.image_ids, arguments.repeat)))


if __name__ == "__main__":
    main()
