import pytest
import torch
from small_sizes import SIZES

from groupdetr_fast.analysis.forking import ForkServer, forks_are_safe
from groupdetr_fast.data import AugmentationConfig, DigitsConfig, digits_dataset
from groupdetr_fast.data.config import DataConfig
from groupdetr_fast.runs.config import CocoTrainingConfig, ModelConfig
from groupdetr_fast.training.config import OptimizationConfig


@pytest.fixture
def one_thread():
    """As the runs of a sweep have: sums of more are rounded differently."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    size = DigitsConfig(image_size=48, train_images=8, val_images=4, max_objects=3, min_digit=12, max_digit=24)
    return digits_dataset(tmp_path_factory.mktemp("digits"), config=size)


@pytest.fixture(scope="session")
def server():
    """The process that runs are forks of; skips where there are none."""
    if not forks_are_safe():
        pytest.skip("forks are used on Linux alone")
    server = ForkServer(threads=1)
    yield server
    server.close()


@pytest.fixture
def training(digits, tmp_path):
    """A training of seconds: 2 groups of 5 queries, 2 epochs of 2 steps."""
    return CocoTrainingConfig(
        data=DataConfig(**digits._asdict(), workers=0),
        model=ModelConfig(num_groups=2, dropout=0.0, **{**SIZES, "decoder_layers": 2}),
        augmentation=AugmentationConfig(
            short_sides=(48,), flip=0.0, crop=0.0, max_size=None, eval_short_side=48, eval_max_size=None
        ),
        optimization=OptimizationConfig(epochs=2, lr_drop=(1,), lr=1e-2, backbone_lr=1e-2, batch_size=4, seed=7),
        output=tmp_path / "run",
        pictures=0,
        report=False,
        track=(),
    )
