"""WGT005: heads that compute logits of a whole prompt, and twins that cut the hidden states first."""

import pytest
import torch
from findings.situations import figures, graphs_of, rewritten, situation
from fxroof.analyzer.finding import registered
from fxroof.rules import lm_head_on_every_position  # noqa: F401  # registers it
from support import traced
from torch import nn
from torch.nn import functional as F

(RULE,) = (r for r in registered() if r.code == "WGT005")
WIDTH, VOCABULARY = 256, 5000


class Rms(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x):
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * h.to(x.dtype)


class Model(nn.Module):
    """Calls `finish(model, x)` on hidden states (B, S, WIDTH) after the last op that mixes positions."""

    def __init__(self, finish, *, dtype=torch.bfloat16, cached=True, vocabulary=VOCABULARY):
        super().__init__()
        self.finish, self.cached = finish, cached
        self.embed = nn.Embedding(vocabulary, WIDTH)
        self.mix, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm, self.rms = nn.LayerNorm(WIDTH), Rms()
        self.head = nn.Linear(WIDTH, vocabulary, bias=False)
        self.biased = nn.Linear(WIDTH, vocabulary)
        self.to(dtype)

    def body(self, tokens, cache):
        x = self.embed(tokens)
        kept = x if cache is None else torch.cat([cache, x], dim=1)
        x = x + self.mix(kept.cumsum(dim=1)[:, -x.shape[1] :])
        return x + self.down(F.gelu(x)), kept

    def forward(self, tokens, cache=None):
        x, kept = self.body(tokens, cache)
        return self.finish(self, x), kept


class Uncached(Model):
    def forward(self, tokens):
        return self.finish(self, self.body(tokens, None)[0])


def plain(model, x):
    return model.head(x)


def normed(model, x):
    return model.head(model.norm(x))


def rms(model, x):
    return model.biased(model.rms(x))


def in_float32(model, x):
    return model.head(model.rms(x)).float()


def capped(model, x):
    return torch.tanh(model.head(model.norm(x)) / 30.0) * 30.0


def tied(model, x):
    return F.linear(model.norm(x), model.embed.weight)


def times_transposed(model, x):
    return model.norm(x) @ model.embed.weight.T


def padded_vocabulary(model, x):
    return model.head(model.norm(x))[..., : VOCABULARY - 7]


def probabilities(model, x):
    return F.softmax(model.head(model.norm(x)).float(), dim=-1)


FINISHES = [plain, normed, rms, in_float32, capped, tied, times_transposed, padded_vocabulary, probabilities]


def on_last(finish):
    def last(model, x):
        return finish(model, x[:, -1:])

    return last


def agree(graph, twin):
    assert figures(graph) == {k: pytest.approx(v, rel=0.01) for k, v in figures(twin).items()}


@pytest.mark.parametrize("finish", FINISHES, ids=lambda f: f.__name__)
def test_the_rewrite_is_the_trace_of_the_twin(finish):
    graphs, twins = graphs_of(Model(finish)), graphs_of(Model(on_last(finish)))
    (found,) = RULE.check(situation(graphs["prefill"]))
    assert found.evidence["logits_bytes"] == 512 * found.evidence["needed_bytes"]
    agree(rewritten(graphs["prefill"], RULE), twins["prefill"])
    for graph in (graphs["decode"], *twins.values()):
        assert not list(RULE.check(situation(graph)))


@pytest.mark.parametrize("finish", [normed, in_float32], ids=lambda f: f.__name__)
def test_without_a_cache_every_step_does_it(finish):
    graphs, twins = graphs_of(Uncached(finish)), graphs_of(Uncached(on_last(finish)))
    for phase in ("prefill", "decode"):
        assert len(list(RULE.check(situation(graphs[phase])))) == 1
        agree(rewritten(graphs[phase], RULE), twins[phase])
        assert not list(RULE.check(situation(twins[phase])))


@pytest.mark.parametrize("cut", [lambda t: t[:, -1], lambda t: t[:, -1:], lambda t: t[:, -1, :].float()])
def test_logits_that_the_program_itself_throws_away(cut):
    graph = graphs_of(Model(lambda model, x: cut(normed(model, x))))["prefill"]
    twin = graphs_of(Model(lambda model, x: cut(normed(model, x[:, -1:]))))["prefill"]
    assert len(list(RULE.check(situation(graph)))) == 1
    agree(rewritten(graph, RULE), twin)


def also_returns_hidden_states(model, x):
    hidden = model.norm(x)
    return model.head(hidden), hidden


def test_what_is_returned_too_is_cut_only_for_the_head():
    graph = graphs_of(Model(also_returns_hidden_states))["prefill"]

    def remedied(model, x):
        hidden = model.norm(x)
        return model.head(hidden[:, -1:]), hidden

    agree(rewritten(graph, RULE), graphs_of(Model(remedied))["prefill"])


def last_but_one(model, x):
    return model.head(x)[:, -2:-1]


def a_few(model, x):
    return model.head(x)[:, -4:]


def mixed_after(model, x):
    return model.head(x).cumsum(dim=1)


def normed_over_positions(model, x):
    return torch.softmax(model.head(x), dim=1)


def used_twice(model, x):
    logits = model.head(x)
    return logits, logits.mean(dim=1)


def narrow(model, x):
    return F.linear(x, model.embed.weight[:100])


@pytest.mark.parametrize(
    "finish",
    [last_but_one, a_few, mixed_after, normed_over_positions, used_twice, narrow],
    ids=lambda f: f.__name__,
)
def test_near_misses(finish):
    for graph in graphs_of(Model(finish)).values():
        assert not list(RULE.check(situation(graph)))


class Tagger(nn.Module):
    """A class for every token: no vocabulary, so it generates nothing."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, 8), nn.Linear(8, 40)

    def forward(self, tokens):
        return self.head(self.embed(tokens))


def test_models_that_generate_nothing():
    graphs = graphs_of(Tagger())
    assert not [m for graph in graphs.values() for m in RULE.check(situation(graph))]


def test_the_remedy_changes_no_number():
    torch.manual_seed(0)
    model, tokens = Model(rms, dtype=torch.float32), torch.randint(VOCABULARY, (2, 9))
    with torch.no_grad():
        before = model(tokens)[0]
        model.finish = on_last(rms)
        torch.testing.assert_close(model(tokens)[0], before[:, -1:])


@pytest.mark.parametrize(
    ("model", "phases"),
    [
        ("mymodel", ["prefill"]),
        ("gptfast", ["prefill"]),
        ("llama_reference", ["prefill"]),
        ("moe", []),
        ("nanogpt", []),
        ("llama-3-8b", []),
        ("gemma-2-9b", []),
        ("bert-base", []),
        ("vit", []),
        ("whisper-large-v3", []),
    ],
)
def test_real_models(model, phases):
    graphs = traced(model).graphs
    assert [name for name, graph in graphs.items() for _ in RULE.check(situation(graph))] == phases
