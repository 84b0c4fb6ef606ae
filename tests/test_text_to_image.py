"""The pipeline: diffusers' conformance, its request errors by message, and what decides an image."""

import inspect

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils import is_torchsde_available, logging
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import WIDTH, tiny_pipeline, tiny_text, tiny_unet

from pipeline import data
from pipeline.guidance import InputError, interval
from pipeline.scheduler import DDPMScheduler
from pipeline.text_to_image import TextToImagePipeline, noise_level

STEPS = 3


@pytest.fixture
def pipe():
    return tiny_pipeline()


def draw(pipe, prompt="red heart", **request):
    """Images (B, H, W, 3) in [0, 1], from seed 0 in a few steps unless the request says otherwise."""
    request = {"seed": 0, "num_inference_steps": STEPS, "output_type": "np"} | request
    if "generator" in request:
        request["seed"] = None
    return pipe(prompt, **request)[0]


def rows_called(pipe, **request):
    """How many images the network was asked for in each of its calls."""
    rows = []
    hook = pipe.unet.register_forward_pre_hook(lambda net, args: rows.append(len(args[0])))
    draw(pipe, **request)
    hook.remove()
    return rows


def close(a, b, atol=1e-4):
    np.testing.assert_allclose(a, b, rtol=0, atol=atol)


# ---- diffusers' conformance, P1-P28


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("patch_size", [None, 2])
def test_p1_saved_and_loaded_it_draws_the_same(tmp_path, safe, patch_size, caplog):
    pipe = tiny_pipeline(patch_size=patch_size, w=1.5, caption_length=8, caption_dropout=0.1)
    pipe.save_pretrained(tmp_path, safe_serialization=safe)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_info()
    logging.enable_propagation()
    again = TextToImagePipeline.from_pretrained(tmp_path)
    logging.disable_propagation()
    logging.set_verbosity(verbosity)
    again.set_progress_bar_config(disable=True)
    assert np.array_equal(draw(again), draw(pipe))
    assert (again.config.w, again.config.caption_length, again.config.caption_dropout) == (1.5, 8, 0.1)
    assert type(again.scheduler) is DDPMScheduler
    for name, component in pipe.components.items():
        assert component is None or name in caplog.text


@pytest.mark.parametrize(("settings", "shape"), [({}, (8, 8, 3)), ({"patch_size": 4}, (32, 32, 3)), ({"sample_size": (8, 16)}, (8, 16, 3)),
                                                  ({"kind": "clip", "text": False}, (8, 8, 3))])  # fmt: skip
def test_p2_output_has_the_models_size(settings, shape):
    assert draw(tiny_pipeline(**settings))[0].shape == shape


def test_p3_call_signature_is_diffusers():
    call = inspect.signature(TextToImagePipeline.__call__).parameters
    required = {"prompt", "height", "width", "guidance_scale", "negative_prompt", "prompt_embeds", "negative_prompt_embeds",
                "cross_attention_kwargs"}  # fmt: skip
    optional = {"num_inference_steps", "num_images_per_prompt", "generator", "latents", "output_type", "return_dict"}
    assert required | optional <= set(call)
    assert all(call[name].default is not inspect.Parameter.empty for name in optional)


def test_p4_prompts_of_unequal_length_make_one_batch(pipe):
    prompts = ["red heart", "a red cat face", 100 * "very long "]
    own = [torch.Generator().manual_seed(i) for i in range(3)]
    assert len(draw(pipe, prompts, generator=own)) == 3


@pytest.mark.parametrize("w", [0.0, 2.0])
def test_p5_image_of_a_batch_is_the_image_alone(pipe, w):
    prompts = ["red heart", "a red cat face", ""]
    batch = draw(pipe, prompts, seed=5, w=w)
    for i, prompt in enumerate(prompts):
        close(batch[i], draw(pipe, prompt, seed=5 + i, w=w)[0])


def test_p6_tuple_and_dict_are_the_same(pipe):
    assert np.array_equal(draw(pipe, return_dict=False), draw(pipe, return_dict=True))


def test_p7_components_are_the_constructors(pipe):
    assert set(pipe.components) == {"unet", "scheduler", "text_encoder", "tokenizer", "vae"}
    assert set(pipe.components) | set(pipe.parameters) == set(inspect.signature(TextToImagePipeline.__init__).parameters) - {"self"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_p8_p11_dtypes_follow_and_give_no_nan(dtype):
    pipe = tiny_pipeline(patch_size=2)
    reference = draw(pipe, w=2.0)
    pipe.to(dtype)
    assert all(part.dtype == dtype for part in pipe.components.values() if isinstance(part, torch.nn.Module))
    images = draw(pipe, w=2.0)
    assert np.isfinite(images).all()
    close(images, reference, atol=0.1 if dtype == torch.bfloat16 else 1e-4)


def test_p10_optional_parts_stay_none(tmp_path):
    pipe = tiny_pipeline()
    states, empty = pipe.encode_prompt("red heart")
    bare = TextToImagePipeline(pipe.unet, pipe.scheduler)
    bare.save_pretrained(tmp_path)
    again = TextToImagePipeline.from_pretrained(tmp_path)
    assert again.text_encoder is None and again.tokenizer is None and again.vae is None
    close(draw(again, None, prompt_embeds=states, negative_prompt_embeds=empty, w=1.0), draw(pipe, w=1.0))


@pytest.mark.parametrize("prompt", ["red heart", ["red heart", "cat"]])
@pytest.mark.parametrize("n", [1, 2])
def test_p12_images_per_prompt(pipe, prompt, n):
    prompts = [prompt] if isinstance(prompt, str) else prompt
    images = draw(pipe, prompt, num_images_per_prompt=n, w=1.0)
    assert len(images) == n * len(prompts)
    for i, image in enumerate(images):
        close(image, draw(pipe, prompts[i // n], seed=i, w=1.0)[0])


def test_p13_guidance_scale_keeps_diffusers_meaning(pipe):
    for w in (-1.0, 0.0, 0.5, 6.5):
        assert np.array_equal(draw(pipe, guidance_scale=1 + w), draw(pipe, w=w))
    assert not np.allclose(draw(pipe, guidance_scale=1.0), draw(pipe, guidance_scale=7.5), atol=1e-3)


def test_p14_callbacks_see_and_change_the_tensors(pipe):
    seen = []

    def at_the_end_zero(pipe, i, t, tensors):
        seen.append((i, int(t), set(tensors)))
        return {"latents": torch.zeros_like(tensors["latents"])} if i == pipe.num_timesteps - 1 else {}

    names = pipe._callback_tensor_inputs
    x = draw(pipe, callback_on_step_end=at_the_end_zero, callback_on_step_end_tensor_inputs=names, output_type="latent")
    assert x.abs().sum() == 0
    assert seen == [(i, int(t), set(names)) for i, t in enumerate(plan(pipe.scheduler, STEPS))]
    draw(pipe, callback_on_step_end=at_the_end_zero, callback_on_step_end_tensor_inputs=["latents"])
    assert seen[-1][2] == {"latents"}


def plan(scheduler, n):
    """The timesteps of n steps."""
    scheduler = type(scheduler).from_config(scheduler.config)
    scheduler.set_timesteps(n)
    return scheduler.timesteps


def test_p14_changed_captions_change_what_follows(pipe):
    other, _ = pipe.encode_prompt("green cat")

    def swap(pipe, i, t, tensors):
        return {"prompt_embeds": other}

    swapped = draw(pipe, callback_on_step_end=swap, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    assert not np.allclose(swapped, draw(pipe), atol=1e-3)


def test_p15_callbacks_may_raise_the_guidance(pipe):
    def raise_it(pipe, i, t, tensors):
        pipe._guidance_scale += 1.0
        return tensors

    raised = draw(pipe, guidance_scale=2.0, callback_on_step_end=raise_it)
    assert pipe.guidance_scale == 2.0 + pipe.num_timesteps
    levels = [noise_level(pipe.scheduler, t) for t in plan(pipe.scheduler, STEPS)]
    assert np.array_equal(raised, draw(pipe, w=lambda level: 1.0 + levels.index(level)))


def test_p16_variants_have_their_names(pipe, tmp_path):
    pipe.save_pretrained(tmp_path, variant="fp16")
    assert (tmp_path / "unet" / "diffusion_pytorch_model.fp16.safetensors").is_file()
    again = TextToImagePipeline.from_pretrained(tmp_path, variant="fp16")
    for mine, theirs in zip(again.unet.parameters(), pipe.unet.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    pipe.save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="You are trying to load the model files of the `variant=fp16`"):
        TextToImagePipeline.from_pretrained(tmp_path / "plain", variant="fp16")


@pytest.mark.parametrize("kind", ["bert", "clip"])
def test_p17_prompts_are_encoded_without_the_network(kind):
    whole = tiny_pipeline(kind)
    texts = TextToImagePipeline(None, None, whole.text_encoder, whole.tokenizer)
    states, empty = texts.encode_prompt("red heart", negative_prompt="cat", num_images_per_prompt=2)
    networks = TextToImagePipeline(whole.unet, whole.scheduler)
    images = draw(networks, None, prompt_embeds=states, negative_prompt_embeds=empty, w=2.0)
    close(images, draw(whole, negative_prompt="cat", num_images_per_prompt=2, w=2.0))
    assert "return prompt_embeds, negative_prompt_embeds" in inspect.getsource(TextToImagePipeline.encode_prompt)


def test_p18_each_part_may_load_in_its_own_dtype(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    again = TextToImagePipeline.from_pretrained(tmp_path, torch_dtype={"unet": torch.bfloat16, "default": torch.float32})
    assert (again.unet.dtype, again.text_encoder.dtype) == (torch.bfloat16, torch.float32)
    assert np.isfinite(draw(again)).all()


def test_p19_a_device_map_loads_it_there(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    close(draw(TextToImagePipeline.from_pretrained(tmp_path, device_map="cpu")), draw(pipe))


def test_p20_output_types_hold_the_same_image(pipe):
    as_np, as_pt, as_pil = (draw(pipe, output_type=kind)[0] for kind in ("np", "pt", "pil"))
    close(as_pt.permute(1, 2, 0), as_np)
    close(np.asarray(as_pil) / 255, as_np, atol=2 / 255)
    x = draw(pipe, output_type="latent")
    close((x[0].permute(1, 2, 0) / 2 + 0.5).clamp(0, 1), as_np)


@pytest.mark.parametrize("name", [kind.name for kind in KarrasDiffusionSchedulers])
def test_p21_any_stock_scheduler_fits(pipe, name):
    if name == "DPMSolverSDEScheduler" and not is_torchsde_available():
        pytest.skip("it needs torchsde")
    pipe.scheduler.register_to_config(skip_prk_steps=True)
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    images = draw(pipe, ["red heart", "cat"], num_inference_steps=5 if "KDPM2" in name else 2, w=1.0)
    assert images.shape == (2, 8, 8, 3) and np.isfinite(images).all()


@pytest.mark.parametrize("size", [1, 2])
def test_p22_attention_slicing_changes_nothing(pipe, size):
    reference = draw(pipe, w=1.0)
    pipe.enable_attention_slicing(size)
    close(draw(pipe, w=1.0), reference, atol=1e-3)


def test_p24_interrupting_stops_within_one_step(pipe):
    seen = []

    def stop(pipe, i, t, tensors):
        seen.append(tensors["latents"])
        pipe._interrupt = i == 1
        return tensors

    x = draw(pipe, callback_on_step_end=stop, output_type="latent")
    assert len(seen) == 2 and pipe.interrupt
    assert torch.equal(x, seen[1])
    draw(pipe)
    assert not pipe.interrupt


def test_p25_states_draw_what_their_prompts_draw(pipe):
    states, away = pipe.encode_prompt(["red heart", "cat"], negative_prompt="dog")
    images = draw(pipe, None, prompt_embeds=states, negative_prompt_embeds=away, w=2.0)
    assert np.array_equal(images, draw(pipe, ["red heart", "cat"], negative_prompt="dog", w=2.0))


def test_p26_a_long_prompt_names_the_tokens_left_out(caplog):
    tokenizer, encoder = tiny_text("clip", length=77)
    pipe = TextToImagePipeline(tiny_unet(), DDPMScheduler(), encoder, tokenizer)
    states, _ = pipe.encode_prompt(100 * "@")
    assert states.shape == (1, 77, WIDTH)
    assert caplog.text.count("@") == 25
    caplog.clear()
    pipe.encode_prompt(25 * "@")
    assert not caplog.text


def test_p27_height_and_width():
    pipe = tiny_pipeline(patch_size=4, sample_size=(8, 16))
    assert draw(pipe)[0].shape == (32, 64, 3)
    assert draw(pipe, height=64, width=32)[0].shape == (64, 32, 3)
    with pytest.raises(InputError, match="height is 30, expected a multiple of 4: this model was trained at 32x64"):
        draw(pipe, height=30)


def test_p28_stable_diffusions_parts_draw_the_same_picture_in_both():
    theirs = stable_diffusion()
    before = dict(theirs.config)
    ours = TextToImagePipeline.from_pipe(theirs)
    ours.set_progress_bar_config(disable=True)
    assert ours.unet is theirs.unet and ours.vae is theirs.vae and ours.text_encoder is theirs.text_encoder
    assert dict(theirs.config) == before
    again = StableDiffusionPipeline.from_pipe(ours)
    assert again.components == theirs.components
    for scale in (1.0, 7.5):
        request = {"num_inference_steps": STEPS, "output_type": "np", "guidance_scale": scale, "num_images_per_prompt": 2}
        pictures = [p(["a cat", "a dog"], generator=torch.Generator().manual_seed(0), **request)[0] for p in (theirs, ours)]
        close(pictures[1], pictures[0])


def stable_diffusion():
    """diffusers' own pipeline over tiny parts, with a real autoencoder and a stock scheduler."""
    tokenizer, encoder = tiny_text("clip")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderTiny(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
                              num_decoder_blocks=(1, 1), scaling_factor=0.5).eval()  # fmt: skip
    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    pipe = StableDiffusionPipeline(vae, encoder, tokenizer, tiny_unet(4, text=False), scheduler, None, None,
                                   requires_safety_checker=False)  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe
