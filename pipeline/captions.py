"""Whitened caption states: a frozen text encoder's vectors, made as different as their captions are."""

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor


class CaptionWhitening(ModelMixin, ConfigMixin):
    """Caption states (B, L, D) less their mean, times the inverse root of their covariance; padding (zeros) stays zero.

    A text encoder's states share a large mean and vary mostly along a few directions, and a network that trains for
    minutes learns little of the others. The statistics come from the training captions (`fit`) and travel with the model.
    """

    @register_to_config
    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("matrix", torch.eye(width))

    @classmethod
    def fit(cls, states: Tensor, ridge: float) -> "CaptionWhitening":
        """The whitening of states (N, L, D); `ridge` is added to every variance, so that rare directions stay small.

        ValueError where fewer than two states are not padding, or for a ridge that is not above 0.
        """
        if not ridge > 0:
            raise ValueError(f"ridge is {ridge}, expected a number above 0: few captions leave directions without variance")
        tokens = states[states.any(-1)].double()
        if len(tokens) < 2:
            raise ValueError(f"whitening needs at least two caption states that are not padding, got {len(tokens)}")
        variance, axes = torch.linalg.eigh(torch.cov(tokens.T))
        out = cls(states.shape[-1])
        out.mean.copy_(tokens.mean(0))
        out.matrix.copy_((axes * (variance.clamp(min=0) + ridge).rsqrt()) @ axes.T)  # symmetric: axes keep their names
        return out

    def forward(self, states: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D), in the dtype of `states`."""
        real = states.any(-1, keepdim=True)
        white = (states.to(self.matrix.dtype) - self.mean) @ self.matrix
        return torch.where(real, white, 0).to(states.dtype)
