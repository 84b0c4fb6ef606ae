"""`python benchmarks/gpu.py FOLDER`: train and sample on a GPU, with random weights at real size.

It needs no downloads. Each row is a process of its own: images/s after a warm-up, and peak memory.
`--quick` runs every row on tiny networks, on any device.
"""

import argparse
import json
import string
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
)

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
IMAGES = 64
# row: (preset, settings beyond it)
LORA = ("sd15-lora", ["--train.lr_schedule", "constant", "--train.warmup", "0"])
ROWS = {
    "emoji": ("emoji-small", ["--data.held_out", "null"]),
    "SD 1.5 LoRA, checkpointed": LORA,
    "SD 1.5 LoRA": (LORA[0], [*LORA[1], "--train.gradient_checkpointing", "false"]),
    "SD 1.5 full, checkpointed": (
        "sd15-full",
        ["--train.batch_size", "4", "--train.accumulation", "1"],
    ),
}


def write_images(folder: Path, size: int) -> Path:
    """Write random images with captions as file names."""
    (folder / "train").mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for i in range(IMAGES):
        pixels = random.integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "train" / f"image {i}.png")
    return folder


def write_text_encoder(folder: Path) -> Path:
    """Write a random encoder of all-MiniLM-L6-v2's size."""
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *string.digits, "image"]
    size = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12}
    encoder = BertModel(BertConfig(vocab_size=30522, intermediate_size=1536, **size))
    encoder.save_pretrained(folder)
    vocab = {token: i for i, token in enumerate(tokens)}
    BertTokenizer(vocab=vocab, model_max_length=512).save_pretrained(folder)
    return folder


def write_stable_diffusion(folder: Path, quick: bool) -> Path:
    """Write Stable Diffusion 1.5's networks with random weights, in its own format."""
    tokens = [*string.printable[:94], *(c + "</w>" for c in string.printable[:94])]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(tokens)}
    end = {"bos_token_id": len(tokens) - 2, "eos_token_id": len(tokens) - 1}
    width, layers = (32, 1) if quick else (768, 12)
    text = CLIPTextConfig(
        vocab_size=len(tokens) if quick else 49408,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=layers,
        **end,
    )
    blocks = (32, 32) if quick else (320, 640, 1280, 1280)
    down = ["CrossAttnDownBlock2D"] * (len(blocks) - 1) + ["DownBlock2D"]
    unet = UNet2DConditionModel(
        sample_size=64,
        block_out_channels=blocks,
        down_block_types=down,
        up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * (len(blocks) - 1),
        cross_attention_dim=width,
        attention_head_dim=8,
    )
    levels = (32,) * 4 if quick else (128, 256, 512, 512)
    vae = AutoencoderKL(
        block_out_channels=levels,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        layers_per_block=2,
        latent_channels=4,
        scaling_factor=0.18215,
    )
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77),
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder, safe_serialization=True)
    return folder


def run_row(row: str, folder: Path, steps: int, quick: bool) -> None:
    """Train one row in this process and print its figures as JSON."""
    from pipeline.config import load
    from train_text2img import train

    preset, options = ROWS[row]
    size = 64 if preset == "emoji-small" or quick else 512
    base = ["--model.text_encoder", str(folder / "text_encoder")]
    if preset != "emoji-small":
        base = ["--model.pretrained", str(folder / "sd15")]
    name = row.replace(" ", "-").replace(",", "").replace(".", "")
    argv = ["--config", str(ROOT / "configs" / f"{preset}.yaml"), *options, *base]
    argv += ["--data.source", str(folder / f"images-{size}"), "--data.resolution", str(size)]
    argv += ["--data.held_out", "null", "--data.cache", str(folder / "cache")]
    argv += ["--name", name, "--output", str(folder / "runs"), "--train.steps", str(2 * steps)]
    argv += ["--train.warmup", "0", "--train.log_every", str(steps), "--sample.steps", "2"]
    argv += ["--train.save_every", "100000", "--train.validate_every", "100000"]
    config, _ = load(argv)
    assert train(config) == 0
    lines = (config.folder / "metrics.jsonl").read_text().splitlines()
    logged = [json.loads(line) for line in lines]
    last = [record for record in logged if record.get("images_per_s")][-1]
    found = {"images_per_s": last["images_per_s"], "batch": config.train.batch_size}
    if torch.cuda.is_available():
        found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    print("ROW " + json.dumps(found))


def sampling(folder: Path, quick: bool) -> list[str]:
    """Time the emoji model of the first row by batch and number of steps."""
    from pipeline import load_pipeline

    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = load_pipeline(folder / "runs" / "emoji").to(device)
    pipe.set_progress_bar_config(disable=True)
    lines = []
    for batch in (1,) if quick else (1, 4, 16):
        for steps in (4,) if quick else (4, 50):
            seconds = []
            for _ in range(4):
                began = time.perf_counter()
                pipe("image 1", w=1.0, num_inference_steps=steps, num_images_per_prompt=batch)
                seconds.append(time.perf_counter() - began)
            lines.append(f"| {batch} | {steps} | {1000 * sorted(seconds)[1]:.0f} |")
    return lines


def main() -> int:
    """Print a Markdown table of all rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="scratch space, 20 GB without --quick")
    parser.add_argument("--steps", type=int, default=20, help="timed steps, after as many others")
    parser.add_argument("--quick", action="store_true", help="tiny networks, two steps")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--row", choices=list(ROWS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    steps = 1 if args.quick else args.steps
    if args.row:
        run_row(args.row, args.folder, steps, args.quick)
        return 0
    for size in {64, 64 if args.quick else 512}:
        write_images(args.folder / f"images-{size}", size)
    write_text_encoder(args.folder / "text_encoder")
    write_stable_diffusion(args.folder / "sd15", args.quick)
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{name}, torch {torch.__version__}\n\n| row | batch | images/s | peak memory, GiB |")
    print("|---|---|---|---|")
    for row in args.rows:
        command = [sys.executable, __file__, str(args.folder), "--row", row]
        command += ["--steps", str(steps)] + (["--quick"] if args.quick else [])
        done = subprocess.run(command, capture_output=True, text=True)
        found = [line for line in done.stdout.splitlines() if line.startswith("ROW ")]
        if not found:
            print(f"| {row} | failed: {done.stderr.strip().splitlines()[-1:]} | | |", flush=True)
            continue
        figures = json.loads(found[0][4:])
        memory = f"{figures['peak_gib']:.1f}" if "peak_gib" in figures else "-"
        print(
            f"| {row} | {figures['batch']} | {figures['images_per_s']:.1f} | {memory} |", flush=True
        )
    print("\n| images at once | steps | ms |\n|---|---|---|")
    print("\n".join(sampling(args.folder, args.quick)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
