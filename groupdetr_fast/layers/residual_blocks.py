"""ResNets whose convolutions take the frozen batch norms after them into their weights, on CPUs.

A norm with fixed statistics multiplies every channel and adds to it: the convolution before it does the same with other
weights and a bias, which CPU kernels add as they write a map. A norm of its own goes over the map once more, and over
its gradient. On GPUs torch adds a bias in a pass of its own, so that there is nothing to gain.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet

from .frozen_batch_norm import FrozenBatchNorm2d

__all__ = ["convolve", "fold_norms"]


def convolve(conv: nn.Conv2d, norm: nn.Module, x: Tensor) -> Tensor:
    """``norm(conv(x))``, by one convolution where that is faster and the same to rounding.

    That is on CPUs without autocast, for a frozen norm. Modules that have hooks are called, and a compiler gets both
    operators, which it folds by itself.

    Args:
        conv: without a bias.
        norm: of its output.
        x: ``[B, C, H, W]``.
    """
    if not (
        type(conv) is nn.Conv2d
        and conv.bias is None
        and conv.padding_mode == "zeros"
        and type(norm) is FrozenBatchNorm2d
        and x.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not _has_hooks(conv)
        and not _has_hooks(norm)
    ):
        return norm(conv(x))
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    weight = conv.weight * scale[:, None, None, None]
    bias = torch.addcmul(norm.bias, norm.running_mean, scale, value=-1)
    return F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)


def fold_norms(network: resnet.ResNet) -> None:
    """Let the residual blocks of a network compute by :func:`convolve`. Parameters and names of modules stay."""
    for module in list(network.modules()):
        if type(module) in _OURS:
            if module.downsample is not None:
                module.downsample.__class__ = _Projection
            module.__class__ = _OURS[type(module)]


class _Projection(nn.Sequential):
    """The shortcut of a block that changes sizes."""

    def forward(self, x: Tensor) -> Tensor:
        return convolve(*self, x)


class _BasicBlock(resnet.BasicBlock):
    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.relu(convolve(self.conv1, self.bn1, x))
        out = convolve(self.conv2, self.bn2, out)
        out += shortcut
        return self.relu(out)


class _Bottleneck(resnet.Bottleneck):
    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.relu(convolve(self.conv1, self.bn1, x))
        out = self.relu(convolve(self.conv2, self.bn2, out))
        out = convolve(self.conv3, self.bn3, out)
        out += shortcut
        return self.relu(out)


_OURS = {resnet.BasicBlock: _BasicBlock, resnet.Bottleneck: _Bottleneck}


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
