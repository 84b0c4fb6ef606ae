"""What the machine can do decides the precision."""

import os
import subprocess
import sys

import torch

from pipeline import hardware


def test_mixed_precision_is_bf16_where_cpu_kernels_have_it(monkeypatch):
    """ATEN_CPU_CAPABILITY is read once a process, so another process reports its effect."""
    capability = torch.backends.cpu.get_cpu_capability()
    code = "import torch; print(torch.backends.cpu.get_cpu_capability())"
    limited = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "ATEN_CPU_CAPABILITY": "avx2"},
        text=True,
        capture_output=True,
        check=True,
    ).stdout.strip()
    assert limited == "AVX2"
    has_kernels = torch.cpu._is_avx512_bf16_supported() and capability.startswith("AVX512")
    cpu = torch.device("cpu")
    assert hardware.mixed_precision("auto", cpu) == ("bf16" if has_kernels else "no")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: limited)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert hardware.mixed_precision("auto", cpu) == "no"
    assert hardware.mixed_precision("fp16", cpu) == "fp16"
