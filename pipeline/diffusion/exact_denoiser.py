"""Diffusion without training: the perfect denoiser of a finite set of images, in closed form.

With the direct jump (5), the posterior over which image x_t came from is a softmax of squared distances, and
E[x_0 | x_t] its weighted mean. In the network's place it draws the set's own images, its error is the least that any
network can reach, and where a network departs from it the network generalises.
"""

from types import SimpleNamespace

import torch
from diffusers.configuration_utils import FrozenDict
from torch import Tensor, nn

from .scheduler import DDPMScheduler

SAME_CAPTION_TOLERANCE = (
    1e-3  # caption states closer than this in every element are of the same caption
)


def posterior_weights(
    x_0: Tensor,
    x_t: Tensor,
    scheduler: DDPMScheduler,
    t: int | Tensor,
    allowed: Tensor | None = None,
) -> Tensor:
    """p(image i | x_t) for x_t (B, ...) and images (N, ...), a uniform prior over those allowed (B, N): (B, N), float64.

    -|x_t - sqrt(abar) x_0|^2 / (2 (1 - abar)) by (5), less what is the same for every image.
    """
    images, noisy = x_0.flatten(1).double(), x_t.flatten(1).double()
    abar_t = scheduler.abar(t, noisy)
    logits = (abar_t.sqrt() * noisy @ images.T - abar_t * images.square().sum(1) / 2) / (1 - abar_t)
    return (logits if allowed is None else logits.masked_fill(~allowed, -torch.inf)).softmax(1)


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
    """The least mean squared error of x_0 that a denoiser without captions can have at t, (N,) one value an image.

    Estimated with one noise an image: `eps` (N, ...), or draws from seed 0.
    """
    if eps is None:
        eps = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0)).to(x_0)
    x_t = scheduler.add_noise(x_0, eps, t)
    return (expected_x_0(x_0, x_t, scheduler, t) - x_0).square().flatten(1).mean(1)


class ExactDenoiser(nn.Module):
    """E[x_0 | x_t, caption] of captioned latents (N, c, h, w), called as the pipeline calls its network.

    `caption_states` (N, L, D) are the images' captions, `empty_state` (1, L, D) the empty one, which stands for all
    images. Without them every call is unconditional. A caption that is no image's is a ValueError: the exact denoiser
    knows its set and nothing else.
    """

    def __init__(
        self,
        x_0: Tensor,
        scheduler: DDPMScheduler,
        caption_states: Tensor | None = None,
        empty_state: Tensor | None = None,
    ):
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
        """Of the images."""
        return self.x_0.dtype

    @property
    def device(self) -> torch.device:
        """Of the images."""
        return self.x_0.device

    def allowed(self, states: Tensor | None) -> Tensor | None:
        """Which images each caption (B, L, D) may mean: (B, N), None for all."""
        if states is None or self.caption_states is None:
            return None
        mine = torch.stack(
            [
                (self.caption_states - state).abs().amax((1, 2)) < SAME_CAPTION_TOLERANCE
                for state in states
            ]
        )
        if self.empty_state is not None:
            mine |= ((states - self.empty_state).abs().amax((1, 2)) < SAME_CAPTION_TOLERANCE)[
                :, None
            ]
        if not mine.any(1).all():
            unknown = (~mine.any(1)).nonzero().flatten().tolist()
            raise ValueError(
                f"captions {unknown} of the batch are of no image in the set: the exact denoiser knows its "
                f"{len(self.x_0)} captions and the empty one, so pass one of them"
            )
        return mine

    def forward(
        self,
        sample: Tensor,
        timestep: int | Tensor,
        encoder_hidden_states: Tensor | None = None,
        return_dict: bool = True,
        **_,
    ) -> SimpleNamespace | tuple[Tensor]:
        """What the scheduler's prediction_type asks for at x_t = `sample` (B, c, h, w)."""
        x_0 = expected_x_0(
            self.x_0, sample, self.scheduler, timestep, self.allowed(encoder_hidden_states)
        )
        kind = self.scheduler.config.prediction_type
        out = x_0
        if kind != "sample":
            out = self.scheduler.predict_eps(x_0, sample, timestep).to(sample.dtype)
        if kind == "v_prediction":
            out = self.scheduler.get_velocity(x_0, out, timestep)
        return SimpleNamespace(sample=out) if return_dict else (out,)
