"""The streamed probe and the streamed cache: what the whole model gives, from one that is never whole in memory."""

import copy
import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import torch
from families import OTHERS, SHARED, STATE_SPACE, WRAPPERS
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_families import StrangeBlock, StrangeConfig, StrangeModel, make
from tiny import FAMILIES, MORE_FAMILIES, make_config, make_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_outputs import CausalLMOutput

import aletheia
from aletheia.anatomy.checkpoint import Checkpoint
from aletheia.anatomy.device_memory import free_memory_bytes, growth_allowed
from aletheia.anatomy.fingerprint import identify
from aletheia.anatomy.read import find_layers
from aletheia.data.batches import collate
from aletheia.errors import CacheError, ModelError, ProbeError
from aletheia.prefix import fill_streamed as tuning_streamed
from aletheia.prefix.fill_streamed import fill_streamed, streamed_cache
from aletheia.probing import streamed
from aletheia.probing.streamed import peak_bytes, probe_streamed
from aletheia.training.train import Prepared

PAD = 0
AutoConfig.register("strange", StrangeConfig)
AutoModelForCausalLM.register(StrangeConfig, StrangeModel)


@pytest.fixture
def saved(tmp_path):
    """A function from a family to the folder of its tiny model, in shards."""

    def save(family, dtype=torch.float32, shard="40KB"):
        folder = tmp_path / family
        make(family).to(dtype).save_pretrained(folder, max_shard_size=shard)
        make_tokenizer().save_pretrained(folder)
        return folder

    return save


def same(streamed_scores, resident, rel=1e-5):
    assert streamed_scores.model == resident.model
    assert streamed_scores.layers == pytest.approx(resident.layers, rel=rel)
    assert streamed_scores.anatomy == resident.anatomy
    for name, score in resident.modules.items():
        assert streamed_scores.modules[name] == (None if score is None else pytest.approx(score, rel=rel, abs=1e-9))
    for name, stack in resident.experts.items():
        assert streamed_scores.experts[name].tokens == stack.tokens
        for norm, expected in zip(streamed_scores.experts[name].norms, stack.norms, strict=True):
            assert norm == (None if expected is None else pytest.approx(expected, rel=rel, abs=1e-9))


SEPARATE = tuple(
    family if family in ("mamba2", "mistral3", "openai-gpt") else pytest.param(family, marks=pytest.mark.slow)
    for family in (*STATE_SPACE, *OTHERS, *WRAPPERS)
    if family not in SHARED
)


@pytest.mark.parametrize("family", [*FAMILIES, *MORE_FAMILIES, "strange", *SEPARATE])
def test_scores_are_the_resident_ones(family, saved, examples):
    folder = saved(family)
    base = aletheia.load(str(folder), "float32")
    resident = aletheia.probe(base.model, examples, batches=3, batch_size=2)
    found = probe_streamed(Checkpoint(str(folder), "float32"), examples, 3, 2, show_progress=False)
    same(found, resident)
    assert found.probe.mean_loss == pytest.approx(resident.probe.mean_loss, rel=1e-6)
    assert found.data == resident.data


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_too(dtype, saved, examples):
    """Stored and computed in it; the norms carry its noise."""
    folder, name = str(saved("llama", dtype)), str(dtype).removeprefix("torch.")
    resident = aletheia.probe(aletheia.load(folder, name).model, examples, batches=2)
    found = probe_streamed(Checkpoint(folder, name), examples, 2, show_progress=False)
    same(found, resident, rel=2e-2)
    assert found.probe.dtype == name


def test_logits_in_parts_are_the_same(saved, examples, monkeypatch):
    folder = str(saved("gemma2"))
    whole = probe_streamed(Checkpoint(folder, "float32"), examples, 2, show_progress=False)
    monkeypatch.setattr(streamed, "LOGITS_AT_ONCE", 1000)
    parts = probe_streamed(Checkpoint(folder, "float32"), examples, 2, show_progress=False)
    same(parts, whole)
    assert parts.probe.mean_loss == pytest.approx(whole.probe.mean_loss, rel=1e-6)


@pytest.fixture
def reads(monkeypatch):
    """The parts in the order in which they are read."""
    order = []
    fill = Checkpoint._fill

    def spy(self, model, part, buffers=None):
        order.append(part)
        fill(self, model, part, buffers)

    monkeypatch.setattr(Checkpoint, "_fill", spy)
    return order


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])  # tied and untied
def test_every_layer_is_read_twice(family, saved, examples, reads):
    probe_streamed(Checkpoint(str(saved(family)), "float32"), examples, 2, show_progress=False)
    head = "embedding" if family == "llama" else "head"
    assert reads == ["around", "embedding", 0, 1, 2, 3, head, 3, 2, 1, 0]


@pytest.mark.parametrize("killed_at", range(1, 11))
def test_a_killed_probe_goes_on(killed_at, saved, examples, reads, monkeypatch, tmp_path):
    folder, work = str(saved("bloom")), tmp_path / "scores.json.partial"  # layers return tuples
    whole = probe_streamed(Checkpoint(folder, "float32"), examples, 2, show_progress=False)
    order = reads[1:]
    fill = Checkpoint._fill
    reads.clear()

    def kill(self, model, part, buffers=None):
        if len(reads) == killed_at:
            raise KeyboardInterrupt
        fill(self, model, part, buffers)

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoint, "_fill", kill)
        with pytest.raises(KeyboardInterrupt):
            probe_streamed(Checkpoint(folder, "float32"), examples, 2, work=work, show_progress=False)
    done = reads[1:]
    reads.clear()
    found = probe_streamed(Checkpoint(folder, "float32"), examples, 2, work=work, show_progress=False)
    assert found.layers == whole.layers
    assert found.modules == whole.modules
    assert found.model == whole.model
    assert len(done) + len(reads) <= len(order) + 3  # twice "around", and the two layers that were under way
    assert not work.exists()


def test_work_for_something_else_is_not_used(saved, examples, tmp_path, reads, monkeypatch):
    folder, work = str(saved("llama")), tmp_path / "work"
    with monkeypatch.context() as patched:
        patched.setattr(streamed, "_backward", lambda *given: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            probe_streamed(Checkpoint(folder, "float32"), examples, 2, work=work, show_progress=False)
    (folder_of_job,) = work.iterdir()
    reads.clear()
    other = probe_streamed(Checkpoint(folder, "float32"), examples, 2, seed=1, work=work, show_progress=False)
    assert reads == ["around", "embedding", 0, 1, 2, 3, "embedding", 3, 2, 1, 0]
    again = probe_streamed(Checkpoint(folder, "float32"), examples, 2, seed=1, show_progress=False)
    assert other.layers == again.layers
    assert list(work.iterdir()) == [folder_of_job]  # the other job's is left alone
    (folder_of_job / "states-2.safetensors").write_bytes(b"torn")  # a gap below what is there
    reads.clear()
    first = probe_streamed(Checkpoint(folder, "float32"), examples, 2, work=work, show_progress=False)
    assert reads == ["around", 1, 2, 3, 3, 2, 1, 0]
    assert first.layers == probe_streamed(Checkpoint(folder, "float32"), examples, 2, show_progress=False).layers
    assert not work.exists()


def test_one_layer_at_a_time_where_memory_is_short(saved, examples, monkeypatch):
    checkpoint = Checkpoint(str(saved("llama")), "float32")
    drawn = streamed.draw(examples, 2, 1, 0)
    alone, both = (peak_bytes(checkpoint, drawn, ahead=ahead) for ahead in (False, True))
    assert alone < both
    seen = []
    read_layers = Checkpoint.read_layers
    monkeypatch.setattr(
        Checkpoint, "read_layers", lambda self, order, ahead: seen.append(ahead) or read_layers(self, order, ahead)
    )
    for cap, ahead in ((alone, False), (both, True)):
        seen.clear()
        monkeypatch.setattr(streamed, "growth_allowed", lambda device, limit, cap=cap: cap)
        probe_streamed(checkpoint, examples, 2, show_progress=False)
        assert seen == [ahead, ahead]
    monkeypatch.setattr(streamed, "growth_allowed", lambda device, limit: alone - 1)
    with pytest.raises(ProbeError, match=r"needs .* GB for one layer"):
        probe_streamed(checkpoint, examples, 2, show_progress=False)


def test_a_limit_counts_the_process_itself():
    held = psutil.Process().memory_info().rss
    assert growth_allowed(torch.device("cpu"), held + 10**9) == pytest.approx(10**9, abs=10**8)
    assert growth_allowed(torch.device("cpu"), None) == pytest.approx(free_memory_bytes(), rel=0.2)


def test_nothing_of_a_layer_stays(saved, examples):
    checkpoint = Checkpoint(str(saved("llama")), "float32")
    probe_streamed(checkpoint, examples, 1, show_progress=False)
    held = [value for value in checkpoint.model.state_dict().values() if not value.is_meta]
    assert [value.numel() for value in held] == [32]  # the last norm
    assert all(value.is_meta for value in checkpoint._whole.parameters())


def damaged(folder, how):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    key = "model.layers.2.mlp.down_proj.weight"
    path = folder / index["weight_map"][key]
    tensors = load_file(path)
    match how:
        case "missing shard":
            path.unlink()
        case "truncated shard":
            path.write_bytes(path.read_bytes()[:-100])
        case "not a shard":
            path.write_bytes(b"<html>not found</html>")
        case "missing weight":
            del tensors[key]
        case "wrong shape":
            tensors[key] = tensors[key][:, :-1].contiguous()
        case "nan":
            tensors[key][0, 0] = torch.nan
        case "infinity":
            tensors[key][0, 0] = torch.inf
    if path.exists() and how in ("missing weight", "wrong shape", "nan", "infinity"):
        save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("missing shard", "lacks the shard"),
        ("truncated shard", "cannot read"),
        ("not a shard", "cannot read"),
        ("missing weight", "missing keys, first model.layers.2.mlp.down_proj.weight"),
        ("wrong shape", "32 x 47; expected 32 x 48"),
        ("nan", "down_proj.weight .* not finite"),
        ("infinity", "down_proj.weight .* not finite"),
    ],
)
def test_a_damaged_checkpoint_is_told_in_a_line(how, told, saved, examples):
    folder = saved("llama", shard="20KB")
    damaged(folder, how)
    with pytest.raises(ModelError, match=told) as caught:
        probe_streamed(Checkpoint(str(folder), "float32"), examples, 1, show_progress=False)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


class PeekingBlock(StrangeBlock):
    """Reads the embedding, or what the block before it gave beside its hidden states."""

    def forward(self, hidden_states, more):
        held = super().forward(hidden_states) + 0.1 * (0.0 if more is None else more)
        return held, held.mean(-1, keepdim=True)


class PeekingModel(StrangeModel):
    reads = "embedding"

    def __init__(self, config):
        super().__init__(config)
        self.tower.blocks = torch.nn.ModuleList(PeekingBlock(config.hidden_size) for _ in range(config.blocks))

    def forward(self, input_ids, attention_mask=None, labels=None, **kwargs):
        held = first = self.word_table(input_ids)
        more = None
        for block in self.tower.blocks:
            held, more = block(held, first if self.reads == "embedding" else more)
        logits = self.out(held)
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size)
        return CausalLMOutput(loss=loss, logits=logits)


@pytest.mark.parametrize("reads", ["embedding", "block before"])
def test_layers_that_read_more_than_hidden_states_are_refused(reads, saved, examples, tmp_path, monkeypatch):
    folder = str(saved("strange"))
    monkeypatch.setattr(PeekingModel, "reads", reads)
    monkeypatch.setitem(AutoModelForCausalLM._model_mapping._extra_content, StrangeConfig, PeekingModel)
    with pytest.raises(ModelError, match=r"layer \d of PeekingModel reads more than the hidden states"):
        probe_streamed(Checkpoint(folder, "float32"), examples, 1, show_progress=False)
    checkpoint = Checkpoint(folder, "float32")
    cache = streamed_cache(checkpoint, 2, tmp_path / "cache")
    with pytest.raises(ModelError, match="reads more than the hidden states"):
        fill_streamed(checkpoint, 2, examples.examples[:2], cache, 2, PAD, show_progress=False)


def test_a_head_that_is_tied_and_stored_otherwise_is_refused(saved):
    """transformers leaves the two apart then; tying them would change every score."""
    folder = saved("llama", shard="10MB")
    tensors = load_file(folder / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": embedding.clone()}, folder / "model.safetensors", {"format": "pt"})
    Checkpoint(str(folder), "float32")
    save_file(tensors | {"lm_head.weight": 2 * embedding}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="set tie_word_embeddings to false"):
        Checkpoint(str(folder), "float32")


def test_another_config_is_another_cache(saved, tmp_path):
    folder = saved("llama")
    before = streamed_cache(Checkpoint(str(folder), "float32"), 2, tmp_path / "cache").folder
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    assert streamed_cache(Checkpoint(str(folder), "float32"), 2, tmp_path / "cache").folder != before


def test_two_runs_may_fill_one_cache(saved, examples, tmp_path):
    folder, rows = str(saved("llama")), examples.examples[:12]
    expected = streamed_cache(Checkpoint(folder, "float32"), 3, tmp_path / "one")
    fill_streamed(Checkpoint(folder, "float32"), 3, rows, expected, 2, PAD, show_progress=False)

    checkpoints = [Checkpoint(folder, "float32") for _ in range(2)]

    def fill(checkpoint):
        cache = streamed_cache(checkpoint, 3, tmp_path / "both")
        return cache, fill_streamed(checkpoint, 3, rows, cache, 2, PAD, show_progress=False)

    with ThreadPoolExecutor(2) as pool:
        (one, filled), (other, again) = pool.map(fill, checkpoints)
    assert sorted((filled, again)) == [0, 12]
    for row in rows:
        assert torch.equal(one.get(row), expected.get(row))
        assert torch.equal(other.get(row), expected.get(row))


def test_what_cannot_be_streamed_is_refused(saved, tmp_path):
    with pytest.raises(ModelError, match="GGUF"):
        Checkpoint("model.gguf")
    folder = saved("llama")
    shutil.move(folder / "config.json", tmp_path)
    with pytest.raises(ModelError, match=r"config\.json"):
        Checkpoint(str(folder))
    shutil.move(tmp_path / "config.json", folder)
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    with pytest.raises(ModelError, match="has neither"):
        Checkpoint(str(folder))


def test_a_model_that_does_more_with_its_layers_than_call_them_is_one_line(tmp_path, examples):
    config = make_config("rwkv")
    config.rescale_every = 2
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"does not run layer by layer: .*`stream=False`"):
        probe_streamed(Checkpoint(str(tmp_path), "float32"), examples, 1, show_progress=False)


@pytest.mark.parametrize("family", SHARED)
def test_layers_that_share_weights_are_not_read_one_by_one(saved, family):
    with pytest.raises(ModelError, match=r"layers that share weights .*`stream=False`"):
        Checkpoint(str(saved(family)))


def without_prefix(folder, boundary):
    """A suffix of the checkpoint in the folder, and how many of its weights are there."""
    model = Checkpoint(str(folder), "float32").suffix(boundary)
    return model, sum(value.numel() for value in model.parameters() if not value.is_meta)


@pytest.mark.parametrize("family", [*FAMILIES, *MORE_FAMILIES, "strange", *SEPARATE])
def test_training_layer_by_layer_is_training(family, saved, examples, tmp_path):
    """The cache filled layer by layer and the suffix alone end where the whole model does."""
    folder = saved(family)
    data, held_out = examples.subset(range(8)), examples.subset(range(8, 10))
    whole = aletheia.load(str(folder), "float32")
    plan = aletheia.plan(aletheia.probe(whole.model, examples, batches=2), policy="last", percent=50, rank=4)
    common = {"steps": 3, "batch_size": 2, "learning_rate": 0.01, "evaluations": 1, "show_progress": False}
    expected = aletheia.train(
        aletheia.adapt(whole.model, plan), data, plan, tmp_path / "whole", held_out, cache="off", **common
    )
    checkpoint = Checkpoint(str(folder), "float32")
    cache = streamed_cache(checkpoint, plan.boundary, tmp_path / "cache")
    rows = [*data.examples, *held_out.examples]
    assert fill_streamed(checkpoint, plan.boundary, rows, cache, 2, PAD, show_progress=False) == 10
    assert fill_streamed(checkpoint, plan.boundary, rows, cache, 2, PAD, show_progress=False) == 0
    adapted = aletheia.adapt(checkpoint.suffix(plan.boundary), plan, identity=plan.model)
    run = aletheia.train(adapted, data, plan, tmp_path / "run", held_out, prepared=Prepared(cache), **common)
    assert run.metrics.settings.cache == "disk"
    assert run.metrics.held_out_loss_before == pytest.approx(expected.metrics.held_out_loss_before, rel=1e-6)
    assert run.metrics.held_out_loss_after == pytest.approx(expected.metrics.held_out_loss_after, rel=1e-5)
    again = aletheia.load(str(folder), "float32").model
    batch = collate(examples.examples[:2], PAD) | {"use_cache": False}
    with torch.no_grad():
        one, other = (
            PeftModel.from_pretrained(copy.deepcopy(again), path).eval()(**batch).logits
            for path in (tmp_path / "run", tmp_path / "whole")
        )
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])  # tied and untied
def test_only_the_suffix_is_in_memory(family, saved):
    folder = saved(family)
    whole = make(family)
    _, layers = find_layers(whole)
    per_layer, embedding = (
        sum(map(torch.Tensor.numel, part.parameters())) for part in (layers[0], whole.get_input_embeddings())
    )
    total = sum(value.numel() for value in whole.parameters())
    _, held = without_prefix(folder, 3)
    assert held == total - 3 * per_layer - (0 if family == "llama" else embedding)


@pytest.mark.parametrize("killed_at", range(2, 6))
def test_a_killed_fill_goes_on(killed_at, saved, examples, monkeypatch, tmp_path):
    folder = str(saved("bloom"))  # layers return tuples
    rows = examples.examples[:7]
    expected = streamed_cache(Checkpoint(folder, "float32"), 3, tmp_path / "one")
    fill_streamed(Checkpoint(folder, "float32"), 3, rows, expected, 2, PAD, show_progress=False)
    write, count = tuning_streamed._States.write, []

    def kill(self, *given):
        count.append(1)
        if len(count) == 3 * killed_at:
            raise KeyboardInterrupt
        write(self, *given)

    cache = streamed_cache(Checkpoint(folder, "float32"), 3, tmp_path / "other")
    with monkeypatch.context() as patched:
        patched.setattr(tuning_streamed._States, "write", kill)
        with pytest.raises(KeyboardInterrupt):
            fill_streamed(Checkpoint(folder, "float32"), 3, rows, cache, 2, PAD, show_progress=False)
    with monkeypatch.context() as patched:
        patched.setattr(tuning_streamed._States, "write", lambda *given: count.append(1) or write(*given))
        fill_streamed(Checkpoint(folder, "float32"), 3, rows, cache, 2, PAD, show_progress=False)
    assert len(count) == 4 * 4 + 1  # four batches, embedding and three layers, and the one that failed
    for row in rows:
        assert torch.equal(cache.get(row), expected.get(row))
    assert not list(cache.folder.glob("partial*"))


def test_a_fill_that_cannot_be_exact_is_refused(saved, examples, tmp_path):
    folder = saved("llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.5}))
    checkpoint = Checkpoint(str(folder), "float32")
    cache = streamed_cache(checkpoint, 2, tmp_path / "cache")
    with pytest.raises(CacheError, match="is random"):
        fill_streamed(checkpoint, 2, examples.examples[:4], cache, 2, PAD, show_progress=False)
    with pytest.raises(CacheError, match="layer 0 is adapted"):
        streamed_cache(checkpoint, 0, tmp_path / "cache")


def test_identity_is_that_of_the_whole(saved):
    folder = str(saved("mixtral"))
    assert Checkpoint(folder, "float32").identity() == identify(aletheia.load(folder, "float32").model)
