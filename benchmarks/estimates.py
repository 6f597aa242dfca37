"""The tables of docs/results/scale/README.md: four models on three machines, estimated from sizes.

.venv/bin/python benchmarks/estimates.py
"""

import torch
from transformers import AutoModelForCausalLM, DeepseekV3Config, LlamaConfig, Qwen2Config

from aletheia.anatomy.read import read_anatomy
from aletheia.anatomy.schema import Anatomy
from aletheia.planning.estimate import MACHINES, Job, estimate
from aletheia.probing.scores import WeightBytes

JOB = Job(rows=10_000, tokens_per_row=512, labelled_share=0.5, epochs=3, batch_size=4)
ITEM, RANK = 2, 16  # bfloat16
LAST = 0.25  # share of the layers that are adapted
MODELS = {
    "0.5B (Qwen2.5)": Qwen2Config(
        hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
        vocab_size=151936, tie_word_embeddings=True,
    ),
    "7B (Llama 2)": LlamaConfig(),
    "72B (Qwen2.5)": Qwen2Config(
        hidden_size=8192, intermediate_size=29568, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8,
        vocab_size=152064,
    ),
    "671B mixture (DeepSeek-V3)": DeepseekV3Config(),
}  # fmt: skip


def main() -> None:
    for name, config in MODELS.items():
        with torch.device("meta"):
            anatomy = read_anatomy(AutoModelForCausalLM.from_config(config))
        print("\n".join(table(name, anatomy, bool(config.tie_word_embeddings))))


def table(name: str, anatomy: Anatomy, tied: bool) -> list[str]:
    weights = WeightBytes(
        layers=tuple(ITEM * count for count in anatomy.layer_parameters),
        outside=ITEM * anatomy.embedding_parameters,
        embedding=0 if tied else ITEM * anatomy.embedding_parameters,
    )
    first = round(anatomy.layer_count * (1 - LAST))
    layers = range(first, anatomy.layer_count)
    ranks = {module.name: RANK for module in anatomy.adaptable()}
    total = ITEM * anatomy.parameters
    active = sum(module.flops_per_token / 2 for module in anatomy.modules)
    lines = [
        f"### {name}: {anatomy.parameters / 1e9:.1f}B parameters, {active / 1e9:.1f}B active in layers, {total / 1e9:,.0f} GB",
        "",
        "| machine | phase | memory | disk | read | time |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for machine in MACHINES:
        for phase in estimate(anatomy, weights, layers, ranks, JOB, machine, ITEM):
            fits = "" if phase.memory <= machine.memory else " (does not fit)"
            lines.append(
                f"| {machine.name} | {phase.name} | {phase.memory / 1e9:,.1f} GB{fits} | {phase.disk / 1e9:,.1f} GB | "
                f"{phase.read / 1e9:,.1f} GB | {human(phase.seconds)} |"
            )
    return [*lines, ""]


def human(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


if __name__ == "__main__":
    main()
