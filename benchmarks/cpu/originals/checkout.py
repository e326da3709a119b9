"""Modules of a checkout, imported without what they need to train: data sets, evaluation, a compiled extension."""

import copy
import importlib
import sys
import types
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torchvision
from torch import Tensor, nn

__all__ = ["Checkout", "backbone_builder", "is_small", "use_pure_deformable_attention"]

# All repositories have modules of these names, and so do other packages.
_NAMES = ("models", "util", "datasets", "engine", "main", "MultiScaleDeformableAttention")
_OLD_NAME = "torch._overrides"
# What a model does not need: data and evaluation (pycocotools, panopticapi), logs (termcolor), files of settings
# (addict, yapf), and the compiled extension.
_LEFT_OUT = ("datasets", "engine", "util.logger", "util.utils", "MultiScaleDeformableAttention")


class _Nothing(types.ModuleType):
    """A module in which everything is None; as a package, its modules can be imported without its ``__init__``."""

    def __init__(self, name: str, folder: Path | None = None):
        super().__init__(name)
        if folder is not None:
            self.__path__ = [str(folder)]

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


@dataclass(frozen=True)
class Checkout:
    """A folder with the files of a repository.

    Attributes:
        folder: where.
        repository: its address, for messages, with the branch if that is not the first.
        marker: a file that this repository has, and none of the others.
        plain_giou: whether torchvision's generalised IoU takes the place of the repository's, where that adds 1e-6 to
            both of its denominators.

    Raises:
        ValueError: if the folder lacks the marker.
    """

    folder: Path
    repository: str
    marker: str
    plain_giou: bool = False

    def __post_init__(self) -> None:
        if not (self.folder / self.marker).is_file():
            raise ValueError(f"{self.folder} is no checkout of {self.repository}")

    def modules(self, package: str, names: Sequence[str], *, resnet: bool) -> dict[str, types.ModuleType]:
        """Import modules.

        They find each other while they are imported; afterwards their names are free again, as other repositories have
        the same.

        Args:
            package: of a model, below ``models``; "" if that is the package itself.
            names: modules in it.
            resnet: whether its backbones are wanted too.

        Returns:
            The modules, by these names; also ``position_encoding``, ``util.misc`` and, if it is wanted, ``backbone``.
        """
        root = ".".join(filter(None, ("models", package)))
        with _imports(self.folder):
            for parent in {"models", root}:
                sys.modules[parent] = _Nothing(parent, self.folder.joinpath(*parent.split(".")))
            # Networks other than ResNets need more packages.
            networks = ("convnext", "swin_transformer") if resnet else ("backbone",)
            for name in (*_LEFT_OUT, *(f"{root}.{network}" for network in networks)):
                sys.modules[name] = _Nothing(name)
            if self.plain_giou:
                importlib.import_module("util.box_ops").generalized_box_iou = torchvision.ops.generalized_box_iou
            names = (*names, "position_encoding", *(["backbone"] if resnet else []))
            found = {name: importlib.import_module(f"{root}.{name}") for name in names}
            # Their attention hands itself to what watches torch's functions, but without one of its arguments.
            for module in [sys.modules[name] for name in sys.modules if name.startswith(root)]:
                if "has_torch_function" in vars(module):
                    vars(module)["has_torch_function"] = lambda _: False
            return found | {"util.misc": importlib.import_module("util.misc")}

    def defaults(self, *arguments: str, **settings: Any) -> Namespace:
        """The settings with which the repository's ``main.py`` trains, but for some."""
        with _imports(self.folder):
            for name in ("models", *_LEFT_OUT):
                sys.modules[name] = _Nothing(name)
            parsed = importlib.import_module("main").get_args_parser().parse_args([*arguments, "--device", "cpu"])
        return Namespace(**(vars(parsed) | settings))


@contextmanager
def _imports(folder: Path) -> Iterator[None]:
    """Inside, modules of those names come from a folder; afterwards they are what they were.

    The originals compare versions of torch in ways that take 2.x for 1.x, and then ask for what had other names in 1.x.
    """

    def taken() -> list[str]:
        return [name for name in sys.modules if name.partition(".")[0] in _NAMES or name == _OLD_NAME]

    before = {name: sys.modules.pop(name) for name in taken()}
    sys.path.insert(0, str(folder))
    sys.modules[_OLD_NAME] = torch.overrides
    linear = nn.modules.linear
    try:
        with mock.patch.object(linear, "_LinearWithBias", linear.NonDynamicallyQuantizableLinear, create=True):
            yield
    finally:
        sys.path.remove(str(folder))
        for name in taken():
            del sys.modules[name]
        sys.modules.update(before)


def is_small(ours: Any) -> bool:
    """Whether the backbone of one of our models is one that the originals do not have."""
    return ours.config.backbone.startswith("conv:")


def backbone_builder(
    code: Mapping[str, types.ModuleType], ours: Any, settings: Namespace, *, levels: bool = False
) -> Callable[[Namespace], nn.Module]:
    """What makes the backbone of an original: its own function, or a copy of ours where that is a small one.

    Args:
        code: modules of the original.
        ours: our model.
        settings: of the original.
        levels: whether the original takes several maps.
    """
    if is_small(ours):
        position = code["position_encoding"].build_position_encoding(settings)
        return lambda _: _Features(ours.backbone, position, code["util.misc"].NestedTensor, levels=levels)
    code["backbone"].is_main_process = lambda: False  # which would download weights
    return code["backbone"].build_backbone


class _Features(nn.Sequential):
    """What an original takes for a backbone: a copy of ours, and then the original's embedding of positions.

    Weights have the names of the originals' backbones. With the features come their masks, as all of them make these.

    Attributes:
        num_channels: of the last map, or of each.
        strides: of each; read by DAB-Deformable-DETR, which counts them.
    """

    def __init__(self, ours: nn.Module, position: nn.Module, nested: type, *, levels: bool = False):
        super().__init__(copy.deepcopy(ours), position)
        channels = ours.num_channels
        self.num_channels = channels if levels else channels[-1]
        self.strides = [2**index for index in range(len(channels))]
        self.nested = nested

    def forward(self, images: Any) -> tuple[list[Any], list[Tensor]]:
        maps = []
        for features in self[0](images.tensors):
            mask = nn.functional.interpolate(images.mask[None].float(), size=features.shape[-2:])[0].bool()
            maps.append(self.nested(features, mask))
        return maps, [self[1](each).to(each.tensors.dtype) for each in maps]


def use_pure_deformable_attention(module: types.ModuleType, function: types.ModuleType) -> None:
    """Put the PyTorch function that a repository ships for its tests in the place of its compiled extension.

    Args:
        module: ``ops.modules.ms_deform_attn``, which calls the extension.
        function: ``ops.functions.ms_deform_attn_func``, which has the function.
    """

    class Pure:
        @staticmethod
        def apply(value: Tensor, shapes: Tensor, _start: Tensor, places: Tensor, weights: Tensor, _step: int) -> Tensor:
            return function.ms_deform_attn_core_pytorch(value, shapes.tolist(), places, weights)

    module.MSDeformAttnFunction = Pure
