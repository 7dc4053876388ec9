"""What a scope leaves behind (nothing), however it ends, and what happens while it lasts."""

import copy
import gc
import io
import pickle
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.hooks import RemovableHandle

from dp_hooks import HookController, PrivateDataLoader, PrivateOptimizer, PrivateTraining
from dp_hooks.errors import ScopeError

from ..models import (
    BOUND,
    BUILDERS,
    MODES,
    assert_same,
    build,
    clipped_sum,
    each_mode,
    examples,
    expected_move,
    in_order,
    moved,
    sample_gradients,
    scope_over,
    values,
)
from ..snapshot import Snapshot

ERRORS = (RuntimeError, KeyboardInterrupt, GeneratorExit)

each_model = pytest.mark.parametrize("name", list(BUILDERS))


class Fuse:
    """Raises a given exception once, at the place it is armed for; ``blown`` tells that it did."""

    def __init__(self, error: BaseException) -> None:
        self.error = error
        self.where = ""
        self.blown = False

    def __call__(self, where: str) -> None:
        if self.where == where:
            self.where = ""
            self.blown = True
            raise self.error


class FusedData(Dataset[Any]):
    def __init__(self, fuse: Fuse) -> None:
        self.fuse = fuse
        self.x, self.y = examples()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.fuse("loader")
        return self.x[index], self.y[index]


def light(fuse: Fuse, out: Tensor) -> None:
    """Let ``fuse``, if armed for it, go off when the backward pass comes to ``out``."""
    if fuse.where == "backward" and out.requires_grad:
        fuse.where = "gradient"  # only this once: a layer may be run again while gradients are worked out
        out.register_hook(lambda grad: fuse("gradient"))


def fuse_linear(monkeypatch: pytest.MonkeyPatch, fuse: Fuse) -> None:
    """Let ``fuse`` go off within the forward of a hooked linear layer, or in the backward pass of its output."""
    plain = F.linear

    def linear(*args: Any, **kwargs: Any) -> Tensor:
        out = plain(*args, **kwargs)
        fuse("forward")
        light(fuse, out)
        return out

    monkeypatch.setattr(F, "linear", linear)


def step(model: nn.Module, opt: torch.optim.Optimizer, x: Tensor, y: Tensor, fuse: Fuse | None = None) -> None:
    """Take one ordinary training step."""
    opt.zero_grad()
    out = model(x)
    if fuse is not None:
        light(fuse, out)
    F.cross_entropy(out, y).backward()
    opt.step()


def train(model: nn.Module, scope: PrivateTraining) -> None:
    """Run one pass within ``scope``."""
    with scope as (opt, loader):
        for x, y in loader:
            step(model, opt, x, y)


def has_hooks(model: nn.Module) -> bool:
    """Whether any module or parameter of ``model`` has a hook, or something instead of its class's ``__getstate__``."""
    return any(
        value
        for module in model.modules()
        for key, value in vars(module).items()
        if key in ("__getstate__", "__deepcopy__") or (key.startswith(("_forward_", "_backward_")) and "hooks" in key)
    ) or any(p._post_accumulate_grad_hooks for p in model.parameters())


@each_mode
@pytest.mark.parametrize("where", ["body", "forward", "backward", "step", "loader"])
@pytest.mark.parametrize(
    ("name", "error"),
    [
        *[(name, error) for name in ("mlp", "owner") for error in ERRORS],
        *[(name, KeyboardInterrupt) for name in ("tied", "lstm", "weight_norm")],
    ],
)
def test_an_exception_inside_removes_everything_and_stays_itself(
    name: str, where: str, error: type[BaseException], mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exception at any point of a step comes out as the same object, and nothing is left on the model."""
    model = build(name)
    fuse = Fuse(error("stop"))
    fuse_linear(monkeypatch, fuse)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(examples()[0])
    before = Snapshot(model, optimizer)
    scope = scope_over(model, optimizer=optimizer, loader=DataLoader(FusedData(fuse), 3), grad_sample_mode=mode)
    caught: BaseException | None = None
    try:
        with scope as (opt, loader):
            opt.attach_step_hook(lambda _: fuse("step"))
            batches = iter(loader)
            step(model, opt, *next(batches))
            fuse.where = where
            step(model, opt, *next(batches), fuse)
            fuse("body")
    except BaseException as raised:  # noqa: BLE001
        caught = raised
    assert caught is fuse.error
    assert fuse.blown
    assert before.differences() == []
    assert not scope.is_open


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("point", ["hooks", "last hook", "watchers", "optimizer", "loader"])
def test_an_exception_while_entering_takes_everything_back(
    point: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If entering fails half-way, what was installed is gone, and the model can be entered by another scope."""
    model = build("conv")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = Snapshot(model, optimizer)
    original, calls = error("stop"), []

    def later(plain: Callable[..., Any], skip: int) -> Callable[..., Any]:
        def patched(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) > skip:
                raise original
            return plain(*args, **kwargs)

        return patched

    with monkeypatch.context() as patch:
        if point == "hooks":
            patch.setattr(nn.Module, "register_forward_hook", later(nn.Module.register_forward_hook, 2))
        elif point == "last hook":
            patch.setattr(nn.Module, "register_forward_hook", later(nn.Module.register_forward_hook, 6))
        elif point == "watchers":
            watch = Tensor.register_post_accumulate_grad_hook
            patch.setattr(Tensor, "register_post_accumulate_grad_hook", later(watch, 2))
        elif point == "optimizer":
            patch.setattr(PrivateOptimizer, "__init__", later(PrivateOptimizer.__init__, 0))
        else:
            patch.setattr(PrivateDataLoader, "__init__", later(PrivateDataLoader.__init__, 0))
        scope = scope_over(model, optimizer=optimizer)
        with pytest.raises(error) as caught:
            scope.__enter__()
    assert caught.value is original
    assert calls
    assert before.differences() == []
    train(model, scope_over(model, optimizer=optimizer))
    assert before.differences() == []


@pytest.mark.parametrize("error", ERRORS)
def test_an_exception_while_leaving_does_not_stop_the_rest_of_the_removal(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If removing one hook fails, all others are removed all the same, and the failure is reported as it is."""
    model = build("conv")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = Snapshot(model, optimizer)
    original, removals = error("stop"), []
    remove = RemovableHandle.remove

    def failing(handle: RemovableHandle) -> None:
        remove(handle)
        removals.append(handle)
        if len(removals) == 3:
            raise original

    scope = scope_over(model, optimizer=optimizer)
    with monkeypatch.context() as patch:
        patch.setattr(RemovableHandle, "remove", failing)
        scope.__enter__()
        removals.clear()
        with pytest.raises(error) as caught:
            scope.__exit__(None, None, None)
    assert caught.value is original
    assert len(removals) > 3
    assert before.differences() == []
    assert not scope.is_open
    train(model, scope_over(model, optimizer=optimizer))


def test_a_failing_removal_does_not_hide_the_exception_of_the_body(monkeypatch: pytest.MonkeyPatch) -> None:
    """When body and removal both fail, the body's exception is what comes out or what the other is chained to."""
    model = build("mlp")
    remove, original, removals = RemovableHandle.remove, KeyboardInterrupt("body"), []

    def failing(handle: RemovableHandle) -> None:
        remove(handle)
        removals.append(handle)
        raise RuntimeError("removal")

    caught: BaseException | None = None
    monkeypatch.setattr(RemovableHandle, "remove", failing)
    try:
        with scope_over(model):
            raise original
    except BaseException as raised:  # noqa: BLE001
        caught = raised
    chain = []
    while caught is not None and caught not in chain:
        chain.append(caught)
        caught = caught.__context__
    assert original in chain
    assert len(removals) > 3
    assert not has_hooks(model)


@each_mode
def test_closing_a_generator_that_holds_the_scope_ends_it(mode: str) -> None:
    """A scope inside a generator ends when the generator is closed in the middle of a pass."""
    model = build("mlp")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = Snapshot(model, optimizer)

    def training() -> Iterator[int]:
        with scope_over(model, optimizer=optimizer, loader=in_order(6, 2), grad_sample_mode=mode) as (opt, loader):
            for x, y in loader:
                opt.zero_grad()
                F.cross_entropy(model(x), y).backward()
                yield 1
                opt.step()

    run = training()
    next(run)
    next(run)
    assert has_hooks(model)
    run.close()
    assert before.differences() == []


@each_mode
@pytest.mark.parametrize("end", ["ordinary", "exception"])
def test_hooks_of_the_user_stay_as_they_were(mode: str, end: str) -> None:
    """Hooks a user put on modules, parameters and optimizer before the scope are there afterwards, in their order."""
    model = build("conv")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ran: list[str] = []
    for module in (model, model.head):
        module.register_forward_pre_hook(lambda *_: ran.append("pre"))
        module.register_forward_hook(lambda *_: ran.append("post"))
    next(model.parameters()).register_post_accumulate_grad_hook(lambda _: ran.append("accumulated"))
    next(model.parameters()).register_hook(lambda _: ran.append("gradient"))
    optimizer.register_step_pre_hook(lambda *_: ran.append("step"))
    criterion = nn.CrossEntropyLoss()
    before = Snapshot(model, optimizer, criterion)
    with suppress(KeyError), scope_over(model, optimizer=optimizer, grad_sample_mode=mode) as (opt, loader):
        x, y = next(iter(loader))
        criterion(model(x), y).backward()
        opt.step()
        if end == "exception":
            raise KeyError
    assert before.differences() == []
    ran.clear()
    step(model, optimizer, *examples())
    assert ran == ["pre", "pre", "post", "post", "gradient", "accumulated", "step"]


@each_mode
def test_hooks_added_by_the_user_inside_the_scope_survive_it(mode: str) -> None:
    """A hook that the user registers inside the scope is not removed together with the scope's own."""
    model = build("mlp")
    ran: list[str] = []
    with scope_over(model, grad_sample_mode=mode):
        model[0].register_forward_hook(lambda *_: ran.append("forward"))
        model[0].weight.register_post_accumulate_grad_hook(lambda _: ran.append("accumulated"))
    F.cross_entropy(model(examples()[0]), examples()[1]).backward()
    assert ran == ["forward", "accumulated"]


@each_mode
def test_an_old_graph_is_dead_after_the_scope(mode: str) -> None:
    """Back-propagating, after the end, a loss computed inside records nothing and raises nothing."""
    model = build("mlp")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = Snapshot(model, optimizer)
    scope = scope_over(model, optimizer=optimizer, grad_sample_mode=mode)
    with scope as (_, loader):
        loss = F.cross_entropy(model(next(iter(loader))[0]), examples()[1])
    loss.backward()
    assert before.differences() == []
    assert all(p.grad is None for p in model.parameters())
    assert scope.controller is not None
    assert not scope.controller.has_gradients


@each_mode
def test_an_old_graph_does_not_reach_a_later_scope(mode: str) -> None:
    """A graph from an earlier scope adds nothing to the step of a later scope on the same model."""
    model, (x, y) = build("mlp"), examples()
    with scope_over(model, grad_sample_mode=mode):
        old = F.cross_entropy(model(x), y)
    expected, start = expected_move(build("mlp")), values(model)
    with scope_over(model, grad_sample_mode=mode) as (opt, loader):
        for a, b in loader:
            F.cross_entropy(model(a), b).backward()
            old.backward()
            opt.step()
    assert_same(moved(start, model), expected)


def test_a_finished_scope_keeps_no_activations_or_gradients_alive() -> None:
    """After the end, no tensor of a captured batch is kept by the scope, in any mode."""
    scopes = [scope_over(build("mlp"), grad_sample_mode=mode) for mode in MODES]
    shapes = {(6, 5), (6, 5, 4), (6, 3, 5)}  # activations, and per-sample gradients of the two weights

    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(t), Tensor) and tuple(t.shape) in shapes for t in gc.get_objects())

    before = alive()
    for scope in scopes:
        with scope as (_, loader):
            for x, y in loader:
                F.cross_entropy(scope.model(x), y).backward()
            del x, y
    assert alive() == before


@each_mode
@pytest.mark.parametrize("name", ["mlp", "tied", "lstm", "owner", "weight_norm"])
@pytest.mark.parametrize("where", ["forward", "backward", "step", "loader"])
def test_training_goes_on_after_an_interrupt_caught_inside(
    name: str, where: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a KeyboardInterrupt that the user catches inside the scope, the next step is as if it had not happened."""
    model = build(name)
    fuse = Fuse(KeyboardInterrupt("stop"))
    fuse_linear(monkeypatch, fuse)
    loader = DataLoader(FusedData(fuse), 6)
    start = values(model)
    with scope_over(model, loader=loader, grad_sample_mode=mode) as (opt, private):
        opt.attach_step_hook(lambda _: fuse("step"))
        fuse.where = where
        with suppress(KeyboardInterrupt):
            for x, y in private:
                step(model, opt, x, y, fuse)
        assert fuse.blown
        for x, y in private:
            step(model, opt, x, y)
    assert_same(moved(start, model), expected_move(build(name)))


@pytest.mark.parametrize("name", ["mlp", "lstm"])
def test_an_interrupted_forward_leaves_usable_parameters_behind(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an interrupted forward, ``zero_grad`` is enough for the user to see the trainable parameters again."""
    model = build(name)
    fuse = Fuse(KeyboardInterrupt("stop"))
    fuse_linear(monkeypatch, fuse)
    with scope_over(model) as (opt, loader):
        fuse.where = "forward"
        with suppress(KeyboardInterrupt):
            model(next(iter(loader))[0])
        assert fuse.blown
        opt.zero_grad()
        assert all(isinstance(p, nn.Parameter) and p.requires_grad for p in model.parameters())


def by_pickle(model: nn.Module) -> nn.Module:
    """Copy through pickle."""
    return pickle.loads(pickle.dumps(model))


def by_torch_save(model: nn.Module) -> nn.Module:
    """Copy through ``torch.save``."""
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": by_pickle, "torch.save": by_torch_save}


MOMENTS = ("before forward", "before backward", "before step", "after step")
COPY_CASES = [
    *[(name, "deepcopy", moment) for name in BUILDERS for moment in MOMENTS],
    # PyTorch cannot pickle parametrized modules.
    *[(name, way, "before step") for name in BUILDERS if name != "weight_norm" for way in ("pickle", "torch.save")],
]


@each_mode
@pytest.mark.parametrize(("name", "way", "moment"), COPY_CASES)
def test_a_copy_made_inside_is_a_plain_model(name: str, way: str, moment: str, mode: str) -> None:
    """A copy made at any moment has the values, ties and no hook or gradient, trains as a plain model, and disturbs no step."""
    model, copied, start = build(name), None, values(build(name))
    with scope_over(model, grad_sample_mode=mode) as (opt, loader):
        for x, y in loader:
            copied = COPIES[way](model) if moment == "before forward" else copied
            loss = F.cross_entropy(model(x), y)
            copied = COPIES[way](model) if moment == "before backward" else copied
            loss.backward()
            copied = COPIES[way](model) if moment == "before step" else copied
            if copied is not None:
                assert_same(values(copied), values(model))
            opt.step()
            copied = COPIES[way](model) if moment == "after step" else copied
        assert copied is not None
        assert not has_hooks(copied)
        assert not any(vars(p) for p in copied.parameters())
        assert [key for key, _ in copied.named_parameters()] == [key for key, _ in model.named_parameters()]
        assert not {id(p) for p in copied.parameters()} & {id(p) for p in model.parameters()}
        assert_same(moved(start, model), expected_move(build(name)))
        plain = build(name)
        plain.load_state_dict(copied.state_dict())
        for m in (copied, plain):
            m.zero_grad()
            F.cross_entropy(m(x), y).backward()
        assert_same([p.grad for p in copied.parameters()], [p.grad for p in plain.parameters()])
    assert not has_hooks(model)


@each_mode
def test_an_averaged_model_follows_the_training(mode: str) -> None:
    """``AveragedModel`` made and updated inside the scope averages the parameters over the steps."""
    model = build("mlp")
    with scope_over(model, loader=in_order(6, 2), grad_sample_mode=mode) as (opt, loader):
        averaged = torch.optim.swa_utils.AveragedModel(model)
        seen = []
        for x, y in loader:
            step(model, opt, x, y)
            averaged.update_parameters(model)
            seen.append(values(model))
    means = [torch.stack(column).mean(0) for column in zip(*seen, strict=True)]
    assert_same([p.detach() for p in averaged.parameters()], means)


@each_mode
def test_a_copy_has_the_present_values_also_after_data_was_replaced(mode: str) -> None:
    """A second copy sees values that were put in through ``.data`` after the first one."""
    model = build("mlp")
    with scope_over(model, grad_sample_mode=mode) as (_, loader):
        x, y = next(iter(loader))
        F.cross_entropy(model(x), y).backward()
        copy.deepcopy(model)
        for p in model.parameters():
            p.data = torch.full_like(p, 7.0)
        copied = copy.deepcopy(model)
    assert all(bool((p == 7).all()) for p in copied.parameters())


@each_mode
def test_model_and_optimizer_copied_together_belong_together(mode: str) -> None:
    """One deep copy of model and optimizer, between backward and step, gives an optimizer that trains the copied model."""
    model = build("mlp")
    with scope_over(model, grad_sample_mode=mode) as (opt, loader):
        x, y = next(iter(loader))
        F.cross_entropy(model(x), y).backward()
        copied, copied_opt = copy.deepcopy((model, opt))
    of_optimizer = [id(p) for group in copied_opt.param_groups for p in group["params"]]
    assert of_optimizer == [id(p) for p in copied.parameters()]


def test_a_scope_cannot_be_entered_twice() -> None:
    """Entering an open or a finished scope again is an error that leaves the model alone."""
    model = build("mlp")
    scope = scope_over(model)
    with scope as (opt, loader):
        with pytest.raises(ScopeError, match="open and cannot be entered again"):
            scope.__enter__()
        for x, y in loader:
            step(model, opt, x, y)
    with pytest.raises(ScopeError, match="over and cannot be entered again"):
        scope.__enter__()
    assert not has_hooks(model)


@pytest.mark.parametrize("part", ["same", "child", "parent", "parameter"])
def test_nesting_on_the_same_parameters_is_refused(part: str) -> None:
    """A scope over a model, a part, a parent or a module sharing a parameter of it is refused while the first is open."""
    model = build("mlp")
    sharing = nn.Linear(4, 5).double()
    sharing.weight = model[0].weight
    other = {"same": model, "child": model[0], "parent": nn.Sequential(model), "parameter": sharing}[part]
    start = values(model)
    with scope_over(model) as (opt, loader):
        before = Snapshot(model)
        with pytest.raises(ScopeError, match="already in an open private scope"), scope_over(other):
            pass
        assert before.differences() == []
        for x, y in loader:
            step(model, opt, x, y)
    assert_same(moved(start, model), expected_move(build("mlp")))
    with scope_over(other):
        assert has_hooks(other)


def test_two_scopes_on_two_models_train_side_by_side() -> None:
    """In a GAN loop with two scopes, each network's step is the clipped sum of its own per-sample gradients."""
    x, _ = examples()
    noise = torch.randn(6, 2, dtype=torch.float64)
    with torch.random.fork_rng():
        generator = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 4)).double()
        critic = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    gen, crit = copy.deepcopy((generator, critic))
    loss = F.binary_cross_entropy_with_logits
    ones, zeros = torch.ones(6, 1, dtype=torch.float64), torch.zeros(6, 1, dtype=torch.float64)

    def of_critic(m: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
        return loss(m(real), ones[: len(real)]) + loss(m(fake), zeros[: len(fake)])

    with scope_over(critic) as (c_opt, c_loader), scope_over(generator) as (g_opt, g_loader):
        for (real, _), _ in zip(c_loader, g_loader, strict=True):
            starts = values(critic), values(generator)
            c_opt.zero_grad()
            of_critic(critic, real, generator(noise).detach()).backward()
            c_opt.step()
            g_opt.zero_grad()
            loss(critic(generator(noise)), ones).backward()
            g_opt.step()
            c_opt.zero_grad()
    fakes = gen(noise).detach()
    of_c = clipped_sum(sample_gradients(crit, x, fakes, of_critic), BOUND)
    assert_same(moved(starts[0], critic), [g / 6 for g in of_c])
    crit.load_state_dict(critic.state_dict())
    of_g = clipped_sum(sample_gradients(gen, noise, ones, lambda m, z, t: loss(crit(m(z)), t)), BOUND)
    assert_same(moved(starts[1], generator), [g / 6 for g in of_g])
    assert not has_hooks(generator)
    assert not has_hooks(critic)


def test_scopes_may_end_in_any_order() -> None:
    """Of two scopes on two models, the one that was opened first may end first."""
    first, second = build("mlp"), build("conv")
    one, two = scope_over(first), scope_over(second)
    one.__enter__()
    opt, loader = two.__enter__()
    one.__exit__(None, None, None)
    assert not has_hooks(first)
    start = values(second)
    for x, y in loader:
        step(second, opt, x, y)
    two.__exit__(None, None, None)
    assert_same(moved(start, second), expected_move(build("conv")))
    assert not has_hooks(second)


@each_mode
@pytest.mark.parametrize("stepped", [False, True])
@pytest.mark.parametrize("cause", ["break", "exception"])
@pytest.mark.parametrize("parts", [1, 2])
def test_the_step_after_an_abandoned_logical_batch_is_clean(parts: int, cause: str, stepped: bool, mode: str) -> None:
    """Leaving the loop after some physical parts adds nothing to the next logical batch."""
    model = build("mlp")
    start = values(model)
    with scope_over(model, grad_sample_mode=mode, max_physical_batch_size=2) as (opt, loader):
        with suppress(KeyError):
            for index, (x, y) in enumerate(loader, start=1):
                opt.zero_grad()
                F.cross_entropy(model(x), y).backward()
                if stepped or index < parts:
                    opt.step()
                if index == parts:
                    if cause == "exception":
                        raise KeyError
                    break
        assert_same(values(model), start)
        for x, y in loader:
            step(model, opt, x, y)
    assert_same(moved(start, model), expected_move(build("mlp")))


class Generator(nn.Module):
    """Draws tokens one after the other, without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 4)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4, 8)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.drop(self.embedding(ids)).cumsum(1))

    @torch.no_grad()
    def generate(self, ids: Tensor, length: int) -> Tensor:
        for _ in range(length):
            ids = torch.cat([ids, self(ids)[:, -1].argmax(-1, keepdim=True)], 1)
        return ids


def test_generation_inside_the_scope_is_that_of_the_plain_model() -> None:
    """``generate`` between two steps gives what the plain model gives, and keeps nothing."""
    model = Generator()
    plain = copy.deepcopy(model).eval()
    prompt = torch.tensor([[1], [5]])
    scope = scope_over(model, loader=in_order())
    with scope:
        model.eval()
        generated = model.generate(prompt, 4)
        model.train()
        assert scope.controller is not None
        assert not scope.controller.has_gradients
    assert torch.equal(generated, plain.generate(prompt, 4))
    assert generated.shape == (2, 5)


@each_mode
@pytest.mark.parametrize("kind", ["no_grad", "inference_mode", "eval", "train"])
@pytest.mark.parametrize("moment", ["before forward", "before backward", "before step"])
def test_validation_inside_leaves_the_step_alone(moment: str, kind: str, mode: str) -> None:
    """A forward on other data, at any moment and in any mode, is right and adds nothing to the step."""
    model = build("conv")
    start, validation = values(model), examples(11)[0]
    expected = build("conv")(validation)

    def validate() -> Tensor:
        with ExitStack() as stack:
            if kind in ("no_grad", "inference_mode"):
                stack.enter_context(getattr(torch, kind)())
            model.train(kind == "train")
            out = model(validation)
            model.train()
            return out

    with scope_over(model, grad_sample_mode=mode) as (opt, loader):
        for x, y in loader:
            found = validate() if moment == "before forward" else None
            loss = F.cross_entropy(model(x), y)
            found = validate() if moment == "before backward" else found
            loss.backward()
            found = validate() if moment == "before step" else found
            opt.step()
    assert found is not None
    assert_same([found.detach().clone()], [expected.detach()])
    assert_same(moved(start, model), expected_move(build("conv")))


@each_mode
@each_model
def test_eval_mode_with_gradients_is_right(name: str, mode: str) -> None:
    """A model in eval mode is trained with the same clipped gradients as autograd gives for it."""
    model = build(name).eval()
    start = values(model)
    train(model, scope_over(model, grad_sample_mode=mode))
    assert_same(moved(start, model), expected_move(build(name).eval()))


def test_a_controller_on_its_own_leaves_nothing_after_cleanup() -> None:
    """``HookController`` used without a scope takes back what it installed, as often as it is asked."""
    model = build("tied")
    before = Snapshot(model)
    controller = HookController(model)
    F.cross_entropy(model(examples()[0]), examples()[1]).backward()
    assert model.decoder.weight.grad_sample.shape == (6, 8, 5)
    controller.add_hooks()
    controller.cleanup()
    controller.cleanup()
    assert before.differences() == []
