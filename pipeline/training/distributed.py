"""Start the processes of a training run and keep them in step."""

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    ProjectConfiguration,
    parse_flag_from_env,
)

from pipeline.config import AutoencoderConfig, Config, ConfigError
from pipeline.hardware import keep_freed_memory, mixed_precision, set_threads
from pipeline.runs.stop_signals import StopSignals

T = TypeVar("T")

# How long ranks wait for the one that prepares the data. torch's own limit is minutes.
PREPARE_TIMEOUT = timedelta(hours=12)
# How long ranks wait while the main process validates, samples and saves.
SAMPLE_TIMEOUT = timedelta(hours=2)


def start_accelerator(config: Config | AutoencoderConfig) -> Accelerator:
    """Start accelerate on the GPU if there is one, and set threads and precision.

    Raises ConfigError for a precision or a batch size that this machine cannot use.
    """
    # A CPU must be requested explicitly, or torchrun's ranks do not find each other.
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    device: Any = PartialState(cpu=cpu, timeout=SAMPLE_TIMEOUT).device
    precision = mixed_precision(config.train.precision, device)
    if precision == "fp16" and device.type == "cpu":
        raise ConfigError("train.precision must be auto, no or bf16 on a CPU, got fp16.")
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=precision,
        log_with=config.report_to,
        gradient_accumulation_steps=config.train.accumulation,
        # Trackers write to a folder of their own: a run may be called like another of its folders.
        project_config=ProjectConfiguration(str(config.folder), str(config.folder / "logs")),
        # Gradients live in DDP's buckets, without a second copy.
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
    set_threads(config.train.threads, accelerator)
    # Without the option accelerate exports "no".
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launcher not in ("no", precision):
        accelerator.print(
            f"accelerate's --mixed_precision {launcher} has no effect. Set train.precision instead."
        )
    keep_freed_memory()
    micro_batch = config.train.batch_size // config.train.accumulation
    if micro_batch % accelerator.num_processes:
        raise ConfigError(
            "train.batch_size / train.accumulation must be a multiple of the number of processes "
            f"({accelerator.num_processes}), got {micro_batch}."
        )
    return accelerator


@contextlib.contextmanager
def local_main_first(accelerator: Accelerator) -> Iterator[None]:
    """Run the block on each machine's first rank before the others, which wait PREPARE_TIMEOUT.

    accelerate's `local_main_process_first` waits as long as the default group, SAMPLE_TIMEOUT.
    """
    if accelerator.num_processes == 1:
        yield
        return
    group: Any = torch.distributed.new_group(backend="gloo", timeout=PREPARE_TIMEOUT)
    if not accelerator.is_local_main_process:
        torch.distributed.barrier(group)
    yield
    if accelerator.is_local_main_process:
        torch.distributed.barrier(group)


def for_this_rank(saved: list[T], accelerator: Accelerator) -> T:
    """Return this rank's entry of a list that a checkpoint saves with one entry a rank."""
    return saved[accelerator.process_index % len(saved)]


def any_rank_stopped(stop: StopSignals, accelerator: Accelerator) -> bool:
    """Return whether any rank has a stop request. All ranks get the same answer and exit code."""
    if accelerator.num_processes == 1:
        return bool(stop)
    mine = torch.tensor([stop.exit_code], device=accelerator.device)
    codes: Any = accelerator.gather(mine)
    code = int(codes.max())
    if code:
        stop.reason = stop.reason or "as another process"
        stop.exit_code = code
    # Not `stop` itself: a signal that arrives meanwhile counts for all ranks at the next step.
    return bool(code)
