"""The self-check by values: halves of the batch, gates drawn at random, state carried between batches, calls past the hooks."""

import dataclasses
import weakref
from collections import deque
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dp_hooks import checking, dp_step, errors
from dp_hooks.checks import gradient_comparison
from dp_hooks.checks.gradient_comparison import GradientComparison
from dp_hooks.gradients.sample_gradients import SampleGradients
from dp_hooks.rules import ghost_norms

from .. import laws
from ..models import Net, build, loader_of, moved, randn, scope_over, values
from ..reference import clipped_sum, losses_of, rows_by_backward, sample_grads

N, D = 16, 4


def two_layers(between):
    """Two layers; ``between(self, h)`` stands between them."""
    return Net(lambda s, x: s.b(between(s, s.a(x))), a=nn.Linear(D, 5), b=nn.Linear(5, 3)).double()


def refusal(model, losses=losses_of, mode=None):
    """What a first step on one batch is refused with; None if it is taken."""
    mode = laws.MODE["ghost"] if mode is None else mode
    return laws.released(model, [randn(N, D)], laws.step_in(mode, losses), mode)


def easiest_left_out(model, x):
    losses = losses_of(model, x)
    return losses * (losses >= losses.detach().sort().values[len(x) // 10])


def neighbours(model, x):
    x = x.clone()
    if len(x) > 6:
        x[5] = x[5] + x[6]
    return losses_of(model, x)


GATES = {
    "uniform": lambda x: (torch.rand(1) < 0.3).double(),
    "uniform, rarely": lambda x: (torch.rand(()) < 0.05).double(),
    "normal": lambda x: (torch.randn(1) > 1.0).double(),
    "bernoulli": lambda x: torch.bernoulli(torch.full((1,), 0.2)).double(),
    "beta": lambda x: torch.distributions.Beta(0.4, 0.4).sample().double(),
    "integer": lambda x: torch.randint(0, 2, (1,)).double(),
    "integer, rarely": lambda x: (torch.randint(0, 1000, (1,)) < 5).double(),
    "large integer, rarely": lambda x: (torch.randint(1000, ()) > 994).double(),
    "integer by keywords": lambda x: (torch.randint(low=10, high=500, size=(1,)) < 12).double(),
    "integer in place": lambda x: (torch.empty(1).random_(0, 30) < 1).double(),
    "choice": lambda x: torch.multinomial(torch.tensor([0.99, 0.0, 0.01]), 1).double() / 2,
    "first choice": lambda x: (torch.multinomial(torch.tensor([0.01, 0.99]), 1) == 0).double(),
    "count": lambda x: (torch.poisson(torch.full((1,), 3.5)) < 1).double(),
    "gamma": lambda x: (torch.distributions.Gamma(1.0, 1.0).sample() > 1).double(),
    "dirichlet": lambda x: (torch.distributions.Dirichlet(torch.ones(3)).sample()[0] > 0.5).double(),
}


@pytest.mark.parametrize("gate", GATES)
def test_mixing_behind_a_number_drawn_for_the_whole_batch_is_refused(gate):
    """Whatever is drawn, gates are tried open and closed; without mixing behind them they are no reason to refuse."""
    centred = two_layers(lambda s, h: (h - GATES[gate](h) * h.mean(0)).tanh())
    assert "mix" in str(refusal(centred)).lower()
    assert refusal(two_layers(lambda s, h: (h + GATES[gate](h) * h.sin()).tanh())) is None


def test_noise_for_each_sample_is_no_reason_to_refuse():
    """Draws with a row for each sample, dropout, and layers dropped sample by sample pass."""

    def between(s, h):
        keep = (torch.rand(len(h), 1) < 0.7).double() / 0.7
        return F.dropout(h + keep * (h + 0.1 * torch.randn_like(h)).tanh(), 0.3)

    assert refusal(two_layers(between)) is None


@pytest.mark.parametrize("losses", [easiest_left_out, neighbours], ids=["easiest left out", "two rows"])
def test_mixing_of_few_samples_is_refused_wherever_they_are(losses):
    """Every row of the first batch is compared, in halves of the batch, and not only some of them."""
    assert "mix" in str(refusal(build("mlp"), losses, laws.MODE["two-pass"])).lower()


def test_losses_weighted_by_themselves_pass():
    """A weight that depends on the sample's own loss only couples nothing."""

    def focal(model, x):
        losses = losses_of(model, x)
        return losses * (1 - torch.exp(-losses.detach())) ** 2

    assert refusal(build("mlp"), focal, laws.MODE["two-pass"]) is None


def deep():
    torch.manual_seed(0)
    layers = [part for k in range(10) for part in (nn.Linear(D if k == 0 else 96, 96), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(96, 3))


def test_units_that_switch_by_rounding_are_no_reason_to_refuse():
    """Gradients are taken from the same forward pass, so that a deep float32 network with ReLU passes after ordinary steps, too."""
    model, x = deep(), randn(N, D).float()
    ordinary = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(5):
        ordinary.zero_grad()
        losses_of(model, x).mean().backward()
        ordinary.step()
    assert laws.released(model, [x]) is None


def switching(size, by_rounding):
    """A model one unit of which is on in large batches and off in small ones, as rounding may have it; its share is ``size``.

    ``by_rounding``: it also switches where the last digits of parameters change.
    """

    def between(s, h):
        changed = float((s.b.weight.detach() - start).abs().max()) if by_rounding else 0.0
        at_zero = h[:, :1] - h[:, :1].detach() + 1e-9 * (len(h) - 2.5) + changed
        return torch.cat([size * at_zero.relu(), h[:, 1:]], 1)

    model = two_layers(between).float()
    start = model.b.weight.detach().clone()
    return model


def refusal_of_one_number(model, x, by_function):
    """What a step is refused with whose loss is one number, of a train function or of the model itself; None if it is taken."""
    own = Net(lambda s, x: {"loss": losses_of(s.net, x).mean()}, net=model)
    step = dp_step(lambda m, batch: losses_of(m, *batch).mean())
    with scope_over(model if by_function else own, loader=loader_of([x]), max_grad_norm=1.0) as (opt, loader):
        for batch in loader:
            try:
                if by_function:
                    step(model, batch)
                else:
                    own(batch[0])["loss"].backward()
                    opt.step()
            except errors.SelfCheckError as error:
                return str(error)
    return None


SWITCHES = [(0.0, False, False), (0.01, False, True), (0.01, True, False), (0.1, True, True)]


@pytest.mark.parametrize(("size", "by_rounding", "refused"), SWITCHES)
@pytest.mark.parametrize("by_function", [False, True])
def test_a_unit_that_switches_is_no_reason_to_refuse_a_loss_over_the_batch(by_function, size, by_rounding, refused):
    """Where the loss is one number, single samples need to agree as far as rounding lets them: the whole batch shows the rest."""
    model, x = switching(size, by_rounding), randn(N, D).float()
    alone = sample_grads(model, losses_of, x)
    together = dict(zip(alone, zip(*rows_by_backward(model, losses_of(model, x), retain_graph=True), strict=True), strict=True))
    off = max(float((a - b).norm() / a.norm()) for p in alone for a, b in zip(alone[p], together[p], strict=True))
    assert off < 1e-5 if size == 0 else off > 2e-2
    assert bool(refusal_of_one_number(model, x, by_function)) == refused


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("by_function", [False, True])
def test_a_mean_over_all_tokens_is_refused_where_only_the_longest_text_shows_it(by_function, autocast):
    """An untrained head gives all tokens the same loss, and texts of one length differ little: the one unlike them is looked at."""
    torch.manual_seed(0)
    lengths = torch.where(torch.arange(64) == 5, 30, 6)
    labels = torch.randint(0, 9, (64, 30)).masked_fill(torch.arange(30) >= lengths[:, None], -100)
    model = Net(
        lambda s, ids: s.head(s.inner(s.words(ids)).tanh()), words=nn.Embedding(9, 8), inner=nn.Linear(8, 8), head=nn.Linear(8, 9)
    )
    nn.init.normal_(model.head.weight, std=0.002)
    nn.init.zeros_(model.head.bias)

    def loss(out, labels):
        return F.cross_entropy(out.float().transpose(1, 2), labels, ignore_index=-100)

    own = Net(lambda s, ids, labels: {"loss": loss(s.net(ids), labels)}, net=model)

    @dp_step
    def step(model, batch):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return loss(model(batch[0]), batch[1])

    data = loader_of([labels.clamp(min=0), labels])
    with scope_over(model if by_function else own, loader=data, max_grad_norm=1.0) as (opt, loader):
        for batch in loader:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                value = None if by_function else own(*batch)["loss"]
            with pytest.raises(errors.SelfCheckError, match="single samples"):
                step(model, batch) if value is None else (value.backward(), opt.step())


@pytest.mark.parametrize("by_function", [False, True])
def test_one_per_cent_of_a_gradient_is_found_where_the_loss_is_one_number(by_function, monkeypatch):
    """A rule that is off by 1 % is refused in single precision, although single samples are compared coarsely."""
    model, x = build("mlp").float(), randn(N, D).float()
    assert refusal_of_one_number(model, x, by_function) is None
    _off_by_one_per_cent(monkeypatch)
    assert "of its size" in str(refusal_of_one_number(model, x, by_function))


def _off_by_one_per_cent(monkeypatch):
    sound = SampleGradients.sums_in_turn

    def faulty(self, factors, finite, *, consume=False):
        return ((p, 1.01 * total) for p, total in sound(self, factors, finite, consume=consume))

    monkeypatch.setattr(SampleGradients, "sums_in_turn", faulty)


def test_a_sum_that_is_no_number_is_found_where_single_samples_tell(monkeypatch):
    """Norms and gradients may be right, and the sum NaN: no comparison is passed by what cannot be compared."""
    sound = SampleGradients.sums_in_turn

    def faulty(self, factors, finite, *, consume=False):
        return ((p, torch.nan * total) for p, total in sound(self, factors, finite, consume=consume))

    monkeypatch.setattr(GradientComparison, "_compare_passes", lambda *args: True)
    monkeypatch.setattr(SampleGradients, "sums_in_turn", faulty)
    assert "of its size" in str(refusal(two_layers(lambda s, h: h.tanh())))


@pytest.mark.parametrize("mode", ["ghost", "hooks", "functorch"])
def test_one_per_cent_of_a_gradient_is_found_in_float32(mode, monkeypatch):
    """A rule that is off by 1 % is refused, in single precision."""
    model = build("mlp").float()
    assert laws.released(model, [randn(N, D).float()], mode=laws.MODE[mode]) is None
    _off_by_one_per_cent(monkeypatch)
    assert isinstance(laws.released(model, [randn(N, D).float()], mode=laws.MODE[mode]), errors.SelfCheckError)


# ---------------------------------------------------------------- state


class Carrying(nn.Module):
    """Two layers, and ``keep(self, h)`` between them, which may keep something in ``self.kept``."""

    def __init__(self, keep, kept, buffer=False):
        super().__init__()
        self.a, self.b, self.keep = nn.Linear(D, 5), nn.Linear(5, 3), keep
        if buffer:
            self.register_buffer("kept", kept)
        else:
            self.kept = kept
        self.double()

    def forward(self, x):
        return self.b(self.keep(self, self.a(x)).tanh())


def mean_of_tensor(s, h):
    h, s.kept = h - s.kept, 0.5 * s.kept + 0.5 * h.detach().mean(0)
    return h


def mean_in_place(s, h):
    out = h - s.kept.clone()
    s.kept.lerp_(h.detach().mean(0), 0.5)
    return out


def mean_through_data(s, h):
    out = h - s.kept.clone()
    s.kept.data.lerp_(h.detach().mean(0), 0.5)
    return out


def mean_through_new_data(s, h):
    out = h - s.kept
    s.kept.data = 0.5 * s.kept.data + 0.5 * h.detach().mean(0)
    return out


def mean_of_number(s, h):
    h, s.kept = h - s.kept, 0.5 * s.kept + 0.5 * float(h.detach().mean())
    return h


def queue(s, h):
    h = h - s.kept[-1] if s.kept else h
    s.kept.append(h.detach().mean(0))
    return h


def bins(s, h):
    s.kept += torch.histc(h.detach(), 40, -3, 3).long()
    return h


def counter(s, h):
    s.kept = s.kept + 1
    return h * (1 + 0.01 * float(s.kept))


def counter_in_place(s, h):
    s.kept += 1
    return h


def last(s, h):
    s.kept = h.detach()
    return h


CARRIED = {
    "mean in a tensor": (mean_of_tensor, torch.zeros(5).double(), False),
    "mean changed in place": (mean_in_place, torch.zeros(5).double(), False),
    "mean through .data": (mean_through_data, torch.zeros(5).double(), False),
    "mean through new .data": (mean_through_new_data, torch.zeros(5).double(), False),
    "mean in a number": (mean_of_number, 0.0, False),
    "queue": (queue, [], False),
    "mean in a buffer": (mean_in_place, torch.zeros(5), True),
    "mean in a buffer through .data": (mean_through_data, torch.zeros(5).double(), True),
    "mean in a buffer through new .data": (mean_through_new_data, torch.zeros(5).double(), True),
    "exact counts in a buffer": (bins, torch.zeros(40, dtype=torch.long), True),
}
HARMLESS = {
    "counter": (counter, 0, False),
    "counter in a buffer": (counter_in_place, torch.zeros((), dtype=torch.long), True),
    "last features, unread": (last, None, False),
}


@pytest.mark.parametrize("case", CARRIED)
def test_what_is_carried_from_batch_to_batch_is_refused(case):
    """Statistics that reach the next batch, or stay in the state dict, are refused by name."""
    keep, kept, buffer = CARRIED[case]
    model = Carrying(keep, kept, buffer)
    assert "kept" in str(refusal(model))


@pytest.mark.parametrize("case", HARMLESS)
def test_state_that_does_not_depend_on_samples_or_is_not_read_passes(case):
    """Counters, also ones that change what comes out, and attributes that nothing reads end up as without a check."""
    keep, kept, buffer = HARMLESS[case]
    model = Carrying(keep, kept, buffer)
    assert refusal(model) is None
    assert model.kept.shape == (N, 5) if case.startswith("last") else int(model.kept) == 1


def test_a_buffer_that_follows_the_weights_only_passes():
    """Spectral norm writes vectors in every training pass, none of which depends on a sample."""
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(D, 5))
    assert refusal(nn.Sequential(layer, nn.Tanh(), nn.Linear(5, 3)).double()) is None


def test_a_pass_without_gradients_may_not_leave_statistics_either():
    """A buffer or attribute written under no_grad is found at the next step; logging in training mode is not in the way."""

    def keep(s, h):
        if not torch.is_grad_enabled():
            s.kept = h.mean(0)
        return h - s.kept

    def losses(model, x):
        with torch.no_grad():
            model(x)
        return losses_of(model, x)

    for buffer in (True, False):
        assert "kept" in str(refusal(Carrying(keep, torch.zeros(5).double(), buffer), losses))
    assert refusal(build("mlp"), losses) is None


# ---------------------------------------------------------------- calls past the hooks, and claims


def test_a_part_without_parameters_that_mixes_is_refused_when_the_loop_calls_it():
    """What stands between two parts may be a module of the model without parameters: it is compared by its outputs."""

    def losses(model, x):
        return F.cross_entropy(model.b(model.c(model.a(x))), torch.arange(len(x)) % 3, reduction="none")

    def parts(middle):
        return Net(None, a=nn.Linear(D, 5), c=middle, b=nn.Linear(5, 3)).double()

    assert "mix" in str(refusal(parts(Net(lambda s, h: h - h.mean(0))), losses)).lower()
    assert refusal(parts(nn.Tanh()), losses) is None


class Encoder(Net):
    def logits(self, x):
        return self.forward(x)


CALLS = {"forward": lambda m, x: m.forward(x), "method": lambda m, x: m.logits(x)}


@pytest.mark.parametrize("call", CALLS)
def test_a_forward_method_called_past_the_hooks_is_checked(call):
    """``model.forward(x)`` is compared like ``model(x)``: refused if it mixes, and right if not."""

    def encoder(mix):
        return Encoder(lambda s, x: s.b(mix(s.a(x)).tanh()), a=nn.Linear(D, 5), b=nn.Linear(5, 3)).double()

    def losses(model, x):
        return F.cross_entropy(CALLS[call](model, x), torch.arange(len(x)) % 3, reduction="none")

    assert "mix" in str(refusal(encoder(lambda h: h - h.mean(0)), losses)).lower()
    assert refusal(encoder(lambda h: h), losses) is None


def steps(model, criterion, loss, count=1):
    """The scope after ``count`` passes with ``loss(model, criterion, x, y)``."""
    x, y = randn(N, D), torch.arange(N) % 3
    scope = scope_over(model, loader=loader_of([x, y]), max_grad_norm=1.0, criterion=criterion, poisson_sampling=True)
    with scope as (opt, loader):
        for k in range(count):
            for a, b in loader:
                opt.zero_grad()
                loss(model, criterion, a, b, k).backward()
                opt.step()
    return scope


RISING = 1 + torch.arange(N, dtype=torch.float64)[:, None]


def hooked(out, hook):
    out.register_hook(hook)
    return out


LOSSES = {
    "all of it": (lambda m, c, x, y, k: c(m(x), y), True),
    "half of it": (lambda m, c, x, y, k: 0.5 * c(m(x), y), True),
    "through another dtype": (lambda m, c, x, y, k: c(m(x).float().view(-1, 3), y), True),
    "by keyword": (lambda m, c, x, y, k: c(input=m(x), target=y), True),
    "of a view": (lambda m, c, x, y, k: c(m(x)[None].squeeze(0).view(-1, 3), target=y), True),
    "of logarithms": (lambda m, c, x, y, k: c(m(x).log_softmax(1), y), False),
    "of similarities": (lambda m, c, x, y, k: (lambda z: c(z @ z.T, torch.arange(N)))(m(x)), False),
    "of outputs less their mean": (lambda m, c, x, y, k: (lambda z: c(z - z.mean(0), y))(m(x)), False),
    "a root of it": (lambda m, c, x, y, k: c(m(x), y).sqrt(), False),
    "below a bound that is not reached": (lambda m, c, x, y, k: c(m(x), y).clamp(max=100.0), False),
    "flooded": (lambda m, c, x, y, k: (c(m(x), y) - 1e-3).abs() + 1e-3, False),
    "above a bound": (lambda m, c, x, y, k: torch.relu(c(m(x), y)), False),
    "the larger of two": (lambda m, c, x, y, k: torch.maximum(c(m(x), y), x.new_zeros(())), False),
    "beside a constant": (lambda m, c, x, y, k: c(m(x), y) + 0.0 * x.square().sum(), True),
    "negative, less one, times three": (lambda m, c, x, y, k: -(1 - c(m(x), y)) * 3, True),
    "divided by itself": (lambda m, c, x, y, k: (lambda loss: loss / loss.detach())(c(m(x), y)), False),
    "another part of it later": (lambda m, c, x, y, k: c(m(x), y) / (k + 1), False),
    "in two halves": (lambda m, c, x, y, k: (lambda out: c(out, y) + c(out.view(-1, 3), y))(m(x)), True),
    "changed on its way": (lambda m, c, x, y, k: c(hooked(m(x), lambda g: g * RISING), y), False),
    "changed in place on its way": (lambda m, c, x, y, k: c(hooked(m(x), lambda g: g.mul_(RISING)), y), False),
    "another term on a view": (lambda m, c, x, y, k: (lambda v: c(v, y) + v.square().mean())(m(x).view(-1, 3)), False),
    "another term": (lambda m, c, x, y, k: c(m(x), y) + (m(x) * m(x).detach().mean(0)).sum(), False),
    "another term on the same outputs": (
        lambda m, c, x, y, k: (lambda out: c(out, y) + (out * out.detach().mean(0)).mean())(m(x)),
        False,
    ),
    "another term later": (lambda m, c, x, y, k: (lambda out: c(out, y) + k * out.square().mean())(m(x)), False),
    "parts only": (lambda m, c, x, y, k: c(m[2](m[1](m[0](x))), y), False),
}


class Showing(nn.Linear):
    """Puts what it was given beside what it returns."""

    def forward(self, h):
        out = super().forward(h)
        out.hidden = [h]
        return out


@pytest.mark.parametrize("way", ["hook", "pre-hook", "hook set in the loop", "hook everywhere", "attribute of the output"])
def test_a_loss_is_not_verified_where_the_loop_can_get_hold_of_what_is_inside_the_model(way, request):
    """Another term may lead into the model past its outputs: by hooks of the user, or beside an output."""
    model, taken = build("mlp"), []
    if way == "hook":
        model[0].register_forward_hook(lambda m, args, out: taken.append(out))
    elif way == "pre-hook":
        model[2].register_forward_pre_hook(lambda m, args: taken.append(args[0]))
    elif way == "hook everywhere":
        everywhere = nn.modules.module.register_module_forward_pre_hook(
            lambda m, args: taken.append(args[0]) if m is model[2] else None
        )
        request.addfinalizer(everywhere.remove)
    elif way == "attribute of the output":
        shown = Showing(model[2].in_features, model[2].out_features).double()
        model[2] = shown

    def loss(model, c, x, y, k):
        handle = model[1].register_forward_hook(lambda m, args, out: taken.append(out)) if way.endswith("loop") else None
        out = model(x)
        if handle is not None:
            handle.remove()
        h = out.hidden[0] if way.startswith("attribute") else taken[-1]
        return c(out, y) + k * (h - h.mean(0)).square().mean()

    assert not steps(model, nn.CrossEntropyLoss(), loss, count=2).report().loss_verified


def test_hooks_of_pytorch_and_on_the_model_itself_hand_out_nothing():
    """Weight norm in its old form, and a hook that gets the outputs, leave a verified loss verified."""
    model = build("mlp")
    nn.utils.weight_norm(model[0])
    model.register_forward_hook(lambda m, args, out: None)
    assert steps(model, nn.CrossEntropyLoss(), lambda m, c, x, y, k: c(m(x), y), count=2).report().loss_verified


@pytest.mark.parametrize("case", LOSSES)
def test_the_loss_is_called_verified_only_if_the_criterion_is_all_of_it(case):
    """What arrives at the model's outputs is compared with what the criterion alone brings, in every step."""
    loss, verified = LOSSES[case]
    report = steps(build("mlp"), nn.CrossEntropyLoss(), loss, count=2).report()
    assert report.loss_verified == verified
    assert report.model_verified == (case != "parts only")


def test_one_step_shows_only_plain_factors():
    """A root is told from half of the loss after one step, too."""
    for loss, verified in ((lambda loss: loss.sqrt(), False), (lambda loss: loss / 2, True), (lambda loss: 3 * loss, True)):
        scope = steps(build("mlp"), nn.CrossEntropyLoss(), lambda m, c, x, y, k, loss=loss: loss(c(m(x), y)))
        assert scope.report().loss_verified == verified


@pytest.mark.parametrize(("weigh", "verified"), [(lambda losses: losses, True), (lambda losses: losses * losses.detach(), False)])
def test_losses_of_a_criterion_may_not_be_weighted_afterwards(weigh, verified):
    """A mean of all losses is the criterion's own; if some count more, who knows why."""
    criterion = nn.CrossEntropyLoss(reduction="none")
    scope = steps(build("mlp"), criterion, lambda m, c, x, y, k: weigh(c(m(x), y)).mean(), count=2)
    assert scope.report().loss_verified == verified


def test_a_criterion_that_returns_no_tensor_is_refused_by_name():
    """A tuple cannot be checked; the error says what to do."""

    class Two(nn.CrossEntropyLoss):
        def forward(self, out, y):
            return super().forward(out, y), y

    with pytest.raises(errors.SelfCheckError, match="returned a tuple"):
        steps(build("mlp"), Two(), lambda m, c, x, y, k: c(m(x), y)[0])


class Writing(nn.CrossEntropyLoss):
    """Leaves something in what it is given, takes something out, and changes the logits in place."""

    def forward(self, given, y):
        given["parts"].append(given["logits"].detach())
        given["parts"][0] = given["logits"]
        given["more"]["loss"] = super().forward(given["logits"].mul_(2.0), y)
        return given["more"]["loss"] + 0 * given.pop("unused").sum()


def test_what_a_criterion_writes_into_its_arguments_is_there_afterwards():
    """The dictionaries and lists of the caller are changed as without the scope, and hold the caller's own tensors."""

    def loss(model, criterion, x, y, k):
        out = model(x)
        before, number = out.detach().clone(), out.new_zeros(1)
        given = {"logits": out, "parts": [number], "more": {"number": number}, "unused": number}
        found = criterion(given, y)
        assert list(given) == ["logits", "parts", "more"]
        assert given["logits"] is given["parts"][0] is out
        assert len(given["parts"]) == 2
        assert given["more"]["number"] is number
        assert given["more"]["loss"].shape == ()
        assert torch.equal(out, 2 * before)
        return found

    assert steps(build("mlp"), Writing(), loss, count=2).report().steps == 2


class Leaving(nn.CrossEntropyLoss):
    """Leaves a part of what it computed where the loop finds it."""

    def __init__(self, where):
        super().__init__()
        self.where, self.part = where, None

    def forward(self, given, y):
        part, loss = given["logits"].square().mean(1), super().forward(given["logits"], y)
        if self.where == "argument":
            given["part"] = part
        elif self.where == "loss":
            loss.part = part
        elif self.where == "in place":
            self.part = torch.zeros(N, dtype=part.dtype) if self.part is None else self.part.detach()
            self.part.copy_(part)
        elif self.where == "backward":
            part.mean().backward(retain_graph=True)
        else:
            setattr(self, "_part" if self.where == "private" else "part", part.detach() if self.where == "detached" else part)
        return loss


@pytest.mark.parametrize("where", ["argument", "attribute", "private", "loss", "in place", "backward", "detached"])
def test_a_loss_is_not_verified_where_the_loop_can_use_more_of_the_criterion_than_its_loss(where):
    """What it leaves with a history is past what is watched, whatever is made of it."""

    def loss(model, c, x, y, k):
        return c({"logits": model(x)}, y)

    found = steps(build("mlp"), Leaving(where), loss, count=2).report()
    assert found.loss_verified is (where == "detached")


def test_a_hook_on_the_loss_is_seen_in_its_factor():
    """It changes the gradient after the criterion is done, by anything."""

    def loss(model, c, x, y, k):
        found = c(model(x), y)
        found.register_hook(lambda g: g * (1.0 + 0.1 * k))
        return found

    assert not steps(build("mlp"), nn.CrossEntropyLoss(), loss, count=2).report().loss_verified


def test_targets_whose_gradient_is_infinite_are_no_reason_to_refuse():
    """Only what comes from the model has gradients that matter; soft targets of zero have no finite one."""

    def loss(model, c, x, y, k):
        return c(model(x).log_softmax(1), F.one_hot(y, 3).double())

    assert steps(build("mlp"), nn.KLDivLoss(reduction="batchmean"), loss, count=2).report().steps == 2


def test_a_criterion_on_a_part_of_the_outputs_is_checked_token_by_token():
    """Shifted by one place, as language models have it: each sample has as many rows of the flattened logits."""

    class Texts(nn.Module):
        def __init__(self):
            super().__init__()
            self.out = nn.Linear(1, 7)

        def forward(self, x):
            return self.out(x[:, :, None])

    def shifted(model, c, x, y, k):
        wanted = (x[:, 1:] * 10).long().remainder(7)
        if uneven:
            wanted = torch.where(torch.arange(len(x))[:, None] > 2, -100, wanted)
        return c(model(x)[:, :-1].reshape(-1, 7), wanted.reshape(-1))

    uneven = False
    steps(Texts().double(), nn.CrossEntropyLoss(), shifted, count=2)
    uneven = True
    with pytest.raises(errors.SelfCheckError, match=r"criterion .* its gradient for sample"):
        steps(Texts().double(), nn.CrossEntropyLoss(), shifted, count=2)


def test_a_criterion_that_gets_the_outputs_in_an_object_is_refused_with_the_cause():
    """The class is named: what is in it is not looked into."""

    class Inside(nn.CrossEntropyLoss):
        def forward(self, given, y):
            return super().forward(given[0], y)

    with pytest.raises(errors.SelfCheckError, match="a deque is not looked into"):
        steps(build("mlp"), Inside(), lambda m, c, x, y, k: c(deque([m(x)]), y), count=1)


@dataclasses.dataclass
class Given:
    logits: torch.Tensor
    extra: torch.Tensor | None = None


class SettingAField(nn.CrossEntropyLoss):
    def forward(self, given, y):
        given.extra = given.logits * 2
        return super().forward(given.logits, y)


class Appending(nn.CrossEntropyLoss):
    def forward(self, first, second, y):
        first.append(first[0] * 2)
        return super().forward(second[-1], y)


class Reordering(nn.CrossEntropyLoss):
    def forward(self, given, y):
        given["out"] = given.pop("out")
        return super().forward(given["out"], y)


def by_field(c, out, y):
    given = Given(out)
    return c(given, y) + given.extra.square().mean()


def by_list(c, out, y):
    given = [out]
    return c(given, given, y) + len(given) * 0.5


def by_dictionary(c, out, y):
    given = {"out": out, "more": torch.zeros_like(out)}
    return c(given, y) + list(given.values())[-1].square().mean()


@pytest.mark.parametrize(
    ("criterion", "use"),
    [(SettingAField, by_field), (Appending, by_list), (Reordering, by_dictionary)],
    ids=lambda case: case.__name__,
)
def test_what_a_criterion_does_to_unusual_arguments_is_as_without_the_scope(criterion, use):
    """Fields of objects, one list given twice, the order of a dictionary: the loss is what it is, verified or not."""
    found = []

    def loss(model, c, x, y, k):
        out = model(x)
        found.append((use(c, out, y), use(criterion(), out.detach(), y)))
        return found[-1][0]

    steps(build("mlp"), criterion(), loss, count=2)
    assert found
    for inside, outside in found:
        torch.testing.assert_close(inside, outside)


def test_a_scripted_criterion_is_refused_by_name():
    """It takes no hooks: the error says what to pass instead."""
    with pytest.raises(errors.InvalidArgumentError, match=r"criterion=.*scripted"):
        steps(build("mlp"), torch.jit.script(nn.CrossEntropyLoss()), lambda m, c, x, y, k: c(m(x), y))


def test_a_criterion_whose_gradient_is_one_number_for_all_outputs_is_watched():
    """Such gradients have no memory of their own for each output."""

    class Mean(nn.Module):
        def forward(self, out, y):
            return out.mean()

    assert steps(build("mlp"), Mean(), lambda m, c, x, y, k: c(m(x).view(N, 1, 3), y), count=2).report().loss_verified


def test_watching_the_criterion_costs_no_backward_pass_and_keeps_no_output(monkeypatch):
    """Its gradient is seen on its way: nothing is computed for that after the first step, and outputs live no longer."""
    passes, kept, grad = [], [], torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, **kwargs: passes.append(1) or grad(*args, **kwargs))

    def loss(model, criterion, x, y, k):
        passes.clear()
        out = model(x)
        kept.append(weakref.ref(out))
        return criterion(out, y)

    class Watched(nn.CrossEntropyLoss):
        def forward(self, out, y):
            return super().forward(out, y)

    scope = steps(build("mlp"), Watched(), lambda *args: loss(*args), count=2)
    assert scope.report().loss_verified
    assert not passes
    assert not [ref for ref in kept if ref() is not None]


def test_checking_is_true_while_the_library_runs_a_function_for_itself():
    """A train function that counts its runs can tell its own steps from those of the self-check."""
    runs = []

    @dp_step
    def step(model, batch):
        runs.append(checking())
        return losses_of(model, *batch)

    model = build("mlp")
    start = values(model)
    with scope_over(model, loader=loader_of([randn(N, D)]), max_grad_norm=1.0, poisson_sampling=True) as (_, loader):
        for _ in range(2):
            for batch in loader:
                step(model, batch)
    assert runs.count(False) == 2
    assert True in runs
    assert any(bool(m.any()) for m in moved(start, model))


@pytest.mark.parametrize(("dtype", "wrong", "refused"), [("float32", 3, False), ("float32", 4, True), ("float64", 1, True)])
@pytest.mark.parametrize("mode", ["ghost", "hooks", "functorch"])
def test_a_jump_of_gradients_by_rounding_is_no_reason_to_refuse(mode, dtype, wrong, refused, monkeypatch):
    """In float32 a run that disagrees is repeated: only what disagrees every time is refused, and what is released is right."""
    runs, compare = [], gradient_comparison.compare_sums

    def jumping(*args, **kwargs):
        runs.append(1)
        if len(runs) <= wrong:
            raise errors.SelfCheckError("a unit was switched")
        compare(*args, **kwargs)

    monkeypatch.setattr(gradient_comparison, "compare_sums", jumping)
    model = two_layers(lambda s, h: h.relu()).to(getattr(torch, dtype))
    x = randn(N, D).to(getattr(torch, dtype))
    expected = clipped_sum(sample_grads(model, losses_of, x), 1.0)
    start = values(model)
    with scope_over(model, loader=loader_of([x]), max_grad_norm=1.0, grad_sample_mode=mode) as (opt, loader):
        for (batch,) in loader:
            with pytest.raises(errors.SelfCheckError, match="a unit was switched") if refused else nullcontext():
                losses_of(model, batch).mean().backward()
                opt.step()
    if refused:
        return
    for moved_by, want in zip(moved(start, model), expected.values(), strict=True):
        torch.testing.assert_close(moved_by, want / N, rtol=1e-4, atol=1e-6)
    assert len(runs) == wrong + 1


@pytest.mark.parametrize("by_function", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_an_infinite_output_or_loss_does_not_hide_that_others_mix(dtype, by_function):
    """One record with infinite values in the first batch is no measure for the values of the others."""
    dtype = getattr(torch, dtype)

    def mixed(s, x):
        h = s.a(x)
        return torch.cat([h[:5], h[5:] + 0.1 * h[5:].detach().mean(0)]).exp()

    x = randn(N, D).to(dtype)
    model = Net(mixed, a=nn.Linear(D, 5)).to(dtype)
    x[0] = 1e5 * model.a.weight.detach().sum(0)  # exp overflows in it
    mode = laws.MODE["two-pass" if by_function else "ghost"]
    error = laws.released(model, [x], laws.step_in(mode, lambda m, x: m(x).sum(1)), mode)
    assert bool(model(x)[0].isinf().any())
    assert error is not None
    assert "is off by" in str(error)


def by_autograd(s, x):
    """The slope of a potential at each sample."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(s.a(x).tanh().square().sum(), x, create_graph=False)
    return s.b(s.a(x.detach()) + slope.mean(1, keepdim=True))


def by_func(s, x):
    """The same by torch.func, which allows no hooks on saved tensors."""
    slope = torch.func.grad(lambda z: z.tanh().square().sum())(x)
    return s.b(s.a(x + slope))


@pytest.mark.parametrize("little", [0, 1 << 22])
@pytest.mark.parametrize("forward", [by_autograd, by_func])
def test_gradients_inside_a_forward_pass_are_no_reason_to_refuse(forward, little, monkeypatch):
    """Runs of which nothing is saved cannot compute them, and are made anew."""
    monkeypatch.setattr("dp_hooks.checks.comparison._LITTLE", little)
    model = Net(forward, a=nn.Linear(D, D), b=nn.Linear(D, 3)).double()
    if forward is by_autograd:
        model.a.requires_grad_(False)
    assert laws.released(model, [randn(16, D)]) is None


@pytest.mark.parametrize("samples", [3, 4, 9, 33])
@pytest.mark.parametrize("by_function", [False, True])
def test_gradients_of_a_few_samples_are_enough_to_see_what_mixes(by_function, samples, monkeypatch):
    """Where a run keeps many activations, values are compared of all samples, gradients of those with the largest and smallest."""
    monkeypatch.setattr("dp_hooks.checks.comparison._LITTLE", 0)
    for mixes in (True, False):
        model = two_layers(lambda s, h, mixes=mixes: HalfMixed.apply(h, mixes))
        step = dp_step(lambda m, x: losses_of(m, x))
        with scope_over(model, loader=loader_of([randn(samples, D)]), max_grad_norm=1.0) as (opt, loader):
            for (x,) in loader:
                with pytest.raises(errors.SelfCheckError) if mixes else nullcontext():
                    if by_function:
                        step(model, x)
                    else:
                        losses_of(model, x).mean().backward()
                        opt.step()


class HalfMixed(torch.autograd.Function):
    """Identity; its gradient is centred over the batch if it ``mixes``."""

    @staticmethod
    def forward(ctx, h, mixes):
        ctx.mixes = mixes
        return h.view_as(h)

    @staticmethod
    def backward(ctx, grad):
        return (grad - grad.mean(0) if ctx.mixes else grad), None


def catching(s, x):
    """Takes another way where gradients cannot be computed."""
    try:
        with torch.enable_grad():
            z = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(z.pow(4).sum(), z)
    except RuntimeError:
        slope = torch.zeros_like(x)
    return s.b(s.a(x - 0.1 * slope).tanh())


def one_for_each(s, x):
    """The rows of what is between, too, one by one."""
    h = s.a(x)
    return s.b(h), list(h)


@pytest.mark.parametrize("forward", [catching, one_for_each])
@pytest.mark.parametrize("samples", [3, 8, 16])
def test_what_runs_on_a_few_samples_may_be_any_model(forward, samples, monkeypatch):
    """Models that catch errors, and such with an output for each sample."""
    monkeypatch.setattr("dp_hooks.checks.comparison._LITTLE", 0)
    model = Net(forward, a=nn.Linear(D, D), b=nn.Linear(D, 3)).double()
    with scope_over(model, loader=loader_of([randn(samples, D)]), max_grad_norm=1.0) as (opt, loader):
        for (x,) in loader:
            out = model(x)
            (out[0] if isinstance(out, tuple) else out).square().sum(1).mean().backward()
            opt.step()


@pytest.mark.parametrize("samples", [3, 5, 9])
def test_samples_that_are_not_finite_are_not_those_that_are_looked_at(samples, monkeypatch):
    """One with infinite values and one with NaN have no gradient that could be compared; the others have."""
    monkeypatch.setattr("dp_hooks.checks.comparison._LITTLE", 0)
    x = randn(samples, D)
    x[0, 0], x[-1] = torch.inf, torch.nan
    model = two_layers(lambda s, h: h.tanh())
    with scope_over(model, loader=loader_of([x]), max_grad_norm=1.0) as (opt, loader):
        for (batch,) in loader:
            losses_of(model, batch).mean().backward()
            opt.step()


@pytest.mark.parametrize("little", [0, 1 << 22])
@pytest.mark.parametrize("samples", [8, 32])
def test_a_few_samples_are_computed_as_the_whole_batch_is(little, samples, monkeypatch):
    """Norms that come from Gram matrices in the step come from these in the check: they are wrong, and that is found."""
    monkeypatch.setattr("dp_hooks.checks.comparison._LITTLE", little)
    sound = ghost_norms.sq_norms
    monkeypatch.setattr(ghost_norms, "sq_norms", lambda uses: 0.25 * sound(uses))
    model = Net(lambda s, x: s.b(s.a(x).tanh()), a=nn.Linear(100, 100), b=nn.Linear(100, 100)).double()
    with scope_over(model, loader=loader_of([randn(samples, 100)]), max_grad_norm=1.0) as (opt, loader):
        for (x,) in loader:
            losses_of(model, x).mean().backward()
            with pytest.raises(errors.SelfCheckError):
                opt.step()


class Larger(nn.Module):
    """Keeps a mean in a buffer if the batch has more samples than its parts."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(D, D), nn.Linear(D, 3)
        self.register_buffer("mean", torch.zeros(D))

    def forward(self, x):
        h = self.a(x).tanh()
        if len(x) > 9:
            self.mean.lerp_(h.detach().mean(0), 0.1)
        return self.b(h)


def test_what_only_the_whole_batch_leaves_is_found(monkeypatch):
    """Gradients are compared of a few samples, but state is that of all."""
    monkeypatch.setattr("dp_hooks.checks.comparison._LITTLE", 0)
    model = Larger().double()
    with scope_over(model, loader=loader_of([randn(24, D)]), max_grad_norm=1.0) as (opt, loader):
        for (x,) in loader:
            losses_of(model, x).mean().backward()
            with pytest.raises(errors.SelfCheckError, match="mean"):
                opt.step()
