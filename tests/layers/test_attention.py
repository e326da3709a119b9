import pytest
import torch
from torch.nn import functional as F

from groupdetr_fast.layers.attention import attend, attend_under_mask


def test_under_a_mask_cudnn_is_not_asked(monkeypatch):
    """Its gradients may be NaN there. What a user chose holds again after it."""
    asked = []

    def attention(*arguments, **options):
        asked.append(torch.backends.cuda.cudnn_sdp_enabled())
        return F.softmax(arguments[0], -1)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    tokens = torch.zeros(1, 1, 2, 4)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    attend_under_mask(tokens, tokens, tokens, torch.ones(1, 1, 2, 2, dtype=torch.bool), 0.0)
    attend_under_mask(tokens, tokens, tokens, None, 0.0)
    assert asked == [False, before]
    assert torch.backends.cuda.cudnn_sdp_enabled() is before


def negative_scores(dtype, device, tokens=64, heads=2, dim=32):
    """Heads ``[B, L, H, D]`` whose scores are all about -120."""
    query, key, value = (torch.randn(1, tokens, heads, dim, device=device) * 0.1 for _ in range(3))
    query[..., 0], key[..., 0] = 1.0, -120 * dim**0.5
    return [each.to(dtype).requires_grad_() for each in (query, key, value)]


@pytest.mark.parametrize("by_op", [True, False])
def test_gradients_of_very_negative_scores_are_finite(by_op, device):
    """Those of cuDNN are not on an H200: 64 keys under a mask, and a sum of exponentials below float32's range."""
    heads = negative_scores(torch.bfloat16, device)
    if by_op:
        out = attend(*heads, torch.zeros(1, 64, dtype=torch.bool, device=device), 0.0)
    else:
        visible = torch.ones(1, 1, 1, 64, dtype=torch.bool, device=device)
        out = attend_under_mask(*(each.transpose(1, 2) for each in heads), visible, 0.0)
    out.float().square().sum().backward()
    assert all(each.grad.isfinite().all() for each in heads)
    assert heads[2].grad.abs().max() > 0
