"""explain(): what is said about a model is what training does with it, and asking changes nothing."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dp_hooks import HookController, explain
from dp_hooks.errors import InvalidArgumentError, ScopeError, UnsupportedModelError

from ..cases import param
from ..cases.layers import LinearWithForward, tokens_of
from ..models import MODES, Net, in_order, scope_over

pytestmark = pytest.mark.usefixtures("nothing_is_small")


def with_token():
    """Patches with a class token in front, and a parameter that nothing uses."""
    return Net(
        lambda s, x: s.head(torch.cat([s.token.expand(len(x), -1, -1), x], 1)[:, :2]),
        token=param(1, 1, 6),
        idle=param(3),
        head=nn.Linear(6, 2),
    )


def alone(layer):
    """Return a maker of a model that runs one layer, called ``a``."""
    return lambda: Net(lambda s, x: s.a(x), a=layer())


def tied():
    parts = {"embedding": nn.Embedding(50, 4), "decoder": nn.Linear(4, 50, bias=False)}
    model = Net(lambda s, ids: s.decoder(s.embedding(ids)), **parts)
    model.decoder.weight = model.embedding.weight
    return model


def _ids(n, t):
    return torch.randint(0, 50, (n, t))


# model, example, {parameter: (strategy, multiplications)}
CASES = {
    "one token": (alone(lambda: nn.Linear(40, 30)), torch.randn(3, 40), {"a.weight": ("ghost", 70)}),
    "Gram": (
        alone(lambda: nn.Linear(40, 30)),
        torch.randn(3, 2, 40),
        {"a.weight": ("ghost", 2 * 2 * 71), "a.bias": ("instantiate", 30)},
    ),
    "many tokens": (alone(lambda: nn.Linear(4, 3)), torch.randn(3, 9, 4), {"a.weight": ("instantiate", 12 * 10)}),
    "convolution": (alone(lambda: nn.Conv2d(1, 2, 3)), torch.randn(3, 1, 6, 6), {"a.weight": ("instantiate", 18 * 17)}),
    "lookup": (alone(lambda: nn.Embedding(50, 4)), _ids(3, 5), {"a.weight": ("ghost", 20)}),
    "norm": (alone(lambda: nn.LayerNorm(6)), torch.randn(3, 6), {"a.weight": ("instantiate", 6)}),
    "class token": (with_token, torch.randn(3, 4, 6), {"token": ("lifted", 6), "idle": ("unused", 0)}),
    "recurrent": (
        alone(lambda: tokens_of(nn.LSTM(6, 5, batch_first=True))),
        torch.randn(3, 4, 6),
        {"a.r.weight_ih_l0": ("loop", None)},
    ),
    "no rule": (alone(lambda: LinearWithForward(6, 2)), torch.randn(3, 4, 6), {"a.weight": ("lifted", None)}),
    "attention": (
        lambda: nn.TransformerEncoderLayer(8, 2, 8, batch_first=True, dropout=0.0),
        torch.randn(3, 4, 8),
        {"self_attn.in_proj_weight": ("lifted", None), "linear1.weight": ("instantiate", 64 * 5)},
    ),
    "tied": (tied, _ids(3, 2), {"embedding.weight": ("ghost", 4 * 2 * 5 + 4 * 2 * 55)}),
}


@pytest.mark.parametrize("case", CASES)
def test_strategy_and_cost_of_every_kind_of_parameter(case):
    """Each parameter is listed with the strategy that its size and its module lead to, and with what it costs."""
    build, example, expected = CASES[case]
    found = explain(build(), example)
    rows = {row.name: row for row in found.rows}
    assert {name: (rows[name].strategy, rows[name].multiplications) for name in expected} == expected
    assert found.checked
    assert not found.refusals


def test_a_module_without_rule_is_repeated_by_vmap_in_functorch_mode():
    """In mode "functorch" every module goes through vmap, and in mode "hooks" gradients are written out."""
    model, x = alone(lambda: nn.Linear(40, 30))(), torch.randn(3, 40)
    assert {row.strategy for row in explain(model, x, grad_sample_mode="functorch").rows} == {"vmap"}
    assert {row.strategy for row in explain(model, x, grad_sample_mode="hooks").rows} == {"instantiate"}


def test_uses_of_a_shared_parameter_are_one_row():
    """A tied weight is listed once, with the number of its uses and both rules."""
    (row,) = explain(tied(), _ids(3, 2)).rows
    assert (row.uses, row.rule, row.module, row.shape) == (2, "Embedding+Linear", "Embedding", (50, 4))


def test_all_offenders_are_listed_and_the_rest_is_explained():
    """Every module and parameter in the way is listed with class, reason and remedy, and the other rows are complete."""
    parts = {"a": nn.Linear(6, 4), "n": nn.BatchNorm1d(4), "b": nn.Linear(4, 4), "m": nn.BatchNorm1d(4)}
    model = Net(lambda s, x: s.m(s.b(s.n(s.a(x)))), **parts)
    model.spare = nn.Embedding(3, 2, max_norm=1.0)
    model.phase = nn.Parameter(torch.randn(2))
    model.phase.register_hook(torch.abs)
    found = explain(model, torch.randn(3, 6))
    starts = ("n (BatchNorm1d)", "m (BatchNorm1d)", "spare (Embedding)", "phase (parameter of Net)")
    assert [text.startswith(start) for text, start in zip(found.refusals, starts, strict=True)] == [True] * 4
    assert all("Remedy: " in text for text in found.refusals)
    assert {r.name for r in found.rows if r.strategy == "refused"} == {
        "n.weight", "n.bias", "m.weight", "m.bias", "spare.weight", "phase"
    }  # fmt: skip
    assert {r.strategy for r in found.rows if r.name.startswith(("a.", "b."))} == {"ghost", "instantiate"}
    assert not found.checked
    with pytest.raises(UnsupportedModelError) as raised:
        HookController(model)
    assert [text in str(raised.value) for text in found.refusals] == [True, True, True, False]
    assert "4 module(s)" in str(raised.value)
    assert "... and 1 more" in str(raised.value)


def test_refusals_found_while_running_are_collected():
    """What only shows in the backward pass is collected over the whole model, and the other rows are complete."""
    gru = {name: nn.GRU(4, 4, 2, dropout=0.5, batch_first=True) for name in "rs"}
    model = Net(lambda s, x: s.b(s.s(s.r(s.a(x))[0])[0]), a=nn.Linear(4, 4), b=nn.Linear(4, 2), **gru)
    found = explain(model, torch.randn(3, 5, 4))
    assert not found.checked
    assert {text.split(": ")[0] for text in found.refusals} == {"r (GRU)", "s (GRU)"}
    assert {r.name[0] for r in found.rows if r.strategy == "refused"} == {"r", "s"}
    assert {r.strategy for r in found.rows if r.name[0] in "ab"} == {"instantiate"}


def test_a_weight_used_where_no_hook_sees_it_is_refused_by_name():
    """A gradient that arrives summed over the batch is a refusal of that parameter, and the other rows are complete."""
    model = Net(lambda s, x: F.linear(s.a(x), s.kept[0]), a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    model.kept = [model.b.weight]
    found = explain(model, torch.randn(3, 4))
    assert {r.name: r.strategy for r in found.rows} == {
        "a.weight": "ghost", "a.bias": "instantiate", "b.weight": "refused", "b.bias": "unused"
    }  # fmt: skip
    assert [text.split(": ")[0] for text in found.refusals] == ["b.weight"]


def test_lazy_modules_have_to_run_once_first():
    """A parameter without a shape is refused, with the remedy, by explain and by the controller alike."""
    for attempt in (lambda m: explain(m, torch.randn(3, 4)), HookController):
        with pytest.raises(UnsupportedModelError, match=r"weight \(parameter of LazyLinear\): .*run the model once"):
            attempt(nn.LazyLinear(2))


def test_mixing_without_a_module_is_found_by_the_check():
    """A model whose samples mix in its forward is said to be refused, as the self-check finds."""
    found = explain(Net(lambda s, x: s.a(x - x.mean(0)), a=nn.Linear(4, 3)), torch.randn(5, 4))
    assert not found.checked
    assert any("mix" in text for text in found.refusals)
    assert "checked against single-sample autograd: no" in str(found)


class Stateful(nn.Module):
    """Touches whatever a forward pass can touch."""

    def __init__(self):
        super().__init__()
        self.lin, self.drop, self.norm = nn.Linear(6, 4), nn.Dropout(0.5), nn.BatchNorm1d(4)
        self.calls, self.last = [], None
        self.register_buffer("count", torch.zeros(()))
        self.frozen = nn.Parameter(torch.zeros(4), requires_grad=False)

    def forward(self, x):
        self.last, self.extra = x, random.random()
        self.count += 1
        with torch.no_grad():
            self.frozen.add_(1)
        return self.norm(self.drop(self.lin(x.add_(1))))


@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_left_behind(mode):
    """Attributes, hooks, buffers, gradients, random state and the example are the very same afterwards, refused or not."""
    model, x = Stateful(), torch.randn(3, 6)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
        p.grad_sample = torch.ones(2)

    def state():
        things = [model.last, *(p.grad for p in model.parameters()), *(p.grad_sample for p in model.parameters())]
        things += [v for m in model.modules() for v in vars(m).values()]
        things += [v for m in model.modules() for d in (m._parameters, m._buffers) for v in d.values()]
        keys = [list(vars(m)) for m in model.modules()] + [list(vars(p)) for p in model.parameters()]
        hooks = [len(v) for m in model.modules() for k, v in vars(m).items() if k.endswith("_hooks")]
        values = {n: t.clone() for n, t in model.state_dict().items()}
        return [id(t) for t in things], keys, hooks, values, torch.get_rng_state(), random.getstate(), x.clone()

    ids, keys, hooks, values, rng, drawn, example = state()
    explain(model, x, grad_sample_mode=mode)
    now = state()
    assert (ids, keys, hooks, drawn) == (now[0], now[1], now[2], now[5])
    assert all(torch.equal(values[n], now[3][n]) for n in values)
    assert torch.equal(rng, now[4])
    assert torch.equal(example, now[6])


def test_a_failing_model_leaves_nothing_behind():
    """What the model raises on the example reaches the caller, and the hooks are gone."""
    model = alone(lambda: nn.Linear(4, 3))()
    with pytest.raises(RuntimeError, match="shapes"):
        explain(model, torch.randn(2, 5))
    assert not model.a._forward_hooks
    assert "__getstate__" not in vars(model)


def test_inputs_by_position_by_keyword_and_time_first():
    """Inputs may be a tensor, a tuple or a mapping, and samples may be counted by the second axis."""

    class Pair(nn.Linear):
        def forward(self, x, *, scale):
            return super().forward(x) * scale

    one, two = torch.randn(3, 4), torch.randn(3, 1)
    assert explain(Pair(4, 2), {"x": one, "scale": two}).checked
    assert explain(nn.Bilinear(4, 1, 2), (one, two)).checked
    assert explain(nn.GRU(4, 2), torch.randn(5, 3, 4), batch_first=False).samples == 3


@pytest.mark.parametrize("example", [torch.randn(1, 4), 3, (), {"x": torch.tensor(1.0)}])
def test_an_example_that_shows_nothing_is_an_error(example):
    """One sample, or no tensor with a sample axis, is an error that says what to pass."""
    with pytest.raises(InvalidArgumentError, match="example_inputs"):
        explain(nn.Linear(4, 2), example)


def test_a_model_in_use_is_an_error():
    """Inside an open scope or under a controller the model cannot be explained, and afterwards it can."""
    model = nn.Linear(4, 2)
    with scope_over(model, loader=in_order()), pytest.raises(ScopeError, match="explain it before or after"):
        explain(model, torch.randn(2, 4))
    assert explain(model, torch.randn(2, 4)).checked


def test_a_frozen_model_has_no_rows():
    """Without trainable parameters there is nothing to list, to check or to refuse."""
    found = explain(nn.Linear(4, 2).requires_grad_(False), torch.randn(2, 4))
    assert (found.rows, found.frozen, found.refusals, found.checked) == ((), 2, (), False)


def test_printed_and_as_a_dictionary():
    """The table names parameter, strategy and the unused one; the dictionary holds the same rows."""
    found = explain(with_token(), torch.randn(3, 4, 6))
    text = str(found)
    assert "unused: idle. Freeze" in text
    assert "checked against single-sample autograd: yes\nnothing would be refused" in text
    assert max(map(len, text.splitlines())) < 120
    assert [row["name"] for row in found.as_dict()["rows"]] == ["token", "idle", "head.weight", "head.bias"]
    assert found.unused == ("idle",)
