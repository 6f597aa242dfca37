"""Answers of an adapter beside those of its base, as transformers and PEFT give them."""

import io
import json
import shutil

import pytest
import torch
from families import STATE_SPACE
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import CHATML, FAMILIES, MORE_FAMILIES, make_model, make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

import aletheia
from aletheia.errors import DataError, SettingsError
from aletheia.job.generate import Answering, Question
from aletheia.runs.answers import GenerateSettings

PROMPTS = ["say red 3 times", "say", "say a much longer thing than all the others, please"]


def quiet(line):
    """No lines on stderr."""


def generate(model, prompts=(), data=None, against=None, **settings):
    told = {"model": str(model), "dtype": "float32"}
    return aletheia.generate(told, prompts, data, against, {"max_new_tokens": 12} | settings, say=quiet)


def save_model(folder, template=CHATML, **generation):
    """A tiny model that says something else after each prompt, with its tokenizer."""
    model = make_model(initializer_range=0.3)
    for name, value in generation.items():
        setattr(model.generation_config, name, value)
    model.save_pretrained(folder)
    make_tokenizer(chat_template=template).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """Such a model."""
    return save_model(tmp_path_factory.mktemp("model") / "m")


@pytest.fixture(scope="module")
def adapter(model_folder, tmp_path_factory):
    """A PEFT adapter that changes what the model says."""
    folder = tmp_path_factory.mktemp("adapter") / "a"
    base = aletheia.load(str(model_folder), "float32").model
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "down_proj"]))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def by_hand(model, tokenizer, prompt, **settings):
    """One prompt, alone, in transformers."""
    messages = [{"role": "user", "content": prompt}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    stop = tokenizer.eos_token_id
    made = model.generate(**ids, max_new_tokens=12, do_sample=False, eos_token_id=stop, pad_token_id=0, **settings)
    return tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def test_adapter_and_base_answer_as_peft_and_transformers_do(model_folder, adapter):
    found = generate(adapter, PROMPTS, against="base")
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    base = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    assert [answer.base for answer in found] == [by_hand(base, tokenizer, prompt) for prompt in PROMPTS]
    adapted = PeftModel.from_pretrained(base, adapter).eval()
    assert [answer.answer for answer in found] == [by_hand(adapted, tokenizer, prompt) for prompt in PROMPTS]
    assert any(answer.answer != answer.base for answer in found)
    named = zip(["prompt 1", "prompt 2", "prompt 3"], PROMPTS, strict=True)
    assert [(answer.where, answer.prompt) for answer in found] == list(named)
    assert len({answer.answer for answer in found} - {""}) == 3
    assert generate(model_folder, PROMPTS[0])[0].answer == found[0].base


QUESTIONS = [Question(str(n), "", tuple(range(65, 65 + n))) for n in (3, 9, 4, 9, 17)]


def answers_by(model, batch_size):
    settings = GenerateSettings(max_new_tokens=8, batch_size=batch_size)
    return Answering(model.eval(), make_tokenizer(), settings, quiet).answers(QUESTIONS)


@pytest.mark.parametrize("family", [*FAMILIES, *MORE_FAMILIES, "opt", "mpt", "llama4"])
def test_answers_in_a_batch_are_those_of_single_prompts(family):
    model = make_model(family)
    assert answers_by(model, 8) == answers_by(model, 1)


# in transformers itself RWKV answers otherwise in a batch of equal prompts, and a tiny xLSTM does not generate at all
@pytest.mark.parametrize("family", [family for family in STATE_SPACE if family not in ("rwkv", "xlstm")])
def test_recurrent_models_are_not_padded(family):
    model = make_model(family)
    assert answers_by(model, 8) == answers_by(model, 1)


def test_generation_stops_where_the_models_settings_say(model_folder, tmp_path):
    tokenizer = make_tokenizer()
    (whole,) = generate(model_folder, PROMPTS[2])
    end = next(char for char in whole.answer[1:] if char.isascii() and char not in whole.answer[:1])
    ids = [tokenizer.convert_tokens_to_ids(end), 257]
    (answer,) = generate(save_model(tmp_path / "m", eos_token_id=ids), PROMPTS[2])
    assert (answer.answer, answer.ended) == (whole.answer[: whole.answer.index(end)].strip(), True)
    (answer,) = generate(model_folder, PROMPTS[2], max_new_tokens=2)
    assert not answer.ended


def test_what_else_the_generation_config_says_counts(model_folder, tmp_path):
    (answer,) = generate(save_model(tmp_path / "m", repetition_penalty=5.0), PROMPTS[0])
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    assert answer.answer == by_hand(model, make_tokenizer(), PROMPTS[0], repetition_penalty=5.0)
    assert answer.answer != by_hand(model, make_tokenizer(), PROMPTS[0])


def test_drawn_answers_are_those_of_their_seed(model_folder):
    first, again, other = (generate(model_folder, PROMPTS, temperature=1.5, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    state = torch.random.get_rng_state()
    generate(model_folder, PROMPTS[0], temperature=1.0)
    assert torch.equal(state, torch.random.get_rng_state())


def test_rows_are_asked_up_to_their_last_answer(model_folder, tmp_path):
    turns = [("user", "first"), ("assistant", "one"), ("user", "second"), ("assistant", "two")]
    messages = [{"role": role, "content": content} for role, content in turns]
    (tmp_path / "rows.jsonl").write_text(2 * (json.dumps({"messages": messages}) + "\n"))
    found = generate(model_folder, data=str(tmp_path / "rows.jsonl"), limit=1)
    assert [(one.prompt, one.reference, one.base) for one in found] == [("second", "two", None)]
    assert found[0].where.endswith("rows.jsonl:1")
    tokenizer, model = make_tokenizer(), AutoModelForCausalLM.from_pretrained(model_folder)
    text = tokenizer.apply_chat_template(messages[:3], add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    made = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    assert found[0].answer == tokenizer.decode(made, skip_special_tokens=True).strip()


def test_without_a_chat_template_a_prompt_is_continued(tmp_path, data_file):
    save_model(tmp_path / "m", template=None)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path / "m"), make_tokenizer(chat_template=None)
    made = []
    for text in ("one two", "one two\n\n"):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        out = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=257, pad_token_id=0)
        made.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip())
    assert generate(tmp_path / "m", "one two")[0].answer == made[0]
    run = aletheia.fine_tune(
        {"model": str(tmp_path / "m"), "dtype": "float32"}, {"data": str(data_file), "max_length": 64},
        tmp_path / "run", {"policy": "last"}, {"steps": 1, "batch_size": 2, "evaluations": 1}, say=quiet,
    )  # fmt: skip
    assert generate(run.path, "one two", against="base")[0].base == made[1]  # as in the rows that it learned from


@pytest.mark.parametrize("file", ["chat_template.jinja", "tokenizer_config.json"])
def test_the_template_of_an_adapter_folder_counts(model_folder, adapter, tmp_path, file):
    folder = shutil.copytree(adapter, tmp_path / "a")
    template = CHATML.replace("<|im_start|>", "<|im_start|>the ")
    (folder / file).write_text(template if file.endswith("jinja") else json.dumps({"chat_template": template}))
    found, before = generate(folder, PROMPTS), generate(adapter, PROMPTS)
    assert [one.answer for one in found] != [one.answer for one in before]
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.chat_template = template
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), adapter).eval()
    assert found[0].answer == by_hand(adapted, tokenizer, PROMPTS[0])


def test_what_cannot_be_answered_is_said(model_folder, adapter, tmp_path):
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "one"}) + "\n")
    for error, words, call in (
        (SettingsError, "found neither a `prompt` nor `data`", lambda: generate(model_folder)),
        (
            SettingsError,
            "`against` is base and .* is not an adapter folder",
            lambda: generate(model_folder, "x", None, "base"),
        ),
        (
            DataError,
            "plain text, without an answer",
            lambda: generate(model_folder, data=str(tmp_path / "text.jsonl")),
        ),
        (DataError, "prompt 2 is empty", lambda: generate(model_folder, ["a", " \n"])),
        (DataError, "expected fewer than the model's 2,048", lambda: generate(model_folder, "word " * 500)),
        (SettingsError, "`temperature` is -1", lambda: generate(model_folder, "x", temperature=-1)),
    ):
        with pytest.raises(error, match=words):
            call()


def test_the_command_shows_answers_side_by_side_where_there_is_room(adapter, data_file, run, monkeypatch):
    asked = ("generate", adapter, "--dtype", "float32", "--max-new-tokens", 8)
    code, out, err = run(*asked, "--prompt", PROMPTS[0], "--against", "base")
    assert code == 0, err
    assert any("with the adapter" in line and "base alone" in line for line in out.splitlines())
    monkeypatch.setenv("COLUMNS", "50")
    code, out, _ = run(*asked, "--prompt", PROMPTS[0], "--against", "base")
    assert not any("with the adapter" in line and "base alone" in line for line in out.splitlines())
    assert max(map(len, out.splitlines())) <= 50
    code, out, _ = run(*asked, "--data", data_file, "--limit", 2, "--json")
    found = json.loads(out)
    assert [one["reference"] for one in found] == ["red", "blue"]
    assert [one["answer"] for one in found] == [
        one.answer for one in generate(adapter, data=str(data_file), limit=2, max_new_tokens=8)
    ]


def test_a_prompt_may_come_from_stdin(adapter, run, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(PROMPTS[2]))
    code, out, err = run("generate", adapter, "--prompt", PROMPTS[0], "--prompt", "-", "--json", "--max-new-tokens", 2)
    assert code == 0, err
    assert [one["prompt"] for one in json.loads(out)] == [PROMPTS[0], PROMPTS[2]]
