"""``aletheia inspect``: show the anatomy of a model without reading its weights."""

from aletheia.anatomy.settings import LoadSettings
from aletheia.cli.options import JsonOption, ModelArgument, print_json, print_rich
from aletheia.cli.settings_options import Given, from_settings

EXAMPLE = "aletheia inspect Qwen/Qwen2.5-0.5B-Instruct"


@from_settings(LoadSettings, leave_out=LoadSettings.model_fields.keys() - {"trust_remote_code"})
def inspect(model: ModelArgument, as_json: JsonOption = False, *, given: Given) -> None:
    """Show what a model is made of: layers, modules, shapes, parameters and FLOPs. Reads no weights."""
    from aletheia.anatomy.load import inspect as read
    from aletheia.reporting.anatomy import anatomy_view

    anatomy = read(model, LoadSettings(model=model, **given["model"]).trust_remote_code)
    if as_json:
        derived = [
            {"parameters": module.parameters, "flops_per_token": module.flops_per_token} for module in anatomy.modules
        ]
        found = anatomy.model_dump(mode="json")
        found["modules"] = [module | more for module, more in zip(found["modules"], derived, strict=True)]
        print_json(found)
    else:
        print_rich(anatomy_view(anatomy, model))
