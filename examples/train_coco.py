"""Train a detector with groups of queries on COCO-format data.

    python examples/train_coco.py
        a small Conditional DETR on the embedded digits, minutes on a CPU

    python examples/train_coco.py --coco-path DIR --recipe group_conditional_detr_r50_12e
        a run of the paper on COCO: DIR holds train2017/, val2017/ and annotations/

    python examples/train_coco.py --train-images DIR --train-annotations FILE --val-images DIR --val-annotations FILE
        on any pair of folders with COCO json

    python examples/train_coco.py --data-path DIR
        on a folder in COCO's or YOLO's layout

Every setting is a flag: see --help. Without data flags, the defaults are those of the digits demo. The command
``groupdetr train`` is the same without the demo.
"""

import sys
from dataclasses import replace

from groupdetr_fast.cli import run
from groupdetr_fast.commands.parsing import parse, read_flags
from groupdetr_fast.commands.train import TrainCommand, training_defaults
from groupdetr_fast.data.config import DataPaths
from groupdetr_fast.runs.demo import digits_demo, with_digits


def command() -> TrainCommand:
    arguments = sys.argv[1:]
    own_data = read_flags(DataPaths, arguments).given
    default = training_defaults(arguments, otherwise=None if own_data else digits_demo(compose=False))
    found = parse(TrainCommand, arguments, prog=sys.argv[0], default=default, description=__doc__)
    if own_data or found.recipe or found.config:
        return found
    return replace(found, data=with_digits(found.data))


if __name__ == "__main__":
    run(command)
