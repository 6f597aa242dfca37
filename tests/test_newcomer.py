"""Ten things that a newcomer does wrong with commands and files: each message says what to do instead.

The list was written before the messages were looked at. Each is one line with exit code 2, and nothing is lost.
"""

import json

import pytest
from conftest import count_rows

SMALL = ("--steps", 2, "--learning-rate", 0.01, "--max-length", 128)


def rows(*pairs: tuple[str, str]) -> str:
    return "".join(json.dumps({"question": question, "answer": answer}) + "\n" for question, answer in pairs)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model_folder, data_file):
    """Scores, a plan and a finished run of a tiny model."""
    from aletheia import Scores, fine_tune

    folder = tmp_path_factory.mktemp("finished")
    training = {"steps": 2, "learning_rate": 0.01}
    fine_tune(str(model_folder), {"data": str(data_file), "max_length": 128}, folder / "run", training=training)
    Scores.read(folder / "run" / "scores.json").write(folder / "scores.json")
    return folder


@pytest.fixture
def refuse(run, finished, model_folder, data_file, tmp_path):
    """Give a command that is refused, with the names of this folder; what it says."""
    (tmp_path / "model").symlink_to(model_folder)
    (tmp_path / "done").symlink_to(finished / "run")
    (tmp_path / "train.jsonl").write_text(data_file.read_text())
    for name, source in (("scores.json", "scores.json"), ("plan.json", "run/plan.json")):
        (tmp_path / name).write_text((finished / source).read_text())

    def call(command: str, *more: object) -> str:
        code, out, err = run(*command.split(), *more)
        assert (code, out) == (2, "")
        [line] = [line for line in err.splitlines() if line.startswith("error: ")]
        assert len(line) < 420
        return line.removeprefix("error: ")

    return call


def test_1_a_path_is_misspelt(refuse):
    line = refuse("train model --data trian.jsonl --out run")
    assert line.startswith("trian.jsonl: found no such file")
    assert line.endswith("did you mean train.jsonl?")
    assert refuse("train model --data trian.jsonl").startswith(
        "--out is missing; expected for example: aletheia train "
    )
    assert refuse("train modle --data train.jsonl --out run").endswith("did you mean model?")
    assert refuse("train model --data train.jsonl --out run --plan plna.json").endswith("did you mean plan.json?")
    assert refuse("plan score.json --out p.json").endswith("did you mean scores.json?")
    assert refuse("report don --out r.html").endswith("did you mean done?")
    assert "did you mean" not in refuse("train model --data xylophone.jsonl --out run")


def test_2_no_model_is_given(refuse):
    line = refuse("train --data train.jsonl --out run")
    assert line == (
        "MODEL is missing; expected for example: aletheia train Qwen/Qwen2.5-0.5B-Instruct --data train.jsonl --out "
        "run; see 'aletheia train --help'"
    )


def test_3_and_4_a_file_of_another_kind(refuse):
    for command, line in {
        "plan train.jsonl --out p.json": "train.jsonl holds rows of data; expected a scores file; to make them: "
        "aletheia probe MODEL --data train.jsonl --out scores.json",
        "plan plan.json --out p.json": "plan.json is a plan; expected a scores file; to train by it: aletheia train "
        "MODEL --data ROWS --plan plan.json --out RUN",
        "plan done --out p.json": "done is a run folder; expected a scores file; the run's scores are done/scores.json",
        "plan model --out p.json": "model holds a model; expected a scores file; to make them: aletheia probe model "
        "--data ROWS --out scores.json",
        "train model --data train.jsonl --out run --plan scores.json": "scores.json holds scores; expected a plan "
        "file; to make one from these: aletheia plan scores.json --out plan.json",
        "train model --data train.jsonl --out run --plan train.jsonl": "train.jsonl holds rows of data; expected a "
        "plan file; give rows as --data",
        "train model --data train.jsonl --out run --plan done": "done is a run folder; expected a plan file; the "
        "run's plan is done/plan.json",
        "train model --data plan.json --out run": "plan.json is a plan; expected rows of data; to train by it: "
        "aletheia train MODEL --data ROWS --plan plan.json --out RUN",
        "train model --data done --out run": "done is a run folder; expected rows of data; to see it: aletheia show "
        "done",
        "train model --data model --out run": "model holds a model; expected rows of data; to fine-tune it: aletheia "
        "train model --data ROWS --out RUN",
        "train --config plan.json --out run": "plan.json is a plan; expected a YAML file of settings; to train "
        "by it: aletheia train MODEL --data ROWS --plan plan.json --out RUN",
        "campaign run train.jsonl --out c": "train.jsonl holds rows of data; expected a YAML file that describes a "
        "campaign; to train on them: aletheia train MODEL --data train.jsonl --out RUN",
        "train --config done --out run": "done is a run folder; expected a YAML file of settings; the run's "
        "settings are done/config.yaml",
    }.items():
        assert refuse(command) == line


@pytest.mark.parametrize(
    ("option", "ours"),
    {
        "--epoch": "--epochs", "--lr": "--learning-rate", "--lora-r": "--rank", "--batch_size": "--batch-size",
        "--num-epochs": "--epochs", "--per-device-train-batch-size": "--batch-size", "--lora-alpha": "--alpha",
        "--per_device_train_batch_size": "--batch-size", "--max-seq-length": "--max-length",
        "--load-in-4bit": "--quantize nf4", "--output-dir": "--out",
        "--model": "the model without an option, as in: aletheia train MODEL",
        "--adam-beta2": "it as adam_beta2 under training in the file of --config",
    }.items(),
)  # fmt: skip
def test_5_an_option_has_another_name_here(refuse, option, ours):
    line = refuse("train model --data train.jsonl --out run", option, 2)
    assert line == f"No such option: {option}; expected {ours}; see 'aletheia train --help'"


def test_6_a_file_of_the_model_instead_of_its_folder(refuse):
    for file in ("model.safetensors", "config.json", "tokenizer.json"):
        line = refuse(f"train model/{file} --data train.jsonl --out run")
        assert line == (
            f"model/{file} is one file of a model; expected a hub id, a model folder or a .gguf file; give the model's "
            "folder, model"
        )
    line = refuse("train train.jsonl --data train.jsonl --out run")
    assert line.endswith("to train on them: aletheia train MODEL --data train.jsonl --out RUN")


def test_7_rows_in_a_form_that_is_not_read(refuse, tmp_path):
    (tmp_path / "notes.txt").write_text("one\n")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "object.json").write_text('{"question": "a", "answer": "b"}')
    (tmp_path / "other.json").write_text('{"colour": "red"}')
    (tmp_path / "columns.csv").write_text("id,colour\n1,red\n")
    for file, parts in {
        "notes.txt": ("notes.txt: found the suffix '.txt', expected one of .jsonl", "convert the file"),
        "empty.jsonl": ("empty.jsonl: found an empty file, expected rows",),
        "object.json": ("found 1 usable row", "expected at least 2"),
        "other.json": ("other.json:1: found the columns 'colour'; expected", "question, answer"),
        "columns.csv": ("columns.csv:2: found the columns 'id', 'colour'; expected", "prompt, completion", "rename"),
    }.items():
        line = refuse("train model --out run --data", file)
        assert all(part in line for part in parts), line


def test_8_a_settings_file_with_other_names(refuse, run, tmp_path):
    command = "train model --data train.jsonl --out run --config run.yaml"
    for text, words in {
        "training: {learning-rate: 2e-4}": "run.yaml: unknown setting training.learning-rate; expected learning_rate",
        "training: {lr: 2e-4}": "run.yaml: unknown setting training.lr; expected learning_rate",
        "plan: {lora_alpha: 16}": "run.yaml: unknown setting plan.lora_alpha; expected alpha",
        "plan: {batch_size: 2}": "run.yaml: unknown setting plan.batch_size; expected batch_size under training",
        "trainng: {steps: 2}": "run.yaml: unknown section trainng; expected perhaps training",
        "learning_rate: 2e-4": "run.yaml: unknown section learning_rate; expected learning_rate under training",
    }.items():
        (tmp_path / "run.yaml").write_text(text)
        assert refuse(command) == words
    (tmp_path / "run.yaml").write_text("training:\n  learning_rate: 2e-4\n  steps: 1\n")  # a text for many YAML readers
    code, out, err = run(*command.split(), "--json", "--max-length", 128)
    assert code in (0, 3), err
    assert json.loads(out)["settings"]["learning_rate"] == 2e-4


def test_9_the_run_folder_is_taken(refuse, run, tmp_path, model_folder):
    before = (tmp_path / "done" / "metrics.json").read_bytes()
    line = refuse("train model --data train.jsonl --out done --steps 3")
    assert line == "done holds a finished run; choose another --out, or replace it with --overwrite"
    assert (tmp_path / "done" / "metrics.json").read_bytes() == before
    (tmp_path / "file").write_text("mine")
    assert refuse("train model --data train.jsonl --out file").startswith("file is a file; expected a folder")


def test_10_a_path_of_another_kind_for_what_shows_and_measures(refuse, model_folder):
    for command, line in {
        "report plan.json --out r.html": "plan.json is a plan; expected the folder of a finished run; to train by it: "
        "aletheia train MODEL --data ROWS --plan plan.json --out RUN",
        "report done/metrics.json --out r.html": "done/metrics.json holds the metrics of a run; expected the folder of "
        "a finished run; give its folder, done",
        "show train.jsonl": "train.jsonl holds rows of data; expected a scores file, a plan file, "
        "a run folder or an adapter folder; to "
        "train on them: aletheia train MODEL --data train.jsonl --out RUN",
        "show nothing-there": "there is no nothing-there; expected a scores file, a plan file, a run folder "
        "or an adapter folder",
        "eval --out done": "done is a run folder; expected the folder of a finished evaluation; to see it: aletheia "
        "show done",
        "eval model --adapter plan.json --tasks mmlu --out X": "plan.json is a plan; expected a run folder or another "
        "adapter folder; to train by it: aletheia train MODEL --data ROWS --plan plan.json --out RUN",
        "eval done --out X": f"done is an adapter of the base model {model_folder}; expected the base as MODEL and the "
        f"adapter as an option: aletheia eval {model_folder} --adapter done ...",
    }.items():
        assert refuse(command) == line
    assert refuse("report plan.json").startswith("--out is missing; expected for example: aletheia report ")


def test_11_numbers_that_cannot_be(refuse):
    for option, value, words in (
        ("--steps", 0, "expected at least 1"), ("--epochs", 0, "expected more than 0"),
        ("--batch-size", 0, "expected at least 1"), ("--freeze-after", 2, "expected less than 1"),
        ("--steps", "two", "expected a whole number"),
    ):  # fmt: skip
        line = refuse("train model --data train.jsonl --out run", option, value)
        assert line == f"{option} is {value!r}; {words}"


def test_12_rows_that_teach_nothing(refuse, tmp_path):
    (tmp_path / "long.jsonl").write_text(rows(*[("what " * 100, "yes")] * 9))
    (tmp_path / "silent.jsonl").write_text(rows(*[("what", "")] * 9))
    line = refuse("train model --data long.jsonl --out run --max-length 64")
    assert line.startswith("long.jsonl:1: found the first of 9 rows, of 9, without a token to learn at --max-length 64")
    assert "raise --max-length" in line
    line = refuse("train model --data silent.jsonl --out run")
    assert line.startswith("silent.jsonl:1: found empty text in 'answer', expected text; fill in or remove the row")


def test_the_help_that_a_newcomer_sees_first(run):
    code, _, shown = run()
    assert code == 2
    assert shown.index("\n  train ") < shown.index("\n  probe ") < shown.index("\n  campaign ")
    assert "Example:\n  aletheia train " in shown
    assert run("--version")[1] == f"aletheia {__import__('aletheia').__version__}\n"
    assert run("trian", "model")[2].startswith("error: No such command 'trian'. Did you mean 'train'?")


def test_the_rows_of_these_tests_are_rows():
    assert len(rows(*[(row["question"], row["answer"]) for row in count_rows(3)]).splitlines()) == 3
