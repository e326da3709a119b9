"""What the tests of all kernels of multi-scale deformable attention share."""

import torch

__all__ = ["EMPTY", "grad_of_result"]

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
