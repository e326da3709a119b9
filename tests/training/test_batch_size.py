"""The largest batch that fits, on a memory that is counted in images."""

import pytest
import torch
from accelerate import Accelerator

import groupdetr_fast as gd
from groupdetr_fast.data import collate
from groupdetr_fast.training.batch_size import AIM, GpuMemory, TrialSteps, check_auto, largest_fitting, memory_of
from groupdetr_fast.training.config import OptimizationConfig

SMALL = {"num_queries": 3, "d_model": 16, "num_heads": 2, "encoder_layers": 1, "decoder_layers": 1}


class Device:
    """A device on which a step on ``n`` images takes ``n / images`` of the memory, and that fails beyond it."""

    def __init__(self, images, error=None):
        self.images = images
        self.error = error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        self.taken, self.sizes = 0.0, []

    def clear(self):
        self.taken = 0.0

    def peak(self):
        return self.taken

    def run(self, size):
        self.sizes.append(size)
        self.taken = min(1.0, size / self.images)
        if size > self.images:
            raise self.error


@pytest.mark.parametrize("share", [1, 7, 16, 100])
@pytest.mark.parametrize("images", [1.5, 2, 5, 10, 33.4, 1000])
def test_the_largest_divisor_that_leaves_room_is_found(images, share):
    device = Device(images)
    found = largest_fitting(device.run, device, share)
    divisors = [size for size in range(1, share + 1) if share % size == 0]
    fitting = [size for size in divisors if size / images <= AIM]
    assert found == max(fitting, default=1)  # one image must do, if it runs at all
    assert device.sizes == divisors[: max(len(fitting), 1) + (len(fitting) > 0)]  # up to the first that does not fit
    assert device.taken == 0


def test_one_image_may_be_too_large():
    assert largest_fitting(Device(0.5).run, Device(0.5), 8) == 0


@pytest.mark.parametrize("text", ["cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error", "HIP out of memory. Tried"])
def test_other_errors_say_the_same(text):
    device = Device(5, RuntimeError(text))
    assert largest_fitting(device.run, device, 16) == 4


def test_errors_that_say_something_else_are_raised():
    device = Device(5, RuntimeError("shapes do not fit"))
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        largest_fitting(device.run, device, 16)


def test_a_cpu_is_refused_in_one_sentence():
    message = "batch_size auto goes by the memory of a CUDA GPU, and this training runs on cpu: give batch_size a"
    with pytest.raises(ValueError, match=message):
        memory_of(torch.device("cpu"))
    with pytest.raises(ValueError, match=message):
        check_auto(Accelerator(cpu=True), OptimizationConfig(batch_size="auto"))
    check_auto(Accelerator(cpu=True), OptimizationConfig(batch_size=4))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cuda_graphs": 2}, "does not know what cuda_graphs keep in memory: give batch_size a number"),
        ({"images_per_step": 7}, "2 processes cannot share images_per_step=7 evenly: give images_per_step a multiple"),
    ],
)
def test_what_does_not_go_together_is_refused(monkeypatch, settings, message):
    monkeypatch.setattr("groupdetr_fast.training.batch_size.memory_of", lambda device: None)
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    with pytest.raises(ValueError, match=message):
        check_auto(Accelerator(cpu=True), OptimizationConfig(batch_size="auto", **settings))


@pytest.mark.parametrize("value", [0, -2, "large"])
def test_a_size_is_a_number_or_auto(value):
    with pytest.raises(ValueError, match=f"batch_size must be (at least 1|an integer) or auto, got {value!r}"):
        OptimizationConfig(batch_size=value)
    with pytest.raises(ValueError, match="batch_size auto is found when a training begins: give a number here"):
        _ = OptimizationConfig(batch_size="auto").images_per_batch


@pytest.mark.gpu
def test_the_memory_of_a_gpu_is_counted():
    memory = GpuMemory(torch.device("cuda", 0))
    before = memory.peak()
    block = torch.empty(int(memory.available * 0.1), dtype=torch.uint8, device="cuda")
    assert memory.peak() == pytest.approx(before + 0.1, abs=0.02)
    del block
    memory.clear()
    assert memory.peak() == pytest.approx(before, abs=0.01)


@pytest.mark.parametrize("factor", [1.0, float("nan")])
def test_trial_steps_make_the_state_of_the_optimiser_and_change_no_weight(factor):
    model = gd.build_model("conditional_detr_r50", num_classes=2, num_groups=2, backbone="conv:4-8", **SMALL)
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    sizes = []

    def make_batch(size):
        sizes.append(size)
        target = {"labels": torch.tensor([1]), "boxes": torch.full((1, 4), 0.5), "image_id": 0}
        target["original_size"] = torch.tensor([16, 16])
        return collate([(torch.zeros(3, 16, 16, dtype=torch.uint8), target)] * size)

    config = OptimizationConfig(ema_decay=0.9, freeze=("encoder",))
    criterion = gd.build_criterion(model)

    def loss(*arguments):
        return {"loss": factor * criterion(*arguments)["loss"]}

    trial = TrialSteps(Accelerator(cpu=True), model, loss, config, make_batch)
    trial(3)
    assert sizes == [3]
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    trained = sum(parameter.requires_grad for parameter in model.parameters())
    assert trained - 5 < len(trial.optimizer.state) <= trained  # some are not used by so small a model
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(parameter.requires_grad for parameter in model.encoder.parameters())
