"""Coordinate the processes of a training run."""

import contextlib
from datetime import timedelta

import torch
from accelerate import Accelerator

PREPARE_TIMEOUT = timedelta(
    hours=12
)  # for which processes wait for the one that prepares the data; torch's own limit is minutes
SAMPLE_TIMEOUT = timedelta(hours=2)  # and for the one that checks, draws and saves


@contextlib.contextmanager
def local_main_first(accelerator: Accelerator):
    """accelerate's `local_main_process_first` with a longer limit, PREPARING: the default group waits DRAWING at most."""
    several, first = accelerator.num_processes > 1, accelerator.is_local_main_process
    group = (
        torch.distributed.new_group(backend="gloo", timeout=PREPARE_TIMEOUT) if several else None
    )
    if several and not first:
        torch.distributed.barrier(group)
    yield
    if several and first:
        torch.distributed.barrier(group)
