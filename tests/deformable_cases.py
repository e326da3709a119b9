"""What the tests of all kernels of multi-scale deformable attention share."""

import pytest
import torch

from groupdetr_fast.testing import ms_deform_attn_inputs

__all__ = [
    "EMPTY",
    "EVERY_HALF",
    "HALF",
    "grad_of_result",
    "missing_samples",
    "need_tensor_cores",
    "on",
    "samples_at_the_rim",
]

HALF = (torch.bfloat16, torch.float16)  # what the kernels on tensor cores are for
EVERY_HALF = pytest.mark.parametrize("dtype", HALF, ids=lambda dtype: str(dtype).removeprefix("torch."))

# Sizes of problems, arguments of testing.ms_deform_attn_inputs, in which something is empty.
EMPTY = {
    "no_queries": {"queries": 0},
    "no_images": {"batch": 0},
    "no_heads": {"heads": 0},
    "no_channels": {"dim": 0},
    "no_points": {"points": 0},
    "no_pixels": {"shapes": ((0, 4), (2, 0))},
    "no_levels": {"shapes": ()},
}


def grad_of_result(value, locations):
    generator = torch.Generator().manual_seed(0)
    shape = value.shape[0], locations.shape[1], value.shape[2] * value.shape[3]
    return torch.randn(shape, generator=generator, dtype=locations.dtype).to(value.dtype)


RIM = (-1 + 2.0**-24, -0.5, -(2.0**-26), 0.0, 2.0**-26, 1.0, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 7.0, 7.5, 8 - 2.0**-21)


def samples_at_the_rim(shape, dtype):
    """Inputs of the op whose samples lie on pixels, at the rim of a map of this shape and close to either."""
    height, width = shape
    value, flat, locations, weights = ms_deform_attn_inputs(
        batch=1, queries=len(RIM), shapes=(shape,), points=16, dtype=dtype
    )
    places = torch.tensor(RIM)
    locations[..., 0] = ((places * width / 8 + 0.5) / width)[None, :, None, None, None]
    locations[..., 1] = ((places * height / 8 + 0.5) / height)[None, None, None, None, :]
    locations[..., 0][0, ::2] = ((places[::2].clamp(max=width - 1e-3) + 0.5) / width)[:, None, None, None]
    return value, flat, locations, weights


def missing_samples(bad, dtype, within=(None, torch.inf)):
    """Inputs of the op whose first two samples of a level touch no pixel, and the same without these samples.

    Other samples are moved to the locations that are given.
    """
    value, flat, locations, weights = ms_deform_attn_inputs(dtype=dtype)
    locations.clamp_(*within)
    locations[:, :, :, :, 0, 0] = bad
    locations[:, :, :, :, 1, 1] = bad
    weights[0, :, :, :, :2] = torch.nan
    rest = value, flat, locations[..., 2:, :].contiguous(), weights[..., 2:].contiguous()
    return (value, flat, locations, weights), rest


def on(device, inputs):
    return [tensor.to(device) if torch.is_tensor(tensor) else tensor for tensor in inputs]


def need_tensor_cores():
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("needs the tensor cores of compute capability 8.0")
