"""What a scope leaves behind (nothing), however it ends, and what happens while it lasts."""

import copy
import gc
from contextlib import nullcontext, suppress

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from dp_hooks import PrivateDataLoader, PrivateOptimizer
from dp_hooks.capture import module_hooks
from dp_hooks.errors import ScopeError

from ..models import BUILDERS, COPIES, MODES, Net, assert_same, build, each_mode, examples, has_hooks, in_order, scope_over, values
from ..snapshot import Snapshot
from ..training.helpers import Run, backward, sgd, step, train

ERRORS = (RuntimeError, KeyboardInterrupt, GeneratorExit)


class Fuse:
    """Raises a given exception once, at the place it is armed for; ``blown`` tells that it did."""

    def __init__(self, error):
        self.error, self.where, self.blown = error, "", False

    def __call__(self, where):
        if self.where == where:
            self.where, self.blown = "", True
            raise self.error


class FusedData(Dataset):
    def __init__(self, fuse):
        self.fuse = fuse
        self.x, self.y = examples()

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        self.fuse("loader")
        return self.x[index], self.y[index]


def light(fuse, out):
    """Let ``fuse``, if armed for it, go off when the backward pass comes to ``out``."""
    if fuse.where == "backward" and out.requires_grad:
        fuse.where = "gradient"  # only this once: a layer may be run again while gradients are worked out
        out.register_hook(lambda grad: fuse("gradient"))


@pytest.fixture
def fused(monkeypatch):
    """Return a function that makes a run with a fuse in its loader, the forward and backward of linear layers, and the step."""
    plain = F.linear

    def make(name, error, batch, mode):
        fuse = Fuse(error)

        def linear(*args, **kwargs):
            out = plain(*args, **kwargs)
            fuse("forward")
            light(fuse, out)
            return out

        monkeypatch.setattr(F, "linear", linear)
        loader = DataLoader(FusedData(fuse), batch)
        return Run(name, prepare=lambda m: m(examples()[0]), loader=loader, grad_sample_mode=mode), fuse

    return make


def lit_step(model, opt, x, y, fuse):
    """Take an ordinary step in which ``fuse`` may go off."""
    opt.zero_grad()
    out = model(x)
    light(fuse, out)
    F.cross_entropy(out, y).backward()
    opt.step()


def failing_removals(patch, make_error, at=None):
    """Let the removal of hook number ``at``, or of every hook, fail after it is done; return the list of removals."""
    remove, removals = module_hooks._take_out, []

    def failing(module, number):
        remove(module, number)
        removals.append(number)
        if at in (None, len(removals)):
            raise make_error()

    patch.setattr(module_hooks, "_take_out", failing)
    return removals


@each_mode
@pytest.mark.parametrize("where", ["body", "forward", "backward", "step", "loader"])
@pytest.mark.parametrize(
    ("name", "error"),
    [
        *[(name, error) for name in ("mlp", "owner") for error in ERRORS],
        *[(name, KeyboardInterrupt) for name in ("tied", "lstm", "weight_norm")],
    ],
)
def test_an_exception_inside_removes_everything_and_stays_itself(name, where, error, mode, fused):
    """An exception at any point of a step comes out as the same object, and nothing is left on the model."""
    run, fuse = fused(name, error("stop"), 3, mode)
    with pytest.raises(error) as caught, run as (model, opt, loader):  # noqa: PT012
        opt.attach_step_hook(lambda _: fuse("step"))
        batches = iter(loader)
        step(model, opt, *next(batches))
        fuse.where = where
        lit_step(model, opt, *next(batches), fuse)
        fuse("body")
    assert caught.value is fuse.error
    assert fuse.blown
    assert run.before.differences() == []
    assert not run.scope.is_open


ENTERING = {
    "hooks": (nn.Module, "register_forward_hook", 2),
    "last hook": (nn.Module, "register_forward_hook", 6),
    "watchers": (Tensor, "register_post_accumulate_grad_hook", 2),
    "optimizer": (PrivateOptimizer, "__init__", 0),
    "loader": (PrivateDataLoader, "__init__", 0),
}


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("point", ENTERING)
def test_an_exception_while_entering_takes_everything_back(point, error, monkeypatch):
    """If entering fails half-way, what was installed is gone, and the model can be entered by another scope."""
    run, (owner, name, skip), original, calls = Run("conv"), ENTERING[point], error("stop"), []
    plain = getattr(owner, name)

    def later(*args, **kwargs):
        calls.append(1)
        if len(calls) > skip:
            raise original
        return plain(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, later)
        with pytest.raises(error) as caught:
            run.__enter__()
    assert caught.value is original
    assert calls
    assert run.before.differences() == []
    Run(run.model, optimizer=lambda _: run.original).trained()
    assert run.before.differences() == []


@pytest.mark.parametrize("error", ERRORS)
def test_an_exception_while_leaving_does_not_stop_the_rest_of_the_removal(error, monkeypatch):
    """If removing one hook fails, all others are removed all the same, and the failure is reported as it is."""
    run, original = Run("conv"), error("stop")
    with monkeypatch.context() as patch:
        removals = failing_removals(patch, lambda: original, at=3)
        run.__enter__()
        removals.clear()
        with pytest.raises(error) as caught:
            run.__exit__(None, None, None)
    assert caught.value is original
    assert len(removals) > 3
    assert run.before.differences() == []
    assert not run.scope.is_open
    Run(run.model, optimizer=lambda _: run.original).trained()


def test_a_failing_removal_does_not_hide_the_exception_of_the_body(monkeypatch):
    """When body and removal both fail, the body's exception is what comes out or what the other is chained to."""
    run, original = Run(), KeyboardInterrupt("body")
    removals = failing_removals(monkeypatch, lambda: RuntimeError("removal"))
    with pytest.raises((KeyboardInterrupt, RuntimeError)) as caught, run:
        raise original
    chain, error = [], caught.value
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__context__
    assert original in chain
    assert len(removals) > 3
    assert not has_hooks(run.model)


@each_mode
def test_closing_a_generator_that_holds_the_scope_ends_it(mode):
    """A scope inside a generator ends when the generator is closed in the middle of a pass."""
    run = Run(loader=in_order(6, 2), grad_sample_mode=mode)

    def training():
        with run as (model, opt, loader):
            for x, y in loader:
                opt.zero_grad()
                backward(model, x, y)
                yield
                opt.step()

    steps = training()
    next(steps)
    next(steps)
    assert has_hooks(run.model)
    steps.close()
    assert run.before.differences() == []


@each_mode
@pytest.mark.parametrize("end", ["ordinary", "exception"])
def test_hooks_of_the_user_stay_as_they_were(mode, end):
    """Hooks a user put on modules and optimizer before the scope are there afterwards, in their order."""
    model, criterion, ran = build("conv"), nn.CrossEntropyLoss(), []
    optimizer = sgd(model)
    for module in (model, model.head):
        module.register_forward_pre_hook(lambda *_: ran.append("pre"))
        module.register_forward_hook(lambda *_: ran.append("post"))
    optimizer.register_step_pre_hook(lambda *_: ran.append("step"))
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
    assert ran == ["pre", "pre", "post", "post", "step"]


@each_mode
def test_hooks_added_by_the_user_inside_the_scope_survive_it(mode):
    """A hook that the user registers inside the scope is not removed together with the scope's own."""
    ran = []
    with Run(grad_sample_mode=mode) as (model, _, _):
        model[0].register_forward_hook(lambda *_: ran.append("forward"))
        model[0].weight.register_post_accumulate_grad_hook(lambda _: ran.append("accumulated"))
    backward(model, *examples())
    assert ran == ["forward", "accumulated"]


@each_mode
def test_an_old_graph_is_dead_after_the_scope(mode):
    """Back-propagating, after the end, a loss computed inside records nothing and raises nothing, in a later scope neither."""
    run, (x, y) = Run(grad_sample_mode=mode), examples()
    with run as (model, _, _):
        one, two = F.cross_entropy(model(x.requires_grad_()), y), F.cross_entropy(model(x.detach()), y)
    one.backward()
    torch.testing.assert_close(x.grad, torch.autograd.grad(F.cross_entropy(model(x), y), x)[0])
    assert run.scope.controller.take() is None
    assert run.before.differences() == []
    assert all(p.grad is None for p in model.parameters())
    assert not run.scope.controller.has_gradients
    later = Run(model, grad_sample_mode=mode)
    with later as (_, opt, loader):
        for a, b in loader:
            backward(model, a, b)
            two.backward()
            opt.step()
    later.assert_moved()


def test_a_finished_scope_keeps_no_activations_or_gradients_alive():
    """After the end, no tensor of a captured batch is kept by the scope, in any mode."""
    scopes = [scope_over(build("mlp"), grad_sample_mode=mode) for mode in MODES]
    shapes = {(6, 5), (6, 5, 4), (6, 3, 5)}  # activations, and per-sample gradients of the two weights

    def alive():
        gc.collect()
        return sum(issubclass(type(t), Tensor) and tuple(t.shape) in shapes for t in gc.get_objects())

    before = alive()
    for scope in scopes:
        with scope as (_, loader):
            for x, y in loader:
                backward(scope.model, x, y)
            del x, y
    assert alive() == before


@each_mode
@pytest.mark.parametrize("name", ["mlp", "tied", "lstm", "owner", "weight_norm"])
@pytest.mark.parametrize("where", ["forward", "backward", "step", "loader"])
def test_training_goes_on_after_an_interrupt_caught_inside(name, where, mode, fused):
    """After a KeyboardInterrupt that the user catches, all parameters are seen again, and the next step is as if without it."""
    run, fuse = fused(name, KeyboardInterrupt("stop"), 6, mode)
    trainable = len(run.start)
    with run as (model, opt, loader):
        opt.attach_step_hook(lambda _: fuse("step"))
        fuse.where = where
        with suppress(KeyboardInterrupt):
            for x, y in loader:
                lit_step(model, opt, x, y, fuse)
        assert fuse.blown
        for x, y in loader:
            opt.zero_grad()
            assert sum(isinstance(p, nn.Parameter) and p.requires_grad for p in model.parameters()) == trainable
            step(model, opt, x, y)
    run.assert_moved()


MOMENTS = ("before forward", "before backward", "before step", "after step")
COPY_CASES = [
    *[(name, "deepcopy", moment) for name in BUILDERS for moment in MOMENTS],
    # PyTorch cannot pickle parametrized modules.
    *[(name, way, "before step") for name in BUILDERS if name != "weight_norm" for way in ("pickle", "torch.save")],
]


def stepped(model, opt, loader, at):
    """Take one pass of ordinary steps, calling ``at(moment)`` at each of the moments."""
    for x, y in loader:
        at("before forward")
        loss = F.cross_entropy(model(x), y)
        at("before backward")
        loss.backward()
        at("before step")
        opt.step()
        at("after step")


@each_mode
@pytest.mark.parametrize(("name", "way", "moment"), COPY_CASES)
def test_a_copy_made_inside_is_a_plain_model(name, way, moment, mode):
    """A copy made at any moment has the values, ties and no hook or gradient, trains as a plain model, and disturbs no step."""
    run, copies = Run(name, grad_sample_mode=mode), []

    def copied_if(now):
        if now == moment:
            copies.append(COPIES[way](run.model))
            assert_same(values(copies[0]), values(run.model))

    with run as (model, opt, loader):
        stepped(model, opt, loader, copied_if)
        (copied,) = copies
        assert not has_hooks(copied)
        assert [key for key, _ in copied.named_parameters()] == [key for key, _ in model.named_parameters()]
        assert not {id(p) for p in copied.parameters()} & {id(p) for p in model.parameters()}
        run.assert_moved()
        plain = build(name)
        plain.load_state_dict(copied.state_dict())
        for m in (copied, plain):
            m.zero_grad()
            backward(m, *examples())
        assert_same([p.grad for p in copied.parameters()], [p.grad for p in plain.parameters()])
    assert not has_hooks(model)


@each_mode
def test_an_averaged_model_follows_the_training(mode):
    """``AveragedModel`` made and updated inside the scope averages the parameters over the steps."""
    seen = []
    with Run(loader=in_order(6, 2), grad_sample_mode=mode) as (model, opt, loader):
        averaged = torch.optim.swa_utils.AveragedModel(model)
        for x, y in loader:
            step(model, opt, x, y)
            averaged.update_parameters(model)
            seen.append(values(model))
    assert_same(values(averaged), [torch.stack(column).mean(0) for column in zip(*seen, strict=True)])


@each_mode
def test_copies_between_backward_and_step_are_of_the_present(mode):
    """A copied optimizer trains the model copied with it; a second copy sees values put in through ``.data`` since the first."""
    with Run(grad_sample_mode=mode) as (model, opt, loader):
        backward(model, *next(iter(loader)))
        copied, copied_opt = copy.deepcopy((model, opt))
        for p in model.parameters():
            p.data = torch.full_like(p, 7.0)
        second = copy.deepcopy(model)
    of_optimizer = [id(p) for group in copied_opt.param_groups for p in group["params"]]
    assert of_optimizer == [id(p) for p in copied.parameters()]
    assert all(bool((p == 7).all()) for p in second.parameters())


def test_a_scope_cannot_be_entered_twice():
    """Entering an open or a finished scope again is an error that leaves the model alone."""
    run = Run()
    with run as (model, opt, loader):
        with pytest.raises(ScopeError, match="open and cannot be entered again"):
            run.scope.__enter__()
        train(model, opt, loader)
    with pytest.raises(ScopeError, match="over and cannot be entered again"):
        run.scope.__enter__()
    assert not has_hooks(model)


@pytest.mark.parametrize("part", ["same", "child", "parent", "parameter"])
def test_nesting_on_the_same_parameters_is_refused(part):
    """A scope over a model, a part, a parent or a module sharing a parameter of it is refused while the first is open."""
    run, sharing = Run(), nn.Linear(4, 5).double()
    sharing.weight = run.model[0].weight
    other = {"same": run.model, "child": run.model[0], "parent": nn.Sequential(run.model), "parameter": sharing}[part]
    with run as (model, opt, loader):
        before = Snapshot(model)
        with pytest.raises(ScopeError, match="already in an open private scope"), scope_over(other):
            pass
        assert before.differences() == []
        train(model, opt, loader)
    run.assert_moved()
    with scope_over(other):
        assert has_hooks(other)


def test_two_scopes_on_two_models_train_side_by_side():
    """In a GAN loop with two scopes, each network's step is the clipped sum of its own per-sample gradients."""
    x, noise = examples()[0], torch.randn(6, 2, dtype=torch.float64)
    generator = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    critic = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    ones = torch.ones(6, 1, dtype=torch.float64)

    def of_critic(m, real, fake):
        loss, labels = F.binary_cross_entropy_with_logits, ones[: len(real)]
        return loss(m(real), labels) + loss(m(fake), 0 * labels)

    def of_generator(m, z, labels):
        return F.binary_cross_entropy_with_logits(critic(m(z)), labels)

    of_c, of_g = Run(critic), Run(generator)
    with of_c as (_, c_opt, c_loader), of_g as (_, g_opt, g_loader):
        for (real, _), _ in zip(c_loader, g_loader, strict=True):
            c_opt.zero_grad()
            of_critic(critic, real, generator(noise).detach()).backward()
            c_opt.step()
            g_opt.zero_grad()
            of_generator(generator, noise, ones).backward()
            g_opt.step()
            c_opt.zero_grad()
    of_c.assert_moved(of_c.rows(x, of_g.first(noise).detach(), loss=of_critic))
    of_g.assert_moved(of_g.rows(noise, ones, loss=of_generator))
    assert not has_hooks(generator)
    assert not has_hooks(critic)


def test_scopes_may_end_in_any_order():
    """Of two scopes on two models, the one that was opened first may end first."""
    one, two = Run(), Run("conv")
    one.__enter__()
    model, opt, loader = two.__enter__()
    one.__exit__(None, None, None)
    assert not has_hooks(one.model)
    train(model, opt, loader)
    two.__exit__(None, None, None)
    two.assert_moved()
    assert not has_hooks(model)


@each_mode
@pytest.mark.parametrize("with_step", [False, True])
@pytest.mark.parametrize("cause", ["break", "exception"])
@pytest.mark.parametrize("parts", [1, 2])
def test_the_step_after_an_abandoned_logical_batch_is_clean(parts, cause, with_step, mode):
    """Leaving the loader after some physical parts adds nothing to the next logical batch."""
    run = Run(grad_sample_mode=mode, max_physical_batch_size=2)
    with run as (model, opt, loader):
        with suppress(KeyError):
            for index, (x, y) in enumerate(loader, start=1):
                opt.zero_grad()
                backward(model, x, y)
                if with_step or index < parts:
                    opt.step()
                if index == parts:
                    if cause == "exception":
                        raise KeyError
                    break
        assert_same(values(model), run.start)
        train(model, opt, loader)
    run.assert_moved()


@torch.no_grad()
def generated(model, ids):
    """Draw four more tokens, one after the other."""
    for _ in range(4):
        ids = torch.cat([ids, model(ids)[:, -1].argmax(-1, keepdim=True)], 1)
    return ids


def test_generation_inside_the_scope_is_that_of_the_plain_model():
    """Generating without gradients gives what the plain model gives, and keeps nothing."""
    parts = {"embedding": nn.Embedding(8, 4), "drop": nn.Dropout(0.5), "head": nn.Linear(4, 8)}
    model, prompt = Net(lambda s, ids: s.head(s.drop(s.embedding(ids)).cumsum(1)), **parts), torch.tensor([[1], [5]])
    plain, scope = copy.deepcopy(model).eval(), scope_over(model)
    with scope:
        found = generated(model.eval(), prompt)
        assert not scope.controller.has_gradients
    assert torch.equal(found, generated(plain, prompt))
    assert found.shape == (2, 5)


@each_mode
@pytest.mark.parametrize("kind", ["no_grad", "inference_mode", "eval", "train"])
@pytest.mark.parametrize("moment", MOMENTS[:-1])
def test_validation_inside_leaves_the_step_alone(moment, kind, mode):
    """A forward on other data, at any moment and in any mode, is right and adds nothing to the step."""
    run, validation, found = Run("conv", grad_sample_mode=mode), examples(11)[0], []

    def validate_if(now):
        if now == moment:
            with getattr(torch, kind)() if kind in ("no_grad", "inference_mode") else nullcontext():
                found.append(run.model.train(kind == "train")(validation).detach().clone())
            run.model.train()

    with run as (model, opt, loader):
        stepped(model, opt, loader, validate_if)
    assert_same(found, [build("conv")(validation).detach()])
    run.assert_moved()
