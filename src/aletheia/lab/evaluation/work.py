"""The work of an evaluation: items of a task, answered batch by batch, then converted to rows.

Batches are those of a direct lm-eval run (longest first, upstream's order), so answers agree to the last digit. The
same holds for an evaluation that was interrupted.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from aletheia.data.templates import try_template
from aletheia.errors import EvaluationError
from aletheia.lab.evaluation.upstream import quiet, task_version

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.huggingface import HFLM

Row = dict[str, Any]
Score = Callable[
    [Sequence[Any], Sequence[str]], Sequence[bool]
]  # from documents and completions to whether they passed


class Work(Protocol):
    """One task of an evaluation. A position is the place of an item among the chosen ones."""

    name: str
    version: str
    num_fewshot: int
    items_available: int
    prompts_sha256: str

    def __len__(self) -> int:
        """The number of chosen items."""

    def batches(self) -> list[list[int]]:
        """Positions in batches, in the order of computation."""

    def answer(self, positions: Sequence[int]) -> list[Any]:
        """The model's answers to these items, as JSON values; the expensive part."""

    def rows(self, answers: Sequence[Any]) -> list[Row]:
        """A row per item from the answers to all items, in order."""


@dataclass(frozen=True)
class Item:
    """One document of one upstream task, with its requests. ``index`` is its place in the test split."""

    subject: str
    index: int
    sha256: str
    requests: "list[Instance]" = field(repr=False)


def chosen(available: int, limit: int | None) -> list[int]:
    """The indices of the items to use: all, or ``limit`` of them, evenly spaced and always the same."""
    if limit is None or limit >= available:
        return list(range(available))
    return [(2 * step + 1) * available // (2 * limit) for step in range(limit)]


def cut(order: Sequence[int], batch_size: int) -> list[list[int]]:
    """An order cut into batches."""
    return [list(order[start : start + batch_size]) for start in range(0, len(order), batch_size)]


def sha256_of(value: Any) -> str:
    """Hex sha256 of a JSON value; the order of keys does not count."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


class Benchmark:
    """An upstream task, or the 57 of MMLU, on the items that ``limit`` leaves, counted over all subjects.

    Raises:
        EvaluationError: ``chat`` is set and the tokenizer has no chat template.
    """

    def __init__(
        self,
        name: str,
        tasks: "dict[str, ConfigurableTask]",
        lm: "HFLM",
        limit: int | None = None,
        chat: bool = False,
        score: Score | None = None,
    ) -> None:
        """Build the requests; ``score`` runs HumanEval's programs."""
        if chat and not getattr(lm.tokenizer, "chat_template", None):
            raise EvaluationError("`chat` needs a chat template and this tokenizer has none; leave out `chat`")
        if chat:
            try_template(lm.tokenizer)
        self.name, self.version = name, task_version(name, tasks)
        self._tasks, self._lm, self._score = tasks, lm, score
        places = [(subject, index) for subject, task in tasks.items() for index in range(len(task.eval_docs))]
        self.items_available = len(places)
        taken = [places[at] for at in chosen(len(places), limit)]
        self._used = {subject: task for subject, task in tasks.items() if any(s == subject for s, _ in taken)}
        self.items: list[Item] = []
        for subject in self._used:
            self.items += self._requests(subject, [index for s, index in taken if s == subject], chat)
        self.num_fewshot = int(next(iter(tasks.values())).config.num_fewshot)
        self.prompts_sha256 = sha256_of([item.sha256 for item in self.items])
        self._kind = self.items[0].requests[0].request_type

    def __len__(self) -> int:
        """Items chosen."""
        return len(self.items)

    @property
    def samples(self) -> dict[str, list[int]]:
        """The chosen items as the ``samples`` argument of a direct lm-eval run."""
        found: dict[str, list[int]] = {}
        for item in self.items:
            found.setdefault(self._tasks[item.subject].task_name, []).append(item.index)
        return found

    def _requests(self, subject: str, indices: list[int], chat: bool) -> list[Item]:
        task = self._tasks[subject]
        with quiet():
            task.build_all_requests(
                samples=indices,
                apply_chat_template=chat,
                fewshot_as_multiturn=chat,
                chat_template=self._lm.apply_chat_template if chat else None,
                tokenizer_name=self._lm.tokenizer_name if chat else "",
            )
        requests: list[list[Instance]] = [[] for _ in indices]
        for request in task.instances:
            requests[request.doc_id].append(request)
        return [
            Item(subject, index, sha256_of([some[0].doc, [request.args for request in some]]), some)
            for index, some in zip(indices, requests, strict=True)
        ]

    def batches(self) -> list[list[int]]:
        """Upstream's order and batches; a text that is scored as a whole fills the context, so it is alone."""
        if self._kind == "loglikelihood_rolling":
            return cut(range(len(self)), 1)
        keys = [self._order_key(item) for item in self.items]
        return cut(sorted(range(len(self)), key=keys.__getitem__), int(self._lm.batch_size))

    def _order_key(self, item: Item) -> tuple[Any, ...]:
        context, what = item.requests[0].args
        if self._kind == "generate_until":
            return -len(self._lm.tok_encode(context)), context
        before, after = self._lm._encode_pair(context, what)
        tokens = before + after
        return -len(tokens), tuple(tokens)

    def answer(self, positions: Sequence[int]) -> list[Any]:
        """Log likelihoods [[nats, is greedy], ...], a log likelihood in nats, or a text, per item."""
        requests = [request for at in positions for request in self.items[at].requests]
        # upstream scores windows of a text in its own batches; one window of full length at a time is enough
        size, rolling = self._lm.batch_size_per_gpu, self._kind == "loglikelihood_rolling"
        self._lm.batch_size_per_gpu = 1 if rolling else size
        try:
            with quiet():
                found = iter(getattr(self._lm, self._kind)(requests, disable_tqdm=True))
        finally:
            self._lm.batch_size_per_gpu = size
        if self._kind == "loglikelihood":
            return [[list(next(found)) for _ in self.items[at].requests] for at in positions]
        return [next(found) for _ in positions]

    def rows(self, answers: Sequence[Any]) -> list[Row]:
        """Rows with upstream's filters and scoring; HumanEval's programs run in Aletheia's sandbox."""
        rows = [self._common(item, answer) for item, answer in zip(self.items, answers, strict=True)]
        if self.name == "humaneval":
            assert self._score is not None
            passes = self._score([item.requests[0].doc for item in self.items], answers)
            for row, passed in zip(rows, passes, strict=True):
                row["pass@1"] = float(passed)
            return rows
        for item, answer in zip(self.items, answers, strict=True):
            given = [tuple(pair) for pair in answer] if self._kind == "loglikelihood" else [answer]
            for request, response in zip(item.requests, given, strict=True):
                request.resps = [response]
        for task in self._used.values():
            task.apply_filters()
        for item, row in zip(self.items, rows, strict=True):
            row |= self._metrics(item)
        return rows

    def _common(self, item: Item, answer: Any) -> Row:
        task, doc = self._tasks[item.subject], item.requests[0].doc
        row: Row = {"task": self.name, "subject": item.subject, "item": item.index, "sha256": item.sha256}
        if self._kind == "loglikelihood_rolling":
            return row | {"tokens": len(self._lm.tok_encode(item.requests[0].args[0]))}
        row["prompt_tokens"] = len(self._lm.tok_encode(item.requests[0].args[0]))
        if self._kind == "generate_until":
            tokens = len(self._lm.tok_encode(answer, add_special_tokens=False))
            return row | {"prediction": answer, "target": str(task.doc_to_target(doc)), "tokens": tokens}
        choices, nats = task.doc_to_choice(doc), [pair[0] for pair in answer]
        return row | {
            "prediction": choices[nats.index(max(nats))],
            "target": choices[int(task.doc_to_target(doc))],
            "loglikelihoods": nats,
        }

    def _metrics(self, item: Item) -> Row:
        task, found = self._tasks[item.subject], {}
        for name in item.requests[0].filtered_resps:
            filtered = [request.filtered_resps[name] for request in item.requests]
            for metric, value in task.process_results(item.requests[0].doc, filtered).items():
                found[metric if name == "none" else f"{metric},{name}"] = value
        if self._kind != "loglikelihood_rolling":
            return {metric: float(value) for metric, value in found.items()}
        (nats, words), (_, size) = found["word_perplexity"], found["byte_perplexity"]
        return {"loss_sum": -nats, "words": words, "bytes": size}
