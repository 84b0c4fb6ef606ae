"""The exponential moving average of a network's weights."""

import contextlib
from collections.abc import Iterator

from diffusers.training_utils import EMAModel
from torch import nn

from pipeline.models.build import trainable_parameters

EMA_WARMUP = 2 / 3  # the decay at step n is min(ema, 1 - (1 + n) ** -EMA_WARMUP)


def build_ema(network: nn.Module, decay: float) -> EMAModel:
    """Return diffusers' EMA of the trainable weights; its warm-up forgets the first steps."""
    weights = trainable_parameters(network)
    return EMAModel(weights, decay=decay, use_ema_warmup=True, power=EMA_WARMUP, foreach=True)


@contextlib.contextmanager
def ema_weights(network: nn.Module, ema: EMAModel) -> Iterator[nn.Module]:
    """Swap the averaged weights into the network, in evaluation mode. Nothing is copied."""

    def swap() -> None:
        for weight, mean in zip(trainable_parameters(network), ema.shadow_params, strict=True):
            weight.data, mean.data = mean.data, weight.data

    swap()
    try:
        yield network.eval()
    finally:
        swap()
        network.train()
