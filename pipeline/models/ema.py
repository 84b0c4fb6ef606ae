"""The exponential moving average of a network's weights."""

import torch
from diffusers.training_utils import EMAModel

from pipeline.models.build import trainable_parameters

EMA_WARMUP = 2 / 3  # the average's decay at step n is min(ema, 1 - (1 + n) ** -EMA_WARMUP)


def build_ema(network: torch.nn.Module, decay: float) -> EMAModel:
    """diffusers' EMA of the weights that train, warming up so that the first steps are forgotten."""
    return EMAModel(
        trainable_parameters(network),
        decay=decay,
        use_ema_warmup=True,
        power=EMA_WARMUP,
        foreach=True,
    )
