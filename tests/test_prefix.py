"""Fast steps equal plain ones; nothing runs backward below the boundary, whoever owns the loop."""

from contextlib import nullcontext

import pytest
import torch
from families import OTHERS, RARELY, STATE_SPACE, UNSTORED, WRAPPERS
from peft import LoraConfig, get_peft_model
from tiny import FAMILIES, MORE_FAMILIES, make_model
from transformers import Trainer, TrainingArguments

import aletheia
from aletheia.adapters.adapt import lora_config
from aletheia.anatomy.layerwise import PassThrough
from aletheia.anatomy.read import find_layers, is_matrix, read_anatomy
from aletheia.data.batches import LABELLED, collate, labelled_tokens
from aletheia.data.examples import Example
from aletheia.errors import AdapterError, TrainingError
from aletheia.execution import shared_input
from aletheia.execution.cpu.norms import fast_norms
from aletheia.execution.fast import bfloat16_autocast, fast_adapters
from aletheia.execution.loss import fast_causal_loss, fast_loss
from aletheia.execution.packed import why_not_packed
from aletheia.execution.recompute import recomputation
from aletheia.prefix.boundary import frozen_prefix
from aletheia.prefix.cache import MemoryCache, collate_with_prefix
from aletheia.prefix.exact import why_not_exact
from aletheia.prefix.fill import fill
from aletheia.prefix.source import PrefixSource
from aletheia.prefix.stored import stored_prefix
from aletheia.probing.logits import labelled_logits
from aletheia.training.fast_steps import fast_steps

BOUNDARY = 2
# families whose plain step itself is further from a step in float64 than those of others: 1.7e-6
ROUNDED = dict.fromkeys(("qwen3_5", "qwen3_5_text"), 3e-6)
SLOW = {*RARELY, *WRAPPERS} - {"mistral3", "llama4"}
STORED = tuple(
    pytest.param(family, marks=pytest.mark.slow) if family in SLOW else family
    for family in (*STATE_SPACE, *OTHERS, *WRAPPERS)
    if family not in UNSTORED
)


def adapted(family="llama", boundary=BOUNDARY, layers=4, **shape):
    """LoRA with random B on every weight from ``boundary`` up, routers left out; A and B alike get gradients."""
    return adapters_on(make_model(family, layers, **shape), boundary)


def adapters_on(model, boundary=BOUNDARY):
    weights = [module for module in read_anatomy(model).adaptable() if module.layer >= boundary]
    with torch.random.fork_rng():
        torch.manual_seed(3)
        peft = get_peft_model(model, lora_config(weights, model, rank=4, alpha=8))
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
    return peft.train()


def gradients(model, batch):
    """Loss and all adapter gradients in one vector."""
    model.zero_grad()
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    grads = [parameter.grad.flatten() for parameter in model.parameters() if parameter.requires_grad]
    return loss.item(), torch.cat(grads)


def difference(found, expected):
    """Relative errors of the loss and of the gradient vector."""
    (loss, grad), (loss_0, grad_0) = found, expected
    return max(abs(loss - loss_0) / loss_0, ((grad - grad_0).norm() / grad_0.norm()).item())


def stored(model, rows, boundary=BOUNDARY):
    """A batch with the prefix from a cache that was filled row by row, in other batches than it is used in."""
    cache = MemoryCache()
    fill(model, boundary, rows, cache, batch_size=3, show_progress=False)
    return collate_with_prefix(rows, 0, cache)


@pytest.fixture(scope="module")
def rows(examples):
    return examples.examples[:5]


# --- exactness


@pytest.mark.parametrize("family", FAMILIES + MORE_FAMILIES + STORED)
def test_every_fast_path_equals_the_plain_one(family, rows):
    model, tolerance = adapted(family), ROUNDED.get(family, 1e-6)
    batch = collate(rows, 0)
    plain = gradients(model, batch)
    with_prefix = stored(model, rows)
    assert plain[1].norm() > 0
    for path in (frozen_prefix, labelled_logits, fast_adapters, fast_norms, fast_loss):
        with path(model):
            assert difference(gradients(model, batch), plain) < tolerance, path.__name__
    with stored_prefix(model, BOUNDARY):
        assert difference(gradients(model, with_prefix), plain) < tolerance
    with fast_steps(model, BOUNDARY):
        assert difference(gradients(model, with_prefix), plain) < tolerance
    assert difference(gradients(model, batch), plain) == 0  # and every context leaves the model as it was


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox", "falcon"])
def test_beside_bfloat16_fast_steps_are_as_exact_as_autocast(family, rows):
    """A bfloat16 base with float32 adapters against the same weights in float32: ours and Trainer's ``bf16=True``."""
    model, batch = adapted(family), collate(rows, 0)
    for parameter in model.parameters():  # both models hold what bfloat16 can
        parameter.data = parameter.data.bfloat16().float()
    exact = gradients(model, batch)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data if "lora_" in name else parameter.data.bfloat16()
    model.config.dtype = torch.bfloat16
    with bfloat16_autocast(model):
        plain = difference(gradients(model, batch), exact)
    with_prefix = stored(model, rows)
    with fast_steps(model, BOUNDARY):
        ours = difference(gradients(model, with_prefix), exact)
        assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    assert 0 < ours < 1.5 * plain


def test_fast_adapters_are_taken_under_autocast(rows, monkeypatch):
    calls = []
    products = shared_input.products
    monkeypatch.setattr(
        shared_input, "products", lambda x, members, kind: calls.extend(members) or products(x, members, kind)
    )
    model, batch = adapted().bfloat16(), collate(rows, 0)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.float() if "lora_" in name else parameter.data
    with fast_adapters(model) as covered, bfloat16_autocast(model):
        model(**batch).loss.backward()
    assert covered == len(calls) == 14


def test_the_paths_are_taken(rows):
    model = adapted()
    batch = collate(rows, 0)
    with fast_adapters(model) as covered, fast_loss(model) as applies, labelled_logits(model):
        assert covered == 14
        assert applies
        logits = model(**batch).logits
    labelled = int((batch["labels"][:, 1:] != -100).sum())
    assert logits.shape == (1, labelled + 1, 259)
    assert model(**batch).logits.shape == (*batch["input_ids"].shape, 259)
    with labelled_logits(model):  # no labels, no gathering
        assert model(input_ids=batch["input_ids"]).logits.shape[:2] == batch["input_ids"].shape


def test_a_batch_with_the_number_of_its_labels_is_not_counted(rows, monkeypatch):
    model, batch = adapted(), collate(rows, 0)
    plain = gradients(model, batch)
    monkeypatch.setattr(torch.Tensor, "nonzero", pytest.fail)  # on a GPU it waits
    with labelled_logits(model):
        found = gradients(model, batch | {LABELLED: int(labelled_tokens(batch["labels"]))})
    assert difference(found, plain) < 1e-6


@pytest.mark.parametrize("items", [None, 7, torch.tensor(7)])
def test_the_fast_loss_counts_items_as_trainer_does(rows, items):
    model, batch = adapted(), collate(rows, 0) | {"num_items_in_batch": items}
    plain = gradients(model, batch)
    with fast_loss(model), labelled_logits(model):
        assert difference(gradients(model, batch), plain) < 1e-6


def test_extreme_logits_do_not_overflow(rows):
    model, batch = adapted(), collate(rows, 0)
    model.get_output_embeddings().weight.data *= 3e3
    plain = gradients(model, batch)
    with fast_loss(model):
        assert difference(gradients(model, batch), plain) < 1e-5


def test_adapters_that_are_not_plain_keep_their_forward():
    model = make_model("llama")
    peft = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], lora_dropout=0.1))
    with fast_adapters(peft.train()) as covered:
        assert covered == 0
    peft = get_peft_model(make_model("llama"), LoraConfig(target_modules=["q_proj"], use_dora=True))
    with fast_adapters(peft) as covered:
        assert covered == 0


def test_adapters_may_change_inside(rows):
    """Two at once, and a switch to one that is not plain: PEFT's own forward takes over."""
    model, ids = adapted(), collate(rows, 0)["input_ids"]
    model.add_adapter(
        "other", LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], init_lora_weights=False)
    )
    model.eval()
    model.base_model.set_adapter(["default", "other"])
    expected = model(input_ids=ids).logits
    with fast_adapters(model):
        assert torch.equal(model(input_ids=ids).logits, expected)
        model.set_adapter("default")
        torch.testing.assert_close(model(input_ids=ids).logits.sum(), model(input_ids=ids).logits.sum())
        module = next(m for m in model.modules() if hasattr(m, "lora_A") and m.lora_A)
        assert module(torch.zeros(0, 32)).shape[0] == 0  # an expert that no token goes to


def test_a_forward_of_someone_elses_comes_back(rows):
    model = adapted()
    module = next(m for m in model.modules() if hasattr(m, "lora_A") and m.lora_A)
    module.forward = own = lambda x: x
    with fast_adapters(model):
        assert module.forward is not own
    assert module.forward is own


def test_disabled_adapters_stay_disabled(rows):
    model, ids = adapted(), collate(rows, 0)["input_ids"]
    with fast_adapters(model):
        adapted_logits = model(input_ids=ids).logits
        with model.disable_adapter():
            base_logits = model(input_ids=ids).logits
    with model.disable_adapter():
        assert torch.equal(base_logits, model(input_ids=ids).logits)
    assert not torch.allclose(base_logits, adapted_logits)


def test_a_router_loss_is_kept_and_forbids_the_cache(rows):
    """It looks at the routers of all layers, the ones below the boundary included."""
    model, batch = adapted("qwen3_moe"), collate(rows, 0)
    without = gradients(model, batch)
    model.config.output_router_logits = True
    plain = gradients(model, batch)
    assert difference(plain, without) > 1e-4
    with fast_steps(model):
        assert difference(gradients(model, batch), plain) < 1e-6
    assert "router loss" in refused(model, batch)


def test_stored_layers_keep_what_models_choose_by():
    layer = find_layers(make_model("olmo3"))[1][1]
    stand_in = PassThrough(layer, 0)
    assert stand_in.self_attn.attention_type == layer.self_attn.attention_type
    assert sum(parameter.numel() for parameter in stand_in.parameters()) == 0


def refused(model, batch):
    """Why no prefix is stored for a model, as its first batch shows."""
    reasons = []
    source = PrefixSource(model, BOUNDARY, lambda dtype: MemoryCache(), on_obstacle=reasons.append)
    assert source(batch) is None
    assert source.cache is None
    return reasons[0]


def obstacle(model, rows):
    return why_not_exact(model, BOUNDARY, rows, 0)[0]


@pytest.mark.parametrize("family", FAMILIES + MORE_FAMILIES + STORED)
def test_every_family_can_be_cached(family, rows):
    model = adapted(family)
    layers, state = list(find_layers(model)[1]), torch.get_rng_state()
    assert why_not_exact(model, BOUNDARY, rows, 0) == (None, torch.float32)
    assert model.training
    assert list(find_layers(model)[1]) == layers
    assert torch.equal(torch.get_rng_state(), state)


def seen_by(model):
    """The shapes of token ids that ``model`` gets, by its own forward, which trials call."""
    shapes, own = [], model.forward

    def forward(*args, **kwargs):
        shapes.append(tuple(kwargs["input_ids"].shape))
        return own(*args, **kwargs)

    model.forward = forward
    return shapes


def test_long_rows_are_tried_by_their_first_tokens(rows):
    """All logits are computed, which whole rows may have no room for."""
    token_ids = [token for row in rows for token in row.input_ids]
    long_rows = [Example(token_ids, token_ids, "long"), Example(token_ids[::-1], token_ids, "longer")]
    model = adapted("llama")
    shapes = seen_by(model)
    assert obstacle(model, long_rows) is None
    assert why_not_packed(model, long_rows, 0) is None
    assert {(2, 64), (1, 128)} <= set(shapes)
    assert max(rows * tokens for rows, tokens in shapes) == 128


def test_rows_are_filled_within_a_number_of_tokens(rows, monkeypatch):
    """On a GPU they run in batches. A row that is longer than all tokens together runs alone."""
    monkeypatch.setattr("aletheia.prefix.source._one_by_one", lambda model: False)
    token_ids = [token for row in rows for token in row.input_ids]
    used = [*rows, Example(token_ids, token_ids, "long")]
    longest = max(map(len, rows))
    model, cache = adapted("llama"), MemoryCache()
    shapes = seen_by(model)
    assert fill(model, BOUNDARY, used, cache, 4, show_progress=False, most_tokens=2 * longest) == 6
    assert sum(rows for rows, _ in shapes) == 6
    assert (1, len(token_ids)) in shapes
    assert all(rows * tokens <= 2 * longest for rows, tokens in shapes if tokens < len(token_ids))


@pytest.mark.parametrize("kind", ["longrope", "dynamic", "linear"])
def test_rotary_positions_that_depend_on_the_batch_are_seen(rows, kind):
    model = adapted("llama")
    longest = max(map(len, rows))
    model.config.rope_parameters = {"rope_type": kind, "original_max_position_embeddings": longest}
    assert obstacle(model, rows) is None
    model.config.rope_parameters["original_max_position_embeddings"] = longest - 1
    assert (obstacle(model, rows) is None) == (kind == "linear")


@pytest.mark.parametrize("family", ["paligemma", *UNSTORED])
def test_a_prefix_that_cannot_be_stored_is_seen(family, rows):
    reason = "attend to later tokens" if family == "paligemma" else "read more than the hidden states"
    assert reason in obstacle(adapted(family), rows)


def test_dropout_below_the_boundary_is_seen(rows):
    model = adapted("gpt2")
    path = find_layers(model)[1]
    path[3].attn.attn_dropout.p = 0.1
    assert obstacle(model, rows) is None
    path[1].mlp.dropout.p = 0.1
    assert "are random (dropout)" in obstacle(model, rows)
    llama = adapted()
    find_layers(llama)[1][0].self_attn.attention_dropout = 0.1
    assert "are random (dropout)" in obstacle(llama, rows)


def test_layers_that_read_more_than_the_hidden_states_are_seen(rows):
    """An upper layer that looks back, at the embedding or at a layer below: both give other logits or fail."""
    model = adapted()
    seen = {}
    rotary = model.get_base_model().model.rotary_emb  # is called with the embedded tokens
    rotary.register_forward_pre_hook(lambda module, args: seen.update(embedding=args[0]))
    layers = find_layers(model)[1]
    handle = layers[3].register_forward_pre_hook(lambda module, args: (args[0] + seen["embedding"], *args[1:]))
    assert "read more than the hidden states" in obstacle(model, rows)
    handle.remove()
    assert obstacle(model, rows) is None
    layers[0].register_forward_hook(lambda module, args, output: seen.update(below=output))
    layers[3].register_forward_pre_hook(lambda module, args: (args[0] + seen.pop("below"), *args[1:]))
    assert "cannot start at layer 2 (RuntimeError" in obstacle(model, rows)  # of another shape
    assert "cannot start at layer 2" in refused(model, collate(rows, 0))


# --- nothing below the boundary


class Spy:
    """Which layers a backward pass reaches, and how often each layer's arithmetic runs."""

    def __init__(self, model):
        self.backward, self.calls = set(), {}
        for index, layer in enumerate(find_layers(model)[1]):
            layer.register_forward_hook(self._watch(index))
            first = next(module for module in layer.modules() if is_matrix(module))
            first.register_forward_hook(self._count(index))

    def _watch(self, index):
        def hook(module, args, output):
            output = output[0] if isinstance(output, tuple) else output
            if output.requires_grad and output.grad_fn is not None:
                output.register_hook(lambda gradient: self.backward.add(index))

        return hook

    def _count(self, index):
        def hook(module, args, output):
            self.calls[index] = self.calls.get(index, 0) + 1

        return hook


MODES = {
    "plain": None,
    "re-entrant": {"use_reentrant": True},
    "not re-entrant": {"use_reentrant": False},
    "every second layer": {"use_reentrant": False, "every_n_layers": 2},
}


@pytest.mark.parametrize("hooks", [0, 2], ids=["no input hook", "two input hooks"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_no_backward_and_no_recomputation_below_the_boundary(family, mode, hooks, rows):
    model, batch = adapted(family), collate(rows, 0)
    plain = gradients(model, batch)
    if MODES[mode] is not None:
        model.get_base_model().activation_checkpointing_enable(activation_checkpointing_kwargs=MODES[mode])
    model.get_base_model().disable_input_require_grads()
    for _ in range(hooks):
        model.enable_input_require_grads()
    spy = Spy(model)
    with frozen_prefix(model) as boundary:
        found = gradients(model, batch)
    assert boundary == BOUNDARY
    assert difference(found, plain) < 1e-6
    assert spy.backward == {2, 3}
    assert spy.calls[0] == spy.calls[1] == 1
    flags = [layer.gradient_checkpointing for layer in find_layers(model)[1]]
    assert flags[0] == (MODES[mode] is not None)  # given back as it was
    if hooks and mode != "plain":  # the claim is worth something: without it, backward does go down
        gradients(model, batch)
        assert spy.backward == {0, 1, 2, 3}


@pytest.mark.parametrize("own", [True, False], ids=["frozen_prefix", "without"])
def test_sft_trainer_with_its_defaults(own, rows, tmp_path, tokenizer):
    """TRL switches checkpointing on and makes the embedding require grad; the context undoes what that costs."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    model = adapted()
    spy = Spy(model)
    data = Dataset.from_list([{"input_ids": row.input_ids, "labels": row.labels} for row in rows])
    settings = trl.SFTConfig(output_dir=str(tmp_path), max_steps=2, report_to="none", use_cpu=True, bf16=False)
    assert settings.gradient_checkpointing
    trainer = trl.SFTTrainer(model=model, args=settings, train_dataset=data, processing_class=tokenizer)
    with aletheia.frozen_prefix(model) if own else nullcontext():
        trainer.train()
    assert spy.backward == ({2, 3} if own else {0, 1, 2, 3})
    assert (spy.calls[0] == 2) == own


def test_trainer_learns_the_same_under_checkpointing(rows, tmp_path):
    batch = collate(rows, 0)

    def trained(name, context, **settings):
        model = adapted()
        arguments = TrainingArguments(
            output_dir=str(tmp_path / name), max_steps=20, use_cpu=True, report_to="none", disable_tqdm=True,
            save_strategy="no", logging_steps=1, learning_rate=1e-3, **settings,
        )  # fmt: skip
        trainer = Trainer(model=model, args=arguments, train_dataset=[0] * 400, data_collator=lambda _: dict(batch))
        with context(model):
            trainer.train()
        return torch.tensor([log["loss"] for log in trainer.state.log_history if "loss" in log], dtype=torch.float64)

    plain = trained("plain", nullcontext)
    for reentrant in (True, False):
        kwargs = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": reentrant}}
        assert torch.equal(trained(f"checkpointed-{reentrant}", frozen_prefix, **kwargs), plain)
    fast = trained("fast", fast_steps)
    assert ((fast - plain).abs() / plain).max() < 1e-5


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
@pytest.mark.parametrize("kind", ["selective", "full"])
def test_recomputation_changes_no_digit(family, kind, rows):
    model = adapted(family)
    batch = stored(model, rows)
    with fast_steps(model, BOUNDARY):
        plain = gradients(model, batch)
        with recomputation(model, kind):
            assert difference(gradients(model, batch), plain) == 0
    assert not any(layer.gradient_checkpointing for layer in find_layers(model)[1])


@pytest.mark.parametrize(("kind", "repeated"), [("off", 0), ("selective", 0), ("full", 1)])
def test_selective_recomputation_repeats_no_matrix_product(kind, repeated, rows, monkeypatch):
    model, calls = adapted(), []
    plain = torch.nn.functional.linear
    with fast_steps(model), recomputation(model, kind):
        loss = model(**collate(rows, 0), use_cache=False).loss
        monkeypatch.setattr(torch.nn.functional, "linear", lambda *given: calls.append(given) or plain(*given))
        loss.backward()
    assert len(calls) == repeated * 14  # seven modules in each of two layers


def test_a_family_without_checkpointing_is_refused(rows):
    model = adapted()
    model.get_base_model().supports_gradient_checkpointing = False
    refusal = pytest.raises(TrainingError, match="has no gradient checkpointing; set `gradient_checkpointing` off")
    with refusal, recomputation(model, "full"):
        pass


def test_a_layer_that_becomes_trainable_inside_is_refused(rows):
    """It would silently never learn; without a gradient to be had nothing is wrong."""
    model, batch = adapted(), collate(rows, 0)
    _, layers = find_layers(model)
    with frozen_prefix(model):
        layers[0].self_attn.q_proj.weight.requires_grad_(True)
        with pytest.raises(AdapterError, match="became trainable inside frozen_prefix"):
            model(**batch)
        with torch.no_grad():
            model(**batch)
    with frozen_prefix(model) as boundary:
        assert boundary == 0
        model(**batch).loss.backward()
    assert layers[0].self_attn.q_proj.weight.grad is not None


def test_watched_weights_keep_their_calls(rows):
    """Hooks (of loggers, of engines that bring weights in late) still see the parts of an adapter."""
    model, batch, seen = adapted(), collate(rows, 0), []
    watched = find_layers(model)[1][3].self_attn.q_proj
    for part in (watched.base_layer, watched.lora_A["default"], watched.lora_B["default"]):
        handle = part.register_forward_hook(lambda *given: seen.append(given))
        with fast_adapters(model) as covered:
            model(**batch)
        handle.remove()
        assert covered == 13
    assert len(seen) == 3


def test_the_fast_loss_says_that_it_can_be_differentiated_once(rows):
    model, batch = adapted(), collate(rows, 0)
    with fast_loss(model):
        loss = model(**batch).loss
    loss.backward(retain_graph=True)
    with pytest.raises(TrainingError, match="differentiated twice"):
        loss.backward()


def test_a_trainable_embedding_is_refused():
    for family, name in (("llama", "embed_tokens"), ("gpt2", "wpe")):
        model = adapted(family)
        next(p for n, p in model.named_parameters() if name in n).requires_grad_(True)
        with pytest.raises(AdapterError, match="below the layers; expected it to be frozen"), frozen_prefix(model):
            pass


def test_an_error_inside_leaves_the_model_as_it_was(rows):
    model, batch = adapted(), collate(rows, 0)
    plain = gradients(model, batch)
    layers = list(find_layers(model)[1])
    with pytest.raises(TrainingError, match="the batch has no 'prefix_BTD'"), fast_steps(model, BOUNDARY):
        model(**batch)
    assert list(find_layers(model)[1]) == layers
    assert difference(gradients(model, batch), plain) == 0


def test_float16_logits_take_the_plain_loss():
    logits = torch.randn(6, 259, dtype=torch.float16, requires_grad=True)
    labels = torch.randint(0, 259, (6,))
    loss = fast_causal_loss(logits * 1, None, 259, shift_labels=labels)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits.float(), labels))
