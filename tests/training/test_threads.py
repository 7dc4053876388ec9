"""Threads and asynchronous tasks: each trains as it would alone; what would mix is refused by its name."""

import asyncio
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dp_hooks import PrivateTraining, dp_step
from dp_hooks._no_randomness import generators_kept
from dp_hooks._precision import full_precision, rounds
from dp_hooks.capture.calls.running_backward import losses_in_backward
from dp_hooks.errors import ScopeError, UnsupportedModelError
from dp_hooks.privacy.noise.gaussian import GaussianNoise

from ..models import Net, build, drawn, each_mode, scope_over, values
from .helpers import POISSON, Run


@dp_step
def by_function(model: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    return F.cross_entropy(model(x), y, reduction="none")


def by_loop(model: nn.Module, opt: Any, batch: Any) -> None:
    x, y = batch
    opt.zero_grad()
    F.cross_entropy(model(x), y).backward()
    opt.step()


class Job:
    """A model, its data, and a scope with Poisson batches from a fixed seed, no noise, and many spot checks."""

    def __init__(self, name: str, seed: int, *, function: bool = True, **options: Any) -> None:
        self.model, self.function = build(name), function
        generator = drawn(seed)
        x = torch.randn(18, 4, generator=generator, dtype=torch.float64)
        data = TensorDataset(x, torch.randint(0, 3, (18,), generator=generator))
        adam = torch.optim.Adam(self.model.parameters(), lr=0.05)
        loader = DataLoader(data, 6, generator=drawn(seed))
        more = {"poisson_sampling": True, "accountant": "rdp", "spot_check_rate": 0.3}
        self.scope: PrivateTraining = scope_over(self.model, optimizer=adam, loader=loader, **more, **options)

    def steps(self) -> Iterator[None]:
        """Train, and stop after each step."""
        with self.scope as (opt, loader):
            for _ in range(2):
                for batch in loader:
                    if self.function or not len(batch[0]):
                        by_function(self.model, batch)
                    else:
                        by_loop(self.model, opt, batch)
                    yield

    def done(self) -> tuple[list[Tensor], Any]:
        for _ in self.steps():
            pass
        return self.found()

    def found(self) -> tuple[list[Tensor], Any]:
        return values(self.model), (self.scope.accountant.history, self.scope.steps, self.scope.report().loss_verified)


def assert_alike(found: list[Any], alone: list[Any]) -> None:
    """Assert that parameters are the same to the last bit, and that the same was charged and checked."""
    for (some, told), (others, expected) in zip(found, alone, strict=True):
        assert told == expected
        assert all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


@pytest.fixture
def restless() -> Iterator[None]:
    """Threads take turns as often as the interpreter can."""
    kept = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(kept)


@pytest.mark.usefixtures("restless")
@pytest.mark.parametrize("function", [True, False], ids=["function", "loop"])
@pytest.mark.parametrize("names", [("mlp", "lstm"), ("lstm", "tied"), ("attention", "owner")], ids="+".join)
@each_mode
def test_two_threads_do_what_each_would_alone(mode: str, names: tuple[str, str], function: bool) -> None:
    """At the same time as one after the other: the same parameters, charges, and checks."""

    def jobs() -> list[Job]:
        return [Job(name, seed, function=function, grad_sample_mode=mode) for seed, name in enumerate(names)]

    alone, together, barrier = [job.done() for job in jobs()], jobs(), threading.Barrier(2)

    def work(job: Job) -> tuple[list[Tensor], Any]:
        barrier.wait()
        return job.done()

    with ThreadPoolExecutor(2) as pool:
        assert_alike(list(pool.map(work, together)), alone)


def test_two_tasks_do_what_each_would_alone() -> None:
    """Asynchronous tasks that take turns between steps, with scopes that overlap, train as one after the other."""

    async def task(job: Job) -> tuple[list[Tensor], Any]:
        for _ in job.steps():
            await asyncio.sleep(0)
        return job.found()

    async def both() -> list[Any]:
        return await asyncio.gather(task(Job("mlp", 0)), task(Job("lstm", 1)))

    assert_alike(asyncio.run(both()), [Job("mlp", 0).done(), Job("lstm", 1).done()])


def in_thread(fn: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(fn).result()


def test_a_scope_can_be_used_from_another_thread() -> None:
    """A step, and the whole rest, taken in another thread than the scope was opened in, are as usual."""
    job, alone = Job("mlp", 0), Job("mlp", 0).done()
    steps = job.steps()
    next(steps)
    in_thread(lambda: next(steps))
    in_thread(lambda: list(steps))
    assert_alike([job.found()], [alone])


def test_a_scope_opened_in_a_thread_is_found_and_gone_afterwards() -> None:
    """The main thread steps a scope that another thread opened, is refused once it is over, and can open one of its own."""
    run = Run()
    with ExitStack() as stack:
        model, _, loader = in_thread(lambda: stack.enter_context(run))
        by_function(model, next(iter(loader)))
    run.assert_moved()
    with pytest.raises(ScopeError, match="no private_training scope over this model is open"):
        by_function(model, next(iter(run.scope._original_loader)))
    with scope_over(model):
        pass


def interrupted(act: Callable[[nn.Module, Any], None]) -> Net:
    """A model during whose forward pass another thread acts: its errors are in ``model.errors``."""

    def forward(model: Any, x: Tensor) -> Tensor:
        hidden = model.a(x)
        if model.act:
            try:
                in_thread(lambda: act(model, model.batch))
                model.errors.append(None)
            except Exception as error:  # noqa: BLE001 - the test looks at it
                model.errors.append(error)
        return model.b(hidden.tanh())

    model = Net(forward, a=nn.Linear(4, 5), b=nn.Linear(5, 3)).double()
    model.act, model.errors, model.batch = (), [], ()
    return model


def evaluates(model: nn.Module, batch: Any) -> None:
    with torch.no_grad():
        model(batch[0])


MEANWHILE: dict[str, Callable[[nn.Module, Any], None]] = {
    "forward": lambda model, batch: model(batch[0]),
    "a part": lambda model, batch: model.a(batch[0]),
    "evaluation": evaluates,
    "step": by_function,
}


@pytest.mark.parametrize("function", [True, False], ids=["function", "loop"])
@pytest.mark.parametrize("kind", list(MEANWHILE))
def test_two_threads_at_one_model_are_refused_by_name(kind: str, function: bool) -> None:
    """The thread that comes second is refused, every time; the first goes on, and what it releases is right."""
    run = Run(interrupted(MEANWHILE[kind]), **POISSON)
    run.first.act = ()
    with run as (model, opt, loader):
        model.batch = batch = next(iter(loader))
        model.act = (1,)
        by_function(model, batch) if function else by_loop(model, opt, batch)
        model.act = ()
    assert model.errors
    assert all("two threads use a model in a private scope at the same time" in str(error) for error in model.errors)
    assert all(isinstance(p, nn.Parameter) for p in (model.a.weight, model.b.weight))
    run.assert_moved()


def test_a_thread_that_broke_off_leaves_the_model_to_others() -> None:
    """After an exception in one thread's forward pass another thread may take the step."""
    run, failing = Run(), []

    @dp_step
    def step(model: nn.Module, batch: Any) -> Tensor:
        losses = by_function.__wrapped__(model, batch)
        if failing:
            raise OSError("gone")
        return losses

    with run as (model, _, loader):
        batch = next(iter(loader))
        failing.append(1)
        with pytest.raises(OSError, match="gone"):
            in_thread(lambda: step(model, batch))
        failing.clear()
        step(model, batch)
    run.assert_moved()


# ---------------------------------------------------------------- what all threads share


def test_full_precision_lasts_as_long_as_the_last_block() -> None:
    """A block that ends does not let another thread's products be rounded; afterwards the setting is what it was."""
    kept = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with ExitStack() as late:
            with full_precision():
                in_thread(lambda: late.enter_context(full_precision()))
                assert torch.get_float32_matmul_precision() == "highest"
            assert torch.get_float32_matmul_precision() == "highest"
            assert rounds()
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(kept)


def test_checks_of_two_threads_take_turns_at_the_generators() -> None:
    """While one thread seeds the shared generators and puts them back, another one's check waits, and so does its noise."""
    order: list[str] = []

    def check() -> None:
        with generators_kept():
            order.append("check")

    def noise() -> None:
        GaussianNoise(torch.default_generator).add_([torch.zeros(2)], 1.0)
        order.append("noise")

    threads = [threading.Thread(target=check), threading.Thread(target=noise)]
    before = torch.get_rng_state()
    with generators_kept():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(0.05)
        assert order == []
        torch.manual_seed(3)
        assert not torch.equal(torch.get_rng_state(), before)
    for thread in threads:
        thread.join()
    assert sorted(order) == ["check", "noise"]
    assert not torch.equal(torch.get_rng_state(), before)  # the noise's own draw was not put back


class Busy(nn.LSTM):
    """Repeated on each sample, for want of a rule; another thread draws random numbers in every call."""

    def forward(self, x: Tensor) -> Tensor:
        in_thread(lambda: torch.rand(1))
        return super().forward(x)[0][:, -1]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_draws_of_another_thread_are_not_the_modules_own(dropout: float) -> None:
    """A module that is repeated sample by sample is right while another thread draws numbers; one that draws is refused."""
    run = Run(Net(lambda m, x: m.lstm(x.view(-1, 2, 2)), lstm=Busy(2, 3, 2, batch_first=True, dropout=dropout)).double())
    with threading_companion(), run as (model, _, loader):
        batch = next(iter(loader))
        if dropout:
            with pytest.raises(UnsupportedModelError, match="draws random numbers"):
                by_function(model, batch)
        else:
            by_function(model, batch)
    if not dropout:
        run.assert_moved()


def threading_companion() -> ExitStack:
    """Return a context in which there is another thread."""
    stack, over = ExitStack(), threading.Event()
    thread = threading.Thread(target=over.wait)
    thread.start()
    stack.callback(thread.join)
    stack.callback(over.set)
    return stack


def test_losses_of_all_threads_that_are_in_backward_are_found_from_one_that_is_in_none() -> None:
    """A thread of autograd's own cannot tell which thread waits for it: it is told what all of them run on."""
    found: list[Any] = []
    ready, over = threading.Barrier(3), threading.Event()

    def backward() -> None:
        leaf = torch.ones(2, requires_grad=True)
        loss = leaf.sum()

        def hook(grad: Tensor) -> None:
            ready.wait()
            over.wait()
            found.append([id(one) for one in losses_in_backward() or ()] == [id(loss)])

        leaf.register_hook(hook)
        loss.backward()

    threads = [threading.Thread(target=backward) for _ in range(2)]
    for thread in threads:
        thread.start()
    ready.wait()
    seen = losses_in_backward()
    over.set()
    for thread in threads:
        thread.join()
    assert seen is not None
    assert len(seen) == 2
    assert found == [True, True]
