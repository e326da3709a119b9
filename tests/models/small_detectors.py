"""Detectors that run in milliseconds, and batches for them."""

import torch

import groupdetr_fast as gd
from groupdetr_fast.data import CocoDataset, DigitsConfig, collate, digits_dataset
from groupdetr_fast.layers.frozen_batch_norm import FrozenBatchNorm2d

SMALL = {
    "num_queries": 6,
    "d_model": 32,
    "num_heads": 4,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "dim_feedforward": 48,
    "backbone": "conv:8-16-16",
}
OF_MODEL = {"mask2former_r50": {"num_levels": 2, "encoder_dim_feedforward": 48, "loss_points": 64}}
CLASSES = 5


def small_detector(name, num_groups=3, **overrides):
    torch.manual_seed(1)
    settings = {**SMALL, **OF_MODEL.get(name, {}), **overrides}
    model = gd.build_model(name, num_classes=CLASSES, num_groups=num_groups, **settings)
    # Some layers start at zero, which would hide what their inputs depend on.
    for key, parameter in model.named_parameters():
        if any(layer in key for layer in ("bbox_embed", "sampling_offsets", "attention_weights")):
            torch.nn.init.normal_(parameter, std=0.3)
    for module in model.modules():  # batch statistics would tie the images of a batch together, as they should
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    return model


def normalize_like_trained(model):
    """Give frozen batch norms the statistics of random images: those of an untrained ResNet normalise nothing, and its
    last maps, in the thousands, leave float16's range."""

    def measure(norm, inputs):
        norm.running_mean.copy_(inputs[0].mean((0, 2, 3)))
        norm.running_var.copy_(inputs[0].var((0, 2, 3)))

    norms = [module for module in model.modules() if isinstance(module, FrozenBatchNorm2d)]
    hooks = [norm.register_forward_pre_hook(measure) for norm in norms]
    with torch.no_grad():
        model.eval()(torch.randn(2, 3, 128, 128))
    for hook in hooks:
        hook.remove()


def padded_batch(size=(48, 64)):
    images = torch.randn(2, 3, *size)
    masks = torch.zeros(2, *size, dtype=torch.bool)
    masks[1, 40:] = True
    masks[1, :, 48:] = True
    return images.masked_fill(masks[:, None], 0), masks


def random_targets(*sizes):
    """Ground truth of one image per size."""
    return gd.PackedTargets.from_list(
        [
            {
                "labels": torch.randint(CLASSES, (size,)),
                "boxes": torch.cat((torch.rand(size, 2) * 0.6 + 0.2, torch.rand(size, 2) * 0.3 + 0.05), dim=1),
            }
            for size in sizes
        ]
    )


def outputs(out):
    """Logits and boxes, ``[layers, B, Q, C + 4]``, or logits and the logits of the masks' pixels.

    The encoder's, where there are any, count as those of one more layer.
    """
    if isinstance(out, gd.SegmentationOutput):
        masks = torch.einsum("lbqd,bdhw->lbqhw", out.mask_embeddings, out.mask_features)
        return torch.cat((out.logits, masks.flatten(3)), dim=-1)
    decoder = torch.cat((out.logits, out.boxes), dim=-1)
    if getattr(out, "encoder", None) is None:  # denoising predictions have none
        return decoder
    return torch.cat((decoder, torch.cat((out.encoder.logits, out.encoder.boxes), dim=-1)[None]))


def train_on_digits(model, folder, steps):
    """Train on four images of the embedded digits, written to ``folder``. Returns the losses of every step."""
    config = DigitsConfig(image_size=48, train_images=4, val_images=1, min_digit=14, max_digit=24, max_objects=3)
    paths = digits_dataset(folder, config=config)
    dataset = CocoDataset(paths.train_images, paths.train_annotations)
    batch = collate([dataset[index] for index in range(4)]).to("cpu")
    criterion = gd.build_criterion(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    history = []
    for _ in range(steps):
        losses = criterion(model(batch.images, batch.masks, batch.targets), batch.targets)
        optimizer.zero_grad()
        losses["loss"].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        history.append({name: value.item() for name, value in losses.items()})
    return history
