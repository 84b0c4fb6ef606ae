"""`python benchmarks/train_step.py [--batch 16 64]`: the training step's efficiency.

Prints images/s, the step's FLOP/s as a share of a large matrix product's rate in the same run, and
peak memory, in bf16 if the CPU has it and without (the same program with ATEN_CPU_CAPABILITY=avx2).
"""

import argparse
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks import bench
from pipeline import hardware
from pipeline.config import DEFAULT, Config, load_file
from pipeline.diffusion.losses import training_loss
from pipeline.models import build
from pipeline.models.ema import build_ema
from pipeline.training.optimizers import build_optimizer

CAPTION_WIDTH = 384  # of the included text encoder


def build_step(
    config: Config, batch: int, bf16: bool, fused_attention: bool
) -> tuple[Callable[[], None], int]:
    """Return a training step on random latents and captions, and the number of weights."""
    torch.manual_seed(0)
    unet = build.build_unet(config, CAPTION_WIDTH, build.build_autoencoder(config.model))
    build.prepare_for_training(unet, torch.device("cpu"))
    if fused_attention:
        unet.set_attn_processor(AttnProcessor2_0())
    train = config.train
    optimizer = build_optimizer(unet, train)
    ema = build_ema(unet, train.ema)
    scheduler = build.build_scheduler(config.diffusion)
    side = unet.config.sample_size
    x_0, eps = torch.randn(2, batch, unet.config.in_channels, side, side)
    captions = torch.randn(batch, config.data.caption_length, CAPTION_WIDTH)
    t = torch.randint(0, scheduler.config.num_train_timesteps, (batch,))

    def step() -> None:
        x_t = scheduler.add_noise(x_0, eps, t).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            output = unet(x_t, t, encoder_hidden_states=captions, return_dict=False)[0].float()
        losses = training_loss(scheduler, output, x_0, eps, t, train.weighting, train.gamma)
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), train.clip)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(unet.parameters())

    return step, build.parameter_count(build.trainable_parameters(unet))


def measure(config: Config, batches: list[int], fused_attention: bool) -> None:
    """Print the table of one precision."""
    bf16 = hardware.has_bf16(torch.device("cpu"))
    dtype = torch.bfloat16 if bf16 else torch.float32
    capability = torch.backends.cpu.get_cpu_capability()
    print(f"{capability}, {torch.get_num_threads()} threads, {dtype}", flush=True)
    for batch in batches:
        step, weights = build_step(config, batch, bf16, fused_attention)
        with FlopCounterMode(display=False) as counter:
            step()
        seconds = median(bench.in_turns({"step": step}, 7)["step"])
        rate = bench.matmul_rate(dtype)
        flops = counter.get_total_flops() / seconds
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(
            f"  batch {batch:3d}: {batch / seconds:6.1f} images/s, {flops / 1e9:5.0f} of "
            f"{rate / 1e9:.0f} GFLOP/s ({flops / rate:.0%} of the matmul rate), {memory:.1f} GiB, "
            f"{weights / 1e6:.1f} M weights",
            flush=True,
        )


def main() -> None:
    """Measure every precision in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--config", default=DEFAULT)
    add("--batch", type=int, nargs="+", default=[16, 32, 64])
    add("--alone", action="store_true", help="this precision only")
    add("--stock-malloc", action="store_true", help="let glibc return freed memory, to compare")
    add("--fused-attention", action="store_true", help="torch's own attention, to compare")
    args = parser.parse_args()
    torch.set_num_threads(bench.cores())
    if not args.stock_malloc:
        hardware.keep_freed_memory()
    if args.alone:
        measure(load_file(args.config), args.batch, args.fused_attention)
        return
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}", flush=True)
    # A child's peak memory begins with its parent's.
    for more in ({}, {"ATEN_CPU_CAPABILITY": "avx2"}):
        command = [sys.executable, __file__, "--alone", *sys.argv[1:]]
        subprocess.run(command, env={**os.environ, **more}, check=True)


if __name__ == "__main__":
    main()
