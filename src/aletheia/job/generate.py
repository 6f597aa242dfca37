"""Answers of a trained adapter, of its base for comparison, or of any model: prompts in, texts out."""

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from aletheia.anatomy.access import base_of, input_weight, stop_ids_of, text_config
from aletheia.anatomy.load import Loaded
from aletheia.anatomy.schema import DataIdentity
from aletheia.anatomy.settings import LoadSettings
from aletheia.data.contained import contained
from aletheia.data.encode import encode
from aletheia.data.examples import NO_LOSS, Example
from aletheia.data.rows import Row, Rows, load_rows
from aletheia.data.settings import DataSettings
from aletheia.data.stops import pad_id, stop_ids
from aletheia.data.templates import ChatTemplate, check_size, read_template, template_name, use_template
from aletheia.data.tokenizer import identify_tokenizer
from aletheia.errors import DataError, SettingsError
from aletheia.job.adapter import adapter_folder, base_settings
from aletheia.job.source import NOTE, load_as_asked
from aletheia.progress import Say, to_stderr
from aletheia.runs.answers import Answer, GenerateSettings
from aletheia.runs.saved import load_adapter, use_template_of
from aletheia.runs.schema import METRICS_FILE, Metrics
from aletheia.settings import LONGEST_ROW

PADDING = 3  # tokens in front of a prompt, to test whether the model ignores them
PLACEHOLDER = "."  # the answer of a row that is made of a prompt alone


@dataclass(frozen=True)
class Question:
    """A prompt: its tokens up to where the answer begins, and how it is shown."""

    where: str
    shown: str
    ids: tuple[int, ...]
    reference: str | None = None


def generate(
    model: str | Mapping[str, Any] | LoadSettings,
    prompts: str | Sequence[str] = (),
    data: str | Mapping[str, Any] | DataSettings | None = None,
    against: Literal["base"] | None = None,
    settings: Mapping[str, Any] | GenerateSettings | None = None,
    say: Say | None = None,
) -> list[Answer]:
    """Answer prompts or rows with a run's adapter, any PEFT adapter or a plain model.

    The same as ``aletheia generate``, with the same defaults. A prompt is a user turn in the model's chat template.
    For a run, its tokens are those that it would have in a training row. Without a chat template the model continues
    the prompt as plain text, unless the run learned from prompts and answers. Decoding is greedy by default. All else,
    such as a repetition penalty, is as in the model's generation config.

    Args:
        model: run folder, adapter folder, hub id, model folder or file, or :class:`aletheia.LoadSettings`.
        prompts: one prompt or several.
        data: rows whose last answer the model writes again, or :class:`aletheia.DataSettings`. A mapping without
            ``data`` only sets how prompts are written, such as ``chat_template``.
        against: ``base`` also gives the answers without the adapter; the model is loaded once.
        settings: :class:`aletheia.GenerateSettings`.
        say: receives a line for each phase; by default, lines go to stderr.

    Returns:
        An answer for each prompt, then one for each row, in their order.

    Raises:
        AletheiaError: one line with the cause.
    """
    how = model if isinstance(model, LoadSettings) else LoadSettings(**_section(model, "model"))
    chosen = settings if isinstance(settings, GenerateSettings) else GenerateSettings(**dict(settings or {}))
    prompts = (prompts,) if isinstance(prompts, str) else tuple(prompts)
    given = data.given() if isinstance(data, DataSettings) else _section(data, "data")
    asked = DataSettings(**{"data": "prompts"} | given)
    rows = load_rows(asked.data, asked.skip_unusable) if "data" in given else None
    if not prompts and rows is None:
        raise SettingsError("found neither a `prompt` nor `data`; expected at least one of them")
    folder = adapter_folder(how.model)
    if against is not None and folder is None:
        raise SettingsError(
            f"`against` is {against} and {how.model} is not an adapter folder; expected one, or no `against`"
        )
    output = say or to_stderr
    output(f"load   {how.model}")
    base = load_as_asked(how if folder is None else base_settings(how, folder))
    if folder is not None:
        use_template_of(folder, base.tokenizer)
    if asked.chat_template is not None:
        use_template(base.tokenizer, read_template(asked.chat_template))
    questions = [
        *_of_prompts(prompts, base, asked, _learned_answers(folder)),
        *_of_rows(rows, base, asked, chosen.limit, output),
    ]
    adapted: Any = base.model
    if folder is not None:
        adapted = load_adapter(base.model, folder, how.allow_pickle, identify_tokenizer(base.tokenizer))
    answering = Answering(adapted.eval(), base.tokenizer, chosen, output)
    answers = answering.answers(questions)
    if against is None:
        return [_answer(question, *one) for question, one in zip(questions, answers, strict=True)]
    others = answering.answers(questions, without_adapter=True)
    return [
        _answer(question, *one).model_copy(update={"base": other[0], "base_ended": other[1]})
        for question, one, other in zip(questions, answers, others, strict=True)
    ]


def _section(given: str | Mapping[str, Any] | None, name: str) -> dict[str, Any]:
    if given is None:
        return {}
    return dict(given) if isinstance(given, Mapping) else {name: given}


def _answer(question: Question, text: str, ended: bool) -> Answer:
    return Answer(where=question.where, prompt=question.shown, answer=text, ended=ended, reference=question.reference)


# --- prompts


def _learned_answers(folder: Path | None) -> bool:
    """Whether a run learned from prompts with answers, not from plain text; False if that is unknown."""
    if folder is None or not (folder / METRICS_FILE).is_file():
        return False
    data = Metrics.read(folder / METRICS_FILE).data
    return data is not None and data.form != "text"


def _of_prompts(prompts: Sequence[str], base: Loaded, asked: DataSettings, as_rows: bool) -> list[Question]:
    """Prompts as tokens: as in training rows with ``as_rows``, else in the chat template, else as plain text."""
    named = [(f"prompt {number}", prompt) for number, prompt in enumerate(prompts, start=1)]
    for where, prompt in named:
        if not prompt.strip():
            raise DataError(f"{where} is empty; expected some text")
    if not named:
        return []
    if not as_rows:
        texts = _opened(named, base, asked) if getattr(base.tokenizer, "chat_template", None) else None
        ids = (
            [_plain_ids(prompt, base) for prompt in prompts]
            if texts is None
            else [tuple(base.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
        )
        return [Question(where, prompt, one) for (where, prompt), one in zip(named, ids, strict=True)]
    rows = [
        Row(({"role": "user", "content": prompt}, {"role": "assistant", "content": PLACEHOLDER}), None, where)
        for where, prompt in named
    ]
    identity = DataIdentity(name="prompts", fingerprint="", form="messages", rows=len(rows))
    examples = _encoded(Rows(identity, tuple(rows)), base, asked.model_copy(update={"skip_unusable": False}))
    return [Question(where, prompt, _prompt_ids(examples[where])) for where, prompt in named]


def _opened(named: Sequence[tuple[str, str]], base: Loaded, asked: DataSettings) -> list[str]:
    """Prompts as user turns in the chat template, followed by the opening of an answer."""

    def work(pulse: Callable[[], None]) -> Iterator[str]:
        template = ChatTemplate(base.tokenizer, pulse, asked.template_date)
        for where, prompt in named:
            yield template.render([{"role": "user", "content": prompt}], True, where)

    name = template_name(base.tokenizer)
    check_size(base.tokenizer.chat_template, name)
    return list(contained(work, name))


def _plain_ids(prompt: str, base: Loaded) -> tuple[int, ...]:
    """The tokens of a text to continue, without the end token that some tokenizers append."""
    ids = list(base.tokenizer(prompt)["input_ids"])
    while len(ids) > 1 and ids[-1] == base.tokenizer.eos_token_id:
        ids.pop()
    return tuple(ids)


def _of_rows(rows: Rows | None, base: Loaded, asked: DataSettings, limit: int | None, say: Say) -> list[Question]:
    """Rows as prompts: all that precedes their last answer, with that answer as the reference."""
    if rows is None:
        return []
    rows = replace(rows, rows=rows.rows[:limit])
    if (text := next((row for row in rows.rows if row.messages is None), None)) is not None:
        raise DataError(f"{text.where} is plain text, without an answer; expected prompts and completions, or messages")
    examples = _encoded(rows, base, asked)
    if len(examples) < len(rows.rows):
        say(f"{NOTE}{len(rows.rows) - len(examples)} of {len(rows.rows)} rows are left out")
    questions = []
    for row in rows.rows:
        if row.where not in examples:
            continue
        assert row.messages is not None, "rows of plain text are refused above"
        last = max(at for at, message in enumerate(row.messages) if message["role"] == "assistant")
        before = row.messages[last - 1]["content"] if last else ""
        ids = _prompt_ids(examples[row.where])
        reference = str(
            row.messages[last]["content"] or base.tokenizer.decode(examples[row.where].input_ids[len(ids) :])
        )
        questions.append(Question(row.where, before, ids, reference))
    return questions


def _encoded(rows: Rows, base: Loaded, asked: DataSettings) -> dict[str, Example]:
    """Rows encoded as for training, by their place; never cut, since the answer is not read."""
    found = encode(
        rows,
        base.tokenizer,
        LONGEST_ROW,
        asked.skip_unusable,
        base.vocab_size,
        stop_ids_of(base.model),
        "last",
        asked.template_date,
    )
    return {example.where: example for example in found.examples}


def _prompt_ids(example: Example) -> tuple[int, ...]:
    """The tokens before the first one of the answer."""
    start = next(at for at, label in enumerate(example.labels) if label != NO_LOSS)
    return tuple(example.input_ids[:start])


# --- answers


@dataclass(frozen=True)
class Answering:
    """A model, with or without an adapter, that answers prompts in batches."""

    model: Any
    tokenizer: Any
    settings: GenerateSettings
    say: Say

    def answers(self, questions: Sequence[Question], without_adapter: bool = False) -> list[tuple[str, bool]]:
        """The text of each answer, and whether it ended by itself.

        Raises:
            DataError: a prompt fills all positions of the model.
        """
        found: dict[int, tuple[str, bool]] = {}
        name = "base" if without_adapter else "answer"
        off = self.model.disable_adapter() if without_adapter else nullcontext()
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        with off, torch.inference_mode(), torch.random.fork_rng(devices):
            torch.manual_seed(self.settings.seed)
            for batch in self._batches(questions):
                for at, ids in zip(batch, self._continued([questions[at] for at in batch]), strict=True):
                    found[at] = self._text(ids)
                self.say(f"{name:<6} {len(found)} of {len(questions)}")
        return [found[at] for at in range(len(questions))]

    def _batches(self, questions: Sequence[Question]) -> Iterator[list[int]]:
        """Positions of prompts to compute together: of similar length, or of equal length if padding matters."""
        order = sorted(range(len(questions)), key=lambda at: (len(questions[at].ids), at))
        alike = self.settings.batch_size == 1 or len({len(question.ids) for question in questions}) == 1
        padded = not alike and self._padding_is_hidden(questions[order[0]])
        batch: list[int] = []
        for at in order:
            fits = not batch or padded or len(questions[batch[0]].ids) == len(questions[at].ids)
            if len(batch) == self.settings.batch_size or not fits:
                yield batch
                batch = []
            batch.append(at)
        if batch:
            yield batch

    @cached_property
    def _stops(self) -> Collection[int]:
        return stop_ids(self.tokenizer, stop_ids_of(self.model), len(input_weight(self.model)))

    def _padding_is_hidden(self, question: Question) -> bool:
        """Whether padding in front of a prompt changes nothing; recurrent layers carry masked tokens along."""
        alone, behind = (self._generated([question], len(question.ids) + more, 1)[1] for more in (0, PADDING))
        noise = max(1e-4, 8 * torch.finfo(self.model.dtype).eps) * float(alone.abs().max())
        return float((alone - behind).abs().max()) <= noise

    def _continued(self, batch: Sequence[Question]) -> list[list[int]]:
        """The new tokens of each question."""
        longest = max(len(question.ids) for question in batch)
        return self._generated(batch, longest, self._room(batch, longest))[0]

    def _generated(self, batch: Sequence[Question], longest: int, room: int) -> tuple[list[list[int]], torch.Tensor]:
        """At most ``room`` new tokens of each question, padded on the left [B, T]; and the first logits [B, V]."""
        base: Any = base_of(self.model)
        stops = sorted(self._stops)
        pad = pad_id(self.tokenizer, len(input_weight(base)))
        ids_BT = torch.full((len(batch), longest), pad)
        mask_BT = torch.zeros_like(ids_BT)
        for row, question in enumerate(batch):
            ids_BT[row, longest - len(question.ids) :] = torch.tensor(question.ids)
            mask_BT[row, longest - len(question.ids) :] = 1
        config = copy.deepcopy(base.generation_config)
        config.update(
            max_new_tokens=room, max_length=None, eos_token_id=stops or None, pad_token_id=pad, use_cache=True
        )
        if self.settings.temperature > 0:
            config.update(do_sample=True, temperature=self.settings.temperature)
        else:  # transformers warns of settings that only count for sampling
            config.update(do_sample=False, temperature=None, top_p=None, top_k=None, min_p=None, typical_p=None)
        device = base.device
        made = base.generate(
            input_ids=ids_BT.to(device),
            attention_mask=mask_BT.to(device),
            generation_config=config,
            return_dict_in_generate=True,
            output_logits=room == 1,
        )
        return [row[longest:].tolist() for row in made.sequences], made.logits[0] if room == 1 else torch.empty(0)

    def _room(self, batch: Sequence[Question], longest: int) -> int:
        """Tokens that can still follow the longest prompt."""
        positions = getattr(text_config(base_of(self.model)), "max_position_embeddings", None) or -1
        if positions <= 0:
            return self.settings.max_new_tokens
        if longest >= positions:
            where = max(batch, key=lambda question: len(question.ids)).where
            raise DataError(
                f"{where}: the prompt has {longest:,} tokens; expected fewer than the model's {positions:,}"
            )
        return min(self.settings.max_new_tokens, positions - longest)

    def _text(self, ids: Sequence[int]) -> tuple[str, bool]:
        stops = set(self._stops)
        end = next((at for at, one in enumerate(ids) if one in stops), None)
        text: str = self.tokenizer.decode(ids[:end], skip_special_tokens=True)
        return text.strip(), end is not None
