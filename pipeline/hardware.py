"""The machine that a process trains on: its cores, its memory, and the processes beside it."""

import contextlib
import ctypes
import os
import platform
import re
from datetime import timedelta

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

PREPARING = timedelta(
    hours=12
)  # for which processes wait for the one that prepares the data; torch's own limit is minutes
DRAWING = timedelta(hours=2)  # and for the one that checks, draws and saves
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def set_threads(chosen: int | None, accelerator: Accelerator) -> None:
    """Use every core that this process may: `accelerate launch` exports OMP_NUM_THREADS=1 on a CPU."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
    threads = chosen or max(cores() // local, 1)
    torch.set_num_threads(threads)
    accelerator.print(
        f"{accelerator.num_processes} process(es) on {accelerator.device}, {threads} CPU threads each, "
        f"mixed precision: {accelerator.mixed_precision}"
    )


def cores() -> int:
    """How many CPU cores this process may use."""
    return (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    )  # macOS has no affinity


def keep_freed_memory() -> None:
    """Have glibc reuse what the last step freed: handed back to the kernel, it costs a page fault for every 4 KiB."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for option, size in ((M_MMAP_THRESHOLD, 1 << 30), (M_TRIM_THRESHOLD, (1 << 31) - 1)):
            libc.mallopt(option, size)


def of_memory(error: Exception) -> bool:
    """Whether an error says that there is no memory: torch.OutOfMemoryError where there is one; MPS and cuDNN have none."""
    said = re.search("out of memory|allocate memory|ALLOC_FAILED", str(error).partition("\n")[0])
    return isinstance(error, torch.OutOfMemoryError) or said is not None


@contextlib.contextmanager
def spared(what: object, advice: str = ""):
    """Skip a check or a drawing for which there is no memory or disk space, with a message: training itself fits and goes on."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        full = of_memory(error)
        if not full and not isinstance(error, OSError):
            raise
        tqdm.write(f"{what} is left out ({reason}){advice if full else ''}")


@contextlib.contextmanager
def local_main_first(accelerator: Accelerator):
    """accelerate's `local_main_process_first` with a longer limit, PREPARING: the default group waits DRAWING at most."""
    several, first = accelerator.num_processes > 1, accelerator.is_local_main_process
    group = torch.distributed.new_group(backend="gloo", timeout=PREPARING) if several else None
    if several and not first:
        torch.distributed.barrier(group)
    yield
    if several and first:
        torch.distributed.barrier(group)
