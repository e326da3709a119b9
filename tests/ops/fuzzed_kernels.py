"""Calls the C++ kernels with random arguments. Arguments: seed of the first case, number of cases.

Prints the seed of each case before it runs: the last one is that of a crash.
"""

import random
import sys

import torch

from groupdetr_fast import ops  # noqa: F401 (defines the operators)

OPS = torch.ops.groupdetr_fast
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# Around the lengths of vectors and buffers of the kernels.
SIZES = (0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 40, 63, 64, 65)
INT64 = torch.iinfo(torch.int64)
SPECIAL = (0.0, -0.0, 1.0, float("nan"), float("inf"), -float("inf"), 1e-45, 3.4e38, -3.4e38, 1e30, 2.0**31, 2.0**63)


class Case:
    def __init__(self, seed):
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def chance(self, probability):
        return self.random.random() < probability

    def size(self, largest=65):
        return self.random.choice([size for size in SIZES if size <= largest])

    def leading(self, most=3):
        return [self.random.choice((0, 1, 1, 2, 3)) for _ in range(self.random.randrange(most + 1))]

    def floats(self, shape, dtype=None):
        """Numbers of any kind, in memory that ends with the last of them, with any strides."""
        dtype = dtype or self.random.choice(FLOATS)
        scale = self.random.choice((1.0, 1.0, 1e-3, 1e6))
        values = torch.randn(shape, generator=self.generator, dtype=torch.float64) * scale
        if self.chance(0.3):
            values = values.round()  # ties
        if self.chance(0.4):
            special = torch.tensor(SPECIAL, dtype=torch.float64)
            drawn = special[torch.randint(len(SPECIAL), values.shape, generator=self.generator)]
            values = torch.where(torch.rand(values.shape, generator=self.generator) < 0.2, drawn, values)
        return self.laid_out(values.to(dtype))

    def integers(self, shape, low, high):
        values = torch.randint(low, high, shape, generator=self.generator)
        if self.chance(0.3):
            special = torch.tensor([INT64.min, INT64.max, -1, -2, -3, 0, 2**31, 2**32])
            drawn = special[torch.randint(len(special), values.shape, generator=self.generator)]
            values = torch.where(torch.rand(values.shape, generator=self.generator) < 0.3, drawn, values)
        return self.laid_out(values)

    def laid_out(self, values):
        """The same numbers in another layout: dense, permuted, sliced with steps, or one number everywhere."""
        kind = self.random.randrange(4)
        if kind == 1:
            order = list(range(values.dim()))
            self.random.shuffle(order)
            back = sorted(range(len(order)), key=order.__getitem__)
            return values.permute(order).contiguous().permute(back)
        if kind == 2 and values.dim():
            step = self.random.choice((2, 3))
            wide = values.new_full([max(step * size - self.random.randrange(step), 0) for size in values.shape], -7)
            part = wide[tuple(slice(None, None, step) for _ in values.shape)]
            part.copy_(values)
            return part
        if kind == 3 and values.numel():
            return values.flatten()[0].clone().expand(values.shape)
        return values.clone()


def linear_assignment(case):
    leading, targets, queries = case.leading(), case.size(33), case.size()
    dtype = case.random.choice((torch.float32, torch.float64))
    cost, wanted = case.floats([*leading, targets, queries], dtype), case.integers(leading, -2, targets + 3)
    found = OPS.linear_assignment(cost, wanted)
    assert found.shape == (*leading, targets)
    problems = found.reshape(wanted.numel(), targets)
    for own, number in zip(problems, wanted.reshape(-1).clamp(0, targets).tolist(), strict=True):
        assigned = own[own >= 0]
        assert len(assigned) == min(number, queries) == len(assigned.unique())
        assert (own[number:] == -1).all()
        assert (own < queries).all()


def ms_deform_attn(case):
    shapes = [(case.size(9), case.size(9)) for _ in range(case.random.randrange(5))]
    pixels = sum(height * width for height, width in shapes)
    images, heads, queries, points = (case.random.choice((0, 1, 2, 3)) for _ in range(4))
    channels = case.size()
    flat = [size for shape in shapes for size in shape]
    value = case.floats([images, pixels, heads, channels])
    samples = [images, queries, heads, len(shapes), points]
    places, weights = case.floats([*samples, 2]), case.floats(samples)
    if case.chance(0.5):
        places = case.laid_out((torch.rand(places.shape, generator=case.generator) * 1.2 - 0.1).to(places.dtype))
    out = OPS.ms_deform_attn(value, flat, places, weights)
    assert out.shape == (images, queries, heads * channels)
    grads = OPS.ms_deform_attn_backward(case.floats(list(out.shape)), value, flat, places, weights)
    assert [grad.shape for grad in grads] == [value.shape, places.shape, weights.shape]


def sigmoid_focal_loss(case):
    classes = case.random.choice((case.size(), 2047, 2048, 2049, 4100))  # the buffer has 2048 numbers
    shape = [*case.leading(), case.size(33 if classes < 100 else 3), classes]
    logits, classes_of = case.floats(shape), case.integers(shape[:-1], -2, shape[-1] + 2)
    gamma = case.random.choice((2.0, 2.0, 0.0, 1.5))
    loss = OPS.sigmoid_focal_loss(logits, classes_of, 0.25, gamma)
    assert loss.shape == tuple(shape[:-2])
    grads = OPS.sigmoid_focal_loss_backward(case.floats(list(loss.shape), loss.dtype), logits, classes_of, 0.25, gamma)
    assert grads.shape == logits.shape


def matching_cost(case):
    images, queries, classes, targets = case.random.choice((0, 1, 2)), case.size(), case.size(), case.size(17)
    leading = [*case.leading(2), images]
    logits = case.floats([*leading, queries, classes])
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    cost = OPS.matching_cost(
        logits,
        case.floats([*leading, queries, 4], dtype),
        case.integers([images, targets], -1, classes + 1),
        case.floats([images, targets, 4], dtype),
        case.integers([images], -1, targets + 2),
        *(2.0, 5.0, 2.0, 0.25, case.random.choice((2.0, 1.0))),
    )
    assert cost.shape == (*leading, targets, queries)


def attention_dropout(case):
    shape = [case.random.choice((0, 1, 2)), case.random.choice((1, 2)), case.size(9), case.size()]
    origins = [case.random.choice((0, 1, 2**31 - 1, 2**40)) for _ in range(3 * shape[0])]
    dtype = case.random.choice((torch.float32, torch.float64))
    seed = case.integers([1], 0, 9)
    out = OPS.attention_dropout(case.floats(shape, dtype), seed, case.random.choice((0.0, 0.1, 0.999)), origins)
    assert out.shape == tuple(shape)


def refused(case):
    """Arguments that do not fit, which end in torch's RuntimeError."""
    dtype = torch.float32
    huge = case.random.choice(([2**33, 2**33], [2**32, 2**32, 1, 4], [2**63 - 1, 2**63 - 1], [2**31, 2], [-1, -4]))
    levels = len(huge) // 2
    attempts = [
        lambda: OPS.ms_deform_attn(
            case.floats([1, 4, 1, 8], dtype), huge, torch.rand(1, 1, 1, levels, 1, 2), torch.rand(1, 1, 1, levels, 1)
        ),
        lambda: OPS.linear_assignment(case.floats([2, 3, 4], torch.float32), case.integers([3], 0, 3)),
        lambda: OPS.linear_assignment(case.floats([2, 3, 4], torch.float16), case.integers([2], 0, 3)),
        lambda: OPS.linear_assignment(case.floats([4], dtype), case.integers([], 0, 3)),
        lambda: OPS.sigmoid_focal_loss(case.floats([4, 3], dtype), case.integers([5], 0, 3), 0.25, 2.0),
        lambda: OPS.sigmoid_focal_loss(case.integers([4, 3], 0, 3), case.integers([4], 0, 3), 0.25, 2.0),
        lambda: OPS.sigmoid_focal_loss(case.floats([4, 3], dtype), case.integers([4], 0, 3).int(), 0.25, 2.0),
        lambda: OPS.attention_dropout(case.floats([1, 1, 2, 3], torch.float16), torch.tensor([1]), 0.1, [0, 0, 0]),
        lambda: OPS.attention_dropout(case.floats([1, 1, 2, 3], dtype), torch.tensor([1]), 0.1, [0]),
    ]
    for attempt in attempts:
        try:
            attempt()
        except RuntimeError:
            continue
        raise AssertionError(f"attempt {attempts.index(attempt)} was accepted")


def main():
    first, count = map(int, sys.argv[1:])
    torch.set_num_threads(2)
    kernels = (linear_assignment, ms_deform_attn, sigmoid_focal_loss, matching_cost, attention_dropout, refused)
    for seed in range(first, first + count):
        run = kernels[seed % len(kernels)]
        print(run.__name__, seed, flush=True)
        run(Case(seed))


if __name__ == "__main__":
    main()
