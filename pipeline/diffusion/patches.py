"""Images as patches: a lossless autoencoder with the interface of diffusers' AutoencoderTiny."""

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput
from diffusers.models.autoencoders.vae import DecoderOutput
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle


class PatchAutoencoder(ModelMixin, ConfigMixin):
    """Every patch of an image becomes one position of a smaller grid with more channels, and back, bit for bit.

    Images (B, C, H, W) to latents (B, C p², H/p, W/p) for the patch size p, a power of two. There is nothing to train.
    """

    @register_to_config
    def __init__(
        self,
        patch_size: int = 4,
        in_channels: int = 3,
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
        block_out_channels: tuple[int, ...] | None = None,
    ):
        super().__init__()
        if (
            isinstance(patch_size, bool)
            or not isinstance(patch_size, int)
            or patch_size < 1
            or patch_size & (patch_size - 1)
        ):
            raise ValueError(
                f"patch_size is {patch_size!r}, expected a power of two: pass 1, 2, 4 or 8"
            )
        channels = in_channels * patch_size**2
        levels = (
            channels,
        ) * patch_size.bit_length()  # diffusers reads a VAE's factor as 2 ** (len(levels) - 1)
        if block_out_channels is not None and tuple(block_out_channels) != levels:
            raise ValueError(
                f"block_out_channels is {block_out_channels}, but follows from the others: leave it out"
            )
        self.register_to_config(block_out_channels=levels)
        self.register_buffer(
            "place", torch.zeros(())
        )  # a dtype and a device, and a weights file for diffusers to find

    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderTinyOutput | tuple[Tensor]:
        """Latents (B, C p², H/p, W/p) of images (B, C, H, W); sides that p does not divide are refused."""
        p = self.config.patch_size
        if x.shape[-2] % p or x.shape[-1] % p:
            raise ValueError(
                f"the image is {x.shape[-2]}x{x.shape[-1]}, expected sides that {p} divides: "
                f"resize it to multiples of {p}"
            )
        z = pixel_unshuffle(x, p)
        return AutoencoderTinyOutput(latents=z) if return_dict else (z,)

    def decode(
        self, z: Tensor, generator=None, return_dict: bool = True
    ) -> DecoderOutput | tuple[Tensor]:
        """Images (B, C, H, W) of latents (B, C p², H/p, W/p); nothing is drawn, so `generator` is not used."""
        x = pixel_shuffle(z, self.config.patch_size)
        return DecoderOutput(sample=x) if return_dict else (x,)

    def forward(self, x: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """The images themselves: encode, then decode."""
        return self.decode(self.encode(x).latents, return_dict=return_dict)
