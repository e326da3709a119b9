"""Steps that a GPU has captured are those that it has not."""

import pytest
import torch
from small_graphs import CONDITIONAL, DINO, batch_of, batches_of, differing, run, tensors_of, uncaptured

from groupdetr_fast.training.graphs import WARM_UP

pytestmark = pytest.mark.gpu


@pytest.fixture
def deterministic():
    """Operators that give the same result each time, as far as torch has them."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


STEPS = 20


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="float32"),
        pytest.param({"precision": "bf16", "ema_decay": 0.9}, id="bf16"),
        pytest.param({"overrides": {"dropout": 0.1}, "decay": "cosine", "warmup_steps": 4}, id="dropout"),
    ],
)
def test_captured_steps_are_bit_for_bit_those_uncaptured(trainer_in, deterministic, options):
    batches = batches_of(STEPS, "cuda")
    expected = uncaptured(trainer_in("uncaptured", device="cuda", **options))
    losses = run(expected, batches)
    found = trainer_in("captured", device="cuda", **options)
    assert torch.equal(run(found, batches), losses)
    assert differing(tensors_of(found), tensors_of(expected)) == []
    assert (found.state.current.without_graph, expected.state.current.without_graph) == (WARM_UP, STEPS)


@pytest.mark.parametrize("denoising_queries", [0, 12])
def test_captured_steps_of_dino_are_those_uncaptured(trainer_in, denoising_queries):
    """Up to the order of the sums of deformable attention, which differs from run to run."""
    options = {"device": "cuda", "model": DINO, "overrides": {"denoising_queries": denoising_queries}}
    batches = batches_of(STEPS, "cuda")
    expected = run(uncaptured(trainer_in("uncaptured", **options)), batches)
    found = trainer_in("captured", **options)
    losses = run(found, batches)
    assert found.state.current.without_graph == WARM_UP
    torch.testing.assert_close(losses[: WARM_UP + 4], expected[: WARM_UP + 4], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(losses, expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize(("model", "overrides"), [(CONDITIONAL, {"dropout": 0.3}), (DINO, {"denoising_queries": 12})])
def test_replays_draw_new_numbers(trainer_in, model, overrides):
    """Dropout and denoising noise, with weights that do not change."""
    trainer = trainer_in("run", device="cuda", model=model, overrides=overrides, lr=0.0, backbone_lr=0.0)
    losses = run(trainer, [batch_of(2, 3, device="cuda")] * (WARM_UP + 6))
    assert trainer.state.current.without_graph == WARM_UP
    assert len(set(losses[WARM_UP:].tolist())) == 6
    torch.manual_seed(1)
    first = run(trainer, [batch_of(2, 3, device="cuda")])
    torch.manual_seed(1)
    torch.testing.assert_close(run(trainer, [batch_of(2, 3, device="cuda")]), first, rtol=1e-3, atol=1e-3)


def test_graphs_of_two_sizes_take_turns(trainer_in, deterministic):
    """They share memory, and each goes on from what the other has done."""
    small, large = batches_of(STEPS, "cuda"), batches_of(STEPS, "cuda", size=(128, 96))
    batches = [batch for pair in zip(small, large, strict=True) for batch in pair]
    expected = uncaptured(trainer_in("uncaptured", device="cuda", ema_decay=0.9))
    losses = run(expected, batches)
    found = trainer_in("captured", device="cuda", ema_decay=0.9)
    assert torch.equal(run(found, batches), losses)
    assert differing(tensors_of(found), tensors_of(expected)) == []
    assert found.state.current.without_graph == 2 * WARM_UP


def test_accumulated_steps_are_one_graph(trainer_in, deterministic):
    batches = batches_of(2 * STEPS, "cuda")
    steps = list(zip(batches[::2], batches[1::2], strict=True))
    trainers = [uncaptured(trainer_in("uncaptured", device="cuda", accumulate=2))]
    trainers.append(trainer_in("captured", device="cuda", accumulate=2))
    for trainer in trainers:
        for step in steps:
            trainer.run_step(list(step))
        trainer.ledger.settle()
    assert differing(tensors_of(trainers[1]), tensors_of(trainers[0])) == []
    assert trainers[1].state.current.without_graph == WARM_UP


def test_a_replay_does_not_wait(trainer_in):
    trainer = trainer_in("run", device="cuda", model=DINO, overrides={"dropout": 0.1}, ema_decay=0.9)
    batches = batches_of(WARM_UP + 6, "cuda")
    run(trainer, batches[: WARM_UP + 1])
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches[WARM_UP + 1 :]:
            assert trainer.graphs.run([batch]).replayed
    finally:
        torch.cuda.set_sync_debug_mode("default")
