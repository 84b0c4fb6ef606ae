"""Caption states of a frozen text encoder, encoded once and cached."""

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
import torch
from datasets.fingerprint import Hasher
from torch import Tensor

from pipeline.data.fingerprint import digest, weights_digest
from pipeline.data.image_ops import DECODE_VERSION
from pipeline.data.map_cache import cache_file, cached_map
from pipeline.diffusion.captions import last_hidden_states, normalize

ENCODER_BATCH = 16  # captions that the encoder reads at once while a stream runs
COPY_BATCH = 1024  # captions' states that are copied at once
CACHED_BYTES = 2**28  # of caption states that are kept while a stream runs


# ---- caption states


def encode_batch(captions: list[str], tokenizer, text_encoder, length: int) -> Tensor:
    """The states (B, length, D) of captions that are clean already, float32 on the CPU."""
    return (
        last_hidden_states(
            captions, tokenizer, text_encoder, length, next(text_encoder.parameters()).device
        )
        .float()
        .cpu()
    )


def encode_captions(
    captions: list[str],
    tokenizer,
    text_encoder,
    length: int,
    cache_dir: str | Path | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """The states (N, length, D) of captions, each distinct one encoded once and cached by encoder, length and caption.

    Where any is new, the encoder goes to `device`, and stays there. What is longer than `length` tokens is cut, which
    `CaptionedImages.measured` tells.
    """
    captions = [normalize(caption) for caption in captions]
    distinct = sorted(set(captions))
    key = digest(
        "states",
        DECODE_VERSION,
        distinct,
        length,
        weights_digest(text_encoder),
        Hasher.hash(tokenizer.get_vocab()),
    )

    def of_batch(batch: dict) -> dict:
        states = encode_batch(
            batch["caption"], tokenizer, text_encoder.to(device or text_encoder.device), length
        )
        return {"states": [state.numpy().tobytes() for state in states]}

    encoded = cached_map(
        cache_file(cache_dir, "states", key),
        datasets.Dataset.from_dict({"caption": distinct}),
        of_batch,
        batch_size=64,
        new_fingerprint=key,
        desc="Encoding captions",
        features=datasets.Features(
            {"caption": datasets.Value("string"), "states": datasets.Value("binary")}
        ),
    )
    row = {caption: i for i, caption in enumerate(distinct)}
    rows, table = (
        torch.tensor([row[caption] for caption in captions]),
        encoded.select_columns("states").with_format("arrow"),
    )
    pieces = (rows[start : start + COPY_BATCH] for start in range(0, len(rows), COPY_BATCH))
    states = None  # of 100,000 captions they are gigabytes: once, and no second time while they are gathered
    for start, some in enumerate(pieces):
        found = bytearray(b"".join(table[some.tolist()]["states"].to_pylist()))
        piece = torch.from_numpy(np.frombuffer(found, np.float32).reshape(len(some), length, -1))
        states = piece.new_empty(len(rows), *piece.shape[1:]) if states is None else states
        states[start * COPY_BATCH : start * COPY_BATCH + len(some)] = piece
    return states


class CaptionCache:
    """The states (B, length, D) of captions as they are asked for; the latest KEPT_BYTES of them are kept.

    The encoder always reads ENCODED captions at once, so that a caption's states do not depend on what else is asked for.
    """

    def __init__(self, tokenizer, text_encoder, length: int):
        self.tokenizer, self.text_encoder, self.length = tokenizer, text_encoder, length
        self.kept: OrderedDict[str, Tensor] = OrderedDict()

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """(B, length, D) float32 on the CPU."""
        found = {caption: self.kept[caption] for caption in captions if caption in self.kept}
        new = [caption for caption in dict.fromkeys(captions) if caption not in found]
        for start in range(0, len(new), ENCODER_BATCH):
            some = new[start : start + ENCODER_BATCH]
            states = encode_batch(
                some + [""] * (ENCODER_BATCH - len(some)),
                self.tokenizer,
                self.text_encoder,
                self.length,
            )
            found |= {caption: state.clone() for caption, state in zip(some, states, strict=False)}
        for caption in captions:
            self.kept[caption] = found[caption]
            self.kept.move_to_end(caption)
        room = CACHED_BYTES // found[captions[0]].nbytes
        while len(self.kept) > room:
            self.kept.popitem(last=False)
        return torch.stack([found[caption] for caption in captions])
