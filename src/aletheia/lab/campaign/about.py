"""What a result was made with: code, packages and machine."""

import os
import platform
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import torch

from aletheia.files import package_versions

PACKAGES = ("aletheia-tune", "torch", "transformers", "peft", "accelerate", "datasets", "numpy", "lm-eval")


@cache
def about() -> dict[str, Any]:
    """Package versions, the machine and, if known, the commit of the code and whether it was changed since."""
    has_accelerator = torch.accelerator.is_available()
    return {
        "packages": package_versions(PACKAGES),
        "python": platform.python_version(),
        "commit": _git("rev-parse", "HEAD"),
        "is_dirty": bool(_git("status", "--porcelain")),
        "machine": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else str(_device(has_accelerator)),
    }


def _device(has_accelerator: bool) -> str:
    device = torch.accelerator.current_accelerator() if has_accelerator else None
    return device.type if device else "cpu"


def _git(*arguments: str) -> str | None:
    """Output of git in the folder of this code; None unless that folder is a checkout of it."""
    here = Path(__file__)
    output = ""
    for asked in (("ls-files", "--error-unmatch", here.name), arguments):  # the folder may be inside another project
        try:
            done = subprocess.run(["git", "-C", here.parent, *asked], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        if done.returncode != 0:
            return None
        output = done.stdout.strip()
    return output
