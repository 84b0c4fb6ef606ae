"""A run's settings: frozen dataclasses, read from YAML and the command line, refused all at once when wrong."""

import dataclasses
import difflib
import functools
import inspect
import math
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from jsonargparse import ArgumentError, ArgumentParser

DEFAULT = "configs/emoji-small.yaml"
SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")
PREDICTIONS = ("epsilon", "sample", "v_prediction")
SPACINGS = ("leading", "linspace", "trailing")
VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log")
WEIGHTINGS = ("simple", "min_snr", "velocity", "min_velocity", "x_0")
WEIGHTED_BY_SNR = (
    "simple",
    "min_snr",
)  # nothing where SNR = 0, unless the network predicts epsilon
METHODS = ("full", "lora")
OPTIMIZERS = ("adamw", "muon")
LR_SCHEDULES = ("constant", "linear", "cosine", "flat_then_linear")
PRECISIONS = ("auto", "no", "bf16", "fp16")
CHOICES = {
    "data.missing_caption": ("empty", "skip"),
    "data.crop": ("center", "random"),
    "diffusion.beta_schedule": SCHEDULES,
    "diffusion.prediction_type": PREDICTIONS,
    "diffusion.variance_type": VARIANCES,
    "diffusion.timestep_spacing": SPACINGS,
    "train.method": METHODS,
    "train.optimizer": OPTIMIZERS,
    "train.lr_schedule": LR_SCHEDULES,
    "train.weighting": WEIGHTINGS,
    "train.precision": PRECISIONS,
}


class ConfigError(ValueError):
    """What is wrong with a configuration, every problem on a line of its own."""


@dataclass(frozen=True)
class DataConfig:
    """The captioned images.

    `source` is an embedded set (emoji, emoji-small, emoji-varied, shapes), a folder of images, a table on disk (a parquet or
    WebDataset file, or a folder of them), or the id of a data set on the Hub.
    """

    source: str = "emoji-small"  # a named set, a folder of images, a table's file or folder, or the id of a data set on the Hub
    subset: str | None = None  # of a Hub data set that has several
    revision: str | None = None  # of a Hub data set: a branch, a tag or a commit
    split: str = "train"  # the split that is trained on; a table's may be a slice: train[:95%]
    held_out: str | None = (
        "test"  # the split of the validation loss and of the judge's combinations
    )
    image_column: str | None = None  # None: the only one that holds images
    caption_column: str | tuple[str, ...] | None = (
        None  # None: caption or text; several: every step draws one of a row's
    )
    missing_caption: str = (
        "empty"  # what an image without a caption is: unconditional, or left out (skip)
    )
    streaming: bool = False  # read a table while training, instead of before
    shuffle_buffer: int = 1000  # rows of a stream that are mixed at a time
    flip: bool = False  # show half of the examples mirrored, drawn anew every step
    crop: str = "center"  # the square that is kept of a picture: its middle, or one anywhere (random), the same at every start
    resolution: int = 64  # pixels a side; pictures are cropped to a square and scaled to it
    caption_length: int = 16  # tokens; longer captions are cut, and counted
    caption_dropout: float = (
        0.1  # (14): the share of captions replaced by the empty one, drawn anew every step
    )
    max_broken: float = 0.05  # more unreadable rows than this share end the run before it starts
    cache: str = "data"  # where prepared data and embedded sets are kept, for all runs

    def problems(self):
        """What is out of range, a sentence each."""
        found = [
            *at_least("data.resolution", self.resolution, 1),
            *at_least("data.caption_length", self.caption_length, 2),
            *at_least("data.shuffle_buffer", self.shuffle_buffer, 1),
            *in_range("data.caption_dropout", self.caption_dropout, 0, 1),
            *in_range("data.max_broken", self.max_broken, 0, 1),
            *one_of("data.missing_caption", self.missing_caption),
            *one_of("data.crop", self.crop),
        ]
        columns = (
            (self.caption_column,) if isinstance(self.caption_column, str) else self.caption_column
        )
        if columns is not None and (
            not columns or not all(columns) or len(set(columns)) < len(columns)
        ):
            found.append(
                f"data.caption_column must be a column's name or several different ones, got {self.caption_column!r}"
            )
        sliced = [
            name
            for name in ("split", "held_out")
            if self.streaming and "[" in (getattr(self, name) or "")
        ]
        found += [
            f"data.{name} must be a whole split while data.streaming is on, got {getattr(self, name)}"
            for name in sliced
        ]
        return found


@dataclass(frozen=True)
class ModelConfig:
    """The denoiser, diffusers' UNet2DConditionModel, with a frozen text encoder; or a pretrained model as it is."""

    pretrained: str | None = (
        None  # a folder or Hub id to go on from, Stable Diffusion's format or ours; it brings all of these
    )
    patch_size: int | None = None  # None: pixels; p: lossless p x p patches (PatchAutoencoder)
    channels: tuple[int, ...] = (
        64,
        128,
        256,
    )  # of each level of the UNet, at half the resolution of the one before
    layers: int = 1  # residual blocks a level on the way down, one more on the way up
    attention: tuple[bool, ...] = (
        False,
        False,
        True,
    )  # which levels attend to the caption and to themselves
    heads: int = 8  # of each attention
    norm_groups: int = 32  # of the group norms: fewer are as good here, and faster on a CPU
    text_in_time: bool = True  # captions also steer the time embedding (addition_embed_type="text")
    time_scale_shift: bool = True  # the time embedding scales and shifts (FiLM); false: it is added
    time_embedding_dim: int | None = None  # None: 4 x the first of channels
    whitening: float | None = (
        None  # caption states are whitened, with this added to every variance; None: as they are
    )
    text_encoder: str = "minilm"  # the embedded all-MiniLM-L6-v2, or a transformers folder or id

    def problems(self):
        """What is out of range, a sentence each."""
        found = [
            *at_least("model.layers", self.layers, 1),
            *at_least("model.heads", self.heads, 1),
            *at_least("model.norm_groups", self.norm_groups, 1),
            *at_least("model.patch_size", self.patch_size, 1),
            *at_least("model.time_embedding_dim", self.time_embedding_dim, 2),
            *above_zero("model.whitening", self.whitening),
        ]
        if self.patch_size is not None and self.patch_size & (self.patch_size - 1):
            found.append(f"model.patch_size must be a power of two, got {self.patch_size}")
        if not self.channels or any(c < 1 or c % max(self.norm_groups, 1) for c in self.channels):
            found.append(
                f"model.channels must be multiples of model.norm_groups ({self.norm_groups}), got {self.channels}"
            )
        elif any(c % self.heads for c in self.channels):
            found.append(
                f"model.channels must be multiples of model.heads ({self.heads}), got {self.channels}"
            )
        if self.pretrained is not None:
            theirs = [
                f.name for f in dataclasses.fields(self)[1:] if getattr(self, f.name) != f.default
            ]
            found += [
                f"model.{name} is the pretrained model's own: leave it out" for name in theirs
            ]
        if len(self.attention) != len(self.channels):
            found.append(
                f"model.attention needs one value per level of model.channels ({len(self.channels)}), "
                f"got {len(self.attention)}"
            )
        return found


NOISE = {  # the noise process of a new model: the slides', but for `trailing`, which starts at pure noise, and for clipping x_0
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


@dataclass(frozen=True)
class DiffusionConfig:
    """The noise process, as DDPMScheduler takes it. None is the pretrained model's own value; a new model has that of NOISE."""

    num_train_timesteps: int | None = None  # T, the steps of the chain (1)
    beta_schedule: str | None = None  # how beta grows from beta_start to beta_end
    beta_start: float | None = None  # beta_1, the variance that the first step adds
    beta_end: float | None = None  # beta_T
    prediction_type: str | None = (
        None  # what the network predicts: the noise, the image (sample), or v between them
    )
    variance_type: str | None = None  # of (10): the posterior's, (9), or beta itself (fixed_large)
    timestep_spacing: str | None = None  # which timesteps fewer steps take; trailing begins at T
    rescale_betas_zero_snr: bool | None = None  # move abar_T to 0, pure noise (Lin et al. 2024)
    clip_sample: bool | None = None  # keep the predicted x_0 in [-1, 1]; never for latents

    def values(self, pretrained: dict | None = None) -> dict:
        """DDPMScheduler's arguments: what is given here, over a pretrained model's, over NOISE."""
        return (
            NOISE
            | (pretrained or {})
            | {name: value for name, value in vars(self).items() if value is not None}
        )

    def problems(self):
        """What is out of range, a sentence each."""
        got = self.values()
        found = [
            *at_least("diffusion.num_train_timesteps", got["num_train_timesteps"], 1),
            *one_of("diffusion.beta_schedule", got["beta_schedule"]),
            *one_of("diffusion.prediction_type", got["prediction_type"]),
            *one_of("diffusion.variance_type", got["variance_type"]),
            *one_of("diffusion.timestep_spacing", got["timestep_spacing"]),
        ]
        if not 0 < got["beta_start"] <= got["beta_end"] < 1:
            found.append(
                "diffusion.beta_start and diffusion.beta_end must satisfy 0 < start <= end < 1, "
                f"got {got['beta_start']} and {got['beta_end']}"
            )
        return found


@dataclass(frozen=True)
class TrainConfig:
    """The optimisation. One step is one optimiser step on `batch_size` examples, all ranks and micro-steps together."""

    method: str = "full"  # full trains every weight; lora trains adapters, and saves them alone
    steps: int = 1000  # of the whole run; raise it later to go on further
    batch_size: int = 32  # images a step, over all processes and micro-steps
    accumulation: int = 1  # micro-steps a step
    optimizer: str = "adamw"  # muon: orthogonalised momentum for the matrices, AdamW for the rest
    lr: float = 1e-4  # the learning rate
    matrix_lr: float | None = None  # of the matrices under muon; None: lr
    lr_schedule: str = "constant"  # after the warm-up
    lr_end: float = 0.0  # the last learning rate, as a share of lr
    decay_share: float = 0.4  # flat_then_linear: the share of the run in which lr falls
    warmup: int = 0  # steps in which lr rises to its full value
    betas: tuple[float, float] = (0.9, 0.999)  # of AdamW's two moving averages
    weight_decay: float = 0.01  # decoupled: each step takes lr x weight_decay off every weight
    clip: float = 1.0  # the largest norm of a step's gradient
    max_skipped: int = 10  # steps in a row without a finite gradient end the run; each is skipped
    weighting: str = "simple"  # losses.WEIGHTS; (13) by default
    gamma: float | None = None  # where min_snr and min_velocity clip
    ema: float = (
        0.999  # decay of the averaged weights that are saved, after a warm-up; 0: the last weights
    )
    gradient_checkpointing: bool = False  # compute activations twice instead of keeping them
    precision: str = (
        "auto"  # bf16 where the machine computes in it, fp16 on other CUDA cards, else no
    )
    threads: int | None = None  # CPU threads a process; None: cores / local processes
    log_every: int = 20  # steps between two lines of metrics.jsonl
    validate_every: int = (
        250  # steps between two losses on the same grid of images, timesteps and noise
    )
    save_every: int = 250  # steps between two checkpoints
    keep: int = 2  # checkpoints

    def problems(self):
        """What is out of range, a sentence each."""
        found = [
            *at_least("train.steps", self.steps, 1),
            *at_least("train.batch_size", self.batch_size, 1),
            *at_least("train.accumulation", self.accumulation, 1),
            *above_zero("train.lr", self.lr),
            *above_zero("train.matrix_lr", self.matrix_lr),
            *above_zero("train.clip", self.clip),
            *at_least("train.max_skipped", self.max_skipped, 1),
            *one_of("train.method", self.method),
            *one_of("train.optimizer", self.optimizer),
            *one_of("train.lr_schedule", self.lr_schedule),
            *in_range("train.lr_end", self.lr_end, 0, 1),
            *in_range("train.decay_share", self.decay_share, 0, 1),
            *in_range("train.ema", self.ema, 0, 1),
            *one_of("train.weighting", self.weighting),
            *one_of("train.precision", self.precision),
            *at_least("train.log_every", self.log_every, 1),
            *at_least("train.validate_every", self.validate_every, 1),
            *at_least("train.save_every", self.save_every, 1),
            *at_least("train.keep", self.keep, 1),
            *at_least("train.threads", self.threads, 1),
        ]
        if not 0 <= self.warmup <= self.steps:
            found.append(
                f"train.warmup must be in [0, train.steps = {self.steps}], got {self.warmup}"
            )
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            found.append(f"train.weight_decay must be 0 or more, got {self.weight_decay}")
        if any(not 0 <= b < 1 for b in self.betas):
            found.append(f"train.betas must be in [0, 1), got {self.betas}")
        if self.batch_size >= 1 and self.accumulation >= 1 and self.batch_size % self.accumulation:
            found.append(
                f"train.batch_size must be a multiple of train.accumulation ({self.accumulation}), "
                f"got {self.batch_size}"
            )
        if self.lr_schedule != "flat_then_linear" and (self.lr_end, self.decay_share) != (0.0, 0.4):
            found.append(
                f"train.lr_end and train.decay_share are used by flat_then_linear only, not by {self.lr_schedule}: "
                "leave them out"
            )
        if self.optimizer != "muon" and self.matrix_lr is not None:
            found.append(
                f"train.matrix_lr is used by muon only, not by {self.optimizer}: leave it out"
            )
        if self.weighting.startswith("min_") and not (
            self.gamma is not None and 0 < self.gamma < math.inf
        ):
            found.append(
                f"train.gamma must be a number above 0 for train.weighting {self.weighting}, got {self.gamma}"
            )
        if not self.weighting.startswith("min_") and self.gamma is not None:
            found.append(
                f"train.gamma is used by min_snr and min_velocity only, not by {self.weighting}: leave it out"
            )
        return found


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (Hu et al. 2021), for train.method lora: each target's weight moves by alpha / rank times B A."""

    rank: int = 8  # of the two factors
    alpha: float | None = None  # None: rank
    targets: tuple[str, ...] = (
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
    )  # layers of the denoiser, by the end of their names

    def problems(self):
        """What is out of range, a sentence each."""
        return [
            *at_least("lora.rank", self.rank, 1),
            *above_zero("lora.alpha", self.alpha),
            *([] if self.targets else ["lora.targets must name at least one layer, got none"]),
        ]


@dataclass(frozen=True)
class SampleConfig:
    """What is drawn while training and at its end: each prompt at each w, from the same noise."""

    prompts: tuple[str, ...] = (
        "red heart",
        "cat face",
        "hot dog",
        "green cat",
    )  # columns of the picture
    w: tuple[float, ...] = (0.0, 2.0)  # its rows: guidance as in (17), guidance_scale is 1 + w
    steps: int = 50  # denoising steps
    eta: float = 1.0  # 1 draws new noise at every step, 0 is DDIM
    seed: int = 0  # of the noise
    every: int = 500  # training steps
    default_w: float = 2.0  # saved with the pipeline

    def problems(self):
        """What is out of range, a sentence each."""
        found = [
            *at_least("sample.steps", self.steps, 1),
            *at_least("sample.every", self.every, 1),
            *in_range("sample.eta", self.eta, 0, 1),
            *in_range("sample.seed", self.seed, 0, 2**62),
        ]
        if not self.prompts:
            found.append("sample.prompts must name at least one prompt, got none")
        if not self.w or not all(math.isfinite(w) for w in (*self.w, self.default_w)):
            found.append(
                f"sample.w and sample.default_w must be finite numbers, got {self.w} and {self.default_w}"
            )
        return found


@dataclass(frozen=True)
class HubConfig:
    """Where a finished run is pushed to: nowhere without `repo_id`."""

    repo_id: str | None = None  # NAME, or USER/NAME
    private: bool = False  # where the repository has to be made
    token: str | None = field(
        default=None, repr=False
    )  # None: HF_TOKEN or `hf auth login`; it is written nowhere

    def problems(self):
        """What is out of range, a sentence each."""
        return [] if self.repo_id is None else repository_problems("hub.repo_id", self.repo_id)


@dataclass(frozen=True)
class Config:
    """Everything that a run depends on."""

    name: str = "emoji-small"  # of the run, which lives in output/name
    output: str = "runs"  # the folder of all runs
    seed: int = 0  # of everything random in a run
    report_to: str | None = (
        None  # an accelerate tracker beside metrics.jsonl: tensorboard, wandb, ...
    )
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    hub: HubConfig = field(default_factory=HubConfig)

    @property
    def folder(self) -> Path:
        """Where the run lives."""
        return Path(self.output) / self.name

    def problems(self) -> list[str]:
        """Every value out of its range, a sentence each; empty for a usable configuration."""
        found = [p for group in groups() for p in getattr(self, group).problems()]
        if self.name in ("", "..") or Path(self.name).name != self.name:
            found.append(f"name must be one folder's name, got {self.name!r}")
        if not 0 <= self.seed < 2**63:
            found.append(f"seed must be in [0, 2**63), got {self.seed}")
        new, noise = self.model.pretrained is None, self.diffusion.values()
        factor = 2 ** (len(self.model.channels) - 1) * (self.model.patch_size or 1)
        if new and self.data.resolution % factor:
            found.append(
                f"data.resolution must be a multiple of {factor} (patches times the UNet's halvings), "
                f"got {self.data.resolution}"
            )
        if self.sample.steps > noise["num_train_timesteps"]:
            found.append(
                f"sample.steps must be at most diffusion.num_train_timesteps ({noise['num_train_timesteps']}), "
                f"got {self.sample.steps}"
            )
        if self.sample.eta != 1 and noise["variance_type"].startswith("fixed_large"):
            found.append(
                f"sample.eta must be 1 with diffusion.variance_type {noise['variance_type']}, got {self.sample.eta}"
            )
        if not new and self.data.caption_length != DataConfig.caption_length:
            found.append("data.caption_length is the pretrained model's own: leave it out")
        if new:
            found += zero_snr_problems(noise, self.train.weighting)
        if new and self.train.method == "lora":
            found.append(
                "train.method lora adapts a pretrained model: set model.pretrained, or train.method full"
            )
        return found

    def to_dict(self) -> dict:
        """Every setting in nested dicts, but the token."""
        return dataclasses.asdict(
            dataclasses.replace(self, hub=dataclasses.replace(self.hub, token=None))
        )

    def to_yaml(self) -> str:
        """The whole configuration, as `load` reads it, without the token."""
        return yaml.safe_dump(plain(self.to_dict()), sort_keys=False, allow_unicode=True)


def at_least(name, value, low):
    """A problem where an integer that is given is below `low`."""
    return [] if value is None or value >= low else [f"{name} must be at least {low}, got {value}"]


def in_range(name, value, low, high):
    """A problem where a number is outside [low, high] or not a number."""
    return [] if low <= value <= high else [f"{name} must be in [{low}, {high}], got {value}"]


def above_zero(name, value):
    """A problem where a number that is given is not finite and above 0."""
    return (
        []
        if value is None or 0 < value < math.inf
        else [f"{name} must be a finite number above 0, got {value}"]
    )


def one_of(name, value):
    """A problem where the value of a setting is not one of its CHOICES."""
    return (
        []
        if value in CHOICES[name]
        else [f"{name} must be one of {', '.join(CHOICES[name])}, got {value!r}"]
    )


def zero_snr_problems(noise: Mapping, weighting: str) -> list[str]:
    """A problem where nothing is learnt of pure noise, with which a process that ends at SNR = 0 starts to draw.

    noise: the scheduler's arguments or configuration.
    """
    if not noise["rescale_betas_zero_snr"]:
        return []
    if noise["prediction_type"] == "epsilon":
        return [
            "diffusion.prediction_type must be sample or v_prediction with rescale_betas_zero_snr, got epsilon: "
            "at SNR = 0 the noise says nothing about the image"
        ]
    if weighting in WEIGHTED_BY_SNR:
        return [
            "train.weighting must be velocity, min_velocity or x_0 with diffusion.rescale_betas_zero_snr, got "
            f"{weighting}: at SNR = 0, where drawing starts, its weight is 0"
        ]
    return []


def repository_problems(name: str, repo_id: str) -> list[str]:
    """A problem where the Hub, or diffusers loading from it, will not take the name of a repository."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        return [
            f"{name} must be NAME or USER/NAME of letters, digits, - and _, got {repo_id!r}: {' '.join(str(error).split())}"
        ]
    if "." in repo_id:  # diffusers 0.42.1 makes it the name of a Python module
        return [
            f"{name} must have no dot, or diffusers cannot import the pipeline's code from it, got {repo_id!r}: "
            f"{repo_id.replace('.', '-')!r} will do"
        ]
    return []


def groups() -> list[str]:
    """The names of the nested dataclasses."""
    return [
        f.name for f in dataclasses.fields(Config) if f.default_factory is not dataclasses.MISSING
    ]


def plain(value):
    """Tuples as lists, all the way down, for YAML."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def flatten(tree: dict, prefix: str = "") -> dict:
    """{"train": {"lr": 1}} as {"train.lr": 1}."""
    flat = {}
    for key, value in tree.items():
        flat |= (
            flatten(value, f"{prefix}{key}.")
            if isinstance(value, dict)
            else {f"{prefix}{key}": value}
        )
    return flat


@functools.cache
def explained() -> dict[str, str]:
    """Setting -> what its comment in this file says, and its choices: the text of --help."""
    kinds = [
        ("", Config),
        *(
            (f"{f.name}.", f.default_factory)
            for f in dataclasses.fields(Config)
            if f.name in groups()
        ),
    ]
    found = {
        prefix + name: words
        for prefix, kind in kinds
        for name, words in re.findall(r"^    (\w+): .*?  # (.+)$", inspect.getsource(kind), re.M)
    }
    of_new = {f"diffusion.{name}": f"; of a new model {value}" for name, value in NOISE.items()}
    choices = {name: f"; one of {', '.join(known)}" for name, known in CHOICES.items()}
    return {
        name: words + choices.get(name, "") + of_new.get(name, "") for name, words in found.items()
    }


def parser() -> ArgumentParser:
    """The command line that Config describes; `--config FILE` first, then single settings override it."""
    out = ArgumentParser(
        prog="train_text2img.py",
        exit_on_error=False,
        description=(
            "Train a text-to-image diffusion model, or fine-tune one. A YAML file holds the settings, and those of the command line "
            f"override it; without --config it is {DEFAULT}, and --print_config shows what then holds. The same command after an "
            "interruption goes on from the newest checkpoint."
        ),
    )
    out.add_argument("--config", action="config", help=f"a YAML file (default: {DEFAULT})")
    out.add_argument(
        "--dry_run", type=bool, default=False, help="print the plan from one timed step and stop"
    )
    out.add_class_arguments(Config, nested_key=None)
    words = explained()
    for action in out._actions:
        action.help = words.get(action.dest, action.help)
    return out


def unknown_keys(given: list[str]) -> list[str]:
    """A sentence for each name that no setting has, with the nearest one."""
    known = list(flatten(dataclasses.asdict(Config())))
    sections, found = set(groups()), []
    for name in given:
        if (
            name not in known
            and name not in sections
            and name not in ("config", "dry_run", "help", "print_config")
        ):
            near = (
                difflib.get_close_matches(name, known, 1)
                or [k for k in known if k.endswith("." + name)][:1]
            )
            found.append(
                f"unknown setting {name!r}" + (f": did you mean {near[0]!r}?" if near else "")
            )
    return found


class Unrepeated(yaml.SafeLoader):
    """YAML that names no key twice, where PyYAML would keep the last and forget what the first holds."""

    def construct_mapping(self, node, deep=False):
        """A mapping; YAMLError where it repeats a key."""
        keys = [key.value for key, _ in node.value]
        for key in (key for key in keys if keys.count(key) > 1):
            raise yaml.constructor.ConstructorError(
                None, None, f"{key!r} is there twice, expected once", node.start_mark
            )
        return super().construct_mapping(node, deep)


def read_yaml(path: str) -> dict:
    """The settings of one file, or a ConfigError that says what is wrong with it."""
    try:
        tree = Unrepeated(Path(path).read_text(encoding="utf-8")).get_single_data()
    except OSError as error:
        raise ConfigError(f"cannot read the config {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(tree or {}, dict):
        raise ConfigError(f"{path} must hold `setting: value` lines, got a {type(tree).__name__}")
    return tree or {}


def setting_in(path: Path, section: str, name: str) -> object | None:
    """One setting in a file that anybody may have written, unchecked; None where there is no such file or setting."""
    values = read_yaml(str(path)).get(section) if path.is_file() else None
    return values.get(name) if isinstance(values, dict) else None


def nulls(config: Config) -> list[str]:
    """A problem for each setting that is null and may not be: jsonargparse lets null through."""
    found = []
    for name, group in [("", config), *((f"{name}.", getattr(config, name)) for name in groups())]:
        hints = typing.get_type_hints(type(group))
        lacking = [
            key
            for key, value in vars(group).items()
            if value is None and type(None) not in typing.get_args(hints[key])
        ]
        found += [
            f"{name}{key} must be {getattr(hints[key], '__name__', hints[key])}, got null: leave it out"
            for key in lacking
        ]
    return found


def unused(config: Config) -> list[str]:
    """What is set and has no effect, a sentence each."""
    found, noise = [], config.diffusion
    if not config.data.streaming and config.data.shuffle_buffer != DataConfig.shuffle_buffer:
        found.append("data.shuffle_buffer is used while data.streaming is on only: leave it out")
    if noise.beta_schedule == "squaredcos_cap_v2" and (noise.beta_start, noise.beta_end) != (
        None,
        None,
    ):
        found.append(
            "diffusion.beta_start and diffusion.beta_end are used by the other schedules only, not by "
            "squaredcos_cap_v2: leave them out"
        )
    if config.train.method != "lora" and config.lora != LoraConfig():
        found.append(
            f"lora.rank, .alpha and .targets are used by train.method lora only, not by {config.train.method}: leave "
            "them out, or set train.method lora"
        )
    return found


def load(argv: list[str], saved: bool = False) -> tuple[Config, bool]:
    """The configuration of a command line, and whether it is a dry run; ConfigError names every problem at once.

    saved: of a run that is there already, which may have settings that are `unused`.
    """
    argv = ["--dry_run=true" if a == "--dry_run" else a for a in argv]
    flags = [a[2:].split("=")[0] for a in argv if a.startswith("--")]
    if not any(f in ("config", "help") for f in flags) and "-h" not in argv:
        argv = ["--config", DEFAULT, *argv]
    argv = [word for a in argv for word in (a.split("=", 1) if a.startswith("--config=") else [a])]
    at = [i for i, a in enumerate(argv[:-1]) if a == "--config"]
    argv = [a for i in at for a in argv[i : i + 2]] + [
        a for i, a in enumerate(argv) if not {i, i - 1} & set(at)
    ]  # files first
    files = [argv[i + 1] for i, a in enumerate(argv[:-1]) if a == "--config"]
    given = [key for path in files for key in flatten(read_yaml(path))] + flags
    if found := unknown_keys(given):
        raise ConfigError("\n".join(found))
    try:
        parsed = parser().parse_args(argv)
    except ArgumentError as error:
        raise ConfigError(" ".join(str(error).split())) from error
    dry_run = parsed.pop("dry_run")
    parsed.pop("config", None)
    sections = {f.name: f.default_factory for f in dataclasses.fields(Config) if f.name in groups()}
    if empty := [name for name in sections if getattr(parsed, name, None) is None]:
        raise ConfigError(
            "\n".join(f"{name} must hold settings, got null: leave it out" for name in empty)
        )
    values = {
        k: sections[k](**vars(v)) if k in sections and not isinstance(v, sections[k]) else v
        for k, v in vars(parsed).items()
    }
    config = Config(**values)
    if found := nulls(config) or [*config.problems(), *([] if saved else unused(config))]:
        raise ConfigError("\n".join(found))
    return config, dry_run


def load_file(path: str | Path) -> Config:
    """The configuration that a file holds, as a run's own config.yaml does."""
    return load(["--config", str(path)], saved=True)[0]


def differences(old: Config, new: Config, free: tuple[str, ...] = ()) -> list[str]:
    """A sentence for each setting that two configurations give different values, but for the groups or names in `free`."""
    a, b = flatten(old.to_dict()), flatten(new.to_dict())
    same = lambda key: key in free or key.split(".")[0] in free or a[key] == b[key]
    return [f"{key} was {a[key]!r} and is now {b[key]!r}" for key in b if not same(key)]
