"""Load pipelines from a run, a saved folder, a checkpoint or the Hub, with trusted classes only."""

from pathlib import Path

from diffusers import UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from pipeline.config import load_file, setting_in
from pipeline.diffusion.text_to_image import TextToImagePipeline
from pipeline.models import trusted
from pipeline.models.build import build_autoencoder, build_pipeline, trainable_parameters
from pipeline.models.ema import build_ema
from pipeline.models.locate import resolve_model_folder
from pipeline.models.lora import add_adapter
from pipeline.models.text_encoders import load_text_encoder, load_whitening
from pipeline.models.trusted import ModelError, parse_repo_id, require_safetensors
from pipeline.runs.checkpoints import verify_checkpoint
from pipeline.runs.folder import ADAPTER_FILE, MODEL_INDEX, SHARED_CONFIG_FILE, RunFolder
from pipeline.runs.state_files import load_state

# From here on the pipeline class loads only what `trusted` accepts.
TextToImagePipeline.trusted = trusted


def load_pipeline(model: str | Path) -> TextToImagePipeline:
    """Load a pipeline from a run, a saved folder or the Hub; an adapter comes on its base model."""
    return load_from_folder(resolve_model_folder(model))


def load_from_folder(path: Path) -> TextToImagePipeline:
    """Load the pipeline saved in a folder, from safetensors and without code of its own.

    A pipeline saved without its text encoder gets the one that the config.yaml beside it names.
    ValueError if it cannot be loaded.
    """
    if not (path / MODEL_INDEX).is_file() and (path / ADAPTER_FILE).is_file():
        return load_with_adapter(path)
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    try:
        require_safetensors(path, TextToImagePipeline.load_config(path))
        pipe = TextToImagePipeline.from_pretrained(
            path, use_safetensors=True, local_files_only=True
        )
    except ModelError:
        raise
    except (OSError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise ValueError(f"{path} cannot be loaded: {reason}. Save the pipeline again.") from error
    try:
        pipe.check_unet()
    except ValueError as error:
        raise ModelError(f"{path} cannot be used here: {error}") from error
    if pipe.text_encoder is None and (path / "config.yaml").is_file():
        tokenizer, encoder = load_text_encoder(load_file(path / "config.yaml").model.text_encoder)
        pipe.register_modules(tokenizer=tokenizer, text_encoder=encoder)
    return pipe


def load_with_adapter(path: Path) -> TextToImagePipeline:
    """Load an adapter on the base model that the settings beside it name.

    It samples with the base model's own scheduler, as in stock diffusers.
    The adapter of a run also brings the run's w and caption dropout.
    """
    run_config = path.parent / "config.yaml"
    if run_config.is_file():
        config = load_file(run_config)
        pipe = load_pipeline(str(config.model.pretrained))
        pipe.register_to_config(
            w=config.sample.default_w, caption_dropout=config.data.caption_dropout
        )
    else:
        # Settings from somebody else may name a model on the Hub, but no file of this machine.
        base = setting_in(path / SHARED_CONFIG_FILE, "model", "pretrained")
        if not isinstance(base, str) or Path(base).exists() or not parse_repo_id(base):
            raise ModelError(
                f"{path} is an adapter of {base!r}, which is not a model on the Hub. "
                f"Load its base model, then `pipe.load_lora_weights({str(path)!r})`."
            )
        pipe = load_pipeline(base)
    load_lora(pipe, path / ADAPTER_FILE)
    return pipe


def load_lora(pipe: TextToImagePipeline, path: Path) -> None:
    """Load an adapter's file, its folder or its run onto a pipeline; ModelError if it fails."""
    if path.is_dir():
        run = RunFolder(path)
        path = (run.adapter if run.has_adapter else path) / ADAPTER_FILE
    try:
        pipe.load_lora_weights(
            str(path.parent), weight_name=path.name, use_safetensors=True, local_files_only=True
        )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise ModelError(
            f"{path} cannot be loaded: {' '.join(str(error).split())} Save the adapter again for "
            "this model."
        ) from error


def load_checkpoint(run: RunFolder, step: int) -> TextToImagePipeline:
    """Load a run's checkpoint with its averaged weights; ValueError if it is corrupt."""
    folder = run.checkpoints / str(step)
    damage = verify_checkpoint(folder)
    if damage:
        raise ValueError(f"checkpoint {folder} cannot be used: {damage}")
    config = load_file(run.config)
    if config.model.pretrained is None:
        base = None
        tokenizer, encoder = load_text_encoder(config.model.text_encoder)
    else:
        base = load_pipeline(config.model.pretrained)
        tokenizer, encoder = base.tokenizer, base.text_encoder
    if base is not None and config.train.method == "lora":
        unet = add_adapter(base.unet, config.lora)
        whitening = base.whitening
    else:
        unet = UNet2DConditionModel.from_pretrained(folder / "unet", use_safetensors=True)
        whitening = load_whitening(folder)
    ema = build_ema(unet, config.train.ema)
    ema.load_state_dict(load_state(folder, "trainer")["ema"])
    ema.copy_to(trainable_parameters(unet))
    vae = base.vae if base else build_autoencoder(config.model)
    return build_pipeline(config, unet.eval(), tokenizer, encoder, whitening, vae, base)
