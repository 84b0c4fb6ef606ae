"""Captions as the network reads them: the states of a frozen text encoder, optionally whitened."""

import re
import unicodedata

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

WHITENING_BATCH = 1024  # captions whose states are whitened at once
# Stable Diffusion runs these text encoders without an attention mask.
PADDING_AWARE_ENCODERS = ("clip", "clip_text_model")
ARTICLES = ("a", "an", "the")


def normalize(caption: str) -> str:
    """Return the caption as it is encoded: NFC, no control characters, single spaces."""
    letters: list[str] = []
    for letter in caption:
        if unicodedata.category(letter) not in ("Cc", "Cs"):
            letters.append(letter)
        elif letter.isspace():
            letters.append(" ")
    return " ".join(unicodedata.normalize("NFC", "".join(letters)).split())


def simplify(caption: str) -> str:
    """Return a caption's words in lower case, without articles and punctuation.

    "A cat!" and "the cat" become "cat". Hyphens and apostrophes inside of words stay, and so does
    an article that is the whole caption.
    """
    words = re.findall(r"\w+(?:['’-]\w+)*", normalize(caption).lower())
    return " ".join([word for word in words if word not in ARTICLES] or words)


@torch.no_grad()
def last_hidden_states(
    captions: list[str],
    tokenizer: PreTrainedTokenizerBase,
    text_encoder: PreTrainedModel,
    length: int,
    device: torch.device | str,
) -> Tensor:
    """The last hidden states (B, length, D) of captions padded or cut to `length` tokens.

    A CLIP encoder sees its padding, as in Stable Diffusion. Others do not, and their padded
    positions are zero.
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
    """Caption states (B, L, D) less their mean, times the inverse root of their covariance.

    A text encoder's states share a large mean and vary mostly along a few directions. A network
    that trains for minutes learns little of the others. The statistics come from the training
    captions and travel with the model.
    """

    mean: Tensor
    matrix: Tensor

    @register_to_config
    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("matrix", torch.eye(width))

    @classmethod
    def fit(cls, states: Tensor, ridge: float) -> "CaptionWhitening":
        """Return the whitening of states (N, L, D).

        ValueError for fewer than two states that are not padding, or for a ridge that is not above
        0.
        """
        if not ridge > 0:
            raise ValueError(
                f"ridge must be above 0, got {ridge}: few captions leave some variances at 0."
            )
        width = states.shape[-1]
        batches = states.split(WHITENING_BATCH)
        count = int(states.any(-1).sum())
        if count < 2:
            raise ValueError(
                f"whitening needs at least 2 states that are not padding, got {count}."
            )
        mean = torch.zeros(width, dtype=torch.float64, device=states.device)
        for batch in batches:
            mean += batch[batch.any(-1)].double().sum(0)
        mean /= count
        covariance = torch.zeros(width, width, dtype=torch.float64, device=states.device)
        for batch in batches:
            centred = batch[batch.any(-1)].double() - mean
            covariance += centred.T @ centred
        variance, axes = torch.linalg.eigh(covariance / (count - 1))
        scale = (variance.clamp(min=0) + ridge).rsqrt()
        whitening = cls(width)
        whitening.mean.copy_(mean)
        # The symmetric root: every axis stays itself.
        whitening.matrix.copy_((axes * scale) @ axes.T)
        return whitening

    def whiten_(self, states: Tensor) -> Tensor:
        """Whiten states (N, L, D) in place, a batch at a time."""
        for batch in states.split(WHITENING_BATCH):
            batch.copy_(self(batch))
        return states

    def forward(self, states: Tensor) -> Tensor:
        """Whitened states (B, L, D), in the dtype of `states`."""
        real = states.any(-1, keepdim=True)
        white = (states.to(self.matrix.dtype) - self.mean) @ self.matrix
        return torch.where(real, white, 0).to(states.dtype)
