"""What a benchmark ran on, for the head of its output."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch
import transformers


def environment(device: str = "cpu") -> dict[str, str]:
    """The device, and the versions and settings that times depend on."""
    return {
        "device": torch.cuda.get_device_name() if device != "cpu" else processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} cores",
        "load before": f"{os.getloadavg()[0]:.1f}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def processor() -> str:
    """The processor's name, as the system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
