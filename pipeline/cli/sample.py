"""Draw pictures from the command line: `direct-jump sample RUN_OR_ID "a green cat" --w 2 --seed 7 -o cat.png`."""

import argparse
import json
import os
import sys
from pathlib import Path

from pipeline.hardware import pick_device
from pipeline.models.loading import load_pipeline

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def build_parser() -> argparse.ArgumentParser:
    """The command line's arguments."""
    arguments = argparse.ArgumentParser(
        prog="direct-jump sample",
        description="Draw pictures of a prompt.",
        allow_abbrev=False,
    )
    arguments.add_argument(
        "model",
        metavar="RUN_OR_ID",
        help="a run's folder (runs/NAME), a saved pipeline's, or a model of the "
        "Hub (user/name or user/name@revision)",
    )
    arguments.add_argument(
        "prompt", help='what to draw, such as "a green cat"; "" is no prompt at all'
    )
    arguments.add_argument(
        "--negative", default="", help="what to keep away from, instead of the empty prompt"
    )
    arguments.add_argument(
        "--w",
        type=float,
        help="guidance: 0 none; guidance_scale is 1 + w (default: the model's own)",
    )
    arguments.add_argument(
        "--seed", type=int, default=0, help="picture i draws its noise from seed + i (default: 0)"
    )
    arguments.add_argument("--steps", type=int, default=50, help="denoising steps (default: 50)")
    arguments.add_argument(
        "--eta",
        type=float,
        help="1 draws new noise at every step, 0 none (default: the scheduler's own)",
    )
    arguments.add_argument("--n", type=int, default=1, help="how many pictures (default: 1)")
    arguments.add_argument(
        "--batch",
        type=int,
        default=8,
        help="how many are drawn at once, and then saved (default: 8)",
    )
    arguments.add_argument("--device", help="cpu, cuda or mps (default: the fastest there is)")
    arguments.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("out.png"),
        help="the picture's file; several get -0, -1, … before its suffix (default: out.png)",
    )
    return arguments


def output_files(output: Path, n: int) -> list[Path]:
    """Where n pictures go, checked before anything is drawn."""
    if n < 1:
        raise ValueError(f"--n is {n}, expected 1 or more: pass 1")
    if output.suffix.lower() not in IMAGE_SUFFIXES:
        raise ValueError(
            f"-o is {output}, expected a name that ends in one of {', '.join(IMAGE_SUFFIXES)}: pass out.png"
        )
    if not output.parent.is_dir() or not os.access(output.parent, os.W_OK):
        raise ValueError(
            f"-o is {output}, expected a file in a folder that can be written: create {output.parent} first"
        )
    found = [output] if n == 1 else [output.with_stem(f"{output.stem}-{i}") for i in range(n)]
    if taken := [
        path
        for path in found
        if path.exists() and not (path.is_file() and os.access(path, os.W_OK))
    ]:
        raise ValueError(
            f"-o is {taken[0]}, which is there and no file that can be written, expected one: pass another name"
        )
    return found


def png_settings(pipe, model: str, arguments: argparse.Namespace) -> dict | None:
    """What a picture of a command line carries, as the page's do, so that the page draws it again.

    None where the pipeline has another library's scheduler: the page draws by ours.
    """
    from pipeline.data.fingerprint import weights_digest
    from pipeline.diffusion.scheduler import DDPMScheduler
    from pipeline.serving.png_metadata import model_identity, png_parameters
    from pipeline.serving.requests import Request

    if not isinstance(pipe.scheduler, DDPMScheduler):
        return None
    request = Request(
        arguments.prompt,
        arguments.negative,
        pipe.config.w if arguments.w is None else arguments.w,
        arguments.steps,
        1.0 if arguments.eta is None else arguments.eta,
        seed=arguments.seed,
    )
    return png_parameters(
        request,
        "network",
        model_identity(Path(model.partition("@")[0]).name, weights_digest(pipe.unet)),
    )


def save_image(image, path: Path, settings: dict | None = None) -> None:
    """Save a picture, a PNG with the settings that draw it again; ValueError where it cannot be written."""
    from PIL.PngImagePlugin import PngInfo

    notes = PngInfo()
    if settings is not None:
        notes.add_itxt("parameters", json.dumps(settings, ensure_ascii=False))
    try:
        image.save(path, **({"pnginfo": notes} if path.suffix.lower() == ".png" else {}))
    except OSError as error:
        raise ValueError(
            f"{path} cannot be written ({error.strerror or error}), expected room and leave to write: pass another "
            "-o"
        ) from error


def main(argv: list[str] | None = None) -> int:
    """Draw, save and name the pictures, a batch after the other; 0 is done, 2 is bad input, told in one sentence."""
    arguments = build_parser().parse_args(argv)
    try:
        outputs = output_files(arguments.output, arguments.n)
        if arguments.batch < 1:
            raise ValueError(f"--batch is {arguments.batch}, expected 1 or more: leave it out")
        pipe = load_pipeline(arguments.model).to(pick_device(arguments.device))
        settings = png_settings(pipe, arguments.model, arguments)
        for start in range(0, arguments.n, arguments.batch):
            some = outputs[start : start + arguments.batch]
            images = pipe(
                arguments.prompt,
                negative_prompt=arguments.negative or None,
                w=arguments.w,
                eta=arguments.eta,
                seed=arguments.seed + start,
                num_inference_steps=arguments.steps,
                num_images_per_prompt=len(some),
            ).images
            for i, (image, output) in enumerate(zip(images, some, strict=True), start):
                save_image(image, output, settings and settings | {"seed": arguments.seed + i})
                print(output, flush=True)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
