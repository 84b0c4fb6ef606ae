"""A small convolutional autoencoder: images as latents of an eighth of the resolution, and back."""

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput
from diffusers.models.autoencoders.vae import DecoderOutput
from torch import Generator, Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle, silu

STRIDE = 8  # pixels of an image per position of its latent, in each direction


class ResidualBlock(nn.Module):
    """x + conv(silu(conv(silu(x)))), which begins as the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        for weights in self.conv2.parameters():
            nn.init.zeros_(weights)

    def forward(self, x: Tensor) -> Tensor:
        """Return features (B, c, H, W) of features of the same shape."""
        return x + self.conv2(silu(self.conv1(silu(x))))


def residual_blocks(count: int, channels: int) -> nn.Sequential:
    """Return a stack of residual blocks."""
    return nn.Sequential(*[ResidualBlock(channels) for _ in range(count)])


class ConvAutoencoder(ModelMixin, ConfigMixin):
    """Images (B, 3, H, W) in [-1, 1] as latents (B, c, H/8, W/8), with AutoencoderTiny's interface.

    Every latent channel has mean 0 and variance 1 over the training crops: in training mode over
    the batch, afterwards by the averages kept from training, as in a batch normalisation. As in
    diffusers, (z - shift_factor) scaling_factor has mean 0 and variance 1 over whole images.

    block_out_channels: the channels at 1/1, 1/2, 1/4 and 1/8 of the resolution; the first are the
    image's. encoder_layers, decoder_layers: residual blocks at 1/4 and at 1/8.
    """

    @register_to_config
    def __init__(
        self,
        block_out_channels: tuple[int, int, int, int] = (3, 32, 96, 192),
        encoder_layers: int = 2,
        decoder_layers: int = 3,
        latent_channels: int = 16,
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
    ) -> None:
        super().__init__()
        image, half, quarter, eighth = block_out_channels
        self.conv_in = nn.Conv2d(16 * image, quarter, 3, padding=1)
        self.encode_quarter = residual_blocks(encoder_layers, quarter)
        self.downsample = nn.Conv2d(4 * quarter, eighth, 1)
        self.encode_eighth = residual_blocks(encoder_layers, eighth)
        self.to_latents = nn.Conv2d(eighth, latent_channels, 1)
        self.normalize = nn.BatchNorm2d(latent_channels, affine=False)

        self.from_latents = nn.Conv2d(latent_channels, eighth, 3, padding=1)
        self.decode_eighth = residual_blocks(decoder_layers, eighth)
        self.upsample = nn.Conv2d(eighth, 4 * quarter, 1)
        self.decode_quarter = residual_blocks(decoder_layers, quarter)
        self.to_half = nn.Conv2d(quarter, 4 * half, 3, padding=1)
        # Its overlapping windows remove the seams between the patches of `to_half`.
        self.decode_half = residual_blocks(1, half)
        self.conv_out = nn.Conv2d(half, 4 * image, 3, padding=1)

    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderTinyOutput | tuple[Tensor]:
        """Latents (B, c, H/8, W/8) of images (B, 3, H, W); ValueError if 8 does not divide."""
        if x.shape[-2] % STRIDE or x.shape[-1] % STRIDE:
            raise ValueError(
                f"the image is {x.shape[-2]}x{x.shape[-1]}. Resize it to multiples of {STRIDE}."
            )
        h = self.encode_quarter(self.conv_in(pixel_unshuffle(x, 4)))
        h = self.encode_eighth(self.downsample(pixel_unshuffle(h, 2)))
        z = self.normalize(self.to_latents(h))
        return AutoencoderTinyOutput(latents=z) if return_dict else (z,)

    def decode(
        self, z: Tensor, generator: Generator | None = None, return_dict: bool = True
    ) -> DecoderOutput | tuple[Tensor]:
        """Images (B, 3, H, W) of latents (B, c, H/8, W/8), not clipped; `generator` is not used."""
        h = self.upsample(self.decode_eighth(self.from_latents(z)))
        h = self.to_half(self.decode_quarter(pixel_shuffle(h, 2)))
        x = pixel_shuffle(self.conv_out(self.decode_half(pixel_shuffle(h, 2))), 2)
        return DecoderOutput(sample=x) if return_dict else (x,)

    def forward(self, x: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """The images again: encode, then decode."""
        return self.decode(self.encode(x, return_dict=False)[0], return_dict=return_dict)
