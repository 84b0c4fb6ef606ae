"""What the loop trains on and with: the data of a run, its frozen models and its network."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline import randomness
from pipeline.config import Config, ConfigError, ModelConfig, zero_snr_problems
from pipeline.data.caption_cache import CaptionCache, encode_captions
from pipeline.data.dataset import CaptionedImages, concatenate, load_kept, load_splits
from pipeline.data.image_ops import as_float
from pipeline.data.latent_cache import LatentCache, cache_latents
from pipeline.data.sampler import batch_indices, mixed_batch_indices
from pipeline.data.streaming import Stream, StreamBatch
from pipeline.diffusion.captions import CaptionWhitening, normalize, simplify
from pipeline.diffusion.losses import training_loss
from pipeline.diffusion.scheduler import DDPMScheduler
from pipeline.diffusion.text_to_image import TextToImagePipeline
from pipeline.models.build import (
    build_autoencoder,
    build_pipeline,
    build_unet,
    is_learned_autoencoder,
    latent_geometry,
    prepare_for_training,
)
from pipeline.models.loading import load_pipeline
from pipeline.models.lora import add_adapter, load_adapter_weights, save_adapter
from pipeline.models.text_encoders import fit_whitening, load_text_encoder, load_whitening


class Batch(NamedTuple):
    """The examples at some slots of the global batch of a step."""

    step: int
    slots: Tensor  # (B,)
    x_0: Tensor  # (B, c, h, w)
    captions: Tensor  # (B, L, D)


class Text(NamedTuple):
    """What reads captions: a tokenizer, a frozen encoder, its tokens, and which words it sees."""

    tokenizer: PreTrainedTokenizerBase
    encoder: PreTrainedModel
    length: int
    read: Callable[[str], str]


@dataclass
class TrainingTask:
    """The images and caption states that a run reads, and the pipeline whose network it trains."""

    config: Config
    pipe: TextToImagePipeline
    images: CaptionedImages  # the first rows, if the data is a stream; those of data.keep last
    kept: int  # the number of rows of data.keep
    held_out: CaptionedImages | None
    caption_states: Tensor  # (M, L, D) on the CPU, one row a caption of `images`
    held_out_states: Tensor | None  # (M, L, D) on the CPU
    empty_caption: Tensor  # (1, L, D) on the network's device
    latents: LatentCache | None  # of `images`, if the autoencoder is learned
    caption_cache: CaptionCache  # encodes a stream's captions
    stream: Stream | None = None

    @classmethod
    def build(
        cls,
        config: Config,
        device: torch.device,
        checkpoint: Path | None = None,
        retry_failed: bool = False,
    ) -> "TrainingTask":
        """Load or build the models, read the data and encode its captions; quick checks come first.

        retry_failed: try images again that could not be read when they were prepared. Raises
        ConfigError and DataError.
        """
        check_adapter_scheduler(config, checkpoint)
        base = load_base_pipeline(config.model.pretrained, config.data.resolution)
        text = build_text(config, base)
        if base and config.train.method == "lora":
            torch.manual_seed(config.seed)  # the adapter's initial weights
            add_adapter(base.unet, config.lora)
        images, held_out = load_splits(config.data, retry_failed)
        images = images.with_caption_lengths(text.tokenizer, text.length)
        kept = load_kept(config.data, retry_failed)
        if kept is not None:
            kept = kept.with_caption_lengths(text.tokenizer, text.length)
            images = concatenate(images, kept)

        def encode(captions: list[str]) -> Tensor:
            return encode_captions(captions, *text, config.data.cache, device)

        states = encode(images.all_captions)
        whitening = build_whitening(config.model, states, base, checkpoint)
        whiten = whitening.whiten_ if whitening else nn.Identity()
        held_out_states = whiten(encode(held_out.all_captions)) if held_out else None
        states = whiten(states)
        empty = whiten(encode([""]))
        if base:
            vae = base.vae
        else:
            vae = build_autoencoder(config.model)
            _, stride = latent_geometry(vae)
            levels = len(config.model.channels)
            check_resolution(config.data.resolution, stride, levels, config.model.autoencoder)
        torch.manual_seed(config.seed)  # the network's initial weights
        network = build_network(config, empty.shape[-1], vae, base, checkpoint)
        prepare_for_training(network, device)
        pipe = build_pipeline(config, network, text.tokenizer, text.encoder, whitening, vae, base)
        pipe.to(device)
        problems = zero_snr_problems(pipe.scheduler.config, config.train.weighting)
        if problems:
            raise ConfigError(problems[0])
        latents = None
        if is_learned_autoencoder(pipe.vae) and not config.data.streaming:
            latents = cache_latents(images, pipe.vae, config.data.cache, mirrored=config.data.flip)
        tensors = states, held_out_states, empty.to(device)
        count = 0 if kept is None else len(kept)
        return cls(config, pipe, images, count, held_out, *tensors, latents, CaptionCache(*text))

    @property
    def unet(self) -> UNet2DConditionModel:
        """The network to train."""
        return self.pipe.unet

    @property
    def scheduler(self) -> DDPMScheduler:
        """The noise process."""
        return self.pipe.scheduler

    @property
    def device(self) -> torch.device:
        """The network's device."""
        return self.empty_caption.device

    @property
    def fingerprint(self) -> str | None:
        """The fingerprint of images and captions; None for a stream, which nobody has read."""
        return None if self.stream is not None else self.images.fingerprint

    # ---- the batches of a step

    def micro_batches(self, step: int, accelerator: Accelerator) -> Iterator[Batch]:
        """Yield this rank's share of a step's global batch, one accumulation step at a time."""
        train = self.config.train
        size = train.batch_size // train.accumulation
        for start in range(0, train.batch_size, size):
            first = start + accelerator.process_index
            yield self.get_batch(step, torch.arange(first, start + size, accelerator.num_processes))

    def get_batch(self, step: int, slots: Tensor) -> Batch:
        """Return the examples at `slots` of the global batch of one step."""
        flip = torch.zeros(len(slots), dtype=torch.bool)
        if self.config.data.flip:
            flip = randomness.flips(self.config.seed, step, slots)
        if self.stream is not None:
            x_0, captions = self._read_stream(self.stream, step, slots, flip)
        else:
            rows = self.rows(step, slots)
            states = self.images.caption_rows(self.config.seed, step, slots, rows)
            captions = self.caption_states[states]
            if self.latents is None:
                x_0 = self.encode_images(self.images, rows, flip)
            else:
                z = self._posterior_noise(step, slots, self.latents.shape)
                x_0 = self.latents.sample(rows, flip, z).to(self.device)
        return Batch(step, slots, x_0, captions.to(self.device))

    def _read_stream(
        self, stream: Stream, step: int, slots: Tensor, flip: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return x_0 and caption states of the stream's next images."""
        images = stream.take(len(slots))
        counts = [len(captions) for captions in images.alternatives]
        choices: list[int] = randomness.caption_choice(
            self.config.seed, step, slots, counts
        ).tolist()
        chosen = [texts[i] for texts, i in zip(images.alternatives, choices, strict=True)]
        states = self.caption_cache(chosen).to(self.device)
        if self.pipe.whitening is not None:
            states = self.pipe.whitening(states)
        z = None
        if is_learned_autoencoder(self.pipe.vae):
            side = self.unet.config["sample_size"]
            z = self._posterior_noise(step, slots, (self.unet.config["in_channels"], side, side))
        return self.encode_images(images, slice(None), flip, z), states

    def _posterior_noise(self, step: int, slots: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Return the noise of the autoencoder's posterior, (B, *shape)."""
        return randomness.noise(self.config.seed, step, slots, shape, "posterior")

    def encode_images(
        self,
        images: CaptionedImages | StreamBatch,
        rows: Tensor | slice,
        flip: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Return images by row as the network sees them (B, c, h, w), mirrored if `flip` (B,)."""
        pixels = as_float(images.images[rows].to(self.device))
        if flip is not None:
            mirror = flip.to(pixels.device)[:, None, None, None]
            pixels = torch.where(mirror, pixels.flip(-1), pixels)
        return self.pipe.encode(pixels, noise)

    def rows(self, step: int, slots: Tensor | list[int]) -> Tensor:
        """Return the dataset's rows at `slots` of the global batch of one step, (B,)."""
        seed, size = self.config.seed, self.config.train.batch_size
        own, keep = len(self.images) - self.kept, self.config.data.keep
        if keep is None:
            return batch_indices(seed, step, size, own, slots=slots)
        return mixed_batch_indices(seed, step, size, own, self.kept, keep.share, slots)

    def timesteps(self, batch: Batch) -> Tensor:
        """Return t, (B,) in 0..T-1: stratified over the global batch."""
        return self._timesteps(batch.step, batch.slots).to(self.device)

    def _timesteps(self, step: int, slots: Tensor | list[int]) -> Tensor:
        size, T = self.config.train.batch_size, len(self.scheduler)
        return randomness.timesteps(self.config.seed, step, slots, size, T)

    def noise(self, batch: Batch) -> Tensor:
        """Return eps, standard normal in the shape of x_0."""
        shape = batch.x_0.shape[1:]
        return randomness.noise(self.config.seed, batch.step, batch.slots, shape).to(self.device)

    def keep_captions(self, batch: Batch) -> Tensor:
        """Return which examples keep their caption, (B, 1, 1) bool, for equation (14)."""
        dropout = self.config.data.caption_dropout
        keep = randomness.keep_caption(self.config.seed, batch.step, batch.slots, dropout)
        return keep[:, None, None].to(self.device)

    def loss(self, prediction: Tensor, batch: Batch, eps: Tensor, t: Tensor) -> Tensor:
        """Return the configured loss (13) of each example, (B,)."""
        weighting, gamma = self.config.train.weighting, self.config.train.gamma
        return training_loss(self.scheduler, prediction, batch.x_0, eps, t, weighting, gamma)

    def describe_examples(self, step: int, slots: list[int]) -> list[str]:
        """Return the file and the timestep of each example at `slots`, for messages."""
        if self.stream is not None:
            names = [f"the batch's image {slot}" for slot in slots]
        else:
            rows = self.rows(step, slots).tolist()
            names = [self.images.metadata[row].get("file_name", f"row {row}") for row in rows]
        t = self._timesteps(step, slots).tolist()
        return [f"{name} at t = {k}" for name, k in zip(names, t, strict=True)]

    def save(self, folder: Path) -> None:
        """Write the trained weights to a checkpoint's folder, where `build` finds them."""
        if self.config.train.method == "lora":
            save_adapter(self.unet, folder / "lora")
            return
        parts = {"unet": self.unet, "whitening": self.pipe.whitening}
        for name, part in parts.items():
            if part is not None:
                # Not the folder that it was loaded from: a resumed run writes the same bytes.
                part.register_to_config(_name_or_path="")
                part.save_pretrained(folder / name, safe_serialization=True)


def predict(network: nn.Module, x_t: Tensor, t: Tensor, captions: Tensor) -> Tensor:
    """Return the network's output (B, c, h, w) in float32."""
    x_t = x_t.to(memory_format=torch.channels_last)
    return network(x_t, t, encoder_hidden_states=captions, return_dict=False)[0].float()


def check_adapter_scheduler(config: Config, checkpoint: Path | None) -> None:
    """Raise ConfigError for a new adapter with scheduler settings: its base model has its own."""
    changed = [
        f"diffusion.{name}" for name, value in vars(config.diffusion).items() if value is not None
    ]
    if config.train.method == "lora" and changed and checkpoint is None:
        raise ConfigError(
            f"A LoRA adapter uses the scheduler of its base model. Remove {', '.join(changed)}."
        )


def load_base_pipeline(model: str | None, resolution: int) -> TextToImagePipeline | None:
    """Return the pipeline to fine-tune, set to a resolution; None for a new model.

    Raises ConfigError if it cannot be used.
    """
    if model is None:
        return None
    try:
        pipe = load_pipeline(model)
    except ValueError as error:
        raise ConfigError(f"model.pretrained: {error}") from error
    if getattr(pipe.unet, "peft_config", None):
        raise ConfigError(f"model.pretrained {model} is an adapter. Give the model that it adapts.")
    missing = [name for name in ("tokenizer", "text_encoder") if getattr(pipe, name) is None]
    if missing:
        raise ConfigError(
            f"model.pretrained {model} has no {' and no '.join(missing)}. Save it with them."
        )
    levels = len(pipe.unet.config.block_out_channels)
    check_resolution(resolution, pipe.vae_scale_factor, levels, model)
    pipe.unet.register_to_config(sample_size=resolution // pipe.vae_scale_factor)
    return pipe


def check_resolution(resolution: int, stride: int, levels: int, model: str | None) -> None:
    """Raise ConfigError unless a UNet of some levels can halve an image's latents.

    stride: pixels per position of the latents. model: where the stride comes from.
    """
    divisor = stride * 2 ** (levels - 1)
    if resolution % divisor:
        raise ConfigError(
            f"data.resolution must be a multiple of {divisor} for {model}, got {resolution}."
        )


def build_text(config: Config, base: TextToImagePipeline | None) -> Text:
    """Return the configured text encoder or the base model's, once it reads enough tokens."""
    if base is None:
        tokenizer, encoder = load_text_encoder(config.model.text_encoder)
        length, setting = config.data.caption_length, "data.caption_length"
        simplified = config.data.simplify_captions
    else:
        tokenizer, encoder = base.tokenizer, base.text_encoder
        length = base.config["caption_length"] or tokenizer.model_max_length
        setting = f"the tokenizer's model_max_length of {config.model.pretrained}"
        simplified = base.config["simplify_captions"]
    limit = getattr(encoder.config, "max_position_embeddings", None)
    if limit and length > limit:
        raise ConfigError(
            f"{setting} must be at most {limit}, the text encoder's limit, got {length}."
        )
    return Text(tokenizer, encoder, length, simplify if simplified else normalize)


def build_whitening(
    model: ModelConfig, states: Tensor, base: TextToImagePipeline | None, checkpoint: Path | None
) -> CaptionWhitening | None:
    """Return the whitening of caption states: the checkpoint's, the base model's or a new one."""
    saved = load_whitening(checkpoint) if checkpoint else None
    if saved is not None:
        return saved
    return base.whitening if base else fit_whitening(model, states)


def build_network(
    config: Config,
    caption_width: int,
    vae: nn.Module | None,
    base: TextToImagePipeline | None,
    checkpoint: Path | None,
) -> UNet2DConditionModel:
    """Return the network to train: the checkpoint's, the base model's or a new one.

    New weights come from torch's global generator.
    """
    if checkpoint is None:
        network = base.unet if base else build_unet(config, caption_width, vae)
    elif base and config.train.method == "lora":
        network = base.unet
        load_adapter_weights(network, checkpoint / "lora")
    else:
        network = UNet2DConditionModel.from_pretrained(checkpoint / "unet", use_safetensors=True)
    if config.train.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    return network


def open_stream(
    config: Config, accelerator: Accelerator
) -> contextlib.AbstractContextManager[Stream | None]:
    """Open this rank's part of a streamed training split; None for data prepared beforehand."""
    if not config.data.streaming:
        return contextlib.nullcontext()
    rank, world_size = accelerator.process_index, accelerator.num_processes
    return contextlib.closing(Stream(config.data, config.seed, rank, world_size))
