"""The command ``groupdetr recipes``."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from ..runs.recipes import RECIPES, find_recipe

__all__ = ["RecipesCommand"]


@dataclass(frozen=True)
class RecipesCommand:
    """List the runs of the paper, with the AP that it reports for them and for the same run with one group.

    Attributes:
        name: write this run as yaml instead, to edit it and train with --config.
    """

    name: tyro.conf.Positional[Annotated[str | None, tyro.conf.arg(metavar="[NAME]")]] = None

    def __call__(self) -> None:
        if self.name is not None:
            print(find_recipe(self.name).config().as_yaml(), end="")
            return
        rows: list[tuple[str, ...]] = [("recipe", "K", "N", "epochs", "drop", "batch", "precision", "AP", "baseline")]
        for name, recipe in RECIPES.items():
            drops = "/".join(f"{epoch:g}" for epoch in recipe.lr_drop)
            numbers = (recipe.num_groups, recipe.num_queries, recipe.epochs, drops, recipe.images_per_step)
            baseline = "-" if recipe.baseline_ap is None else f"{recipe.baseline_ap:.1f}"
            rows.append((name, *map(str, numbers), recipe.precision, f"{recipe.ap:.1f}", baseline))
        width = max(len(name) for name, *_ in rows)
        for name, *cells in rows:
            print(name.ljust(width), *(cell.rjust(12) for cell in cells))
