"""The command ``groupdetr export``."""

from dataclasses import dataclass, field
from pathlib import Path

from ..engines import EngineSettings
from ..exporting import check_output, export_file
from ..prediction import load_model
from .flags import CheckpointArgument, DetectorFlags, require_checkpoint

__all__ = ["ExportCommand"]


@dataclass(frozen=True, kw_only=True)
class ExportCommand:
    """Write a detector's inference graph of one group of queries: as ONNX, a torch.export program or a TensorRT engine.

    The file also holds the names and ids of the classes, and how images are to be prepared, as far as the checkpoint
    says; those of an engine are in a json file beside it. Shapes and workspace are for engines alone.

    Attributes:
        checkpoint: file or folder of this package, such as that of a run, of an original repository or transformers.
        output: file to write: ``.onnx`` (needs the extra export), ``.pt2``, or ``.engine`` (needs TensorRT besides, and
            the GPU that is to run it).
        image_size: height and width of all images in pixels; None for a graph that takes any size.
        masks: whether the graph also takes masks of the images' padding, for batches of images of several sizes.
        half: matrix products and convolutions in float16, in half the file; for ``.onnx`` and ``.engine``.
        engine: for ``.engine`` alone.
    """

    checkpoint: CheckpointArgument = None
    output: Path
    image_size: tuple[int, int] | None = None
    masks: bool = False
    half: bool = False
    engine: EngineSettings = field(default_factory=EngineSettings)
    detector: DetectorFlags = field(default_factory=DetectorFlags)

    def __call__(self) -> None:
        check_output(self.output, half=self.half, engine=self.engine)  # before the checkpoint is read
        checkpoint = require_checkpoint(self.checkpoint, "groupdetr export CHECKPOINT --output FILE")
        model = load_model(checkpoint, device="cpu", **self.detector.given())
        path = export_file(model, self.output, self.image_size, masks=self.masks, half=self.half, engine=self.engine)
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
