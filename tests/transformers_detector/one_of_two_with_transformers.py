"""One process of a training of a detector of transformers on two, started by torchrun.

Arguments: folder of the data, output, folder of the model, and settings of the run as json.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
from one_of_two_processes import config_of, shard_weights

from groupdetr_fast import cli
from groupdetr_fast.runs.config import ModelConfig
from groupdetr_fast.runs.train import train


def config_with(folder, output, pretrained, *, num_groups=1, **settings):
    """The run of tests/training with a detector of transformers."""
    config = replace(config_of(folder, output), model=ModelConfig(), pictures=0, report=False)
    return config.with_settings(model=f"transformers:{pretrained}", num_groups=num_groups, **settings)


def main():
    folder, output, pretrained, settings = sys.argv[1:]
    settings = {
        name: tuple(value) if isinstance(value, list) else value for name, value in json.loads(settings).items()
    }
    torch.set_num_threads(1)
    if layers := settings.pop("sharded", ()):
        shard_weights(layers)
    config = config_with(Path(folder), Path(output), pretrained, **settings)
    cli.run(lambda: lambda: train(config))


if __name__ == "__main__":
    main()
