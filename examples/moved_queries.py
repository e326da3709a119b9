"""How far training has moved the queries of runs from where they began, beside the decoder's matrices.

    python examples/moved_queries.py runs/k1 runs/k3

The beginning is made anew from each run's ``config.yaml`` and seed. For the newest checkpoint it prints, for every
parameter that holds learned queries: the root mean square of its values, of how far they moved, and of the difference
between groups; and the smallest scale that AdamW divides by (the median of the roots of its second moments), which
has a meaning as long as it is far above its epsilon, 1e-8.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor

from groupdetr_fast.models.checkpoints import read_header
from groupdetr_fast.models.checkpoints.read import read_checkpoint
from groupdetr_fast.runs.config import CocoTrainingConfig
from groupdetr_fast.runs.config_file import from_yaml
from groupdetr_fast.training.checkpoint import latest_checkpoint
from groupdetr_fast.training.engine import build_accelerator
from groupdetr_fast.training.optimization import build_optimizer


@dataclass
class Arguments:
    """Which runs."""

    runs: tyro.conf.Positional[list[Path]]
    """Folders of runs of this package's detectors."""


def rms(values: Tensor) -> float:
    return values.double().square().mean().sqrt().item()


def report(run: Path) -> None:
    config = from_yaml(CocoTrainingConfig, run / "config.yaml")
    folder = latest_checkpoint(run)
    if folder is None:
        raise SystemExit(f"error: {run} has no checkpoint that can be resumed")
    with tempfile.TemporaryDirectory() as anywhere:
        build_accelerator(config.optimization.resolved(), Path(anywhere))  # which sets the seed
    model = config.model.build(int(read_header(folder).model_config["num_classes"]))
    ended = read_checkpoint(folder).state
    state = torch.load(folder / "state.pt", weights_only=True)["optimizer"]["state"]
    trained = [
        weight for group in build_optimizer(model, config.optimization).param_groups for weight in group["params"]
    ]
    scales = {id(weight): state[index]["exp_avg_sq"].sqrt().median().item() for index, weight in enumerate(trained)}
    print(f"{run.name}, {folder.name}")
    matrices = {}
    for name, begun in model.named_parameters():
        if name.startswith("decoder.layers.") and begun.dim() == 2:
            matrices[name] = (begun.detach(), ended[name])
        if model.is_query(name):
            groups = ended[name].unflatten(0, (model.config.num_groups, -1))
            between = rms(groups[1:] - groups[:1]) if len(groups) > 1 else 0.0
            print(
                f"  {name}: values {rms(begun.detach()):.3f}, moved {rms(ended[name] - begun.detach()):.4f}, "
                f"between groups {between:.3f}, AdamW divides by {scales[id(begun)]:.1e}"
            )
    moved = torch.stack([(after - before).square().sum() for before, after in matrices.values()]).sum().sqrt()
    norm = torch.stack([before.square().sum() for before, _ in matrices.values()]).sum().sqrt()
    print(f"  matrices of the decoder's layers: moved by {100 * moved / norm:.1f} % of their norm")


def main() -> None:
    for run in tyro.cli(Arguments, description=__doc__).runs:
        report(run)


if __name__ == "__main__":
    main()
