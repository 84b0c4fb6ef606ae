"""What a training step needs: the pictures and their captions' states, read once, and the models that go with them."""

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from pipeline import randomness
from pipeline.config import Config, ConfigError, zero_snr_problems
from pipeline.data.caption_cache import CaptionCache, encode_captions
from pipeline.data.dataset import CaptionedImages, load_splits
from pipeline.data.image_ops import as_float
from pipeline.data.latent_cache import LatentCache, cache_latents
from pipeline.data.sampler import batch_indices
from pipeline.data.streaming import Stream
from pipeline.diffusion.losses import training_loss
from pipeline.diffusion.patches import PatchAutoencoder
from pipeline.diffusion.scheduler import DDPMScheduler
from pipeline.diffusion.text_to_image import TextToImagePipeline
from pipeline.models.build import build_pipeline, build_unet, prepare_for_training
from pipeline.models.loading import load_pipeline
from pipeline.models.lora import add_adapter, load_adapter_weights, save_adapter
from pipeline.models.text_encoders import fit_whitening, load_text_encoder, load_whitening
from pipeline.randomness import caption_choice, flips


@dataclass
class TrainingTask:
    """What a step needs: the images with their caption states, and the models."""

    images: CaptionedImages  # of a stream its first rows
    held_out: CaptionedImages | None
    states: torch.Tensor  # (M, L, D) on the CPU, one row a caption of the training split
    held_states: torch.Tensor | None  # on the CPU
    empty: torch.Tensor  # (1, L, D) where the network is, the empty caption
    pipe: TextToImagePipeline
    latents: (
        LatentCache | None
    )  # of the training split, where an autoencoder is worth asking only once
    encode: CaptionCache  # of a stream's captions
    stream: Stream | None = None

    @property
    def unet(self) -> UNet2DConditionModel:
        """The network that trains."""
        return self.pipe.unet

    @property
    def scheduler(self) -> DDPMScheduler:
        """The noise process."""
        return self.pipe.scheduler

    @property
    def fingerprint(self) -> str | None:
        """What the pictures and captions are known by; None of a stream, which nobody has read."""
        return None if self.stream is not None else self.images.fingerprint

    def encoded(
        self,
        images: CaptionedImages,
        rows,
        flip: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Images by row as the network sees them, (B, c, h, w), mirrored where `flip` (B,) says so; noise: as `encode` has it."""
        pixels = as_float(images.images[rows].to(self.empty.device))
        if flip is not None:
            pixels = torch.where(
                flip.to(pixels.device)[:, None, None, None], pixels.flip(-1), pixels
            )
        return self.pipe.encode(pixels, noise)

    def examples(
        self, config: Config, step: int, slots: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x_0 (B, c, h, w) and caption states (B, L, D) of the examples at `slots` of the global batch of one step."""
        seed, device = config.seed, self.empty.device
        flip = flips(seed, step, slots) if config.data.flip else None
        if self.stream is None:
            rows = batch_indices(seed, step, config.train.batch_size, len(self.images), slots=slots)
            states = self.states[self.images.caption_rows(seed, step, slots, rows)].to(device)
            if self.latents is None:
                return self.encoded(self.images, rows, flip), states
            z = randomness.noise(seed, step, slots, self.latents.shape, "posterior")
            return self.latents.sample(rows, rows < 0 if flip is None else flip, z).to(
                device
            ), states
        batch = self.stream.take(len(slots))
        choice = caption_choice(
            seed, step, slots, [len(captions) for captions in batch.alternatives]
        ).tolist()
        states = self.encode(
            [captions[i] for captions, i in zip(batch.alternatives, choice, strict=True)]
        ).to(device)
        shape = (self.unet.config.in_channels, *[self.unet.config.sample_size] * 2)
        z = (
            randomness.noise(seed, step, slots, shape, "posterior")
            if is_learned_autoencoder(self.pipe.vae)
            else None
        )
        return self.encoded(
            batch, slice(None), flip, z
        ), states if self.pipe.whitening is None else self.pipe.whitening(states)

    def names(self, config: Config, step: int, slots: list[int]) -> list[str]:
        """What the examples at `slots` of the global batch of one step are called."""
        if self.stream is not None:
            return [f"the batch's image {slot}" for slot in slots]
        rows = batch_indices(
            config.seed, step, config.train.batch_size, len(self.images), slots=slots
        ).tolist()
        return [self.images.metadata[row].get("file_name", f"row {row}") for row in rows]

    def loss(self, config: Config, output, x_0, eps, t) -> torch.Tensor:
        """The configured loss of a batch, one value each (B,)."""
        return training_loss(
            self.scheduler, output, x_0, eps, t, config.train.weighting, config.train.gamma
        )

    def save(self, config: Config, folder: Path) -> None:
        """Write the trained weights to a checkpoint's folder, where `prepare` finds them."""
        if config.train.method == "lora":
            save_adapter(self.unet, folder / "lora")
            return
        self.unet.save_pretrained(folder / "unet", safe_serialization=True)
        if self.pipe.whitening is not None:
            self.pipe.whitening.save_pretrained(folder / "whitening", safe_serialization=True)


def build_task(
    config: Config, checkpoint: Path | None, device: torch.device, again: bool = False
) -> TrainingTask:
    """Load or build the models, read the data, encode its captions: what may be misspelt is looked for before what takes long.

    again: whether pictures that could not be read are tried anew.
    """
    noise = [
        f"diffusion.{name}" for name, value in vars(config.diffusion).items() if value is not None
    ]
    if config.train.method == "lora" and noise and checkpoint is None:
        raise ConfigError(
            f"an adapter is drawn with its model's own noise process: leave {', '.join(noise)} out"
        )
    base = None if config.model.pretrained is None else load_base_pipeline(config)
    tokenizer, encoder = (
        (base.tokenizer, base.text_encoder)
        if base
        else load_text_encoder(config.model.text_encoder)
    )
    length = (
        (base.config.caption_length or tokenizer.model_max_length)
        if base
        else config.data.caption_length
    )
    if length > (limit := getattr(encoder.config, "max_position_embeddings", None) or length):
        where = (
            "data.caption_length"
            if base is None
            else f"the tokenizer's model_max_length of {config.model.pretrained}"
        )
        raise ConfigError(
            f"{where} must be at most {limit}, the text encoder's positions, got {length}"
        )
    if config.train.method == "lora":
        torch.manual_seed(config.seed)  # the adapter's first weights
        add_adapter(base.unet, config.lora)
    images, held_out = load_splits(config.data, again)
    images = images.with_caption_lengths(tokenizer, length)
    encode = lambda captions: encode_captions(
        captions, tokenizer, encoder, length, config.data.cache, device
    )
    states = encode(images.all_captions)
    whitening = load_whitening(checkpoint) if checkpoint else None
    if whitening is None:
        whitening = base.whitening if base else fit_whitening(config.model, states)
    white = whitening.whiten_ if whitening else lambda raw: raw
    held = white(encode(held_out.all_captions)) if held_out else None
    states, empty = white(states), white(encode([""]))
    torch.manual_seed(config.seed)  # the network's first weights
    unet = (
        base.unet if base else build_unet(config, empty.shape[-1]) if checkpoint is None else None
    )
    if config.train.method == "lora" and checkpoint:
        load_adapter_weights(unet, checkpoint / "lora")
    elif checkpoint:
        unet = UNet2DConditionModel.from_pretrained(checkpoint / "unet", use_safetensors=True)
    if config.train.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    pipe = build_pipeline(
        config, prepare_for_training(unet, device), tokenizer, encoder, whitening, base
    ).to(device)
    if found := zero_snr_problems(pipe.scheduler.config, config.train.weighting):
        raise ConfigError(found[0])
    keep = is_learned_autoencoder(pipe.vae) and not config.data.streaming
    kept = (
        cache_latents(images, pipe.vae, config.data.cache, mirrored=config.data.flip)
        if keep
        else None
    )
    return TrainingTask(
        images,
        held_out,
        states,
        held,
        empty.to(device),
        pipe,
        kept,
        CaptionCache(tokenizer, encoder, length),
    )


def is_learned_autoencoder(vae: torch.nn.Module | None) -> bool:
    """Whether an autoencoder is a network, which is worth asking only once an image, and says a distribution of it."""
    return vae is not None and not isinstance(vae, PatchAutoencoder)


def load_base_pipeline(config: Config) -> TextToImagePipeline:
    """The pipeline that a fine-tune goes on from, set to the data's resolution; ConfigError where it cannot be used."""
    try:
        pipe = load_pipeline(config.model.pretrained)
    except ValueError as error:
        raise ConfigError(f"model.pretrained: {error}") from error
    if getattr(pipe.unet, "peft_config", None):
        raise ConfigError(
            f"model.pretrained must be a whole model, got {config.model.pretrained}, which is an adapter: give the "
            "model that it adapts"
        )
    if missing := [name for name in ("tokenizer", "text_encoder") if getattr(pipe, name) is None]:
        raise ConfigError(
            f"model.pretrained must have what reads captions, got {config.model.pretrained} without "
            f"{' and '.join(missing)}: save it with them"
        )
    side, rest = divmod(config.data.resolution, pipe.vae_scale_factor)
    halvings = 2 ** (len(pipe.unet.config.block_out_channels) - 1)
    if rest or side % halvings:
        raise ConfigError(
            f"data.resolution must be a multiple of {pipe.vae_scale_factor * halvings} for "
            f"{config.model.pretrained}, got {config.data.resolution}"
        )
    pipe.unet.register_to_config(sample_size=side)
    return pipe
