"""The self-check: what it compares and when, what it leaves alone, and what it says when it cannot tell."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dp_hooks import HookController, dp_step, errors
from dp_hooks.checks.compare import compare_sums

from .. import laws
from ..cases.mixing import OF_ANY, D, N, between
from ..models import Net, build, examples, loader_of, moved, randn, scope_over, values
from ..reference import losses_of

each_mode = pytest.mark.parametrize("mode", ["ghost", "hooks", "functorch"])
CENTRED = OF_ANY["batch mean subtracted"]


def mlp(mix=torch.tanh):
    """A small network; ``mix`` is applied between its layers."""
    return between(mix)().double()


def enter(model, *data, **options):
    return scope_over(model, loader=loader_of(data or [randn(N, D)]), **{"max_grad_norm": 1.0, **options})


def back_and_step(loss, opt):
    loss.backward()
    opt.step()


def moves(model, opt, take):
    """Whether ``take()`` moves the model, where it may be refused instead."""
    before = values(model)
    try:
        take()
    except errors.SelfCheckError:
        opt.zero_grad()
    return any(bool(m.any()) for m in moved(before, model))


def stepped(model, opt, x):
    """Take an ordinary step, and return whether it moved the model."""
    return moves(model, opt, lambda: back_and_step(losses_of(model, x).mean(), opt))


def refused(loss, opt, match=None):
    with pytest.raises(errors.SelfCheckError, match=match):
        back_and_step(loss, opt)


@pytest.mark.parametrize(
    ("model", "losses"),
    [
        (
            lambda: Net(lambda s, x, i: s.a(x) + s.p(i), a=nn.Linear(D, 4), p=nn.Embedding(N, 4)),
            lambda m, x: losses_of(m, x, torch.arange(N)),
        ),
        (lambda: Net(lambda s, x: s.r(x)[0].sum(0), r=nn.LSTM(D, 3)), lambda m, x: losses_of(m, x.transpose(0, 1))),
    ],
    ids=["shared input", "time first"],
)
def test_inputs_whose_rows_are_not_samples_are_stopped(model, losses):
    """An input that all samples share, or time-first data under batch_first=True, is refused at as many rows as the batch."""
    step = laws.step_in(laws.MODE["ghost"], losses)
    assert "the model" in str(laws.released(model().double(), [randn(N, N, D)], step))


def test_direct_calls_of_submodules_are_checked():
    """Outermost calls other than the model's own forward are compared as well."""
    for mix, is_refused in ((torch.tanh, False), (OF_ANY["cumulative sum"], True)):
        model = Net(None, encoder=mlp(mix), head=nn.Linear(D, 2).double())
        step = laws.step_in(laws.MODE["ghost"], lambda m, x: m.head(m.encoder(x)).square().mean(1))
        assert (laws.released(model, [randn(N, D)], step) is not None) == is_refused


def test_every_one_of_many_calls_is_checked():
    """A layer that mixes samples is found although it is the tenth of twelve that are called one by one."""

    class Mix(nn.Linear):
        def forward(self, x):
            return super().forward(x - x.mean(0))

    def losses(layers, x):
        for layer in layers:
            x = layer(x)
        return x.square().mean(1)

    layers = nn.ModuleList([Mix(4, 4) if i == 9 else nn.Linear(4, 4) for i in range(12)]).double()
    assert laws.released(layers, [randn(N, 4)], laws.step_in(laws.MODE["ghost"], losses)) is not None


@pytest.mark.parametrize("when", ["zero_grad in between", "another batch before"])
def test_the_order_of_an_ordinary_loop_does_not_matter(when):
    """Neither zero_grad between forward and backward, nor a pass over other data that is left alone, disturbs the check."""

    def step(model, opt, batch):
        if when == "another batch before":
            model(randn(2, D))
        loss = losses_of(model, *batch).mean()
        if when == "zero_grad in between":
            opt.zero_grad()
        back_and_step(loss, opt)

    assert laws.released(mlp(), [randn(N, D)], step) is None


def test_a_loss_of_the_model_with_one_element_passes():
    """A model that returns its own mean loss with shape [1] next to its output is compared as a scalar."""

    def forward(s, x, y):
        out = s.net(x)
        return out, (out - y).square().mean(1).mean().reshape(1)

    def step(model, opt, batch):
        back_and_step(model(*batch)[1].sum(), opt)

    assert laws.released(Net(forward, net=mlp()), [randn(N, D), randn(N, D)], step) is None


def test_a_sample_that_is_not_finite_does_not_stop_the_first_batch():
    """One row of NaN is left out of the check as it is left out of the step; a batch of nothing else is refused."""
    data = randn(N, D)
    data[2] = float("nan")
    for rows, is_refused in ((data, False), (data[2:3].expand(N, -1), True)):
        assert (laws.released(mlp(), [rows]) is not None) == is_refused


class Observer(nn.Module):
    """Keeps the smallest value it has seen in a buffer, or in a frozen parameter, without touching its output."""

    def __init__(self, frozen):
        super().__init__()
        low = torch.full((D,), 1e9, dtype=torch.float64)
        if frozen:
            self.low = nn.Parameter(low, requires_grad=False)
        else:
            self.register_buffer("low", low)

    def forward(self, x):
        with torch.no_grad():
            self.low.copy_(torch.minimum(self.low, x.amin(0)))
        return x


@pytest.mark.parametrize("frozen", [True, False], ids=["parameter", "buffer"])
def test_statistics_of_private_samples_in_the_state_dict_are_refused(frozen):
    """A module that writes what it sees to a buffer or a frozen parameter is named, and nothing moves."""
    model = nn.Sequential(Observer(frozen), nn.Linear(D, 3).double())
    with enter(model[1]) as (opt, loader):
        back_and_step(losses_of(model[1], *next(iter(loader))).mean(), opt)  # the layer itself is sound
    before = values(model[1])
    with enter(model) as (opt, loader), pytest.raises(errors.UnsupportedModelError, match=r"0\.low"):
        back_and_step(losses_of(model, *next(iter(loader))).mean(), opt)
    assert not any(bool(m.any()) for m in moved(before, model[1]))


def test_a_model_that_cannot_run_on_one_sample_is_refused():
    """A check that could not run is a refusal, never a pass."""

    def picky(h):
        if len(h) == 1:
            raise RuntimeError("needs two samples")
        return h.tanh()

    assert "needs two samples" in str(laws.released(mlp(picky), [randn(N, D)]))


def test_it_can_be_switched_off():
    """self_check=False takes the engine's word."""
    model = mlp(CENTRED)
    with enter(model, self_check=False) as (opt, loader):
        assert stepped(model, opt, *next(iter(loader)))
    assert isinstance(opt, torch.optim.Optimizer)


def test_the_check_leaves_no_trace():
    """Random state, buffers and the step itself are the same with and without the check, dropout included."""

    def run(self_check):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(D, 8), nn.Dropout(0.5), nn.Linear(8, 3)).double()
        model.register_buffer("calls", torch.zeros((), dtype=torch.long))
        model.register_forward_pre_hook(lambda module, args: module.calls.add_(1) and None)
        data = torch.linspace(-1, 1, N * D, dtype=torch.float64).view(N, D)
        with enter(model, data, self_check=self_check) as (opt, loader):
            assert stepped(model, opt, *next(iter(loader)))
        return model, torch.rand(3)

    (checked, after), (unchecked, expected) = run(True), run(False)
    assert torch.equal(after, expected)
    assert checked.calls == unchecked.calls == 1
    assert all(torch.equal(a, b) for a, b in zip(values(checked), values(unchecked), strict=True))


def test_what_was_captured_for_the_step_survives_a_separate_capture():
    """HookController.separate() gives back exactly what it found, p.grad_sample included."""
    for mode in ("ghost", "hooks"):
        model = mlp()
        controller = HookController(model, grad_sample_mode=mode)
        losses_of(model, randn(N, D)).mean().backward()
        before = [vars(p).get("grad_sample") for p in model.parameters()]
        with controller.separate():
            assert controller.samples == 0
            losses_of(model, randn(2, D)).mean().backward()
            assert controller.samples == 2
        assert controller.samples == N
        assert all(vars(p).get("grad_sample") is g for p, g in zip(model.parameters(), before, strict=True))
        controller.cleanup()


@pytest.mark.parametrize("self_check", [True, False])
def test_generators_of_the_user_are_left_where_they_are(self_check):
    """A generator that the model draws from goes on as if there were no trials and checks."""
    mine, same = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    model = Net(lambda s, x: s.a(x + torch.rand(len(x), 1, generator=mine)), a=nn.Linear(D, 3)).double()
    with enter(model, self_check=self_check) as (opt, loader):
        stepped(model, opt, *next(iter(loader)))
    torch.rand(N, 1, generator=same)
    assert torch.equal(torch.rand(3, generator=mine), torch.rand(3, generator=same))


def test_a_train_function_may_consume_its_batch():
    """Popping the labels and changing the inputs in place, as train functions do, disturbs neither check nor step."""

    @dp_step
    def train(model, batch):
        target = batch.pop("y")
        batch["x"].mul_(2.0)
        return (model(batch["x"]) - target).square().mean(1)

    model = mlp()
    with enter(model, randn(N, D), randn(N, D)) as (_, private):
        for x, y in private:
            losses = train(model, {"x": x, "y": y})
    assert losses.shape == (N,)


def test_the_check_runs_once():
    """After it has passed for several samples, no further forward passes are made and its hooks are gone."""
    model, calls, counts = mlp(), [], []
    model.register_forward_hook(lambda *_: calls.append(1))
    hooks = len(model._forward_hooks)
    with enter(model, randn(3 * N, D)) as (opt, _):
        for _ in range(3):
            calls.clear()
            stepped(model, opt, randn(N, D))
            counts.append(len(calls))
        assert counts[0] > 1
        assert counts[1:] == [1, 1]
    assert len(model._forward_hooks) == hooks


def test_a_batch_of_one_does_not_count_for_batches_of_many():
    """A first batch with one sample is checked for values; mixing is still found at the first larger batch."""
    model, data = mlp(lambda h: h / h.detach().norm()), randn(N, D)
    with enter(model, data) as (opt, _):
        assert [stepped(model, opt, rows) for rows in (data[:1], data)] == [True, False]


def test_another_training_mode_is_checked_anew():
    """A model that mixes samples in training mode only is found at the first step in training mode."""
    mix = Net(lambda s, h: h - h.mean(0) if s.training else h)
    model, data = nn.Sequential(nn.Linear(D, 3), mix).double().eval(), randn(N, D)
    with enter(model, data) as (opt, _):
        assert stepped(model, opt, data)
        model.train()
        assert not stepped(model, opt, data)


class Masked(nn.Linear):
    """Mixes samples where it gets a mask."""

    def forward(self, x, mask=None):
        return super().forward(x if mask is None else x - (mask * x).mean(0))


@pytest.mark.parametrize("by_keyword", [True, False])
def test_inputs_that_are_given_for_the_first_time_later_are_checked_then(by_keyword):
    """A model that mixes samples only where it gets a mask is refused at the first step with one."""
    model, data, mask = Masked(D, 3).double(), randn(N, D), torch.ones(N, 1)
    given = {"mask": mask} if by_keyword else mask
    with enter(model, data) as (opt, _):
        for with_mask in (False, False, True):
            out = model(data) if not with_mask else model(data, **given) if by_keyword else model(data, given)
            assert moves(model, opt, lambda out=out: back_and_step(out.square().mean(1).mean(), opt)) != with_mask


@pytest.mark.parametrize("by_function", [True, False])
def test_a_part_that_is_called_for_the_first_time_later_is_checked_then(by_function):
    """A part of the model that no earlier step called is compared before its first gradients are released."""
    model, data = Net(None, sound=mlp(), broken=mlp(CENTRED)), randn(N, D)
    train = dp_step(lambda model, batch, name: losses_of(getattr(model, name), batch))

    def take(name):
        return train(model, data, name) if by_function else back_and_step(losses_of(getattr(model, name), data).mean(), opt)

    with enter(model, data) as (opt, _):
        found = [moves(model, opt, lambda name=name: take(name)) for name in ("sound", "sound", "broken", "sound")]
    assert found == [True, True, False, True]


def a_table_and_the_tokens(s, x):
    """Use the same parameters for the tokens, unless they are skipped, and for a table that all samples share."""
    h = x if s.skips else s.scale * s.proj(x)
    return torch.einsum("ntd,pd->ntp", h, s.scale * s.proj(s.table))


@each_mode
def test_uses_that_are_skipped_later_are_not_taken_for_one_another(mode):
    """Once one of two different uses of a parameter is left out, the step is refused by name, whatever the shapes."""
    parts = {"proj": nn.Linear(D, D), "scale": nn.Parameter(torch.rand(D)), "table": randn(N, D)}  # a row for each sample
    model, data = Net(a_table_and_the_tokens, **parts).double(), randn(N, N, D)
    with enter(model, data, grad_sample_mode=mode) as (opt, _):
        for skips in (False, True, False):
            model.skips, before = skips, model.scale.detach().clone()
            try:
                back_and_step(losses_of(model, data).mean(), opt)
            except errors.UnsupportedModelError as error:
                assert skips
                assert str(error).startswith(("proj", "scale"))  # noqa: PT017
                opt.zero_grad()
            assert torch.equal(before, model.scale) == skips


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_different_uses_under_checkpointing(use_reentrant):
    """Blocks that use parameters for tokens and for a shared table may be checkpointed, one after the other."""

    def block():
        parts = {"proj": nn.Linear(D, D), "scale": nn.Parameter(torch.rand(D)), "table": nn.Parameter(torch.rand(D, D))}
        made = Net(a_table_and_the_tokens, **parts)
        made.skips = False
        return made

    def forward(s, x):
        h = checkpoint(s.one, s.first(x), use_reentrant=use_reentrant)
        return checkpoint(s.two, h, use_reentrant=use_reentrant)

    model = Net(forward, first=nn.Linear(D, D), one=block(), two=block()).double()
    assert laws.released(model, [randn(N, D, D)]) is None


def test_per_sample_losses_are_verified_and_reported():
    """Under dp_step the loss is part of the check, and the report says so; in a bare loop it says the opposite."""
    for by_function in (True, False):
        model = mlp()
        scope = enter(model)
        with scope as (opt, loader):
            for batch in loader:
                laws.step_in(laws.MODE["two-pass" if by_function else "ghost"])(model, opt, batch)
        assert scope.report().loss_verified == by_function
        assert ("not checked" in str(scope.report())) != by_function


def test_a_train_function_that_does_something_else_when_run_again_is_refused():
    """A check that could not be made is a refusal under dp_step, too: nothing moves and the loss is not verified."""
    calls = []

    @dp_step
    def train(model, batch):
        calls.append(1)
        return losses_of(model, batch[0] if len(calls) == 1 else batch[0][:2])

    error = laws.released(mlp(), [randn(N, D)], lambda model, opt, batch: train(model, batch))
    assert "could not be compared" in str(error)


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
def test_a_criterion_is_checked_as_well(criterion, declared, verified):
    """A loss module given as criterion is compared on batch and single samples; the report then says: verified."""
    model = mlp()
    target = torch.randint(0, 3, (N,)) if isinstance(criterion, nn.CrossEntropyLoss) else randn(N, D)
    hooks = dict(criterion._forward_hooks)
    scope = enter(model, randn(N, D), target, criterion=criterion, loss_reduction=declared)
    with scope as (opt, loader):
        x, y = next(iter(loader))
        assert moves(model, opt, lambda: back_and_step(criterion(model(x), y), opt)) == verified
    assert scope.report().loss_verified == verified
    assert dict(criterion._forward_hooks) == hooks


def test_a_criterion_that_is_never_called_is_refused():
    """Giving a criterion that the loop does not use is an error, not a verified loss."""
    assert "criterion was not called" in str(laws.released(mlp(), [randn(N, D)], criterion=nn.MSELoss()))


@each_mode
@pytest.mark.parametrize("size", [(8,), (8, 8), (1, 2)])
def test_outputs_without_rows_that_the_loss_uses_are_refused(size, mode):
    """A statistic of the batch may be returned, but not trained on in a bare loop, where nothing shows what it does."""

    def forward(s, x):
        h = s.a(x)
        statistic = {(8,): h.mean(0), (8, 8): h.mT @ h, (1, 2): h.mean(0)[None, :2]}[size]
        return s.b(h), statistic

    model = Net(forward, a=nn.Linear(D, 8), b=nn.Linear(8, 3)).double()
    with enter(model, grad_sample_mode=mode) as (opt, loader):
        (x,) = next(iter(loader))
        out, statistic = model(x)
        out.square().mean(1).mean().backward()
        opt.zero_grad()
        out, statistic = model(x)
        refused(out.square().mean(1).mean() + statistic.square().sum(), opt, "has no row for each")


def mixed_output(s, x):
    h = s.a(x)
    return s.b(h - h.mean(0))[:, None][:, 0], s.b(h)


@each_mode
@pytest.mark.parametrize("change", ["divided", "masked", "nothing"])
def test_outputs_changed_in_place_count_as_used(change, mode):
    """A view that the model returns and the loop changes in place is compared, though its history is another one then."""
    model = Net(mixed_output, a=nn.Linear(D, 8), b=nn.Linear(8, 3)).double()
    with enter(model, grad_sample_mode=mode) as (opt, loader):
        out, other = model(*next(iter(loader)))
        if change == "divided":
            out /= 2.0
        elif change == "masked":
            out.masked_fill_(out > 1, 0.0)
        loss = (out.square() if change != "nothing" else 0 * other).mean(1).mean() + other.square().mean(1).mean()
        (back_and_step if change == "nothing" else refused)(loss, opt)


class Holder:
    def __init__(self, value):
        self.value = value


def left_behind(s, x):
    h = s.a(x)
    told = {"sound": h.square().mean(1), "mixed": h.mean(0).square().sum()}[s.told]
    if s.way == "attribute":
        s.aside = told
    elif s.way == "list":
        s.seen.append(told)
    out = s.b(h)
    return (out, Holder(told)) if s.way == "object" else (out, None)


@each_mode
@pytest.mark.parametrize("told", ["sound", "mixed"])
@pytest.mark.parametrize("way", ["attribute", "list", "object"])
def test_what_a_model_leaves_beside_its_outputs_is_compared(way, told, mode):
    """A loss that uses an attribute of the model, or of an object it returned, is refused if samples mix in that."""
    model = Net(left_behind, a=nn.Linear(D, 8), b=nn.Linear(8, 3)).double()
    model.way, model.told, model.seen = way, told, []
    with enter(model, grad_sample_mode=mode) as (opt, loader):
        out, held = model(*next(iter(loader)))
        aside = {"attribute": lambda: model.aside, "list": lambda: model.seen[-1], "object": lambda: held.value}[way]()
        assert len(model.seen) == (way == "list")
        (back_and_step if told == "sound" else refused)(out.square().mean(1).mean() + aside.mean(), opt)
        assert len(model.seen) == (way == "list")


@each_mode
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("mixed", [False, True])
def test_what_hooks_of_the_user_take_out_is_compared(mixed, late, mode):
    """A loss on the output of a layer inside, taken out by a forward hook, is refused if samples mix there."""
    inner = Net(lambda s, h: s.c(h - h.mean(0) if mixed else h), c=nn.Linear(8, 8))
    parts = {"a": nn.Linear(D, 8), "b": nn.Linear(8, 3), "inner": inner}
    model = Net(lambda s, x: s.b(s.a(x) + 0 * s.inner(s.a(x))), **parts).double()
    taken = []
    with enter(model, grad_sample_mode=mode) as (opt, _):
        for step in range(2):
            if step == late:
                handle = inner.register_forward_hook(lambda module, args, output: taken.append(output))
            loss = losses_of(model, randn(N, D)).mean()
            if step == late:
                loss = loss + taken.pop().square().mean(1).mean()
            if step == late and mixed:
                refused(loss, opt)
                break
            back_and_step(loss, opt)
    handle.remove()


def test_a_check_for_what_changed_knows_that_the_step_was_in_half_precision():
    """An attribute that appears in a later step has the function looked at again, its calls being known: still under autocast."""
    torch.manual_seed(0)
    model = Net(lambda s, x: s.net(x), net=nn.Sequential(nn.Linear(D, 8), nn.ReLU(), nn.Linear(8, 3)))
    scope = scope_over(model, loader=loader_of([randn(N, D).float()], 3), accountant="rdp")

    @dp_step
    def train(model, batch):
        setattr(model, f"note{len(vars(model))}", len(batch[0]))
        return nn.functional.cross_entropy(model.net(batch[0]), torch.zeros(len(batch[0]), dtype=torch.long), reduction="none")

    with scope as (_, loader):
        for _ in range(3):
            for batch in loader:
                with torch.autocast("cpu", torch.bfloat16):
                    train(model, batch)
    assert scope.report().loss_verified


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_sums_of_gradients_from_the_same_pass_agree_to_rounding(dtype):
    """A hundredth more or less in the gradient of one parameter is no rounding, whatever other comparison might see it."""
    model, (x, y) = build("mlp").to(dtype), examples(dtype=dtype)
    factors = torch.tensor([0.3, -1.2, 0.7, 1.9, -0.4, 1.1])
    params = list(model.parameters())
    losses = nn.functional.cross_entropy(model(x), y, reduction="none")
    expected = dict(zip(params, torch.autograd.grad((losses * factors).sum(), params), strict=True))
    controller = HookController(model, loss_reduction="sum", grad_sample_mode="ghost")
    nn.functional.cross_entropy(model(x), y, reduction="sum").backward()
    found = controller.take()
    compare_sums(found, factors, expected, params, controller, "the model", coarse=False)
    for p in params:
        for times in (0.99, 1.01):
            with pytest.raises(errors.SelfCheckError, match=r"1 of \d parameters differ"):
                compare_sums(found, factors, {**expected, p: times * expected[p]}, params, controller, "the model", coarse=False)
    controller.cleanup()
