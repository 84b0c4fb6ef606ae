"""The machine that a process trains on: its cores, its memory, and the processes beside it."""

import contextlib
import ctypes
import os
import platform
import re

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def set_threads(chosen: int | None, accelerator: Accelerator) -> None:
    """Use every core that this process may: `accelerate launch` exports OMP_NUM_THREADS=1 on a CPU."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
    threads = chosen or max(available_cores() // local, 1)
    torch.set_num_threads(threads)
    accelerator.print(
        f"{accelerator.num_processes} process(es) on {accelerator.device}, {threads} CPU threads each, "
        f"mixed precision: {accelerator.mixed_precision}"
    )


def available_cores() -> int:
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


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that there is no memory: torch.OutOfMemoryError where there is one; MPS and cuDNN have none."""
    said = re.search("out of memory|allocate memory|ALLOC_FAILED", str(error).partition("\n")[0])
    return isinstance(error, torch.OutOfMemoryError) or said is not None


@contextlib.contextmanager
def skip_on_out_of_memory(what: object, advice: str = ""):
    """Skip a check or a drawing for which there is no memory or disk space, with a message: training itself fits and goes on."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        full = is_out_of_memory(error)
        if not full and not isinstance(error, OSError):
            raise
        tqdm.write(f"{what} is left out ({reason}){advice if full else ''}")


def pick_device(device: str | None, double: bool = False) -> str:
    """The device by name, or the fastest there is, `double` of those that compute in float64; ValueError for any other."""
    import torch
    from accelerate import PartialState

    if device is None:
        found = PartialState().device
        return "cpu" if double and found.type == "mps" else str(found)
    try:
        torch.zeros(1, device=device)
    except (
        RuntimeError,
        AssertionError,
    ) as error:  # torch's way to say that a device is unknown or not there
        raise ValueError(
            f"--device is {device}, expected one that this machine has: leave it out to use the fastest"
        ) from error
    if double and torch.device(device).type == "mps":
        raise ValueError("--device is mps, expected one that computes in float64: leave it out")
    return device


def has_bf16(device: torch.device) -> bool:
    """Whether a device multiplies in bfloat16 itself, and does not emulate it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    wide = torch.backends.cpu.get_cpu_capability().startswith(
        "AVX512"
    )  # ATEN_CPU_CAPABILITY may say less than the chip
    return device.type == "cpu" and wide and torch.cpu._is_avx512_bf16_supported()


def mixed_precision(choice: str, device: torch.device) -> str:
    """accelerate's `mixed_precision`: "auto" is bf16 where the device has it, fp16 on other CUDA cards, else no."""
    if choice != "auto":
        return choice
    return "bf16" if has_bf16(device) else "fp16" if device.type == "cuda" else "no"
