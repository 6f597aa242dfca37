"""The model card of a run: README.md of the adapter folder."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, not in its __all__

from aletheia.anatomy.foreign import ADAPTER_CONFIG, read_settings
from aletheia.errors import ModelError
from aletheia.names import markdown
from aletheia.planning.plan import Plan, layer_ranges
from aletheia.runs.schema import Run

TAGS = ("lora", "aletheia", "arxiv:2604.15351")  # the last one is the paper of the method


def card_metadata(base: str | None, more: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The front matter of a card, which the hub reads; ``base`` is a hub id."""
    known = {"base_model": base, "base_model_relation": "adapter"} if base else {}
    about = {"library_name": "peft", "pipeline_tag": "text-generation", "tags": list(TAGS)}
    return known | about | dict(more or {})


def is_hub_id(name: str) -> bool:
    """Whether a name is a hub id, rather than a local path or the name of a class."""
    is_elsewhere = os.path.exists(name) or name.endswith(".gguf") or not ("/" in name or name.islower())
    return not is_elsewhere and is_hub_name(name)


def is_hub_name(name: str) -> bool:
    """Whether the hub accepts a name for a repository."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def with_metadata(metadata: Mapping[str, Any], body: str) -> str:
    """A card: the front matter, then Markdown."""
    front = yaml.safe_dump(dict(metadata), sort_keys=False, width=10_000)
    return f"---\n{front}---\n\n{body}"


def model_card(run: Run, metadata: Mapping[str, Any] | None = None) -> str:
    """The card of a run in Markdown: what was adapted, how it was trained, and its losses.

    ``metadata`` replaces the front matter, for a base that has another name on the hub than in the run.
    """
    name = run.metrics.model.name
    return with_metadata(metadata or card_metadata(name if is_hub_id(name) else None), _body(run))


def _body(run: Run) -> str:
    metrics, plan = run.metrics, run.plan
    data = metrics.data.name if metrics.data else "batches made in Python"
    settings, name = metrics.settings, markdown(metrics.model.name)
    return f"""# LoRA on {len({adapter.layer for adapter in plan.adapters})} of {plan.layer_count} layers of {name}

Made with `aletheia-tune` {metrics.packages.get("aletheia-tune", "")}. A plan chose the adapted modules before training
(policy `{plan.settings.policy}`).

| | |
|---|---|
| base model | {markdown(str(metrics.model))} |
| data | {markdown(data)} |{_before(run)}
| adapted layers | {layer_ranges(plan.layers)}{_early(run)} |
| ranks | {plan.settings.ranks}, {_rank_range(plan)}{_scale(plan)} |
| trainable parameters | {plan.trainable_parameters:,} |
| steps x batch size | {metrics.steps} x {settings.batch_size} |
| kept | the adapter of step {metrics.kept_step or metrics.steps}{_averaged(run)}{_rescaled(run)} |
| learning rate | {settings.learning_rate:g} |
| held-out loss | {metrics.held_out_loss_before:.4f} before, {metrics.held_out_loss_after:.4f} after \
({metrics.held_out_rows} rows, {metrics.held_out_tokens:,} completion tokens) |
| training time | {metrics.seconds.train:.0f} s on {settings.device}, {settings.dtype}{_quantized(run)} |

`plan.json` names every adapted module with its rank and alpha; `metrics.json` holds the loss curves.

{_loading(run)}
"""


def _loading(run: Run) -> str:
    """Code that loads the model with the adapter; a base model that is an adapter folder is merged first."""
    loaded_by, name = run.metrics.settings.loaded_by, run.metrics.model.name
    lines = ["from peft import PeftModel", f"from transformers import {loaded_by}", ""]
    merged = _merged_into(name)
    lines.append(f"base = {loaded_by}.from_pretrained({_from_pretrained(merged or name)})")
    if merged is not None:
        lines.append(f"base = PeftModel.from_pretrained(base, {name!a}).merge_and_unload()")
    code = "\n".join([*lines, 'model = PeftModel.from_pretrained(base, "this folder")'])
    return f"```python\n{code}\n```"


def _merged_into(name: str) -> str | None:
    """The base model of the adapter folder that was merged before the run, if ``name`` is one."""
    config = Path(name) / ADAPTER_CONFIG
    try:
        found = read_settings(config).get("base_model_name_or_path") if config.exists() else None
    except (ModelError, OSError):  # changed, or a name that is not a path
        return None
    return found if isinstance(found, str) else None


def _quantized(run: Run) -> str:
    settings = run.metrics.settings
    if settings.quantization_corrected:
        kind = f"{settings.quantization}; half of each rank is a frozen correction of this, so it fits no other base"
        return f", base quantized ({kind})"
    return f", base quantized ({settings.quantization})" if settings.quantization else ""


def _before(run: Run) -> str:
    origin = run.metrics.went_on_from
    return f"\n| trained further from | {markdown(origin.name)} (sha256 {origin.sha256[:12]}) |" if origin else ""


def _averaged(run: Run) -> str:
    return ", weights averaged over the steps so far" if run.metrics.settings.averaging == "on" else ""


def _rescaled(run: Run) -> str:
    scale = run.metrics.kept_scale
    return f", at {scale:g} of its strength (every B is multiplied by this)" if scale != 1 else ""


def _early(run: Run) -> str:
    layers = run.plan.early_layers
    return f", and {layer_ranges(layers)} in the first {run.metrics.early_steps} steps" if layers else ""


def _from_pretrained(name: str) -> str:
    """Arguments that load the base model; a GGUF file takes its folder and its name."""
    path = Path(name)
    if path.suffix == ".gguf":
        return f"{str(path.parent)!a}, gguf_file={path.name!a}"
    return ascii(name)


def _scale(plan: Plan) -> str:
    """Scale and dropout, where they differ from plain LoRA."""
    dropout = f", dropout {plan.settings.dropout:g}" if plan.settings.dropout else ""
    return f"{', scaled as rsLoRA (alpha / sqrt(rank))' if plan.settings.rslora else ''}{dropout}"


def _rank_range(plan: Plan) -> str:
    ranks = [adapter.rank for adapter in plan.adapters]
    return f"rank {min(ranks)}" if min(ranks) == max(ranks) else f"ranks {min(ranks)} to {max(ranks)}"
