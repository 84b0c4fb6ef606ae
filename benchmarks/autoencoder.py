"""`python benchmarks/autoencoder.py`: what an autoencoder restores, of which images, how fast.

The held-out images are of drawing styles that it was trained on. OpenMoji, monsters and any folders
given are of kinds that it never saw. The goals are those set before it was trained.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks import bench
from benchmarks.bench import spread, table, target
from pipeline.config import DataConfig
from pipeline.data.dataset import CaptionedImages, load_splits
from pipeline.data.emoji.style_set import write_styles
from pipeline.data.image_ops import as_float
from pipeline.data.latent_cache import restore_images
from pipeline.data.sampler import evenly_spaced
from pipeline.diffusion.autoencoder import ConvAutoencoder
from pipeline.evaluation.image_quality import seam_ratio
from pipeline.evaluation.retrieval import bootstrap_mean
from pipeline.models.build import load_autoencoder
from pipeline.training.autoencoder import psnr

AUTOENCODER = "pretrained/autoencoder"
GOAL_PSNR = 33.0  # dB, of held-out images
GOAL_MS = 10.0  # for decoding an image of 128x128
STRIDE = 8  # pixels per position of a latent, whose seams are measured
MOST_IMAGES = 512  # of a kind
REPEATS = 20


def kinds_of_images(size: int, cache: str, folders: list[str]) -> dict[str, CaptionedImages]:
    """Return the images to restore by what they are."""
    styles = DataConfig(source="emoji-styles", resolution=size, cache=cache)
    _, held_out = load_splits(styles)
    openmoji = str(write_styles(Path(cache) / f"openmoji-{size}", ("openmoji",), size))
    kinds = {"held out": held_out}
    sources = {"OpenMoji": openmoji, "monsters": "monsters"} | {
        Path(folder).name: folder for folder in folders
    }
    for name, source in sources.items():
        config = DataConfig(source=source, resolution=size, cache=cache, held_out=None)
        kinds[name] = load_splits(config)[0]
    return kinds


def psnr_rows(vae: ConvAutoencoder, kinds: dict[str, CaptionedImages]) -> list[list]:
    """Return a row a kind: its number of images, its PSNR, its seams before and after."""
    rows = []
    for name, images in kinds.items():
        chosen = images.images[evenly_spaced(MOST_IMAGES, len(images))]
        restored = restore_images(vae, chosen)
        values = psnr(as_float(restored), as_float(chosen))
        before, after = (seam_ratio(each, STRIDE) for each in (chosen, restored))
        rows.append([name, len(chosen), bootstrap_mean(values), f"{before:.3f}", f"{after:.3f}"])
    return rows


@torch.no_grad()
def times(vae: ConvAutoencoder, size: int, repeats: int) -> dict[str, list[float]]:
    """Return the milliseconds per image of encoding and decoding by batch and precision."""
    calls: dict[str, Callable] = {}
    for dtype in (torch.float32, torch.bfloat16):
        network = ConvAutoencoder.from_config(vae.config).eval().to(dtype)
        network.load_state_dict(vae.state_dict())
        network.to(memory_format=torch.channels_last)
        for batch in (1, 8):
            x = torch.rand(batch, 3, size, size).to(dtype)
            z = network.encode(x).latents
            kind = f"{str(dtype).removeprefix('torch.')}, batch {batch}"
            calls[f"encode, {kind}"] = lambda network=network, x=x: network.encode(x)
            calls[f"decode, {kind}"] = lambda network=network, z=z: network.decode(z)
    seconds = bench.in_turns(calls, repeats)
    return {
        name: [1000 * value / int(name.split()[-1]) for value in values]
        for name, values in seconds.items()
    }


def main(argv: list[str] | None = None) -> None:
    """Measure, and write the section."""
    arguments = bench.parser(__doc__ or "")
    arguments.add_argument("--model", default=AUTOENCODER, help="an autoencoder or its run")
    arguments.add_argument("--cache", default="data", help="folder of the datasets")
    arguments.add_argument("--folders", nargs="*", default=[], help="more images to restore")
    args = bench.parse(arguments, argv)
    bench.prepare()
    vae = load_autoencoder(args.model)
    if args.quick:
        config = DataConfig(source="shapes", resolution=16, cache=args.cache)
        kinds = {"shapes": load_splits(config)[0]}
        size = 16
    else:
        kinds = kinds_of_images(128, args.cache, args.folders)
        size = 128
    rows = psnr_rows(vae, kinds)
    milliseconds = times(vae, size, 2 if args.quick else REPEATS)
    name, psnr = rows[0][0], rows[0][2].value
    fastest = min((median(values), key) for key, values in milliseconds.items() if "decode" in key)
    goals = [
        target(f"PSNR in dB, {name}", psnr, GOAL_PSNR, form=".1f"),
        target(f"ms to decode an image ({fastest[1]})", fastest[0], GOAL_MS, at_least=False),
    ]
    head = ["images", "number", "PSNR in dB (95 %)", "seams before", "seams after"]
    speed = [[key, spread(values, ".1f")] for key, values in milliseconds.items()]
    bench.publish(
        args,
        __file__,
        argv,
        "Autoencoder",
        f"`{args.model}`, {size}x{size} pixels to {size // STRIDE}x{size // STRIDE} positions. "
        f"Seams: the gradient energy at the borders of {STRIDE}x{STRIDE} squares over that inside; "
        "1 is none.",
        "\n".join(goals),
        table(head, rows),
        table(["call", "ms per image"], speed),
    )


if __name__ == "__main__":
    main()
