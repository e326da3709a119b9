"""The generator of dropout, its kernel on CPUs, and dropout of anything by it."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from groupdetr_fast._library import has_kernel
from groupdetr_fast.ops import _dropout
from groupdetr_fast.ops._dropout import attention_dropout_reference, dropout, keep_mask, new_seed
from groupdetr_fast.testing import poisoned_memory

DROPOUT = torch.ops.groupdetr_fast.attention_dropout

compiled = pytest.mark.skipif(not has_kernel("attention_dropout", "CPU"), reason="there are no compiled kernels")


def make_seed(device, number=123456789012345):
    return torch.tensor([number], device=device)


def word(x):
    """The hash of the generator, in Python integers."""
    x ^= x >> 16
    x = x * 0x21F0AAAD % 2**32
    x ^= x >> 15
    x = x * 0xD35A2D97 % 2**32
    return x ^ (x >> 15)


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**32, 123456789012345, 2**63 - 1])
def test_keep_mask_equals_its_definition(seed, device):
    low, high = seed % 2**32, seed >> 32
    head, row, columns = 37, 1234, range(50)
    head_word0 = word(word(word(low) ^ high) ^ head)
    head_word1 = word(word(word((high + 0x9E3779B9) % 2**32) ^ low) ^ head)
    slope, offset = word(head_word0 ^ row), word(head_word1 ^ row)
    places = [(column * 0x9E3779B9 + head_word0) % 2**32 for column in columns]
    expected = [(slope * ((place * place) ^ place) + offset) % 2**32 >= int(0.3 * 2**32) for place in places]
    indices = torch.tensor(head, device=device), torch.tensor(row, device=device), torch.arange(50, device=device)
    assert keep_mask(make_seed(device, seed), 0.3, *indices).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", [0, 987654321, 2**40 + 3, 2**63 - 1])
@pytest.mark.parametrize("p", [0.0, 1e-9, 0.1, 0.5, 0.999])
def test_kernel_equals_reference_bit_for_bit(dtype, seed, p, device):
    probabilities = torch.rand(3, 2, 5, 77, dtype=dtype, device=device)
    arguments = make_seed(device, seed), p, [0, 0, 0, 4, 900, 17, 2**20, 3, 2**20]
    with poisoned_memory():
        actual = DROPOUT(probabilities, *arguments)
    assert torch.equal(actual, attention_dropout_reference(probabilities, *arguments))


def test_it_depends_on_the_place_in_the_matrix_only(device):
    ones = torch.ones(1, 3, 40, 50, device=device)
    seed = make_seed(device)
    whole = DROPOUT(ones, seed, 0.4, [2, 10, 100])
    block = DROPOUT(ones[:, :, :8, :9].contiguous(), seed, 0.4, [2, 15, 107])
    assert torch.equal(block, whole[:, :, 5:13, 7:16])


@pytest.mark.parametrize("p", [0.05, 0.3, 0.8])
def test_keep_rate(p, device):
    head, row, column = (torch.arange(n, device=device) for n in (8, 300, 400))
    keep = keep_mask(make_seed(device), p, head[:, None, None], row[:, None], column).double()
    for dims in ((0, 1, 2), (1, 2), (0, 2), (0, 1)):  # of all, and of each head, row, column
        rate = keep.mean(dim=dims)
        deviation = (p * (1 - p) / (keep.numel() / rate.numel())) ** 0.5
        assert ((rate - (1 - p)).abs() < 5 * deviation).all()


def test_neighbours_and_seeds_are_independent(device):
    head, row, column = (torch.arange(n, device=device) for n in (8, 300, 400))
    place = head[:, None, None], row[:, None], column
    keep = keep_mask(make_seed(device), 0.5, *place).double() - 0.5
    others = {
        "column": (keep[..., 1:], keep[..., :-1]),
        "row": (keep[:, 1:], keep[:, :-1]),
        "head": (keep[1:], keep[:-1]),
        "transposed": (keep[..., :300], keep[..., :300].mT.contiguous()),
    }
    for name, seed in (("next seed", 123456789012346), ("high bits", 123456789012345 + 2**32)):
        others[name] = keep, keep_mask(make_seed(device, seed), 0.5, *place).double() - 0.5
    for name, (one, other) in others.items():
        # The diagonal of "transposed" is correlated with itself.
        allowed = 5 / one.numel() ** 0.5 + (1 / 300 if name == "transposed" else 0)
        assert (4 * (one * other).mean()).abs() < allowed, name


# Distances along seeds, heads, rows and columns; a set of decisions has one at every combination of them.
SETS_OF_DECISIONS = {
    **{f"columns, {gap} apart": ((0,), (0,), (0,), (0, gap)) for gap in (1, 2, 3, 4, 8, 16, 21, 64, 144)},
    **{f"rows, {gap} apart": ((0,), (0,), (0, gap), (0,)) for gap in (1, 2, 8, 32)},
    **{f"three columns, {gap} apart": ((0,), (0,), (0,), (0, gap, 2 * gap)) for gap in (1, 2, 8, 21)},
    **{f"four columns, {gap} apart": ((0,), (0,), (0,), (0, gap, 2 * gap, 3 * gap)) for gap in (1, 2, 8, 21)},
    **{f"five columns, {gap} apart": ((0,), (0,), (0,), (0, gap, 2 * gap, 3 * gap, 4 * gap)) for gap in (1, 21)},
    **{f"two pairs of columns, {gap} apart": ((0,), (0,), (0,), (0, 1, gap, gap + 1)) for gap in (4, 8, 55)},
    **{f"rectangle, {gap} wide": ((0,), (0,), (0, 1), (0, gap)) for gap in (1, 2, 8, 21, 64)},
    "tall rectangle": ((0,), (0,), (0, 32), (0, 1)),
    "two rows, three columns": ((0,), (0,), (0, 1), (0, 1, 2)),
    "three rows, three columns": ((0,), (0,), (0, 1, 2), (0, 1, 2)),
    "rectangle of heads and columns": ((0,), (0, 1), (0,), (0, 1)),
    "rectangle of heads and rows": ((0,), (0, 1), (0, 1), (0,)),
    "rectangle of seeds and columns": ((0, 1), (0,), (0,), (0, 1)),
    "rectangle of seeds and rows": ((0, 1), (0,), (0, 1), (0,)),
}


def standardised_decisions(p, seeds, heads, rows, columns, device):
    """[seeds, heads, rows, columns] of mean 0 and variance 1."""
    head, row, column = (torch.arange(n, device=device) for n in (heads, rows, columns))
    place = head[:, None, None], row[:, None], column
    keep = torch.stack([keep_mask(make_seed(device, seed), p, *place) for seed in range(seeds)])
    return (keep.double() - (1 - p)) / (p * (1 - p)) ** 0.5


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_sets_of_decisions_are_independent(p, device):
    """The mean product of all decisions of a set is 0."""
    keep = standardised_decisions(p, 40, 4, 64, 256, device)
    for name, distances in SETS_OF_DECISIONS.items():
        sizes = [size - max(along) for size, along in zip(keep.shape, distances, strict=True)]
        product = torch.ones(sizes, dtype=torch.float64, device=device)
        for corner in itertools.product(*distances):
            product *= keep[tuple(slice(start, start + size) for start, size in zip(corner, sizes, strict=True))]
        assert product.mean().abs() < 5 / product.numel() ** 0.5, name


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_keep_rates_vary_as_those_of_independent_decisions(p, device):
    """Chi-square, from both sides: of every seed, and of every head, row and column of every seed."""
    keep = standardised_decisions(p, 200, 2, 64, 128, device)
    for dims in ((1, 2, 3), (2, 3), (3,), (2,)):
        rates = keep.sum(dim=dims) / (keep.shape.numel() / keep.sum(dim=dims).numel()) ** 0.5
        chi_square = rates.square().sum()
        assert (chi_square - rates.numel()).abs() < 5 * (2.2 * rates.numel()) ** 0.5, dims


def test_no_two_rows_or_columns_of_a_head_share_a_pattern(device):
    keep = standardised_decisions(0.5, 1, 3, 700, 900, device)[0]
    for lines in (keep, keep.mT):
        correlations = lines @ lines.mT / lines.shape[-1] ** 0.5
        first, second = torch.triu_indices(*correlations.shape[1:], 1)
        pairs = correlations[:, first, second]
        assert pairs.abs().max() < 7
        assert (pairs.square().mean() - 1).abs() < 5 * (2 / pairs.numel()) ** 0.5


def test_opcheck(device):
    probabilities = torch.rand(2, 3, 4, 5, device=device)
    for blocks in (probabilities, probabilities.mT.contiguous().mT):
        torch.library.opcheck(DROPOUT, (blocks, make_seed(device), 0.3, [0, 0, 0, 1, 4, 0]))


# Dropout of anything


class Drawn(TorchDispatchMode):
    """Counts what torch drops by its own generator."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += "bernoulli" in function.name() or "native_dropout" in function.name()
        return function(*args, **(kwargs or {}))


def drawn_by_torch(x, p):
    with Drawn() as drawn:
        out = dropout(x, p)
    assert out.shape == x.shape
    assert out.dtype == x.dtype
    return drawn.count


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(5, 16), (2, 3, 16), (7,), (2, 0, 16), (3, 0)])
def test_decisions_are_those_of_the_generator(shape, dtype):
    x = torch.randn(shape, dtype=dtype)
    assert drawn_by_torch(x, 0.3) == 0
    torch.manual_seed(7)
    out = dropout(x, 0.3)
    torch.manual_seed(7)
    rows = x.numel() // shape[-1] if shape[-1] else 0
    place = torch.zeros((), dtype=torch.int64), torch.arange(rows)[:, None], torch.arange(shape[-1])
    keep = keep_mask(new_seed(x.device), 0.3, *place).reshape(shape)
    assert torch.equal(out, torch.where(keep, x * (1 / 0.7), 0))


@compiled
def test_gradients_drop_what_the_output_does():
    x = torch.randn(4, 5, 8, requires_grad=True, dtype=torch.float64)

    def seeded(x):
        torch.manual_seed(3)
        return dropout(x, 0.4)

    assert torch.autograd.gradcheck(seeded, x)
    assert torch.autograd.gradgradcheck(seeded, x)
    (expected,) = torch.autograd.grad(seeded(x).square().sum(), x)
    assert torch.equal(torch.func.grad(lambda x: seeded(x).square().sum())(x.detach()), expected)
    permuted = torch.randn(8, 5, 4, dtype=torch.float64).permute(2, 1, 0).requires_grad_()
    assert torch.equal(seeded(permuted), seeded(permuted.contiguous()))


@compiled
def test_backward_keeps_the_seed_alone():
    kept = []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda tensor: tensor):
        dropout(torch.randn(40, 50, requires_grad=True), 0.1)
    assert kept == [1]


@compiled
def test_every_call_draws_anew_and_torchs_seed_repeats_it():
    x = torch.ones(60, 70)
    torch.manual_seed(3)
    first, second = dropout(x, 0.5), dropout(x, 0.5)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(dropout(x, 0.5), first)


@compiled
def test_features_as_wide_as_those_of_a_feed_forward_block_keep_their_mean():
    kept = (dropout(torch.ones(2000, 2048), 0.1) != 0).double()
    for dims in ((0, 1), (0,), (1,)):
        rate = kept.mean(dim=dims)
        deviation = (0.1 * 0.9 / (kept.numel() / rate.numel())) ** 0.5
        assert ((rate - 0.9).abs() < 5 * deviation).all()
    products = (kept - 0.9).mT @ (kept - 0.9) / (0.09 * 2000**0.5)
    assert products.triu(1).abs().max() < 7  # no two channels share a pattern


def test_torchs_own_elsewhere(monkeypatch):
    x = torch.randn(6, 8)
    assert drawn_by_torch(x.bfloat16(), 0.5) == 1  # as its kernel for CPUs knows no half types
    assert torch.equal(dropout(x, 0.0), x)
    assert torch.equal(dropout(x, 1.0), torch.zeros_like(x))
    monkeypatch.setattr(_dropout, "has_kernel", lambda *_: False)
    assert drawn_by_torch(x, 0.5) == 1
    torch.manual_seed(5)
    out = dropout(x, 0.5)
    torch.manual_seed(5)
    assert torch.equal(out, F.dropout(x, 0.5))
    with pytest.raises(ValueError, match="probability"):
        dropout(x, 1.5)


def test_a_compiler_gets_torchs_own():
    x = torch.randn(6, 8)
    compiled_dropout = torch.compile(lambda x: dropout(x, 0.5), fullgraph=True, backend="aot_eager")
    torch.manual_seed(5)
    out = compiled_dropout(x)
    torch.manual_seed(5)
    assert torch.equal(out, F.dropout(x, 0.5))
