"""Build the networks of a run and its pipeline from the settings."""

import copy
import inspect
import warnings
from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    ConfigMixin,
    SchedulerMixin,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.config import Config, ConfigError, DiffusionConfig, ModelConfig
from pipeline.diffusion.autoencoder import ConvAutoencoder
from pipeline.diffusion.captions import CaptionWhitening
from pipeline.diffusion.patches import PatchAutoencoder
from pipeline.diffusion.scheduler import DDPMScheduler
from pipeline.diffusion.text_to_image import TextToImagePipeline
from pipeline.runs.folder import RunFolder

# The classes that `model.autoencoder` may name.
AUTOENCODERS = {kind.__name__: kind for kind in (ConvAutoencoder, AutoencoderKL, AutoencoderTiny)}


def build_autoencoder(model: ModelConfig) -> nn.Module | None:
    """Return the trained autoencoder or the lossless patches of a new model; None for pixels."""
    if model.autoencoder is not None:
        return load_autoencoder(model.autoencoder)
    return None if model.patch_size is None else PatchAutoencoder(patch_size=model.patch_size)


def load_autoencoder(name: str) -> nn.Module:
    """Load a frozen autoencoder in float32: ours, or diffusers' AutoencoderKL or AutoencoderTiny.

    name: a run of `direct-jump train-autoencoder`, a saved autoencoder, or `USER/NAME[@REVISION]`
    on the Hub. ConfigError if it cannot be loaded.
    """
    source, _, revision = name.partition("@")
    trained = RunFolder(source).autoencoder
    options: dict[str, Any] = {"revision": revision} if revision else {}
    if trained.is_dir():
        source = trained
    try:
        settings: Any = ConvAutoencoder.load_config(source, **options)
        kind = AUTOENCODERS.get(settings["_class_name"])
        if kind is None:
            raise ValueError(
                f"it is a {settings['_class_name']}, not one of {', '.join(AUTOENCODERS)}"
            )
        vae = kind.from_pretrained(source, use_safetensors=True, **options)
        vae.register_to_config(_name_or_path="")  # no saved file tells where it came from
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"model.autoencoder {name!r} cannot be loaded: {reason}") from error
    return vae.requires_grad_(False).eval()


def is_learned_autoencoder(vae: nn.Module | None) -> bool:
    """Return whether an autoencoder is a network, whose latents are worth caching."""
    return vae is not None and not isinstance(vae, PatchAutoencoder)


def latent_geometry(vae: Any | None) -> tuple[int, int]:
    """Return the channels of an autoencoder's latents, and its pixels per position."""
    if vae is None:
        return 3, 1
    stride = 2 ** (len(vae.config.block_out_channels) - 1)
    return vae.config.get("latent_channels", 3 * stride**2), stride


def build_unet(config: Config, caption_width: int, vae: Any | None) -> UNet2DConditionModel:
    """Build the denoiser for caption states (B, L, caption_width) and an autoencoder's latents.

    Its weights come from torch's global generator.
    """
    model = config.model
    channels, stride = latent_geometry(vae)
    down = tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in model.attention)
    up = tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(model.attention))
    return UNet2DConditionModel(
        sample_size=config.data.resolution // stride,
        in_channels=channels,
        out_channels=channels,
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
    diffusion: DiffusionConfig, pretrained: ConfigMixin | None = None, latents: bool = False
) -> DDPMScheduler:
    """Build the scheduler of a run: the settings over the values of a pretrained scheduler.

    latents: of a new model, which are not clipped, since they have no bounds.
    ConfigError if the values do not define a noise process.
    """
    theirs: dict[str, Any] = {"clip_sample": False} if latents else {}
    if pretrained is not None:
        parameters = inspect.signature(DDPMScheduler.__init__).parameters
        theirs = {name: value for name, value in pretrained.config.items() if name in parameters}
        # A scheduler without the option did not clip, and latents must not be clipped.
        theirs.setdefault("clip_sample", False)
        # DPMSolverMultistepScheduler has variance_type: null.
        if theirs.get("variance_type", "") is None:
            del theirs["variance_type"]
    schedule = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end")
    is_changed = any(getattr(diffusion, name) is not None for name in schedule)
    if is_changed:
        theirs["trained_betas"] = None  # their list of betas would win over the new schedule
    try:
        with warnings.catch_warnings():
            if pretrained is not None and not is_changed:
                # The network was trained on this chain, so its end is no choice of this run.
                warnings.filterwarnings("ignore", "the chain ends at abar")
            return DDPMScheduler(**diffusion.values(theirs))
    except ValueError as error:
        raise ConfigError(f"diffusion: {error}") from error


def stock_scheduler(name: str, config: Any) -> Any:
    """Build a scheduler of diffusers by its class name, with the values of a model's scheduler.

    ValueError for an unknown name and for a scheduler that does not fit the model.
    """
    found = getattr(diffusers, name, None)
    is_scheduler = isinstance(found, type) and issubclass(found, SchedulerMixin)
    kind: Any = found
    # Those of flow matching and EDM have another noise process.
    if not is_scheduler or "beta_schedule" not in inspect.signature(kind.__init__).parameters:
        raise ValueError(
            f"{name} is no scheduler of diffusers for noise as in (5). "
            "Use one such as DDIMScheduler or DPMSolverMultistepScheduler."
        )
    try:
        scheduler = kind.from_config(config)
        # Some refuse what a network predicts in their first step only.
        trial = copy.deepcopy(scheduler)
        trial.set_timesteps(2)
        zero = torch.zeros(1, 1, 1, 1)
        trial.step(zero, trial.timesteps[0], trial.scale_model_input(zero, trial.timesteps[0]))
    except (NotImplementedError, ValueError) as error:
        raise ValueError(f"{name} does not fit this model: {error} Use another one.") from error
    return scheduler


def build_pipeline(
    config: Config,
    unet: UNet2DConditionModel,
    tokenizer: PreTrainedTokenizerBase,
    encoder: PreTrainedModel,
    whitening: CaptionWhitening | None,
    vae: Any | None,
    pretrained: TextToImagePipeline | None = None,
) -> TextToImagePipeline:
    """Build the pipeline of a run.

    pretrained: the model that the run started from, which brings its way to read captions and its
    scheduler values.
    """
    if pretrained is None:
        scheduler = build_scheduler(config.diffusion, latents=is_learned_autoencoder(vae))
        caption_length = config.data.caption_length
        simplify_captions = config.data.simplify_captions
    else:
        scheduler = build_scheduler(config.diffusion, pretrained.scheduler)
        caption_length = pretrained.config["caption_length"]
        simplify_captions = pretrained.config["simplify_captions"]
    return TextToImagePipeline(
        unet,
        scheduler,
        encoder,
        tokenizer,
        vae,
        whitening,
        caption_length=caption_length,
        caption_dropout=config.data.caption_dropout,
        simplify_captions=simplify_captions,
        w=config.sample.default_w,
    )


def prepare_for_training(
    network: UNet2DConditionModel, device: torch.device
) -> UNet2DConditionModel:
    """Put the network into its fastest form for training: channels last, in training mode.

    On a CPU, attention runs as two matrix products, which suits small grids.
    A loaded network is in evaluation mode, in which adapters round differently.
    """
    if device.type == "cpu":
        network.set_attn_processor(AttnProcessor())
    return network.train().to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def trainable_parameters(network: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Return the parameters that train: all of a network's, or those of its adapters."""
    return [weight for weight in network.parameters() if weight.requires_grad]


def parameter_count(weights: list[torch.nn.Parameter]) -> int:
    """Return how many numbers the parameters hold."""
    return sum(weight.numel() for weight in weights)
