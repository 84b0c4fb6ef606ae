"""The machine: device, precision, CPU threads and memory."""

import contextlib
import ctypes
import os
import platform
import re
from collections.abc import Callable, Iterator

import psutil
import torch
from accelerate import Accelerator, PartialState
from tqdm.auto import tqdm

# Options of mallopt, from glibc's malloc.h.
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3


def set_threads(threads: int | None, accelerator: Accelerator) -> None:
    """Use all available cores, or `threads` per process, and print the set-up.

    `accelerate launch` sets OMP_NUM_THREADS=1 on a CPU, which halves the speed on two cores.
    """
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE") or accelerator.num_processes)
    threads = threads or max(available_cores() // local_processes, 1)
    torch.set_num_threads(threads)
    accelerator.print(
        f"{accelerator.num_processes} process(es) on {accelerator.device}, {threads} CPU threads "
        f"each, mixed precision: {accelerator.mixed_precision}"
    )


def available_cores() -> int:
    """Return how many CPU cores this process may use."""
    process = psutil.Process()
    # macOS has no affinity.
    if hasattr(process, "cpu_affinity"):
        return len(process.cpu_affinity())
    return os.cpu_count() or 1


def peak_memory_gib() -> dict[str, float]:
    """Return the most memory that this process and, if there is one, its GPU have used, in GiB."""
    # Windows reports the peak; elsewhere getrusage does, in KiB or, on macOS, in bytes.
    peak = getattr(psutil.Process().memory_info(), "peak_wset", None)
    if peak is None:
        import resource

        unit = 1 if platform.system() == "Darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    found = {"memory_gib": peak / 2**30}
    if torch.cuda.is_available():
        found["gpu_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return found


def keep_freed_memory() -> None:
    """Make glibc reuse freed memory, since returning it costs a page fault for every 4 KiB."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


def is_out_of_memory(error: Exception) -> bool:
    """Return True for out-of-memory errors, including the plain RuntimeErrors of MPS and cuDNN."""
    first_line = str(error).partition("\n")[0]
    pattern = "out of memory|allocate memory|ALLOC_FAILED"
    return isinstance(error, torch.OutOfMemoryError) or bool(re.search(pattern, first_line))


@contextlib.contextmanager
def skip_on_out_of_memory(what: object, advice: str = "") -> Iterator[None]:
    """Skip optional work that does not fit in memory or on disk, with a message."""
    with skip_on_failure(what, advice, lambda error: isinstance(error, OSError)):
        yield


@contextlib.contextmanager
def skip_on_failure(
    what: object, advice: str = "", expected: Callable[[Exception], bool] = lambda error: True
) -> Iterator[None]:
    """Skip optional work that fails, with a message: a figure must not end a run.

    advice: for want of memory. expected: which other errors are skipped.
    """
    try:
        yield
    except Exception as error:
        out_of_memory = is_out_of_memory(error)
        if not out_of_memory and not expected(error):
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        tqdm.write(f"Skipped {what}: {reason}{advice if out_of_memory else ''}")


def pick_device(device: str | None, double: bool = False) -> str:
    """Return the named device, or the fastest one; ValueError if it cannot be used.

    double: require a device that computes in float64.
    """
    if device is None:
        fastest = torch.device(str(PartialState().device))
        return "cpu" if double and fastest.type == "mps" else str(fastest)
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device} is not available. Omit it for the fastest.") from error
    if double and torch.device(device).type == "mps":
        raise ValueError("--device mps cannot compute in float64, which is needed here. Omit it.")
    return device


def has_bf16(device: torch.device) -> bool:
    """Return whether a device multiplies bfloat16 in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # ATEN_CPU_CAPABILITY may restrict torch to less than the processor has.
    avx512 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return device.type == "cpu" and avx512 and torch.cpu._is_avx512_bf16_supported()


def mixed_precision(choice: str, device: torch.device) -> str:
    """Return accelerate's `mixed_precision` for train.precision, resolving "auto"."""
    if choice != "auto":
        return choice
    if has_bf16(device):
        return "bf16"
    return "fp16" if device.type == "cuda" else "no"
