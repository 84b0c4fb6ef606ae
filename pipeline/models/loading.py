"""Load pipelines: from a run, a saved folder, a checkpoint or the Hub, by classes and files that are trusted."""

from pathlib import Path

from diffusers import UNet2DConditionModel
from diffusers.utils import logging
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from pipeline.config import load_file, setting_in
from pipeline.diffusion.text_to_image import TextToImagePipeline
from pipeline.models import trusted
from pipeline.models.build import build_pipeline, trainable_parameters
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
    """The pipeline of a run's folder, of a saved pipeline's or of the Hub, or that of an adapter's base with the adapter."""
    return load_from_folder(resolve_model_folder(model))


def load_from_folder(path: Path) -> TextToImagePipeline:
    """The pipeline saved in a folder, from safetensors alone and with no code of its own; ValueError says what is wrong.

    One that was saved without its text encoder gets the one that the config.yaml beside it names.
    """
    if not (path / MODEL_INDEX).is_file() and (path / ADAPTER_FILE).is_file():
        return load_with_adapter(path)
    logging.disable_progress_bar()
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
        raise ValueError(
            f"{path} cannot be loaded ({reason}), expected a complete saved pipeline: save it again"
        ) from error
    if pipe.text_encoder is None and (path / "config.yaml").is_file():
        tokenizer, encoder = load_text_encoder(load_file(path / "config.yaml").model.text_encoder)
        pipe.register_modules(tokenizer=tokenizer, text_encoder=encoder)
    return pipe


def load_with_adapter(path: Path) -> TextToImagePipeline:
    """An adapter's folder as the pipeline that it adapts, with it; the settings beside it name that.

    It draws with that model's own scheduler, as in stock diffusers; a run's comes with the run's w and caption dropout.
    """
    if (path.parent / "config.yaml").is_file():  # a run's
        config = load_file(path.parent / "config.yaml")
        pipe = load_pipeline(config.model.pretrained)
        pipe.register_to_config(
            w=config.sample.default_w, caption_dropout=config.data.caption_dropout
        )
    else:  # a stranger's settings may name a model of the Hub and nothing on this machine
        base = setting_in(path / SHARED_CONFIG_FILE, "model", "pretrained")
        if not isinstance(base, str) or Path(base).exists() or not parse_repo_id(base):
            raise ModelError(
                f"{path} is an adapter of {base!r}, expected one of a model of the Hub: load that model, then "
                f"`pipe.load_lora_weights({str(path)!r})`"
            )
        pipe = load_pipeline(base)
    try:
        pipe.load_lora_weights(
            path, weight_name=ADAPTER_FILE, use_safetensors=True, local_files_only=True
        )
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"{path / ADAPTER_FILE} cannot be loaded ({error}), expected an adapter: save it again"
        ) from error
    return pipe


def load_checkpoint(run: RunFolder, step: int) -> TextToImagePipeline:
    """The pipeline of a run's checkpoint, with the averaged weights; ValueError where the checkpoint is damaged."""
    folder, config = run.checkpoints / str(step), load_file(run.config)
    if damage := verify_checkpoint(folder):
        raise ValueError(f"checkpoint {folder} cannot be used: {damage}")
    base = None if config.model.pretrained is None else load_pipeline(config.model.pretrained)
    tokenizer, encoder = (
        (base.tokenizer, base.text_encoder)
        if base
        else load_text_encoder(config.model.text_encoder)
    )
    if config.train.method == "lora":
        unet, whitening = add_adapter(base.unet, config.lora), base.whitening
    else:
        unet = UNet2DConditionModel.from_pretrained(folder / "unet", use_safetensors=True)
        whitening = load_whitening(folder)
    average = build_ema(unet, config.train.ema)
    average.load_state_dict(load_state(folder, "trainer")["ema"])
    average.copy_to(trainable_parameters(unet))
    return build_pipeline(config, unet.eval(), tokenizer, encoder, whitening, base)
