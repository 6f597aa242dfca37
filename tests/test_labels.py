"""Labels are what the user meant: twelve kinds of chat templates by eight forms of data, and each trap by itself."""

import json
import re
from collections.abc import Sequence
from datetime import date
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import CHATML
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from aletheia.anatomy.load import load
from aletheia.data.encode import NO_LOSS, Example, Examples, load_data
from aletheia.data.forms import Row
from aletheia.data.rows import load_rows
from aletheia.data.scripts import Scripts
from aletheia.data.settings import DataSettings
from aletheia.data.templates import ChatTemplate
from aletheia.errors import DataError
from aletheia.job.source import encode_for

SPECIAL = (
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<s>", "</s>", "<|begin|>", "<|start|>", "<|stop|>", "<|eot|>"),
    *("<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<turn>", "</turn>"),
)


def made_tokenizer(template: str | None, eos: str | None, bos: str | None = None, adds_bos: bool = False):
    """One token per byte, special tokens of many models, and the end token that is asked for."""
    vocabulary = {token: at for at, token in enumerate([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(list(SPECIAL))
    if adds_bos:
        raw.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, vocabulary[bos])])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=eos, bos_token=bos)
    tokenizer.chat_template = template
    return tokenizer


def each(body: str, opening: str, before: str = "") -> str:
    """A template that writes ``body`` for every message and ``opening`` in front of an answer to come."""
    return (
        f"{before}{{% for m in messages %}}{body}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ '{opening}' }}}}{{% endif %}}"
    )


ALTERNATE = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}{% endfor %}"
)
CALLS = (
    "{% if tools %}{{ '<|im_start|>system\n# Tools\n' }}{% for t in tools %}{{ t | tojson }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}"
)
CALLING = (
    "{{ '<|im_start|>' + m.role + '\n' + m.content }}{% for c in m.tool_calls %}"
    "{{ '<tool_call>' + c.function.name + ' ' + (c.function.arguments | tojson) + '</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}"
)
STRIPS = "{% set c = m.content.split('</think>')[-1] if m.role == 'assistant' else m.content %}"
EMPTY_THOUGHT = (
    "{% set c = m.content %}{% if m.role == 'assistant' %}{% set c = c.split('</think>')[-1].lstrip('\n') %}"
    "{% if loop.last %}{% set r = m.content.split('</think>')[0].split('<think>')[-1].strip('\n')"
    " if '</think>' in m.content else '' %}{% set c = '<think>\n' + r + '\n</think>\n\n' + c %}{% endif %}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + c + '<|im_end|>\n' }}"
)
# name -> template, end token, begin token, whether the tokenizer puts the latter in front of a text itself
TEMPLATES: dict[str, tuple[str | None, str, str | None, bool]] = {
    "chatml": (CHATML, "<|im_end|>", None, False),
    "chatml of a base model": (CHATML, "<|endoftext|>", None, False),
    "header": (
        each("{{ '<|start|>' + m.role + '<|stop|>\n\n' + m.content | trim + '<|eot|>' }}",
             "<|start|>assistant<|stop|>\n\n", "{{ bos_token }}"),
        "<|eot|>", "<|begin|>", True,
    ),
    "no system": (
        each("{{ '<turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim + '</turn>\n' }}",
             "<turn>model\n", "{{ bos_token }}" + ALTERNATE),
        "</turn>", "<s>", True,
    ),
    "instruction marks": (
        each("{{ '[INST] ' + m.content + ' [/INST]' if m.role == 'user' else ' ' + m.content + eos_token }}", "",
             "{{ bos_token }}" + ALTERNATE),
        "</s>", "<s>", True,
    ),
    "strips thoughts": (
        each(STRIPS + "{{ '<|' + ('assistant' if m.role == 'assistant' else 'user') + '|>' + c }}"
             "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}", "<|assistant|><think>\n", "{{ bos_token }}"),
        "<|endoftext|>", "<s>", True,
    ),
    "empty thought": (each(EMPTY_THOUGHT, "<|im_start|>assistant\n"), "<|im_end|>", None, False),
    "end token a turn": (
        each("{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}", "<|assistant|>\n"), "</s>", "<s>", True,
    ),
    "other end of turn": (
        each("{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}", "<|assistant|>"), "<|endoftext|>", None, False,
    ),
    "none": (None, "</s>", "<s>", True),
    "own system turn": (
        "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
        + CHATML,
        "<|im_end|>", None, False,
    ),
    "tools": (each(CALLING, "<|im_start|>assistant\n", CALLS), "<|im_end|>", None, False),
}  # fmt: skip


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


TOOL = {"type": "function", "function": {"name": "add_up", "parameters": {}}}
CALL = {"name": "add_up", "arguments": '{"left": 2}'}
# name -> a row, the answers that it teaches, the texts of its prompts
FORMS: dict[str, tuple[dict[str, object], Sequence[str], Sequence[str]]] = {
    "pair": ({"prompt": "What is 2+2?", "completion": "It makes four."}, ["It makes four."], ["What is 2+2?"]),
    "messages": (
        {"messages": [said("system", "Be kind."), said("user", "Who?"), said("assistant", "Ann did."),
                      said("user", "When?"), said("assistant", "At noon.")]},
        ["Ann did.", "At noon."], ["Be kind.", "Who?", "When?"],
    ),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Ann did."}]},
        ["Ann did."], ["Who?"],
    ),
    "system and history": (
        {"system": "Be kind.", "history": [["Who?", "Ann did."]], "instruction": "When?", "input": "",
         "output": "At noon."},
        ["Ann did.", "At noon."], ["Be kind.", "Who?", "When?"],
    ),
    "parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Who?"}]},
                      {"role": "assistant", "content": [{"type": "text", "text": "Ann did."}]}]},
        ["Ann did."], ["Who?"],
    ),
    "thoughts": (
        {"prompt": "What is 2+2?", "completion": "<think>\ntwo twice\n</think>\n\nIt makes four."},
        ["two twice", "</think>", "It makes four."], ["What is 2+2?"],
    ),
    "calls": (
        {"messages": [said("user", "Add up."), {"role": "assistant", "content": None, "tool_calls": [CALL]},
                      said("tool", "5"), said("assistant", "It is five.")], "tools": json.dumps([TOOL])},
        ["add_up", "It is five."], ["Add up."],
    ),
    "rendered": (
        {"text": "<s><|user|>Who?<|end|><|assistant|>Ann did.<|endoftext|>\n"}, ["Ann did."], [],
    ),
}  # fmt: skip
NAMED = ("not learned", "carry no loss", "only the last", "without it", "drops", "refuses", "tool calls")


def encoded(folder: Path, tokenizer, *rows: object, **settings) -> Examples:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return load_data(str(path), tokenizer, **settings)


def learned(example: Example, tokenizer) -> str:
    return tokenizer.decode([label for label in example.labels if label != NO_LOSS])


def is_named(notes: Sequence[str]) -> bool:
    return any(word in note for note in notes for word in NAMED)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_answers_are_learned_whole_and_prompts_are_not(tmp_path, name, form):
    template, eos, bos, adds_bos = TEMPLATES[name]
    tokenizer = made_tokenizer(template, eos, bos, adds_bos)
    row, answers, prompts = FORMS[form]
    if form == "calls" and name != "tools":
        with pytest.raises(DataError, match=r"tool calls|refuses"):  # a line that names what cannot be written
            encoded(tmp_path, tokenizer, row)
        return
    examples = encoded(tmp_path, tokenizer, row)
    (example,) = examples
    text = learned(example, tokenizer)
    lost = [answer for answer in answers if answer not in text]
    assert not lost or is_named(examples.notes), (text, examples.notes)
    assert not lost or name == "none"
    assert [label for label in example.labels if label != NO_LOSS][-1] == tokenizer.eos_token_id
    assert not [prompt for prompt in prompts if prompt in text], text
    assert all(prompt in tokenizer.decode(example.input_ids) for prompt in prompts)
    if bos is not None:
        assert example.input_ids.count(tokenizer.bos_token_id) <= 1


def test_every_answer_survives_all_templates_but_those_that_rewrite_earlier_ones(tmp_path):
    lost = set()
    for name, (template, eos, bos, adds_bos) in TEMPLATES.items():
        tokenizer = made_tokenizer(template, eos, bos, adds_bos)
        row, answers, _ = FORMS["messages"]
        text = learned(encoded(tmp_path, tokenizer, row)[0], tokenizer)
        lost |= {name for answer in answers if answer not in text}
    assert lost == {"none"}


parts = st.sampled_from(["a", " ", "\n", "é", "<", "think", "<think>", "</think>", "."])
texts = st.lists(parts, min_size=1, max_size=12).map("".join)


@given(texts.filter(str.strip), st.sampled_from([name for name in TEMPLATES if name != "none"]))
def test_no_text_of_an_answer_is_lost(answer, name):
    template, eos, bos, adds_bos = TEMPLATES[name]
    scripts = Scripts(ChatTemplate(made_tokenizer(template, eos, bos, adds_bos)), None)
    script = scripts.of(Row((said("user", "Q?"), said("assistant", answer)), None, "row 1"))
    text = "".join(text for text, _ in script.pieces)
    labelled = "".join(text for text, is_labelled in script.pieces if is_labelled)
    assert "".join(answer.split()) in "".join(text.split())
    assert "Q?" not in labelled
    if not answer.lstrip().startswith("<think>"):
        assert "".join(answer.split()) in "".join(labelled.split())


def published_templates() -> list[Path]:
    """The chat templates of many models that TRL brings along."""
    found = find_spec("trl")
    folder = Path(found.origin).parent / "chat_templates" if found and found.origin else Path("absent")
    return [path for path in sorted(folder.glob("*.jinja")) if not path.stem.endswith("_training")]


@pytest.mark.parametrize("form", ["pair", "messages", "system and history", "thoughts", "calls"])
def test_published_templates_learn_every_answer_or_name_what_is_lost(tmp_path, form):
    row, answers, prompts = FORMS[form]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    (made,) = load_rows(str(path)).rows
    marks = re.compile(r"<\|[^|<]*\|>|</s>|<end_of_turn>|<turn\|>")
    lost, refused = set(), set()
    templates = published_templates()
    if not templates:
        pytest.skip("TRL is not installed")
    for template in templates:
        scripts = Scripts(ChatTemplate(made_tokenizer(template.read_text(), "</s>", "<s>")), marks)
        try:
            script = scripts.of(made)
        except DataError:
            refused.add(template.stem)
            continue
        labelled = "".join(text for text, is_labelled in script.pieces if is_labelled)
        assert not [prompt for prompt in prompts if prompt in labelled], template.stem
        if [answer for answer in answers if answer not in labelled]:
            lost.add(template.stem)
    assert not lost
    assert not refused or form == "calls"  # models that call no tools


# --- the end ---------------------------------------------------------------------------------------------------


def test_an_end_of_turn_at_which_nothing_stops_is_followed_by_the_end_token_and_said_once(tmp_path):
    tokenizer = made_tokenizer(CHATML, "<|endoftext|>")
    row = {"question": "q", "answer": "a"}
    examples = encoded(tmp_path, tokenizer, row, row)
    assert learned(examples[0], tokenizer) == "a<|im_end|><|endoftext|>"
    (note,) = examples.notes
    assert "'<|im_end|>', where generation does not stop; '<|endoftext|>' is added" in note
    assert "(2 rows, first " in note


def test_an_end_of_turn_that_the_model_stops_at_is_enough(tmp_path):
    tokenizer = made_tokenizer(CHATML, "<|endoftext|>")
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    examples = encoded(tmp_path, tokenizer, {"question": "q", "answer": "a"}, stops=[stop])
    assert learned(examples[0], tokenizer) == "a<|im_end|>"
    assert "the tokenizer's own end token, '<|endoftext|>', is not learned" in examples.notes[0]


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_the_settings_of_the_model_beside_the_tokenizer_say_where_generation_stops(tmp_path, file):
    tokenizer = made_tokenizer(CHATML, "<|endoftext|>")
    tokenizer.name_or_path = str(tmp_path)
    (tmp_path / file).write_text(json.dumps({"eos_token_id": [2, tokenizer.convert_tokens_to_ids("<|im_end|>")]}))
    assert learned(encoded(tmp_path, tokenizer, {"question": "q", "answer": "a"})[0], tokenizer) == "a<|im_end|>"
    (tmp_path / file).write_text("{")
    text = learned(encoded(tmp_path, tokenizer, {"question": "q", "answer": "a"})[0], tokenizer)
    assert text == "a<|im_end|><|endoftext|>"


@pytest.mark.parametrize("template", [CHATML, None])
def test_a_model_that_cannot_learn_to_stop_is_named(tmp_path, template):
    row = {"question": "q", "answer": "a"}
    without = encoded(tmp_path, made_tokenizer(template, None), row)
    assert any("does not learn to stop" in note for note in without.notes)
    tokenizer = made_tokenizer(template, "<|endoftext|>")
    tokenizer.add_special_tokens({"eos_token": "[END]", "pad_token": "[PAD]"})
    beyond = encoded(tmp_path, tokenizer, row, vocab_size=tokenizer.vocab_size)
    assert any("does not learn to stop" in note for note in beyond.notes)
    assert max(beyond[0].input_ids) < tokenizer.vocab_size
    assert beyond.pad_token_id < tokenizer.vocab_size <= tokenizer.pad_token_id


def test_an_end_or_begin_token_that_the_text_holds_already_stands_once(tmp_path):
    tokenizer = made_tokenizer(CHATML, "<|im_end|>")
    examples = encoded(tmp_path, tokenizer, {"question": "q", "answer": "a<|im_end|>"})
    assert learned(examples[0], tokenizer) == "a<|im_end|>"
    assert any("the text contains special tokens, such as '<|im_end|>'" in note for note in examples.notes)
    tokenizer = made_tokenizer(None, "</s>", "<s>", adds_bos=True)
    for text in ("<s>a</s>", "a", "<s>a", "a</s>\n"):
        example = encoded(tmp_path, tokenizer, {"text": text})[0]
        assert learned(example, tokenizer) == "<s>a</s>"


def test_a_prompt_that_was_rendered_already_is_not_rendered_again(tmp_path):
    tokenizer = made_tokenizer(CHATML, "<|im_end|>")
    prompt = "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"
    examples = encoded(tmp_path, tokenizer, {"prompt": prompt, "completion": "Ann."})
    assert tokenizer.decode(examples[0].input_ids) == f"{prompt}Ann.<|im_end|>"
    assert learned(examples[0], tokenizer) == "Ann.<|im_end|>"
    assert any("taken as rendered" in note for note in examples.notes)


# --- what a template drops or adds -----------------------------------------------------------------------------


def test_thoughts_that_a_template_strips_are_learned_behind_its_generation_prompt(tmp_path):
    template, eos, bos, adds_bos = TEMPLATES["strips thoughts"]
    tokenizer = made_tokenizer(template, eos, bos, adds_bos)
    examples = encoded(tmp_path, tokenizer, FORMS["thoughts"][0])
    whole = tokenizer.decode(examples[0].input_ids)
    assert whole == ("<s><|user|>What is 2+2?<|assistant|><think>\ntwo twice\n</think>\n\nIt makes four.<|endoftext|>")
    assert learned(examples[0], tokenizer) == "two twice\n</think>\n\nIt makes four.<|endoftext|>"
    assert any("drops part of the answers" in note for note in examples.notes)


def test_a_thought_that_the_template_adds_is_named(tmp_path):
    tokenizer = made_tokenizer(TEMPLATES["empty thought"][0], "<|im_end|>")
    examples = encoded(tmp_path, tokenizer, FORMS["messages"][0])
    assert learned(examples[0], tokenizer) == "Ann did.<|im_end|><think>\n\n</think>\n\nAt noon.<|im_end|>"
    assert any("puts '<think>\\n\\n</think>' before answers" in note for note in examples.notes)


def test_a_system_turn_of_the_template_is_named_where_the_row_has_none(tmp_path):
    tokenizer = made_tokenizer(TEMPLATES["own system turn"][0], "<|im_end|>")
    examples = encoded(tmp_path, tokenizer, FORMS["pair"][0], FORMS["pair"][0])
    (note,) = examples.notes
    assert "adds its own system turn where there is none: 'You are helpful.' (2 rows, " in note
    assert encoded(tmp_path, tokenizer, FORMS["messages"][0]).notes == ()


@pytest.mark.parametrize("refusal", ["{{ raise_exception('no system') }}", ""])
def test_a_system_turn_that_the_template_refuses_or_drops_goes_in_front_of_the_first_user_turn(tmp_path, refusal):
    body = (
        "{% if m.role == 'system' %}"
        + refusal
        + "{% else %}{{ '<|' + m.role + '|>' + m.content + eos_token }}{% endif %}"
    )
    tokenizer = made_tokenizer(each(body, "<|assistant|>"), "</s>")
    examples = encoded(tmp_path, tokenizer, FORMS["messages"][0])
    assert tokenizer.decode(examples[0].input_ids).startswith("<|user|>Be kind.\n\nWho?</s><|assistant|>Ann did.</s>")
    assert learned(examples[0], tokenizer) == "Ann did.</s>At noon.</s>"
    assert ["system turns are put before" in note for note in examples.notes] == [True]


def test_roles_that_follow_each_other_and_are_refused_are_named(tmp_path):
    tokenizer = made_tokenizer(TEMPLATES["no system"][0], "</turn>", "<s>")
    row = {"messages": [said("user", "a"), said("user", "b"), said("assistant", "c")]}
    with pytest.raises(DataError, match=r"rows.jsonl:1: .*Roles must alternate.*join the user turns that follow"):
        encoded(tmp_path, tokenizer, row)


def test_fields_that_a_template_does_not_write_are_named(tmp_path):
    tokenizer = made_tokenizer(CHATML, "<|im_end|>")
    answer = {"role": "assistant", "content": "a", "reasoning_content": "since", "tool_calls": [CALL]}
    row = {"messages": [said("user", "q"), answer], "tools": [TOOL]}
    notes = "\n".join(encoded(tmp_path, tokenizer, row).notes)
    for part in ("the field 'reasoning_content'", "tool calls, such as 'add_up'", "the tools, such as 'add_up'"):
        assert part in notes
    body = "{{ m.content if m.role == 'assistant' else 'U' }}{{ eos_token }}"
    notes = "\n".join(encoded(tmp_path, made_tokenizer(each(body, ""), "</s>"), FORMS["pair"][0]).notes)
    assert "drops or changes the text of 'user' turns" in notes


def test_calls_are_written_as_objects_and_tools_reach_the_template(tmp_path):
    tokenizer = made_tokenizer(TEMPLATES["tools"][0], "<|im_end|>")
    examples = encoded(tmp_path, tokenizer, FORMS["calls"][0])
    assert '<tool_call>add_up {"left": 2}</tool_call><|im_end|>' in learned(examples[0], tokenizer)
    assert '"name": "add_up"' in tokenizer.decode(examples[0].input_ids)
    assert examples.notes == ()


# --- which answers ---------------------------------------------------------------------------------------------


def test_the_last_answer_alone_is_learned_on_request(tmp_path):
    tokenizer = made_tokenizer(CHATML, "<|im_end|>")
    examples = encoded(tmp_path, tokenizer, FORMS["messages"][0], train_on="last")
    assert learned(examples[0], tokenizer) == "At noon.<|im_end|>"


@pytest.mark.parametrize("flag", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"loss": False}])
def test_an_answer_of_weight_zero_is_context(tmp_path, flag):
    tokenizer = made_tokenizer(CHATML, "<|im_end|>")
    row = {
        "messages": [said("user", "q"), said("assistant", "bad") | flag, said("user", "r"), said("assistant", "good")]
    }
    examples = encoded(tmp_path, tokenizer, row)
    assert learned(examples[0], tokenizer) == "good<|im_end|>"
    assert "bad" in tokenizer.decode(examples[0].input_ids)
    assert any("answers of weight 0 are not learned" in note for note in examples.notes)
    row["messages"][3] |= flag
    with pytest.raises(DataError, match="no answer that carries a loss"):
        encoded(tmp_path, tokenizer, row)


def test_weights_between_are_named(tmp_path):
    tokenizer = made_tokenizer(CHATML, "<|im_end|>")
    row = {"messages": [said("user", "q"), said("assistant", "a") | {"weight": 0.5}], "weight": 0.25}
    notes = "\n".join(encoded(tmp_path, tokenizer, row).notes)
    assert "such as '0.5'" in notes
    assert "such as '0.25'" in notes


def test_the_function_gives_the_rows_of_the_command_which_says_each_note_once(model_folder, data_file):
    base = load(str(model_folder))
    lines: list[str] = []
    rows = load_rows(str(data_file))
    found = encode_for(base, rows, DataSettings(data=str(data_file), max_length=128), lines.append)
    assert found.examples == load_data(str(data_file), base.tokenizer, 128).examples
    assert lines == [f"note: {note}" for note in found.notes]


# --- answers and prompts that a template writes in more than one way ---------------------------------------------

CALLS_ALONE = (
    "{{ '<|im_start|>' + m.role + '\n' }}{% if m.tool_calls %}{{ 'call ' + m.tool_calls[0].function.name }}"
    "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}"
)


def test_a_tool_call_is_learned_where_the_template_drops_the_text_beside_it(tmp_path):
    tokenizer = made_tokenizer(each(CALLS_ALONE, "<|im_start|>assistant\n"), "<|im_end|>")
    answer = said("assistant", "I look it up.") | {"tool_calls": [CALL]}
    for later in ([], [said("tool", "5"), said("assistant", "Five.")]):
        examples = encoded(tmp_path, tokenizer, {"messages": [said("user", "q"), answer, *later]})
        text = learned(examples[0], tokenizer)
        assert text == "call add_up<|im_end|>" + ("Five.<|im_end|>" if later else "")
        assert any("such as 'I look it up.', which is not learned" in note for note in examples.notes)


ANALYSIS = (
    "{% if m.role == 'assistant' and m.thinking and (loop.last or messages[-1].role != 'assistant') %}"
    "{{ '<|start|>thought<|stop|>' + m.thinking + '<|end|>' }}{% endif %}"
    "{{ '<|start|>' + m.role + '<|stop|>' }}{{ m.tool_calls[0].function.name if m.tool_calls else m.content }}"
    "{{ '<|end|>' }}"
)
SYSTEM_LAST = (
    "{% if messages[0].role == 'system' %}{% set s = messages[0].content %}{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|user|>' }}{% if loop.last and s %}{{ s + '\n' }}{% endif %}"
    "{{ m.content + '<|end|>' }}{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)


def test_a_prompt_that_the_template_changes_once_it_is_answered_is_that_of_generation(tmp_path):
    tokenizer = made_tokenizer(each(ANALYSIS, "<|start|>"), "<|end|>")
    call = said("assistant", "") | {"thinking": "I need it.", "tool_calls": [CALL]}
    examples = encoded(
        tmp_path, tokenizer, {"messages": [said("user", "q"), call, said("tool", "5"), said("assistant", "Five.")]}
    )
    assert learned(examples[0], tokenizer) == (
        "thought<|stop|>I need it.<|end|><|start|>assistant<|stop|>add_up<|end|>assistant<|stop|>Five.<|end|>"
    )
    assert any("changes prompts once they are answered" in note for note in examples.notes)
    tokenizer = made_tokenizer(SYSTEM_LAST, "</s>")
    examples = encoded(tmp_path, tokenizer, FORMS["messages"][0])
    assert (
        tokenizer.decode(examples[0].input_ids)
        == "<|user|>Who?<|end|> Ann did.</s><|user|>Be kind.\nWhen?<|end|> At noon.</s>"
    )
    assert learned(examples[0], tokenizer) == " At noon.</s>"
    assert any("earlier assistant turns carry no loss" in note for note in examples.notes)


THINKS = (
    "{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{{ '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' }}{% endif %}{{ m.content + '<|im_end|>\n' }}"
)


@pytest.mark.parametrize("opening", ["<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n"])
def test_thoughts_are_not_doubled(tmp_path, opening):
    tokenizer = made_tokenizer(each(THINKS, opening), "<|im_end|>")
    examples = encoded(tmp_path, tokenizer, {"prompt": "q", "completion": "<think>\nsunny\n</think>\n\nyes"})
    text = tokenizer.decode(examples[0].input_ids)
    assert text.rstrip().endswith("assistant\n<think>\nsunny\n</think>\n\nyes<|im_end|>")
    assert learned(examples[0], tokenizer).endswith("sunny\n</think>\n\nyes<|im_end|>")
    assert not any("before answers" in note for note in examples.notes)


def test_an_empty_thought_that_is_opened_in_another_way_is_named_as_learned(tmp_path):
    body = THINKS.replace("'<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n'", "'<think></think>'")
    tokenizer = made_tokenizer(each(body, "<|im_start|>assistant\n<think>\n"), "<|im_end|>")
    examples = encoded(tmp_path, tokenizer, {"prompt": "q", "completion": "yes"})
    assert learned(examples[0], tokenizer) == "</think>yes<|im_end|>"
    (note,) = examples.notes
    assert "puts '</think>' before answers, which is learned" in note


def test_an_earlier_answer_without_its_thoughts_carries_no_loss_however_they_are_given(tmp_path):
    body = THINKS.replace("m.role == 'assistant' %}", "m.role == 'assistant' and loop.last %}", 1)
    tokenizer = made_tokenizer(each(body, "<|im_start|>assistant\n"), "<|im_end|>")
    messages = [said("user", "q"), said("assistant", "4"), said("user", "r"), said("assistant", "6")]
    thinking = [message | ({"reasoning_content": "Easy."} if at % 2 else {}) for at, message in enumerate(messages)]
    examples = encoded(tmp_path, tokenizer, {"messages": thinking})
    assert learned(examples[0], tokenizer) == "<think>\nEasy.\n</think>\n\n6<|im_end|>"
    assert any("earlier assistant turns carry no loss" in note for note in examples.notes)
    assert learned(encoded(tmp_path, tokenizer, {"messages": messages})[0], tokenizer).startswith("4<|im_end|>")


def test_calls_and_tools_that_are_dropped_are_named_though_the_text_says_their_name(tmp_path):
    tokenizer = made_tokenizer(CHATML, "<|im_end|>")
    answer = said("assistant", "I use add_up.") | {"tool_calls": [CALL]}
    row = {"messages": [said("user", "Call add_up."), answer], "tools": [TOOL]}
    notes = "\n".join(encoded(tmp_path, tokenizer, row).notes)
    for part in ("tool calls, such as 'add_up'", "the tools, such as 'add_up'"):
        assert part in notes


def test_tools_are_missed_though_the_generation_prompt_opens_a_thought(tmp_path):
    tokenizer = made_tokenizer(each(CALLING, "<|im_start|>assistant\n<think>\n"), "<|im_end|>")
    notes = "\n".join(encoded(tmp_path, tokenizer, FORMS["pair"][0] | {"tools": [TOOL]}).notes)
    assert "does not write the tools, such as 'add_up'" in notes


def test_a_system_turn_that_the_question_says_again_is_not_lost(tmp_path):
    body = "{% if m.role != 'system' %}{{ '<|' + m.role + '|>' + m.content + eos_token }}{% endif %}"
    tokenizer = made_tokenizer(each(body, "<|assistant|>"), "</s>")
    row = {"messages": [said("system", "Be kind."), said("user", "Be kind. Who?"), said("assistant", "Ann.")]}
    examples = encoded(tmp_path, tokenizer, row)
    assert tokenizer.decode(examples[0].input_ids).startswith("<|user|>Be kind.\n\nBe kind. Who?</s>")


def test_a_date_that_the_template_writes_is_that_of_the_settings_and_said(tmp_path):
    before = "{{ 'Today is ' + strftime_now(\"%d %b %Y\") + '<|end|>' }}"
    tokenizer = made_tokenizer(before + CHATML, "<|im_end|>")
    examples = encoded(tmp_path, tokenizer, FORMS["pair"][0], template_date=date(2024, 2, 29))
    assert tokenizer.decode(examples[0].input_ids).startswith("Today is 29 Feb 2024<|end|>")
    assert any("writes the date, '2024-02-29'; give another as `template_date`" in note for note in examples.notes)
    if_bare = "{% if messages[0].role != 'system' %}" + before + "{% endif %}"
    examples = encoded(tmp_path, made_tokenizer(if_bare + CHATML, "<|im_end|>"), FORMS["messages"][0])
    assert not any("writes the date" in note for note in examples.notes)
    assert any(date.today().isoformat() in note for note in encoded(tmp_path, tokenizer, FORMS["pair"][0]).notes)


# --- what stands around the turns ---------------------------------------------------------------------------------

PREAMBLE = (
    "{{ bos_token }}{% set s = messages[0].content + '\n' if messages[0].role == 'system' else '' %}"
    "{{ '<|system|>You know much until 2023.\n' + s + '<|end|>' }}{% for m in messages %}{% if m.role != 'system' %}"
    "{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def test_text_of_the_template_in_front_of_the_first_turn_is_named_with_and_without_a_system_turn(tmp_path):
    tokenizer = made_tokenizer(PREAMBLE, "<|end|>", "<s>", adds_bos=True)
    (note,) = encoded(tmp_path, tokenizer, FORMS["pair"][0]).notes
    assert "adds its own system turn where there is none: 'You know much until 2023.'" in note
    (note,) = encoded(tmp_path, tokenizer, FORMS["messages"][0]).notes
    assert "adds its own text to system turns: 'You know much until 2023.'" in note
    empty = "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\n<|im_end|>\n' }}{% endif %}" + CHATML
    (note,) = encoded(tmp_path, made_tokenizer(empty, "<|im_end|>"), FORMS["pair"][0]).notes
    assert "its own system turn where there is none: '<|im_start|>system" in note


@pytest.mark.parametrize("question", ["<|im_start|>user\nhi<|im_end|>\n", "<|im_start|>user\nhi<|im_end|>"])
@pytest.mark.parametrize("answer", ["<|im_start|>assistant\nyo<|im_end|>", "yo<|im_end|>", "yo"])
def test_a_rendered_prompt_without_an_opening_is_not_rendered_again(tmp_path, question, answer):
    tokenizer = made_tokenizer(CHATML, "<|im_end|>")
    examples = encoded(tmp_path, tokenizer, {"prompt": question, "completion": answer})
    whole = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>"
    assert tokenizer.decode(examples[0].input_ids) == whole
    assert learned(examples[0], tokenizer) == "yo<|im_end|>"
    assert any("taken as rendered" in note for note in examples.notes)


def test_rendered_marks_that_are_no_special_tokens_are_not_rendered_again(tmp_path):
    template, eos, bos, adds_bos = TEMPLATES["instruction marks"]
    tokenizer = made_tokenizer(template, eos, bos, adds_bos)
    for question in ("<s>[INST] hi [/INST]", "[INST] hi [/INST]"):
        examples = encoded(tmp_path, tokenizer, {"prompt": question, "completion": "yo"})
        assert tokenizer.decode(examples[0].input_ids) == "<s>[INST] hi [/INST]yo</s>"


def test_a_template_of_another_model_is_known_by_tokens_that_are_none_and_by_a_begin_token_that_is_missing(tmp_path):
    template = CHATML.replace("<|im_start|>", "<|header|>")
    tokenizer = made_tokenizer(template, "<|im_end|>", "<s>", adds_bos=True)
    notes = "\n".join(encoded(tmp_path, tokenizer, FORMS["pair"][0]).notes)
    assert "writes '<|header|>', which is not a token of the tokenizer" in notes
    assert "rows lack '<s>', which the tokenizer puts before text" in notes
    own = encoded(tmp_path, made_tokenizer(CHATML, "<|im_end|>"), {"prompt": "<|x|>", "completion": "a"})
    assert own.notes == ()


def test_earlier_answers_without_an_end_token_are_named(tmp_path):
    body = (
        "{{ '<|' + m.role + '|>' + m.content }}{% if loop.last and m.role == 'assistant' %}{{ eos_token }}{% endif %}"
    )
    tokenizer = made_tokenizer(each(body, "<|assistant|>"), "</s>")
    examples = encoded(tmp_path, tokenizer, FORMS["messages"][0])
    assert learned(examples[0], tokenizer) == "Ann did.At noon.</s>"
    assert any("earlier answers end with no token at which generation stops" in note for note in examples.notes)
