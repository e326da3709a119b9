"""Small trainings for steps as CUDA graphs: their batches, and what a step does and changes."""

import math

import torch
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import groupdetr_fast as gd
from groupdetr_fast.data import Batch
from groupdetr_fast.training.config import OptimizationConfig

CLASSES = 5
TINY = {
    "num_queries": 8,
    "d_model": 32,
    "num_heads": 4,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "dim_feedforward": 32,
    "backbone": "conv:8-8-8-8",
    "backbone_weights": None,
    "dropout": 0.0,
}
CONDITIONAL, DINO = "conditional_detr_r50", "dino_4scale_r50"
# A rate that float32 has exactly: kernels read it as such from the device, and as float64 from the host.
CONFIG = OptimizationConfig(
    lr=2.0**-10,
    backbone_lr=2.0**-11,
    weight_decay=2.0**-10,
    lr_drop=(1000,),
    cuda_graphs=2,
    graph_image_multiple=64,
    graph_targets=(4, 8),
)


def build(name=CONDITIONAL, **overrides):
    torch.manual_seed(0)
    return gd.build_model(name, num_classes=CLASSES, num_groups=2, **{**TINY, **overrides})


def batch_of(*numbers, size=(64, 64), seed=0, device="cpu", spoilt=False):
    """A batch with so many targets in each image; the last image is padded."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(len(numbers), 3, *size, generator=generator)
    masks = torch.zeros(len(numbers), *size, dtype=torch.bool)
    masks[-1, :, size[1] * 3 // 4 :] = True
    images = images.masked_fill(masks[:, None], 0)
    if spoilt:
        images[0, 0, 0, 0] = math.nan
    targets = [
        {
            "labels": torch.randint(CLASSES, (number,), generator=generator),
            "boxes": torch.rand(number, 4, generator=generator) * 0.4 + 0.2,
        }
        for number in numbers
    ]
    ids = [100 * seed + index for index in range(len(numbers))]
    batch = Batch(images, masks, gd.PackedTargets.from_list(targets), ids, torch.tensor([size] * len(numbers)))
    return batch.to(device)


def batches_of(steps, device="cpu", **options):
    """Batches whose images have 0 to 4 targets."""
    return [batch_of(step % 5, (3 * step + 1) % 4, seed=step, device=device, **options) for step in range(steps)]


class Numbers(torch.utils.data.Dataset):
    """Batches by their number, the second of which is spoilt."""

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return batch_of(1 + index % 3, index % 4, seed=index, spoilt=index == 1)


class InOrder(torch.utils.data.SequentialSampler):
    def set_epoch(self, epoch):
        pass


def tensors_of(trainer):
    """Copies of all that a step may change, by name."""
    state = trainer.state
    found = {f"model.{name}": tensor for name, tensor in state.model.state_dict().items()}
    optimizer = state.optimizer.state_dict()["state"]
    found |= {f"adam.{key}.{name}": value for key, values in optimizer.items() for name, value in values.items()}
    if state.average is not None:
        found |= {f"average.{name}": tensor for name, tensor in state.average.average.items()}
        found["average.updates"] = state.average.updates
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def differing(first, second):
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])]


def assert_close(first, second, **tolerance):
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(
            first[name], second[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance
        )


def run(trainer, steps):
    """The losses of steps of one batch each."""
    losses = torch.stack([trainer.run_step([batch])["loss"] for batch in steps])
    trainer.ledger.settle()
    return losses.cpu()


def uncaptured(trainer):
    """The same trainer, whose steps are padded and run on the device alone, and which captures none of them."""
    trainer.graphs.warm_up = 10**9
    return trainer


class Operators(TorchDispatchMode):
    """Names of all operators that run inside, sizes of what they take, and devices of what they take and give."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        # Which has no implementation for fake tensors, and returns nothing.
        adam = function.overloadpacket is torch.ops.aten._fused_adamw_ and isinstance(args[0][0], FakeTensor)
        result = None if adam else function(*args, **(kwargs or {}))
        taken, given = ([x for x in tree_leaves(tree) if torch.is_tensor(x)] for tree in ((args, kwargs), result))
        sizes = [tuple(tensor.shape) for tensor in taken]
        self.seen.append((str(function), sizes, {tensor.device.type for tensor in (*taken, *given)}))
        return result
