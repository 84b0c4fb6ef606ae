"""Generate images: `direct-jump sample RUN_OR_ID "a green cat" --w 2 --seed 7 -o cat.png`."""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.cli.runner import run_cli
from pipeline.models.locate import resolve_model_folder

if TYPE_CHECKING:
    from PIL.Image import Image

    from pipeline.diffusion.text_to_image import TextToImagePipeline

OUTPUT_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def build_parser() -> argparse.ArgumentParser:
    """Return the command's arguments."""
    parser = argparse.ArgumentParser(
        prog="direct-jump sample", description="Generate images of a prompt.", allow_abbrev=False
    )
    add = parser.add_argument
    model_help = "a run, a saved pipeline, or user/name[@revision] on the Hub"
    add("model", metavar="RUN_OR_ID", help=model_help)
    add("prompt", help='such as "a green cat"; "" is unconditional')
    add("--negative", default="", help="negative prompt, what the images should not show")
    add("--w", type=float, help="guidance; guidance_scale is 1 + w (default: the model's)")
    add("--seed", type=int, default=0, help="image i uses seed + i (default: 0)")
    add("--steps", type=int, default=50, help="denoising steps (default: 50)")
    add("--eta", type=float, help="1 is ancestral, 0 is DDIM (default: the scheduler's)")
    add("--height", type=int, help="pixels (default: the model's)")
    add("--width", type=int, help="pixels (default: the model's)")
    add("--scheduler", metavar="NAME", help="class of diffusers, such as DDIMScheduler")
    add("--lora", type=Path, metavar="FOLDER_OR_FILE", help="adapter to load onto the model")
    add("--n", type=int, default=1, help="number of images (default: 1)")
    add("--batch", type=int, default=8, help="images generated at once (default: 8)")
    add("--device", help="cpu, cuda or mps (default: the fastest)")
    output_help = "image file; several get -0, -1, … before the suffix (default: out.png)"
    add("-o", "--output", type=Path, default=Path("out.png"), help=output_help)
    return parser


def output_files(output: Path, n: int) -> list[Path]:
    """Return the files of n images; ValueError if one cannot be written."""
    if n < 1:
        raise ValueError(f"--n must be 1 or more, got {n}.")
    if output.suffix.lower() not in OUTPUT_SUFFIXES:
        raise ValueError(f"-o must end in one of {', '.join(OUTPUT_SUFFIXES)}, got {output}.")
    if not output.parent.is_dir() or not os.access(output.parent, os.W_OK):
        raise ValueError(f"{output.parent} is not a writable folder. Create it or change -o.")
    files = [output] if n == 1 else [output.with_stem(f"{output.stem}-{i}") for i in range(n)]
    for file in files:
        if file.exists() and not (file.is_file() and os.access(file, os.W_OK)):
            raise ValueError(f"{file} exists and is not a writable file. Change -o.")
    return files


def png_settings(
    pipe: "TextToImagePipeline", model: str, args: argparse.Namespace, changes: Sequence[str] = ()
) -> dict:
    """Return what a PNG stores to reproduce its image, as in the demo.

    changes: what the demo cannot choose, such as a size. They and a stock scheduler are added to
    the model's name, which then is not the demo's, so that it says that its image differs.
    """
    from pipeline.data.fingerprint import weights_digest
    from pipeline.diffusion.scheduler import DDPMScheduler
    from pipeline.serving.png_metadata import model_identity, png_parameters
    from pipeline.serving.requests import Request

    request = Request(
        prompt=args.prompt,
        negative_prompt=args.negative,
        w=pipe.config["w"] if args.w is None else args.w,
        steps=args.steps,
        eta=1.0 if args.eta is None else args.eta,
        seed=args.seed,
    )
    name = Path(model.partition("@")[0]).name
    identity = [model_identity(name, weights_digest(pipe.unet))]
    if not isinstance(pipe.scheduler, DDPMScheduler):
        identity.append(type(pipe.scheduler).__name__)
    return png_parameters(request, "network", ", ".join([*identity, *changes]))


def describe_changes(args: argparse.Namespace) -> list[str]:
    """Return the adapter and the size of a command line, for `png_settings`."""
    adapter = [f"lora {args.lora.name}"] if args.lora else []
    sides = [(side, getattr(args, side)) for side in ("height", "width")]
    return adapter + [f"{side} {pixels}" for side, pixels in sides if pixels is not None]


def save_image(image: "Image", path: Path, settings: dict | None = None) -> None:
    """Save an image, a PNG with its settings; ValueError if it cannot be written."""
    from PIL.PngImagePlugin import PngInfo

    options = {}
    if path.suffix.lower() == ".png" and settings is not None:
        options["pnginfo"] = PngInfo()
        options["pnginfo"].add_itxt("parameters", json.dumps(settings, ensure_ascii=False))
    try:
        image.save(path, **options)
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(
            f"{path} cannot be written: {reason}. Free disk space or change -o."
        ) from error


def generate(args: argparse.Namespace) -> None:
    """Generate, save and print the images, one batch at a time."""
    files = output_files(args.output, args.n)
    if args.batch < 1:
        raise ValueError(f"--batch must be 1 or more, got {args.batch}.")
    if args.lora and not args.lora.exists():
        raise ValueError(
            f"--lora {args.lora} does not exist. Pass a .safetensors file or its folder."
        )
    folder = resolve_model_folder(args.model)
    # Imported here, because torch takes seconds and the mistakes above need no model.
    from pipeline.hardware import pick_device
    from pipeline.models.build import stock_scheduler
    from pipeline.models.loading import load_from_folder, load_lora

    pipe = load_from_folder(folder)
    if args.scheduler:
        pipe.scheduler = stock_scheduler(args.scheduler, pipe.scheduler.config)
    if args.lora:
        load_lora(pipe, args.lora)
    pipe.to(pick_device(args.device))
    settings = png_settings(pipe, args.model, args, describe_changes(args))
    for start in range(0, args.n, args.batch):
        batch = files[start : start + args.batch]
        images = pipe(
            args.prompt,
            negative_prompt=args.negative or None,
            w=args.w,
            eta=args.eta,
            seed=args.seed + start,
            height=args.height,
            width=args.width,
            num_inference_steps=args.steps,
            num_images_per_prompt=len(batch),
            return_dict=False,
        )[0]
        for i, (image, file) in enumerate(zip(images, batch, strict=True), start):
            save_image(image, file, settings | {"seed": args.seed + i})
            print(file, flush=True)


def main(argv: list[str] | None = None) -> int:
    """Generate images; 0 done, 2 bad input, 130 interrupted."""
    args = build_parser().parse_args(argv)
    return run_cli(lambda: generate(args), "finished batches are saved.")
