"""What no value of a first batch shows: gradients that mix alone, state from other passes, criteria called several times."""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dp_hooks import dp_step, errors
from dp_hooks.checks.comparison import Comparison

from ..models import Net, loader_of, randn, scope_over, values
from .steps import D, N, each_style, opened, refused, refused_in

# ---------------------------------------------------------------- gradients that mix where no value does


class Scaled(torch.autograd.Function):
    """Identity whose gradient is multiplied with ``factor``."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        return h.view_as(h)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (factor,) = ctx.saved_tensors
        return grads[0] * factor, None


def by_hook(h: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    h = h * 1
    if h.requires_grad:
        h.register_hook(change)
    return h


def centred(h: Tensor) -> Tensor:
    return h - h.mean(0)


def attending(h: Tensor) -> Tensor:
    return torch.softmax(h @ h.mT, -1) @ h


def behind_zero_weights(mix: Callable[[Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    return lambda s, x: s.zero(mix(s.a(x)))


# forward(self, x), with the mixing and without
BACKWARD_ONLY: dict[str, tuple[Callable[[Any, Tensor], Tensor], Callable[[Any, Tensor], Tensor]]] = {
    "centred before a head of zeros": (behind_zero_weights(centred), behind_zero_weights(torch.tanh)),
    "attention before a head of zeros": (behind_zero_weights(attending), behind_zero_weights(torch.sin)),
    "adapter that ends in zeros": (lambda s, x: s.b(s.a(x)) + s.zero(centred(s.a(x))), lambda s, x: s.b(s.a(x)) + s.zero(s.a(x))),
    "branch times a gate of zero": (lambda s, x: s.b(s.a(x) + s.gate * centred(x)), lambda s, x: s.b(s.a(x) + s.gate * x.tanh())),
    "custom function before a head of zeros": (
        behind_zero_weights(lambda h: Scaled.apply(h, h.detach().norm())),
        behind_zero_weights(lambda h: Scaled.apply(h, h.detach().norm(dim=1, keepdim=True))),
    ),
    "tensor hook before a head of zeros": (
        behind_zero_weights(lambda h: by_hook(h, lambda g: g - g.mean(0))),
        behind_zero_weights(lambda h: by_hook(h, lambda g: g.clamp(-1, 1))),
    ),
    "straight through before a head of zeros": (
        behind_zero_weights(lambda h: h.detach() + centred(h) - centred(h).detach()),
        behind_zero_weights(lambda h: h.detach() + h.sin() - h.sin().detach()),
    ),
    "tensor hook before a gate of zero": (
        lambda s, x: s.b(s.a(x)) + s.gate[:3] * s.b(by_hook(s.a(x), lambda g: g - g.mean(0))),
        lambda s, x: s.b(s.a(x)) + s.gate[:3] * s.b(by_hook(s.a(x), lambda g: g.clamp(-1, 1))),
    ),
    "gradient scaled past the value": (
        lambda s, x: s.b((h := s.a(x)).detach() + (h - h.detach()) * x.norm()),
        lambda s, x: s.b((h := s.a(x)).detach() + (h - h.detach()) * x.norm(dim=1, keepdim=True)),
    ),
    "custom function": (
        lambda s, x: s.b(Scaled.apply(s.a(x), x.norm())),
        lambda s, x: s.b(Scaled.apply(s.a(x), x.norm(dim=1, keepdim=True))),
    ),
    "tensor hook": (
        lambda s, x: s.b(by_hook(s.a(x), lambda g: g - g.mean(0))),
        lambda s, x: s.b(by_hook(s.a(x), lambda g: g.clamp(-1, 1))),
    ),
}


def two_layers(forward: Callable[[Any, Tensor], Tensor]) -> nn.Module:
    layers = {"a": nn.Linear(D, D), "b": nn.Linear(D, 3), "zero": nn.Linear(D, 3)}
    model = Net(forward, **layers, gate=nn.Parameter(torch.zeros(D)))
    nn.init.zeros_(layers["zero"].weight)
    return model.double()


@pytest.mark.filterwarnings("ignore:the loss did not reach")
@each_style
@pytest.mark.parametrize("case", BACKWARD_ONLY)
def test_gradients_that_mix_where_no_value_does_are_refused(case: str, step: Any) -> None:
    """Behind weights of zero, in hooks and custom functions: gradients are compared with those of single samples, too."""
    mixing, sound = map(two_layers, BACKWARD_ONLY[case])
    with opened(mixing) as (opt, loader), refused("differ from plain autograd", mixing):
        step(mixing, opt, next(iter(loader)))
    with opened(sound) as (opt, loader):
        step(sound, opt, next(iter(loader)))


# ---------------------------------------------------------------- state


class Keeping(nn.Module):
    """Subtracts ``kept``, which is written in the backward pass, or in a forward pass when ``when(self)``."""

    def __init__(self, write: Callable[[Any, Tensor], None], *, backward: bool = False, buffer: bool = False) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(D, D), nn.Linear(D, 3)
        self.write, self.backward, self.late = write, backward, False
        start = torch.zeros(D, dtype=torch.float64)
        if buffer:
            self.register_buffer("kept", start)
        else:
            self.kept: Any = start

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        out = h - (self.kept["mean"] if isinstance(self.kept, dict) else self.kept)
        if self.backward:
            return self.b(by_hook(out, lambda g: self.write(self, g.detach())))
        self.write(self, h.detach())
        return self.b(out.tanh())


def set_mean(s: Any, h: Tensor) -> None:
    s.kept = h.mean(0)


def copy_mean(s: Any, h: Tensor) -> None:
    s.kept.copy_(h.mean(0))


def mean_beside_an_object(s: Any, h: Tensor) -> None:
    s.kept = {"mean": h.mean(0), "of": print}


@each_style
@pytest.mark.parametrize("buffer", [False, True])
def test_state_that_a_backward_pass_leaves_is_refused(buffer: bool, step: Any) -> None:
    """A hook on a gradient that keeps its mean for the next batch is found, as one in the forward pass is."""
    model = Keeping(copy_mean, backward=True, buffer=buffer).double()
    with opened(model) as (opt, loader), refused("kept", model):
        step(model, opt, next(iter(loader)))


@each_style
def test_what_is_kept_beside_other_objects_is_found(step: Any) -> None:
    """A dictionary with a tensor and something that is no value is looked at, too."""
    model = Keeping(mean_beside_an_object).double()
    with opened(model) as (opt, loader), refused("kept", model):
        step(model, opt, next(iter(loader)))


@each_style
def test_what_begins_to_be_kept_later_is_found_then(step: Any) -> None:
    """An attribute that changes for the first time in a later step has that step checked."""
    refused_in(1, "kept", Keeping(lambda s, h: set_mean(s, h) if s.late else None).double(), step)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    model.eval()
    yield
    model.train()


def _evaluate(model: nn.Module, x: Tensor) -> None:
    with evaluating(model), torch.no_grad():
        model(x)


@each_style
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("buffer", [False, True])
def test_what_an_evaluation_leaves_for_training_is_refused(buffer: bool, late: bool, step: Any) -> None:
    """Statistics that a pass in eval mode leaves for the next training pass are found, before the first step and later."""
    model = Keeping(lambda s, h: None if s.training else copy_mean(s, h), buffer=buffer).double()
    with opened(model, 2) as (opt, loader):
        batches = iter(loader)
        if late:
            step(model, opt, next(batches))
        batch = next(batches)
        _evaluate(model, batch[0])
        with refused("kept", model):
            step(model, opt, batch)


@each_style
def test_an_evaluation_that_begins_to_leave_something_is_looked_at_again(step: Any) -> None:
    """That earlier passes left nothing is no reason to trust one that does."""
    model = Keeping(lambda s, h: set_mean(s, h) if s.late and not s.training else None).double()
    refused_in(1, "kept", model, step, before=_evaluate)


def into_a_list(s: Any, h: Tensor) -> None:
    s.bank.append(h)


def with_an_underscore(s: Any, h: Tensor) -> None:
    s._kept = h.mean(0)


class Bank(nn.Module):
    """Adds what is in ``bank`` and ``_kept``; writes to one of them in calls that are ``late``."""

    def __init__(self, write: Callable[[Any, Tensor], None]) -> None:
        super().__init__()
        self.a, self.b, self.write, self.late = nn.Linear(D, D), nn.Linear(D, 3), write, False
        self.bank: list[Tensor] = []
        self._kept: Any = 0.0

    def forward(self, x: Tensor) -> Tensor:
        out = self.a(x) + self._kept + sum((h.mean(0) for h in self.bank), torch.zeros(D, dtype=x.dtype))
        if self.late:
            self.write(self, x.detach())
        return self.b(out.tanh())


@each_style
@pytest.mark.parametrize("write", [into_a_list, with_an_underscore])
def test_what_is_written_to_in_one_later_call_only_is_found_then(write: Callable[[Any, Tensor], None], step: Any) -> None:
    """Lists and attributes of any name, written to past all operations."""
    refused_in(1, "bank|_kept", Bank(write).double(), step)


class Holder:
    """An object of a class of its own, as a model may keep a memory bank in."""

    def __init__(self, value: Tensor) -> None:
        self.value = value


def _array(value: Tensor) -> Any:
    return value.numpy().copy()


class Callable_(Holder):
    def __call__(self) -> Tensor:
        return self.value


def hidden(z: Tensor) -> list[nn.Module]:
    """A module that is not registered."""
    inner = nn.Identity()
    inner.register_buffer("value", z)
    return [inner]


# Where a mean can be kept: what is made of zeros, how it is read, and how it is written.
PLACES: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Any], Callable[[Any, Tensor], None]]] = {
    "in place": (lambda z: z, lambda kept: kept, lambda kept, v: kept.copy_(v)),
    "in a dictionary": (lambda z: {"a": {"b": z}}, lambda kept: kept["a"]["b"], lambda kept, v: kept["a"]["b"].copy_(v)),
    "an item of a dictionary": (lambda z: {"a": z}, lambda kept: kept["a"], lambda kept, v: kept.update(a=v)),
    "in a tuple": (lambda z: (z,), lambda kept: kept[0], lambda kept, v: kept[0].copy_(v)),
    "among many": (lambda z: [z] * 100, lambda kept: kept[7], lambda kept, v: kept.__setitem__(7, v)),
    "a frozen parameter": (lambda z: nn.Parameter(z, requires_grad=False), lambda kept: kept, lambda kept, v: kept.copy_(v)),
    "its data": (lambda z: z, lambda kept: kept, lambda kept, v: setattr(kept, "data", v)),
    "an array": (_array, torch.from_numpy, lambda kept, v: kept.__setitem__(slice(None), _array(v))),
    "an object": (Holder, lambda kept: kept.value, lambda kept, v: setattr(kept, "value", v)),
    "an object that can be called": (Callable_, lambda kept: kept(), lambda kept, v: setattr(kept, "value", v)),
    "objects in an object": (
        lambda z: Holder(Holder(z)),  # type: ignore[arg-type]
        lambda kept: kept.value.value,
        lambda kept, v: setattr(kept.value, "value", v),
    ),
    "a module in a list": (hidden, lambda kept: kept[0].value, lambda kept, v: kept[0].value.copy_(v)),
    "a list of objects": (lambda z: [Holder(z)], lambda kept: kept[0].value, lambda kept, v: setattr(kept[0], "value", v)),
}


class Placed(nn.Module):
    """Takes off what is kept in some place, and writes a mean of its features there when told to."""

    def __init__(self, place: str) -> None:
        super().__init__()
        make, self.read, self.write = PLACES[place]
        self.a, self.b, self.late = nn.Linear(D, D), nn.Linear(D, 3), False
        self.kept = make(torch.zeros(D, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).tanh()
        out = self.b(3 * (h - self.read(self.kept).clone()))
        if self.late:
            with torch.no_grad():
                self.write(self.kept, h.detach().mean(0))
        return out


@each_style
@pytest.mark.parametrize("evaluation", [False, True])
@pytest.mark.parametrize("place", PLACES)
def test_what_is_kept_is_found_wherever_it_is_as_soon_as_that_begins(place: str, evaluation: bool, step: Any) -> None:
    """A mean of the batch that a later pass, of training or evaluation, leaves in any place that the model reaches."""
    model = Placed(place).double()
    with opened(model, 3) as (opt, loader):
        batches = iter(loader)
        step(model, opt, next(batches))
        batch = next(batches)
        model.late = True
        if evaluation:
            _evaluate(model, batch[0])
            model.late = False
        with refused("kept", model.b):
            step(model, opt, batch)


@each_style
def test_an_item_that_a_log_begins_to_keep_later_is_looked_at(step: Any) -> None:
    """That other items of the dictionary change in every step, and harmlessly, says nothing about this one."""

    def log(s: Any, h: Tensor) -> None:
        s.log["calls"] += 1
        if s.late:
            s.log["mean"] = h.mean(0)

    model = Keeping(log).double()
    model.log = {"calls": 0}  # type: ignore[assignment]
    model.register_forward_pre_hook(lambda m, args: (args[0] + m.log.get("mean", 0.0),))
    with opened(model, 3) as (opt, loader):
        batches = iter(loader)
        step(model, opt, next(batches))
        model.late = True
        with refused("log", model):
            step(model, opt, next(batches))


@each_style
@pytest.mark.parametrize("log", [lambda s, h: setattr(s, f"of_{len(vars(s))}", h), lambda s, h: s.kept_log.append(h)])
def test_a_log_that_grows_in_every_step_is_looked_at_few_times(
    log: Callable[[Any, Tensor], None], step: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of its items is new; after three checks of such no more are made."""
    runs = []
    original = Comparison.run
    monkeypatch.setattr(Comparison, "run", lambda self, *args: (runs.append(1), original(self, *args))[1])
    model = Keeping(log).double()
    model.kept_log = []  # type: ignore[assignment]
    with opened(model, 6) as (opt, loader):
        for batch in loader:
            step(model, opt, batch)
    assert len(runs) == 3
    assert len(model.kept_log) + sum(name.startswith("of_") for name in vars(model)) == 6


@each_style
def test_attributes_that_change_in_every_step_are_looked_at_once(step: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor that is written to and made anew by turns is known by its name: one check, not one in every step."""
    runs = []

    def write(s: Any, h: Tensor) -> None:
        s.kept.zero_()
        s.kept = torch.zeros(D, dtype=h.dtype)

    original = Comparison.run
    monkeypatch.setattr(Comparison, "run", lambda self, *args: (runs.append(1), original(self, *args))[1])
    model = Keeping(write).double()
    with opened(model, 4) as (opt, loader):
        for batch in loader:
            step(model, opt, batch)
    assert len(runs) == 1


@each_style
def test_metrics_that_an_evaluation_leaves_are_no_reason_to_refuse(step: Any) -> None:
    """A buffer that evaluations write to and training never reads stays allowed."""
    model = Net(lambda s, x: s.b(s.count(s.a(x))), a=nn.Linear(D, D), b=nn.Linear(D, 3), count=Counting()).double()
    with opened(model, 3) as (opt, loader):
        for batch in loader:
            _evaluate(model, batch[0])
            step(model, opt, batch)
    assert float(model.count.seen) == 3 * N


class Turns(nn.Module):
    """Gathers means of evaluations, of training batches or of both, and takes off what came of it so many calls later."""

    def __init__(self, turns: int, *, training: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(D, D), nn.Linear(D, 3)
        self.turns, self.in_training, self.late = turns, training, True  # whether it is taken off
        self.register_buffer("kept", torch.zeros(D, dtype=torch.float64))
        self.gathered: list[Tensor] = []
        self.read = torch.zeros(D, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).tanh()
        out = self.b(3 * (h - self.read)) if self.late else self.b(3 * h + 1)
        if self.training is self.in_training:
            self.gathered.append(h.detach().mean(0))
            if len(self.gathered) == self.turns:
                self.read, self.gathered = torch.stack(self.gathered).mean(0), []
        return out


@each_style
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("turns", [2, 4])
def test_what_is_gathered_over_several_calls_is_found_at_the_first(turns: int, training: bool, step: Any) -> None:
    """A queue that is read when it is full, and class means published after some evaluations."""
    model = Turns(turns, training=training).double()
    with opened(model, 2) as (opt, loader):
        batch = next(iter(loader))
        if not training:
            _evaluate(model, batch[0])
        with refused("read|gathered", model):
            step(model, opt, batch)


@each_style
def test_what_training_begins_to_read_later_is_found_then(step: Any) -> None:
    """Prototypes that evaluations leave from the start, and that a flag has training make use of after some steps."""
    refused_in(2, "read", Turns(1, training=False).double(), step, after=_evaluate)


def with_gradients(model: nn.Module, x: Tensor) -> None:
    """An evaluation without ``no_grad``."""
    with evaluating(model):
        model(x)


def past_the_hooks(model: nn.Module, x: Tensor) -> None:
    """An evaluation by the method itself."""
    with evaluating(model), torch.no_grad():
        model.forward(x)


def in_inference_mode(model: nn.Module, x: Tensor) -> None:
    """An evaluation in inference mode."""
    with evaluating(model), torch.inference_mode():
        model(x)


@each_style
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("evaluate", [with_gradients, past_the_hooks, in_inference_mode])
def test_an_evaluation_of_any_kind_may_leave_nothing(evaluate: Callable[[Any, Tensor], None], after: bool, step: Any) -> None:
    """With gradients, past ``__call__``, and in inference mode; before a step, and after one."""
    model = Keeping(lambda s, h: None if s.training else set_mean(s, h)).double()
    with opened(model, 2) as (opt, loader):
        for batch in loader:
            if not after:
                evaluate(model, batch[0])
            with refused("kept", model) if not after or model.late else nullcontext():
                step(model, opt, batch)
            if not after or model.late:
                break
            evaluate(model, batch[0])
            model.late = True


@each_style
@pytest.mark.parametrize("training", [False, True])
def test_a_forward_pass_may_not_write_into_what_is_trained(training: bool, step: Any) -> None:
    """Codes that follow the features in an exponential mean get no noise; weights that are only kept in bounds need none."""

    class Codes(nn.Module):
        def __init__(self, follows: bool) -> None:
            super().__init__()
            self.a, self.b, self.follows = nn.Linear(D, D), nn.Linear(D, 3), follows
            self.code = nn.Parameter(torch.zeros(D))

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            if self.training is training:
                self.code.data.lerp_(h.detach().mean(0), 0.5) if self.follows else self.code.data.clamp_(-1, 1)
            return self.b(h - self.code)

    for follows in (True, False):
        model = Codes(follows).double()
        with opened(model, 2) as (opt, loader):
            batches = iter(loader)
            batch = next(batches)
            _evaluate(model, batch[0])
            with pytest.raises(errors.SelfCheckError, match="code: what is trained is written to") if follows else nullcontext():
                step(model, opt, batch)


class Caching(nn.Module):
    """Grows a table, in a buffer, to the length of what it gets: in evaluations of longer rows."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.longest = nn.Linear(1, 3), 0
        self.register_buffer("table", None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] > self.longest:
            self.longest = x.shape[1]
            self.table = torch.arange(self.longest, dtype=torch.float64).cos()
        return self.a((x * self.table[: x.shape[1]]).mean(1, keepdim=True))


@each_style
def test_a_cache_that_an_evaluation_grows_is_no_reason_to_refuse(step: Any) -> None:
    """Codes of positions follow from the length alone."""
    model = Caching().double()
    with opened(model, 3) as (opt, loader):
        for k, batch in enumerate(loader):
            step(model, opt, batch)
            _evaluate(model, torch.cat([batch[0]] * (k + 1), 1))


class Sized(nn.Module):
    """Keeps a cache of as many rows as it got first, in an object, for evaluations."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.cache = nn.Linear(D, D), nn.Linear(D, 3), Holder(torch.zeros(0))

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if not self.training:
            if not self.cache.value.numel():
                self.cache.value = torch.zeros_like(h)
            self.cache.value.copy_(h.detach())
        return self.b(h)


@each_style
def test_a_cache_of_as_many_rows_as_the_batch_is_no_reason_to_refuse(step: Any) -> None:
    """An evaluation is run aside on as many rows as it was on."""
    model = Sized().double()
    with opened(model, 3) as (opt, loader):
        for batch in loader:
            _evaluate(model, batch[0])
            step(model, opt, batch)


class Activations(dict):  # type: ignore[type-arg]
    """A dictionary of a class of its own."""


@each_style
@pytest.mark.parametrize("kept", [lambda h: [h], lambda h: (h, [h.tanh()]), lambda h: Activations(h=(h,)), Holder])
def test_activations_may_be_kept_in_anything(kept: Callable[[Tensor], Any], step: Any) -> None:
    """With their history, in lists that grow and in tuples inside: the next run puts others there."""

    def forward(s: Any, x: Tensor) -> Tensor:
        h = s.a(x)
        s.log.append(kept(h))
        s.last = kept(h)
        s.log = s.log[-3:]
        return s.b(h.tanh())

    model = Net(forward, a=nn.Linear(D, D), b=nn.Linear(D, 3)).double()
    model.log, model.last = Doubling(), None  # type: ignore[assignment]
    with opened(model, 3, spot_check_rate=1.0) as (opt, loader):
        for batch in loader:
            step(model, opt, batch)
    assert len(model.log) == 3


class Hooking(nn.Module):
    """Collects what its layers give out by hooks that it puts on them in its first call, as ``transformers`` models do."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.hooked = nn.Linear(D, D), nn.Linear(D, 3), False
        self.found: list[Tensor] = []

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        if not self.hooked:
            self.a.register_forward_hook(lambda m, args, out: self.found.append(out))
            self.hooked = True
        self.found = []
        out = self.b(self.a(x).tanh())
        return (out, *self.found)


def test_hooks_that_a_model_puts_on_itself_are_there_once() -> None:
    """Runs of checks leave none behind, and outputs of inner layers beside those of the model are compared as they are."""
    model = Hooking().double()
    with opened(model, 3, spot_check_rate=1.0) as (opt, loader):
        for (x,) in loader:
            opt.zero_grad()
            out = model(x)
            assert len(out) == 2
            out[0].square().mean(1).mean().backward()
            opt.step()
    assert len(model.a._forward_hooks) == 1


class Meter:
    """Sums up, as a log does."""

    def __init__(self) -> None:
        self.total, self.items = torch.zeros(D, dtype=torch.float64), [0.0]

    def update(self, h: Tensor) -> None:
        self.total += h.sum(0)
        self.items.append(float(h.sum()))


class Doubling(list):  # type: ignore[type-arg]
    """A list that does more than it is told."""

    def extend(self, items: Any) -> None:
        super().extend([*items, *items])


def _frozen(array: Any) -> Any:
    array.setflags(write=False)
    return array


# What a model may hold, and what it does with it in every training pass.
LOGS: dict[str, tuple[Callable[[], Any], Callable[[Any, Tensor], Any]]] = {
    "tensor in place": (lambda: torch.zeros(D, dtype=torch.float64), lambda kept, h: kept.add_(h.sum(0))),
    "in an ordered dictionary": (
        lambda: OrderedDict(a=torch.zeros(D, dtype=torch.float64)),
        lambda kept, h: kept["a"].add_(h.sum(0)),
    ),
    "a meter": (Meter, lambda kept, h: kept.update(h)),
    "meters in a dictionary": (lambda: {"a": {"b": Meter()}}, lambda kept, h: kept["a"]["b"].update(h)),
    "a long list": (lambda: [0.0] * 254, lambda kept, h: kept.append(1.0)),
    "a large array": (lambda: torch.zeros(20_000).numpy(), lambda kept, h: kept.__iadd__(1.0)),
    "an array that cannot be written to": (lambda: _frozen(torch.zeros(3).numpy()), lambda kept, h: kept + 1),
    "a list of its own kind": (lambda: Doubling([0.0]), lambda kept, h: kept.append(1.0)),
    "a circle": (lambda: [c := [1.0], c.append(c)], lambda kept, h: kept[0].append(1.0)),  # type: ignore[func-returns-value]
    "numbers of eight bits": (lambda: torch.zeros(3).to(torch.float8_e4m3fn), lambda kept, h: kept.fill_(1.0)),
}


@each_style
@pytest.mark.parametrize("log", LOGS)
def test_what_a_model_logs_is_the_same_with_the_checks(log: str, step: Any) -> None:
    """Logs, meters and arrays hold afterwards what they would without a scope, and are the objects they were."""
    make, write = LOGS[log]
    found = []
    for private in (True, False):
        model, kept = Keeping(lambda s, h: write(s.held, h)).double(), make()
        model.held = kept  # type: ignore[assignment]
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(0.1)
        scope = opened(model, 6, spot_check_rate=1.0, noise_multiplier=0.0) if private else nullcontext((None, None))
        with scope as (opt, _):
            for i in range(6):
                with torch.no_grad():
                    for p in model.parameters():
                        p.fill_(0.1)
                if private:
                    step(model, opt, [torch.full((N, D), i + 1.0).double()])
                else:
                    model(torch.full((N, D), i + 1.0).double())
        assert model.held is kept
        found.append(_contents(kept))
    assert found[0] == found[1]


def _contents(kept: Any) -> str:
    if isinstance(kept, Meter):
        return f"{kept.total} {kept.items}"
    if isinstance(kept, dict):
        return str({key: _contents(value) for key, value in kept.items()})
    return str(kept)


class Counting(nn.Module):
    """Adds up how many rows evaluations saw, and what was in them."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("total", torch.zeros(()))

    def forward(self, h: Tensor) -> Tensor:
        if not self.training:
            self.seen += len(h)
            self.total += h.sum()
        return h


# ---------------------------------------------------------------- criteria that are called several times


def tokens() -> tuple[nn.Module, Tensor, Tensor]:
    """A model of tokens, a batch, and targets of which every sample has all."""
    model = nn.Linear(D, 3).double()
    return model, randn(N, 5, D), torch.arange(N * 5).reshape(N, 5) % 3


def _uneven(y: Tensor) -> Tensor:
    return torch.where(torch.arange(5) < 1 + torch.arange(len(y))[:, None] % 5, y, -100)


@pytest.mark.parametrize("first", ["even", "uneven"])
@pytest.mark.parametrize("later", [False, True])
def test_every_call_of_a_criterion_is_checked(first: str, later: bool) -> None:
    """Of two heads' losses the first may be the one that is a mean over the tokens of the batch, at once or later."""
    model, x, y = tokens()
    criterion, seen = nn.CrossEntropyLoss(), 0
    scope = scope_over(model, loader=loader_of([x.repeat(3, 1, 1), y.repeat(3, 1)], N), criterion=criterion, max_grad_norm=1.0)
    with scope as (opt, loader):
        for number, (part, target) in enumerate(loader):
            wrong = _uneven(target) if number == later else target
            pair = (target, wrong) if first == "even" else (wrong, target)
            opt.zero_grad()
            out = model(part).mT
            (criterion(out, pair[0]) + criterion(out, pair[1])).backward()
            if number == later:
                with pytest.raises(errors.SelfCheckError, match="criterion"):
                    opt.step()
                seen = 1
                break
            opt.step()
    assert seen


@pytest.mark.parametrize("detached", [False, True])
def test_a_call_for_a_log_hides_nothing_and_is_not_judged(detached: bool) -> None:
    """A loss that is computed to be printed neither hides the one that is trained on nor has to be sound itself."""
    for even in (True, False):
        model, x, y = tokens()
        criterion = nn.CrossEntropyLoss()
        with scope_over(model, loader=loader_of([x, y], N), criterion=criterion, max_grad_norm=1.0) as (opt, loader):
            part, target = next(iter(loader))
            opt.zero_grad()
            out = model(part).mT
            loss = criterion(out, target if even else _uneven(target))
            criterion(out.detach() if detached else out, _uneven(target) if even else target).item()
            loss.backward()
            if even:
                opt.step()
                continue
            with pytest.raises(errors.SelfCheckError, match="criterion"):
                opt.step()


class OverAll(nn.Module):
    """Deep supervision: calls itself for each of several outputs."""

    reduction = "mean"

    def forward(self, outs: Any, y: Tensor) -> Tensor:
        if isinstance(outs, list):
            return torch.stack([self(out, y) for out in outs]).sum()
        return F.cross_entropy(outs, y)


def test_a_criterion_may_call_itself() -> None:
    """A loss over a list of outputs that is the sum of the same loss over each is checked as one."""
    model = Net(lambda s, x: [s.b(h := s.a(x).tanh()), s.c(h)], a=nn.Linear(D, D), b=nn.Linear(D, 3), c=nn.Linear(D, 3)).double()
    criterion, y = OverAll(), torch.arange(N) % 3
    scope = scope_over(model, loader=loader_of([randn(N, D), y], N), criterion=criterion, max_grad_norm=1.0)
    with scope as (opt, loader):
        x, target = next(iter(loader))
        criterion(model(x), target).backward()
        opt.step()
    assert "verified" in next(line for line in str(scope.report()).splitlines() if line.strip().startswith("loss "))


# ---------------------------------------------------------------- means over targets

LAYOUTS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "by sample": lambda out, y: (out.mT, y),
    "flattened": lambda out, y: (out.flatten(0, 1), y.flatten()),
    "time first": lambda out, y: (out.permute(1, 2, 0), y.T),
    "time first, flattened": lambda out, y: (out.transpose(0, 1).flatten(0, 1), y.T.flatten()),
}


# A criterion that gets samples along another axis than the first is not checked by itself.
@pytest.mark.parametrize(
    ("layout", "style"), [("by sample", "criterion"), ("flattened", "criterion"), *((layout, "dp_step") for layout in LAYOUTS)]
)
def test_targets_that_begin_to_count_unevenly_are_noticed(layout: str, style: str) -> None:
    """Wherever samples are in the targets: the same number of tokens is left out of each at first, and not later."""
    model, x, y = tokens()
    y[:, 0] = -100
    criterion = nn.CrossEntropyLoss()
    train = dp_step(lambda m, batch: criterion(*LAYOUTS[layout](m(batch[0]), batch[1])))
    options = {} if style == "dp_step" else {"criterion": criterion}
    targets = torch.cat([y, y, _uneven(y)])
    with scope_over(model, loader=loader_of([x.repeat(3, 1, 1), targets], N), max_grad_norm=1.0, **options) as (opt, loader):
        for number, batch in enumerate(loader):
            before = values(model)

            def step(batch: Any = batch) -> None:
                if style == "dp_step":
                    train(model, batch)
                    return
                opt.zero_grad()
                criterion(*LAYOUTS[layout](model(batch[0]), batch[1])).backward()
                opt.step()

            if number < 2:
                step()
                continue
            with pytest.raises(errors.SelfCheckError):
                step()
            assert all(torch.equal(a, b) for a, b in zip(before, values(model), strict=True))


# ---------------------------------------------------------------- trainable tensors that are no parameters


class Hiding(nn.Module):
    """Computes with a trainable tensor that is no parameter of it."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(D, D), nn.Linear(D, 3)
        hidden = torch.ones(D, dtype=torch.float64, requires_grad=True)
        if where == "buffer":
            self.register_buffer("hidden", hidden)
        else:
            self.hidden = {"attribute": hidden, "list": [nn.Parameter(hidden.detach())], "module": [nn.Linear(D, D).double()]}[
                where
            ]

    def tensors(self) -> list[Tensor]:
        """What is hidden."""
        hidden = self.hidden[0] if isinstance(self.hidden, list) else self.hidden
        return list(hidden.parameters()) if isinstance(hidden, nn.Module) else [hidden]

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.hidden[0] if isinstance(self.hidden, list) else self.hidden
        h = self.a(x)
        return self.b((hidden(h) if isinstance(hidden, nn.Module) else h * hidden).tanh())


@each_style
@pytest.mark.parametrize("where", ["attribute", "buffer", "list", "module"])
def test_trainable_tensors_that_are_no_parameters_are_not_trained(where: str, step: Any) -> None:
    """They get gradients of private samples without noise: refused in a loop, and no optimizer applies them after ``@dp_step``."""
    model = Hiding(where).double()
    with opened(model) as (opt, loader):
        other, before = torch.optim.SGD(model.tensors(), lr=1.0), [t.detach().clone() for t in model.tensors()]

        def train() -> None:
            step(model, opt, next(iter(loader)))
            other.step()

        with pytest.raises((errors.SelfCheckError, errors.ScopeError), match=r"no parameters of the model|outside the model"):
            train()
        assert all(torch.equal(t, old) for t, old in zip(model.tensors(), before, strict=True))
