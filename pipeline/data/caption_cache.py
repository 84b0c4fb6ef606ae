"""Caption states of a frozen text encoder, encoded once and cached."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

import datasets
import numpy as np
import torch
from datasets.fingerprint import Hasher
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.data.fingerprint import digest, weights_digest
from pipeline.data.image_ops import DECODE_VERSION
from pipeline.data.map_cache import cache_file, cached_map, read_arrays
from pipeline.diffusion.captions import last_hidden_states, normalize

# Captions in each call of the encoder while a stream is read.
ENCODER_BATCH = 16
# Captions whose states are copied at once.
COPY_BATCH = 1024
# Memory for the states that a CaptionCache holds.
CACHED_BYTES = 2**28


def encode_batch(
    captions: list[str],
    tokenizer: PreTrainedTokenizerBase,
    text_encoder: PreTrainedModel,
    length: int,
) -> Tensor:
    """Return the states (B, length, D) of normalized captions, float32 on the CPU."""
    device = next(text_encoder.parameters()).device
    states = last_hidden_states(captions, tokenizer, text_encoder, length, device)
    return states.float().cpu()


def encode_captions(
    captions: list[str],
    tokenizer: PreTrainedTokenizerBase,
    text_encoder: PreTrainedModel,
    length: int,
    read: Callable[[str], str] = normalize,
    cache_dir: str | Path | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Return the states (N, length, D) of captions, cached by (encoder, length, captions).

    read: the words that the encoder sees of a caption. Each distinct text is encoded once. Encoding
    moves the encoder to `device`. Captions are cut at `length` tokens;
    `CaptionedImages.with_caption_lengths` reports how many.
    """
    captions = [read(caption) for caption in captions]
    distinct = sorted(set(captions))
    vocabulary = Hasher.hash(tokenizer.get_vocab())
    key = digest(
        "states", DECODE_VERSION, distinct, length, weights_digest(text_encoder), vocabulary
    )

    def encode(batch: dict) -> dict:
        if device is not None:
            # A decorator of transformers hides the signature.
            text_encoder.to(device)  # pyright: ignore[reportArgumentType]
        states = encode_batch(batch["caption"], tokenizer, text_encoder, length)
        return {"states": [state.numpy().tobytes() for state in states]}

    columns = {"caption": datasets.Value("string"), "states": datasets.Value("binary")}
    encoded = cached_map(
        cache_file(cache_dir, "states", key),
        datasets.Dataset.from_dict({"caption": distinct}),
        encode,
        batch_size=64,
        new_fingerprint=key,
        desc="Encoding captions",
        features=datasets.Features(columns),
    )
    table = encoded.select_columns("states").with_format("arrow")
    row_of = {caption: row for row, caption in enumerate(distinct)}
    rows = [row_of[caption] for caption in captions]
    width = read_arrays(table, "states", [0], np.float32, (length, -1)).shape[-1]
    # The states of 100,000 captions are gigabytes: fill one tensor instead of concatenating.
    states = torch.empty(len(rows), length, width)
    for start in range(0, len(rows), COPY_BATCH):
        batch = rows[start : start + COPY_BATCH]
        states[start : start + len(batch)] = read_arrays(
            table, "states", batch, np.float32, (length, width)
        )
    return states


class CaptionCache:
    """Encodes captions on demand and holds the most recent CACHED_BYTES of states.

    The encoder always reads ENCODER_BATCH captions at once, because its rounding depends on the
    batch: the states of a caption do not depend on the others in a request.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text_encoder: PreTrainedModel,
        length: int,
        read: Callable[[str], str] = normalize,
    ) -> None:
        self.tokenizer = tokenizer
        self.text_encoder = text_encoder
        self.length = length
        self.read = read
        self.cached: OrderedDict[str, Tensor] = OrderedDict()

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """Return the states (B, length, D) of captions, float32 on the CPU."""
        new = [caption for caption in dict.fromkeys(captions) if caption not in self.cached]
        for start in range(0, len(new), ENCODER_BATCH):
            batch = new[start : start + ENCODER_BATCH]
            words = [self.read(caption) for caption in batch]
            padding = [""] * (ENCODER_BATCH - len(batch))
            states = encode_batch(words + padding, self.tokenizer, self.text_encoder, self.length)
            for caption, state in zip(batch, states, strict=False):
                self.cached[caption] = state.clone()
        for caption in captions:
            self.cached.move_to_end(caption)
        states = torch.stack([self.cached[caption] for caption in captions])
        while len(self.cached) > CACHED_BYTES // states[0].nbytes:
            self.cached.popitem(last=False)
        return states
