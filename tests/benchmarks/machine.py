"""What a benchmark ran on, for the head of its output."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch
import transformers

from avl.kernels import backend_for

PROCESSOR_TIME = "processor time of all threads instead of elapsed time, for a busy machine"
"""What an option of this name does."""
CPUINFO = Path("/proc/cpuinfo")
INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
"""What decides how fast a processor multiplies float32 and bfloat16 numbers, as Linux names it."""


def environment(device: str = "cpu") -> dict[str, str]:
    """The device, and the versions and settings that times depend on."""
    return {
        "device": torch.cuda.get_device_name() if device != "cpu" else processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "instructions": instructions(),
        "kernels": backend_for(device),
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} cores",
        "load before": f"{os.getloadavg()[0]:.1f}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def processor() -> str:
    """The processor's name, as the system gives it."""
    lines = CPUINFO.read_text().splitlines() if CPUINFO.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def instructions() -> str:
    """Which of `INSTRUCTIONS` the processor has; "unknown" where the system does not say."""
    lines = CPUINFO.read_text().splitlines() if CPUINFO.exists() else []
    flags = (set(line.split(":", 1)[1].split()) for line in lines if line.startswith("flags"))
    found = next(flags, None)
    if found is None:
        return "unknown"
    return " ".join(name for name in INSTRUCTIONS if name in found) or "none of them"
