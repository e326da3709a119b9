"""Trainers of small trainings, without a data set."""

from dataclasses import replace

import pytest
import torch
from accelerate import PartialState
from small_graphs import CONDITIONAL, CONFIG, InOrder, Numbers, build

import groupdetr_fast as gd
from groupdetr_fast.training import engine
from groupdetr_fast.training.engine import Trainer, TrainerSettings, build_accelerator


@pytest.fixture
def trainer_in(tmp_path, monkeypatch):
    """Makes trainers in folders of these names; each begins with the same weights and random states."""
    monkeypatch.setattr(engine, "check_graphs", lambda *arguments, observing: None)  # these run on the CPU too

    def make(name, device="cpu", model=CONDITIONAL, overrides=None, max_skipped_steps=10, observe=None, **options):
        optimization = replace(CONFIG, **options)
        PartialState._reset_state()  # which else keeps the device of an earlier test
        accelerator = build_accelerator(optimization, tmp_path / name, cpu=torch.device(device).type == "cpu")
        detector = build(model, **(overrides or {}))
        dataset = Numbers()
        loader = torch.utils.data.DataLoader(dataset, batch_size=None, sampler=InOrder(dataset))
        settings = TrainerSettings(optimization, tmp_path / name, max_skipped_steps=max_skipped_steps)
        trainer = Trainer(accelerator, detector, gd.build_criterion(detector), loader, settings, observe=observe)
        trainer.state.model.train()
        return trainer

    return make
