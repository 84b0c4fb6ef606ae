"""The networks of a run: diffusers' denoiser, a frozen transformers text encoder, an autoencoder or none."""

import inspect

import torch
from diffusers import SchedulerMixin, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor

from pipeline.config import Config, ConfigError, DiffusionConfig, ModelConfig
from pipeline.diffusion.captions import CaptionWhitening
from pipeline.diffusion.patches import PatchAutoencoder
from pipeline.diffusion.scheduler import DDPMScheduler
from pipeline.diffusion.text_to_image import TextToImagePipeline


def build_autoencoder(model: ModelConfig) -> PatchAutoencoder | None:
    """The lossless patches of a configuration, None for pixels."""
    return None if model.patch_size is None else PatchAutoencoder(patch_size=model.patch_size)


def build_unet(config: Config, caption_width: int) -> UNet2DConditionModel:
    """The denoiser of a configuration, for caption states (B, L, caption_width); weights from torch's global generator."""
    model, patch = config.model, config.model.patch_size or 1
    down = ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in model.attention]
    up = ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(model.attention)]
    return UNet2DConditionModel(
        sample_size=config.data.resolution // patch,
        in_channels=3 * patch**2,
        out_channels=3 * patch**2,
        block_out_channels=model.channels,
        layers_per_block=model.layers,
        down_block_types=down,
        up_block_types=up,
        norm_num_groups=model.norm_groups,
        attention_head_dim=model.heads,  # diffusers reads this as the number of heads
        cross_attention_dim=caption_width,
        addition_embed_type="text" if model.text_in_time else None,
        time_embedding_dim=model.time_embedding_dim,
        resnet_time_scale_shift="scale_shift" if model.time_scale_shift else "default",
    )


def build_scheduler(
    diffusion: DiffusionConfig, pretrained: SchedulerMixin | None = None
) -> DDPMScheduler:
    """The scheduler that a run trains with and saves: the configuration's values over those of a pretrained model's own.

    A pretrained model that says nothing of clip_sample drew without it, as latents must be. Its own list of betas goes where the
    configuration asks for others. ConfigError where the values make no noise process.
    """
    known = inspect.signature(DDPMScheduler.__init__).parameters
    theirs = (
        {}
        if pretrained is None
        else {"clip_sample": False}
        | {
            name: value
            for name, value in pretrained.config.items()
            if name in known and (name, value) != ("variance_type", None)
        }
    )
    if any(
        getattr(diffusion, name) is not None
        for name in ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end")
    ):
        theirs["trained_betas"] = None
    try:
        return DDPMScheduler(**diffusion.values(theirs))
    except ValueError as error:
        raise ConfigError(f"diffusion: {error}") from error


def build_pipeline(
    config: Config,
    unet: UNet2DConditionModel,
    tokenizer,
    encoder,
    whitening: CaptionWhitening | None,
    pretrained: TextToImagePipeline | None = None,
) -> TextToImagePipeline:
    """The pipeline of a run's parts; its autoencoder and caption length are the pretrained model's where there is one."""
    return TextToImagePipeline(
        unet,
        build_scheduler(config.diffusion, pretrained and pretrained.scheduler),
        encoder,
        tokenizer,
        pretrained.vae if pretrained else build_autoencoder(config.model),
        whitening,
        caption_length=pretrained.config.caption_length
        if pretrained
        else config.data.caption_length,
        caption_dropout=config.data.caption_dropout,
        w=config.sample.default_w,
    )


def prepare_for_training(
    network: UNet2DConditionModel, device: torch.device
) -> UNet2DConditionModel:
    """The network as it trains fastest: channels last, and on a CPU attention as two products, since its grids are small.

    A loaded network comes in evaluation mode, in which adapters round otherwise.
    """
    if device.type == "cpu":
        network.set_attn_processor(AttnProcessor())
    return network.train().to(memory_format=torch.channels_last)


def trainable_parameters(network: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The weights that train: all of a network's, or its adapters'."""
    return [weight for weight in network.parameters() if weight.requires_grad]


def parameter_count(weights: list[torch.nn.Parameter]) -> int:
    """How many numbers some weights hold."""
    return sum(weight.numel() for weight in weights)
