"""What figures were measured on."""

import datetime
import importlib.metadata
import platform
import subprocess
from importlib.metadata import version

import torch

PACKAGES = ("torch", "triton", "jax", "jax-triton", "optax")
PACKAGES += ("liger-kernel", "quack-kernels", "flash-attn", "cut-cross-entropy", "tokamax")


def environment() -> dict:
    """GPU, driver, versions, date and commit."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU",
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()[0],
        "python": platform.python_version(),
        "versions": found,
        "date": datetime.date.today().isoformat(),
        "commit": _output("git", "rev-parse", "--short", "HEAD"),
    }


def _output(*command: str) -> str:
    """What a command prints, or "unknown" where it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() or "unknown"
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
