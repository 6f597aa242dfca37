"""Chat templates of files, and hostile ones: each is refused in a line, in seconds, at bounded memory; nothing runs."""

import json
import os
import resource
import signal
import time
from pathlib import Path

import pytest
from tiny import CHATML, make_tokenizer

import aletheia
from aletheia.data.contained import contained
from aletheia.data.encode import load_data
from aletheia.data.stops import with_valid_pad
from aletheia.data.templates import read_template, try_template
from aletheia.errors import DataError
from aletheia.runs.saved import use_template_of

TIMES = "{% set ns = namespace(x=3, y=1, t='a', l=[1]) %}"
HOSTILE = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "loops that write": "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
    "doubling": TIMES + "{% for a in range(60) %}{% set ns.t = ns.t ~ ns.t %}{% endfor %}{{ ns.t }}",
    "doubling of a list": TIMES + "{% for a in range(60) %}{% set ns.l = ns.l + ns.l %}{% endfor %}{{ ns.l }}",
    "a product": "{{ 'a' * 10000000000 }}",
    "a power": "{{ 10 ** (10 ** 8) }}",
    "a power in a condition": "{% if 10 ** (10 ** 8) > 1 %}{% endif %}",
    "digits": "{{ 1 | round(10000000000, 'floor') }}",
    "a long division": TIMES
    + "{% for a in range(26) %}{% set ns.x = ns.x * ns.x %}{% if a < 25 %}{% set ns.y = ns.x + 1 %}{% endif %}"
    "{% endfor %}"
    "{{ (ns.x // ns.y) > 1 }}",
    "recursion": "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "a recursive loop": "{% for a in [messages] recursive %}{{ loop([a]) }}{% endfor %}",
    "a format": "{{ '%9999999999d' | format(1) }}",
    "a wide text": "{{ 'a' | center(5000000000) }}",
    "endless prose": "{{ lipsum(n=100000000) }}",
    "a costly sort": TIMES
    + "{% for a in range(24) %}{% set ns.t = ns.t ~ ns.t %}{% endfor %}"
    "{{ ([ns.t ~ 'a', ns.t ~ 'b'] * 50000) | sort | length }}",
    "answers that grow": CHATML.replace("{{ message['content'] }}", "{{ message['content'] * 3000000 }}"),
    "a long template": "x" * 50_000_000,
    "parentheses": "{{ " + "(" * 100_000 + "1" + ")" * 100_000 + " }}",
    "no template": "{% for",
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "the system": "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}",
    "more of the system": "{{ lipsum.__globals__['os'].system('touch CANARY') }}",
    "a format of classes": "{{ '{0.__class__}'.format(messages) }}",
    "another file": "{% include '/etc/passwd' %}",
    "another module": "{% import '/etc/passwd' as p %}{{ p }}",
}  # fmt: skip
QUICK = ("doubling", "a product", "a power", "recursion", "a recursive loop", "a format", "answers that grow",
         "a long template", "parentheses", "no template", "classes", "the system", "more of the system",
         "a format of classes", "another file", "another module")  # fmt: skip


def rows_file(folder: Path) -> str:
    path = folder / "rows.jsonl"
    path.write_text(json.dumps({"question": "q", "answer": "a"}) + "\n")
    return str(path)


def check_refused(folder: Path, template: str) -> None:
    """The template is refused within 5 s and 2 GB, in one line, and nothing that it calls is run."""
    canary = folder / "canary"
    started = time.monotonic()
    with pytest.raises(DataError) as caught:
        load_data(rows_file(folder), make_tokenizer(template.replace("CANARY", str(canary))))
    assert time.monotonic() - started < 5
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 2_000_000  # in KB, of the largest child so far
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    assert "template" in message
    assert not canary.exists()


@pytest.mark.parametrize("name", QUICK)
def test_a_hostile_template_ends_quickly(tmp_path, monkeypatch, name):
    monkeypatch.setattr(contained, "__defaults__", (0.5, 300_000_000))  # less of both, so that the test is quick
    check_refused(tmp_path, HOSTILE[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTILE)
def test_every_hostile_template_ends_within_its_limits(tmp_path, name):
    check_refused(tmp_path, HOSTILE[name])


def test_a_template_is_tried_before_others_run_it():
    try_template(make_tokenizer())
    with pytest.raises(DataError, match="takes more than"):
        try_template(make_tokenizer(HOSTILE["a product"]))


def test_work_in_a_child_gives_its_results_in_order_and_its_own_errors():
    assert list(contained(lambda pulse: range(1000), "work")) == list(range(1000))

    def fails(pulse):
        yield 1
        raise DataError("the reason")

    results = contained(fails, "work")
    assert next(results) == 1
    with pytest.raises(DataError, match="the reason"):
        next(results)


def children() -> set[str]:
    """The ids of this process's children; other tests may have left some that run on."""
    return {pid for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()}


def test_a_child_that_dies_or_is_not_waited_for_leaves_nothing():
    def dies(pulse):
        os.kill(os.getpid(), signal.SIGKILL)
        yield 1

    before = children()
    with pytest.raises(DataError, match="work ended its process"):
        list(contained(dies, "work"))
    results = contained(lambda pulse: iter(int, 1), "work")
    next(results)
    results.close()
    assert children() == before


def test_slow_work_that_shows_signs_of_life_goes_on():
    def slow(pulse):
        for step in range(3):
            time.sleep(0.55)
            pulse()
            yield step

    assert list(contained(slow, "work", seconds=1.2)) == [0, 1, 2]


# --- templates of files ----------------------------------------------------------------------------------------


def test_a_template_is_read_from_each_kind_of_file(tmp_path):
    (tmp_path / "a.jinja").write_text(CHATML)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHATML}))
    several = [{"name": "other", "template": "x"}, {"name": "default", "template": CHATML}]
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": several}))
    for file in tmp_path.iterdir():
        assert read_template(file) == CHATML


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jinja", b" \n", "no chat template in it"),
        ("a.jinja", b"\xff", "not UTF-8"),
        ("a.jinja", b"x" * 1_000_001, "1.0 million characters"),
        ("a.json", b"{", "invalid JSON"),
        ("a.json", b"[]", "no chat template in it"),
        ("a.json", b'{"chat_template": 3}', "no chat template in it"),
    ],
)
def test_a_file_without_a_template_is_one_line(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=said):
        read_template(tmp_path / name)
    with pytest.raises(DataError, match="no such file"):
        read_template(tmp_path / "absent.jinja")


def test_a_run_uses_records_and_keeps_the_template_of_a_file(tmp_path, model_folder, data_file):
    template = tmp_path / "own.jinja"
    template.write_text(CHATML.replace("<|im_start|>", "<|im_start|>~"))
    lines: list[str] = []
    run = aletheia.fine_tune(
        str(model_folder), {"data": str(data_file), "chat_template": template, "max_length": 128}, tmp_path / "run",
        training={"steps": 1, "batch_size": 2, "cache": "off"}, say=lines.append,
    )  # fmt: skip
    assert str(template) in (run.path / "config.yaml").read_text()
    other = make_tokenizer()
    use_template_of(run.path, other)
    assert other.chat_template == template.read_text()


def test_a_pad_token_beyond_the_embedding_is_replaced(tmp_path):
    tokenizer = make_tokenizer()
    assert with_valid_pad(tokenizer, 259) is tokenizer
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    valid = with_valid_pad(tokenizer, 259)
    assert valid.pad_token == "<|im_end|>"
    assert tokenizer.pad_token == "[PAD]"
    assert with_valid_pad(tokenizer, 300) is tokenizer
