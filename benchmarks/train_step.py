"""`python benchmarks/train_step.py [--config FILE] [--batch 16 64]`: the training step beside the machine's own matmul rate.

Prints images/s, the step's FLOP/s as a share of a large matrix product's rate measured in the same run, and peak memory,
in bf16 where the CPU has it and without (the same program under ATEN_CPU_CAPABILITY=avx2).
"""

import argparse
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks import bench
from pipeline import hardware
from pipeline.config import DEFAULT, Config, load_file
from pipeline.diffusion import losses
from pipeline.hardware import keep_freed_memory
from pipeline.models import build
from pipeline.models.ema import build_ema
from pipeline.training.optimizers import build_optimizer

CAPTION_WIDTH = 384  # of the embedded encoder


def timed(call, repeats: int) -> float:
    """The median time of a call in seconds, after one to warm up."""
    call()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return median(times)


def step_of(config: Config, batch: int, bf16: bool, fused_attention: bool):
    """A training step on random latents and captions, as train_text2img.py takes it."""
    torch.manual_seed(0)
    unet = build.prepare_for_training(build.build_unet(config, CAPTION_WIDTH), torch.device("cpu"))
    if fused_attention:
        unet.set_attn_processor(AttnProcessor2_0())
    optimizer = build_optimizer(unet, config.train)
    ema = build_ema(unet, config.train.ema)
    scheduler = build.build_scheduler(config.diffusion)
    side, channels = unet.config.sample_size, unet.config.in_channels
    x_0, eps = torch.randn(2, batch, channels, side, side)
    captions = torch.randn(batch, config.data.caption_length, CAPTION_WIDTH)
    t = torch.randint(0, scheduler.config.num_train_timesteps, (batch,))

    def step():
        x_t = scheduler.add_noise(x_0, eps, t).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            output = unet(x_t, t, encoder_hidden_states=captions, return_dict=False)[0]
        losses.training_loss(
            scheduler, output.float(), x_0, eps, t, config.train.weighting, config.train.gamma
        ).mean().backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), config.train.clip)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(unet.parameters())

    return step, build.parameter_count(build.trainable_parameters(unet))


def measure(config: Config, batches: list[int], fused_attention: bool) -> None:
    """The table of one precision."""
    bf16 = hardware.has_bf16(torch.device("cpu"))
    dtype = torch.bfloat16 if bf16 else torch.float32
    print(
        f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads, {dtype}",
        flush=True,
    )
    for batch in batches:
        step, size = step_of(config, batch, bf16, fused_attention)
        with FlopCounterMode(display=False) as counter:
            step()
        seconds, rate = timed(step, 7), bench.matmul_rate(dtype)
        flops, memory = (
            counter.get_total_flops() / seconds,
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        )
        print(
            f"  batch {batch:3d}: {batch / seconds:6.1f} images/s, {flops / 1e9:5.0f} of {rate / 1e9:.0f} GFLOP/s "
            f"({flops / rate:.0%} of the matmul rate), {memory:.1f} GiB, {size / 1e6:.1f} M weights",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default=DEFAULT)
    parser.add_argument("--batch", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--alone", action="store_true", help="this precision only")
    parser.add_argument(
        "--stock-malloc",
        action="store_true",
        help="without what the script tells glibc, to compare",
    )
    parser.add_argument(
        "--fused-attention", action="store_true", help="torch's own attention kernel, to compare"
    )
    args = parser.parse_args()
    torch.set_num_threads(bench.cores())
    if not args.stock_malloc:
        keep_freed_memory()
    if args.alone:
        measure(load_file(args.config), args.batch, args.fused_attention)
        return
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}", flush=True)
    for more in (
        {},
        {"ATEN_CPU_CAPABILITY": "avx2"},
    ):  # a process each: a child's peak memory begins with its parent's
        subprocess.run(
            [sys.executable, __file__, "--alone", *sys.argv[1:]],
            env={**os.environ, **more},
            check=True,
        )


if __name__ == "__main__":
    main()
