"""A PEFT adapter folder with one rank and one alpha, for vLLM and other programs that read only those."""

from safetensors.torch import save_file

from aletheia.adapters.saved_config import SAFETENSORS
from aletheia.errors import AdapterError
from aletheia.runs.exports.factors import read_factors
from aletheia.runs.exports.written import Task, Written, copy_template, other_weights, shell

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # values of --max-lora-rank: MaxLoRARanks in vllm/config/lora.py


def write_vllm(task: Task) -> Written:
    """Write the adapter padded to the next rank of ``RANKS``, with each scale multiplied into its B.

    Raises:
        AdapterError: it is not plain LoRA, its rank is above all of ``RANKS``, or it fits only its quantized base.
    """
    task.origin.check_fits_any_base()
    factors = read_factors(task.source, "vLLM", task.allow_pickle)
    rank = next((rank for rank in RANKS if rank >= factors.largest_rank), None)
    if rank is None:
        raise AdapterError(
            f"{task.source} has rank {factors.largest_rank}; expected at most {RANKS[-1]} for vLLM; "
            "set `to` merged instead"
        )
    weights = {}
    for name, pair in factors.at(rank).items():
        weights[f"base_model.model.{name}.lora_A.weight"] = pair.A_RI
        weights[f"base_model.model.{name}.lora_B.weight"] = pair.B_OR
    save_file(weights, task.folder / SAFETENSORS, metadata={"format": "pt"})
    config = factors.config
    config.target_modules = sorted(factors.pairs)
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    config.r = config.lora_alpha = rank
    config.rank_pattern, config.alpha_pattern, config.use_rslora = {}, {}, False
    config.base_model_name_or_path, config.inference_mode = task.origin.base, True
    config.save_pretrained(str(task.folder))
    options = ["--enable-lora", "--max-lora-rank", rank, "--lora-modules", f"tuned={task.out}"]
    if template := copy_template(task):
        options += ["--chat-template", template]
    notes = [
        "request the model named tuned; vLLM supports adapters only for some model families, see its documentation"
    ]
    if task.origin.base.endswith(".gguf"):
        notes.append("vLLM's support for GGUF files is experimental; a model folder as `base` is safer")
    return Written(shell("vllm", "serve", task.origin.base, *options), (*notes, *other_weights(task.origin)))
