import math
import os
import subprocess
import sys

import pytest
import torch
from deformable_cases import EMPTY

from groupdetr_fast.ops import ms_deform_attn
from groupdetr_fast.ops.ms_deform_attn.reference import ms_deform_attn_backward_reference, ms_deform_attn_reference
from groupdetr_fast.testing import assert_matches_reference, poisoned_memory
from groupdetr_fast.testing import ms_deform_attn_inputs as make_inputs

OP = torch.ops.groupdetr_fast.ms_deform_attn
OP_BACKWARD = torch.ops.groupdetr_fast.ms_deform_attn_backward


class RecordFlags(torch.utils._python_dispatch.TorchDispatchMode):
    """Keeps the last argument of each call of the backward op; one that is left out has its default."""

    def __init__(self, flags):
        super().__init__()
        self._flags = flags

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op is OP_BACKWARD.default:
            self._flags.append(args[5] if len(args) > 5 else False)
        return op(*args, **(kwargs or {}))


def pairs(flat):
    return list(zip(flat[::2], flat[1::2], strict=True))


CASES = {
    "plain": {},
    "one_of_everything": {"batch": 1, "queries": 1, "heads": 1, "dim": 1, "shapes": ((1, 1),), "points": 1},
    "encoder_like": {"queries": 37, "heads": 4, "dim": 32, "shapes": ((5, 7), (3, 4), (2, 2), (1, 1)), "points": 4},
    "odd_dim": {"dim": 30, "points": 5},
    "dim_71": {"dim": 71, "batch": 1},
    "dim_4": {"dim": 4, "points": 1},
    "wide_dim": {"dim": 1025, "batch": 1, "queries": 2},
    "six_levels_nine_points": {"shapes": ((4, 3), (1, 5), (2, 2), (3, 1), (1, 1), (7, 2)), "points": 9, "queries": 3},
    "empty_levels": {"shapes": ((0, 3), (4, 6), (2, 0), (3, 2), (0, 0))},
    "long_batch": {"batch": 67, "queries": 3, "heads": 1},
}
DTYPES = {
    "float64": (torch.float64, torch.float64),
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.float32),
    "float16": (torch.float16, torch.float32),
    "all_bfloat16": (torch.bfloat16, torch.bfloat16),
    "float64_value_only": (torch.float64, torch.float32),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtypes", DTYPES)
def test_matches_reference(case, dtypes, device):
    dtype, location_dtype = DTYPES[dtypes]
    inputs = make_inputs(device, **CASES[case], dtype=dtype, location_dtype=location_dtype)
    with poisoned_memory():
        out = OP(*inputs)
        grad = torch.randn_like(out)
        grads = OP_BACKWARD(grad, *inputs)
    assert_matches_reference(out, ms_deform_attn_reference, *inputs)
    for index, actual in enumerate(grads):
        assert_matches_reference(
            actual, lambda *args, i=index: ms_deform_attn_backward_reference(*args)[i], grad, *inputs
        )


@pytest.mark.parametrize("case", EMPTY)
def test_empty_sizes(case, device):
    value, flat, locations, weights = make_inputs(device, **EMPTY[case])
    with poisoned_memory():
        out = OP(value, flat, locations, weights)
        grads = OP_BACKWARD(torch.ones_like(out), value, flat, locations, weights)
    assert torch.equal(
        out, torch.zeros(value.shape[0], locations.shape[1], value.shape[2] * value.shape[3], device=device)
    )
    for grad, tensor in zip(grads, (value, locations, weights), strict=True):
        assert torch.equal(grad, torch.zeros_like(tensor))
    assert torch.equal(ms_deform_attn_reference(value, flat, locations, weights), out)


def bilinear_loop(value, flat, locations, weights):
    """The definition, written as loops over numbers."""
    batch, _, heads, dim = value.shape
    _, queries, _, levels, points, _ = locations.shape
    out = torch.zeros(batch, queries, heads, dim, dtype=torch.float64)
    starts = [sum(h * w for h, w in pairs(flat)[:level]) for level in range(levels)]
    for b, q, m, level, p in torch.cartesian_prod(
        *(torch.arange(n) for n in (batch, queries, heads, levels, points))
    ).tolist():
        h, w = pairs(flat)[level]
        x = locations[b, q, m, level, p, 0].item() * w - 0.5
        y = locations[b, q, m, level, p, 1].item() * h - 0.5
        for row in (math.floor(y), math.floor(y) + 1):
            for column in (math.floor(x), math.floor(x) + 1):
                if 0 <= row < h and 0 <= column < w:
                    share = (1 - abs(y - row)) * (1 - abs(x - column))
                    pixel = value[b, starts[level] + row * w + column, m]
                    out[b, q, m] += weights[b, q, m, level, p] * share * pixel
    return out.flatten(2)


def test_op_and_reference_equal_the_definition(device):
    sizes = {"dtype": torch.float64, "shapes": ((4, 6), (1, 3), (2, 1))}
    expected = bilinear_loop(*make_inputs("cpu", **sizes))
    inputs = make_inputs(device, **sizes)
    torch.testing.assert_close(OP(*inputs).cpu(), expected)
    torch.testing.assert_close(ms_deform_attn_reference(*inputs).cpu(), expected)


def test_equals_transformers(device):
    modeling = pytest.importorskip("transformers.models.deformable_detr.modeling_deformable_detr")
    value, flat, locations, weights = make_inputs(device, heads=4, dim=16, points=4)
    theirs = modeling.MultiScaleDeformableAttention()(
        value, torch.tensor(pairs(flat)), pairs(flat), None, locations, weights, None
    )
    torch.testing.assert_close(ms_deform_attn(value, pairs(flat), locations, weights), theirs)


def test_a_sample_at_a_pixel_centre_is_that_pixel_and_its_gradient_goes_there(device):
    value = torch.arange(6.0, device=device).view(1, 6, 1, 1).requires_grad_()  # a 2 x 3 map
    locations = torch.tensor([(2 + 0.5) / 3, (1 + 0.5) / 2], device=device).view(1, 1, 1, 1, 1, 2)
    out = ms_deform_attn(value, [(2, 3)], locations, torch.full((1, 1, 1, 1, 1), 2.0, device=device))
    torch.testing.assert_close(out, torch.full((1, 1, 1), 10.0, device=device))
    out.sum().backward()
    torch.testing.assert_close(value.grad.flatten(), torch.tensor([0.0, 0, 0, 0, 0, 2], device=device))


def test_location_gradient_is_the_slope_of_a_ramp_times_width(device):
    h, w = 3, 5
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    value = (2.0 * x + 7.0 * y).view(1, h * w, 1, 1).to(device)
    locations = torch.tensor([0.53, 0.41], device=device).view(1, 1, 1, 1, 1, 2).requires_grad_()
    weights = torch.full((1, 1, 1, 1, 1), 3.0, device=device)
    ms_deform_attn(value, [(h, w)], locations, weights).sum().backward()
    torch.testing.assert_close(locations.grad.flatten(), torch.tensor([3 * 2.0 * w, 3 * 7.0 * h], device=device))


@pytest.mark.parametrize("dim", [1, 4, 30, 32])
def test_gradcheck(dim, device):
    value, flat, locations, weights = make_inputs(device, batch=2, queries=2, dim=dim, points=2, dtype=torch.float64)
    # Away from pixel centres, where the derivative jumps.
    sizes = torch.tensor([(w, h) for h, w in pairs(flat)], device=device).view(1, 1, 1, -1, 1, 2)
    pixels = locations * sizes - 0.5
    locations = (pixels.floor() + 0.2 + 0.6 * (pixels - pixels.floor()) + 0.5) / sizes
    inputs = [tensor.requires_grad_() for tensor in (value, locations, weights)]
    assert torch.autograd.gradcheck(lambda v, loc, w: ms_deform_attn(v, pairs(flat), loc, w), inputs)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30, -1e30, 3e9, 25.0])
def test_samples_that_touch_no_pixel_count_nothing(bad, device):
    value, flat, locations, weights = make_inputs(device, dtype=torch.float64)
    locations[:, :, :, :, 0, 0] = bad
    locations[:, :, :, :, 1, 1] = bad
    out = OP(value, flat, locations, weights)
    torch.testing.assert_close(out, OP(value, flat, locations[..., 2:, :], weights[..., 2:].contiguous()))
    torch.testing.assert_close(out, ms_deform_attn_reference(value, flat, locations, weights))
    for grads in (
        f(torch.ones_like(out), value, flat, locations, weights)
        for f in (OP_BACKWARD, ms_deform_attn_backward_reference)
    ):
        assert all(torch.isfinite(grad).all() for grad in grads)
        assert (grads[1][..., :2, :] == 0).all()
        assert (grads[2][..., :2] == 0).all()
        assert (grads[2][..., 2] != 0).any()


@pytest.mark.parametrize("pixel", [-1.0, -0.5, 0.0, 2.5, 3.0, 3.5, 4.0])
def test_samples_on_edges(pixel, device):
    value, flat, locations, weights = make_inputs(device, shapes=((4, 4),), dtype=torch.float64)
    locations.fill_((pixel + 0.5) / 4)
    inputs = (value, flat, locations, weights)
    torch.testing.assert_close(
        OP(*inputs).cpu(), bilinear_loop(*(t.cpu() if torch.is_tensor(t) else t for t in inputs))
    )
    grad = torch.randn_like(OP(*inputs))
    for actual, expected in zip(
        OP_BACKWARD(grad, *inputs), ms_deform_attn_backward_reference(grad, *inputs), strict=True
    ):
        if (
            0 <= pixel < 3 or expected.shape != locations.shape
        ):  # grid_sample takes another one-sided slope at the border
            torch.testing.assert_close(actual, expected)


def test_a_pixel_that_no_sample_touches_is_not_read(device):
    value, flat, locations, weights = make_inputs(device, shapes=((4, 6),), dtype=torch.float64)
    locations = 0.5 / 6 + 0.2 * torch.rand_like(locations)
    touched = OP_BACKWARD(torch.ones(2, 5, 16, dtype=torch.float64, device=device), value, flat, locations, weights)[0]
    expected = OP(value, flat, locations, weights)
    value[:, (touched == 0).all(dim=(0, 2, 3)).nonzero().flatten()] = math.nan
    assert value.isnan().any()
    assert torch.equal(OP(value, flat, locations, weights), expected)


def test_images_and_heads_do_not_leak(device):
    value, flat, locations, weights = make_inputs(device, heads=3)
    value.requires_grad_()
    out = ms_deform_attn(value, pairs(flat), locations, weights).view(2, 5, 3, 8)
    (grad,) = torch.autograd.grad(out[1, :, 2].sum(), value)
    assert (grad[1, :, 2] != 0).any()
    grad[1, :, 2] = 0
    assert (grad == 0).all()


def permuted(tensor):
    """The same numbers, dense, in another order in memory."""
    return tensor.permute(*reversed(range(tensor.dim()))).contiguous().permute(*reversed(range(tensor.dim())))


def test_layout_does_not_matter(device):
    value, flat, locations, weights = make_inputs(device)
    out = OP(value, flat, locations, weights)
    grad = torch.randn_like(out)
    grads = OP_BACKWARD(grad, value, flat, locations, weights)
    inputs = permuted(value), flat, permuted(locations), permuted(weights)
    assert not inputs[0].is_contiguous()
    assert torch.equal(OP(*inputs), out)
    for actual, expected in zip(OP_BACKWARD(permuted(grad), *inputs), grads, strict=True):
        assert torch.equal(actual, expected)
    sliced = torch.stack([value, value], dim=-1)[..., 1]
    assert torch.equal(OP(sliced, flat, locations, weights), out)
    expanded = torch.ones(1, 1, 1, device=device).expand(out.shape)
    for actual, expected in zip(
        OP_BACKWARD(expanded, *inputs), OP_BACKWARD(expanded.contiguous(), *inputs), strict=True
    ):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("layout", ["contiguous", "permuted"])
@pytest.mark.parametrize("dtypes", ["float32", "bfloat16"])
def test_opcheck(layout, dtypes, device):
    dtype, location_dtype = DTYPES[dtypes]
    value, flat, locations, weights = make_inputs(device, dtype=dtype, location_dtype=location_dtype)
    if layout == "permuted":
        value, locations, weights = (permuted(tensor) for tensor in (value, locations, weights))
    grad = torch.randn_like(OP(value, flat, locations, weights))
    torch.library.opcheck(OP_BACKWARD, (grad, value, flat, locations, weights))
    inputs = [tensor.requires_grad_() for tensor in (value, locations, weights)]
    torch.library.opcheck(OP, (inputs[0], flat, *inputs[1:]))


def test_compiles_to_one_graph(device):
    value, flat, locations, weights = make_inputs(device)
    inputs = [tensor.requires_grad_() for tensor in (value, locations, weights)]
    run = torch.compile(
        lambda v, loc, w: ms_deform_attn(v, pairs(flat), loc, w).square().sum(), fullgraph=True, backend="aot_eager"
    )
    eager = ms_deform_attn(value, pairs(flat), locations, weights).square().sum()
    torch.testing.assert_close(run(*inputs), eager)
    for actual, expected in zip(
        torch.autograd.grad(run(*inputs), inputs), torch.autograd.grad(eager, inputs), strict=True
    ):
        torch.testing.assert_close(actual, expected)


def test_double_backward_is_refused(device):
    value, flat, locations, weights = make_inputs(device)
    value.requires_grad_()
    out = ms_deform_attn(value, pairs(flat), locations, weights)
    (grad,) = torch.autograd.grad(out.square().sum(), value, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        grad.sum().backward()


def test_backward_asks_for_the_deterministic_kernel_where_torch_does(device):
    value, flat, locations, weights = make_inputs(device)
    value.requires_grad_()
    seen = []
    with RecordFlags(seen):
        for enabled in (False, True):
            torch.use_deterministic_algorithms(enabled)
            try:
                ms_deform_attn(value, pairs(flat), locations, weights).sum().backward()
            finally:
                torch.use_deterministic_algorithms(False)
    assert seen == [False, True]


def test_autocast_does_not_lower_the_precision(device):
    inputs = make_inputs(device)
    with torch.autocast(device.type, torch.bfloat16):
        out = OP(*inputs)
    assert torch.equal(out, OP(*inputs))


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize(("batch", "heads"), [(2, 8), (1, 1), (1, 3)])
def test_thread_count(threads, batch, heads):
    inputs = make_inputs(batch=batch, heads=heads, queries=403, dim=32)
    results = []
    for count in (1, 2, 2, 4):
        threads(count)
        out = OP(*inputs)
        results.append((out, *OP_BACKWARD(torch.ones_like(out), *inputs)))
    for result in results:
        for actual, expected in zip(result, results[0], strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)
        assert torch.equal(result[0], results[0][0])
    assert all(torch.equal(first, second) for first, second in zip(results[1], results[2], strict=True))
    if batch * heads >= 4:
        assert all(torch.equal(first, last) for first, last in zip(results[0], results[3], strict=True))


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_other_instruction_sets(capability):
    """The kernel chooses its instruction set once per process: run a few cases in another process."""
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    chosen = "test_matches_reference and cpu and (encoder_like or odd_dim) and (float32 or float64)"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, __file__]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"value": torch.zeros(2, 30, 16)}, ValueError, r"value must have shape \[B, S, H, D\], got \[2, 30, 16\]"),
        (
            {"value": torch.zeros(2, 29, 2, 8)},
            ValueError,
            r"value must have shape \[B, 30, H, D\] .* got \[2, 29, 2, 8\]",
        ),
        ({"value": torch.zeros(2, 30, 2, 8).int()}, TypeError, "value must be float32.* got torch.int32"),
        ({"spatial_shapes": [(4, 6), (3, 2, 1)]}, ValueError, "spatial_shapes must hold"),
        ({"spatial_shapes": [(-4, -6), (3, 2)]}, ValueError, "spatial_shapes must hold"),
        ({"sampling_locations": torch.zeros(2, 5, 2, 2, 3, 3)}, ValueError, "sampling_locations must have shape"),
        ({"sampling_locations": torch.zeros(2, 4, 2, 2, 3, 2)}, ValueError, "sampling_locations must have shape"),
        (
            {"sampling_locations": torch.zeros(2, 5, 2, 2, 3, 2).double()},
            TypeError,
            "sampling_locations must be float32",
        ),
        ({"attention_weights": torch.zeros(2, 5, 2, 1, 3)}, ValueError, r"attention_weights .* \[2, Lq, 2, 2, P\]"),
        ({"attention_weights": torch.zeros(2, 5, 2, 2, 3).half()}, TypeError, "attention_weights must be float32"),
        ({"attention_weights": torch.zeros(2, 5, 2, 2, 3, device="meta")}, ValueError, "attention_weights must lie on"),
    ],
)
def test_errors(change, error, message):
    value, flat, locations, weights = make_inputs()
    arguments = {
        "value": value,
        "spatial_shapes": pairs(flat),
        "sampling_locations": locations,
        "attention_weights": weights,
    }
    with pytest.raises(error, match=message):
        ms_deform_attn(**{**arguments, **change})


def test_kernel_checks_what_it_indexes_with():
    value, flat, locations, weights = make_inputs()
    with pytest.raises(RuntimeError, match="one row per pixel"):
        OP(value, [4, 6, 3, 3], locations, weights)
    with pytest.raises(RuntimeError, match="two numbers per level"):
        OP(value, [30, 1], locations, weights)
    with pytest.raises(RuntimeError, match=r"at most 2\^31 - 1 rows"):  # whose products and sum overflow to 30
        OP(value, [2**32, 2**32, 5, 6], locations, weights)
    with pytest.raises(RuntimeError, match="the shape of weights"):
        OP(value, flat, locations[:, :4], weights)
    with pytest.raises(RuntimeError, match="shape of the result"):
        OP_BACKWARD(torch.zeros(2, 5, 8), value, flat, locations, weights)


def test_gradients_of_a_single_image_reach_its_batch_norm(device):
    """They are those of the same image twice, where the values are maps as they come out of a batch norm.

    torch's batch norm permutes some layouts of the gradient of a single image (torch 2.14.1).
    """
    shapes, heads, dim = [(4, 5), (2, 3)], 2, 4
    norm = torch.nn.BatchNorm2d(heads * dim).to(device, torch.float64)
    sizes = [*((heads * dim, *shape) for shape in shapes), (6, heads, 2, 3, 2), (6, heads, 2, 3), (6, heads * dim)]
    *inputs, grad = (torch.rand(1, *size, device=device, dtype=torch.float64) for size in sizes)

    def gradients(images):
        *maps, locations, weights = (x.repeat(images, *[1] * (x.dim() - 1)) for x in inputs)
        value = torch.cat([norm(x).flatten(2).transpose(1, 2) for x in maps], dim=1).unflatten(-1, (heads, dim))
        out = ms_deform_attn(value, shapes, locations, weights)
        return torch.autograd.grad((out * grad).sum() / images, tuple(norm.parameters()))

    torch.testing.assert_close(gradients(1), gradients(2), rtol=1e-9, atol=1e-12)
