"""Captions in the pipeline: encoding with and without the network (P17, P25, P26)."""

import inspect

import numpy as np
import pytest
import torch
from generation import (
    assert_close,
    generate,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import WIDTH, tiny_pipeline, tiny_text, tiny_unet

from pipeline import TextToImagePipeline
from pipeline.data import caption_cache
from pipeline.diffusion.captions import simplify
from pipeline.diffusion.guidance import InputError
from pipeline.diffusion.scheduler import DDPMScheduler


@pytest.mark.parametrize("kind", ["bert", "clip"])
def test_encode_prompt_works_without_the_network(kind):
    whole = tiny_pipeline(kind)
    texts = TextToImagePipeline(None, None, whole.text_encoder, whole.tokenizer)
    states, empty = texts.encode_prompt("red heart", negative_prompt="cat", num_images_per_prompt=2)
    networks = TextToImagePipeline(whole.unet, whole.scheduler)
    images = generate(networks, None, prompt_embeds=states, negative_prompt_embeds=empty, w=2.0)
    assert_close(images, generate(whole, negative_prompt="cat", num_images_per_prompt=2, w=2.0))
    assert "return prompt_embeds, negative_prompt_embeds" in inspect.getsource(
        TextToImagePipeline.encode_prompt
    )


def test_encode_prompt_states_generate_like_their_prompts(pipe):
    states, away = pipe.encode_prompt(["red heart", "cat"], negative_prompt="dog")
    images = generate(pipe, None, prompt_embeds=states, negative_prompt_embeds=away, w=2.0)
    assert np.array_equal(
        images, generate(pipe, ["red heart", "cat"], negative_prompt="dog", w=2.0)
    )


def test_encode_prompt_names_the_tokens_left_out(caplog):
    tokenizer, encoder = tiny_text("clip", length=77)
    pipe = TextToImagePipeline(tiny_unet(), DDPMScheduler(), encoder, tokenizer)
    states, _ = pipe.encode_prompt(100 * "@")
    assert states.shape == (1, 77, WIDTH)
    assert caplog.text.count("@") == 25
    caplog.clear()
    pipe.encode_prompt(25 * "@")
    assert not caplog.text


@pytest.mark.parametrize("kind", ["bert", "clip"])
def test_encode_prompt_matches_encode_captions(kind, tmp_path):
    tokenizer, encoder = tiny_text(kind)
    pipe = TextToImagePipeline(None, None, encoder, tokenizer, caption_length=6)
    captions = ["red heart", "", "a  red\tcat", "very " * 9, "caf\u0065\u0301", "\u200fdog\u0000"]
    trained = caption_cache.encode_captions(captions, tokenizer, encoder, 6, cache_dir=tmp_path)
    states, empty = pipe.encode_prompt(captions)
    torch.testing.assert_close(states, trained)
    torch.testing.assert_close(empty, trained[1:2].expand(len(captions), -1, -1))


@pytest.mark.parametrize("kind", ["bert", "clip"])
def test_encode_prompt_reads_simple_words_where_the_model_asks_for_it(kind, tmp_path):
    tokenizer, encoder = tiny_text(kind)
    simple, plain = (
        TextToImagePipeline(None, None, encoder, tokenizer, caption_length=6, simplify_captions=on)
        for on in (True, False)
    )
    typed = ["A red heart!", "the Red Heart", "red heart"]
    states, _ = simple.encode_prompt(typed)
    wanted, _ = plain.encode_prompt("red heart")
    torch.testing.assert_close(states, wanted.expand(3, -1, -1))
    assert not torch.allclose(plain.encode_prompt(typed)[0][0], wanted[0])
    options = {"read": simplify, "cache_dir": tmp_path}
    trained = caption_cache.encode_captions(typed, tokenizer, encoder, 6, **options)
    torch.testing.assert_close(states, trained)
    cached = caption_cache.CaptionCache(tokenizer, encoder, 6, simplify)(typed)
    torch.testing.assert_close(states, cached)


@settings(max_examples=50, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
def test_encode_prompt_takes_any_unicode_text(caption):
    tokenizer, encoder = tiny_text()
    states, _ = TextToImagePipeline(None, None, encoder, tokenizer).encode_prompt(caption)
    assert states.shape == (1, 8, WIDTH) and states.isfinite().all()


def test_encode_prompt_zeroes_padding_except_for_clip():
    padded, _ = tiny_pipeline("bert").encode_prompt(
        "red heart"
    )  # [CLS] red heart [SEP], then padding
    assert padded[0, :4].abs().amin(0).all() and padded[0, 4:].count_nonzero() == 0
    tokenizer, encoder = tiny_text("clip")
    ids = tokenizer("a b", padding="max_length", return_tensors="pt").input_ids
    states, _ = tiny_pipeline("clip").encode_prompt("a b")
    assert torch.equal(states, encoder(ids).last_hidden_state)


def test_encode_prompt_needs_a_text_encoder(pipe):
    states, _ = pipe.encode_prompt("red heart")
    bare = TextToImagePipeline(pipe.unet, pipe.scheduler)
    bare.set_progress_bar_config(disable=True)
    with pytest.raises(InputError, match="negative_prompt_embeds"):
        bare.denoise(prompt_embeds=states, w=2.0)
    with pytest.raises(InputError, match="red heart"):
        bare.denoise("red heart")
    assert_close(generate(bare, None, prompt_embeds=states), generate(pipe))


def test_encode_prompt_needs_a_caption_length():
    tokenizer, encoder = tiny_text()
    tokenizer.model_max_length = 10**30
    with pytest.raises(InputError, match="caption_length .*1000000"):
        TextToImagePipeline(tiny_unet(), DDPMScheduler(), encoder, tokenizer).encode_prompt("cat")
