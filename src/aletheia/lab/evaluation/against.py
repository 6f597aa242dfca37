"""One evaluation against another, paired by item: forgetting, and extra forgetting. Torch-free."""

from aletheia.errors import EvaluationError
from aletheia.lab.evaluation.measures import differences
from aletheia.lab.evaluation.record import Comparison, Evaluated


def compare(this: Evaluated, other: Evaluated) -> Comparison:
    """How much worse ``this`` is than ``other`` on the tasks that both have; positive is worse.

    Against the base model, that is forgetting. Against another adapter, such as uniform LoRA, it is extra forgetting:
    the score of the base cancels out of (base - this) - (base - other), so it need not be evaluated.

    Raises:
        EvaluationError: they have no task in common, or differ in base model, tokenizer or items.
    """
    names = [task.name for task in this.evaluation.tasks if task.name in other.rows]
    if not names:
        raise EvaluationError(f"{this.path} and {other.path} have no task in common; evaluate both on the same `tasks`")
    if not this.evaluation.model.is_same_model(other.evaluation.model):
        raise EvaluationError(
            f"{this.path} evaluates {this.evaluation.model}, {other.path} {other.evaluation.model}; "
            "expected the same base model"
        )
    one, two = this.evaluation.tokenizer, other.evaluation.tokenizer
    if one.vocabulary != two.vocabulary:
        raise EvaluationError(
            f"{this.path} uses the tokenizer {one}, {other.path} uses {two}; expected the same tokenizer"
        )
    tasks = {}
    for name in names:
        _check_items(name, this, other)
        tasks[name] = differences(name, this.rows[name], other.rows[name])
    return Comparison(this=str(this.path), other=str(other.path), kind=kind(this, other), tasks=tasks)


def kind(this: Evaluated, other: Evaluated) -> str:
    """The name of the difference: forgetting, extra forgetting or difference."""
    adapted = this.evaluation.settings.adapter_sha256, other.evaluation.settings.adapter_sha256
    match adapted:
        case (str(), None):
            return "forgetting"
        case (str(), str()):
            return "extra forgetting"
    return "difference"


def _check_items(name: str, this: Evaluated, other: Evaluated) -> None:
    one, two = (
        {(row["subject"], row["item"]): row["sha256"] for row in evaluated.rows[name]} for evaluated in (this, other)
    )
    if one.keys() != two.keys():
        raise EvaluationError(
            f"{name}: {this.path} has {len(one)} items, {other.path} {len(two)}, {len(one.keys() & two.keys())} of "
            "them in common; expected the same items; use the same `limit`"
        )
    if changed := [place for place in one if one[place] != two[place]]:
        raise EvaluationError(
            f"{name}: {len(changed)} of {len(one)} items differ between {this.path} and {other.path} in their data or "
            "prompt; use the same data, `num_fewshot`, `chat` and `max_new_tokens`"
        )
