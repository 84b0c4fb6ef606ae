"""A run's settings: typed and validated, from YAML files and the command line."""

import argparse
import dataclasses
import difflib
import inspect
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal, NoReturn, TypeVar, get_args

import yaml
from huggingface_hub.utils import HFValidationError, validate_repo_id
from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    TypeAdapter,
    ValidationError,
)
from pydantic.dataclasses import dataclass

DEFAULT = "configs/emoji-small.yaml"
Share = Annotated[float, Field(ge=0, le=1)]
FinitePositive = Annotated[PositiveFloat, Field(allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
# A single value is taken as a list of one.
ONE_OR_MORE = BeforeValidator(lambda x: x if isinstance(x, list | tuple) else (x,))
# Attribute docstrings become the help texts; numbers in text settings may stand without quotes.
SECTION = ConfigDict(extra="forbid", use_attribute_docstrings=True, coerce_numbers_to_str=True)


class ConfigError(ValueError):
    """A configuration that cannot be used; one problem a line."""


@dataclass(frozen=True, config=SECTION)
class KeepConfig:
    """A second dataset that fills a share of every batch, so that fine-tuning forgets less."""

    source: str
    """like data.source; all of its training split is used"""
    share: Annotated[float, Field(gt=0, lt=1)] = 0.25
    """share of every batch"""


@dataclass(frozen=True, config=SECTION)
class DataConfig:
    """The captioned images."""

    source: str = "emoji-small"
    """embedded dataset (emoji, emoji-small, emoji-varied, emoji-styles, shapes, monsters), image
    folder or zip, parquet or WebDataset file or folder, save_to_disk folder, or the id of a dataset
    on the Hub"""
    subset: str | None = None
    """subset of a dataset on the Hub"""
    revision: str | None = None
    """branch, tag or commit of a dataset on the Hub"""
    split: str = "train"
    """training split; for a table also a slice such as train[:95%]"""
    held_out: str | None = "test"
    """held-out split, for validation and evaluation; null: none"""
    image_column: str | None = None
    """column with the images; null: the only one"""
    caption_column: str | tuple[str, ...] | None = None
    """caption columns; null: caption or text; several: each step uses one at random"""
    missing_caption: Literal["empty", "skip"] = "empty"
    """images without a caption: train them unconditionally, or skip them"""
    streaming: bool = False
    """read a table during training instead of preparing it first"""
    shuffle_buffer: PositiveInt = 1000
    """rows of a stream that are shuffled together"""
    flip: bool = False
    """mirror half of the examples, chosen at every step"""
    crop: Literal["center", "random"] = "center"
    """the square cut from each image: its centre, or a random one that is fixed per image"""
    resolution: PositiveInt = 64
    """image height and width in pixels"""
    caption_length: Annotated[int, Field(ge=2)] = 16
    """tokens; longer captions are cut and counted"""
    simplify_captions: bool = False
    """read captions and prompts in lower case, without articles and punctuation"""
    caption_dropout: Share = 0.1
    """share of captions replaced by the empty caption (14), chosen at every step"""
    keep: KeepConfig | None = None
    """second dataset for a share of every batch, against forgetting: {source: ..., share: 0.25}"""
    max_broken: Share = 0.05
    """largest share of unreadable rows"""
    cache: str = "data"
    """folder of prepared data and embedded datasets, shared by all runs"""

    @property
    def sources(self) -> tuple[str, ...]:
        """The source, and that of `keep`."""
        return (self.source,) if self.keep is None else (self.source, self.keep.source)

    def problems(self) -> Iterator[str]:
        """Yield what is wrong with values that are valid one by one."""
        if self.keep is not None and self.streaming:
            yield "data.keep cannot be used with data.streaming. Remove one."
        columns = self.caption_column
        names = (columns,) if isinstance(columns, str) else columns
        if names is not None and (not names or not all(names) or len(set(names)) < len(names)):
            yield f"data.caption_column must name one or several different columns, got {columns!r}"
        for name in ("split", "held_out"):
            split = getattr(self, name)
            if self.streaming and "[" in (split or ""):
                yield f"data.{name} must be a whole split with data.streaming, got {split}"


# How captions are read. A base model brings these.
CAPTION_SETTINGS = ("caption_length", "simplify_captions")


@dataclass(frozen=True, config=SECTION)
class ModelConfig:
    """A new UNet2DConditionModel with a frozen text encoder, or a base model."""

    pretrained: str | None = None
    """base model: a folder or Hub id in Stable Diffusion's format or ours; it brings all below"""
    patch_size: PositiveInt | None = None
    """p: lossless p x p patches (PatchAutoencoder); null: pixels"""
    autoencoder: str | None = None
    """latents of a trained autoencoder, instead of patches: a run of train-autoencoder, or an
    AutoencoderKL or AutoencoderTiny of diffusers, as a folder or Hub id"""
    channels: Annotated[tuple[PositiveInt, ...], ONE_OR_MORE] = (64, 128, 256)
    """channels of each UNet level; each level halves the resolution"""
    layers: PositiveInt = 1
    """residual blocks per level on the way down; one more on the way up"""
    attention: Annotated[tuple[bool, ...], ONE_OR_MORE] = (False, False, True)
    """levels with self-attention and cross-attention to the caption"""
    heads: PositiveInt = 8
    """attention heads"""
    norm_groups: PositiveInt = 32
    """groups of the group norms; fewer are as good here and faster on a CPU"""
    text_in_time: bool = True
    """add the pooled caption to the time embedding (addition_embed_type="text")"""
    time_scale_shift: bool = True
    """the time embedding scales and shifts (FiLM); false: it is added"""
    time_embedding_dim: Annotated[int, Field(ge=2)] | None = None
    """width of the time embedding; null: 4 x the first of channels"""
    whitening: FinitePositive | None = None
    """whiten caption states, with this ridge added to every variance; null: do not"""
    text_encoder: str = "minilm"
    """the embedded all-MiniLM-L6-v2, or a transformers folder or Hub id"""

    def problems(self) -> Iterator[str]:
        """Yield what is wrong with values that are valid one by one."""
        if self.pretrained is not None:
            for field in dataclasses.fields(self)[1:]:
                if getattr(self, field.name) != field.default:
                    yield f"model.{field.name} comes from model.pretrained. Remove it."
        if self.patch_size is not None and self.autoencoder is not None:
            yield "model.patch_size and model.autoencoder exclude each other. Remove one."
        if self.patch_size is not None and self.patch_size & (self.patch_size - 1):
            yield f"model.patch_size must be a power of two, got {self.patch_size}"
        if not self.channels:
            yield "model.channels must have at least one level"
        for name, divisor in (("norm_groups", self.norm_groups), ("heads", self.heads)):
            if any(channels % divisor for channels in self.channels):
                expected = f"multiples of model.{name} ({divisor})"
                yield f"model.channels must be {expected}, got {self.channels}"
        if len(self.attention) != len(self.channels):
            yield (
                f"model.attention must have one value for each of the {len(self.channels)} "
                f"model.channels, got {len(self.attention)}"
            )


# The noise process of a new model: the slides', except that `trailing` starts at pure noise and
# that x_0 is clipped.
NEW_MODEL_NOISE = {
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "prediction_type": "epsilon",
    "variance_type": "fixed_small",
    "timestep_spacing": "trailing",
    "rescale_betas_zero_snr": False,
    "clip_sample": True,
}


@dataclass(frozen=True, config=SECTION)
class DiffusionConfig:
    """The noise process; null is the base model's value, for a new model NEW_MODEL_NOISE's."""

    num_train_timesteps: PositiveInt | None = None
    """T, the steps of the chain (1)"""
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"] | None = None
    """how beta grows from beta_start to beta_end"""
    beta_start: float | None = None
    """beta_1, the variance added by the first step"""
    beta_end: float | None = None
    """beta_T"""
    prediction_type: Literal["epsilon", "sample", "v_prediction"] | None = None
    """what the network predicts: the noise, the image (sample) or v"""
    variance_type: (
        Literal["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"] | None
    ) = None
    """variance of (10): the posterior's (9), or beta itself (fixed_large)"""
    timestep_spacing: Literal["leading", "linspace", "trailing"] | None = None
    """which timesteps fewer steps take; trailing starts at T"""
    rescale_betas_zero_snr: bool | None = None
    """move abar_T to 0, pure noise (Lin et al. 2024)"""
    clip_sample: bool | None = None
    """clip the predicted x_0 to [-1, 1]; not for latents"""

    def values(self, pretrained: dict | None = None) -> dict:
        """Return DDPMScheduler's arguments: these over a base model's over NEW_MODEL_NOISE."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        return NEW_MODEL_NOISE | (pretrained or {}) | given

    def problems(self) -> Iterator[str]:
        """Yield what is wrong with values that are valid one by one."""
        start, end = self.values()["beta_start"], self.values()["beta_end"]
        if not 0 < start <= end < 1:
            yield (
                "diffusion.beta_start and diffusion.beta_end must satisfy 0 < start <= end < 1, "
                f"got {start} and {end}"
            )


def _typed(value: object) -> object:
    """Return a YAML value whose type no setting declares, with truth values and 1e-3 as numbers."""
    if isinstance(value, dict):
        return {key: _typed(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_typed(item) for item in value]
    if not isinstance(value, str):
        return value
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    try:
        return float(value)
    except ValueError:
        return value


@dataclass(frozen=True, config=SECTION)
class OptimizationConfig:
    """The optimisation; a step is one optimiser step on `batch_size` examples."""

    steps: PositiveInt = 1000
    """steps of the whole run; raise it later to train on"""
    batch_size: PositiveInt = 32
    """images per step, over all processes and accumulated micro-batches"""
    optimizer: str = "adamw"
    """adamw; muon: orthogonalised momentum for matrices, AdamW for the rest; or the import path of
    a torch optimizer, such as prodigyopt.Prodigy"""
    optimizer_args: Annotated[dict[str, object] | None, BeforeValidator(_typed)] = None
    """arguments of an optimizer by import path, except lr: {weight_decay: 0.01, ...}"""
    lr: FinitePositive = 1e-4
    """learning rate"""
    matrix_lr: FinitePositive | None = None
    """learning rate of the matrices under muon; null: lr"""
    lr_schedule: Literal[
        "constant", "linear", "cosine", "cosine_with_restarts", "polynomial", "flat_then_linear"
    ] = "constant"
    """learning rate after the warm-up"""
    lr_cycles: PositiveInt = 1
    """cosine_with_restarts: how often the learning rate falls from lr to 0"""
    lr_power: FinitePositive = 1.0
    """polynomial: its exponent; it ends at 1e-7"""
    lr_end: Share = 0.0
    """flat_then_linear: the last learning rate as a share of lr"""
    decay_share: Share = 0.4
    """flat_then_linear: the share of the run in which the learning rate falls"""
    warmup: Annotated[int, Field(ge=0)] = 0
    """steps in which the learning rate rises to lr"""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (
        0.9,
        0.999,
    )
    """decay rates of AdamW's moving averages"""
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.01
    """decoupled: each step subtracts lr x weight_decay of every weight"""
    clip: FinitePositive = 1.0
    """largest norm of a step's gradient"""
    max_skipped: PositiveInt = 10
    """consecutive steps without a finite gradient that end the run"""
    precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """auto: bf16 if the hardware computes in it, fp16 on older CUDA GPUs, otherwise no (float32)"""
    threads: PositiveInt | None = None
    """CPU threads per process; null: cores / local processes"""
    log_every: PositiveInt = 20
    """steps between lines of metrics.jsonl"""
    validate_every: PositiveInt = 250
    """steps between validations on a fixed grid of images, timesteps and noise"""
    save_every: PositiveInt = 250
    """steps between checkpoints"""
    keep: PositiveInt = 2
    """checkpoints to keep"""

    def problems(self) -> Iterator[str]:
        """Yield what is wrong with values that are valid one by one."""
        if self.warmup > self.steps:
            yield f"train.warmup must be at most train.steps ({self.steps}), got {self.warmup}"
        defaults = (OptimizationConfig.lr_end, OptimizationConfig.decay_share)
        if self.lr_schedule != "flat_then_linear" and (self.lr_end, self.decay_share) != defaults:
            yield "train.lr_end and train.decay_share need train.lr_schedule flat_then_linear"
        for name, schedule in (("lr_cycles", "cosine_with_restarts"), ("lr_power", "polynomial")):
            is_set = getattr(self, name) != getattr(OptimizationConfig, name)
            if is_set and self.lr_schedule != schedule:
                yield f"train.{name} needs train.lr_schedule {schedule}"
        # diffusers lets a polynomial end at this learning rate.
        if self.lr_schedule == "polynomial" and self.lr <= 1e-7:
            yield f"train.lr must be above 1e-7 with train.lr_schedule polynomial, got {self.lr}"
        if self.optimizer != "muon" and self.matrix_lr is not None:
            yield "train.matrix_lr needs train.optimizer muon"
        yield from self._problems_of_optimizer()

    def _problems_of_optimizer(self) -> Iterator[str]:
        arguments = self.optimizer_args
        if self.optimizer in ("adamw", "muon"):
            if arguments is not None:
                yield "train.optimizer_args needs a train.optimizer by import path"
            return
        parts = self.optimizer.split(".")
        if len(parts) < 2 or not all(part.isidentifier() for part in parts):
            yield (
                "train.optimizer must be adamw, muon or an import path such as "
                f"torch.optim.Adafactor, got {self.optimizer!r}"
            )
        for name in ("betas", "weight_decay"):
            if getattr(self, name) != getattr(OptimizationConfig, name):
                yield f"train.{name} is for adamw and muon. Set it in train.optimizer_args."
        if arguments is not None and not arguments.keys().isdisjoint(("lr", "params")):
            yield "train.optimizer_args must have neither lr nor params. Set train.lr."


@dataclass(frozen=True, config=SECTION)
class TrainConfig(OptimizationConfig):
    """The optimisation; a step is one optimiser step on `batch_size` examples."""

    method: Literal["full", "lora"] = "full"
    """train all weights, or LoRA adapters alone"""
    accumulation: PositiveInt = 1
    """micro-batches per step"""
    weighting: Literal["simple", "min_snr", "velocity", "min_velocity", "x_0"] = "simple"
    """weight of the loss by timestep; simple is (13)"""
    gamma: FinitePositive | None = None
    """where min_snr and min_velocity clip"""
    ema: Share = 0.999
    """decay of the moving average of the weights, which is saved; 0: the last weights"""
    keep_best: bool = False
    """save the averaged weights with the lowest held-out loss as the result, not the last ones"""
    patience: PositiveInt | None = None
    """validations without a lower held-out loss that end the run; null: no limit"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass to save memory"""

    def problems(self) -> Iterator[str]:
        """Yield what is wrong with values that are valid one by one."""
        yield from super().problems()
        if self.batch_size % self.accumulation:
            multiple = f"a multiple of train.accumulation ({self.accumulation})"
            yield f"train.batch_size must be {multiple}, got {self.batch_size}"
        if self.weighting.startswith("min_") != (self.gamma is not None):
            needed = "needs train.gamma" if self.gamma is None else "does not use train.gamma"
            yield f"train.weighting {self.weighting} {needed}"


@dataclass(frozen=True, config=SECTION)
class LoraConfig:
    """Low-rank adapters (Hu et al. 2021): a weight changes by alpha / rank times B A."""

    rank: PositiveInt = 8
    """rank of the two factors"""
    alpha: FinitePositive | None = None
    """scale; null: rank"""
    targets: Annotated[tuple[str, ...], ONE_OR_MORE, Field(min_length=1)] = (
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
    )
    """layers of the denoiser, by the end of their names"""


@dataclass(frozen=True, config=SECTION)
class SampleConfig:
    """Images sampled during training and at its end: each prompt at each w, from the same noise."""

    prompts: Annotated[tuple[str, ...], ONE_OR_MORE, Field(min_length=1)] = (
        "red heart",
        "cat face",
        "hot dog",
        "green cat",
    )
    """columns of the image grid; in a list, quote a prompt that has a comma: ["cat, red", dog]"""
    w: Annotated[tuple[Finite, ...], ONE_OR_MORE, Field(min_length=1)] = (0.0, 2.0)
    """rows of the image grid: guidance as in (17); guidance_scale is 1 + w"""
    steps: PositiveInt = 50
    """denoising steps"""
    eta: Share = 1.0
    """1: new noise at every step (ancestral); 0: none (DDIM)"""
    seed: Annotated[int, Field(ge=0, le=2**62)] = 0
    """seed of the noise"""
    every: PositiveInt = 500
    """training steps between image grids"""
    default_w: Finite = 2.0
    """guidance saved with the pipeline"""


@dataclass(frozen=True, config=SECTION)
class HubConfig:
    """Where a finished run is pushed to."""

    repo_id: str | None = None
    """NAME or USER/NAME; null: nowhere"""
    private: bool = False
    """create the repository as private"""
    token: str | None = dataclasses.field(default=None, repr=False)
    """null: HF_TOKEN or `hf auth login`; never saved"""

    def problems(self) -> list[str]:
        """Return what is wrong with values that are valid one by one."""
        return [] if self.repo_id is None else repository_problems("hub.repo_id", self.repo_id)


@dataclass(frozen=True, config=SECTION)
class RunConfig:
    """What the settings of every kind of run have."""

    command: ClassVar[str]
    purpose: ClassVar[str]
    default_file: ClassVar[str]

    name: str = "run"
    """name of the run, whose folder is output/name"""
    output: str = "runs"
    """folder of all runs"""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """seed of all random numbers of a run"""
    report_to: str | None = None
    """a tracker of accelerate, in addition to metrics.jsonl: tensorboard, wandb, ..."""

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.output) / self.name

    def problems(self) -> list[str]:
        """Return what is wrong with values that are valid one by one, a sentence each."""
        if self.name in ("", "..") or Path(self.name).name != self.name:
            return [f"name must be the name of one folder, got {self.name!r}"]
        return []

    def unused(self) -> list[str]:
        """Return which settings have no effect, a sentence each."""
        return []

    def to_dict(self) -> dict:
        """Return every setting except tokens, in nested dicts."""
        return dataclasses.asdict(self)

    def to_yaml(self) -> str:
        """Return the configuration, as `load` reads it, without tokens."""
        tree = TypeAdapter(type(self)).dump_python(self, mode="json")
        return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)

    @classmethod
    def sections(cls) -> dict[str, type]:
        """Return the class of each group of settings by its name."""
        return {
            field.name: field.default_factory
            for field in dataclasses.fields(cls)
            if isinstance(field.default_factory, type)
        }


@dataclass(frozen=True, config=SECTION)
class Config(RunConfig):
    """Everything that the training of a text-to-image model depends on."""

    command: ClassVar = "train_text2img.py"
    purpose: ClassVar = "Train or fine-tune a text-to-image diffusion model."
    default_file: ClassVar = DEFAULT

    name: str = "emoji-small"
    """name of the run, whose folder is output/name"""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    diffusion: DiffusionConfig = dataclasses.field(default_factory=DiffusionConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    sample: SampleConfig = dataclasses.field(default_factory=SampleConfig)
    hub: HubConfig = dataclasses.field(default_factory=HubConfig)

    def problems(self) -> list[str]:
        """Return what is wrong with values that are valid one by one, a sentence each."""
        found = super().problems()
        for section in (self.data, self.model, self.diffusion, self.train, self.hub):
            found += section.problems()
        if not self.data.held_out and (self.train.keep_best or self.train.patience):
            found.append("train.keep_best and train.patience need data.held_out")
        keep, size = self.data.keep, self.train.batch_size
        if keep is not None and not 0 < round(keep.share * size) < size:
            found.append(
                f"data.keep.share must be between 1 and {size - 1} images of train.batch_size "
                f"({size}), got {keep.share:g}"
            )
        noise = self.diffusion.values()
        if self.sample.steps > noise["num_train_timesteps"]:
            found.append(
                f"sample.steps must be at most diffusion.num_train_timesteps "
                f"({noise['num_train_timesteps']}), got {self.sample.steps}"
            )
        if self.sample.eta != 1 and noise["variance_type"].startswith("fixed_large"):
            found.append(
                f"sample.eta must be 1 with diffusion.variance_type {noise['variance_type']}, "
                f"got {self.sample.eta}"
            )
        if self.model.pretrained is None:
            found += self._problems_of_new_model(noise)
        else:
            found += [
                f"data.{name} comes from model.pretrained. Remove it."
                for name in CAPTION_SETTINGS
                if getattr(self.data, name) != getattr(DataConfig, name)
            ]
        return found

    def _problems_of_new_model(self, noise: dict) -> list[str]:
        found = zero_snr_problems(noise, self.train.weighting)
        # The stride of a trained autoencoder is only known once it is loaded.
        factor = 2 ** (len(self.model.channels) - 1) * (self.model.patch_size or 1)
        if self.data.resolution % factor:
            found.append(
                f"data.resolution must be a multiple of {factor} (patch size times the UNet's "
                f"halvings), got {self.data.resolution}"
            )
        if self.train.method == "lora":
            found.append("train.method lora needs a base model. Set model.pretrained.")
        return found

    def unused(self) -> list[str]:
        """Return which settings have no effect, a sentence each."""
        found = []
        if not self.data.streaming and self.data.shuffle_buffer != DataConfig.shuffle_buffer:
            found.append("data.shuffle_buffer needs data.streaming")
        betas = (self.diffusion.beta_start, self.diffusion.beta_end)
        if self.diffusion.beta_schedule == "squaredcos_cap_v2" and betas != (None, None):
            found.append(
                "diffusion.beta_schedule squaredcos_cap_v2 ignores diffusion.beta_start and "
                "diffusion.beta_end. Remove them."
            )
        if self.train.method != "lora" and self.lora != LoraConfig():
            found.append("lora.rank, lora.alpha and lora.targets need train.method lora")
        return found

    def to_dict(self) -> dict:
        """Return every setting except the token, in nested dicts."""
        tree = super().to_dict()
        tree["hub"]["token"] = None
        return tree

    def to_yaml(self) -> str:
        """Return the configuration, as `load` reads it, without the token.

        Settings that a base model brings are left out, since their values here do not hold.
        """
        tree = TypeAdapter(Config).dump_python(self, mode="json")
        tree["hub"]["token"] = None
        if self.model.pretrained is not None:
            tree["model"] = {"pretrained": self.model.pretrained}
            for name in CAPTION_SETTINGS:
                del tree["data"][name]
        return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


@dataclass(frozen=True, config=SECTION)
class AutoencoderModelConfig:
    """The ConvAutoencoder."""

    block_out_channels: tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt] = (3, 32, 96, 192)
    """channels at 1/1, 1/2, 1/4 and 1/8 of the resolution; the first are the image's"""
    encoder_layers: PositiveInt = 2
    """residual blocks of the encoder at 1/4 and at 1/8"""
    decoder_layers: PositiveInt = 3
    """residual blocks of the decoder at 1/4 and at 1/8"""
    latent_channels: PositiveInt = 16
    """numbers per position of the latents"""


@dataclass(frozen=True, config=SECTION)
class AutoencoderTrainConfig(OptimizationConfig):
    """The optimisation; a step is one optimiser step on `batch_size` crops."""

    accumulation: ClassVar = 1
    patience: ClassVar = None

    crop: PositiveInt = 64
    """side in pixels of the square that each step cuts from an image, at random"""
    latent_noise: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.1
    """standard deviation of the noise added to the latents, which have 1"""


@dataclass(frozen=True, config=SECTION)
class AutoencoderConfig(RunConfig):
    """Everything that the training of an autoencoder depends on."""

    command: ClassVar = "direct-jump train-autoencoder"
    purpose: ClassVar = "Train an autoencoder of images, whose latents a diffusion model can use."
    default_file: ClassVar = "configs/autoencoder.yaml"

    name: str = "autoencoder"
    """name of the run, whose folder is output/name"""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    model: AutoencoderModelConfig = dataclasses.field(default_factory=AutoencoderModelConfig)
    train: AutoencoderTrainConfig = dataclasses.field(default_factory=AutoencoderTrainConfig)

    def problems(self) -> list[str]:
        """Return what is wrong with values that are valid one by one, a sentence each."""
        found = [*super().problems(), *self.data.problems(), *self.train.problems()]
        if self.data.keep is not None:
            found.append("data.keep is for text-to-image models. Remove it.")
        sides = {"data.resolution": self.data.resolution, "train.crop": self.train.crop}
        found += [f"{name} must be a multiple of 8, got {n}" for name, n in sides.items() if n % 8]
        if self.train.crop > self.data.resolution:
            found.append(
                f"train.crop must be at most data.resolution ({self.data.resolution}), got "
                f"{self.train.crop}"
            )
        return found


AnyConfig = TypeVar("AnyConfig", bound=RunConfig)


def zero_snr_problems(noise: Mapping, weighting: str) -> list[str]:
    """Return why a model would learn nothing about pure noise, where a zero-SNR process starts.

    noise: the scheduler's arguments or configuration.
    """
    if not noise["rescale_betas_zero_snr"]:
        return []
    if noise["prediction_type"] == "epsilon":
        return [
            "diffusion.prediction_type must be sample or v_prediction with "
            "rescale_betas_zero_snr, got epsilon: at SNR = 0 the noise says nothing about x_0"
        ]
    if weighting in ("simple", "min_snr"):
        return [
            "train.weighting must be velocity, min_velocity or x_0 with "
            f"rescale_betas_zero_snr, got {weighting}: it is 0 at SNR = 0"
        ]
    return []


def repository_problems(name: str, repo_id: str) -> list[str]:
    """Return why the Hub, or diffusers loading from it, refuses a repository's name."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        reason = " ".join(str(error).split())
        return [f"{name} must be NAME or USER/NAME, got {repo_id!r}. {reason}"]
    # diffusers 0.42.1 uses the id as the name of a Python module.
    if "." in repo_id:
        other = repo_id.replace(".", "-")
        return [f"{name} must not contain a dot, got {repo_id!r}. Use {other!r}, for example."]
    return []


def flatten(tree: Mapping, prefix: str = "") -> dict:
    """Return {"train": {"lr": 1}} as {"train.lr": 1}."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def help_texts(kind: type[RunConfig] = Config) -> dict[str, str]:
    """Return the help of every setting: its attribute docstring, its choices, its default."""
    texts = {}
    sections = kind.sections()
    for prefix, section in [("", kind), *((f"{name}.", cls) for name, cls in sections.items())]:
        for name, field in section.__pydantic_fields__.items():
            if not prefix and name in sections:
                continue
            text = inspect.cleandoc(_docstring(section, name)).replace("\n", " ")
            if choices := _choices(field.annotation):
                text += f"; one of {', '.join(choices)}"
            default = NEW_MODEL_NOISE[name] if prefix == "diffusion." else field.default
            if default is not None:
                text += f" (default: {default})"
            texts[prefix + name] = text
    return texts


def _docstring(section: type, name: str) -> str:
    """Return an attribute's docstring, which pydantic knows only in the class that defines it."""
    fields = [vars(base).get("__pydantic_fields__", {}).get(name) for base in section.__mro__]
    return next(field.description for field in fields if field and field.description)


def _choices(annotation: object) -> list[str]:
    """Return the values of a Literal, also of one inside a union."""
    found = [item for item in get_args(annotation) if isinstance(item, str)]
    return found + [text for item in get_args(annotation) for text in _choices(item)]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def _build_parser(kind: type[RunConfig]) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=kind.command,
        usage="%(prog)s [--config FILE] [--dry_run] [--SETTING VALUE ...]",
        description=f"{kind.purpose} Settings come from YAML files (--config, default "
        f"{kind.default_file}); the command line overrides them. After an interruption, the same "
        "command resumes from the newest checkpoint.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=100),
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="append", metavar="FILE", help="a YAML file")
    parser.add_argument(
        "--dry_run", action="store_true", help="time a few steps, print the plan and stop"
    )
    parser.add_argument("--print_config", action="store_true", help="print all settings and stop")
    groups = {
        name: parser.add_argument_group(name, section.__doc__)
        for name, section in kind.sections().items()
    }
    for name, text in help_texts(kind).items():
        group = groups.get(name.partition(".")[0], parser)
        group.add_argument(f"--{name}", metavar="", help=text.replace("%", "%%"))
    return parser


class _SettingsLoader(yaml.SafeLoader):
    """YAML that refuses repeated keys and leaves truth values to pydantic.

    PyYAML would use the last of two equal keys, and read `precision: no` as false.
    """

    yaml_implicit_resolvers: ClassVar = {
        letter: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":bool")]
        for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key!r} appears twice", node.start_mark
                )
        return super().construct_mapping(node, deep)


def read_yaml(path: str) -> dict:
    """Return the settings of one file; ConfigError says what is wrong with it."""
    try:
        tree = _SettingsLoader(Path(path).read_text(encoding="utf-8")).get_single_data()
    except OSError as error:
        raise ConfigError(f"cannot read the config {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(tree or {}, dict):
        raise ConfigError(f"{path} must hold `setting: value` lines, got a {type(tree).__name__}")
    return tree or {}


def setting_in(path: Path, section: str, name: str) -> object | None:
    """Return one unvalidated setting of a file, None if it is missing."""
    values = read_yaml(str(path)).get(section) if path.is_file() else None
    return values.get(name) if isinstance(values, dict) else None


def _parse_value(text: str) -> object:
    """Return a value of the command line, which is written as in YAML."""
    try:
        return _SettingsLoader(text).get_single_data()
    except yaml.YAMLError:
        return text


def _merge(tree: dict, other: Mapping) -> dict:
    """Return `tree` with the settings of `other`, section by section."""
    merged = dict(tree)
    for key, value in other.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = _merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def _describe(error: Mapping, kind: type[RunConfig]) -> str:
    """Return one of pydantic's errors as a sentence; an unknown setting with the nearest name."""
    location = [str(part) for part in error["loc"]]
    names = help_texts(kind).keys() | kind.sections().keys()
    name = location[0]
    if ".".join(location[:2]) in names:
        name = ".".join(location[:2])
    if error["type"] == "unexpected_keyword_argument":
        return _unknown_setting(".".join(location), kind)
    message = error["msg"][0].lower() + error["msg"][1:]
    return f"{name}: {message}, got {error['input']!r}"


# The flags of diffusers' training scripts under another name here; docs/migrating.md lists them.
DIFFUSERS_FLAGS = {
    "pretrained_model_name_or_path": "`model.pretrained`",
    "revision": "`model.pretrained` as `USER/NAME@REVISION`",
    "dataset_name": "`data.source`",
    "train_data_dir": "`data.source`",
    "dataset_config_name": "`data.subset`",
    "instance_data_dir": "`data.source`",
    "instance_prompt": "the prompt as the caption of every image in `data.source`",
    "max_train_samples": "`data.split`, such as `train[:1000]` of a table",
    "tokenizer_max_length": "`data.caption_length`",
    "proportion_empty_prompts": "`data.caption_dropout`",
    "center_crop": "`data.crop center`",
    "random_flip": "`data.flip true`",
    "cache_dir": "`data.cache`",
    "output_dir": "`output` and `name`",
    "tracker_project_name": "`name`",
    "train_batch_size": "`train.batch_size`, of all processes and micro-batches together",
    "gradient_accumulation_steps": "`train.accumulation`",
    "max_train_steps": "`train.steps`",
    "num_train_epochs": "`train.steps`, which is epochs × images / `train.batch_size`",
    "learning_rate": "`train.lr`",
    "lr_scheduler": "`train.lr_schedule`",
    "with_prior_preservation": "`data.keep`",
    "class_data_dir": "`data.keep`, whose images have captions of their own",
    "prior_loss_weight": "the share of `data.keep`",
    "lr_num_cycles": "`train.lr_cycles`",
    "lr_power": "`train.lr_power`",
    "lr_warmup_steps": "`train.warmup`",
    "snr_gamma": "`train.weighting min_snr` (`min_velocity` if SNR ends at 0) and `train.gamma`",
    "use_ema": "`train.ema`",
    "adam_beta1": "`train.betas`",
    "adam_beta2": "`train.betas`",
    "adam_weight_decay": "`train.weight_decay`",
    "max_grad_norm": "`train.clip`",
    "mixed_precision": "`train.precision`",
    "checkpointing_steps": "`train.save_every`",
    "checkpoints_total_limit": "`train.keep`",
    "resume_from_checkpoint": "the same command again, which resumes",
    "rank": "`train.method lora` and `lora.rank`",
    "lora_alpha": "`lora.alpha`",
    "validation_prompt": "`sample.prompts`",
    "validation_prompts": "`sample.prompts`",
    "validation_epochs": "`sample.every`, in steps",
    "validation_steps": "`sample.every`",
    "push_to_hub": "`hub.repo_id`",
    "hub_model_id": "`hub.repo_id`",
    "hub_token": "`hub.token`",
}


def _unknown_setting(name: str, kind: type[RunConfig]) -> str:
    known = list(help_texts(kind))
    hint = DIFFUSERS_FLAGS.get(name.rpartition(".")[2])
    if hint is not None:
        return f"unknown setting {name!r}. Use {hint.replace('`', '')}."
    near = difflib.get_close_matches(name, known, 1)
    near = near or [key for key in known if key.endswith(f".{name}")][:1]
    return f"unknown setting {name!r}" + (f". Did you mean {near[0]!r}?" if near else "")


def validate(tree: Mapping, saved: bool = False, kind: type[AnyConfig] = Config) -> AnyConfig:
    """Return the configuration that nested dicts describe; one ConfigError lists every problem.

    saved: the settings are those of an existing run, in which unused ones are allowed.
    """
    adapter = TypeAdapter(kind)
    found: list[str] = []
    try:
        config = adapter.validate_python(tree)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        found = list(dict.fromkeys(_describe(error, kind) for error in errors))
        # The rest is checked with the defaults in the place of what is wrong.
        rest = {
            key: dict(value) if isinstance(value, dict) else value for key, value in tree.items()
        }
        for problem in errors:
            section, *names = problem["loc"]
            if names and isinstance(rest.get(section), dict):
                rest[section].pop(names[0], None)
            else:
                rest.pop(section, None)
        config = adapter.validate_python(rest)
    found += config.problems() + ([] if saved else config.unused())
    if found:
        raise ConfigError("\n".join(found))
    return config


def load(argv: list[str], kind: type[AnyConfig] = Config) -> tuple[AnyConfig, bool]:
    """Return the configuration of a command line, and whether it is a dry run."""
    parsed, unknown = _build_parser(kind).parse_known_args(argv)
    given = vars(parsed)
    files, dry_run = given.pop("config", [kind.default_file]), given.pop("dry_run", False)
    print_config = given.pop("print_config", False)
    if unknown:
        names = [word.removeprefix("--").partition("=")[0] for word in unknown if word[:2] == "--"]
        raise ConfigError("\n".join(_unknown_setting(name, kind) for name in names or unknown))
    tree: dict = {}
    for file in files:
        tree = _merge(tree, read_yaml(file))
    for name, text in given.items():
        *section, key = name.split(".")
        values = {key: _parse_value(text)}
        tree = _merge(tree, {section[0]: values} if section else values)
    config = validate(tree, kind=kind)
    if print_config:
        print(config.to_yaml(), end="")
        sys.exit(0)
    return config, dry_run


def load_file(path: str | Path, kind: type[AnyConfig] = Config) -> AnyConfig:
    """Return the configuration in a file such as a run's config.yaml."""
    return validate(read_yaml(str(path)), saved=True, kind=kind)


def differences(old: RunConfig, new: RunConfig, free: tuple[str, ...] = ()) -> list[str]:
    """Return a sentence for each setting that differs, except the groups and names in `free`."""
    before, after = flatten(old.to_dict()), flatten(new.to_dict())
    changed = []
    # A setting such as data.keep may be null or hold settings of its own.
    for key in dict.fromkeys([*after, *before]):
        is_free = key in free or key.partition(".")[0] in free
        if not is_free and before.get(key) != after.get(key):
            changed.append(f"{key} was {before.get(key)!r} and is now {after.get(key)!r}")
    return changed
