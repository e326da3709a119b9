"""Image backbones: torchvision's ResNets, any timm network that gives feature maps, and a plain convolutional one.

Names: ``resnet18`` to ``resnet152`` and the other ResNets of torchvision; ``timm:NAME``; ``conv:W1-W2-...``, one stage
of stride 2 and two 3x3 convolutions per width, for small images and small machines.
"""

import itertools
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

from ..tensor_files import read_tensors
from .frozen_batch_norm import FrozenBatchNorm2d
from .residual_blocks import convolve, fold_norms

__all__ = ["Backbone"]


class Backbone(nn.Module):
    """The last ``num_levels`` feature maps of a network, finest first.

    Batch norms of torchvision and timm networks are frozen (fixed statistics and affine parameters), as in DETR; those
    of a ``conv:`` network are trained, since it has no pretrained weights.

    Args:
        name: see this module's documentation.
        weights: None for random weights; ``"imagenet"`` for those that torchvision or timm publish; or the path of a
            ``.safetensors``, ``.pth`` or ``.pt`` file with a state dict of the network.
        stages: how many stages the network has; None for all. With one less, the last map has half the stride.
        num_levels: how many of the last stages to return.
        dilation: replace the last stage's stride by dilation (the "DC5" models). Not for ``conv:``.
        frozen_stages: how many of the first stages are not trained, all if there are no more; the stem of a ResNet
            counts as the first. DETR freezes two. Not for ``conv:``, which is always trained.

    Attributes:
        num_channels: channels of each returned level.

    Raises:
        ValueError: for an unknown name, an option the network does not have, or weights that do not fit.
        FileNotFoundError: if the weights file does not exist.
    """

    def __init__(
        self,
        name: str,
        weights: str | None = None,
        *,
        stages: int | None = None,
        num_levels: int = 1,
        dilation: bool = False,
        frozen_stages: int = 2,
    ):
        super().__init__()
        family, _, variant = name.rpartition(":")
        if family not in ("", "timm", "conv"):
            raise ValueError(f"unknown backbone {name!r}: use resnet18 ... resnet152, timm:NAME or conv:W1-W2-...")
        if frozen_stages < 0:
            raise ValueError(f"frozen_stages must be at least 0, got {frozen_stages}")
        if family == "conv" and (dilation or weights is not None):
            raise ValueError(f"backbone {name!r} has neither dilation nor pretrained weights")
        build = {"": _ResNet, "timm": _TimmNetwork, "conv": _ConvNetwork}[family]
        self.body = build(variant, weights, stages, num_levels, dilation)
        if weights not in (None, "imagenet"):
            _load_weights(self.body, Path(weights), name)
        if family != "conv":
            self.body.freeze(min(frozen_stages, self.body.most_frozen))
        self.num_channels: list[int] = self.body.num_channels

    def forward(self, images: Tensor) -> list[Tensor]:
        """``[B, 3, H, W]`` -> one ``[B, C, h, w]`` per level."""
        # Channels last is the layout of torch's fast convolutions, and makes maps into tokens without a copy. The
        # weights keep the default layout, in which safetensors can write them.
        return self.body(images.contiguous(memory_format=torch.channels_last))


class _ResNet(nn.Module):
    """A torchvision ResNet without its classifier; parameters are named as there."""

    def __init__(self, name: str, weights: str | None, stages: int | None, num_levels: int, dilation: bool):
        super().__init__()
        builder = getattr(torchvision.models, name, None)
        if not ("resne" in name and callable(builder)):
            raise ValueError(f"unknown backbone {name!r}: torchvision has no ResNet of that name")
        stages = _check_levels(f"a ResNet such as {name}", stages, num_levels, available=4)
        if dilation and stages < 4:
            raise ValueError("dilation is of a ResNet's fourth stage, which stages leaves out")
        if dilation and name in ("resnet18", "resnet34"):
            raise ValueError(f"backbone {name!r} has no dilation: torchvision's ResNets have it from resnet50 on")
        published = None
        if weights == "imagenet":
            published = torchvision.models.get_model_weights(name)["IMAGENET1K_V1"]  # that DETR's results rest on
        try:
            network = builder(
                weights=published,
                replace_stride_with_dilation=[False, False, dilation],
                norm_layer=FrozenBatchNorm2d,
            )
        except OSError as error:  # of the download
            place = Path(torch.hub.get_dir()) / "checkpoints" / published.url.rpartition("/")[2]
            raise OSError(
                f"the ImageNet weights of {name} cannot be downloaded ({error}): put {published.url} at {place}, "
                "or give the file as backbone_weights"
            ) from None
        fold_norms(network)
        self.num_levels = num_levels
        self.conv1, self.bn1 = network.conv1, network.bn1
        self.maxpool = network.maxpool
        self.stage_names = [f"layer{index + 1}" for index in range(stages)]
        self.most_frozen = 1 + stages  # the stem, too
        for stage in self.stage_names:
            self.add_module(stage, getattr(network, stage))
        self.num_channels = [network.fc.in_features // 2 ** (4 - stages + i) for i in reversed(range(num_levels))]

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.maxpool(convolve(self.conv1, self.bn1, x).relu_())
        levels = []
        for name in self.stage_names:
            x = self.get_submodule(name)(x)
            levels.append(x)
        return levels[-self.num_levels :]

    def freeze(self, stages: int) -> None:
        for name in ["conv1", *self.stage_names][:stages]:
            self.get_submodule(name).requires_grad_(False)


class _TimmNetwork(nn.Module):
    """A timm network; parameters are named as there, without the classifier's."""

    def __init__(self, name: str, weights: str | None, stages: int | None, num_levels: int, dilation: bool):
        super().__init__()
        try:
            import timm
        except ImportError as error:
            raise ValueError(f"backbone 'timm:{name}' needs timm: pip install timm") from error
        if not timm.is_model(name):
            raise ValueError(f"unknown backbone 'timm:{name}': timm has no network of that name")
        options = {"output_stride": 16} if dilation else {}
        options |= _any_size(timm, name)
        try:
            self.network = timm.create_model(name, pretrained=weights == "imagenet", **options)
        except OSError as error:  # of the download
            source = f"https://huggingface.co/{timm.get_pretrained_cfg(name).hf_hub_id}"
            raise OSError(
                f"the ImageNet weights of timm:{name} cannot be downloaded ({str(error).splitlines()[0]}): download "
                f"model.safetensors of {source} and give the file as backbone_weights"
            ) from None
        info = getattr(self.network, "feature_info", [])
        if not info or not hasattr(self.network, "prune_intermediate_layers"):
            raise ValueError(f"backbone 'timm:{name}' cannot be used: timm gives no feature maps of it")
        stages = _check_levels(f"timm:{name}", stages, num_levels, len(info))
        self.indices = list(range(stages - num_levels, stages))
        self.network.prune_intermediate_layers(self.indices, prune_norm=True, prune_head=True)
        timm.layers.freeze_batch_norm_2d(self.network)
        self.stage_modules = [stage["module"] for stage in info[:stages]]
        self.most_frozen = stages
        self.num_channels = [stage["num_chs"] for stage in info[stages - num_levels : stages]]

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.network.forward_intermediates(x, indices=self.indices, intermediates_only=True, stop_early=True)

    def freeze(self, stages: int) -> None:
        """Freeze what comes before the end of stage ``stages``, by the module names that timm reports."""
        if stages == 0:
            return
        last = self.stage_modules[stages - 1]
        # Leaves only: a container that begins before the end of the stage may go on after it.
        leaves = [(name, module) for name, module in self.network.named_modules() if not any(module.children())]
        inside = [index for index, (name, _) in enumerate(leaves) if f"{name}.".startswith(f"{last}.")]
        for _, module in leaves[: inside[-1] + 1]:
            module.requires_grad_(False)

    def layer_scales(self, decay: float) -> dict[nn.Parameter, float]:
        """The factor of each trainable parameter's learning rate: 1 for the last layer, ``decay`` for that before, ...

        What the layers are, timm says: blocks in ViTs and networks in stages alike, and what comes before them.
        """
        from timm.optim import param_groups_layer_decay

        groups = param_groups_layer_decay(self.network, layer_decay=decay)
        return {parameter: group["lr_scale"] for group in groups for parameter in group["params"]}


class _ConvNetwork(nn.Module):
    """A plain network: each stage halves the resolution and has two 3x3 convolutions with batch norm."""

    def __init__(self, variant: str, weights: str | None, stages: int | None, num_levels: int, dilation: bool):
        super().__init__()
        if not all(width.isdigit() and int(width) > 0 for width in variant.split("-")):
            raise ValueError(f"backbone 'conv:{variant}' must list the width of each stage, such as conv:32-64-128")
        widths = [int(width) for width in variant.split("-")]
        widths = widths[: _check_levels(f"conv:{variant}", stages, num_levels, len(widths))]
        self.num_levels = num_levels
        self.num_channels = widths[-num_levels:]
        self.stages = nn.ModuleList(self._stage(a, b) for a, b in itertools.pairwise([3, *widths]))

    @staticmethod
    def _stage(in_channels: int, out_channels: int) -> nn.Sequential:
        def convolution(channels: int, stride: int) -> list[nn.Module]:
            conv = nn.Conv2d(channels, out_channels, 3, stride=stride, padding=1, bias=False)
            return [conv, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)]

        return nn.Sequential(*convolution(in_channels, 2), *convolution(out_channels, 1))

    def forward(self, x: Tensor) -> list[Tensor]:
        levels = []
        for stage in self.stages:
            x = stage(x)
            levels.append(x)
        return levels[-self.num_levels :]


def _any_size(timm, name: str) -> dict[str, bool]:
    """Options with which a network that timm builds for one size of images takes any, as ViTs can; else none."""
    options = {"dynamic_img_size": True, "dynamic_img_pad": True}
    if not timm.get_pretrained_cfg(name).fixed_input_size:
        return {}
    try:
        with torch.device("meta"):  # the network's classes alone know their options
            timm.create_model(name, **options)
    except TypeError:
        return {}
    return options


def _check_levels(name: str, stages: int | None, num_levels: int, available: int) -> int:
    """The number of stages that are used."""
    stages = available if stages is None else stages
    if not 1 <= stages <= available:
        raise ValueError(f"stages must be 1 to {available} for {name}, got {stages}")
    if not 1 <= num_levels <= stages:
        raise ValueError(f"num_levels must be 1 to {stages} for {name}, got {num_levels}")
    return stages


def _load_weights(body: nn.Module, path: Path, name: str) -> None:
    """Load a classifier's or a feature extractor's state dict; heads of classifiers are left out."""
    if not path.is_file():
        raise FileNotFoundError(f"backbone_weights: there is no file {path}")
    try:
        state = read_tensors(path)
    except ValueError as error:
        raise ValueError(f"backbone_weights: {path} cannot be read as a file of tensors: {error}") from None
    if not isinstance(state, dict):
        raise ValueError(f"backbone_weights: {path} holds a {type(state).__name__}, not a state dict")
    target = body.network if isinstance(body, _TimmNetwork) else body
    missing, _ = target.load_state_dict(state, strict=False)
    missing = [key for key in missing if not key.endswith("num_batches_tracked")]
    if missing:
        raise ValueError(
            f"backbone_weights: {path} does not fit backbone {name!r}: it lacks {len(missing)} tensors, "
            f"such as {missing[0]}"
        )
