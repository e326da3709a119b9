"""TensorRT engines from ONNX files, by TensorRT's own Python package, of any version from 10 on.

Networks are strongly typed: an engine computes in the types that the file says, which from TensorRT 11 on is the only
way. TensorRT is imported where an engine is asked for.
"""

import importlib
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

__all__ = ["EngineSettings", "build_engine", "require_tensorrt"]

Shape = tuple[int, int, int]

GIB = 1 << 30


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """What a TensorRT engine needs to know beside its network.

    A shape is a number of images, and their height and width in pixels.

    Attributes:
        min_shape: number of images, height and width: the smallest that the engine takes; by default one square image
            of half the usual short side.
        opt_shape: the same, of what it is tuned for; by default one image of the size that the checkpoint resizes
            images of 4:3 to.
        max_shape: the same, of the largest that it takes; by default of one that has room for every resized image.
        workspace: GiB of memory that a layer of the engine may use besides; by default all that the GPU has.
    """

    min_shape: Shape | None = None
    opt_shape: Shape | None = None
    max_shape: Shape | None = None
    workspace: float | None = None

    def __post_init__(self) -> None:
        for name in ("min_shape", "opt_shape", "max_shape"):
            shape = getattr(self, name)
            if shape is not None and min(shape) < 1:
                raise ValueError(f"{name} must be a number of images, a height and a width, from 1 on; got {shape}")
        if self.workspace is not None and not 0 < self.workspace < math.inf:
            raise ValueError(f"workspace must be more than 0 GiB and finite, got {self.workspace}")

    @property
    def given(self) -> list[str]:
        """Names of the settings that are not left to their defaults."""
        return [each.name for each in fields(self) if getattr(self, each.name) is not None]

    def profile(
        self, short_side: int, max_size: int | None, *, square: bool = False, image_size: tuple[int, int] | None = None
    ) -> tuple[Shape, Shape, Shape]:
        """The smallest, the usual and the largest shape.

        Args:
            short_side, max_size, square: how the checkpoint resizes images: their short side in pixels, the limit on
                the long one, and whether both are the short one.
            image_size: height and width, of a network that takes no others.

        Raises:
            ValueError: if a shape exceeds the next one.
        """
        long_side = max_size or 2 * short_side
        if square:
            image_size = image_size or (short_side, short_side)
        usual = image_size or (short_side, min(short_side * 4 // 3, long_side))
        smallest = image_size or (short_side // 2, short_side // 2)
        largest = image_size or (long_side, long_side)
        opt = self.opt_shape or (1, *usual)
        shapes = (
            self.min_shape or (1, min(smallest[0], opt[1]), min(smallest[1], opt[2])),
            opt,
            self.max_shape or (opt[0], max(largest[0], opt[1]), max(largest[1], opt[2])),
        )
        if not all(a <= b <= c for a, b, c in zip(*shapes, strict=True)):
            raise ValueError(
                "min_shape, opt_shape and max_shape must not exceed one another, got {}, {}, {}".format(*shapes)
            )
        return shapes


def require_tensorrt() -> Any:
    """TensorRT's package.

    Raises:
        ValueError: if it is missing, or older than 10.
    """
    try:
        tensorrt = importlib.import_module("tensorrt")
    except ImportError as error:
        raise ValueError(
            f"engines need TensorRT ({error}): pip install 'groupdetr_fast[tensorrt]', on a machine with the GPU that "
            "is to run them"
        ) from None
    if not hasattr(getattr(tensorrt, "NetworkDefinitionCreationFlag", None), "STRONGLY_TYPED"):
        raise ValueError(
            f"engines need TensorRT 10 or newer, got {getattr(tensorrt, '__version__', 'another package')}"
        )
    return tensorrt


def build_engine(
    onnx_file: Path, path: Path, profile: tuple[Shape, Shape, Shape], *, workspace: float | None = None
) -> None:
    """Write a TensorRT engine, for the GPU of this machine.

    Args:
        onnx_file: inference graph of a detector; free axes of its inputs are images, height and width.
        path: file to write.
        profile: the smallest, the usual and the largest shape, each a number of images, a height and a width.
        workspace: GiB of memory that a layer may use besides; None for all that the GPU has.

    Raises:
        ValueError: if TensorRT is missing, cannot start, or refuses the file or its shapes.
    """
    tensorrt = require_tensorrt()
    log = _logger(tensorrt)
    try:
        builder = tensorrt.Builder(log)
    except Exception as error:  # pybind's TypeError, where there is no GPU or no driver
        raise ValueError(
            f"TensorRT cannot start here ({log.said(error)}): engines are built on a machine with the GPU that is to "
            "run them"
        ) from error
    network = builder.create_network(1 << int(tensorrt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = tensorrt.OnnxParser(network, log)
    if not parser.parse_from_file(str(onnx_file)):
        raise ValueError(f"TensorRT {tensorrt.__version__} does not take the graph: {parser.get_error(0).desc()}")
    config = builder.create_builder_config()
    if workspace is not None:
        config.set_memory_pool_limit(tensorrt.MemoryPoolType.WORKSPACE, round(workspace * GIB))
    shapes = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        given = network.get_input(index)
        shapes.set_shape(given.name, *(_fill(tuple(given.shape), shape, given.name) for shape in profile))
    if config.add_optimization_profile(shapes) < 0:
        raise ValueError(
            f"TensorRT {tensorrt.__version__} does not take the shapes {profile}: {log.said('no reason given')}"
        )
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise ValueError(f"TensorRT {tensorrt.__version__} builds no engine: {log.said('no reason given')}")
    with open(path, "wb") as file:
        file.write(engine)


def _fill(axes: tuple[int, ...], shape: Shape, name: str) -> tuple[int, ...]:
    """The axes of an input, ``[B, 3, H, W]`` or ``[B, H, W]``, with the sizes of a shape where they are free (-1)."""
    images, height, width = shape
    wanted = (images, *axes[1:-2], height, width)
    for axis, size in zip(axes, wanted, strict=True):
        if axis not in (-1, size):
            raise ValueError(
                f"{name} of this graph have shape {list(axes)} (-1: any), which {list(wanted)} does not fit"
            )
    return wanted


def _logger(tensorrt: Any) -> Any:
    """A logger that keeps what TensorRT complains of, for the one sentence that an export ends in."""

    class Log(tensorrt.ILogger):  # type: ignore[misc, unused-ignore]
        def __init__(self) -> None:
            tensorrt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (tensorrt.ILogger.Severity.INTERNAL_ERROR, tensorrt.ILogger.Severity.ERROR):
                self.errors.append(message)

        def said(self, otherwise: object) -> str:
            return self.errors[-1] if self.errors else str(otherwise)

    return Log()
