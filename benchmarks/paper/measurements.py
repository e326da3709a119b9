"""What is measured by trainings on a GPU: commands of ``groupdetr analyze``, and the same at a tiny size on a CPU."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

__all__ = ["DATA", "FOLDERS", "MEASUREMENTS", "Measurement", "arguments_of", "folder_of", "in_steps"]

# As the commands have it, from the root of the repository: a run is named by its settings, of which the places of
# images are a part, and so has one name on all machines.
RUNS = Path("runs/evidence")
DATA = RUNS / "data"

# Folders of data that are not the package's, by their names in the commands below: each has annotations/, images/ and
# the weights of a backbone, lite0.safetensors.
FOLDERS = {"blood_cells": "build/bccd", "nuclei": "build/nuclei"}


class Measurement(NamedTuple):
    """One command of ``groupdetr analyze``.

    Attributes:
        shows: what it is for.
        folder: of its runs, which measurements with the same trainings share.
        arguments: of the command.
        rehearsal: what takes the place of some of them for a rehearsal, besides :data:`TINY`.
    """

    shows: str
    folder: str
    arguments: str
    rehearsal: str


GPU = "--precision bf16 --cache-on device --cuda-graphs 2 --graph-image-multiple 64 --graph-targets 8"
FAIR = f"--num-queries 45 --epochs 20 --evaluate-every 4 {GPU}"
LONG = "--epochs 60 --evaluate-every 10"
BACKBONE = (
    "--backbone timm:tf_efficientnet_lite0 --backbone-weights {folder}/lite0.safetensors --image-mean 0.5 0.5 0.5 "
    "--image-std 0.5 0.5 0.5 --d-model 128 --num-heads 4 --encoder-layers 2 --decoder-layers 3 --dim-feedforward 512"
)
IMAGES = (
    "--train-images {folder}/images --train-annotations {folder}/annotations/instances_train.json "
    "--val-images {folder}/images --val-annotations {folder}/annotations/instances_val.json --workers 0 --cache-images"
)
# Photographs of 640 x 480: three short sides are three sizes, each of batches of 4 and of the one image that is left.
BLOOD_CELLS = (
    f"{IMAGES} {BACKBONE} --backbone-stages 3 --input-norm True --num-queries 40 --dropout 0.0 "
    "--short-sides 288 320 352 --max-size 512 --crop 0 --eval-short-side 320 --eval-max-size 512 --epochs 60 "
    "--decay cosine --warmup-steps 100 --lr 1e-3 --backbone-lr 1e-4 --batch-size 4 --evaluate-every 10 "
    "--precision bf16 --cuda-graphs 6 --graph-image-multiple 64 --graph-targets 32"
).replace("{folder}", "{blood_cells}")
# Without graphs, which are for detectors of boxes; 40 batches of 2 images of at most 256 pixels.
NUCLEI = (
    f"--model mask2former_r50 {IMAGES} {BACKBONE} --frozen-stages 2 --num-queries 60 --encoder-dim-feedforward 256 "
    "--loss-points 1024 --jitter-size 256 --jitter-scale 0.8 1.5 --eval-short-side 256 --eval-max-size 400 "
    "--decay cosine --warmup-steps 50 --lr 5e-4 --backbone-lr 1e-4 --weight-decay 0.05 --no-decay-norms "
    "--clip-norm 0.1 --batch-size 2 --evaluate-every 10 --precision bf16"
).replace("{folder}", "{nuclei}")

TINY = (
    "--seeds 2 --epochs 1 --evaluate-every 1 --num-queries 15 --d-model 32 --num-heads 2 --encoder-layers 1 "
    "--decoder-layers 1 --dim-feedforward 32 --batch-size 64 --decay step --lr-drop 1 --warmup-steps 0 --jobs 1 "
    "--cuda-graphs 0 --precision no --cache-images"
)
TINY_DIGITS = "--backbone conv:8-16"
TINY_PHOTOGRAPHS = (
    "--groups 1 2 --backbone conv:8-16 --backbone-weights None --backbone-stages None --short-sides 48 "
    "--eval-short-side 48 --max-size 64 --eval-max-size 64"
)
TINY_MASKS = (
    "--groups 1 2 --backbone conv:8-8-16-16 --backbone-weights None --jitter-size 64 --eval-short-side 64 "
    "--eval-max-size 96 --loss-points 64 --encoder-dim-feedforward 32 --batch-size 8"
)


def _of_detector(model: str, groups: str, flags: str = "", tiny: str = TINY_DIGITS) -> Measurement:
    """Another detector on the digits, with groups and without."""
    return Measurement(
        f"{model} on the digits, three seeds",
        f"digits_{model}",
        f"sweep-groups --model {model} --groups {groups} --seeds 3 {FAIR} {flags}",
        f"--groups 1 2 {tiny}",
    )


def _of_nuclei(shows: str, folder: str, flags: str) -> Measurement:
    return Measurement(
        f"1 and 3 groups of Mask2Former on nuclei, {shows}",
        folder,
        f"sweep-groups --groups 1 3 {NUCLEI} {flags}",
        TINY_MASKS,
    )


MEASUREMENTS = {
    "table_1": Measurement(
        "table 1 on the digits",
        "digits",
        f"sweep-groups --groups 1 2 3 5 7 9 11 --seeds 3 {GPU}",
        f"--groups 1 2 {TINY_DIGITS}",
    ),
    "table_1_fair": Measurement(
        "table 1, and equal times, five seeds, with queries and epochs enough for one group",
        "digits_fair",
        f"sweep-groups --groups 1 2 3 5 7 9 11 --baseline-epochs 36 --seeds 5 {FAIR}",
        f"--groups 1 2 --baseline-epochs 2 {TINY_DIGITS}",
    ),
    "ablation": Measurement(
        "table 7 with 11 groups",
        "digits_fair",
        f"ablation --num-groups 11 --seeds 5 {FAIR}",
        f"--num-groups 2 {TINY_DIGITS}",
    ),
    "figure_1": Measurement(
        "figure 1",
        "digits_fair",
        f"assignment --groups 1 3 5 7 11 --seeds 5 {FAIR}",
        f"--groups 1 2 {TINY_DIGITS}",
    ),
    "figure_4": Measurement(
        "figure 4 with 11 groups",
        "digits_fair",
        f"distances --num-groups 11 --seeds 5 {FAIR}",
        f"--num-groups 2 {TINY_DIGITS}",
    ),
    "blood_cells": Measurement(
        "groups on photographs at 320 pixels, five seeds",
        "bccd",
        f"sweep-groups --groups 1 3 11 --seeds 5 {BLOOD_CELLS}",
        TINY_PHOTOGRAPHS,
    ),
    # Table 2 of the first edition. The first two learn slowly at this size; with the warm-up, a single group of
    # DAB-DETR leaves the average box at this rate.
    "dab_detr": _of_detector("dab_detr_r50", "1 3 11", f"{LONG} --warmup-steps 1000"),
    "dn_detr": _of_detector("dn_detr_r50", "1 3 11", LONG),
    "dino": _of_detector(
        "dino_4scale_r50", "1 3 5", "--backbone conv:32-64-128-128 --epochs 12", "--backbone conv:8-8-16-16"
    ),
    "nuclei": _of_nuclei("five seeds", "nuclei", "--epochs 60 --seeds 5"),
    "nuclei_longer": _of_nuclei("three times the steps, three seeds", "nuclei_longer", "--epochs 180 --seeds 3"),
    "nuclei_near": _of_nuclei(
        "groups begin near group 0, five seeds", "nuclei_near", "--epochs 60 --seeds 5 --group-init-noise 0.1"
    ),
    "nuclei_query_rate": _of_nuclei(
        "ten times the rate of the queries, five seeds", "nuclei_query_rate", "--epochs 60 --seeds 5 --query-lr 5e-3"
    ),
}


def folder_of(name: str, rehearsal: bool = False) -> Path:
    """Where the runs of a measurement lie, from the root of the repository."""
    return RUNS / (MEASUREMENTS[name].folder + ("_rehearsal" if rehearsal else ""))


def arguments_of(name: str, folders: Mapping[str, str] = FOLDERS, rehearsal: bool = False) -> list[str]:
    """What ``groupdetr analyze`` is called with.

    Args:
        name: of :data:`MEASUREMENTS`.
        folders: of data, by the names of :data:`FOLDERS`.
        rehearsal: at a tiny size on the CPU; flags that are given twice have the second value.
    """
    measurement = MEASUREMENTS[name]
    line = f"{measurement.arguments} {TINY} {measurement.rehearsal}" if rehearsal else measurement.arguments
    return [*(word.format(**folders) for word in line.split()), "--output", str(folder_of(name, rehearsal))]


def in_steps(arguments: Sequence[str]) -> list[list[str]]:
    """A measurement with about half of its seeds, so that there is a table early, and then with all."""
    last = max((place for place, word in enumerate(arguments) if word == "--seeds"), default=None)
    half = 0 if last is None else int(arguments[last + 1]) // 2
    return [[*arguments, "--seeds", str(half)], list(arguments)] if half else [list(arguments)]
