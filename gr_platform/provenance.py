"""Where a figure or a model comes from: the code's commit and the machine."""

import platform
import subprocess
from pathlib import Path

from gr_platform import settings

# What stands between a GPU and the processor of its machine.
BESIDE = "beside"


def git_commit() -> str | None:
    """Return the commit of the code, or None outside a repository."""
    command = ["git", "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, cwd=settings.PROJECT_ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def machine(device: str = "cpu") -> str:
    """Return the processor, usable cores, compute threads and Python of this machine in one line.

    device: where models compute; a GPU is named first.
    """
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    counts = {"core": settings.num_cores(), "compute thread": settings.num_threads()}
    threads = ", ".join(f"{count} {what}{'s' if count > 1 else ''}" for what, count in counts.items())
    line = f"{model}, {threads}, Python {platform.python_version()}"
    if device == "cpu":
        return line
    # Not at the top: most callers need no torch.
    import torch

    return f"{torch.cuda.get_device_name(device)} {BESIDE} {line}, torch {torch.__version__}"


def on_gpu(machine: str) -> bool:
    """Return whether a line of `machine` names a GPU."""
    return f" {BESIDE} " in machine
