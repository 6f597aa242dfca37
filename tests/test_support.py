"""The support matrix of docs/reference/models.md says what the code does, family by family and option by option."""

import re
import shlex
from pathlib import Path

import pytest
from families import OTHERS, RARELY, SHARED, STATE_SPACE, UNSTORED, WRAPPERS
from test_packed import ROWS
from test_prefix import adapters_on
from tiny import FAMILIES, MORE_FAMILIES, make_model, make_tokenizer
from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

import aletheia
from aletheia.anatomy.read import read_anatomy
from aletheia.data.batches import collate
from aletheia.errors import ModelError
from aletheia.execution.packed import why_not_packed
from aletheia.probing.passes import check_passes

PAGE = (Path(__file__).parents[1] / "docs" / "reference" / "models.md").read_text()
COLUMNS = ("cache", "packed", "quantized", "streamed", "GGUF")
ROW = re.compile(r"^\| [^|`]+ \| `([\w-]+)` \| ((?:yes|no)(?: \| (?:yes|no|NF4)){4}) \|$", re.M)
SAYS = {family: dict(zip(COLUMNS, cells.split(" | "), strict=True)) for family, cells in ROW.findall(PAGE)}
IN_GGUF = {"gemma3_text": "gemma3"}  # architectures of other names there
EXCLUDED = re.findall(r"^\| `(--[^`]+)` \|", PAGE.split("### Options that exclude")[1].split("###")[0], re.M)


def of(column):
    return {family for family, cells in SAYS.items() if cells[column] == "yes"}


def test_the_matrix_has_every_family_that_is_tried():
    assert SAYS.keys() == {*FAMILIES, *MORE_FAMILIES, *STATE_SPACE, *OTHERS, *WRAPPERS}
    assert SAYS.keys() - of("cache") == set(UNSTORED)
    assert SAYS.keys() - of("streamed") == set(SHARED)
    assert of("GGUF") == {
        family
        for family in SAYS.keys() - WRAPPERS.keys()
        if IN_GGUF.get(family, family) in GGUF_SUPPORTED_ARCHITECTURES
    }


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[pytest.mark.slow] if name in RARELY else []) for name in SAYS]
)
def test_families_that_pack_do(family):
    model = make_model(family)
    half = read_anatomy(model).layer_count // 2
    assert (why_not_packed(adapters_on(model, half), ROWS, 0) is None) == (SAYS[family]["packed"] == "yes")


def learns(folder, kind, examples):
    """Whether a quantized base has gradients for its adapters; False where it is refused before the probe."""
    try:
        base = aletheia.load(str(folder), "float32", quantize=kind)
        check_passes(base.model, examples)
    except ModelError:
        return False
    batch = collate(ROWS[:2], 0)
    plan = aletheia.plan(aletheia.probe(base.model, [batch]), policy="last", percent=50, rank=4)
    model = aletheia.adapt(base.model, plan).train()
    model(**batch, use_cache=False).loss.backward()
    parts = [value.grad for name, value in model.named_parameters() if "lora_B" in name]
    found = [part for part in parts if part is not None]  # shared blocks of Zamba 2 hold parts for other layers
    return len(found) > len(parts) / 2 and sum(part.norm().item() for part in found) > 0


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=[] if name in ("llama", "falcon", "mamba", "deepseek_v3") else [pytest.mark.slow])
        for name in SAYS
    ],
)  # fmt: skip
def test_families_that_can_be_quantized_learn(family, kind, examples, tmp_path):
    make_model(family).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    assert learns(tmp_path, kind, examples) == (SAYS[family]["quantized"] in ("yes", kind.upper()))


@pytest.mark.parametrize("options", EXCLUDED)
def test_options_that_exclude_each_other_are_refused_before_anything_is_read(options, run):
    given = shlex.split(options)
    code, _, told = run("train", "no-such-model", "--data", "no-such-rows.jsonl", "--out", "run", *given)
    assert code == 2
    assert any(one in told for one in given if one.startswith("--")), told
    assert "no-such" not in told or "--fresh" in given


def test_there_are_options_that_exclude_each_other():
    assert len(EXCLUDED) > 12
