"""Caption states are those of the encoder, whichever cache they come from."""

import itertools

import pytest
import torch
from tiny import seeded
from transformers import BertConfig, BertModel, CLIPTextConfig, CLIPTextModel

from pipeline.data import caption_cache
from pipeline.diffusion import text_to_image

SMALL = {
    "vocab_size": 10,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 16,
}


def bert(seed=0):
    return seeded(lambda: BertModel(BertConfig(num_hidden_layers=2, **SMALL)), seed)


def clip():
    return seeded(lambda: CLIPTextModel(CLIPTextConfig(num_hidden_layers=1, **SMALL)))


@pytest.fixture
def calls(monkeypatch):
    """The captions of each call of the encoder."""
    recorded = []
    encode = caption_cache.encode_batch

    def record(captions, *arguments):
        recorded.append(captions)
        return encode(captions, *arguments)

    monkeypatch.setattr(caption_cache, "encode_batch", record)
    return recorded


def test_encode_captions_matches_the_encoder_without_padding(tokenizer, tmp_path):
    """The oracle is the encoder run on each caption alone; padded positions are zero."""
    encoder = bert()
    captions = ["red heart", "", "cat", "red heart"]
    states = caption_cache.encode_captions(captions, tokenizer, encoder, 6, cache_dir=tmp_path)
    assert states.shape == (4, 6, 16)
    assert states.dtype == torch.float32
    assert torch.equal(states[0], states[3])
    for row, tokens in zip(states, [4, 2, 3, 4], strict=True):
        assert (row[tokens:] == 0).all()
    for caption, row in zip(captions, states, strict=True):
        with torch.no_grad():
            alone = encoder(**tokenizer(caption, return_tensors="pt")).last_hidden_state[0]
        assert torch.allclose(row[: len(alone)], alone, atol=1e-6)


@pytest.mark.parametrize("build", [bert, clip])
def test_encode_captions_matches_the_pipeline(build, tokenizer, tmp_path):
    """Training and sampling use the same states, also for the dropped caption."""
    encoder = build()
    captions = ["green cat", "", "red  heart", "face\u0301"]
    pipe = text_to_image.TextToImagePipeline(
        unet=None, scheduler=None, text_encoder=encoder, tokenizer=tokenizer, caption_length=8
    )
    states = caption_cache.encode_captions(captions, tokenizer, encoder, 8, cache_dir=tmp_path)
    sampled = pipe._caption_states(captions, torch.device("cpu"))
    empty = pipe._caption_states([""], torch.device("cpu"))
    assert torch.allclose(states, sampled, atol=1e-6)
    assert torch.allclose(states[1], empty[0], atol=1e-6)


def test_encode_captions_caches_by_encoder_and_caption(tokenizer, tmp_path, monkeypatch, calls):
    def encode(captions, encoder, length=5):
        return caption_cache.encode_captions(
            captions, tokenizer, encoder, length, cache_dir=tmp_path
        )

    # Three captions are copied in two batches.
    monkeypatch.setattr(caption_cache, "COPY_BATCH", 2)
    first = encode(["cat", "red"], bert())
    again = encode(["red", "cat", "cat"], bert())
    assert calls == [["cat", "red"]]
    assert torch.equal(again, first[[1, 0, 0]])
    assert not torch.allclose(encode(["cat", "red"], bert(seed=1)), first)
    assert len(calls) == 2
    assert encode(["cat", "red"], bert(), 6).shape == (2, 6, 16)
    assert len(calls) == 3


def test_caption_cache_states_do_not_depend_on_the_request(tokenizer, tmp_path):
    """A resumed stream repeats them bit for bit, whatever captions are beside them."""
    encoder = bert()
    words = ["red", "heart", "cat", "green", "face"]
    captions = [" ".join(pair) for pair in itertools.permutations(words, 2)]
    cache = caption_cache.CaptionCache(tokenizer, encoder, 6)
    states = cache(captions)
    expected = caption_cache.encode_captions(captions, tokenizer, encoder, 6, cache_dir=tmp_path)
    assert torch.allclose(states, expected, atol=1e-6)
    for request in (captions[3:4], captions[9:2:-1], captions[5:6] * 3):
        fresh = caption_cache.CaptionCache(tokenizer, encoder, 6)(request)
        assert torch.equal(fresh, states[[captions.index(caption) for caption in request]])
        assert torch.equal(cache(request), fresh)


def test_caption_cache_forgets_the_least_recent_captions(tokenizer, monkeypatch, calls):
    monkeypatch.setattr(caption_cache, "CACHED_BYTES", 3 * 6 * 16 * 4)
    cache = caption_cache.CaptionCache(tokenizer, bert(), 6)
    for caption, misses in zip("abcbad", [1, 2, 3, 3, 3, 4], strict=True):
        cache([caption])
        assert len(calls) == misses
        assert len(cache.cached) <= 3
    cache(["c"])
    assert len(calls) == 5


def test_caption_cache_always_encodes_batches_of_one_size(tokenizer, calls):
    """Rounding depends on the size of a batch."""
    caption_cache.CaptionCache(tokenizer, bert(), 6)([f"red {i}" for i in range(20)])
    assert [len(captions) for captions in calls] == [caption_cache.ENCODER_BATCH] * 2
