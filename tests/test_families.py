"""Every family, one that nobody knows among them: read, probed, planned, adapted, trained, saved, loaded again."""

import pytest
import torch
from families import OFTEN, RARELY, UNSTORED
from peft import PeftModel
from tiny import FAMILIES, MIXTURES, MORE_FAMILIES, make_model
from torch import nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

import aletheia
from aletheia.adapters.adapt import adapted_modules
from aletheia.anatomy.fingerprint import identify
from aletheia.anatomy.read import read_anatomy
from aletheia.data.batches import collate

PAD = 0


class StrangeConfig(PretrainedConfig):
    model_type = "strange"

    def __init__(self, hidden_size=32, blocks=4, **kwargs):
        super().__init__(**kwargs)
        self.hidden_size, self.blocks = hidden_size, blocks
        self.vocab_size = 259


class StrangeBlock(nn.Module):
    """Mixes tokens by a running mean, then by experts of its own making, each a pair of Linears."""

    def __init__(self, width):
        super().__init__()
        self.scale = nn.LayerNorm(width)
        self.mixing_attention = nn.Linear(width, width)
        self.pick = nn.Parameter(torch.randn(2, width))
        self.expert_in = nn.Parameter(0.1 * torch.randn(2, 48, width))  # experts x out x in
        self.expert_out = nn.Parameter(0.1 * torch.randn(2, width, 48))

    def forward(self, hidden_states):
        count = torch.arange(1, hidden_states.shape[1] + 1, device=hidden_states.device)[:, None]
        mixed = self.mixing_attention(self.scale(hidden_states)).cumsum(1) / count
        held = hidden_states + mixed
        share = torch.softmax(held @ self.pick.T, dim=-1)
        inner = torch.relu(torch.einsum("btd,eid->btei", held, self.expert_in))
        return held + torch.einsum("btei,edi,bte->btd", inner, self.expert_out, share)


class StrangeModel(PreTrainedModel, GenerationMixin):
    config_class = StrangeConfig
    _tied_weights_keys = None

    def __init__(self, config):
        super().__init__(config)
        self.word_table = nn.Embedding(config.vocab_size, config.hidden_size)
        self.tower = nn.Module()
        self.tower.blocks = nn.ModuleList(StrangeBlock(config.hidden_size) for _ in range(config.blocks))
        self.out = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.word_table

    def get_output_embeddings(self):
        return self.out

    def forward(self, input_ids, attention_mask=None, labels=None, **kwargs):
        held = self.word_table(input_ids)
        for block in self.tower.blocks:
            held = block(held)
        logits = self.out(held)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)
        return CausalLMOutput(loss=loss, logits=logits)


def make(family):
    if family != "strange":
        return make_model(family)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return StrangeModel(StrangeConfig()).eval()


@pytest.mark.parametrize(
    "family",
    [
        *FAMILIES,
        *MORE_FAMILIES,
        "strange",
        *OFTEN,
        *(pytest.param(family, marks=pytest.mark.slow) for family in RARELY),
    ],
)
def test_the_whole_chain(family, examples, tmp_path):
    model = make(family)
    anatomy = read_anatomy(model)
    scores = aletheia.probe(model, examples, batches=2)
    plan = aletheia.plan(scores, policy="last", percent=50, rank=4, ranks="by-role", mlp_rank=8)
    adapted = aletheia.adapt(model, plan)
    half = anatomy.layer_count // 2
    planned = {module.name for module in anatomy.adaptable() if module.layer >= half}
    assert planned
    assert set(adapted_modules(adapted)) == planned
    run = aletheia.train(
        adapted, examples.subset(range(8)), plan, tmp_path / "run", examples.subset(range(8, 10)), steps=3,
        learning_rate=0.01, cache="auto" if family in UNSTORED else "memory", keep="last", show_progress=False,
    )  # fmt: skip
    assert run.metrics.settings.cache == ("off" if family in UNSTORED else "memory")
    batch = collate(examples.examples[:2], PAD) | {"use_cache": False}
    with torch.no_grad():
        trained = adapted.eval()(**batch).logits
        again = PeftModel.from_pretrained(make(family), tmp_path / "run").eval()(**batch).logits
        base = make(family)(**batch).logits
    torch.testing.assert_close(again, trained, atol=1e-5, rtol=1e-5)
    assert (trained - base).abs().max() > 1e-4


@pytest.mark.parametrize("family", [*MIXTURES, "strange"])
def test_experts_are_scored_one_by_one(family, examples):
    model = make(family)
    batch = collate(examples.examples[:2], PAD)
    scores = aletheia.probe(model, [batch])
    model.requires_grad_(True)
    model(**batch, use_cache=False).loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert scores.experts
    for name, stack in scores.experts.items():
        expected = gradients[name].flatten(1).norm(dim=1).tolist()
        assert [norm or 0.0 for norm in stack.norms] == pytest.approx(expected, rel=1e-4, abs=1e-9)
        assert scores.modules[name] == pytest.approx(gradients[name].norm().item(), rel=1e-4)
        if family != "strange":
            assert sum(stack.tokens) == 2 * int(batch["attention_mask"].sum())  # two experts a token, padding left out
    path = scores.anatomy.layer_path
    for layer, score in enumerate(scores.layers):
        inside = f"{path}.{layer}."
        norms = [grad.norm().item() for name, grad in gradients.items() if name.startswith(inside) and grad is not None]
        assert score == pytest.approx(sum(norms), rel=1e-4)


def test_an_expert_that_no_token_reached_has_no_score(examples):
    model = make_model("mixtral")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.zero_()
            layer.mlp.gate.weight[:2] = 10.0 * torch.eye(2, 32)  # the other two never win
            layer.post_attention_layernorm.weight[2:] = 0.0
    stack = next(iter(aletheia.probe(model, examples, batches=2).experts.values()))
    for norm, tokens in zip(stack.norms, stack.tokens, strict=True):
        assert (norm is None) == (tokens == 0)


@pytest.mark.parametrize("family", ["qwen2_moe", "phimoe"])
def test_routers_are_adapted_only_if_asked(family, examples):
    scores = aletheia.probe(make_model(family), examples, batches=1)
    routers = {module.name for module in scores.anatomy.modules if module.role == "router"}
    for asked in (False, True):
        plan = aletheia.plan(scores, policy="uniform", routers=asked)
        assert {adapter.name for adapter in plan.adapters} & routers == (routers if asked else set())
    assert bool(routers) == (family == "qwen2_moe")  # Phi's returns a tuple, which LoRA cannot wrap


def test_only_planned_layers_have_adapted_experts(examples):
    """PEFT adapts experts in every layer when it is asked for some by layer index."""
    for family in ("mixtral", "qwen3_moe"):
        model = make_model(family)
        adapted = aletheia.adapt(
            model, aletheia.plan(aletheia.probe(model, examples, batches=1), policy="last", percent=25)
        )
        trainable = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
        assert any("experts" in name for name in trainable)
        assert all(".layers.3." in name for name in trainable)


def test_a_changed_expert_is_another_model():
    model = make_model("mixtral")
    before = identify(model)
    with torch.no_grad():
        model.model.layers[2].mlp.experts.down_proj.mul_(2)
    assert not identify(model).is_same_model(before)
