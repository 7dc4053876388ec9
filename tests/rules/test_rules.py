"""Layer rules: which class gets which, what they are asked, and what they may answer."""

import pytest
import torch
import torch.nn.functional as F
from opacus.grad_sample import GradSampleHooks
from torch import nn

from dp_hooks import HookController, errors, register_rule
from dp_hooks.rules import Rule, RuleTable, registry

from .. import laws
from ..cases import N
from ..cases.layers import HF_NORMS, MAMBA, ODD_NORMS, QWEN, LinearAsConv, LinearWithForward, hf
from ..models import Net, randn
from ..reference import losses_of, sample_grads

each_mode = pytest.mark.parametrize("mode", laws.MODES, ids=str)


def captures(model, x, mode=laws.MODE["hooks"]):
    """See that what is captured in ``mode`` is right."""
    expected = sample_grads(model, losses_of, x)
    with laws.attached(model, mode) as controller:
        laws.agrees(controller, mode, lambda: losses_of(model, x), expected)


class Scale(nn.Module):
    """Multiplies with its one parameter."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.full((4,), 2.0, dtype=torch.float64))

    def forward(self, x):
        return x * self.factor


RULES = {
    "Linear": [lambda: nn.Linear(2, 3), lambda: nn.Linear(2, 3, bias=False)],
    "Conv1D": [lambda: hf("pytorch_utils.Conv1D", 3, 2)],
    "Convolution": [
        *(lambda c=c: c(2, 2, 2) for c in (nn.Conv1d, nn.Conv2d, nn.Conv3d)),
        *(lambda c=c: c(2, 2, 2) for c in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)),
        lambda: nn.Conv2d(2, 2, 2, padding=1, padding_mode="circular", groups=2),
        lambda: nn.Conv1d(2, 2, 2, padding="same", bias=False),
    ],
    "Embedding": [lambda: nn.Embedding(7, 2), lambda: nn.Embedding(7, 2, padding_idx=0, sparse=True)],
    "EmbeddingBag": [lambda m=m: nn.EmbeddingBag(7, 2, mode=m) for m in ("sum", "mean", "max")],
    "LayerNorm": [lambda: nn.LayerNorm(4), lambda: nn.LayerNorm((2, 4), bias=False)],
    "RMSNorm": [lambda: nn.RMSNorm(4), lambda: nn.RMSNorm((2, 4))],
    "GroupNorm": [lambda: nn.GroupNorm(2, 4)],
    "InstanceNorm": [lambda c=c: c(4, affine=True) for c in (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)],
    "PReLU": [nn.PReLU, lambda: nn.PReLU(4)],
    "Bilinear": [lambda: nn.Bilinear(2, 3, 4)],
    "norm over features": [lambda path=path, more=more: hf(path, 4, **more) for path, more in HF_NORMS.items()],
    "generic": [
        lambda: LinearWithForward(2, 3),
        lambda: LinearAsConv(2, 3),
        lambda: nn.LSTM(2, 3),
        lambda: nn.MultiheadAttention(4, 2),
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(2, 3)),
        lambda: nn.InstanceNorm1d(4, affine=True, track_running_stats=True),
    ],
}


@pytest.mark.parametrize("label", RULES)
def test_each_class_gets_the_rule_that_is_meant_for_it(label):
    """Classes with a formula of their own are not left to the generic rule, and classes that compute something else are."""
    assert {RuleTable().find(make()).label for make in RULES[label]} == {label}
    generic_only = RuleTable(generic_only=True)
    assert {generic_only.find(make()).label for make in RULES[label]} == {"generic"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("path", HF_NORMS, ids=lambda path: path.rpartition(".")[2])
def test_norms_of_transformers_take_the_fast_formula(path, dtype):
    """The norm classes of ``transformers`` are found to be affine in their weight, in the dtypes they are trained in."""
    norm = hf(path, 6, **HF_NORMS[path]).to(dtype)
    inputs = [torch.randn(N, 5, 6).to(dtype) for _ in range(2 if path in (MAMBA, QWEN) else 1)]
    with laws.attached(norm, laws.MODE["ghost"]) as controller:
        norm(*inputs).float().square().sum(dim=(1, 2)).mean().backward()
        (hooked,) = controller._hooked_modules
        assert hooked.memo["affine"] is True


@pytest.mark.parametrize("value", [1.0, 0.1])
@pytest.mark.parametrize("norm", ODD_NORMS)
def test_norms_that_are_not_affine_by_feature_are_found_out_at_any_weight(norm, value):
    """A norm that is not affine in its weight, feature by feature, is differentiated as it is, also at weights all alike."""
    model = norm(4).double()
    x = randn(N, 5, 4)
    for sign in (1, -1):  # of both, what the first call found is remembered by the second
        nn.init.constant_(model.weight, sign * value)
        captures(model, x)


@each_mode
@pytest.mark.parametrize("bag", ["sum", "mean", "max"])
def test_flat_ids_of_a_bag_are_not_taken_for_rows_of_samples(bag, mode):
    """As many flat ids as samples: right for any choice of samples."""
    model = Net(lambda s, i, o: s.bag(i, o), bag=nn.EmbeddingBag(7, 4, mode=bag)).double()
    flat_ids, offsets = torch.tensor([1, 2, 2]), torch.tensor([0, 0, 2])
    alone = [flat_ids[:0], flat_ids[:2], flat_ids[2:]]
    losses = [losses_of(model, row, torch.tensor([0])).sum() for row in alone]
    expected = torch.stack([torch.autograd.grad(loss, model.bag.weight)[0] for loss in losses])
    with laws.attached(model, mode) as controller:
        laws.agrees(controller, mode, lambda: losses_of(model, flat_ids, offsets), {"bag.weight": expected})


def test_random_numbers_in_a_module_that_is_run_again_are_refused():
    """Dropout inside a module that has to be run again is refused, naming the module."""
    model = Net(lambda s, x: s.r(x)[0], r=nn.LSTM(4, 3, 2, dropout=0.5, batch_first=True)).double()
    with laws.attached(model, laws.MODE["hooks"]), pytest.raises(errors.UnsupportedModelError, match=r"^r \(LSTM\).*random"):
        losses_of(model, randn(N, 5, 4)).sum().backward()


@pytest.fixture
def registered():
    """Return a function that registers a rule for ``Scale``, taken back afterwards."""
    yield lambda rule: register_rule(Scale)(rule)
    registry._RULES.pop(Scale)


def test_a_registered_rule_is_used_by_scopes_opened_later_only(registered):
    """register_rule serves new controllers, keeps older ones on their snapshot, and cannot be repeated."""
    calls = []

    def rule(call):
        calls.append(call.samples)
        return {"factor": call.input * call.grad}

    x, older_model, model = randn(N, 4), Scale(), Scale()
    older = HookController(older_model)
    registered(rule)
    losses_of(older_model, x).mean().backward()
    assert calls == []
    newer = HookController(model)
    losses_of(model, x).mean().backward()
    assert calls == [N]
    torch.testing.assert_close(model.factor.grad_sample, older_model.factor.grad_sample)
    with pytest.raises(errors.InvalidArgumentError, match="has a rule already"):
        registered(rule)
    older.cleanup()
    newer.cleanup()


@pytest.mark.parametrize("wrong", [{}, {"factor": "shape"}], ids=["missing", "shape"])
def test_a_rule_that_returns_the_wrong_thing_is_refused(wrong, registered):
    """A rule without a gradient for a parameter, or with one of the wrong shape, is an error that names rule and parameter."""
    registered(lambda call: {name: call.input.sum(1) for name in wrong})
    model = Scale()
    with laws.attached(model, laws.MODE["hooks"]), pytest.raises(errors.UnsupportedModelError, match=r"'Scale'.*factor"):
        losses_of(model, randn(N, 4)).mean().backward()


@each_mode
def test_a_sampler_registered_with_opacus_is_used(mode, monkeypatch):
    """A layer for which the user registered a grad sampler with Opacus gets its gradients from there."""
    calls = []

    class Own(nn.Linear):
        def forward(self, x):
            return F.linear(x, self.weight.exp())

    def sampler(layer, activations, backprops):
        calls.append(len(backprops))
        return {layer.weight: torch.einsum("no,ni->noi", backprops, activations[0]) * layer.weight.exp()}

    monkeypatch.setitem(GradSampleHooks.GRAD_SAMPLERS, Own, sampler)
    captures(Net(lambda s, x: s.own(x), own=Own(4, 3, bias=False)).double(), randn(N, 4), mode)
    assert bool(calls) == (mode.name != "functorch")


@pytest.mark.parametrize(
    ("cls", "options", "make_input"),
    [
        (nn.Conv1d, {"padding": 1, "padding_mode": "circular"}, lambda: randn(N, 4, 5)),
        (nn.EmbeddingBag, {}, lambda: torch.tensor([[1, 1, 2]] * N)),
    ],
    ids=["convolution", "bag"],
)
def test_a_sampler_of_opacus_is_not_used_for_what_it_gets_wrong(cls, options, make_input, monkeypatch):
    """Registered for a subclass, Opacus's samplers are passed over where padding is not zeros or ids may come twice."""
    subclass = type("Subclass", (cls,), {})
    sizes = (4, 3, 3) if cls is nn.Conv1d else (7, 4)
    monkeypatch.setitem(GradSampleHooks.GRAD_SAMPLERS, subclass, GradSampleHooks.GRAD_SAMPLERS[cls])
    captures(Net(lambda s, x: s.layer(x), layer=subclass(*sizes, **options)).double(), make_input())


@pytest.mark.parametrize("own_sums", [False, True])
@each_mode
def test_a_rule_gets_whole_inputs_that_all_samples_share(mode, own_sums, monkeypatch):
    """Of some samples, too, the gradients are right where an input of all samples has as many rows as the batch."""

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(randn(2, N))

        def forward(self, x, gate):
            return x * gate @ self.weight.T

    def gradients_of(call):
        return {"weight": torch.einsum("no,ni->noi", call.grad, call.input * call.args[1])}

    def sums_of(call, factors):
        return {"weight": torch.einsum("n,noi->oi", factors, gradients_of(call)["weight"])}

    rule = Rule("Gated", gradients_of, weighted_sums=sums_of if own_sums else None)
    monkeypatch.setitem(registry._RULES, Gated, rule)
    captures(Net(lambda s, x: s.gated(x, x.new_tensor([0.5, 2.0, -1.0])), gated=Gated()), randn(N, N), mode)
