"""Sine embeddings of positions: their order, and that a GPU can make them without the host."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from groupdetr_fast.layers.position import sine_position_embedding


@pytest.mark.parametrize("coordinates", [2, 4])
def test_order_of_the_coordinates(coordinates):
    position = torch.rand(3, coordinates)
    embedding = sine_position_embedding(position, 8, 20.0)
    x, y, *sizes = position.unbind(-1)
    expected = []
    for value in (y, x, *sizes):
        for exponent in (0, 0.5):
            angle = value * 2 * math.pi / 20.0**exponent
            expected += [angle.sin(), angle.cos()]
    torch.testing.assert_close(embedding, torch.stack(expected, dim=-1))


def test_no_list_of_indices_goes_to_the_device():
    """It would be copied there, and the host would wait: ten times in a step of DINO."""
    called = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            called.append(operator.overloadpacket)
            return operator(*args, **(kwargs or {}))

    with Record():
        sine_position_embedding(torch.rand(3, 4), 8)
    assert torch.ops.aten.sin in called
    assert torch.ops.aten.index not in called
