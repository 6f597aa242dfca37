"""What computes hidden states besides the model itself: packages, kernels, Aletheia's sources, the processor."""

import functools
import hashlib
from pathlib import Path

import torch

from aletheia.files import package_versions

PACKAGES = (
    *("aletheia-tune", "torch", "transformers", "peft", "accelerate", "bitsandbytes"),
    *("triton", "kernels", "flash-attn", "flash-linear-attention", "causal-conv1d", "mamba-ssm", "liger-kernel"),
)
SOURCES = ("adapters", "anatomy", "execution", "prefix")  # subpackages whose code may change a stored state


@functools.cache
def computing_versions() -> dict[str, str]:
    """Versions of everything that may change a stored state; Aletheia's also by the sha256 of its sources.

    So a state that another release computed is never reused, nor one from before an edit of these sources.
    """
    ours = sources_sha256(Path(__file__).parent.parent)
    return package_versions(PACKAGES) | {"torch build": str(torch.__version__), "sources": ours}


def sources_sha256(package: Path) -> str:
    """The sha256 of all sources under ``package`` that may change a stored state, names included."""
    digest = hashlib.sha256()
    for path in sorted(path for floor in SOURCES for path in (package / floor).rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def processor(device: torch.device) -> str:
    """The kind of processor of a device, whose kernels decide the last digits."""
    if device.type == "cuda":
        return f"cuda {torch.cuda.get_device_name(device)}"
    return f"cpu {torch.backends.cpu.get_cpu_capability()}" if device.type == "cpu" else device.type
