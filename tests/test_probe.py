"""The probe: exact norms, labels and padding, a model given back unchanged, and what it refuses."""

from typing import get_args

import pytest
import torch
from aletheia_lora.probe import gradient_probe
from tiny import FAMILIES, make_model

from aletheia.anatomy.read import adaptable_modules, find_layers
from aletheia.data.batches import collate
from aletheia.errors import ProbeError
from aletheia.lab.campaign.speed_summary import chosen_layers
from aletheia.planning.make import plan
from aletheia.planning.plan import Policy
from aletheia.probing.ghost import LayerInput, ghost_norm
from aletheia.probing.resident import probe
from aletheia.probing.scores import Scores


def batch_of(*lengths: int, seed: int = 0, prompt: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = len(lengths)
    input_ids_BT = torch.randint(0, 256, (rows, max(lengths)), generator=generator)
    mask_BT = torch.zeros_like(input_ids_BT)
    for row, length in enumerate(lengths):
        mask_BT[row, :length] = 1
    labels_BT = torch.where(mask_BT.bool(), input_ids_BT, -100)
    labels_BT[:, :prompt] = -100
    return {"input_ids": input_ids_BT, "attention_mask": mask_BT, "labels": labels_BT}


def plain_norms(model, batch) -> dict[str, float]:
    """Every parameter's gradient norm by plain backpropagation."""
    model.zero_grad()
    model(**batch, use_cache=False).loss.backward()
    norms = {name: p.grad.norm().item() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return norms


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lengths", [(9,), (7, 12, 4), (90, 60)])  # the last takes the plain form, N > I O / (I + O)
def test_scores_equal_plain_gradients(family, lengths):
    model = make_model(family).double()
    batches = [batch_of(*lengths, seed=seed) for seed in range(2)]
    scores = probe(model, batches)
    expected = [plain_norms(model, batch) for batch in batches]
    path, layers = find_layers(model)
    for name in adaptable_modules(model):
        assert scores.modules[name] == pytest.approx(sum(norms[f"{name}.weight"] for norms in expected), rel=1e-9)
    for index in range(len(layers)):
        inside = f"{path}.{index}."
        total = sum(norm for norms in expected for name, norm in norms.items() if name.startswith(inside))
        assert scores.layers[index] == pytest.approx(total, rel=1e-9)


def test_float32_scores_are_as_exact_as_float32():
    model = make_model("llama")
    batch = batch_of(40)
    expected = plain_norms(model, batch)
    scores = probe(model, [batch])
    for name in adaptable_modules(model):
        assert scores.modules[name] == pytest.approx(expected[f"{name}.weight"], rel=1e-5)


@pytest.mark.parametrize("tokens", [2, 200])
def test_both_forms_of_the_ghost_norm_agree_with_the_gradient(tokens):
    input_BTI = torch.randn(2, tokens, 8, dtype=torch.float64)
    grad_BTO = torch.randn(2, tokens, 12, dtype=torch.float64)
    gradient_OI = grad_BTO.flatten(0, 1).T @ input_BTI.flatten(0, 1)
    shared = LayerInput(input_BTI)
    norm = ghost_norm(shared, grad_BTO)
    assert shared.has_gram == (tokens == 2)
    assert norm.item() == pytest.approx(gradient_OI.norm().item(), rel=1e-12)


def test_reference_parity_in_float32():
    """The published method, by the public package that implements it: labels are the inputs, one row a batch."""
    model = make_model("llama", layers=10)
    rows = [batch_of(length, seed=length)["input_ids"] for length in (20, 31, 44, 25, 38)]
    dataset = [{"input_ids": row[0], "attention_mask": torch.ones_like(row[0])} for row in rows]
    reference = gradient_probe(model, dataset, num_layers=10, probe_batches=5)
    batches = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row.clone()} for row in rows]
    ours = probe(model, batches).layers
    assert ours == pytest.approx([reference[layer] for layer in range(10)], rel=1e-4)


def test_padding_does_not_count():
    model = make_model("llama").double()
    bare = batch_of(11)
    padded = {
        "input_ids": torch.nn.functional.pad(bare["input_ids"], (0, 5), value=7),
        "attention_mask": torch.nn.functional.pad(bare["attention_mask"], (0, 5), value=0),
        "labels": torch.nn.functional.pad(bare["labels"], (0, 5), value=-100),
    }
    assert probe(model, [padded]).layers == pytest.approx(probe(model, [bare]).layers, rel=1e-9)
    assert probe(model, [padded]).probe.tokens == 11


def test_prompt_tokens_do_not_count():
    model = make_model("llama")
    everything, completion = batch_of(20, prompt=0), batch_of(20, prompt=15)
    assert probe(model, [completion]).probe.labelled_tokens == 5
    assert probe(model, [everything]).layers != pytest.approx(probe(model, [completion]).layers, rel=1e-3)


def snapshot(model):
    hooks = [
        (len(module._forward_hooks), len(module._forward_pre_hooks), len(module._backward_hooks))
        for module in model.modules()
    ]
    return [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()], hooks


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_given_back_as_it_was(fails):
    model = make_model("qwen2").train()
    model.model.layers[1].eval()
    model.model.layers[0].mlp.requires_grad_(False)
    model.lm_head.weight.grad = torch.full_like(model.lm_head.weight, 3.0)
    before, weights = snapshot(model), {name: p.clone() for name, p in model.named_parameters()}
    batch = batch_of(9)
    if fails:
        with pytest.raises(IndexError):
            probe(model, [batch, batch | {"input_ids": batch["input_ids"] + 10_000}])
    else:
        probe(model, [batch])
    assert snapshot(model) == before
    assert (model.lm_head.weight.grad == 3.0).all()
    assert all(p.grad is None for name, p in model.named_parameters() if name != "lm_head.weight")
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


def test_one_forward_pass_per_batch_and_no_weight_gradient():
    model = make_model("llama")
    calls, gradients = [], []
    model.model.layers[3].register_forward_hook(lambda *_: calls.append(1))
    for module in adaptable_modules(model).values():
        module.weight.register_post_accumulate_grad_hook(lambda p: gradients.append(p))
    probe(model, [batch_of(9), batch_of(12), batch_of(5)])
    assert len(calls) == 3
    assert gradients == []


def test_frozen_weights_are_scored_like_any_other():
    model = make_model("llama")
    expected = probe(model, [batch_of(9)]).layers
    assert probe(model.requires_grad_(False), [batch_of(9)]).layers == expected


@pytest.mark.parametrize("layer", [0, 2])
def test_a_non_finite_forward_names_the_layer(layer):
    model = make_model("llama")
    with torch.no_grad():
        model.model.layers[layer].mlp.down_proj.weight[0, 0] = float("inf")
    with pytest.raises(ProbeError, match=rf"output of layer {layer} \(model.layers.{layer}.mlp.down_proj\).*batch 1"):
        probe(model, [batch_of(9)])


def test_a_non_finite_gradient_names_the_layer():
    model = make_model("llama")

    def poison(module, args, output):
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * float("nan"))

    model.model.layers[1].self_attn.o_proj.register_forward_hook(poison)
    with pytest.raises(ProbeError, match=r"gradient in layer 1 \(model.layers.1"):
        probe(model, [batch_of(9)])


def test_float16_scores_do_not_underflow():
    """Unscaled, the gradients of a mean over many tokens fall below float16; the order of layers would change."""
    model = make_model("llama")
    batch = batch_of(*[60] * 8)
    expected = probe(model, [batch]).layers
    assert probe(model.to(torch.float16), [batch]).layers == pytest.approx(expected, rel=0.01)


def test_tokens_that_cancel_do_not_cost_digits():
    input_NI = torch.randn(1, 64).repeat(40, 1) + 1e-3 * torch.randn(40, 64)
    grad_NO = torch.randn(1, 64).repeat(40, 1) * torch.tensor([1.0, -1.0]).repeat(20)[:, None]
    exact = (grad_NO.double().T @ input_NI.double()).norm().item()
    assert ghost_norm(LayerInput(input_NI), grad_NO).item() == pytest.approx(exact, rel=1e-4)


def test_an_input_that_was_overwritten_is_refused():
    model = make_model("llama")
    used = []
    model.model.layers[1].mlp.down_proj.register_forward_hook(lambda module, args, output: used.append(args[0]))

    def overwrite(module, args, output):
        used[-1].detach().mul_(2)

    model.model.layers[1].register_forward_hook(overwrite)
    with pytest.raises(ProbeError, match=r"input of model\.layers\.1\.mlp\.down_proj was modified in place"):
        probe(model, [batch_of(9)])


def test_batches_without_labels_or_rows_are_refused(examples):
    model = make_model("llama")
    with pytest.raises(ProbeError, match="batch 1 has no labelled token"):
        probe(model, [batch_of(9, prompt=9)])
    with pytest.raises(ProbeError, match="no batch"):
        probe(model, [])
    with pytest.raises(ProbeError, match="`batches` is 0"):
        probe(model, examples, batches=0)


def test_the_same_seed_draws_the_same_rows_and_the_file_survives(examples, tmp_path):
    model = make_model("llama")
    first, again, other = (probe(model, examples, seed=seed) for seed in (1, 1, 2))
    assert first.layers == again.layers
    assert first.layers != other.layers
    assert first.data == examples.identity
    assert Scores.read(first.write(tmp_path / "scores.json")) == first


def test_the_same_seed_gives_the_same_plan(examples):
    """Probed twice from loading on: layers, ranks and predictions are the same, for every policy."""
    first, again = (probe(make_model("llama"), examples, seed=3) for _ in range(2))
    for settings in ({"policy": policy} for policy in get_args(Policy)):
        one, other = (plan(scores, ranks="by-score", seed=3, **settings) for scores in (first, again))
        assert (one.adapters, one.early_layers, one.predicted) == (other.adapters, other.early_layers, other.predicted)


def test_the_stability_of_a_choice_is_the_mean_jaccard_index_over_pairs_of_seeds():
    chosen = {0: {2, 3}, 1: {2, 3}, 2: {1, 3}}
    results = {seed: {"layers": sorted(layers), "layer_count": 4} for seed, layers in chosen.items()}
    pairs = [(chosen[0], chosen[1]), (chosen[0], chosen[2]), (chosen[1], chosen[2])]
    expected = sum(len(one & other) / len(one | other) for one, other in pairs) / 3
    assert chosen_layers("paper", "tiny", results).stability == pytest.approx(expected)
    assert chosen_layers("paper", "tiny", {0: results[0]}).stability is None


def test_collated_rows_are_probed_like_single_ones(examples):
    """A batch of two rows is one gradient of their joint mean loss, not two norms added."""
    model = make_model("llama").double()
    batch = collate([examples[0], examples[1]], examples.pad_token_id)
    expected = plain_norms(model, batch)
    name = "model.layers.2.mlp.up_proj"
    assert probe(model, [batch]).modules[name] == pytest.approx(expected[f"{name}.weight"], rel=1e-9)
