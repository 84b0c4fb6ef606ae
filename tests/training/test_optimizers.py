"""Optimizers and learning-rate schedules follow the configuration."""

import dataclasses

import pytest
import torch
from tiny import tiny_unet

from pipeline.config import TrainConfig
from pipeline.training.optimizers import build_lr_schedule, build_optimizer


def test_build_lr_schedule_rises_stays_and_falls():
    train = TrainConfig(
        steps=100, lr=2.0, lr_schedule="flat_then_linear", lr_end=0.1, decay_share=0.4, warmup=10
    )
    weight = torch.nn.Parameter(torch.zeros(2, 2))
    schedule = build_lr_schedule(torch.optim.SGD([weight], train.lr), train)
    factor = schedule.lr_lambdas[0]
    assert [factor(step) for step in (0, 4, 9, 30, 60)] == pytest.approx([0.1, 0.5, 1, 1, 1])
    falling = [0.1 + 0.9 * 0.75, 0.1 + 0.9 * 0.5, 0.1]
    assert [factor(step) for step in (70, 80, 100)] == pytest.approx(falling)
    constant = dataclasses.replace(train, lr_schedule="constant")
    (factor,) = build_lr_schedule(torch.optim.SGD([weight], train.lr), constant).lr_lambdas
    assert [factor(step) for step in (0, 5, 10, 100)] == pytest.approx([0, 0.5, 1, 1])


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_build_optimizer_uses_the_configuration(kind):
    matrix_lr = 0.7 if kind == "muon" else None
    settings = {"lr": 0.3, "matrix_lr": matrix_lr, "betas": (0.8, 0.9), "weight_decay": 0.2}
    groups = build_optimizer(tiny_unet(4, 8), TrainConfig(optimizer=kind, **settings)).param_groups
    assert [group["lr"] for group in groups] == ([0.7, 0.3] if kind == "muon" else [0.3])
    for group in groups:
        assert tuple(group["betas"]) == (0.8, 0.9)
        assert group["weight_decay"] == 0.2
