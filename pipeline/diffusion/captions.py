"""Captions as a network reads them: a frozen text encoder's states, whitened where the model was trained so."""

import unicodedata

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

WHITENING_BATCH = 1024  # captions whose states are whitened at once
PADDING_AWARE_ENCODERS = (
    "clip",
    "clip_text_model",
)  # text encoders that Stable Diffusion runs without an attention mask


def normalize(caption: str) -> str:
    """A caption as it is encoded, in training and in inference: NFC, no control characters or lone surrogates, single spaces."""
    kept = "".join(
        c if unicodedata.category(c) not in ("Cc", "Cs") else " " if c.isspace() else ""
        for c in caption
    )
    return " ".join(unicodedata.normalize("NFC", kept).split())


@torch.no_grad()
def last_hidden_states(
    captions: list[str], tokenizer, text_encoder, length: int, device: torch.device
) -> Tensor:
    """The last hidden states (B, length, D), on a device, of captions that are padded or cut to `length` tokens.

    A CLIP encoder sees its padding, as in Stable Diffusion; others do not, and their padded positions are zero.
    """
    tokens = tokenizer(
        captions,
        padding="max_length",
        max_length=length,
        truncation=True,
        return_tensors="pt",
        return_attention_mask=True,
    ).to(device)
    if text_encoder.config.model_type in PADDING_AWARE_ENCODERS:
        return text_encoder(tokens.input_ids).last_hidden_state
    states = text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
    return states * tokens.attention_mask[..., None]


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
            raise ValueError(
                f"ridge is {ridge}, expected a number above 0: few captions leave directions without variance"
            )
        tokens = lambda: (some[some.any(-1)].double() for some in states.split(WHITENING_BATCH))
        count = sum(map(len, tokens()))
        if count < 2:
            raise ValueError(
                f"whitening needs at least two caption states that are not padding, got {count}"
            )
        mean = sum(some.sum(0) for some in tokens()) / count
        covariance = sum((some - mean).T @ (some - mean) for some in tokens()) / (count - 1)
        variance, axes = torch.linalg.eigh(covariance)
        out = cls(states.shape[-1])
        out.mean.copy_(mean)
        out.matrix.copy_(
            (axes * (variance.clamp(min=0) + ridge).rsqrt()) @ axes.T
        )  # symmetric: axes keep their names
        return out

    def whiten_(self, states: Tensor) -> Tensor:
        """States (N, L, D) whitened in their own memory, a piece at a time."""
        for some in states.split(WHITENING_BATCH):
            some.copy_(self(some))
        return states

    def forward(self, states: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D), in the dtype of `states`."""
        real = states.any(-1, keepdim=True)
        white = (states.to(self.matrix.dtype) - self.mean) @ self.matrix
        return torch.where(real, white, 0).to(states.dtype)
