"""Steps as CUDA graphs: what is captured runs here without a capture; tests marked gpu capture it."""

import contextlib
import logging
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import groupdetr_fast as gd
from groupdetr_fast.data import Batch
from groupdetr_fast.targets import StepTotals
from groupdetr_fast.training import graphs
from groupdetr_fast.training.checkpoint import latest_checkpoint
from groupdetr_fast.training.engine import Trainer, TrainerSettings, build_accelerator
from groupdetr_fast.training.faults import TrainingError
from groupdetr_fast.training.graphs import GraphSizes, StepGraphs, StepInputs
from groupdetr_fast.training.optimization import OptimizationConfig

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
}
# A rate that float32 has exactly: kernels read it as such from the device, and as float64 from the host.
RATE = 2.0**-10
CONFIG = OptimizationConfig(
    lr=RATE,
    backbone_lr=RATE,
    weight_decay=2.0**-10,
    lr_drop=(1000,),
    cuda_graphs=2,
    graph_image_multiple=64,
    graph_targets=(4, 8),
)


def build(name="conditional_detr_r50", num_groups=2, **overrides):
    torch.manual_seed(0)
    return gd.build_model(name, num_classes=CLASSES, num_groups=num_groups, **{**TINY, "dropout": 0.0, **overrides})


def batch_of(*numbers, size=(64, 64), seed=0, device="cpu"):
    """A batch with so many targets in each image, the last of which is padded."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(len(numbers), 3, *size, generator=generator)
    masks = torch.zeros(len(numbers), *size, dtype=torch.bool)
    masks[-1, :, size[1] * 3 // 4 :] = True
    targets = [
        {
            "labels": torch.randint(CLASSES, (number,), generator=generator),
            "boxes": torch.rand(number, 4, generator=generator) * 0.4 + 0.2,
        }
        for number in numbers
    ]
    ids = [100 * seed + index for index in range(len(numbers))]
    original_sizes = torch.tensor([size] * len(numbers))
    return Batch(
        images.masked_fill(masks[:, None], 0), masks, gd.PackedTargets.from_list(targets), ids, original_sizes
    ).to(device)


class Images(torch.utils.data.Dataset):
    """Numbers in the place of images."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return batch_of(1 + index % 3, index % 4, seed=index)


class Order(torch.utils.data.SequentialSampler):
    def set_epoch(self, epoch):
        pass


@pytest.fixture
def trainer_in(tmp_path, monkeypatch):
    """Makes trainers in folders of these names; each begins with the same weights and random states."""
    monkeypatch.setattr(Trainer, "_check_graphs", lambda self: None)  # these run on the CPU too

    def make(name, device="cpu", model="conditional_detr_r50", overrides=None, max_skipped_steps=10, **options):
        optimization = replace(CONFIG, **options)
        accelerator = build_accelerator(optimization, tmp_path / name, cpu=torch.device(device).type == "cpu")
        detector = build(model, **(overrides or {}))
        dataset = Images()
        loader = torch.utils.data.DataLoader(
            dataset, batch_size=None, sampler=Order(dataset), collate_fn=lambda batch: batch
        )
        settings = TrainerSettings(optimization, tmp_path / name, max_skipped_steps=max_skipped_steps)
        trainer = Trainer(accelerator, detector, gd.build_criterion(detector), loader, settings)
        trainer.state.model.train()
        return trainer

    return make


def tensors_of(trainer):
    """All that a step may change, by name."""
    state = trainer.state
    found = {f"model.{name}": tensor for name, tensor in state.model.state_dict().items()}
    optimizer = state.optimizer.state_dict()["state"]
    found |= {f"adam.{key}.{name}": value for key, values in optimizer.items() for name, value in values.items()}
    if state.average is not None:
        found |= {f"average.{name}": tensor for name, tensor in state.average.average.items()}
        found["updates"] = state.average.updates
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def differing(first, second):
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])]


def run(trainer, steps):
    losses = [trainer.run_step(step if isinstance(step, list) else [step])["loss"] for step in steps]
    trainer._settle()
    return torch.stack(losses).cpu()


def test_quick(trainer_in):
    a = trainer_in("a", cuda_graphs=0, ema_decay=0.9)
    b = trainer_in("b", ema_decay=0.9)
    batches = [batch_of(2, 3, seed=seed) for seed in range(6)]
    print(run(a, batches), run(b, batches))
    x, y = tensors_of(a), tensors_of(b)
    for n in x:
        torch.testing.assert_close(x[n], y[n], rtol=1e-3, atol=1e-5, msg=n)
