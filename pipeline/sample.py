"""Draw pictures from the command line: `python -m pipeline.sample RUN_OR_ID "a green cat" --w 2 --seed 7 -o cat.png`."""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def parser() -> argparse.ArgumentParser:
    """The command line's arguments."""
    arguments = argparse.ArgumentParser(prog="python -m pipeline.sample", description="Draw pictures of a prompt.",
                                        allow_abbrev=False)  # fmt: skip
    arguments.add_argument("model", metavar="RUN_OR_ID", help="a run's folder (runs/NAME), a saved pipeline's, or a model of the "
                                                              "Hub (user/name or user/name@revision)")  # fmt: skip
    arguments.add_argument("prompt", help='what to draw, such as "a green cat"; "" is no prompt at all')
    arguments.add_argument("--negative", default="", help="what to keep away from, instead of the empty prompt")
    arguments.add_argument("--w", type=float, help="guidance: 0 none; guidance_scale is 1 + w (default: the model's own)")
    arguments.add_argument("--seed", type=int, default=0, help="picture i draws its noise from seed + i (default: 0)")
    arguments.add_argument("--steps", type=int, default=50, help="denoising steps (default: 50)")
    arguments.add_argument("--eta", type=float, help="1 draws new noise at every step, 0 none (default: the scheduler's own)")
    arguments.add_argument("--n", type=int, default=1, help="how many pictures (default: 1)")
    arguments.add_argument("--batch", type=int, default=8, help="how many are drawn at once, and then saved (default: 8)")
    arguments.add_argument("--device", help="cpu, cuda or mps (default: the fastest there is)")
    arguments.add_argument("-o", "--output", type=Path, default=Path("out.png"),
                           help="the picture's file; several get -0, -1, … before its suffix (default: out.png)")  # fmt: skip
    return arguments


def folder(model: str) -> Path:
    """The folder of a saved pipeline, from its own path, from that of its run, or from the Hub."""
    from pipeline import safe

    whole = [(Path(model), safe.INDEX), (Path(model) / "pipeline", safe.INDEX)]
    for path, file in (*whole, (Path(model), safe.ADAPTER), (Path(model) / "lora", safe.ADAPTER)):
        if (path / file).is_file():
            return path
    if Path(model).is_dir():
        held = "its training has not finished: run the training command again" if (Path(model) / "config.yaml").is_file() else (
            "pass a run's folder or a saved pipeline's")  # fmt: skip
        raise ValueError(f"{model} holds no pipeline, expected {Path(model) / 'pipeline' / safe.INDEX}: {held}")
    if Path(model).is_file():
        raise ValueError(f"{model} is a file, expected the folder of a saved pipeline: make one of a checkpoint by diffusers' "
                         f"StableDiffusionPipeline.from_single_file({model!r}).save_pretrained(FOLDER)")  # fmt: skip
    if safe.named(model):
        return safe.download(model)
    raise ValueError(f"{model} does not exist, expected the folder of a run or of a saved pipeline, or a model of the Hub "
                     "(user/name): see `ls runs`")  # fmt: skip


def opened(model: str):
    """The pipeline of a run's folder, of a saved pipeline's or of the Hub, or that of an adapter's base with the adapter."""
    return load(folder(model))


def adapted(path: Path):
    """An adapter's folder as the pipeline that it adapts, with it; the settings beside it name that.

    It draws with that model's own scheduler, as in stock diffusers; a run's comes with the run's w and caption dropout.
    """
    from safetensors import SafetensorError

    from pipeline import safe
    from pipeline.config import load_file, read_yaml

    if (path.parent / "config.yaml").is_file():  # a run's
        config = load_file(path.parent / "config.yaml")
        pipe = opened(config.model.pretrained)
        pipe.register_to_config(w=config.sample.default_w, caption_dropout=config.data.caption_dropout)
    else:  # a stranger's settings may name a model of the Hub and nothing on this machine
        settings = path / "training_config.yaml"
        model = read_yaml(str(settings)).get("model") if settings.is_file() else None
        base = model.get("pretrained") if isinstance(model, dict) else None
        if not isinstance(base, str) or Path(base).exists() or not safe.named(base):
            raise safe.ModelError(f"{path} is an adapter of {base!r}, expected one of a model of the Hub: load that model, then "
                                  f"`pipe.load_lora_weights({str(path)!r})`")  # fmt: skip
        pipe = opened(base)
    try:
        pipe.load_lora_weights(path, weight_name=safe.ADAPTER, use_safetensors=True, local_files_only=True)
    except (OSError, SafetensorError) as error:
        raise safe.ModelError(f"{path / safe.ADAPTER} cannot be loaded ({error}), expected an adapter: save it again") from error
    return pipe


def files(output: Path, n: int) -> list[Path]:
    """Where n pictures go, checked before anything is drawn."""
    if n < 1:
        raise ValueError(f"--n is {n}, expected 1 or more: pass 1")
    if output.suffix.lower() not in SUFFIXES:
        raise ValueError(f"-o is {output}, expected a name that ends in one of {', '.join(SUFFIXES)}: pass out.png")
    if not output.parent.is_dir() or not os.access(output.parent, os.W_OK):
        raise ValueError(f"-o is {output}, expected a file in a folder that can be written: create {output.parent} first")
    found = [output] if n == 1 else [output.with_stem(f"{output.stem}-{i}") for i in range(n)]
    if taken := [path for path in found if path.exists() and not (path.is_file() and os.access(path, os.W_OK))]:
        raise ValueError(f"-o is {taken[0]}, which is there and no file that can be written, expected one: pass another name")
    return found


def settings_of(pipe, model: str, arguments: argparse.Namespace) -> dict | None:
    """What a picture of a command line carries, as the page's do, so that the page draws it again.

    None where the pipeline has another library's scheduler: the page draws by ours.
    """
    from pipeline.config import DataConfig
    from pipeline.scheduler import DDPMScheduler
    from pipeline.serving import Request, Studio

    if not isinstance(pipe.scheduler, DDPMScheduler):
        return None
    request = Request(arguments.prompt, arguments.negative, pipe.config.w if arguments.w is None else arguments.w,
                      arguments.steps, 1.0 if arguments.eta is None else arguments.eta, seed=arguments.seed)  # fmt: skip
    drawn_by = Studio(pipe, Path(model.partition("@")[0]).name, DataConfig()).identity
    return dataclasses.asdict(request) | {"image": 0, "denoiser": "network", "model": drawn_by}


def save(image, path: Path, settings: dict | None = None) -> None:
    """Save a picture, a PNG with the settings that draw it again; ValueError where it cannot be written."""
    from PIL.PngImagePlugin import PngInfo

    notes = PngInfo()
    if settings is not None:
        notes.add_itxt("parameters", json.dumps(settings, ensure_ascii=False))
    try:
        image.save(path, **({"pnginfo": notes} if path.suffix.lower() == ".png" else {}))
    except OSError as error:
        raise ValueError(f"{path} cannot be written ({error.strerror or error}), expected room and leave to write: pass another "
                         "-o") from error  # fmt: skip


def chosen(device: str | None, double: bool = False) -> str:
    """The device by name, or the fastest there is, `double` of those that compute in float64; ValueError for any other."""
    import torch
    from accelerate import PartialState

    if device is None:
        found = PartialState().device
        return "cpu" if double and found.type == "mps" else str(found)
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch's way to say that a device is unknown or not there
        raise ValueError(f"--device is {device}, expected one that this machine has: leave it out to use the fastest") from error
    if double and torch.device(device).type == "mps":
        raise ValueError("--device is mps, expected one that computes in float64: leave it out")
    return device


def load(path: Path):
    """The pipeline saved in a folder, from safetensors alone and with no code of its own; ValueError says what is wrong.

    One that was saved without its text encoder gets the one that the config.yaml beside it names.
    """
    from diffusers.utils import logging
    from safetensors import SafetensorError
    from transformers.utils import logging as transformers_logging

    from pipeline import models, safe
    from pipeline.config import load_file
    from pipeline.text_to_image import TextToImagePipeline

    if not (path / safe.INDEX).is_file() and (path / safe.ADAPTER).is_file():
        return adapted(path)
    logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    try:
        safe.refuse_pickles(path, TextToImagePipeline.load_config(path))
        pipe = TextToImagePipeline.from_pretrained(path, use_safetensors=True, local_files_only=True)
    except safe.ModelError:
        raise
    except (OSError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise ValueError(f"{path} cannot be loaded ({reason}), expected a complete saved pipeline: save it again") from error
    if pipe.text_encoder is None and (path / "config.yaml").is_file():
        tokenizer, encoder = models.text_encoder(load_file(path / "config.yaml").model.text_encoder)
        pipe.register_modules(tokenizer=tokenizer, text_encoder=encoder)
    return pipe


def stoppable(main: Callable[[], int], said: str) -> int:
    """The exit code of a command line; of one that Ctrl-C stops 130, and a word on what is left."""
    try:
        return main()
    except KeyboardInterrupt:
        print(f"\nstopped: {said}", file=sys.stderr)
        return 130


def main(argv: list[str] | None = None) -> int:
    """Draw, save and name the pictures, a batch after the other; 0 is done, 2 is bad input, told in one sentence."""
    arguments = parser().parse_args(argv)
    try:
        outputs = files(arguments.output, arguments.n)
        if arguments.batch < 1:
            raise ValueError(f"--batch is {arguments.batch}, expected 1 or more: leave it out")
        pipe = opened(arguments.model).to(chosen(arguments.device))
        settings = settings_of(pipe, arguments.model, arguments)
        for start in range(0, arguments.n, arguments.batch):
            some = outputs[start : start + arguments.batch]
            images = pipe(arguments.prompt, negative_prompt=arguments.negative or None, w=arguments.w, eta=arguments.eta,
                          seed=arguments.seed + start, num_inference_steps=arguments.steps,
                          num_images_per_prompt=len(some)).images  # fmt: skip
            for i, (image, output) in enumerate(zip(images, some, strict=True), start):
                save(image, output, settings and settings | {"seed": arguments.seed + i})
                print(output, flush=True)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(stoppable(main, "the pictures named above are saved, and no others"))
