"""Diffusion without training: the perfect denoiser of a finite dataset, in closed form.

By the direct jump (5), the posterior over which image x_t came from is a softmax of squared
distances, and E[x_0 | x_t] its weighted mean. In the network's place it samples the dataset's own
images. Its error is the least that any network can reach. Where a network departs from it, the
network generalises.
"""

from types import SimpleNamespace
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from torch import Tensor, nn

from .scheduler import DDPMScheduler

# Caption states closer than this in every element belong to the same caption.
SAME_CAPTION_TOLERANCE = 1e-3


def posterior_weights(
    x_0: Tensor,
    x_t: Tensor,
    scheduler: DDPMScheduler,
    t: int | Tensor,
    allowed: Tensor | None = None,
) -> Tensor:
    """Return p(image i | x_t) (B, N), float64, of x_t (B, ...) and images (N, ...).

    Its logarithm is -|x_t - sqrt(abar) x_0|^2 / (2 (1 - abar)) by (5), less what is the same for
    every image.
    """
    images = x_0.flatten(1).double()
    noisy = x_t.flatten(1).double()
    abar_t = scheduler.abar(t, noisy)
    logits = (abar_t.sqrt() * noisy @ images.T - abar_t * images.square().sum(1) / 2) / (1 - abar_t)
    if allowed is not None:
        logits = logits.masked_fill(~allowed, -torch.inf)
    return logits.softmax(1)


def expected_x_0(
    x_0: Tensor,
    x_t: Tensor,
    scheduler: DDPMScheduler,
    t: int | Tensor,
    allowed: Tensor | None = None,
) -> Tensor:
    """E[x_0 | x_t] (B, ...) over images (N, ...), in the dtype of x_t."""
    mean = posterior_weights(x_0, x_t, scheduler, t, allowed) @ x_0.flatten(1).double()
    return mean.reshape(x_t.shape).to(x_t.dtype)


def irreducible_loss(
    x_0: Tensor, scheduler: DDPMScheduler, t: int, eps: Tensor | None = None
) -> Tensor:
    """The least mean squared error of x_0 (N,) that a denoiser without captions can have at t.

    It is estimated with one noise per image: `eps` (N, ...), or normal noise from seed 0.
    """
    if eps is None:
        eps = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0)).to(x_0)
    x_t = scheduler.add_noise(x_0, eps, t)
    return (expected_x_0(x_0, x_t, scheduler, t) - x_0).square().flatten(1).mean(1)


class ExactDenoiser(nn.Module):
    """E[x_0 | x_t, caption] of captioned latents (N, c, h, w), with the call of a network.

    `caption_states` (N, L, D) are the images' captions. `empty_state` (1, L, D) is the empty one,
    which allows every image. Without caption states every call is unconditional. A caption of no
    image raises ValueError.
    """

    x_0: Tensor
    caption_states: Tensor | None
    empty_state: Tensor | None

    def __init__(
        self,
        x_0: Tensor,
        scheduler: DDPMScheduler,
        caption_states: Tensor | None = None,
        empty_state: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("x_0", x_0)
        self.register_buffer("caption_states", caption_states)
        self.register_buffer("empty_state", empty_state)
        self.scheduler = scheduler
        _, channels, height, width = x_0.shape
        self.config = FrozenDict(
            sample_size=(height, width), in_channels=channels, out_channels=channels
        )

    @property
    def dtype(self) -> torch.dtype:
        """The images' dtype."""
        return self.x_0.dtype

    @property
    def device(self) -> torch.device:
        """The images' device."""
        return self.x_0.device

    def allowed(self, states: Tensor | None) -> Tensor | None:
        """Which images each caption (B, L, D) may describe: (B, N), None for all."""
        known = self.caption_states
        if states is None or known is None:
            return None
        distance = torch.stack([(known - state).abs().amax((1, 2)) for state in states])
        allowed = distance < SAME_CAPTION_TOLERANCE
        if self.empty_state is not None:
            distance = (states - self.empty_state).abs().amax((1, 2))
            allowed |= (distance < SAME_CAPTION_TOLERANCE)[:, None]
        unknown = (~allowed.any(1)).nonzero().flatten().tolist()
        if unknown:
            raise ValueError(
                f"captions {unknown} of the batch describe no image of the dataset. "
                f"Pass one of its {len(self.x_0)} captions or the empty one."
            )
        return allowed

    def forward(
        self,
        sample: Tensor,
        timestep: int | Tensor,
        encoder_hidden_states: Tensor | None = None,
        return_dict: bool = True,
        **_: Any,
    ) -> SimpleNamespace | tuple[Tensor]:
        """The prediction at x_t = `sample` (B, c, h, w) of the scheduler's prediction_type."""
        allowed = self.allowed(encoder_hidden_states)
        x_0 = expected_x_0(self.x_0, sample, self.scheduler, timestep, allowed)
        prediction_type = self.scheduler.config["prediction_type"]
        out = x_0
        if prediction_type != "sample":
            out = self.scheduler.predict_eps(x_0, sample, timestep).to(sample.dtype)
        if prediction_type == "v_prediction":
            out = self.scheduler.get_velocity(x_0, out, timestep)
        return SimpleNamespace(sample=out) if return_dict else (out,)
