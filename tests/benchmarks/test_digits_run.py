"""The parts of a run on the digits, at a tiny size."""

from dataclasses import replace

from small_sizes import SIZES

from cpu.digits_run import rows
from groupdetr_fast.data import DigitsConfig, digits_dataset
from groupdetr_fast.data.config import DataConfig
from groupdetr_fast.runs.config import ModelConfig
from groupdetr_fast.runs.demo import digits_demo


def test_images_on_the_device_take_fewer_operators_of_a_step(tmp_path):
    size = DigitsConfig(image_size=48, train_images=40, val_images=4, max_objects=3, min_digit=12, max_digit=24)
    data = DataConfig(**digits_dataset(tmp_path, config=size)._asdict(), workers=0, cache_images=True)
    config = digits_demo(compose=False)
    optimization = replace(config.optimization, batch_size=4)
    config = replace(config, data=data, model=ModelConfig(num_groups=2, **SIZES), optimization=optimization)
    found = {name: (float(host), float(device)) for name, host, device in rows(config, 2)}
    assert all(min(pair) >= 0 for pair in found.values())
    host, device = found["operators of its images"]
    assert 0 < device < host / 2
    assert found["operators of a step"][0] == found["operators of a step"][1] > 100
