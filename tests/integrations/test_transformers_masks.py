"""Matching and mask losses of transformers' universal segmenters, against their own."""

import copy
import pickle

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("transformers", minversion="5.23", reason="accelerate leaves older transformers alone")

from test_transformers_acceleration import assert_same_step, step  # noqa: E402
from tiny_transformers import CLASSES, QUERIES, SEGMENTERS, inputs_of, model_of  # noqa: E402
from transformers.models.mask2former import modeling_mask2former  # noqa: E402

from groupdetr_fast import ops  # noqa: E402
from groupdetr_fast.integrations.kernels import serves_everywhere  # noqa: E402
from groupdetr_fast.integrations.transformers import accelerate, masks, restore  # noqa: E402

pytestmark = pytest.mark.skipif(
    not serves_everywhere("linear_assignment"), reason="groupdetr_fast was built without its kernels"
)

COUNTS = [(2,), (3, 0), (0, 0), (1, 9, 0)]  # objects of each image; without any, and more than queries


def criterion_of(**overrides):
    """A criterion of Mask2Former, and one that was exchanged."""
    config = transformers.Mask2FormerConfig(num_labels=CLASSES, train_num_points=500, **overrides)
    criterion, ours = (modeling_mask2former.Mask2FormerLoss(config, {}) for _ in range(2))
    assert masks.exchange(ours)
    return criterion, ours


def batch_of(counts, num_queries=QUERIES, sizes=((40, 56), (64, 32), (64, 64))):
    """Predictions and labels of images whose masks have different sizes."""
    generator = torch.Generator().manual_seed(0)
    labels = [torch.randint(CLASSES, (count,), generator=generator) for count in counts]
    objects = [
        torch.rand(count, *size, generator=generator).round() for count, size in zip(counts, sizes, strict=False)
    ]
    layers = [
        {
            "masks_queries_logits": torch.randn(len(counts), num_queries, 16, 16, generator=generator),
            "class_queries_logits": torch.randn(len(counts), num_queries, CLASSES + 1, generator=generator),
        }
        for _ in range(3)
    ]
    return layers, objects, labels


def losses_of(criterion, layers, objects, labels):
    """Losses and gradients, from one seed."""
    torch.manual_seed(1)
    leaves = [{name: values.clone().requires_grad_() for name, values in layer.items()} for layer in layers]
    losses = criterion(**leaves[0], mask_labels=objects, class_labels=labels, auxiliary_predictions=leaves[1:])
    sum(losses.values()).backward()
    return losses, [values.grad for layer in leaves for values in layer.values()]


@pytest.fixture
def float64():
    """Random points in float64 too, which transformers' criterion needs."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("name", SEGMENTERS)
def test_a_step_stays_the_same(name, counts):
    inputs = inputs_of(name, counts)
    expected = step(model_of(name), inputs)
    assert_same_step(step(accelerate(model_of(name)), inputs), expected, torch.float32)


def test_without_auxiliary_losses():
    """Which Mask2Former's own code cannot leave out, and EoMT has none of."""
    inputs = inputs_of("OneFormer")
    expected = step(model_of("OneFormer", use_auxiliary_loss=False), inputs)
    model = accelerate(model_of("OneFormer", use_auxiliary_loss=False))
    assert_same_step(step(model, inputs), expected, torch.float32)


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.usefixtures("float64")
def test_losses_and_gradients_in_float64(counts):
    criterion, ours = criterion_of()
    batch = batch_of(counts)
    expected, expected_gradients = losses_of(criterion, *batch)
    losses, gradients = losses_of(ours, *batch)
    assert list(losses) == list(expected)
    assert len(losses) == 9  # three of each of three layers
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-11, atol=1e-13)


def test_losses_and_gradients_of_many_points():
    """So many that some lie at the limit of the most uncertain ones with equal logits."""
    criterion, ours = criterion_of()
    criterion.num_points = ours.num_points = 12544
    batch = batch_of((20, 40), num_queries=50)
    expected, expected_gradients = losses_of(criterion, *batch)
    losses, gradients = losses_of(ours, *batch)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)
    for found, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item())


def test_the_objects_of_all_processes_are_counted_by_their_code(monkeypatch):
    criterion, ours = criterion_of()
    monkeypatch.setattr(
        modeling_mask2former.Mask2FormerLoss, "get_num_masks", lambda *args, **kwargs: torch.tensor(7.0)
    )
    batch = batch_of((2, 3))
    torch.testing.assert_close(losses_of(ours, *batch)[0], losses_of(criterion, *batch)[0], rtol=1e-5, atol=1e-6)


def test_the_op_is_what_runs(monkeypatch):
    """Once for all images of a layer, and nothing of scipy."""
    calls = []
    run = ops.linear_assignment
    monkeypatch.setattr(ops, "linear_assignment", lambda *args: calls.append(args) or run(*args))
    monkeypatch.setattr(modeling_mask2former, "linear_sum_assignment", None)
    model = accelerate(model_of("Mask2Former"))
    model(**inputs_of("Mask2Former", (3, 1)))
    assert [tuple(cost.shape) for cost, _ in calls] == [(2, 3, QUERIES)] * len(calls)
    assert len(calls) == model.config.decoder_layers  # the first of which is of the queries before any layer


def test_predictions_that_are_no_numbers_are_left_out():
    _, ours = criterion_of()
    layers, objects, labels = batch_of((3, 2))
    layers[0]["masks_queries_logits"][0, 1] = torch.nan
    layers[0]["class_queries_logits"][1, 3] = torch.inf
    pairs = ours.matcher(*layers[0].values(), objects, labels)
    for (queries, chosen), bad, count in zip(pairs, (1, 3), (3, 2), strict=True):
        assert bad not in queries.tolist()
        assert queries.tolist() == sorted(set(queries.tolist()))
        assert sorted(chosen.tolist()) == list(range(count))


def test_half_types_are_matched_in_float32():
    criterion, ours = criterion_of()
    layers, objects, labels = batch_of((3, 2))
    batch = ([{name: values.bfloat16() for name, values in layer.items()} for layer in layers], objects, labels)
    rounded = ([{name: values.float() for name, values in layer.items()} for layer in batch[0]], objects, labels)
    with torch.autocast("cpu", torch.bfloat16):
        losses, _ = losses_of(ours, *batch)
    expected, _ = losses_of(criterion, *rounded)
    for name in ("loss_mask", "loss_dice", "loss_mask_1", "loss_dice_1"):
        torch.testing.assert_close(losses[name], expected[name], rtol=1e-5, atol=1e-6)


def test_what_is_somebody_elses_stays():
    class Own(modeling_mask2former.Mask2FormerHungarianMatcher):
        pass

    criterion = modeling_mask2former.Mask2FormerLoss(transformers.Mask2FormerConfig(), {})
    criterion.matcher = Own()
    assert not masks.exchange(criterion)
    assert type(criterion) is modeling_mask2former.Mask2FormerLoss
    masks.put_back(criterion)
    assert type(criterion.matcher) is Own


@pytest.mark.parametrize("name", SEGMENTERS)
def test_copies_pickles_and_restored_models(name):
    model, inputs = accelerate(model_of(name)), inputs_of(name)
    expected = step(model, inputs)
    assert_same_step(step(copy.deepcopy(model), inputs), expected, torch.float32)
    criterion = pickle.loads(pickle.dumps(model.criterion))
    assert type(criterion) is type(model.criterion)
    assert type(criterion.matcher) is type(model.criterion.matcher)
    assert masks.exchange(model.criterion)  # again, which changes nothing
    assert list(accelerate(model).state_dict()) == list(model_of(name).state_dict())
    untouched = model_of(name).criterion
    restored = restore(restore(model)).criterion
    assert type(restored) is type(untouched)
    assert type(restored.matcher) is type(untouched.matcher)
