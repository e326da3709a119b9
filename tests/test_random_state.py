"""The generators' states, where this process uses CUDA and where it does not; no GPU is needed."""

import random

import numpy as np
import pytest
import torch

from groupdetr_fast.random_state import random_state, random_state_kept, restore_random_state


@pytest.fixture
def cuda(monkeypatch):
    """A function that puts a GPU into the machine, in use or not, and returns its states and the seeds it is given."""

    def put(in_use):
        states, seeds = [torch.tensor([3, 1], dtype=torch.uint8)], []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: in_use)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        ask = (lambda: states[-1:]) if in_use else (lambda: pytest.fail("this initialises CUDA"))
        monkeypatch.setattr(torch.cuda, "get_rng_state_all", ask)
        monkeypatch.setattr(torch.cuda, "set_rng_state_all", states.extend)
        monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
        return states, seeds

    return put


def drawn():
    return torch.rand(3).tolist(), random.random(), np.random.rand()  # noqa: NPY002


@pytest.mark.parametrize("in_use", [False, True])
def test_draws_inside_leave_no_trace(cuda, in_use):
    states, seeds = cuda(in_use)
    torch.manual_seed(7)
    drawn()
    state = random_state()
    expected = drawn()
    restore_random_state(state)
    with random_state_kept():
        torch.manual_seed(0)
        drawn()
        states.append(torch.tensor([5, 5], dtype=torch.uint8))
    assert drawn() == expected
    assert len(state["cuda"]) == in_use
    if in_use:
        assert states[-1].tolist() == [3, 1]
    else:
        assert seeds == [7, 0, 7]
