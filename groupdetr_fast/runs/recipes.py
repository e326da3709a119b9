"""Runs of the paper by name, one for each row of its tables that this package can train.

Numbers are those of the ICCV edition (tables 3, 4 and 6), and of table 1 of the first edition for other numbers of
groups. Batch sizes and the number of detections that are evaluated are those of the base models' repositories.

So is the precision. Mask2Former's repository trains with mixed precision, here bf16; the others train in float32, whose
products torch rounded to TF32 by itself on A100s when they were published.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from ..data import AugmentationConfig
from ..data.config import DataConfig
from ..models.registry import model_config
from ..training.config import OptimizationConfig
from .config import CocoTrainingConfig, ModelConfig

__all__ = ["RECIPES", "Recipe", "find_recipe", "launched_recipe"]

IMAGES_PER_PROCESS = 2  # at a time; the rest of a step's images are accumulated


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One row of a table: a detector, its groups and its schedule, and what the paper reports.

    Attributes:
        name: of the recipe.
        model: name of the detector.
        num_groups: K.
        epochs: passes over the training images.
        lr_drop: epochs after each of which the learning rates drop to a tenth.
        images_per_step: batch size over all processes.
        top_k: detections per image in evaluation.
        ap: AP on COCO val2017 in the paper, in percent; of masks where the detector predicts masks.
        baseline_ap: that of the same run with one group, in the same table; None if this is that run.
    """

    name: str
    model: str
    num_groups: int
    epochs: int
    lr_drop: tuple[float, ...]
    images_per_step: int
    top_k: int
    ap: float
    baseline_ap: float | None

    @property
    def num_queries(self) -> int:
        """N, queries of one group."""
        return model_config(self.model).num_queries

    @property
    def precision(self) -> str:
        """Of the run on a GPU that has TF32."""
        return self.config(processes=self.images_per_step).optimization.precision or "tf32"

    def config(self, processes: int = 1) -> CocoTrainingConfig:
        """The run, but for the data's place.

        Args:
            processes: how many train together. Fewer than the paper's accumulate gradients, so that every step still
                sees ``images_per_step`` images.

        Raises:
            ValueError: if that many processes cannot share a step's images evenly.
        """
        if self.images_per_step % processes:
            raise ValueError(
                f"recipe {self.name} takes steps of {self.images_per_step} images, which {processes} processes cannot "
                "share evenly"
            )
        share = self.images_per_step // processes
        batch_size = min(IMAGES_PER_PROCESS, share)
        optimization = OptimizationConfig(
            epochs=self.epochs,
            lr_drop=self.lr_drop,
            lr=1e-4,
            backbone_lr=1e-5,
            batch_size=batch_size,
            accumulate=share // batch_size,
            images_per_step=self.images_per_step,
        )
        config = CocoTrainingConfig(
            data=DataConfig(labels="category_id"),
            model=ModelConfig(model=self.model, num_groups=self.num_groups, backbone_weights="imagenet"),
            optimization=optimization,
            output=Path("runs") / self.name,
            top_k=self.top_k,
            eval_batch_size=1 if self.model.startswith("dab_") else None,  # as in the repository of DAB-DETR
        )
        return _as_mask2former(config) if config.model.predicts_masks else config


def _as_mask2former(config: CocoTrainingConfig) -> CocoTrainingConfig:
    """With the settings of Mask2Former's repository: 80 classes, large-scale jitter, bf16, another optimiser.

    Images without objects are left out, and evaluated is one image at a time.
    """
    return replace(
        config,
        data=replace(config.data, labels="contiguous", filter_empty=True),
        eval_batch_size=1,
        augmentation=AugmentationConfig(jitter_size=1024),
        optimization=replace(
            config.optimization, warmup_steps=10, weight_decay=0.05, decay_norms=False, clip_norm=0.01, precision="bf16"
        ),
    )


# model: (images per step, top_k, rows); a row is (epochs, epochs of the drops, AP of one group, AP of 11 groups)
_TABLES = {
    "conditional_detr_r50": (16, 100, ((12, (11,), 32.6, 37.6), (50, (40,), 40.9, 43.4))),
    "conditional_detr_r50_dc5": (8, 100, ((12, (11,), 36.4, 41.2), (50, (40,), 43.7, 45.8))),
    "dab_detr_r50": (16, 300, ((12, (11,), 35.2, 39.1), (50, (40,), 42.2, 44.5))),
    "dab_detr_r50_dc5": (16, 300, ((12, (11,), 37.5, 41.9), (50, (40,), 44.5, 46.7))),
    "dn_detr_r50": (16, 300, ((12, (11,), 38.6, 40.6), (50, (40,), 44.0, 45.4))),
    "dn_detr_r50_dc5": (16, 300, ((12, (11,), 41.9, 44.5), (50, (40,), 47.5, 48.0))),
    "dab_deformable_detr_r50": (16, 100, ((12, (11,), 44.2, 45.7), (50, (40,), 48.1, 49.7))),
    "dino_4scale_r50": (16, 300, ((12, (11,), 49.4, 50.1), (36, (30,), 50.9, 51.3))),
    # The drops of its repository, at 0.889 and 0.963 of the run.
    "mask2former_r50": (16, 100, ((12, (10.67, 11.56), 38.5, 39.7), (50, (44.4, 48.1), 43.7, 44.0))),
}

# K: AP of Conditional DETR after 12 epochs
_OTHER_GROUPS = {2: 34.4, 3: 35.3, 4: 35.9, 5: 36.5, 6: 36.4, 7: 36.8, 9: 37.2}


def _recipes() -> Iterator[Recipe]:
    for model, (images_per_step, top_k, rows) in _TABLES.items():
        for epochs, lr_drop, baseline_ap, ap in rows:
            baseline = Recipe(
                name=f"{model}_{epochs}e",
                model=model,
                num_groups=1,
                epochs=epochs,
                lr_drop=lr_drop,
                images_per_step=images_per_step,
                top_k=top_k,
                ap=baseline_ap,
                baseline_ap=None,
            )
            grouped = replace(baseline, name=f"group_{baseline.name}", num_groups=11, ap=ap, baseline_ap=baseline_ap)
            yield from (baseline, grouped)
            if baseline.name == "conditional_detr_r50_12e":
                for number, ap_of_number in _OTHER_GROUPS.items():
                    yield replace(grouped, name=f"{grouped.name}_k{number}", num_groups=number, ap=ap_of_number)


RECIPES = {recipe.name: recipe for recipe in _recipes()}


def find_recipe(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        ValueError: if there is none.
    """
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; groupdetr recipes lists them")
    return RECIPES[name]


def launched_recipe(name: str) -> CocoTrainingConfig:
    """The run of that name, for as many processes as a launcher has started.

    Raises:
        ValueError: if there is none, or these processes cannot share a step's images evenly.
    """
    return find_recipe(name).config(processes=int(os.environ.get("WORLD_SIZE", "1")))
