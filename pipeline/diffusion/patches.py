"""Images as patches: a lossless autoencoder with the interface of diffusers' AutoencoderTiny."""

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput
from diffusers.models.autoencoders.vae import DecoderOutput
from torch import Generator, Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle


class PatchAutoencoder(ModelMixin, ConfigMixin):
    """Turn patches into positions of a smaller grid with more channels, and back, bit for bit.

    Images (B, C, H, W) become latents (B, C p², H/p, W/p) for the patch size p, a power of two.
    Nothing is trained.
    """

    @register_to_config
    def __init__(
        self,
        patch_size: int = 4,
        in_channels: int = 3,
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
        block_out_channels: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        # `type` and not isinstance: True is an int.
        if type(patch_size) is not int or patch_size < 1 or patch_size.bit_count() != 1:
            raise ValueError(f"patch_size must be a power of two such as 4, got {patch_size!r}.")
        # diffusers reads a VAE's factor as 2 ** (len(block_out_channels) - 1).
        levels = (in_channels * patch_size**2,) * patch_size.bit_length()
        if block_out_channels is not None and tuple(block_out_channels) != levels:
            raise ValueError(
                f"block_out_channels must be {levels} here, got {block_out_channels}. Leave it out."
            )
        self.register_to_config(block_out_channels=levels)
        # It gives the model a dtype and a device, and diffusers a weights file to find.
        self.register_buffer("place", torch.zeros(()))

    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderTinyOutput | tuple[Tensor]:
        """Latents (B, C p², H/p, W/p) of images (B, C, H, W); ValueError if p does not divide."""
        p: int = self.config["patch_size"]
        if x.shape[-2] % p or x.shape[-1] % p:
            raise ValueError(
                f"the image is {x.shape[-2]}x{x.shape[-1]}. Resize it to multiples of {p}."
            )
        z = pixel_unshuffle(x, p)
        return AutoencoderTinyOutput(latents=z) if return_dict else (z,)

    def decode(
        self, z: Tensor, generator: Generator | None = None, return_dict: bool = True
    ) -> DecoderOutput | tuple[Tensor]:
        """Images (B, C, H, W) of latents (B, C p², H/p, W/p); `generator` is not used."""
        x = pixel_shuffle(z, self.config["patch_size"])
        return DecoderOutput(sample=x) if return_dict else (x,)

    def forward(self, x: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """The images themselves: encode, then decode."""
        return self.decode(pixel_unshuffle(x, self.config["patch_size"]), return_dict=return_dict)
