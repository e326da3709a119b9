"""A tiny RF-DETR with random weights, and batches for it."""

import contextlib
import warnings
from unittest import mock

import torch
from rfdetr import RFDETRNano
from rfdetr.config import RFDETRNanoConfig, TrainConfig
from rfdetr.models.backbone import dinov2
from rfdetr.training.module_model import RFDETRModelModule
from rfdetr.utilities.tensors import NestedTensor

CLASSES, QUERIES, SIZE = 4, 6, 64  # SIZE: of images, in pixels, which make 16 proposals

_OPTIONS = {
    "pretrain_weights": None,
    "device": "cpu",
    "num_classes": CLASSES - 1,  # to which RF-DETR adds one
    "resolution": SIZE,
    "positional_encoding_size": SIZE // 16,
    "num_queries": QUERIES,
    "num_select": QUERIES,
    "hidden_dim": 32,
    "ca_nheads": 4,
    "sa_nheads": 4,
    "out_feature_indexes": [1, 2],
}


@contextlib.contextmanager
def tiny_backbones():
    """Within, backbones have two layers of 16 channels."""
    config = dinov2.get_config("small", use_registers=False)
    config |= {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    with (
        mock.patch.object(dinov2, "get_config", return_value=config),
        mock.patch.dict(dinov2.size_to_width, small=16),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # that there are no pretrained weights
        yield


def module_of(num_groups=1, dtype=torch.float32, tiny=True, train_options=None, **options):
    """RF-DETR's Lightning module in training mode, whose heads are not those of the beginning, which are all zeros.

    With ``tiny=False`` it has the sizes of the smallest published model.
    """
    torch.manual_seed(0)
    sizes = _OPTIONS if tiny else {"pretrain_weights": None, "device": "cpu"}
    with tiny_backbones() if tiny else contextlib.nullcontext():
        config = RFDETRNanoConfig(**{**sizes, "group_detr": num_groups, **options})
        train_config = TrainConfig(dataset_dir=".", output_dir="unused", **(train_options or {}))
        module = RFDETRModelModule(config, train_config)
    with torch.no_grad():
        for name, parameter in module.model.named_parameters():
            if not name.startswith("backbone."):
                parameter += 0.05 * torch.randn(parameter.shape)
    module.log = module.log_dict = lambda *args, **kwargs: None  # there is no trainer
    return module.train().to(dtype)


def detector_of(num_groups=1, **options):
    """What RF-DETR's users hold."""
    torch.manual_seed(0)
    with tiny_backbones():
        return RFDETRNano(**{**_OPTIONS, "group_detr": num_groups, **options})


def targets_of(counts, dtype=torch.float32):
    """Targets of images with so many objects."""
    generator = torch.Generator().manual_seed(2)
    targets = []
    for count in counts:
        centers, sizes = (torch.rand(count, 2, generator=generator) for _ in range(2))
        boxes = torch.cat((centers * 0.6 + 0.2, sizes * 0.3 + 0.05), dim=1).to(dtype)
        labels = torch.randint(CLASSES, (count,), generator=generator)
        targets.append({"labels": labels, "boxes": boxes, "orig_size": torch.tensor([SIZE, SIZE])})
    return targets


def batch_of(counts, size=SIZE, dtype=torch.float32):
    """Images with so many objects, of which all but the first are padded at the bottom."""
    images = torch.randn(len(counts), 3, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    masks = torch.zeros(len(counts), size, size, dtype=torch.bool)
    masks[1:, size * 3 // 4 :] = True
    return NestedTensor(images.to(dtype).masked_fill(masks[:, None], 0), masks), targets_of(counts, dtype)
