"""The optimiser of a run and its learning rate by step, and how both go on where a checkpoint left them."""

import torch
from diffusers.optimization import get_scheduler

from pipeline.config import TrainConfig
from pipeline.hardware import has_bf16
from pipeline.models.build import trainable_parameters
from pipeline.training.muon import Muon, muon_parameters


def build_optimizer(unet, train: TrainConfig) -> torch.optim.AdamW:
    """The optimiser of a run."""
    if train.optimizer == "muon":
        orthogonalised = muon_parameters(unet)
        among = {id(weight) for weight in orthogonalised}
        others = [weight for weight in trainable_parameters(unet) if id(weight) not in among]
        fast = torch.bfloat16 if has_bf16(unet.device) else torch.float32
        return Muon(
            orthogonalised,
            others,
            train.lr,
            train.matrix_lr,
            train.betas,
            train.weight_decay,
            dtype=fast,
        )
    return torch.optim.AdamW(
        trainable_parameters(unet),
        train.lr,
        betas=train.betas,
        weight_decay=train.weight_decay,
        fused=True,
    )


def build_lr_schedule(optimizer, train: TrainConfig):
    """The learning rate by step, after a linear warm-up: diffusers' schedules, or flat, then linear to lr_end."""
    if train.lr_schedule != "flat_then_linear":
        name = "constant_with_warmup" if train.lr_schedule == "constant" else train.lr_schedule
        return get_scheduler(
            name, optimizer, num_warmup_steps=train.warmup, num_training_steps=train.steps
        )
    fall = max(train.decay_share * train.steps, 1)

    def share(step: int) -> float:
        down = min((train.steps - step) / fall, 1)
        return min((step + 1) / max(train.warmup, 1), 1) * (
            train.lr_end + (1 - train.lr_end) * down
        )

    return torch.optim.lr_scheduler.LambdaLR(optimizer, share)


def resume_lr_schedule(
    schedule: torch.optim.lr_scheduler.LambdaLR, state: dict
) -> tuple[float, float]:
    """Go on where a schedule was, by this one's own plan, which may have another end; train.lr as it was and as it is."""
    schedule.load_state_dict(state)
    now = [
        base * share(schedule.last_epoch)
        for base, share in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    ]
    for group, lr in zip(schedule.optimizer.param_groups, now, strict=True):
        group["lr"] = lr
    was, schedule._last_lr = schedule.get_last_lr(), now
    return was[-1], now[-1]  # before them: the matrices of Muon


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Load an optimiser's state in each weight's own memory format: the fused CPU kernel reads both as they lie."""
    optimizer.load_state_dict(state)
    for weight, moments in optimizer.state.items():
        for name, value in moments.items():
            moments[name] = (
                torch.empty_like(weight).copy_(value)
                if value.shape == weight.shape
                else value.clone()
            )
