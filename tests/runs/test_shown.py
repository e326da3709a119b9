"""What a run shows while it trains and evaluates."""

import io
import logging
import re
import sys
import time
from contextlib import closing, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
from rich.console import Console

from groupdetr_fast.models import postprocess
from groupdetr_fast.runs.evaluate import evaluate_checkpoint
from groupdetr_fast.runs.train import train
from groupdetr_fast.training import display, progress


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
    train(replace(config, resume=True, optimization=replace(config.optimization, lr_drop=(1,), epochs=4)))
    log = (config.output / "train.log").read_text().splitlines()
    assert any(line.endswith("WARNING resuming with optimization.lr_drop = (1.0,), which was (2.0,)") for line in log)


def test_long_evaluations_say_how_far_they_are_without_a_terminal_and_in_the_log(config, monkeypatch, capsys):
    monkeypatch.setattr(display, "SECONDS_BETWEEN_LINES", 0.0)
    config = replace(config, optimization=replace(config.optimization, epochs=1), eval_batch_size=2, pictures=0)
    train(config)
    printed = [line for line in capsys.readouterr().err.splitlines() if "evaluated" in line]
    pattern = r"evaluated batch {}/2  \d+\.\d images/s  0:00:00 left"
    assert len(printed) == 2
    for number, line in enumerate(printed, start=1):
        assert re.fullmatch(pattern.format(number), line), line
        assert line in (config.output / "train.log").read_text()
    load = config.output / "checkpoints" / "best"
    alone = replace(config, model=replace(config.model, load=load, num_groups=1), output=config.output / "eval")
    evaluate_checkpoint(alone)
    assert capsys.readouterr().err.count("evaluated batch") == 2


def test_a_terminal_shows_a_bar_of_the_training_and_one_of_the_evaluation(config, monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr(display, "Console", lambda stderr: Console(file=terminal, force_terminal=True, width=120))
    monkeypatch.setattr(progress, "LOG_EVERY", 1)

    def take_time(*arguments, **options):
        time.sleep(0.25)  # longer than between two refreshments of a bar
        return postprocess(*arguments, **options)

    monkeypatch.setattr("groupdetr_fast.runs.evaluate.postprocess", take_time)
    config = replace(config, optimization=replace(config.optimization, epochs=1), eval_batch_size=2, pictures=0)
    train(config)
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue())
    assert "epoch 1" in shown
    assert re.search(r"loss \d+\.\d+  lr 0\.001", shown)
    assert re.search(r"evaluating .*images/s", shown)
    assert "evaluated batch" not in shown


def test_a_stopped_evaluation_leaves_no_bar(config):
    shown = display.Display(SimpleNamespace(is_main_process=True, num_processes=1))
    with closing(shown.evaluated([SimpleNamespace(image_ids=[1])] * 3)) as batches:
        next(batches)
        assert shown._bars is not None
    assert shown._bars is None


def test_warnings_of_a_training_are_printed_where_nothing_is_configured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # pytest's
    logger = logging.getLogger("groupdetr_fast.runs.model")
    with display.RunLog(tmp_path / "train.log"):
        logger.warning("random weights")
        logger.info("a detail")
    assert capsys.readouterr().err == "random weights\n"
    assert "WARNING random weights" in (tmp_path / "train.log").read_text()
    assert not logging.getLogger("groupdetr_fast").handlers
    other = logging.StreamHandler(sys.stdout)
    monkeypatch.setattr(logging.getLogger(), "handlers", [other])
    with display.RunLog(tmp_path / "train.log"):
        logger.warning("once")
    assert capsys.readouterr() == ("once\n", "")


@pytest.mark.parametrize("how", ["released", "by an error", "never"])
def test_a_log_that_is_held_gets_nothing_before_it_is_released(tmp_path, how):
    logger, path = logging.getLogger("groupdetr_fast.runs.model"), tmp_path / "train.log"
    with pytest.raises(KeyError) if how == "by an error" else nullcontext(), display.RunLog(path, held=True) as log:
        logger.warning("first")
        assert not path.exists()
        if how == "by an error":
            raise KeyError
        if how == "released":
            log.release()
            assert "WARNING first" in path.read_text()
            logger.warning("second")
            assert "WARNING second" in path.read_text()
    assert path.exists() == (how != "never")
    assert not path.exists() or path.read_text().count("first") == 1
