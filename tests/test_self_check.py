"""The self-check stops what is wrong before anything is released, and stays silent about what is right."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from dp_hooks import dp_step, errors
from dp_hooks.capture.controller import HookController
from dp_hooks.rules import registry
from dp_hooks.rules.rule import Rule

from .models import Net, each_mode, randn, scope_over

N, T = 6, 4


def mlp(mix=None):
    """A small network; ``mix`` is applied to its hidden layer."""
    model = Net(lambda s, x: s.b((mix or torch.tanh)(s.a(x))), a=nn.Linear(5, 8), b=nn.Linear(8, 3))
    return model.double()


def enter(model, loader_of, inputs, **kwargs):
    return scope_over(model, loader=loader_of(inputs), **{"max_grad_norm": 1.0, **kwargs})


def released(model, scope, step):
    """Take one step and return (error or None, whether a parameter moved, whether anything was charged)."""
    before = [p.detach().clone() for p in model.parameters()]
    error = None
    with scope as (opt, loader):
        try:
            for batch in loader:
                step(opt, batch)
        except errors.UnsupportedModelError as caught:
            error = caught
    moved = any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    return error, moved, scope.steps


MIXING = {
    "centred by the batch mean": lambda h: h - h.mean(0),
    "divided by the batch's largest value": lambda h: h / h.abs().max(),
    "sorted over samples": lambda h: h.sort(0).values,
    "cumulative over samples": lambda h: h.cumsum(0),
    "rolled to the next sample": lambda h: h + 0.5 * h.roll(1, 0),
    "attention between samples": lambda h: torch.softmax(h @ h.mT, -1) @ h,
    "norm over the whole batch": lambda h: h / h.norm(),
    "functional batch norm": lambda h: F.batch_norm(h, None, None, training=True),
    "flipped order": lambda h: h.flip(0),
}


@each_mode
@pytest.mark.parametrize("name", MIXING)
def test_models_that_mix_samples_are_stopped(name, mode, loader_of):
    """Whatever couples the samples of a batch inside the model is refused before any parameter moves."""
    model = mlp(MIXING[name])

    def step(opt, batch):
        model(*batch).square().mean(1).mean().backward()
        opt.step()

    error, moved, steps = released(model, enter(model, loader_of, [randn(N, 5)], grad_sample_mode=mode), step)
    assert error is not None
    assert str(error).startswith(("the model", "b (Linear)"))
    assert not moved
    assert steps == 0


LOSSES = {
    "sum although mean is declared": lambda out: out.square().sum(),
    "mean over a fixed number": lambda out: out.square().sum() / 100,
    "weighted by the batch": lambda out: (out.square().mean(1) * torch.softmax(out.sum(1), 0)).sum(),
    "contrastive": lambda out: F.cross_entropy(out @ out.mT, torch.arange(len(out))),
    "token mean with a data-dependent denominator": lambda out: out[out > 0].sum() / (out > 0).sum().clamp(min=1),
    "variance over the batch": lambda out: out.var(0, unbiased=False).sum() + out.square().mean(1).mean(),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_that_couple_samples_are_stopped_under_dp_step(name, loader_of):
    """A train function whose loss is not the declared mean over samples is refused before any parameter moves."""
    model = mlp()

    @dp_step
    def train(model, batch):
        return LOSSES[name](model(*batch))

    error, moved, steps = released(
        model, enter(model, loader_of, [randn(N, 5)]), lambda opt, batch: train(model, batch)
    )
    assert error is not None
    assert "train function" in str(error)
    assert not moved
    assert steps == 0


BROKEN_RULES = {
    "gradient doubled": lambda call: {"weight": 2 * torch.einsum("no,ni->noi", call.grad, call.input)},
    "samples swapped": lambda call: {"weight": torch.einsum("no,ni->noi", call.grad, call.input).roll(1, 0)},
    "zero": lambda call: {"weight": 0 * torch.einsum("no,ni->noi", call.grad, call.input)},
    "sign": lambda call: {"weight": -torch.einsum("no,ni->noi", call.grad, call.input)},
    "batch average": lambda call: {
        "weight": torch.einsum("no,ni->noi", call.grad, call.input).mean(0, keepdim=True).expand(call.samples, -1, -1)
    },
}


def correct(call):
    return {"weight": torch.einsum("no,ni->noi", call.grad, call.input)}


def _half_norms(call):
    return {"weight": correct(call)["weight"].flatten(1).square().sum(1) / 4}


def _doubled_sums(call, factors):
    return {"weight": 2 * torch.tensordot(factors, correct(call)["weight"], 1)}


@pytest.mark.parametrize(
    "rule",
    [
        *(pytest.param(Rule("x", fn), id=name) for name, fn in BROKEN_RULES.items()),
        pytest.param(Rule("x", correct, sq_norms=_half_norms), id="norms half as large"),
        pytest.param(Rule("x", correct, weighted_sums=_doubled_sums), id="sums twice as large"),
    ],
)
def test_broken_rules_are_stopped(rule, loader_of, monkeypatch):
    """A layer rule that is wrong in gradients, norms or sums is refused before any parameter moves."""
    monkeypatch.setitem(registry._RULES, nn.Linear, rule)
    model = nn.Sequential(nn.Linear(5, 4, bias=False), nn.Tanh(), nn.Linear(4, 3, bias=False)).double()

    def step(opt, batch):
        model(*batch).square().mean(1).mean().backward()
        opt.step()

    error, moved, steps = released(model, enter(model, loader_of, [randn(N, 5)]), step)
    assert error is not None
    assert "weight" in str(error)
    assert not moved
    assert steps == 0


def test_a_shared_input_with_as_many_rows_as_the_batch_is_stopped(loader_of):
    """An input of the model that all samples share is refused when it has as many rows as the batch."""
    model = Net(lambda s, x, i: s.a(x) + s.p(i), a=nn.Linear(5, 4), p=nn.Embedding(N, 4)).double()

    def step(opt, batch):
        model(*batch, torch.arange(N)).square().flatten(1).mean(1).mean().backward()
        opt.step()

    error, moved, _ = released(model, enter(model, loader_of, [randn(N, N, 5)]), step)
    assert error is not None
    assert "the model" in str(error)
    assert not moved


def test_a_wrong_sample_axis_is_stopped(loader_of):
    """Time-first data under batch_first=True is refused, also when time and batch have the same length."""
    model = Net(lambda s, x: s.r(x)[0].sum(0), r=nn.LSTM(5, 3)).double()

    def step(opt, batch):
        model(batch[0].transpose(0, 1)).square().mean(1).mean().backward()
        opt.step()

    error, moved, _ = released(model, enter(model, loader_of, [randn(N, N, 5)]), step)
    assert error is not None
    assert not moved


def _plain(model, batch):
    return model(*batch).square().flatten(1).mean(1)


def test_per_sample_losses_are_verified_and_reported(loader_of):
    """Under dp_step the loss is part of the check, and the report says so; in a bare loop it says the opposite."""
    model = mlp()
    scope = enter(model, loader_of, [randn(N, 5)])
    with scope as (_, loader):
        for batch in loader:
            dp_step(_plain)(model, batch)
    assert scope.report().loss_verified
    bare = enter(model, loader_of, [randn(N, 5)])
    with bare as (opt, loader):
        for batch in loader:
            _plain(model, batch).mean().backward()
            opt.step()
    assert not bare.report().loss_verified
    assert "not verified" in str(bare.report())


def test_the_check_leaves_no_trace(loader_of):
    """Random state, buffers and the step itself are the same with and without the check, dropout included."""

    def run(self_check):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.5), nn.Linear(8, 3)).double()
        model.register_buffer("calls", torch.zeros((), dtype=torch.long))
        model.register_forward_pre_hook(lambda module, args: module.calls.add_(1) and None)
        data = torch.linspace(-1, 1, N * 5, dtype=torch.float64).view(N, 5)
        with enter(model, loader_of, [data], self_check=self_check) as (opt, loader):
            for batch in loader:
                _plain(model, batch).mean().backward()
                opt.step()
        return model, torch.rand(3)

    (checked, after), (unchecked, expected) = run(True), run(False)
    assert torch.equal(after, expected)
    assert checked.calls == unchecked.calls == 1
    for a, b in zip(checked.parameters(), unchecked.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_batch_of_one_does_not_count_for_batches_of_many(loader_of):
    """A first batch with one sample is checked for values; mixing is still found at the first larger batch."""
    model = mlp(lambda h: h / h.detach().norm())
    data = randn(N, 5)
    moves = []
    with enter(model, loader_of, [data]) as (opt, _):
        for rows in (data[:1], data):
            before = model.a.weight.detach().clone()
            _plain(model, [rows]).mean().backward()
            if len(rows) == 1:
                opt.step()
            else:
                with pytest.raises(errors.SelfCheckError):
                    opt.step()
            moves.append(not torch.equal(before, model.a.weight))
    assert moves == [True, False]


def test_direct_calls_of_submodules_are_checked(loader_of):
    """Outermost calls other than the model's own forward are compared as well."""

    class TwoParts(nn.Module):
        def __init__(self, mix):
            super().__init__()
            self.encoder = mlp(mix)
            self.head = nn.Linear(3, 2).double()

    for mix, refused in ((torch.tanh, False), (MIXING["cumulative over samples"], True)):
        model = TwoParts(mix)

        def step(opt, batch, model=model):
            model.head(model.encoder(*batch)).square().mean(1).mean().backward()
            opt.step()

        error, moved, _ = released(model, enter(model, loader_of, [randn(N, 5)]), step)
        assert (error is not None) == refused
        assert moved != refused


def test_zero_grad_between_forward_and_backward_is_fine(loader_of):
    """The order forward, zero_grad, backward, step passes the check like any other."""
    model = mlp()

    def step(opt, batch):
        loss = _plain(model, batch).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()

    error, moved, steps = released(model, enter(model, loader_of, [randn(N, 5)]), step)
    assert error is None
    assert moved
    assert steps == 1


def test_calls_on_other_batches_before_the_step_do_not_matter(loader_of):
    """A forward pass over other data, with gradients enabled and never back-propagated, does not disturb the check."""
    model = mlp()

    def step(opt, batch):
        model(randn(2, 5))
        _plain(model, batch).mean().backward()
        opt.step()

    error, moved, _ = released(model, enter(model, loader_of, [randn(N, 5)]), step)
    assert error is None
    assert moved


def test_the_check_runs_once(loader_of):
    """After it has passed for several samples, no further forward passes are made and its hooks are gone."""
    model = mlp()
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    hooks = len(model._forward_hooks)
    with enter(model, loader_of, [randn(3 * N, 5)]) as (opt, _):
        counts = []
        for _ in range(3):
            calls.clear()
            _plain(model, [randn(N, 5)]).mean().backward()
            opt.step()
            counts.append(len(calls))
        assert counts[0] > 1
        assert counts[1:] == [1, 1]
    assert len(model._forward_hooks) == hooks


def test_a_model_that_cannot_run_on_one_sample_is_refused(loader_of):
    """A check that could not run is a refusal, never a pass."""

    def picky(h):
        if len(h) == 1:
            raise RuntimeError("needs two samples")
        return h.tanh()

    model = mlp(picky)

    def step(opt, batch):
        _plain(model, batch).mean().backward()
        opt.step()

    error, moved, _ = released(model, enter(model, loader_of, [randn(N, 5)]), step)
    assert error is not None
    assert "needs two samples" in str(error)
    assert not moved


def test_it_can_be_switched_off(loader_of):
    """self_check=False takes the engine's word."""
    model = mlp(MIXING["centred by the batch mean"])
    with enter(model, loader_of, [randn(N, 5)], self_check=False) as (opt, loader):
        for batch in loader:
            _plain(model, batch).mean().backward()
            opt.step()
    assert isinstance(opt, torch.optim.Optimizer)


def test_what_was_captured_for_the_step_survives_a_separate_capture():
    """HookController.separate() gives back exactly what it found, p.grad_sample included."""
    for mode in ("ghost", "hooks"):
        model = mlp()
        controller = HookController(model, grad_sample_mode=mode)
        _plain(model, [randn(N, 5)]).mean().backward()
        before = [vars(p).get("grad_sample") for p in model.parameters()]
        with controller.separate():
            assert controller.samples == 0
            _plain(model, [randn(2, 5)]).mean().backward()
            assert controller.samples == 2
        assert controller.samples == N
        assert all(vars(p).get("grad_sample") is g for p, g in zip(model.parameters(), before, strict=True))
        controller.cleanup()


class TokenMean(nn.Module):
    """Averages over all positive entries of the batch: the denominator couples the samples."""

    def forward(self, out, target):
        return ((out - target) ** 2)[out > 0].mean()


@pytest.mark.parametrize(
    ("criterion", "declared", "verified"),
    [
        (nn.MSELoss(), "mean", True),
        (nn.CrossEntropyLoss(), "mean", True),
        (nn.MSELoss(reduction="sum"), "sum", True),
        (nn.MSELoss(reduction="sum"), "mean", False),
        (nn.MSELoss(), "sum", False),
        (TokenMean(), "mean", False),
    ],
    ids=["mean", "cross-entropy", "sum", "sum for mean", "mean for sum", "token mean"],
)
def test_a_criterion_is_checked_as_well(criterion, declared, verified, loader_of):
    """A loss module given as criterion is compared on batch and single samples; the report then says: verified."""
    model = mlp()
    target = torch.randint(0, 3, (N,)) if isinstance(criterion, nn.CrossEntropyLoss) else randn(N, 3)
    hooks = dict(criterion._forward_hooks)

    def step(opt, batch):
        criterion(model(batch[0]), batch[1]).backward()
        opt.step()

    scope = enter(model, loader_of, [randn(N, 5), target], criterion=criterion, loss_reduction=declared)
    error, moved, _ = released(model, scope, step)
    assert (error is None) == moved == scope.report().loss_verified == verified
    assert dict(criterion._forward_hooks) == hooks


def test_a_criterion_that_is_never_called_is_refused(loader_of):
    """Giving a criterion that the loop does not use is an error, not a verified loss."""
    model = mlp()

    def step(opt, batch):
        _plain(model, batch).mean().backward()
        opt.step()

    error, moved, _ = released(model, enter(model, loader_of, [randn(N, 5)], criterion=nn.MSELoss()), step)
    assert "criterion was not called" in str(error)
    assert not moved


class Observer(nn.Module):
    """Keeps the smallest value it has seen in a buffer, or in a frozen parameter, without touching its output."""

    def __init__(self, frozen):
        super().__init__()
        low = torch.full((5,), 1e9, dtype=torch.float64)
        if frozen:
            self.low = nn.Parameter(low, requires_grad=False)
        else:
            self.register_buffer("low", low)

    def forward(self, x):
        with torch.no_grad():
            self.low.copy_(torch.minimum(self.low, x.amin(0)))
        return x


@pytest.mark.parametrize("frozen", [True, False], ids=["parameter", "buffer"])
def test_statistics_of_private_samples_in_the_state_dict_are_refused(frozen, loader_of):
    """A module that writes what it sees to a buffer or a frozen parameter is named, and nothing moves."""
    model = nn.Sequential(Observer(frozen), nn.Linear(5, 3).double())

    def step(opt, batch):
        _plain(model, batch).mean().backward()
        opt.step()

    error, moved, _ = released(model[1], enter(model, loader_of, [randn(N, 5)]), step)
    assert "0.low" in str(error)
    assert not moved


def test_another_training_mode_is_checked_anew(loader_of):
    """A model that mixes samples in training mode only is found at the first step in training mode."""

    class Mix(nn.Module):
        def forward(self, h):
            return h - h.mean(0) if self.training else h

    model = nn.Sequential(nn.Linear(5, 3), Mix()).double().eval()
    data = randn(N, 5)
    with enter(model, loader_of, [data]) as (opt, _):
        _plain(model, [data]).mean().backward()
        opt.step()
        model.train()
        _plain(model, [data]).mean().backward()
        with pytest.raises(errors.SelfCheckError):
            opt.step()


def test_every_one_of_many_calls_is_checked(loader_of):
    """A layer that mixes samples is found although it is the tenth of twelve that are called one by one."""

    class Mix(nn.Linear):
        def forward(self, x):
            return super().forward(x - x.mean(0))

    layers = nn.ModuleList([Mix(4, 4) if i == 9 else nn.Linear(4, 4) for i in range(12)]).double()

    def step(opt, batch):
        x = batch[0]
        for layer in layers:
            x = layer(x)
        x.square().mean(1).mean().backward()
        opt.step()

    error, moved, _ = released(layers, enter(layers, loader_of, [randn(N, 4)]), step)
    assert error is not None
    assert not moved


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_with_dropout_passes(use_reentrant, loader_of):
    """Gradient checkpointing around dropout, reentrant or not, is no reason for an alarm."""
    body = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.3), nn.GELU(), nn.Linear(8, 8))
    model = Net(
        lambda s, x: s.out(checkpoint(s.body, s.first(x), use_reentrant=use_reentrant)),
        first=nn.Linear(5, 8),
        body=body,
        out=nn.Linear(8, 3),
    ).double()

    def step(opt, batch):
        _plain(model, batch).mean().backward()
        opt.step()

    error, moved, _ = released(model, enter(model, loader_of, [randn(N, 5)]), step)
    assert error is None
    assert moved


class StochasticDepth(nn.Module):
    """Drops whole samples in the way that vision transformers do."""

    def forward(self, x):
        keep = (0.8 + torch.rand((x.shape[0],) + (1,) * (x.dim() - 1), dtype=x.dtype)).floor()
        return x / 0.8 * keep


class Sampled(nn.Module):
    """Adds noise of the input's shape, as variational autoencoders do."""

    def forward(self, x):
        return x + 0.1 * torch.randn_like(x)


@pytest.mark.parametrize("name", ["stochastic depth", "noise", "frozen encoder", "frozen lstm", "dropout"])
def test_random_numbers_are_no_reason_for_an_alarm(name, loader_of):
    """Models that draw one number per sample or element are compared with the draws replaced."""
    extra = {
        "stochastic depth": StochasticDepth(),
        "noise": Sampled(),
        "frozen encoder": nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3, batch_first=True).requires_grad_(False),
        "frozen lstm": Net(lambda s, x: s.r(x)[0], r=nn.LSTM(8, 8, 2, dropout=0.3, batch_first=True)).requires_grad_(
            False
        ),
        "dropout": nn.Dropout(0.5),
    }[name]
    model = nn.Sequential(nn.Linear(5, 8), extra, nn.Linear(8, 3)).double()

    def step(opt, batch):
        _plain(model, batch).mean().backward()
        opt.step()

    error, moved, _ = released(model, enter(model, loader_of, [randn(N, T, 5)]), step)
    assert error is None
    assert moved


def test_a_sample_that_is_not_finite_does_not_stop_the_first_batch(loader_of):
    """One row of NaN is left out of the check as it is left out of the step; a batch of nothing else is refused."""
    data = randn(N, 5)
    data[2] = float("nan")
    for rows, refused in ((data, False), (data[2:3].expand(N, -1), True)):
        model = mlp()

        def step(opt, batch, model=model):
            _plain(model, batch).mean().backward()
            opt.step()

        error, moved, _ = released(model, enter(model, loader_of, [rows]), step)
        assert (error is not None) == refused
        assert moved != refused


def test_a_train_function_may_consume_its_batch(loader_of):
    """Popping the labels and changing the inputs in place, as train functions do, disturbs neither check nor step."""
    model = mlp()

    @dp_step
    def train(model, batch):
        target = batch.pop("y")
        batch["x"].mul_(2.0)
        return (model(batch["x"]) - target).square().mean(1)

    loader = enter(model, loader_of, [randn(N, 5), randn(N, 3)])
    with loader as (_, private):
        for x, y in private:
            losses = train(model, {"x": x, "y": y})
    assert losses.shape == (N,)


def test_a_loss_of_the_model_with_one_element_passes(loader_of):
    """A model that returns its own mean loss with shape [1] next to its output is compared as a scalar."""

    class WithLoss(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, x, y):
            out = self.net(x)
            return out, (out - y).square().mean(1).mean().reshape(1)

    model = WithLoss()

    def step(opt, batch):
        model(*batch)[1].sum().backward()
        opt.step()

    error, moved, _ = released(model, enter(model, loader_of, [randn(N, 5), randn(N, 3)]), step)
    assert error is None
    assert moved


def test_a_train_function_that_does_something_else_when_run_again_is_refused(loader_of):
    """A check that could not be made is a refusal under dp_step, too: nothing moves and the loss is not verified."""
    model, calls = mlp(), []

    @dp_step
    def train(model, batch):
        calls.append(1)
        return _plain(model, [batch[0] if len(calls) == 1 else batch[0][:2]])

    scope = enter(model, loader_of, [randn(N, 5)])
    error, moved, steps = released(model, scope, lambda opt, batch: train(model, batch))
    assert "could not be compared" in str(error)
    assert not moved
    assert steps == 0
    assert not scope.report().loss_verified


def _a_table_and_the_tokens(s, x):
    """Use the same parameters for the tokens, unless they are skipped, and for a table that all samples share."""
    h = x if s.skips else s.scale * s.proj(x)
    return torch.einsum("ntd,pd->ntp", h, s.scale * s.proj(s.table))


@each_mode
def test_uses_that_are_skipped_later_are_not_taken_for_one_another(mode, loader_of):
    """Once one of two different uses of a parameter is left out, the step is refused by name, whatever the shapes."""
    model = Net(_a_table_and_the_tokens, proj=nn.Linear(5, 5), scale=nn.Parameter(torch.rand(5))).double()
    model.register_buffer("table", randn(N, 5))  # as many rows as samples
    model.skips = False
    data = [randn(N, N, 5)]
    with enter(model, loader_of, data, grad_sample_mode=mode) as (opt, _):
        for skips in (False, True, False):
            model.skips, before = skips, model.scale.detach().clone()
            try:
                _plain(model, data).mean().backward()
                opt.step()
            except errors.UnsupportedModelError as error:
                assert skips
                assert str(error).startswith(("proj", "scale"))  # noqa: PT017
                opt.zero_grad()
            assert torch.equal(before, model.scale) == skips


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_different_uses_under_checkpointing(use_reentrant, loader_of):
    """Blocks that use parameters for tokens and for a shared table may be checkpointed, one after the other."""

    def block():
        made = Net(_a_table_and_the_tokens, proj=nn.Linear(5, 5), scale=nn.Parameter(torch.rand(5)))
        made.table, made.skips = nn.Parameter(torch.rand(5, 5)), False
        return made

    def forward(s, x):
        return checkpoint(
            s.two, checkpoint(s.one, s.first(x), use_reentrant=use_reentrant), use_reentrant=use_reentrant
        )

    model = Net(forward, first=nn.Linear(5, 5), one=block(), two=block()).double()

    def step(opt, batch):
        _plain(model, batch).mean().backward()
        opt.step()

    error, moved, _ = released(model, enter(model, loader_of, [randn(N, 5, 5)]), step)
    assert error is None
    assert moved


class _Masked(nn.Linear):
    """Mixes samples where it gets a mask."""

    def forward(self, x, mask=None):
        return super().forward(x if mask is None else x - (mask * x).mean(0))


@pytest.mark.parametrize("by_keyword", [True, False])
def test_inputs_that_are_given_for_the_first_time_later_are_checked_then(by_keyword, loader_of):
    """A model that mixes samples only where it gets a mask is refused at the first step with one."""
    model, data, mask = _Masked(5, 3).double(), randn(N, 5), torch.ones(N, 1)
    with enter(model, loader_of, [data]) as (opt, _):
        for with_mask in (False, False, True):
            args, kwargs = ((), {"mask": mask}) if by_keyword else ((mask,), {})
            model(data, *(args if with_mask else ()), **(kwargs if with_mask else {})).square().mean(
                1
            ).mean().backward()
            before = model.weight.detach().clone()
            if with_mask:
                with pytest.raises(errors.SelfCheckError):
                    opt.step()
            else:
                opt.step()
            assert torch.equal(before, model.weight) == with_mask


class _Heads(nn.Module):
    """Two parts that are called from outside; the second one mixes samples."""

    def __init__(self):
        super().__init__()
        self.sound = mlp()
        self.broken = mlp(MIXING["centred by the batch mean"])


@pytest.mark.parametrize("by_function", [True, False])
def test_a_part_that_is_called_for_the_first_time_later_is_checked_then(by_function, loader_of):
    """A part of the model that no earlier step called is compared before its first gradients are released."""
    model, data = _Heads(), randn(N, 5)
    train = dp_step(lambda model, batch, name: _plain(getattr(model, name), batch))
    moves = []
    with enter(model, loader_of, [data]) as (opt, _):
        for name in ("sound", "sound", "broken", "sound"):
            before = [p.detach().clone() for p in model.parameters()]
            try:
                if by_function:
                    train(model, [data], name)
                else:
                    _plain(getattr(model, name), [data]).mean().backward()
                    opt.step()
            except errors.SelfCheckError:
                opt.zero_grad()
            moves.append(any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)))
    assert moves == [True, True, False, True]


@each_mode
@pytest.mark.parametrize("size", [(8,), (8, 8), (1, 2)])
def test_outputs_without_rows_that_the_loss_uses_are_refused(size, mode, loader_of):
    """A statistic of the batch may be returned, but not trained on in a bare loop, where nothing shows what it does."""

    def forward(s, x):
        h = s.a(x)
        statistic = {(8,): h.mean(0), (8, 8): h.mT @ h, (1, 2): h.mean(0)[None, :2]}[size]
        return s.b(h), statistic

    model = Net(forward, a=nn.Linear(5, 8), b=nn.Linear(8, 3)).double()
    with enter(model, loader_of, [randn(N, 5)], grad_sample_mode=mode) as (opt, loader):
        (x,) = next(iter(loader))
        out, statistic = model(x)
        out.square().mean(1).mean().backward()
        opt.zero_grad()
        out, statistic = model(x)
        loss = out.square().mean(1).mean() + statistic.square().sum()
        with pytest.raises(errors.SelfCheckError, match="has no row for each"):
            _back_and_step(loss, opt)


def _back_and_step(loss, opt):
    loss.backward()
    opt.step()


def _chosen(mask, x):
    return torch.where(mask, 0.5 * x + 0.5 * x.flip(0), x)


RANDOM_MIXING = {
    "shuffled by sorted noise": lambda x: 0.5 * x + 0.5 * x[torch.rand(len(x)).argsort()],
    "shuffled by sorted normal numbers": lambda x: 0.5 * x + 0.5 * x[torch.randn(len(x)).sort().indices],
    "mixed where noise is small": lambda x: _chosen(torch.rand(len(x), 1) < 0.5, x),
    "mixed where noise is large": lambda x: _chosen(torch.rand(len(x), 1) > 0.5, x),
    "mixed where noise in place is small": lambda x: _chosen(torch.empty(len(x), 1).uniform_() < 0.5, x),
    "partners by random integers": lambda x: 0.5 * x + 0.5 * x[torch.randint(0, len(x), (len(x),))],
    "permuted": lambda x: 0.5 * x + 0.5 * x[torch.randperm(len(x))],
}
RANDOM_BUT_SOUND = {
    "a time step for each sample": lambda x: x * torch.randint(0, 9, (len(x), 1)),
    "normal noise": lambda x: x + torch.randn(len(x), 5, dtype=x.dtype),
    "masked by noise": lambda x: x * (torch.rand_like(x) > 0.3),
    "the same noise for all": lambda x: x + torch.randn(5, dtype=x.dtype),
    "scaled by torch.normal": lambda x: x * torch.normal(1.0, 0.1, (len(x), 1), dtype=x.dtype),
    "numbers of a distribution": lambda x: x + torch.distributions.Normal(x, 1.0).sample(),
    "chosen by multinomial": lambda x: x * torch.multinomial(torch.ones(len(x), 3), 1),
    "from a generator of its own": lambda x: x + torch.rand(len(x), 1, generator=torch.Generator().manual_seed(3)),
}


@each_mode
@pytest.mark.parametrize("name", RANDOM_MIXING)
def test_samples_mixed_by_random_numbers_are_stopped(name, mode, loader_of):
    """Mixing that noise decides on is found, though checks run without noise first."""
    model, change = mlp(), RANDOM_MIXING[name]
    train = dp_step(lambda model, batch: _plain(model, [change(batch[0])]))
    scope = enter(model, loader_of, [randn(N, 5)], grad_sample_mode=mode)
    error, moved, steps = released(model, scope, lambda opt, batch: train(model, batch))
    assert "train function" in str(error)
    assert not moved
    assert steps == 0


@each_mode
@pytest.mark.parametrize("name", RANDOM_BUT_SOUND)
def test_random_numbers_of_each_sample_pass(name, mode, loader_of):
    """What is drawn for each sample is the same in the batch and for the sample alone, whatever draws it."""
    model, change = mlp(), RANDOM_BUT_SOUND[name]
    train = dp_step(lambda model, batch: _plain(model, [change(batch[0])]))
    scope = enter(model, loader_of, [randn(N, 5)], grad_sample_mode=mode)
    error, moved, _ = released(model, scope, lambda opt, batch: train(model, batch))
    assert error is None
    assert moved


@pytest.mark.parametrize("self_check", [True, False])
def test_generators_of_the_user_are_left_where_they_are(self_check, loader_of):
    """A generator that the model draws from goes on as if there were no trials and checks."""
    mine, same = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    model = Net(lambda s, x: s.a(x + torch.rand(len(x), 1, generator=mine)), a=nn.Linear(5, 3)).double()
    with enter(model, loader_of, [randn(N, 5)], self_check=self_check) as (opt, loader):
        _plain(model, next(iter(loader))).mean().backward()
        opt.step()
    torch.rand(N, 1, generator=same)
    assert torch.equal(torch.rand(3, generator=mine), torch.rand(3, generator=same))


def _mixed_output(s, x):
    h = s.a(x)
    return s.b(h - h.mean(0))[:, None][:, 0], s.b(h)


@each_mode
@pytest.mark.parametrize("change", ["divided", "masked", "nothing"])
def test_outputs_changed_in_place_count_as_used(change, mode, loader_of):
    """A view that the model returns and the loop changes in place is compared, though its history is another one then."""
    model = Net(_mixed_output, a=nn.Linear(5, 8), b=nn.Linear(8, 3)).double()
    with enter(model, loader_of, [randn(N, 5)], grad_sample_mode=mode) as (opt, loader):
        out, other = model(*next(iter(loader)))
        if change == "divided":
            out /= 2.0
        elif change == "masked":
            out.masked_fill_(out > 1, 0.0)
        loss = (out.square() if change != "nothing" else 0 * other).mean(1).mean() + other.square().mean(1).mean()
        if change == "nothing":
            _back_and_step(loss, opt)
            return
        with pytest.raises(errors.SelfCheckError):
            _back_and_step(loss, opt)


class _Holder:
    def __init__(self, value):
        self.value = value


def _left_behind(s, x):
    h = s.a(x)
    told = {"sound": h.square().mean(1), "mixed": h.mean(0).square().sum()}[s.told]
    if s.way == "attribute":
        s.aside = told
    elif s.way == "list":
        s.seen.append(told)
    out = s.b(h)
    return (out, _Holder(told)) if s.way == "object" else (out, None)


@each_mode
@pytest.mark.parametrize("told", ["sound", "mixed"])
@pytest.mark.parametrize("way", ["attribute", "list", "object"])
def test_what_a_model_leaves_beside_its_outputs_is_compared(way, told, mode, loader_of):
    """A loss that uses an attribute of the model, or of an object it returned, is refused if samples mix in that."""
    model = Net(_left_behind, a=nn.Linear(5, 8), b=nn.Linear(8, 3)).double()
    model.way, model.told, model.seen = way, told, []
    with enter(model, loader_of, [randn(N, 5)], grad_sample_mode=mode) as (opt, loader):
        out, held = model(*next(iter(loader)))
        aside = {"attribute": lambda: model.aside, "list": lambda: model.seen[-1], "object": lambda: held.value}[way]()
        assert len(model.seen) == (way == "list")
        loss = out.square().mean(1).mean() + aside.mean()
        if told == "sound":
            _back_and_step(loss, opt)
            assert len(model.seen) == (way == "list")
            return
        with pytest.raises(errors.SelfCheckError):
            _back_and_step(loss, opt)


@each_mode
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("mixed", [False, True])
def test_what_hooks_of_the_user_take_out_is_compared(mixed, late, mode, loader_of):
    """A loss on the output of a layer inside, taken out by a forward hook, is refused if samples mix there."""
    inner = Net(lambda s, h: s.c(h - h.mean(0) if mixed else h), c=nn.Linear(8, 8))
    model = Net(
        lambda s, x: s.b(s.a(x) + 0 * s.inner(s.a(x))), a=nn.Linear(5, 8), b=nn.Linear(8, 3), inner=inner
    ).double()
    taken = []
    with enter(model, loader_of, [randn(N, 5)], grad_sample_mode=mode) as (opt, _):
        for step in range(2):
            if step == late:
                handle = inner.register_forward_hook(lambda module, args, output: taken.append(output))
            loss = _plain(model, [randn(N, 5)]).mean()
            if step == late:
                loss = loss + taken.pop().square().mean(1).mean()
            if step == late and mixed:
                with pytest.raises(errors.SelfCheckError):
                    _back_and_step(loss, opt)
                break
            _back_and_step(loss, opt)
    handle.remove()
