"""How a command line begins and ends: a model by its name, a device, and a word where Ctrl-C stops it.

Libraries are imported where they are needed, so that a mistyped path is told without waiting for them.
"""

import sys
from collections.abc import Callable
from pathlib import Path


def folder(model: str) -> Path:
    """The folder of a saved pipeline, from its own path, from that of its run, or from the Hub."""
    from pipeline.models import trusted
    from pipeline.runs.folder import ADAPTER, INDEX

    whole = [(Path(model), INDEX), (Path(model) / "pipeline", INDEX)]
    for path, file in (*whole, (Path(model), ADAPTER), (Path(model) / "lora", ADAPTER)):
        if (path / file).is_file():
            return path
    if Path(model).is_dir():
        held = (
            "its training has not finished: run the training command again"
            if (Path(model) / "config.yaml").is_file()
            else ("pass a run's folder or a saved pipeline's")
        )
        raise ValueError(
            f"{model} holds no pipeline, expected {Path(model) / 'pipeline' / INDEX}: {held}"
        )
    if Path(model).is_file():
        raise ValueError(
            f"{model} is a file, expected the folder of a saved pipeline: make one of a checkpoint by diffusers' "
            f"StableDiffusionPipeline.from_single_file({model!r}).save_pretrained(FOLDER)"
        )
    if trusted.named(model):
        return trusted.download(model)
    raise ValueError(
        f"{model} does not exist, expected the folder of a run or of a saved pipeline, or a model of the Hub "
        "(user/name): see `ls runs`"
    )


def load(model: str):
    """The pipeline of a run's folder, of a saved pipeline's or of the Hub, or that of an adapter's base with the adapter."""
    return load_folder(folder(model))


def load_folder(path: Path):
    """The pipeline saved in a folder, from safetensors alone and with no code of its own; ValueError says what is wrong.

    One that was saved without its text encoder gets the one that the config.yaml beside it names.
    """
    from diffusers.utils import logging
    from safetensors import SafetensorError
    from transformers.utils import logging as transformers_logging

    from pipeline.config import load_file
    from pipeline.diffusion.text_to_image import TextToImagePipeline
    from pipeline.models import build, trusted
    from pipeline.runs.folder import ADAPTER, INDEX

    if not (path / INDEX).is_file() and (path / ADAPTER).is_file():
        return load_adapter(path)
    logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    try:
        trusted.refuse_pickles(path, TextToImagePipeline.load_config(path))
        pipe = TextToImagePipeline.from_pretrained(
            path, use_safetensors=True, local_files_only=True
        )
    except trusted.ModelError:
        raise
    except (OSError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise ValueError(
            f"{path} cannot be loaded ({reason}), expected a complete saved pipeline: save it again"
        ) from error
    if pipe.text_encoder is None and (path / "config.yaml").is_file():
        tokenizer, encoder = build.text_encoder(load_file(path / "config.yaml").model.text_encoder)
        pipe.register_modules(tokenizer=tokenizer, text_encoder=encoder)
    return pipe


def load_adapter(path: Path):
    """An adapter's folder as the pipeline that it adapts, with it; the settings beside it name that.

    It draws with that model's own scheduler, as in stock diffusers; a run's comes with the run's w and caption dropout.
    """
    from safetensors import SafetensorError

    from pipeline.config import load_file, setting_in
    from pipeline.models import trusted
    from pipeline.runs.folder import ADAPTER, SHARED_CONFIG

    if (path.parent / "config.yaml").is_file():  # a run's
        config = load_file(path.parent / "config.yaml")
        pipe = load(config.model.pretrained)
        pipe.register_to_config(
            w=config.sample.default_w, caption_dropout=config.data.caption_dropout
        )
    else:  # a stranger's settings may name a model of the Hub and nothing on this machine
        base = setting_in(path / SHARED_CONFIG, "model", "pretrained")
        if not isinstance(base, str) or Path(base).exists() or not trusted.named(base):
            raise trusted.ModelError(
                f"{path} is an adapter of {base!r}, expected one of a model of the Hub: load that model, then "
                f"`pipe.load_lora_weights({str(path)!r})`"
            )
        pipe = load(base)
    try:
        pipe.load_lora_weights(
            path, weight_name=ADAPTER, use_safetensors=True, local_files_only=True
        )
    except (OSError, SafetensorError) as error:
        raise trusted.ModelError(
            f"{path / ADAPTER} cannot be loaded ({error}), expected an adapter: save it again"
        ) from error
    return pipe


def pick_device(device: str | None, double: bool = False) -> str:
    """The device by name, or the fastest there is, `double` of those that compute in float64; ValueError for any other."""
    import torch
    from accelerate import PartialState

    if device is None:
        found = PartialState().device
        return "cpu" if double and found.type == "mps" else str(found)
    try:
        torch.zeros(1, device=device)
    except (
        RuntimeError,
        AssertionError,
    ) as error:  # torch's way to say that a device is unknown or not there
        raise ValueError(
            f"--device is {device}, expected one that this machine has: leave it out to use the fastest"
        ) from error
    if double and torch.device(device).type == "mps":
        raise ValueError("--device is mps, expected one that computes in float64: leave it out")
    return device


def stoppable(main: Callable[[], int], said: str) -> int:
    """The exit code of a command line; of one that Ctrl-C stops 130, and a word on what is left."""
    try:
        return main()
    except KeyboardInterrupt:
        print(f"\nstopped: {said}", file=sys.stderr)
        return 130
