"""Draw what groups of queries are: every group's detections on one image, and those that inference keeps.

    python examples/draw_groups.py runs/demo photo.png --output groups.png

The checkpoint has several groups, as that of any training with them.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor, nn

from groupdetr_fast.data.images import as_rgb
from groupdetr_fast.prediction import describe_model, load_model, predict, settings_of


@dataclass
class Arguments:
    """Which detector and which image."""

    checkpoint: tyro.conf.Positional[Path]
    """File or folder of a detector with groups, such as the folder of a run."""
    image: tyro.conf.Positional[Path]
    """The image to detect in."""
    output: Path = Path("groups.png")
    """Picture to write."""
    score_threshold: float = 0.3
    """Detections with lower scores are left out."""


class OneGroup(nn.Module):
    """A detector that uses one of its groups."""

    def __init__(self, model: nn.Module, group: int):
        super().__init__()
        self.model = model
        self.group = group

    def forward(self, images: Tensor, masks: Tensor) -> Any:
        return self.model(images, masks, num_groups=1, inference_group=self.group)


def draw(axis: Axes, image: Tensor, groups: list[dict[str, Any]], title: str) -> None:
    axis.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
    axis.set_axis_off()
    axis.set_title(title, fontsize=9)
    palette = colormaps["tab10"]
    for group, detections in reversed(list(enumerate(groups))):
        width = 1.5 * (group + 1)  # nested, so that all are seen
        for left, top, right, bottom in detections["boxes"].tolist():
            size = (right - left, bottom - top)
            axis.add_patch(Rectangle((left, top), *size, fill=False, linewidth=width, edgecolor=palette(group % 10)))


def main(arguments: Arguments) -> None:
    num_groups = describe_model(arguments.checkpoint).model_config["num_groups"]
    model = load_model(arguments.checkpoint, num_groups=num_groups, device="cpu")
    image = as_rgb(arguments.image)
    groups = [
        predict(OneGroup(model, group), image, score_threshold=arguments.score_threshold, settings=settings_of(model))
        for group in range(num_groups)
    ]
    figure = Figure(figsize=(7, 3.8), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    draw(left, image, groups, f"training: {num_groups} groups, one colour each")
    draw(right, image, groups[:1], "inference: one group")
    figure.savefig(arguments.output)
    found = [len(detections["scores"]) for detections in groups]
    print(f"{arguments.output}: {', '.join(map(str, found))} detections of groups 0 to {num_groups - 1}")


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
