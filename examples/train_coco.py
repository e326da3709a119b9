"""Train a detector with groups of queries on COCO-format data.

    python examples/train_coco.py
        a small Conditional DETR on the embedded digits, minutes on a CPU

    python examples/train_coco.py --coco-path DIR --model conditional_detr_r50 --num-groups 11 --schedule 12e
        on COCO: DIR holds train2017/, val2017/ and annotations/

    python examples/train_coco.py --train-images DIR --train-annotations FILE --val-images DIR --val-annotations FILE
        on any pair of folders with COCO json

Every setting is a flag: see --help. Without data flags, the defaults are those of the digits demo.
"""

import logging
import sys

import tyro

from groupdetr_fast.coco_training import CocoTrainingConfig, digits_demo, train
from groupdetr_fast.data import DataError
from groupdetr_fast.models import CheckpointMismatch
from groupdetr_fast.training.checkpoint import CheckpointError

DATA_FLAGS = ("--coco-path", "--train-", "--val-", "--help", "-h")


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    own_data = any(argument.startswith(DATA_FLAGS) for argument in sys.argv[1:])
    try:
        config = tyro.cli(
            CocoTrainingConfig,
            default=CocoTrainingConfig() if own_data else digits_demo(),
            description=__doc__,
            config=(tyro.conf.OmitArgPrefixes,),
        )
        train(config)
    except (DataError, CheckpointError, CheckpointMismatch, FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
