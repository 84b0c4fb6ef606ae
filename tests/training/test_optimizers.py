"""Optimizers and learning-rate schedules follow the configuration."""

import dataclasses

import pytest
import torch
from tiny import tiny_unet

from pipeline.config import ConfigError, TrainConfig, load, load_file
from pipeline.training.optimizers import (
    build_lr_schedule,
    build_optimizer,
    restore_optimizer,
)

# The default preset's settings of AdamW back to the defaults.
PLAIN = (
    *("--train.betas", "[0.9, 0.999]", "--train.weight_decay", "0.01"),
    *("--train.matrix_lr", "null"),
)


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


@pytest.mark.parametrize(
    ("schedule", "settings", "factors"),
    [
        ("cosine_with_restarts", {"lr_cycles": 2}, [0.5, 1, 0.5, 1, 0.5]),
        ("cosine_with_restarts", {}, [0.5, 1, 0.5 + 8**-0.5, 0.5, 0.5 - 8**-0.5]),
        ("polynomial", {"lr_power": 2.0}, [0.5, 1, 0.75**2, 0.5**2, 0.25**2]),
    ],
)
def test_build_lr_schedule_restarts_and_follows_a_power(schedule, settings, factors):
    train = TrainConfig(steps=90, lr=2.0, lr_schedule=schedule, warmup=10, **settings)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2, 2))], train.lr)
    (factor,) = build_lr_schedule(optimizer, train).lr_lambdas
    assert [factor(step) for step in (5, 10, 30, 50, 70)] == pytest.approx(factors, abs=1e-6)
    (problem,) = dataclasses.replace(
        train, lr_schedule="cosine", lr_cycles=3, lr_power=1
    ).problems()
    assert "train.lr_cycles" in problem


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_build_optimizer_uses_the_configuration(kind):
    matrix_lr = 0.7 if kind == "muon" else None
    settings = {"lr": 0.3, "matrix_lr": matrix_lr, "betas": (0.8, 0.9), "weight_decay": 0.2}
    groups = build_optimizer(tiny_unet(4, 8), TrainConfig(optimizer=kind, **settings)).param_groups
    assert [group["lr"] for group in groups] == ([0.7, 0.3] if kind == "muon" else [0.3])
    for group in groups:
        assert tuple(group["betas"]) == (0.8, 0.9)
        assert group["weight_decay"] == 0.2


def test_build_optimizer_imports_a_class(tmp_path):
    arguments = "{betas: [0.8, 0.9], weight_decay: 1e-3, decoupled_weight_decay: true}"
    argv = ["--train.optimizer", "torch.optim.RAdam", "--train.optimizer_args", arguments]
    config, _ = load([*argv, "--train.lr", "0.5", *PLAIN])
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert load_file(tmp_path / "config.yaml") == config
    optimizer = build_optimizer(torch.nn.Linear(2, 2), config.train)
    assert type(optimizer) is torch.optim.RAdam
    (group,) = optimizer.param_groups
    assert (group["lr"], group["weight_decay"], tuple(group["betas"])) == (0.5, 1e-3, (0.8, 0.9))
    assert group["decoupled_weight_decay"] is True


def test_restore_optimizer_keeps_plain_values_and_types():
    """An 8-bit optimizer's state has the weight's shape and another type."""
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.RAdam([weight])
    weight.grad = torch.ones(2)
    optimizer.step()
    optimizer.state[weight] |= {"count": 3, "quantised": torch.tensor([1, 2], dtype=torch.uint8)}

    class Loaded(torch.optim.RAdam):
        def load_state_dict(self, state_dict):
            self.state = optimizer.state

    restored = Loaded([weight])
    restore_optimizer(restored, {})
    assert restored.state[weight]["count"] == 3
    assert restored.state[weight]["quantised"].dtype == torch.uint8


@pytest.mark.parametrize(
    ("path", "arguments"),
    [
        ("no_such_package.Prodigy", None),
        ("torch.optim.NoSuchClass", None),
        ("torch.nn.Linear", None),
        ("torch.optim.RAdam", {"no_such_argument": 1}),
    ],
)
def test_build_optimizer_refuses_what_it_cannot_build(path, arguments):
    train = TrainConfig(optimizer=path, optimizer_args=arguments)
    with pytest.raises(ConfigError, match=path):
        build_optimizer(torch.nn.Linear(2, 2), train)


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "prodigy"},
        {"optimizer": "torch.optim.RAdam", "weight_decay": 0.5},
        {"optimizer": "torch.optim.RAdam", "optimizer_args": {"lr": 1}},
        {"optimizer_args": {"amsgrad": True}},
    ],
)
def test_problems_of_optimizers(settings):
    (problem,) = TrainConfig(**settings).problems()
    assert "train." in problem
