"""The pipeline beside Stable Diffusion's own (P28), and images in a VAE's latents."""

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from generation import STEPS, assert_close, generate, generate_jointly, stable_diffusion
from peft import LoraConfig
from PIL import Image
from tiny import WIDTH, tiny_pipeline, tiny_text

from pipeline import TextToImagePipeline, load_pipeline
from pipeline.diffusion import text_to_image
from pipeline.diffusion.captions import CaptionWhitening
from pipeline.diffusion.guidance import InputError
from pipeline.diffusion.scheduler import DDPMScheduler
from pipeline.models.trusted import ModelError


def test_from_pipe_generates_like_stable_diffusion():
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
    assert_close(
        *(generate_jointly(p) for p in (theirs, ours))
    )  # each by its own default, which is s = 7.5 = 1 + w
    assert (ours.config.w, TextToImagePipeline.from_pipe(theirs, w=1.0).config.w) == (6.5, 1.0)
    assert TextToImagePipeline.from_pipe(tiny_pipeline(w=2.0)).config.w == 2.0
    again = StableDiffusionPipeline.from_pipe(
        ours, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    assert again.components == theirs.components
    for scale in (1.0, 7.5):
        assert_close(
            *(
                generate_jointly(p, guidance_scale=scale, num_images_per_prompt=2)
                for p in (theirs, ours)
            )
        )


def test_from_pipe_keeps_our_own_parts():
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
    assert_close(generate(ours), generate(theirs))


def test_extract_init_dict_defaults_to_stable_diffusions_w():
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


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"time_cond_proj_dim": 8}, "time_cond_proj_dim"),
        ({"in_channels": 9}, "takes 9 channels"),
        ({"in_channels": 8, "out_channels": 8}, "takes 8 channels and the latents have 4"),
    ],
)
def test_check_unet_refuses_inputs_that_nobody_passes(change, named, tmp_path):
    """A consistency model, an inpainting model, and a UNet of another autoencoder."""
    theirs = stable_diffusion()
    theirs.register_modules(unet=type(theirs.unet).from_config(theirs.unet.config, **change))
    theirs.save_pretrained(tmp_path)
    ours = TextToImagePipeline.from_pipe(theirs)
    with pytest.raises(InputError, match=named):
        ours("red heart", num_inference_steps=1)
    with pytest.raises(ModelError, match=named):
        load_pipeline(tmp_path)


def test_is_stable_diffusion_refuses_distilled_guidance():
    ours = TextToImagePipeline.from_pipe(stable_diffusion())
    assert ours.is_stable_diffusion()
    ours.unet.register_to_config(time_cond_proj_dim=8)
    assert not ours.is_stable_diffusion()


def test_from_pipe_restores_w_from_stable_diffusion():
    between = TextToImagePipeline.from_pipe(stable_diffusion(), w=2.0)
    stock = StableDiffusionPipeline.from_pipe(
        between, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    assert (
        TextToImagePipeline.from_pipe(stock).config.w == 2.0
        and TextToImagePipeline.from_pipe(stock, w=0.5).config.w == 0.5
    )


# What the pipelines of Stable Diffusion have beyond ours.
NONE = {"safety_checker": None, "feature_extractor": None, "image_encoder": None}


@pytest.mark.parametrize(
    ("auto", "stock", "inputs"),
    [
        ("AutoPipelineForImage2Image", "StableDiffusionImg2ImgPipeline", ["image"]),
        ("AutoPipelineForInpainting", "StableDiffusionInpaintPipeline", ["image", "mask_image"]),
    ],
)
def test_save_pretrained_gives_img2img_and_inpainting(auto, stock, inputs, tmp_path):
    """From the saved folder, and from the pipeline itself."""
    ours = TextToImagePipeline.from_pipe(stable_diffusion())
    ours.save_pretrained(tmp_path)
    size = {"height": 16, "width": 16} if "mask_image" in inputs else {}
    images = {name: [Image.new("RGB", (16, 16), "white")] * 2 for name in inputs}
    saved = getattr(diffusers, auto).from_pretrained(tmp_path)
    shared = getattr(diffusers, stock).from_pipe(ours, **NONE)
    assert type(saved) is type(shared)
    first, second = (generate_jointly(pipe, **images, **size) for pipe in (saved, shared))
    assert first.shape == (2, 16, 16, 3)
    assert_close(first, second)


def test_from_pipe_gives_controlnet():
    ours = TextToImagePipeline.from_pipe(stable_diffusion())
    controlnet = diffusers.ControlNetModel.from_unet(
        ours.unet, conditioning_embedding_out_channels=(4, 8)
    )
    pipe = diffusers.StableDiffusionControlNetPipeline.from_pipe(
        ours, controlnet=controlnet, **NONE
    )
    assert pipe.unet is ours.unet and pipe.vae is ours.vae
    images = [Image.new("RGB", (16, 16))] * 2
    assert generate_jointly(pipe, image=images, height=16, width=16).shape == (2, 16, 16, 3)


def test_call_takes_states_of_another_length():
    """Fewer tokens bring an empty caption of as few; unguided, more tokens bring none."""
    theirs = stable_diffusion()
    ours = TextToImagePipeline.from_pipe(theirs)
    ours.set_progress_bar_config(disable=True)
    states = torch.randn(1, 5, WIDTH, generator=torch.Generator().manual_seed(3))
    for embeds, scale in ((states, 3.0), (states.repeat(1, 3, 1), 1.0)):
        assert_close(
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
    with pytest.raises(InputError, match=r"negative_prompt_embeds .*\(1, 15, 16\).*\(1, 8, 16\)"):
        ours(prompt_embeds=states.repeat(1, 3, 1), guidance_scale=3.0)


@pytest.mark.parametrize(
    ("part", "targets"), [("text_encoder", ["q_proj", "v_proj"]), ("unet", ["to_q", "to_v"])]
)
def test_call_scales_lora_like_stable_diffusion(part, targets):
    theirs = stable_diffusion()
    getattr(theirs, part).add_adapter(
        LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    )
    ours = TextToImagePipeline.from_pipe(theirs)
    ours.set_progress_bar_config(disable=True)
    full, half = (
        [generate_jointly(p, cross_attention_kwargs={"scale": scale}) for p in (theirs, ours)]
        for scale in (1.0, 0.5)
    )
    assert_close(*full), assert_close(*half)
    assert np.abs(full[1] - half[1]).max() > 1e-3 and np.array_equal(
        generate_jointly(ours), full[1]
    )


def test_scaled_lora_needs_no_peft(monkeypatch):
    """diffusers' own scaling imports it at once, for any scale."""
    monkeypatch.setattr(text_to_image, "USE_PEFT_BACKEND", False)
    monkeypatch.setattr(
        text_to_image, "scale_lora_layers", lambda *_: pytest.fail("peft would be imported")
    )
    with text_to_image.scaled_lora(tiny_text()[1], 1.0):
        pass


def test_step_in_a_stock_pipeline_is_ddim_by_default():
    """StableDiffusionPipeline passes its own eta, 0, to every scheduler that takes one."""
    pipe = stable_diffusion()
    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    ours = TextToImagePipeline.from_pipe(pipe)
    ours.set_progress_bar_config(disable=True)
    for eta in (0.0, 1.0):
        assert_close(
            generate_jointly(pipe, guidance_scale=2.0, eta=eta),
            generate_jointly(ours, guidance_scale=2.0, eta=eta),
        )
    assert np.array_equal(
        generate_jointly(pipe, guidance_scale=2.0),
        generate_jointly(pipe, guidance_scale=2.0, eta=0.0),
    )
    assert not np.allclose(
        generate_jointly(ours, guidance_scale=2.0),
        generate_jointly(ours, guidance_scale=2.0, eta=0.0),
        atol=1e-3,
    )


@pytest.mark.parametrize(
    "name", ["EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler"]
)
def test_call_scales_model_input_like_stable_diffusion(name):
    theirs = stable_diffusion()
    theirs.scheduler = getattr(diffusers, name).from_config(theirs.scheduler.config)
    ours = TextToImagePipeline.from_pipe(theirs)
    ours.set_progress_bar_config(disable=True)
    assert_close(*(generate_jointly(p, guidance_scale=2.0) for p in (theirs, ours)))


def test_encode_and_decode_take_few_images_at_a_time(monkeypatch):
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
def test_encode_is_the_inverse_of_decode(patch_size):
    pipe, images = (
        tiny_pipeline(patch_size=patch_size),
        torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)),
    )
    assert torch.equal(pipe.decode(pipe.encode(images)), images)
    assert pipe.encode(images).shape == ((2, 3, 16, 16) if patch_size is None else (2, 12, 8, 8))


def test_encode_scales_latents_like_stable_diffusion():
    pipe = TextToImagePipeline.from_pipe(stable_diffusion())
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        z, pixels = (
            pipe.vae.encode(images).latent_dist.mean,
            pipe.vae.decode(pipe.vae.encode(images).latent_dist.mean).sample,
        )
    assert torch.equal(pipe.encode(images), 0.5 * z)
    assert torch.allclose(pipe.decode(pipe.encode(images)), pixels, atol=1e-5)
