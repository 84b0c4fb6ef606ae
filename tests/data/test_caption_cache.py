"""Caption states are those of the encoder, whichever cache they come from."""

import itertools

import torch
from transformers import BertConfig, BertModel, CLIPTextConfig, CLIPTextModel

from pipeline.data import caption_cache
from pipeline.diffusion import text_to_image


def bert(seed=0):
    torch.manual_seed(seed)
    return BertModel(
        BertConfig(
            vocab_size=len(WORDS),
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=16,
        )
    ).eval()


def test_encode_captions_matches_the_encoder_without_padding(tokenizer, tmp_path):
    """The encoder run on the caption alone, without any padding, is the oracle."""
    encoder, captions = bert(), ["red heart", "", "cat", "red heart"]
    states = caption_cache.encode_captions(captions, tokenizer, encoder, 6, tmp_path)
    assert (
        states.shape == (4, 6, 16)
        and states.dtype == torch.float32
        and torch.equal(states[0], states[3])
    )
    for row, tokens in zip(states, [4, 2, 3, 4], strict=True):
        assert (row[tokens:] == 0).all()
    for caption, row in zip(captions, states, strict=True):
        with torch.no_grad():
            alone = encoder(**tokenizer(caption, return_tensors="pt")).last_hidden_state[0]
        assert torch.allclose(row[: len(alone)], alone, atol=1e-6)


def test_encode_captions_matches_the_pipeline(tokenizer, tmp_path):
    """Otherwise the network would see other captions in sampling than in training; the dropped one is the empty prompt."""
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(WORDS),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=8,
        )
    ).eval()
    captions = ["green cat", "", "red  heart", "face\u0301"]
    for encoder in (bert(), clip):
        pipe = text_to_image.TextToImagePipeline(
            unet=None, scheduler=None, text_encoder=encoder, tokenizer=tokenizer, caption_length=8
        )
        states = caption_cache.encode_captions(captions, tokenizer, encoder, 8, tmp_path)
        asked, empty = (
            pipe._caption_states(captions, torch.device("cpu")),
            pipe._caption_states([""], torch.device("cpu")),
        )
        assert torch.allclose(states, asked, atol=1e-6) and torch.allclose(
            states[1], empty[0], atol=1e-6
        )


def test_encode_captions_caches_by_encoder_and_caption(tokenizer, tmp_path, monkeypatch):
    calls, encode = [], caption_cache.encode_batch
    monkeypatch.setattr(
        caption_cache,
        "encode_batch",
        lambda captions, *a: calls.append(captions) or encode(captions, *a),
    )
    monkeypatch.setattr(caption_cache, "COPY_BATCH", 2)  # of three captions
    first = caption_cache.encode_captions(["cat", "red"], tokenizer, bert(), 5, tmp_path)
    again = caption_cache.encode_captions(["red", "cat", "cat"], tokenizer, bert(), 5, tmp_path)
    assert (
        calls == [["cat", "red"]]
        and torch.equal(again[0], first[1])
        and torch.equal(again[2], first[0])
    )
    other = caption_cache.encode_captions(["cat", "red"], tokenizer, bert(seed=1), 5, tmp_path)
    assert len(calls) == 2 and not torch.allclose(other, first)
    assert (
        caption_cache.encode_captions(["cat", "red"], tokenizer, bert(), 6, tmp_path).shape
        == (2, 6, 16)
        and len(calls) == 3
    )


def test_caption_cache_states_do_not_depend_on_the_request(tokenizer, tmp_path, monkeypatch):
    """Bit for bit whatever is asked for beside them, so that a resumed stream repeats; and what is kept has a bound."""
    encoder, captions = (
        bert(),
        [" ".join(words) for words in itertools.permutations(WORDS[5:], 2)],
    )  # 20
    whole = caption_cache.encode_captions(captions, tokenizer, encoder, 6, tmp_path)
    states = caption_cache.CaptionCache(tokenizer, encoder, 6)
    assert torch.allclose(states(captions), whole, atol=1e-6)
    first = states(captions)
    for some in (captions[3:4], captions[9:2:-1], captions[5:6] * 3):
        fresh = caption_cache.CaptionCache(tokenizer, encoder, 6)(some)
        assert torch.equal(
            fresh, first[[captions.index(caption) for caption in some]]
        ) and torch.equal(states(some), fresh)
    calls, encode = [], caption_cache.encode_batch
    monkeypatch.setattr(
        caption_cache,
        "encode_batch",
        lambda captions, *a: calls.append(captions) or encode(captions, *a),
    )
    monkeypatch.setattr(caption_cache, "CACHED_BYTES", 3 * 6 * 16 * 4)
    few = caption_cache.CaptionCache(tokenizer, encoder, 6)
    for caption, misses in zip("abcbad", [1, 2, 3, 3, 3, 4], strict=True):
        few([caption])
        assert len(calls) == misses and len(few.kept) <= 3
    few(["c"])
    assert len(calls) == 5, "the one that was not asked for the longest is forgotten"
    caption_cache.CaptionCache(tokenizer, encoder, 6)(captions)
    assert {len(asked) for asked in calls} == {caption_cache.ENCODER_BATCH}, (
        "one shape, whose rounding is one"
    )
