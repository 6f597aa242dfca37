"""An adapter for mlx-lm: ``adapters.safetensors`` and an ``adapter_config.json`` in mlx-lm's format.

mlx-lm adapts the same matrices in all of the last ``num_layers`` layers. A matrix without stored weights has B = 0, so
it changes nothing (``load_adapters`` in mlx_lm/tuner/utils.py, and mlx_lm/tuner/lora.py, in version 0.32).
"""

import json

from safetensors.torch import save_file

from aletheia.anatomy.load import inspect
from aletheia.errors import AdapterError
from aletheia.files import write_text
from aletheia.runs.exports.factors import read_factors
from aletheia.runs.exports.written import Task, Written, other_weights, shell

_AS_HERE = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "olmo2", "olmo3"),
    *("cohere", "cohere2", "stablelm", "starcoder2", "granite", "smollm3", "helium", "glm4"),
)
LAYERS = dict.fromkeys(_AS_HERE, "model.layers") | {"gpt2": "model.h", "gpt_neox": "model.h"}  # path in mlx-lm


def write_mlx(task: Task) -> Written:
    """Write the adapter at its largest rank with scale 1. In mlx-lm, A is in x rank and B is rank x out.

    Raises:
        AdapterError: it is not plain LoRA, fits only its quantized base, or its family is not supported.
        ModelError: the base's configuration cannot be read, or it is a GGUF file.
    """
    task.origin.check_fits_any_base()
    task.origin.check_no_gguf("mlx-lm reads")
    factors = read_factors(task.source, "mlx-lm", task.allow_pickle)
    anatomy = inspect(task.origin.base, task.trust_remote_code)
    if anatomy.model_type not in LAYERS:
        raise AdapterError(
            f"exporting the family {anatomy.model_type} to mlx-lm is not supported; expected one of "
            f"{', '.join(LAYERS)}; set `to` merged and convert that with mlx_lm.convert"
        )
    rank, lowest, keys, weights = factors.largest_rank, anatomy.layer_count, set(), {}
    for name, pair in factors.at(rank).items():
        layer, _, key = name.removeprefix(f"{anatomy.layer_path}.").partition(".")
        if not layer.isdigit() or int(layer) >= anatomy.layer_count:
            raise AdapterError(
                f"{task.source} adapts {name}, but {task.origin.base} has no such module; expected the base of the "
                "adapter; set `base` to it"
            )
        lowest = min(lowest, int(layer))
        keys.add(key)
        place = f"{LAYERS[anatomy.model_type]}.{layer}.{key}"
        weights[f"{place}.lora_a"] = pair.A_RI.T.contiguous()
        weights[f"{place}.lora_b"] = pair.B_OR.T.contiguous()
    save_file(weights, task.folder / "adapters.safetensors", metadata={"format": "mlx"})
    config = {
        "fine_tune_type": "lora",
        "model": task.origin.base,
        "num_layers": anatomy.layer_count - lowest,
        "lora_parameters": {"rank": rank, "scale": 1.0, "dropout": 0.0, "keys": sorted(keys)},
    }
    write_text(task.folder / "adapter_config.json", json.dumps(config, indent=2) + "\n")
    return Written(
        shell("mlx_lm.generate", "--model", task.origin.base, "--adapter-path", task.out, "--prompt", "..."),
        other_weights(task.origin),
    )
