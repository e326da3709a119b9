"""What a training stands on: devices, processes, precision and seeds."""

import atexit
import gc
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DataLoaderConfiguration, ProjectConfiguration, set_seed
from torch import nn

from .config import OptimizationConfig
from .host_memory import keep_freed_memory

__all__ = [
    "build_accelerator",
    "do_without_cudnn_attention",
    "let_threads_finish",
    "round_products",
    "send_buffers_only_if_trained",
]


def build_accelerator(
    config: OptimizationConfig, run: Path, *, cpu: bool = False, cudnn_attention: bool = True
) -> Accelerator:
    """Devices, precision, processes. Seeds everything.

    Args:
        config: how to train.
        run: folder of the training.
        cpu: whether it runs on the CPU though there is a GPU.
        cudnn_attention: whether torch's attention may take cuDNN's kernel; see :func:`do_without_cudnn_attention`.

    Raises:
        ValueError: for fp16 without a GPU, where Accelerate would train in float32 and say nothing; and if the launcher
            asks for another precision than the configuration.
    """
    config = config.as_launched().resolved()
    if config.precision == "fp16" and (cpu or not torch.accelerator.is_available()):
        raise ValueError("precision fp16 needs a GPU; on the CPU use bf16 or no")
    # Accelerate keeps its precision in globals; a second run of one process may want another.
    AcceleratorState._reset_state()
    GradientState._reset_state()
    accelerator = Accelerator(
        # Without an accelerator, Accelerate would take the processes of a launcher for so many single ones.
        cpu=cpu or not torch.accelerator.is_available(),
        mixed_precision=config.precision,
        project_config=ProjectConfiguration(project_dir=str(run), logging_dir=str(run)),
        step_scheduler_with_optimizer=False,
        # The loaders pin batches for CUDA. A copy that the host waits for would wait for the step before it, too.
        dataloader_config=DataLoaderConfiguration(non_blocking=torch.cuda.is_available()),
    )
    set_seed(config.seed)
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    round_products(accelerator.device, tf32=config.tf32)
    if not cudnn_attention:
        do_without_cudnn_attention(accelerator.device)
    if accelerator.num_processes > 1:
        atexit.unregister(let_threads_finish)  # once is enough
        atexit.register(let_threads_finish)
    return accelerator


def let_threads_finish() -> None:
    """Give gloo's threads, at the end of a process, time to release what they have sent.

    For that they need the interpreter, and torch aborts the process if they ask for it while it ends ("terminate called
    without an active exception", pytorch/pytorch#179291). Destroying the process group does not end them: the model for
    several processes holds it, and is freed here where nothing else holds that.
    """
    gc.collect()
    time.sleep(0.1)


def round_products(device: torch.device, *, tf32: bool) -> None:
    """Whether matrices and convolutions on a CUDA device may be multiplied in TF32; the CPU stays as it is."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = tf32


def do_without_cudnn_attention(device: torch.device) -> None:
    """Let torch's attention choose among its other kernels: gradients of cuDNN's may be NaN under a mask.

    That is for models which call torch's attention themselves, such as those of transformers. This package's own have
    no need of it (layers/attention.py).
    """
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)


def send_buffers_only_if_trained(model: nn.Module) -> None:
    """Let DDP send the buffers of process 0 to all others before every forward pass only if training changes them.

    The statistics of frozen batch norms are sent once, when the model is prepared.

    Args:
        model: as the accelerator prepared it.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model.broadcast_buffers = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
