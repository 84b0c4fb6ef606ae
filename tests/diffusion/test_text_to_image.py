"""The pipeline: diffusers' conformance, its request errors by message, and what decides an image."""

import inspect
import subprocess
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
from diffusers.callbacks import SDCFGCutoffCallback
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils import is_torchsde_available, logging
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from tiny import WIDTH, WORDS, tiny_pipeline, tiny_text, tiny_unet

from pipeline.data import caption_cache
from pipeline.diffusion import text_to_image
from pipeline.diffusion.captions import CaptionWhitening
from pipeline.diffusion.guidance import InputError, interval
from pipeline.diffusion.scheduler import DDPMScheduler
from pipeline.diffusion.text_to_image import TextToImagePipeline, noise_level

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
    assert (again.config.w, again.config.caption_length, again.config.caption_dropout) == (
        1.5,
        8,
        0.1,
    )
    assert type(again.scheduler) is DDPMScheduler
    for name, component in pipe.components.items():
        assert component is None or name in caplog.text


def test_p1_a_fresh_process_loads_it(tmp_path):
    parts = tiny_pipeline(patch_size=2).components
    TextToImagePipeline(**{**parts, "whitening": CaptionWhitening(WIDTH)}).save_pretrained(tmp_path)
    lines = (
        "import sys; from pipeline import TextToImagePipeline\n"
        "pipe = TextToImagePipeline.from_pretrained(sys.argv[1])\n"
        "print(type(pipe.vae).__name__, type(pipe.whitening).__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", lines, tmp_path],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "PatchAutoencoder CaptionWhitening\n", done.stderr


@pytest.mark.parametrize(
    ("settings", "shape"),
    [
        ({}, (8, 8, 3)),
        ({"patch_size": 4}, (32, 32, 3)),
        ({"sample_size": (8, 16)}, (8, 16, 3)),
        ({"kind": "clip", "text": False}, (8, 8, 3)),
    ],
)
def test_p2_output_has_the_models_size(settings, shape):
    assert draw(tiny_pipeline(**settings))[0].shape == shape


def test_p3_call_signature_is_diffusers():
    call = inspect.signature(TextToImagePipeline.__call__).parameters
    required = {
        "prompt",
        "height",
        "width",
        "guidance_scale",
        "negative_prompt",
        "prompt_embeds",
        "negative_prompt_embeds",
        "cross_attention_kwargs",
    }
    optional = {
        "num_inference_steps",
        "num_images_per_prompt",
        "generator",
        "latents",
        "output_type",
        "return_dict",
    }
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
    assert set(pipe.components) == {
        "unet",
        "scheduler",
        "text_encoder",
        "tokenizer",
        "vae",
        "whitening",
    }
    arguments = set(inspect.signature(TextToImagePipeline.__init__).parameters) - {"self"}
    assert set(pipe.components) | set(pipe.parameters) == arguments


@pytest.mark.parametrize(
    ("dtype", "off"), [(torch.float64, 1e-5), (torch.float16, 1e-3), (torch.bfloat16, 1e-2)]
)
def test_p8_p11_dtypes_follow_and_draw_the_same_picture(dtype, off):
    pipe = tiny_pipeline(patch_size=2)
    reference = draw(pipe, w=2.0, eta=0)
    pipe.to(dtype)
    assert all(
        part.dtype == dtype
        for part in pipe.components.values()
        if isinstance(part, torch.nn.Module)
    )
    images = draw(pipe, w=2.0, eta=0)
    assert np.isfinite(images).all()
    assert np.abs(images - reference).mean() < off
    assert draw(pipe, output_type="latent").dtype == torch.promote_types(dtype, torch.float32)


def test_p9_a_saved_half_precision_model_loads_as_one_and_draws_the_same(tmp_path):
    pipe = tiny_pipeline(patch_size=2).to(torch.float16)
    pipe.save_pretrained(tmp_path)
    again = TextToImagePipeline.from_pretrained(tmp_path, dtype=torch.float16)
    again.set_progress_bar_config(disable=True)
    assert all(
        part.dtype == torch.float16
        for part in again.components.values()
        if isinstance(part, torch.nn.Module)
    )
    close(draw(again, w=2.0), draw(pipe, w=2.0), atol=1e-2)


def test_p9_weights_may_lie_in_a_narrower_dtype_than_is_computed_in(pipe):
    pipe.unet.enable_layerwise_casting(
        storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32
    )
    assert np.isfinite(draw(pipe, w=2.0)).all()
    assert pipe.unet.conv_in.weight.dtype == torch.float8_e4m3fn


def test_p1_a_pipeline_with_whitened_captions_draws_the_same_after_loading(tmp_path, pipe):
    states = torch.cat([pipe.encode_prompt(word)[0] for word in WORDS])
    white = TextToImagePipeline(
        **{**pipe.components, "whitening": CaptionWhitening.fit(states, 0.1)}
    )
    white.set_progress_bar_config(disable=True)
    assert torch.equal(white.encode_prompt("red")[0], white.whitening(pipe.encode_prompt("red")[0]))
    white.save_pretrained(tmp_path)
    again = TextToImagePipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert np.array_equal(draw(again, w=1.0), draw(white, w=1.0))
    assert np.abs(draw(white, w=1.0) - draw(pipe, w=1.0)).max() > 1e-3


def test_p10_optional_parts_stay_none(tmp_path):
    pipe = tiny_pipeline()
    states, empty = pipe.encode_prompt("red heart")
    bare = TextToImagePipeline(pipe.unet, pipe.scheduler)
    bare.save_pretrained(tmp_path)
    again = TextToImagePipeline.from_pretrained(tmp_path)
    assert (
        again.text_encoder is None
        and again.tokenizer is None
        and again.vae is None
        and again.whitening is None
    )
    close(
        draw(again, None, prompt_embeds=states, negative_prompt_embeds=empty, w=1.0),
        draw(pipe, w=1.0),
    )


@pytest.mark.parametrize("prompt", ["red heart", ["red heart", "cat"]])
@pytest.mark.parametrize("n", [1, 2])
def test_p12_images_per_prompt(pipe, prompt, n):
    prompts = [prompt] if isinstance(prompt, str) else prompt
    images = draw(pipe, prompt, num_images_per_prompt=n, w=1.0)
    assert len(images) == n * len(prompts)
    for i, image in enumerate(images):
        close(image, draw(pipe, prompts[i // n], seed=i, w=1.0)[0])


def test_p13_guidance_scale_keeps_diffusers_meaning(pipe):
    for w in (0.0, 0.5, 6.5):
        assert np.array_equal(draw(pipe, guidance_scale=1 + w), draw(pipe, w=w))
    for scale in (
        0,
        0.5,
        lambda level: 0.0,
    ):  # without guidance, as in diffusers; the lecture's -1 is w's alone
        assert np.array_equal(draw(pipe, guidance_scale=scale), draw(pipe, w=0.0))
    assert not np.allclose(
        draw(pipe, guidance_scale=1.0), draw(pipe, guidance_scale=7.5), atol=1e-3
    )


def test_p14_callbacks_see_and_change_the_tensors(pipe):
    seen = []

    def at_the_end_zero(pipe, i, t, tensors):
        seen.append((i, int(t), set(tensors)))
        return (
            {"latents": torch.zeros_like(tensors["latents"])} if i == pipe.num_timesteps - 1 else {}
        )

    names = pipe._callback_tensor_inputs
    x = draw(
        pipe,
        callback_on_step_end=at_the_end_zero,
        callback_on_step_end_tensor_inputs=names,
        output_type="latent",
    )
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

    swapped = draw(
        pipe, callback_on_step_end=swap, callback_on_step_end_tensor_inputs=["prompt_embeds"]
    )
    assert not np.allclose(swapped, draw(pipe), atol=1e-3)


def test_p15_callbacks_may_raise_the_guidance(pipe):
    def raise_it(pipe, i, t, tensors):
        pipe._guidance_scale += 1.0
        return tensors

    raised = draw(pipe, guidance_scale=2.0, callback_on_step_end=raise_it)
    assert pipe.guidance_scale == 2.0 + pipe.num_timesteps
    levels = [noise_level(pipe.scheduler, t) for t in plan(pipe.scheduler, STEPS)]
    assert np.array_equal(raised, draw(pipe, w=lambda level: 1.0 + levels.index(level)))
    of_tensors = draw(
        pipe, guidance_scale=torch.tensor([2.0]), callback_on_step_end=raise_it
    )  # which `+=` changes in place
    assert np.array_equal(of_tensors, raised)


def test_an_eta_that_the_variance_does_not_go_with_is_refused():
    pipe = tiny_pipeline(scheduler=DDPMScheduler(variance_type="fixed_large"))
    assert draw(pipe, eta=1.0).shape == (1, 8, 8, 3)
    with pytest.raises(
        InputError,
        match="eta is 0.5, expected 1 with the scheduler's variance_type fixed_large: leave it out",
    ):
        draw(pipe, eta=0.5)


def test_p15_diffusers_own_callbacks_stop_the_guidance(pipe):
    levels = [noise_level(pipe.scheduler, t) for t in plan(pipe.scheduler, STEPS)]
    cut = draw(
        pipe,
        w=3.0,
        callback_on_step_end=SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1),
    )
    assert np.array_equal(cut, draw(pipe, w=lambda level: 3.0 if levels.index(level) < 2 else 0.0))
    assert not np.allclose(cut, draw(pipe, w=3.0), atol=1e-3)


def test_p15_a_callback_that_drops_a_row_is_told_what_the_rows_are(pipe):
    """As diffusers' documentation cuts the guidance: there the rows are the unconditional and the conditional ones."""
    halved = lambda pipe, i, t, tensors: {"prompt_embeds": tensors["prompt_embeds"].chunk(2)[-1]}
    call = {"callback_on_step_end": halved, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    with pytest.raises(
        InputError,
        match=r"gave prompt_embeds of shape \(1, .*expected \(2, .*: a row an image here",
    ):
        draw(pipe, ["red heart", "cat"], **call)


def test_a_scheduler_of_flow_matching_is_refused(pipe):
    flow = tiny_pipeline(scheduler=diffusers.FlowMatchEulerDiscreteScheduler())
    with pytest.raises(
        InputError,
        match="FlowMatchEulerDiscreteScheduler has no init_noise_sigma, expected a scheduler",
    ):
        draw(flow)


def test_p16_variants_have_their_names(pipe, tmp_path):
    pipe.save_pretrained(tmp_path, variant="fp16")
    assert (tmp_path / "unet" / "diffusion_pytorch_model.fp16.safetensors").is_file()
    again = TextToImagePipeline.from_pretrained(tmp_path, variant="fp16")
    for mine, theirs in zip(again.unet.parameters(), pipe.unet.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    pipe.save_pretrained(tmp_path / "plain")
    with pytest.raises(
        ValueError, match="You are trying to load the model files of the `variant=fp16`"
    ):
        TextToImagePipeline.from_pretrained(tmp_path / "plain", variant="fp16")


@pytest.mark.parametrize("kind", ["bert", "clip"])
def test_p17_prompts_are_encoded_without_the_network(kind):
    whole = tiny_pipeline(kind)
    texts = TextToImagePipeline(None, None, whole.text_encoder, whole.tokenizer)
    states, empty = texts.encode_prompt("red heart", negative_prompt="cat", num_images_per_prompt=2)
    networks = TextToImagePipeline(whole.unet, whole.scheduler)
    images = draw(networks, None, prompt_embeds=states, negative_prompt_embeds=empty, w=2.0)
    close(images, draw(whole, negative_prompt="cat", num_images_per_prompt=2, w=2.0))
    assert "return prompt_embeds, negative_prompt_embeds" in inspect.getsource(
        TextToImagePipeline.encode_prompt
    )


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_p18_each_part_may_load_in_its_own_dtype(pipe, tmp_path, name):
    pipe.save_pretrained(tmp_path)
    again = TextToImagePipeline.from_pretrained(
        tmp_path, **{name: {"unet": torch.bfloat16, "default": torch.float32}}
    )
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
    images = draw(
        pipe, ["red heart", "cat"], num_inference_steps=5 if "KDPM2" in name else 2, w=1.0
    )
    assert images.shape == (2, 8, 8, 3) and np.isfinite(images).all()


def test_stock_ddim_of_a_network_that_predicts_x_0_draws_what_ours_does_without_noise(pipe):
    """Left to its default it takes the noise from the x_0 before it was clipped, which leaves halos."""
    pipe.scheduler = DDPMScheduler(
        beta_schedule="sigmoid", prediction_type="sample", timestep_spacing="trailing"
    )
    ours = draw(pipe, w=4.0, num_inference_steps=8, eta=0)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    close(draw(pipe, w=4.0, num_inference_steps=8), ours)


@pytest.mark.parametrize("size", [1, 2])
def test_p22_attention_slicing_changes_nothing(pipe, size):
    reference = draw(pipe, w=1.0)
    pipe.enable_attention_slicing(size)
    close(draw(pipe, w=1.0), reference, atol=1e-3)


def test_p23_a_pipeline_with_whitening_is_offloaded():
    """It has buffers alone, and accelerate's hooks ask each part for a parameter."""
    pipe = tiny_pipeline(w=1.0)
    pipe.register_modules(whitening=CaptionWhitening(WIDTH))
    expected = draw(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    assert np.array_equal(draw(pipe), expected) and np.array_equal(draw(pipe), expected)


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
    with pytest.raises(
        InputError, match="height is 30, expected a multiple of 4: this model was trained at 32x64"
    ):
        draw(pipe, height=30)


def test_p28_stable_diffusions_parts_draw_the_same_picture_in_both():
    theirs = stable_diffusion()
    before = dict(theirs.config)
    ours = TextToImagePipeline.from_pipe(theirs)
    ours.set_progress_bar_config(disable=True)
    assert (
        ours.unet is theirs.unet
        and ours.vae is theirs.vae
        and ours.text_encoder is theirs.text_encoder
    )
    assert dict(theirs.config) == before
    close(
        *(draw_jointly(p) for p in (theirs, ours))
    )  # each by its own default, which is s = 7.5 = 1 + w
    assert (ours.config.w, TextToImagePipeline.from_pipe(theirs, w=1.0).config.w) == (6.5, 1.0)
    assert TextToImagePipeline.from_pipe(tiny_pipeline(w=2.0)).config.w == 2.0
    again = StableDiffusionPipeline.from_pipe(
        ours, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    assert again.components == theirs.components
    for scale in (1.0, 7.5):
        close(
            *(
                draw_jointly(p, guidance_scale=scale, num_images_per_prompt=2)
                for p in (theirs, ours)
            )
        )


def test_p28_a_pipeline_over_one_of_ours_has_its_own_parts_too():
    """diffusers passes on those whose classes it knows."""
    theirs = tiny_pipeline(patch_size=2, caption_length=8, w=2.0)
    theirs.register_modules(whitening=CaptionWhitening(WIDTH))
    ours = TextToImagePipeline.from_pipe(theirs)
    ours.set_progress_bar_config(disable=True)
    assert (
        ours.components == theirs.components
        and ours.whitening is not None
        and ours.vae_scale_factor == 2
    )
    assert {key: ours.config[key] for key in ("w", "caption_length", "caption_dropout")} == {
        key: theirs.config[key] for key in ("w", "caption_length", "caption_dropout")
    }
    close(draw(ours), draw(theirs))


def test_stable_diffusions_index_without_ours_is_guided_as_by_its_own_pipeline():
    """What a stranger's custom-pipeline load of anybody's repository comes by."""
    assert (
        TextToImagePipeline.extract_init_dict({"_class_name": "StableDiffusionPipeline"})[0]["w"]
        == 6.5
    )
    assert (
        "w"
        not in TextToImagePipeline.extract_init_dict(
            {"_class_name": ["pipeline", "TextToImagePipeline"]}
        )[0]
    )


def test_p28_w_comes_back_from_stable_diffusion():
    between = TextToImagePipeline.from_pipe(stable_diffusion(), w=2.0)
    stock = StableDiffusionPipeline.from_pipe(
        between, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    assert (
        TextToImagePipeline.from_pipe(stock).config.w == 2.0
        and TextToImagePipeline.from_pipe(stock, w=0.5).config.w == 0.5
    )


def test_a_pipeline_that_cannot_be_saved_can_be_printed(tmp_path, monkeypatch):
    class Mine(DDPMScheduler):
        pass

    pipe, incomplete = tiny_pipeline(), stable_diffusion()
    monkeypatch.setattr(Mine, "__module__", "__main__")
    pipe.scheduler = Mine()
    assert "Mine" in repr(pipe)
    with pytest.raises(
        ValueError, match="scheduler is a Mine of the running script, expected a class of a module"
    ):
        pipe.save_pretrained(tmp_path)
    parts = incomplete.unet, None, incomplete.text_encoder, incomplete.tokenizer, incomplete.vae
    assert '"scheduler": [' in repr(TextToImagePipeline(*parts))


def test_a_plan_that_the_scheduler_cannot_make_is_a_bad_request():
    pipe = tiny_pipeline(
        scheduler=DDPMScheduler(timestep_spacing="leading", steps_offset=1), caption_length=8
    )
    with pytest.raises(
        InputError, match="num_inference_steps is 1000, .*got 1000 … 1; take fewer steps"
    ):
        pipe("cat", num_inference_steps=1000)
    with pytest.raises(InputError, match=r"timesteps is \[0, 10\], .*decreasing order"):
        pipe("cat", timesteps=[0, 10])


def test_states_of_another_length_than_the_tokenizers_draw_as_in_stable_diffusion():
    """Fewer tokens bring an empty caption of as few; unguided, more tokens bring none."""
    theirs = stable_diffusion()
    ours = TextToImagePipeline.from_pipe(theirs)
    ours.set_progress_bar_config(disable=True)
    states = torch.randn(1, 5, WIDTH, generator=torch.Generator().manual_seed(3))
    for embeds, scale in ((states, 3.0), (states.repeat(1, 3, 1), 1.0)):
        close(
            *(
                p(
                    prompt_embeds=embeds,
                    guidance_scale=scale,
                    num_inference_steps=STEPS,
                    output_type="np",
                    generator=torch.Generator().manual_seed(0),
                ).images
                for p in (theirs, ours)
            )
        )
    with pytest.raises(
        InputError,
        match=r"negative_prompt_embeds is \(1, 8, 16\), expected the shape of .*, \(1, 15, 16\)",
    ):
        ours(prompt_embeds=states.repeat(1, 3, 1), guidance_scale=3.0)


@pytest.mark.parametrize(
    ("part", "targets"), [("text_encoder", ["q_proj", "v_proj"]), ("unet", ["to_q", "to_v"])]
)
def test_lora_layers_of_the_text_encoder_are_scaled_with_the_networks(part, targets):
    theirs = stable_diffusion()
    getattr(theirs, part).add_adapter(
        LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    )
    ours = TextToImagePipeline.from_pipe(theirs)
    ours.set_progress_bar_config(disable=True)
    full, half = (
        [draw_jointly(p, cross_attention_kwargs={"scale": scale}) for p in (theirs, ours)]
        for scale in (1.0, 0.5)
    )
    close(*full), close(*half)
    assert np.abs(full[1] - half[1]).max() > 1e-3 and np.array_equal(draw_jointly(ours), full[1])


def test_without_peft_there_is_nothing_to_scale(monkeypatch):
    """diffusers' own scaling imports it at once, for any scale."""
    monkeypatch.setattr(text_to_image, "USE_PEFT_BACKEND", False)
    monkeypatch.setattr(
        text_to_image, "scale_lora_layers", lambda *_: pytest.fail("peft would be imported")
    )
    with text_to_image.scaled_lora(tiny_text()[1], 1.0):
        pass


def test_given_states_of_the_empty_caption_wait_for_a_callback_that_guides():
    pipe = tiny_pipeline()
    states, empty = pipe.encode_prompt("red heart")
    pipe.register_modules(text_encoder=None, tokenizer=None)
    guided = lambda pipe, *_: setattr(pipe, "_guidance_scale", 3.0) or {}
    given = {"prompt_embeds": states, "negative_prompt_embeds": empty}
    changed = draw(pipe, None, w=0.0, callback_on_step_end=guided, **given)
    assert np.abs(changed - draw(pipe, None, w=0.0, **given)).max() > 1e-3


def test_a_stock_scheduler_is_not_asked_for_what_it_does_not_read():
    """from_config keeps foreign settings."""
    pipe = tiny_pipeline(
        scheduler=DDIMScheduler.from_config(DDPMScheduler(variance_type="fixed_large").config)
    )
    assert pipe.scheduler.config.variance_type == "fixed_large" and draw(pipe, eta=0).shape == (
        1,
        8,
        8,
        3,
    )


def test_a_chain_of_trained_betas_is_as_long_as_they_are():
    pipe = tiny_pipeline(
        scheduler=DDPMScheduler(trained_betas=[0.1, 0.2, 0.9], timestep_spacing="trailing")
    )
    assert draw(pipe, num_inference_steps=3).shape == (1, 8, 8, 3)
    with pytest.raises(InputError, match="expected a whole number from 1 to 3"):
        draw(pipe, num_inference_steps=4)


def draw_jointly(pipe, **request):
    """Images of two prompts from a single generator, diffusers' way."""
    request = {
        "num_inference_steps": STEPS,
        "output_type": "np",
        "generator": torch.Generator().manual_seed(0),
    } | request
    return pipe(["a cat", "a dog"], **request)[0]


def test_in_a_stock_pipeline_our_scheduler_is_ddim_unless_eta_says_otherwise():
    """StableDiffusionPipeline passes its own eta, 0, to every scheduler that takes one."""
    pipe = stable_diffusion()
    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    ours = TextToImagePipeline.from_pipe(pipe)
    ours.set_progress_bar_config(disable=True)
    for eta in (0.0, 1.0):
        close(
            draw_jointly(pipe, guidance_scale=2.0, eta=eta),
            draw_jointly(ours, guidance_scale=2.0, eta=eta),
        )
    assert np.array_equal(
        draw_jointly(pipe, guidance_scale=2.0), draw_jointly(pipe, guidance_scale=2.0, eta=0.0)
    )
    assert not np.allclose(
        draw_jointly(ours, guidance_scale=2.0),
        draw_jointly(ours, guidance_scale=2.0, eta=0.0),
        atol=1e-3,
    )


@pytest.mark.parametrize(
    "name", ["EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler"]
)
def test_p28_schedulers_that_scale_their_input_do_so_as_in_stable_diffusion(name):
    theirs = stable_diffusion()
    theirs.scheduler = getattr(diffusers, name).from_config(theirs.scheduler.config)
    ours = TextToImagePipeline.from_pipe(theirs)
    ours.set_progress_bar_config(disable=True)
    close(*(draw_jointly(p, guidance_scale=2.0) for p in (theirs, ours)))


def stable_diffusion():
    """diffusers' own pipeline over tiny parts, with a real autoencoder and a stock scheduler."""
    tokenizer, encoder = tiny_text("clip")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKL(
            block_out_channels=(4, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            scaling_factor=0.5,
        ).eval()
    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    pipe = StableDiffusionPipeline(
        vae,
        encoder,
        tokenizer,
        tiny_unet(4, text=False),
        scheduler,
        None,
        None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_vae_takes_a_few_images_at_a_time_and_keeps_no_graph(monkeypatch):
    """Activations of a VAE at 512 pixels are 130 MB an image: a whole set at once would not fit."""
    pipe = tiny_pipeline()
    pipe.register_modules(vae=stable_diffusion().vae)
    images, sizes, encode = torch.rand(19, 3, 16, 16), [], pipe.vae.encode
    monkeypatch.setattr(pipe.vae, "encode", lambda x: sizes.append(len(x)) or encode(x))
    z = pipe.encode(images)
    assert sum(sizes) == 19 and max(sizes) <= 8 and not z.requires_grad
    assert torch.allclose(z, torch.cat([pipe.encode(image[None]) for image in images]), atol=1e-5)
    sizes, decode = [], pipe.vae.decode
    monkeypatch.setattr(
        pipe.vae, "decode", lambda x, **more: sizes.append(len(x)) or decode(x, **more)
    )
    back = pipe.decode(z)
    assert sum(sizes) == 19 and max(sizes) <= 8
    assert torch.allclose(back, torch.cat([pipe.decode(one[None]) for one in z]), atol=1e-5)


@pytest.mark.parametrize("patch_size", [None, 2])
def test_encoding_is_decodings_inverse(patch_size):
    pipe, images = (
        tiny_pipeline(patch_size=patch_size),
        torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)),
    )
    assert torch.equal(pipe.decode(pipe.encode(images)), images)
    assert pipe.encode(images).shape == ((2, 3, 16, 16) if patch_size is None else (2, 12, 8, 8))


def test_a_vaes_latents_are_scaled_as_stable_diffusion_scales_them():
    pipe = TextToImagePipeline.from_pipe(stable_diffusion())
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        z, pixels = (
            pipe.vae.encode(images).latent_dist.mean,
            pipe.vae.decode(pipe.vae.encode(images).latent_dist.mean).sample,
        )
    assert torch.equal(pipe.encode(images), 0.5 * z)
    assert torch.allclose(pipe.decode(pipe.encode(images)), pixels, atol=1e-5)


# ---- guidance


def test_without_guidance_there_is_one_conditional_call_a_step(pipe):
    assert rows_called(pipe, w=0.0) == [1] * STEPS


def test_unconditional_drawing_makes_one_call_a_step_and_ignores_the_prompt(pipe):
    assert rows_called(pipe, w=-1.0) == [1] * STEPS
    close(draw(pipe, w=-1.0), draw(pipe, "", w=0.0))
    close(draw(pipe, w=-1.0), draw(pipe, "cat", w=-1.0))


def test_guidance_doubles_the_call(pipe):
    assert rows_called(pipe, w=2.0) == [2] * STEPS


def test_guidance_in_an_interval_doubles_the_call_there_only(pipe):
    levels = [noise_level(pipe.scheduler, t) for t in plan(pipe.scheduler, 5)]
    inside = interval(2.0, levels[3], levels[1])
    assert rows_called(pipe, w=inside, num_inference_steps=5) == [1, 2, 2, 2, 1]


def test_each_prompt_has_its_own_weight(pipe):
    prompts, w = ["red heart", "cat", "dog"], [0.0, 2.0, -1.0]
    assert rows_called(pipe, prompt=prompts, w=w) == [4] * STEPS
    for images, own in (
        (draw(pipe, prompts, w=w), w),
        (draw(pipe, prompts, guidance_scale=[1, 3.0, 0.5]), [0, 2.0, 0]),
    ):
        for i in range(3):
            close(images[i], draw(pipe, prompts[i], seed=i, w=own[i])[0])
    assert draw(pipe, prompts, guidance_scale=torch.tensor([1, 3, 0.5])).shape == images.shape
    twice = draw(pipe, prompts, w=torch.tensor(w), num_images_per_prompt=2)
    close(twice[3], draw(pipe, "cat", seed=3, w=2.0)[0])


def test_a_constant_function_is_the_constant(pipe):
    assert np.array_equal(draw(pipe, w=lambda level: 2.0), draw(pipe, w=2.0))


def test_noise_level_is_the_noise_of_the_direct_jump():
    """x_t of the zero image has the standard deviation that (5) gives its noise."""
    scheduler, eps = (
        DDPMScheduler(),
        torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)),
    )
    for t in (0, 300, 999):
        x_t = scheduler.add_noise(torch.zeros_like(eps), eps, torch.tensor([t]))
        assert noise_level(scheduler, torch.tensor(t)) == pytest.approx(
            float(x_t.std() / eps.std()), rel=1e-4
        )


@pytest.mark.parametrize("w", [-1.0, 2.0, 7.5])
def test_an_empty_prompt_is_the_same_at_every_weight(pipe, w):
    close(draw(pipe, "", w=w), draw(pipe, "", w=0.0))


def test_a_huge_weight_is_the_lectures_combination_still():
    """One step is affine in the prediction where nothing is clipped: x_0(w) = x_0(0) + w (x_0(0) - x_0(-1))."""
    pipe = tiny_pipeline(
        scheduler=DDPMScheduler(
            timestep_spacing="trailing", clip_sample=False, prediction_type="sample"
        )
    )
    plain, empty, huge = (
        draw(pipe, w=w, num_inference_steps=1, output_type="latent") for w in (0.0, -1.0, 1e6)
    )
    torch.testing.assert_close(huge, plain + 1e6 * (plain - empty), rtol=1e-4, atol=1.0)
    assert (
        huge.abs().max() > 1e3
        and draw(tiny_pipeline(), w=1e6, output_type="latent").isfinite().all()
    )


def test_the_pipelines_own_weight_is_the_default():
    assert np.array_equal(draw(tiny_pipeline(w=2.0)), draw(tiny_pipeline(), w=2.0))


def test_a_negative_prompt_takes_the_empty_captions_place(pipe):
    assert np.array_equal(draw(pipe, negative_prompt="", w=2.0), draw(pipe, w=2.0))
    close(draw(pipe, negative_prompt="dog", w=-1.0), draw(pipe, "dog", w=0.0))


@pytest.mark.parametrize(
    ("dropout", "w", "warned"),
    [(0.0, 2.0, True), (0.0, 0.0, False), (0.1, 2.0, False), (None, 2.0, False)],
)
def test_guiding_a_model_trained_without_caption_dropout_warns(caplog, dropout, w, warned):
    draw(tiny_pipeline(caption_dropout=dropout), w=w)
    assert ("trained without caption dropout" in caplog.text) == warned


# ---- captions


@pytest.mark.parametrize("kind", ["bert", "clip"])
def test_captions_are_read_as_in_training(kind, tmp_path):
    tokenizer, encoder = tiny_text(kind)
    pipe = TextToImagePipeline(None, None, encoder, tokenizer, caption_length=6)
    captions = ["red heart", "", "a  red\tcat", "very " * 9, "caf\u0065\u0301", "\u200fdog\u0000"]
    trained = caption_cache.encode_captions(captions, tokenizer, encoder, 6, cache_dir=tmp_path)
    states, empty = pipe.encode_prompt(captions)
    torch.testing.assert_close(states, trained)
    torch.testing.assert_close(empty, trained[1:2].expand(len(captions), -1, -1))


@settings(max_examples=50, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
def test_any_unicode_text_has_states(caption):
    tokenizer, encoder = tiny_text()
    states, _ = TextToImagePipeline(None, None, encoder, tokenizer).encode_prompt(caption)
    assert states.shape == (1, 8, WIDTH) and states.isfinite().all()


def test_padding_is_zero_for_bert_and_read_by_clip():
    padded, _ = tiny_pipeline("bert").encode_prompt(
        "red heart"
    )  # [CLS] red heart [SEP], then padding
    assert padded[0, :4].abs().amin(0).all() and padded[0, 4:].count_nonzero() == 0
    tokenizer, encoder = tiny_text("clip")
    ids = tokenizer("a b", padding="max_length", return_tensors="pt").input_ids
    states, _ = tiny_pipeline("clip").encode_prompt("a b")
    assert torch.equal(states, encoder(ids).last_hidden_state)


# ---- the sampling loop


def test_denoise_is_the_call_step_by_step(pipe):
    steps = list(pipe.denoise("red heart", seed=0, num_inference_steps=STEPS, w=2.0))
    assert [int(step.t) for step in steps] == plan(pipe.scheduler, STEPS).tolist()
    assert [int(step.s) for step in steps] == [*plan(pipe.scheduler, STEPS)[1:].tolist(), -1]
    assert torch.equal(steps[-1].x_t, draw(pipe, w=2.0, output_type="latent"))
    assert torch.equal(steps[-1].x_t, steps[-1].x_0_hat)  # the last step adds no noise
    assert all(step.x_0_hat.abs().max() <= 1 for step in steps)


def test_what_is_written_to_a_step_the_loop_goes_on_with(pipe):
    written = pipe.denoise("red heart", seed=0, num_inference_steps=2)
    next(written).x_t = torch.zeros(1, 3, 8, 8)
    x = next(written).x_t
    rest = torch.zeros(1, 3, 8, 8)
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(2)
    captions, _ = pipe.encode_prompt("red heart")
    with torch.no_grad():
        eps_hat = pipe.unet(
            rest, scheduler.timesteps[1], encoder_hidden_states=captions, return_dict=False
        )[0]
    torch.testing.assert_close(x, scheduler.step(eps_hat, scheduler.timesteps[1], rest).prev_sample)


def test_a_request_is_refused_before_the_first_step(pipe):
    with pytest.raises(InputError, match="num_inference_steps"):
        pipe.denoise("red heart", num_inference_steps=0)


def test_schedulers_that_tell_no_x_0_leave_it_out(pipe):
    pipe.scheduler = diffusers.PNDMScheduler.from_config(pipe.scheduler.config, skip_prk_steps=True)
    assert next(pipe.denoise("red heart", num_inference_steps=2, seed=0)).x_0_hat is None


def test_calls_that_interleave_do_not_disturb_each_other(pipe):
    start = lambda n, w: pipe.denoise("red heart", w=w, seed=0, num_inference_steps=n)
    alone = [list(start(4, 2.0))[-1], list(start(3, 0.0))[-1]]
    first, second = start(4, 2.0), start(3, 0.0)
    for _ in range(3):
        one, other = next(first), next(second)
    assert torch.equal(next(first).x_t, alone[0].x_t) and torch.equal(other.x_t, alone[1].x_t)
    assert int(one.s) == int(alone[0].t)


def test_own_timesteps_are_followed(pipe):
    steps = list(pipe.denoise("cat", timesteps=[999, 500, 20, 0], seed=0))
    assert [int(step.t) for step in steps] == [999, 500, 20, 0]


def test_a_callback_that_raises_leaves_the_hooks_as_after_any_call():
    freed = []

    class Watched(TextToImagePipeline):
        def maybe_free_model_hooks(self):
            freed.append(True)
            super().maybe_free_model_hooks()

    def fail(pipe, i, t, tensors):
        raise RuntimeError("stop here")

    pipe = Watched(**tiny_pipeline().components)
    with pytest.raises(RuntimeError, match="stop here"):
        draw(pipe, callback_on_step_end=fail)
    assert freed == [True]


# ---- randomness


def test_a_seed_gives_the_same_bytes_again(pipe):
    assert np.array_equal(draw(pipe, seed=7), draw(pipe, seed=7))
    assert not np.allclose(draw(pipe, seed=7), draw(pipe, seed=8), atol=1e-3)


def test_seeds_are_generators_one_an_image(pipe):
    own = [torch.Generator().manual_seed(5 + i) for i in range(2)]
    assert np.array_equal(
        draw(pipe, ["cat", "dog"], generator=own), draw(pipe, ["cat", "dog"], seed=5)
    )


def test_without_a_seed_every_image_is_new_and_the_global_generator_is_left_alone(pipe):
    before = torch.get_rng_state()
    images = draw(pipe, ["cat", "cat"], seed=None)
    assert torch.equal(torch.get_rng_state(), before)
    assert not np.allclose(images[0], images[1], atol=1e-3)
    assert not np.allclose(draw(pipe, ["cat", "cat"], seed=None), images, atol=1e-3)


def test_given_latents_are_x_T(pipe):
    x_T = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert np.array_equal(draw(pipe, latents=x_T, eta=0), draw(pipe, eta=0))


def test_eta_zero_draws_no_noise_after_x_T(pipe):
    x_T = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert np.array_equal(
        draw(pipe, latents=x_T, eta=0, seed=1), draw(pipe, latents=x_T, eta=0, seed=2)
    )
    assert not np.allclose(
        draw(pipe, latents=x_T, eta=1, seed=1), draw(pipe, latents=x_T, eta=1, seed=2), atol=1e-3
    )


# ---- requests that are refused, by their message

REFUSED = {
    "prompt and prompt_embeds were not given": {"prompt": None},
    "prompt and prompt_embeds were both given": {"prompt_embeds": torch.zeros(1, 8, WIDTH)},
    r"prompt is \[\], expected a text": {"prompt": []},
    "prompt is 3, expected a text": {"prompt": 3},
    r"prompt is \['a', None\], expected a text": {"prompt": ["a", None]},
    "holds half a surrogate pair": {"prompt": "a \ud83d cat"},
    r"prompt_embeds is \(8, 16\), expected": {
        "prompt": None,
        "prompt_embeds": torch.zeros(8, WIDTH),
    },
    r"prompt_embeds is \(1, 5, 16\), expected \(prompts, 8, width\)": {
        "prompt": None,
        "prompt_embeds": torch.zeros(1, 5, WIDTH),
    },
    "negative_prompt has 2 texts for 1 prompts": {"negative_prompt": ["a", "b"]},
    "negative_prompt is 3, expected a text": {"negative_prompt": 3},
    "negative_prompt and negative_prompt_embeds were both": {
        "negative_prompt": "a",
        "negative_prompt_embeds": torch.zeros(1, 8, WIDTH),
    },
    r"negative_prompt_embeds is \(2, 8, 16\), expected the shape": {
        "negative_prompt_embeds": torch.zeros(2, 8, WIDTH)
    },
    "w=1.0 and guidance_scale=2.0 were both given": {"w": 1.0, "guidance_scale": 2.0},
    "w is inf, expected a finite number": {"w": float("inf")},
    "w is nan, expected a finite number": {"w": float("nan")},
    "w is '2', expected a finite number": {"w": "2"},
    "guidance_scale is '2', expected a finite number": {"guidance_scale": "2"},
    "w has 2 values for 1 prompts": {"w": [1.0, 2.0]},
    "num_inference_steps is 0, expected a whole number from 1 to 1000": {"num_inference_steps": 0},
    "num_inference_steps is -5": {"num_inference_steps": -5},
    "num_inference_steps is 1001": {"num_inference_steps": 1001},
    r"num_inference_steps is 2\.5": {"num_inference_steps": 2.5},
    "num_inference_steps is True": {"num_inference_steps": True},
    "num_images_per_prompt is 0": {"num_images_per_prompt": 0},
    "eta is 1.5, expected a number from 0": {"eta": 1.5},
    "eta is nan": {"eta": float("nan")},
    "seed and generator were both given": {"seed": 1, "generator": torch.Generator()},
    "seed is -1, expected a whole number": {"seed": -1},
    r"seed is 1\.5, expected a whole number": {"seed": 1.5},
    "generator has 2 generators for 1 images": {
        "seed": None,
        "generator": [torch.Generator(), torch.Generator()],
    },
    r"latents is \(1, 3, 4, 4\), expected \(1, 3, 8, 8\)": {"latents": torch.zeros(1, 3, 4, 4)},
    "height is 0, expected a multiple of 1": {"height": 0},
    "width is 8.0, expected a multiple of 1": {"width": 8.0},
    "output_type is 'jpg', expected one of pil, np, pt, latent": {"output_type": "jpg"},
    "callback_on_step_end_tensor_inputs names image": {
        "callback_on_step_end_tensor_inputs": ["image"]
    },
}


@pytest.fixture(scope="module")
def asked():
    return tiny_pipeline(caption_length=8)


@pytest.mark.parametrize("message", REFUSED)
def test_refused(asked, message):
    request = {"prompt": "red heart", "seed": 0, "num_inference_steps": STEPS} | REFUSED[message]
    with pytest.raises(InputError, match=message):
        asked(**request)


def test_guiding_by_states_needs_the_empty_captions(pipe):
    states, _ = pipe.encode_prompt("red heart")
    bare = TextToImagePipeline(pipe.unet, pipe.scheduler)
    bare.set_progress_bar_config(disable=True)
    with pytest.raises(InputError, match="no text encoder to read"):
        bare.denoise(prompt_embeds=states, w=2.0)
    with pytest.raises(InputError, match="no text encoder to read"):
        bare.denoise("red heart")
    close(draw(bare, None, prompt_embeds=states), draw(pipe))


def test_what_a_scheduler_does_not_take_is_refused(pipe):
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(InputError, match="EulerDiscreteScheduler takes no eta"):
        draw(pipe, eta=0.5)
    pipe.scheduler = DDIMScheduler()
    with pytest.raises(InputError, match="DDIMScheduler takes no timesteps"):
        draw(pipe, timesteps=[10, 0])
    pipe.scheduler = diffusers.EDMEulerScheduler()
    with pytest.raises(InputError, match="EDMEulerScheduler does not tell"):
        draw(pipe, w=interval(2.0, 0.2, 0.8))


def test_a_tokenizer_without_a_length_needs_caption_length():
    tokenizer, encoder = tiny_text()
    tokenizer.model_max_length = 10**30
    with pytest.raises(InputError, match="caption_length is None"):
        TextToImagePipeline(tiny_unet(), DDPMScheduler(), encoder, tokenizer).encode_prompt("cat")
