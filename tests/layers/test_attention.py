import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from groupdetr_fast.layers import attention
from groupdetr_fast.layers.attention import attend, attend_under_mask
from groupdetr_fast.testing import negative_scores


@pytest.mark.parametrize("keys", [64, 192, 60, 128])
@pytest.mark.parametrize("rows", [1, 5])
def test_keys_that_fill_the_last_ones_of_cudnn_change_nothing(keys, rows):
    """On GPUs they are there under a mask; here they are added on the CPU."""
    query, key, value = (torch.randn(2, 3, length, 8, dtype=torch.float64) for length in (5, keys, keys))
    visible = torch.rand(2, 1, rows, keys) < 0.7
    visible[..., 0] = True
    filled = attention._fill_last_keys(key, value, visible)
    more = 64 if keys % 128 == 64 else 0
    assert [each.shape[-2] for each in filled[:2]] == [keys + more] * 2
    assert filled[2].shape == (2, 1, rows, keys + more)
    out = F.scaled_dot_product_attention(query, filled[0], filled[1], attn_mask=filled[2])
    torch.testing.assert_close(out, attend_under_mask(query, key, value, visible, 0.0))


class Padded(TorchDispatchMode):
    """How many tensors are padded."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.constant_pad_nd.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("device_type", "keys", "masked", "padded"),
    [
        ("cuda", 64, True, 3),
        ("cuda", 60, True, 0),
        ("cuda", 64, False, 0),
        ("cpu", 64, True, 0),
    ],
)
def test_keys_are_added_under_a_mask_on_gpus(device_type, keys, masked, padded):
    with FakeTensorMode(), Padded() as found:
        query, key, value = (torch.empty(2, 3, length, 8, device=device_type) for length in (5, keys, keys))
        visible = torch.ones(2, 1, 1, keys, dtype=torch.bool, device=device_type) if masked else None
        attend_under_mask(query, key, value, visible, 0.0)
    assert found.count == padded


@pytest.fixture
def _cudnn_may_serve():
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    yield
    torch.backends.cuda.enable_cudnn_sdp(before)


@pytest.mark.usefixtures("_cudnn_may_serve")
@pytest.mark.parametrize("way", ["attend", "attend_under_mask"])
def test_gradients_of_very_negative_scores_are_finite(way, device):
    """Those of cuDNN's attention to 64 keys under a mask are not, on an H200."""
    heads = negative_scores(64, torch.bfloat16, device)
    if way == "attend":
        out = attend(*heads, torch.zeros(1, 64, dtype=torch.bool, device=device), 0.0)
    else:
        visible = torch.ones(1, 1, 1, 64, dtype=torch.bool, device=device)
        out = attend_under_mask(*(each.transpose(1, 2) for each in heads), visible, 0.0)
    out.float().square().sum().backward()
    assert all(each.grad.isfinite().all() for each in heads)
    assert heads[2].grad.abs().max() > 0
