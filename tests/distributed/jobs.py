"""What the processes of a group do together, and one process does alone, to be compared with it."""

from __future__ import annotations

import importlib
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from dp_hooks import PrivacyEngineHookBased, dp_step, private_training
from dp_hooks.distributed import sums
from dp_hooks.training.scope import open_scopes

EXAMPLES = 40


class Tied(nn.Module):
    """A table of words whose transpose is the output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 6)
        self.inner = nn.Linear(6, 6)
        self.out = nn.Linear(6, 11, bias=False)
        self.out.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(torch.tanh(self.inner(self.words(ids)))).mean(1)


def small() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 11)), torch.randn(EXAMPLES, 5)


def tied() -> tuple[nn.Module, Tensor]:
    return Tied(), torch.randint(0, 11, (EXAMPLES, 4))


MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {"small": small, "tied": tied}


def made(name: str = "small", dtype: torch.dtype = torch.float64) -> tuple[nn.Module, TensorDataset]:
    """A model and a dataset, the same ones wherever they are made."""
    torch.manual_seed(0)
    model, x = MODELS[name]()
    x = x.to(dtype) if x.is_floating_point() else x
    return model.to(dtype), TensorDataset(x, torch.randint(0, 11, (EXAMPLES,)))


def trained(name: str = "small", *, ddp: bool = False, batch: int = 12, passes: int = 1, how: str = "bare", **options: Any) -> Any:
    """Train on whole passes, and return the weights, epsilon, and the sizes of what was handed out here."""
    model, data = made(name)
    loader = DataLoader(data, batch_size=batch, generator=torch.Generator().manual_seed(3))
    called = DistributedDataParallel(model) if ddp else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.5)
    if "noise" in options:
        options["noise_generator"] = torch.Generator().manual_seed(options.pop("noise"))
    options = {"noise_multiplier": 0.0, "max_grad_norm": 0.3, **options}
    reduction = options.get("loss_reduction", "mean")

    def loss_of(model: nn.Module, batch: list[Tensor]) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(model(x), y, reduction=reduction)

    step = dp_step(loss_of)
    sizes = []
    with ExitStack() as stack:
        if how == "engine":
            engine = PrivacyEngineHookBased()
            stack.callback(engine.cleanup)
            called, opt, private = engine.make_private(module=called, optimizer=optimizer, data_loader=loader, **options)
            scope = engine
        else:
            scope = private_training(called, optimizer, loader, **options)
            opt, private = stack.enter_context(scope)
        for _ in range(passes):
            for x, y in private:
                sizes.append(len(y))
                if how == "step":
                    step(called, [x, y])
                    continue
                opt.zero_grad()
                loss_of(called, [x, y]).backward()
                opt.step()
        steps, bound = sum(steps for _, _, steps in scope.accountant.history), opt.max_grad_norm
    left = [called.require_backward_grad_sync, called.require_forward_param_sync] if ddp else []
    return {
        "weights": [p.detach() for p in model.parameters()],
        "epsilon": scope.get_epsilon(1e-5),
        "sizes": sizes,
        "steps": steps,
        "left": left,
        "bound": bound,
    }


def architecture(name: str) -> list[Tensor]:
    """Two clipped sums of an architecture of the zoo, on the move of its weights."""
    from ..cases.zoo import ARCHITECTURES, SAMPLES, build  # imports every library of models

    torch.manual_seed(0)
    specimen = build(ARCHITECTURES[name], 0.0)
    keys = list(specimen.inputs)
    model = specimen.model
    with torch.no_grad():
        target = torch.randn_like(specimen.read(model(**specimen.inputs)))
    data = TensorDataset(*specimen.inputs.values(), target)
    loader = DataLoader(data, batch_size=SAMPLES, generator=torch.Generator().manual_seed(1))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)

    def loss_of(model: nn.Module, batch: list[Tensor]) -> Tensor:
        *inputs, wanted = batch
        output = specimen.read(model(**dict(zip(keys, inputs, strict=True))))
        return (output - wanted).flatten(1).square().mean(1).mean()

    step = dp_step(loss_of)
    with private_training(model, optimizer, loader, noise_multiplier=0.0, max_grad_norm=1.0) as (_, private):
        for _ in range(2):
            for batch in private:
                step(model, batch)
    return [p.detach() for p in trained]


def noise(sigma: float, steps: int, **options: Any) -> list[Tensor]:
    """The moves of all weights, of a loss that is always 0: nothing but noise."""
    model, data = made()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    options = {"loss_reduction": "sum", "max_grad_norm": 2.0, "self_check": False, **options}
    moves = []
    with private_training(model, optimizer, DataLoader(data, batch_size=4), noise_multiplier=sigma, **options) as (opt, private):
        while len(moves) < steps:
            for x, _ in private:
                before = torch.cat([p.detach().flatten() for p in model.parameters()])
                opt.zero_grad()
                (0 * model(x)).sum().backward()
                opt.step()
                moves.append(before - torch.cat([p.detach().flatten() for p in model.parameters()]))
    return moves[:steps]


def drawn(passes: int, **options: Any) -> list[list[int]]:
    """The examples in every batch that is handed out here."""
    numbers = TensorDataset(torch.arange(EXAMPLES)[:, None].double(), torch.arange(EXAMPLES))
    model = nn.Linear(1, 1).double()
    dist.broadcast(model.weight.data, 0)
    dist.broadcast(model.bias.data, 0)
    optimizer, loader = torch.optim.SGD(model.parameters(), lr=0.0), DataLoader(numbers, batch_size=8, **options)
    with private_training(model, optimizer, loader, noise_multiplier=1.0, max_grad_norm=1.0) as (_, private):
        return [[int(i) for i in numbers] for _ in range(passes) for _, numbers in private]


def drawn_and_left(passes: int, batches: int, **options: Any) -> list[list[int]]:
    """The examples that this process had of the first batches of passes that are left early, with workers that draw ahead."""
    numbers = TensorDataset(torch.arange(EXAMPLES)[:, None].double(), torch.arange(EXAMPLES))
    model = nn.Linear(1, 1).double()
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    loader = DataLoader(numbers, batch_size=12, num_workers=1, prefetch_factor=3)
    parts = {"max_physical_batch_size": 2 + 5 * dist.get_rank()}
    found: list[list[int]] = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with private_training(model, optimizer, loader, noise_multiplier=1.0, max_grad_norm=1.0, **parts) as (opt, private):
        for _ in range(passes):
            taken = 0
            for x, indices in private:
                if opt.physical_batch.index == 0:
                    found.append([])
                found[-1] += indices.tolist()
                opt.zero_grad()
                model(x).square().mean().backward()
                opt.step()
                taken += opt.physical_batch.last
                if taken == batches:
                    break
    return found


@contextmanager
def _scope(**options: Any) -> Iterator[Any]:
    model, data = made()
    dataset = options.pop("dataset", data)
    if "noise" in options:
        options["noise_generator"] = torch.Generator().manual_seed(options.pop("noise"))
    if options.pop("other_weights", False):
        with torch.no_grad():
            model[0].weight[0, 0] += dist.get_rank()
    sampler = DistributedSampler(dataset) if options.pop("sampler", False) else None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, **options}
    with private_training(model, optimizer, DataLoader(dataset, batch_size=8, sampler=sampler), **options) as (opt, private):
        yield model, opt, private
    assert not model._forward_hooks


def refused(differences: dict[str, Any], same: dict[str, Any]) -> str:
    """What entering says, where process 1 has other arguments."""
    if "dataset" in differences:
        data = made()[1]
        rows = {"fewer": range(30), "reversed": range(EXAMPLES - 1, -1, -1)}[differences["dataset"]]
        differences = {"dataset": TensorDataset(*data[list(rows)])}
    options = {**same, **(differences if dist.get_rank() == 1 else {})}
    try:
        with _scope(**options):
            return "entered"
    except Exception as error:  # noqa: BLE001 - it is the result
        return f"{type(error).__name__}: {error}"


def _fail(opt: Any) -> None:
    raise ZeroDivisionError("in a step hook")


def apart(what: str) -> tuple[str, bool, int]:
    """What is raised where process 1 does something else in its third step; whether hooks are gone; how many steps were taken."""
    model, data = made()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scope = private_training(model, optimizer, DataLoader(data, batch_size=8), noise_multiplier=1.0, max_grad_norm=1.0)
    raised, one = "nothing", dist.get_rank() == 1
    try:
        with scope as (opt, private):
            for number, (x, y) in enumerate(private):
                opt.zero_grad()
                model[0].bias.requires_grad_(not (one and number == 2 and what == "freezes"))
                loss = nn.functional.cross_entropy(model(x), y)
                if one and number == 2:
                    if what == "raises":
                        raise KeyError("of my own")
                    if what == "breaks":
                        break
                    if what == "skips":
                        opt.skip_batch()
                        continue
                    if what == "less noise":
                        opt.noise_multiplier = 0.5
                    if what == "another bound":
                        opt.max_grad_norm = 2.0
                    if what == "dies":
                        os._exit(1)
                    if what == "mixes":
                        loss = loss + nn.functional.cross_entropy(model(x.flip(0)), y)
                loss.backward()
                if what == "fails late" and one and number == 2:
                    opt.attach_step_hook(_fail)
                try:
                    opt.step()
                except ZeroDivisionError:
                    del opt._step_hooks[:]  # it was caught, and the loop goes on
                if what == "changes" and one and number == 1:
                    model[0].bias.data += 1
    except Exception as error:  # noqa: BLE001 - it is the result
        raised = f"{type(error).__name__}: {error}"
    return raised, not any(m._forward_hooks for m in model.modules()), scope.steps


def _with_infinity(take: Callable[[], Any]) -> Any:
    sums, statistic = take()
    next(iter(sums.values())).fill_(torch.inf)
    return sums, statistic


def infinite() -> str:
    """What is raised where weights of the loss make the sum infinite in process 1 only."""
    try:
        with _scope(self_check=False, clipping="flat", noise_multiplier=0.0) as (model, opt, private):
            for x, y in private:
                opt.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                if dist.get_rank() == 1:
                    opt._sum.take = partial(_with_infinity, opt._sum.take)
                opt.step()
    except Exception as error:  # noqa: BLE001 - it is the result
        return f"{type(error).__name__}: {error}"
    return "nothing"


def with_ledger(path: str) -> tuple[int, float]:
    """Steps taken, and epsilon, of a run with a ledger; in several processes."""
    model, data = made()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = DataLoader(data, batch_size=8)
    scope = private_training(model, optimizer, loader, noise_multiplier=1.0, max_grad_norm=1.0, ledger=path, accountant="rdp")
    with scope as (opt, private):
        for x, y in private:
            opt.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            opt.step()
    return scope.steps, scope.get_epsilon(1e-5)


def resumed(state: dict[str, Any] | None, stop: int) -> tuple[dict[str, Any], int, float]:
    """Go on with a budget, and stop after so many steps; what is saved then."""
    model, data = made()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    budget = {"target_epsilon": 8.0, "target_delta": 1e-3, "epochs": 2, "accountant": "rdp"}
    scope = private_training(model, optimizer, DataLoader(data, batch_size=8), max_grad_norm=1.0, **budget)
    if state is not None:
        scope.load_state_dict(state)
    taken = 0
    with scope as (opt, private):
        for _ in range(3):
            for x, y in private:
                if taken == stop:
                    break
                opt.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                opt.step()
                taken += 1
    return scope.state_dict(), taken, scope.get_epsilon(1e-3)


def trained_by(options: dict[str, Any]) -> Any:
    """:func:`trained`, with arguments that can be sent."""
    return trained(**options)


def exchanged(batch: int, tokens: int) -> list[list[tuple[str, int]]]:
    """For every step, the kinds of exchange in the order in which they happen, each with the number of bytes that are sent."""
    torch.manual_seed(0)
    model, data = Tied(), TensorDataset(torch.randint(0, 11, (EXAMPLES, tokens)), torch.randint(0, 11, (EXAMPLES,)))
    steps: list[list[tuple[str, int]]] = []

    def watched(kind: str, exchange: Callable[..., Any], at: int) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if steps:  # not as the pass begins
                steps[-1].append((kind, args[at].numel() * args[at].itemsize))
            return exchange(*args, **kwargs)

        return run

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with ExitStack() as stack:
        scope = private_training(model, optimizer, DataLoader(data, batch_size=batch), noise_multiplier=1.0, max_grad_norm=1.0)
        opt, private = stack.enter_context(scope)
        for holder, name, kind, at in (
            (sums, "_reduce_scatter", "reduce-scatter", 1),
            (sums, "_all_gather", "all-gather", 1),
            (dist, "all_gather", "meeting", 1),
            (dist, "all_reduce", "all-reduce", 0),
            (dist, "broadcast", "broadcast", 0),
        ):
            stack.callback(setattr, holder, name, getattr(holder, name))
            setattr(holder, name, watched(kind, getattr(holder, name), at))
        for x, y in private:
            steps.append([])
            opt.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            opt.step()
        steps.append([])  # the scope meets once more as it is left
    return steps[:-1]


def sharded() -> str:
    """What entering says of a model whose parameters are sharded."""
    model, data = made(dtype=torch.float32)
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    try:
        private_training(model, optimizer, DataLoader(data, batch_size=8), noise_multiplier=1.0, max_grad_norm=1.0)
    except Exception as error:  # noqa: BLE001 - it is the result
        return f"{type(error).__name__}: {error}"
    return "made"


def example(*options: str) -> str:
    """What ``examples/distributed.py`` prints, on images that are easy to tell apart."""
    folder = str(Path(__file__).parents[2] / "examples")
    sys.path.insert(0, folder)
    data, main = importlib.import_module("example_data"), importlib.import_module("distributed").main
    labels = torch.arange(200) % 10
    images = 0.2 * torch.rand(200, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    images[torch.arange(200), 0, 2 * labels + 3] += 0.8
    output = io.StringIO()
    argv = ["distributed.py", "--examples", "200", "--epochs", "2", *options]
    digits = mock.patch.object(data, "load_digits", return_value=(images, labels))
    with digits, mock.patch.object(sys, "argv", argv), redirect_stdout(output):
        main()
    sys.path.remove(folder)
    return output.getvalue()


def twice() -> list[list[int]]:
    """The first batch of two scopes in turn over a loader with a generator, whichever part of it this process has."""
    model, data = made()
    found = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    loader = DataLoader(
        TensorDataset(data.tensors[0], torch.arange(EXAMPLES)), batch_size=16, generator=torch.Generator().manual_seed(5)
    )
    for _ in range(2):
        with private_training(model, optimizer, loader, noise_multiplier=1.0, max_grad_norm=1.0) as (opt, private):
            for x, numbers in private:
                found.append(numbers.tolist())
                opt.zero_grad()
                model(x).square().mean().backward()
                opt.step()
                break
    return found


def refused_step(what: str) -> str:
    """What is said of something that one process could do."""
    model, data = made()
    called = DistributedDataParallel(model) if what == "paused" else model
    params = list(model.parameters())
    if what == "order" and dist.get_rank():
        params = [params[1], params[0], *params[2:]]
    optimizer, own = torch.optim.SGD(params, lr=0.1), torch.Generator().manual_seed(1)
    loader = DataLoader(data, batch_size=8, generator=own)
    options = {"noise_generator": own} if what == "generator" else {}
    try:
        with private_training(called, optimizer, loader, noise_multiplier=1.0, max_grad_norm=1.0, **options) as (opt, private):
            if what == "paused":
                with open_scopes.of(model).paused():
                    return "paused"
            for x, y in loader if what == "foreign" else private:
                opt.zero_grad()
                nn.functional.cross_entropy(called(x), y).backward()
                opt.step()
    except Exception as error:  # noqa: BLE001 - it is the result
        return f"{type(error).__name__}: {error}"
    return "nothing"
