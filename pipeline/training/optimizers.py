"""The optimizer of a run and its learning rate by step, new or restored from a checkpoint."""

import importlib
from collections.abc import Callable

import torch
from diffusers.optimization import get_scheduler
from torch.optim.lr_scheduler import LambdaLR

from pipeline.config import ConfigError, OptimizationConfig
from pipeline.hardware import has_bf16
from pipeline.models.build import trainable_parameters
from pipeline.training.muon import Muon, muon_parameters


def build_optimizer(network: torch.nn.Module, train: OptimizationConfig) -> torch.optim.Optimizer:
    """Return the configured optimizer of the trainable weights; ConfigError if there is none."""
    weights = trainable_parameters(network)
    if train.optimizer not in ("adamw", "muon"):
        try:
            kind = load_optimizer_class(train.optimizer)
            return kind(weights, lr=train.lr, **(train.optimizer_args or {}))
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"{train.optimizer} does not take these train.optimizer_args: {error}"
            ) from error
    settings = {"lr": train.lr, "betas": train.betas, "weight_decay": train.weight_decay}
    if train.optimizer != "muon":
        return torch.optim.AdamW(weights, **settings, fused=True)
    matrices = muon_parameters(network)
    chosen = {id(weight) for weight in matrices}
    others = [weight for weight in weights if id(weight) not in chosen]
    dtype = torch.bfloat16 if has_bf16(weights[0].device) else torch.float32
    return Muon(matrices, others, matrix_lr=train.matrix_lr, dtype=dtype, **settings)


def load_optimizer_class(path: str) -> Callable[..., torch.optim.Optimizer]:
    """Return the optimizer class at an import path; ConfigError if it cannot be used."""
    module, _, name = path.rpartition(".")
    try:
        kind = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"train.optimizer {path} cannot be imported: {error}. Install its package, or correct "
            "the path."
        ) from error
    if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
        raise ConfigError(f"train.optimizer {path} is not a class of torch optimizers.")
    if hasattr(kind, "eval"):
        raise ConfigError(
            f"train.optimizer {path} trains other weights than it saves, which is not supported. "
            "Choose one without train() and eval(); train.ema averages weights."
        )
    return kind


def build_lr_schedule(optimizer: torch.optim.Optimizer, train: OptimizationConfig) -> LambdaLR:
    """Return a learning-rate schedule of diffusers, or one flat and then linear to lr_end.

    All begin with a linear warm-up.
    """
    if train.lr_schedule != "flat_then_linear":
        name = "constant_with_warmup" if train.lr_schedule == "constant" else train.lr_schedule
        return get_scheduler(
            name,
            optimizer,
            num_warmup_steps=train.warmup,
            num_training_steps=train.steps,
            num_cycles=train.lr_cycles,
            power=train.lr_power,
        )
    decay_steps = max(train.decay_share * train.steps, 1)

    def factor(step: int) -> float:
        warmup = min((step + 1) / max(train.warmup, 1), 1)
        remaining = min((train.steps - step) / decay_steps, 1)
        return warmup * (train.lr_end + (1 - train.lr_end) * remaining)

    return LambdaLR(optimizer, factor)


def resume_lr_schedule(schedule: LambdaLR, state: dict) -> tuple[float, float]:
    """Continue at a saved step by this run's own plan, which may have another end.

    Returns train.lr as it was saved and as it is now.
    """
    schedule.load_state_dict(state)
    before = schedule.get_last_lr()
    now = [
        base * factor(schedule.last_epoch)
        for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    ]
    for group, lr in zip(schedule.optimizer.param_groups, now, strict=True):
        group["lr"] = lr
    schedule._last_lr = now
    return float(before[-1]), float(now[-1])  # the last group; Muon's matrices come first


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Load an optimizer's state in the weights' memory format, as the fused CPU kernel requires."""
    optimizer.load_state_dict(state)
    for weight, moments in optimizer.state.items():
        for name, value in moments.items():
            if not isinstance(value, torch.Tensor):
                continue
            if value.shape == weight.shape:
                moments[name] = torch.empty_like(weight, dtype=value.dtype).copy_(value)
            else:
                moments[name] = value.clone()
