"""``aletheia inspect``: the anatomy of a model, weights untouched."""

from aletheia.cli.options import JsonOption, ModelArgument, print_json, print_rich

EXAMPLE = "aletheia inspect Qwen/Qwen2.5-0.5B-Instruct"


def inspect(model: ModelArgument, as_json: JsonOption = False) -> None:
    """Show a model's layers and modules: role, shape, parameters, FLOPs. Reads the config alone."""
    from aletheia.anatomy.load import inspect as read
    from aletheia.reporting.anatomy import anatomy_view

    anatomy = read(model)
    if as_json:
        derived = [
            {"parameters": module.parameters, "flops_per_token": module.flops_per_token} for module in anatomy.modules
        ]
        found = anatomy.model_dump(mode="json")
        found["modules"] = [module | more for module, more in zip(found["modules"], derived, strict=True)]
        print_json(found)
    else:
        print_rich(anatomy_view(anatomy, model))
