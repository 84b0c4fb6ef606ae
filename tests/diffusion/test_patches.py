"""Patches: lossless, shaped as diffusers expects of an autoencoder, and saved like one."""

import pytest
import torch
from diffusers import AutoencoderTiny, StableDiffusionPipeline, UNet2DConditionModel
from tiny import tiny_text

from pipeline.diffusion.patches import PatchAutoencoder
from pipeline.diffusion.scheduler import DDPMScheduler


def images(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("p", [1, 2, 4, 8])
def test_decode_inverts_encode_bit_for_bit(p):
    vae, x = PatchAutoencoder(p), images(2, 3, 16, 24)
    z = vae.encode(x).latents
    assert z.shape == (2, 3 * p * p, 16 // p, 24 // p)
    assert torch.equal(vae.decode(z).sample, x)
    assert torch.equal(vae(x).sample, x)


def test_encode_puts_each_patch_into_one_position():
    vae, x = PatchAutoencoder(4), torch.zeros(1, 3, 16, 16)
    x[:, :, 4:8, 12:16] = images(3, 4, 4)
    z = vae.encode(x).latents
    inside = z[0, :, 1, 3].reshape(3, 4, 4)
    assert torch.equal(inside, x[0, :, 4:8, 12:16])
    assert z.count_nonzero() == inside.count_nonzero()


def test_encode_only_permutes_the_values():
    """A permutation keeps every norm, so (2) and bits per dimension are those of pixels."""
    x = images(2, 3, 16, 16)
    z = PatchAutoencoder(4).encode(x).latents
    assert torch.equal(z.flatten(1).sort().values, x.flatten(1).sort().values)


def test_encode_and_decode_return_like_autoencoder_tiny():
    ours, theirs, x = PatchAutoencoder(8), AutoencoderTiny(), images(1, 3, 16, 16)
    for vae in (ours, theirs):
        z = vae.encode(x).latents
        assert torch.equal(vae.encode(x, return_dict=False)[0], z)
        assert torch.equal(vae.decode(z, return_dict=False)[0], vae.decode(z).sample)
        assert (vae.config.scaling_factor, vae.config.shift_factor) == (1.0, 0.0)
        assert 2 ** (len(vae.config.block_out_channels) - 1) == 8


@pytest.mark.parametrize("p", [1, 2, 4])
def test_block_out_channels_give_diffusers_the_patch_size(p):
    tokenizer, encoder = tiny_text("clip")
    unet = UNet2DConditionModel(
        sample_size=64,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )
    scheduler = DDPMScheduler(steps_offset=1, clip_sample=False)
    pipe = StableDiffusionPipeline(
        PatchAutoencoder(p),
        encoder,
        tokenizer,
        unet,
        scheduler,
        None,
        None,
        requires_safety_checker=False,
    )
    assert pipe.vae_scale_factor == p


def test_save_pretrained_keeps_the_settings(tmp_path, caplog):
    PatchAutoencoder(2, in_channels=1).save_pretrained(tmp_path)
    again = PatchAutoencoder.from_pretrained(tmp_path, use_safetensors=True)
    assert (again.config.patch_size, again.config.in_channels) == (2, 1)
    assert again.encode(images(1, 1, 4, 4)).latents.shape == (1, 4, 2, 2)
    assert not caplog.records  # no key was unexpected, no weights were missing


def test_to_changes_the_dtype():
    vae = PatchAutoencoder(2)
    assert (vae.dtype, vae.device.type) == (torch.float32, "cpu")
    assert vae.to(torch.bfloat16).dtype == torch.bfloat16


def test_encode_refuses_sides_the_patch_does_not_divide():
    with pytest.raises(ValueError, match="10x16.* 4"):
        PatchAutoencoder(4).encode(images(1, 3, 10, 16))


@pytest.mark.parametrize("p", [0, -2, 3, 6, 2.0, True])
def test_init_refuses_patch_sizes_not_a_power_of_two(p):
    with pytest.raises(ValueError, match=f"patch_size .*{p!r}"):
        PatchAutoencoder(p)


def test_init_refuses_contradicting_block_out_channels():
    with pytest.raises(ValueError, match=r"block_out_channels .*\(1, 2\)"):
        PatchAutoencoder(4, block_out_channels=(1, 2))
