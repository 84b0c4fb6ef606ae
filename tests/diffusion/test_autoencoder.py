"""The small autoencoder: latents of unit variance, AutoencoderTiny's interface, saved like one."""

import pytest
import torch
from diffusers import AutoencoderTiny

from pipeline.diffusion.autoencoder import ConvAutoencoder, ResidualBlock

SMALL = {"block_out_channels": (3, 4, 8, 16), "encoder_layers": 1, "decoder_layers": 1}


def images(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def small_autoencoder(**settings):
    torch.manual_seed(0)
    return ConvAutoencoder(**SMALL, **settings)


@pytest.mark.parametrize("channels", [4, 16])
def test_encode_gives_latents_of_an_eighth_and_decode_images(channels):
    vae, x = small_autoencoder(latent_channels=channels).eval(), images(2, 3, 16, 24)
    z = vae.encode(x).latents
    assert z.shape == (2, channels, 2, 3)
    assert vae.decode(z).sample.shape == x.shape
    assert torch.equal(vae(x).sample, vae.decode(z).sample)


def test_latents_have_mean_0_and_variance_1_over_a_training_batch():
    vae = small_autoencoder().train()
    z = vae.encode(images(8, 3, 32, 32) + 3).latents
    assert torch.allclose(z.mean((0, 2, 3)), torch.zeros(16), atol=1e-4)
    assert torch.allclose(z.var((0, 2, 3), correction=0), torch.ones(16), atol=1e-2)


def test_encode_uses_the_averages_of_training_afterwards():
    """So the latents of one image do not depend on the other images of a batch."""
    vae, x = small_autoencoder(), images(8, 3, 32, 32)
    vae.train()
    for _ in range(100):
        vae.encode(x)
    vae.eval()
    z = vae.encode(x).latents
    assert z.mean().abs() < 0.05
    assert z.std().item() == pytest.approx(1, abs=0.05)
    torch.testing.assert_close(vae.encode(x[:1]).latents, z[:1], rtol=1e-4, atol=1e-5)


def test_a_residual_block_begins_as_the_identity():
    x = images(1, 4, 5, 5)
    assert torch.equal(ResidualBlock(4)(x), x)


def test_an_output_pixel_depends_on_neighbouring_patches():
    """Latents meet before the last layers, so that no seam shows between their patches of 8."""
    vae = small_autoencoder().eval()
    for weights in vae.parameters():
        torch.nn.init.normal_(weights, std=0.2, generator=torch.Generator().manual_seed(1))
    z = images(1, 16, 4, 4).requires_grad_()
    vae.decode(z).sample[0, 0, 8, 8].backward()  # the first pixel of the patch at (1, 1)
    influence = z.grad.abs().sum((0, 1))
    assert (influence[:3, :3] > 0).all()


def test_encode_and_decode_return_like_autoencoder_tiny():
    x = images(1, 3, 16, 16)
    for vae in (small_autoencoder(latent_channels=4).eval(), AutoencoderTiny().eval()):
        z = vae.encode(x).latents
        assert z.shape == (1, 4, 2, 2)
        assert torch.equal(vae.encode(x, return_dict=False)[0], z)
        assert torch.equal(vae.decode(z, return_dict=False)[0], vae.decode(z).sample)
        assert (vae.config.scaling_factor, vae.config.shift_factor) == (1.0, 0.0)
        assert 2 ** (len(vae.config.block_out_channels) - 1) == 8


def test_save_pretrained_keeps_weights_and_averages(tmp_path, caplog):
    vae, x = small_autoencoder(), images(2, 3, 16, 16)
    vae.train().encode(x)  # moves the averages
    vae.eval().save_pretrained(tmp_path)
    again = ConvAutoencoder.from_pretrained(tmp_path, use_safetensors=True)
    assert torch.equal(again.eval()(x).sample, vae(x).sample)
    assert not caplog.records  # no key was unexpected, no weights were missing


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_to_changes_the_dtype(dtype):
    vae, x = small_autoencoder().eval(), images(1, 3, 16, 16)
    restored = vae(x).sample
    low = vae.to(dtype)(x.to(dtype)).sample
    assert low.dtype == dtype
    assert torch.allclose(low.float(), restored, atol=0.1)


def test_encode_refuses_sides_that_8_does_not_divide():
    with pytest.raises(ValueError, match="20x16.* 8"):
        small_autoencoder().encode(images(1, 3, 20, 16))
