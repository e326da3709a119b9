"""The slot of LibreYOLO: its contract by a stand-in, and LibreYOLO itself where it is installed."""

import sys
import types

import pytest
import torch

from groupdetr_fast.integrations import libreyolo as integration
from groupdetr_fast.integrations.libreyolo import register_kernels, unregister_kernels
from groupdetr_fast.ops.ms_deform_attn.reference import ms_deform_attn_reference

SHAPES = [(5, 7), (3, 4), (1, 2)]
compiled = pytest.mark.skipif(not integration.DEVICES, reason="no compiled kernel of ms_deform_attn")


def arguments(dtype=torch.float32, batch=2, requires_grad=False):
    """Value, sizes, locations and weights as LibreYOLO passes them."""
    generator = torch.Generator().manual_seed(0)
    pixels = sum(height * width for height, width in SHAPES)
    value = torch.randn(batch, pixels, 4, 8, generator=generator).to(dtype)
    locations = torch.rand(batch, 6, 4, len(SHAPES), 3, 2, generator=generator) * 1.4 - 0.2
    weights = torch.randn(batch, 6, 4, len(SHAPES) * 3, generator=generator).softmax(-1).unflatten(-1, (-1, 3))
    for tensor in (value, locations, weights):
        tensor.requires_grad_(requires_grad)
    return value, torch.tensor(SHAPES), locations, weights


class StandIn(types.ModuleType):
    """The registry's contract: the newest first, what it resolved is kept, its own register on the first use."""

    def __init__(self):
        super().__init__("libreyolo.kernels")
        self.entries, self.resolved, self.loaded = {}, {}, False

    def register(self, op, impl, *, name, predicate=None):
        self.entries.setdefault(op, []).insert(0, (name, impl, predicate))
        self.resolved.pop(op, None)

    def unregister(self, op, name):
        self.entries[op] = [entry for entry in self.entries.get(op, []) if entry[0] != name]

    def clear_cache(self):
        self.resolved.clear()

    def resolve(self, op):
        if not self.loaded:
            self.loaded = True
            self.register(op, self.own, name="hub")
        if op not in self.resolved:
            eligible = [impl for _, impl, predicate in self.entries[op] if predicate is None or predicate()]
            self.resolved[op] = eligible[0] if eligible else None
        return self.resolved[op]

    @staticmethod
    def own(value, spatial_shapes, locations, weights):
        return None


@pytest.fixture
def stand_in(monkeypatch):
    registry, package = StandIn(), types.ModuleType("libreyolo")
    package.kernels = registry
    monkeypatch.setitem(sys.modules, "libreyolo", package)
    monkeypatch.setitem(sys.modules, "libreyolo.kernels", registry)
    return registry


@compiled
def test_ours_is_preferred_and_can_be_taken_back(stand_in):
    register_kernels()
    register_kernels()
    assert [name for name, *_ in stand_in.entries["ms_deform_attn"]] == ["groupdetr_fast", "hub"]
    assert stand_in.resolve("ms_deform_attn") is integration._ms_deform_attn
    unregister_kernels()
    assert stand_in.resolve("ms_deform_attn") is stand_in.own
    unregister_kernels()


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_results_and_gradients_are_those_of_the_reference(stand_in, dtype):
    register_kernels()
    slot = stand_in.resolve("ms_deform_attn")
    given, expected = arguments(dtype, requires_grad=True), arguments(dtype, requires_grad=True)
    out = slot(*given)
    assert out.dtype == dtype
    judge = ms_deform_attn_reference(
        expected[0].float(), [size for shape in SHAPES for size in shape], expected[2], expected[3]
    )
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    torch.testing.assert_close(out.float(), judge, **tolerance)
    weighting = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (out.float() * weighting).sum().backward()
    (judge * weighting).sum().backward()
    for index in (0, 2, 3):
        torch.testing.assert_close(given[index].grad.float(), expected[index].grad.float(), **tolerance)


@compiled
def test_autocast_mixes_types(stand_in):
    """Half values beside float32 weights, and half locations beside float32 values."""
    register_kernels()
    slot = stand_in.resolve("ms_deform_attn")
    value, shapes, locations, weights = arguments()
    exact = slot(value, shapes, locations, weights)
    assert slot(value.half(), shapes, locations, weights).dtype == torch.float16
    mixed = slot(value, shapes, locations.bfloat16(), weights.half())
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(
        mixed, slot(value, shapes, locations.bfloat16().float(), weights.half().float()), rtol=0, atol=0
    )
    assert not torch.equal(mixed, exact)


@compiled
def test_sizes_are_read_again_when_they_change():
    value, shapes, locations, weights = arguments()
    integration._ms_deform_attn(value, shapes, locations, weights)
    shapes[0] = torch.tensor([7, 5])
    changed = integration._ms_deform_attn(value, shapes, locations, weights)
    torch.testing.assert_close(
        changed, integration._ms_deform_attn(value, [(7, 5), *SHAPES[1:]], locations, weights), rtol=0, atol=0
    )
    with torch.inference_mode():  # whose tensors have no version
        shapes = torch.tensor(SHAPES)
        first = integration._ms_deform_attn(value, shapes, locations, weights)
        shapes[0] = torch.tensor([7, 5])
        assert not torch.equal(first, integration._ms_deform_attn(value, shapes, locations, weights))


def test_devices_without_a_kernel_are_left_to_libreyolo():
    assert integration._ms_deform_attn(*(tensor.to("meta") for tensor in arguments())) is None


def test_without_libreyolo_one_sentence_says_what_is_needed(monkeypatch):
    monkeypatch.setitem(sys.modules, "libreyolo", None)
    for function in (register_kernels, unregister_kernels):
        with pytest.raises(ImportError, match=r"needs libreyolo 1\.6 or newer"):
            function()


@pytest.fixture
def libreyolo_kernels(monkeypatch):
    kernels = pytest.importorskip("libreyolo.kernels", reason="libreyolo is not installed")
    monkeypatch.delenv("LIBREYOLO_KERNELS", raising=False)
    monkeypatch.delenv("LIBREYOLO_QUANT_KERNELS", raising=False)
    register_kernels()
    yield kernels
    unregister_kernels()
    assert "groupdetr_fast" not in kernels.active().values()


def count_calls(monkeypatch):
    """A list that gets an entry at every call of the op."""
    calls, op = [], integration.ops.ms_deform_attn
    monkeypatch.setattr(integration.ops, "ms_deform_attn", lambda *args: calls.append(1) or op(*args))
    return calls


@compiled
@pytest.mark.parametrize("family", ["deformable_detr.ms_deform_attn", "lwdetr.nn"])
def test_libreyolos_own_reference(libreyolo_kernels, family, monkeypatch):
    """LibreYOLO's function with the slot and without, and every gradient."""
    module = pytest.importorskip(f"libreyolo.models.{family}")
    assert libreyolo_kernels.active()["ms_deform_attn"] == "groupdetr_fast"
    calls, results = count_calls(monkeypatch), []
    for choice in ("groupdetr_fast", "off"):
        monkeypatch.setenv("LIBREYOLO_KERNELS", choice)
        value, shapes, locations, weights = arguments(requires_grad=True)
        given = value
        if family == "lwdetr.nn":
            given, shapes = value.permute(0, 2, 3, 1), SHAPES
        out = module.ms_deform_attn_core_pytorch(given, shapes, locations, weights)
        weighting = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        results.append([out, *torch.autograd.grad((out * weighting).sum(), (value, locations, weights))])
    assert len(calls) == 1
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@compiled
def test_a_layer_of_libreyolo(libreyolo_kernels, monkeypatch):
    """A whole layer of its LW-DETR: the slot is asked, and gradients of its weights agree."""
    module = pytest.importorskip("libreyolo.models.lwdetr.nn")
    torch.manual_seed(0)
    layer = module.MSDeformAttn(32, n_levels=3, n_heads=4, n_points=2)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    query, memory, reference = torch.randn(2, 6, 32), torch.randn(2, 49, 32), torch.rand(2, 6, 1, 4) * 0.5 + 0.25
    calls, results = count_calls(monkeypatch), []
    for choice in ("groupdetr_fast", "off"):
        monkeypatch.setenv("LIBREYOLO_KERNELS", choice)
        out = layer(query, reference, memory, SHAPES)
        results.append([out, *torch.autograd.grad(out.square().sum(), list(layer.parameters()))])
    assert len(calls) == 1
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
