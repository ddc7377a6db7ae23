"""What a process computes on."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path

import torch


def hardware(device: str) -> str:
    """What this process computes on, as far as it decides which kernels are used: processor, torch and Numba."""
    if device == "cuda":
        return f"{torch.cuda.get_device_name()} (torch {torch.__version__})"
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    kernels = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"
    return f"{model or platform.processor()} ({kernels}, numba {version('numba')})"
