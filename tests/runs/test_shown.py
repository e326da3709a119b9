"""What a run shows while it trains and evaluates."""

import re
from dataclasses import replace

from groupdetr_fast.runs.train import train
from groupdetr_fast.training import progress


def test_a_line_every_so_many_steps_without_a_terminal_and_in_the_log(config, monkeypatch, capsys):
    monkeypatch.setattr(progress, "LINE_EVERY", 4)
    config = replace(config, pictures=0)
    train(config)
    printed = capsys.readouterr().err.splitlines()
    steps = [line for line in printed if "images/s" in line]
    # 9 steps of one batch; 10 images in batches of 4 make 3 batches an epoch
    pattern = (
        r"epoch {}/3  batch {}/3  loss \d+\.\d+  lr \S+  \d+\.\d images/s  waited \d+ % for data  "
        r"gradient \S+  \d+ MiB  0:\d\d:\d\d left"
    )
    assert len(steps) == 2
    for line, numbers in zip(steps, [(2, 1), (3, 2)], strict=True):
        assert re.fullmatch(pattern.format(*numbers), line), line
    log = (config.output / "train.log").read_text()
    assert all(line.strip() in log for line in printed if line.startswith("epoch "))
    train(replace(config, resume=True, optimization=replace(config.optimization, lr_drop=(1,))))
    log = (config.output / "train.log").read_text().splitlines()
    assert any(line.endswith("WARNING resuming with optimization.lr_drop = (1,), which was (2.0,)") for line in log)
