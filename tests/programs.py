"""Random small programs: a model, a collate function, a loop and a loss, with one fault that mixes samples in half of them.

Run by hand on many: ``python -m tests.programs 20000 [first]``.
"""

import copy
import random
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

from dp_hooks import dp_step, errors, private_training

from .reference import rows_by_backward

T, D, K = 4, 6, 3
N = 8
Mix = Callable[[Tensor], Tensor]


MAKERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(D, D),
    "no bias": lambda: nn.Linear(D, D, bias=False),
    "norm": lambda: nn.LayerNorm(D),
    "conv": lambda: nn.Conv1d(D, D, 3, padding=1),
    "grouped conv": lambda: nn.Conv1d(D, D, 1, groups=2),
    "groups": lambda: nn.GroupNorm(2, D),
    "gru": lambda: nn.GRU(D, D, batch_first=True),
    "lstm, time first": lambda: nn.LSTM(D, D),
    "attention": lambda: nn.MultiheadAttention(D, 2, batch_first=True),
    "encoder": lambda: nn.TransformerEncoderLayer(D, 2, 8, 0.0, batch_first=True),
    "flattened": lambda: nn.Linear(D, D),
    "time first": lambda: nn.Linear(D, D),
    "bottleneck": lambda: nn.Sequential(nn.Linear(D, 2), nn.ReLU(), nn.Linear(2, D)),
    "shared": lambda: nn.Linear(D, D),
}
SHAPES = {"gain": (D,), "positions": (T, D), "query": (D,), "matrix": (D, D), "low rank": (D, 2)}  # of a parameter of its own


class Block(nn.Module):
    """Tokens ``[n, T, D]`` to tokens, by one of many kinds of layer; ``mix`` is applied to what comes out."""

    def __init__(self, kind: str, mix: Mix | None) -> None:
        super().__init__()
        self.kind, self.mix = kind, mix
        self.layer = MAKERS.get(kind, nn.Identity)()
        if kind in SHAPES:
            self.p = nn.Parameter(0.5 * torch.randn(SHAPES[kind]))

    def forward(self, x: Tensor) -> Tensor:
        x = self.out_of(x)
        return x if self.mix is None else self.mix(x)

    def out_of(self, x: Tensor) -> Tensor:
        kind, layer = self.kind, self.layer
        if kind in ("conv", "grouped conv", "groups"):
            return layer(x.mT).mT
        if kind == "gru":
            return layer(x)[0]
        if kind == "lstm, time first":
            return layer(x.transpose(0, 1))[0].transpose(0, 1)
        if kind == "attention":
            return x + layer(x, x, x, need_weights=False)[0]
        if kind == "flattened":
            return layer(x.flatten(0, 1)).view_as(x)
        if kind == "time first":
            return layer(x.transpose(0, 1).flatten(0, 1)).unflatten(0, (T, len(x))).transpose(0, 1)
        if kind == "shared":
            return layer(layer(x).tanh())
        if kind in ACTIVATIONS:
            return ACTIVATIONS[kind](x)
        if kind in OWN:
            return OWN[kind](self.p, x)
        return layer(x)


ACTIVATIONS: dict[str, Mix] = {
    "relu": F.relu,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "softmax": lambda x: D * x.softmax(-1),
    "roll": lambda x: x.roll(1, 1),
}
OWN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gain": lambda p, x: x * p,
    "positions": lambda p, x: x + p,
    "query": lambda p, x: x + (x @ p)[..., None] * p,
    "matrix": lambda p, x: torch.einsum("ntd,de->nte", x, p),
    "low rank": lambda p, x: x + x @ p @ p.mT,
}
LAYERS = [*MAKERS, *OWN]


class State(nn.Module):
    """Adds what it kept of the batch before; keeps something of this one."""

    def __init__(self, where: str, size: float) -> None:
        super().__init__()
        self.where, self.size = where, size
        if where == "buffer":
            self.register_buffer("kept", torch.zeros(D))
        else:
            self.kept: Any = torch.zeros(D) if where == "attribute" else [] if where == "list" else 0.0

    def forward(self, x: Tensor) -> Tensor:
        mean = x.detach().mean((0, 1))
        if self.where == "list":
            before = self.kept[-1] if self.kept else 0.0
            self.kept.append(mean)
        elif self.where == "number":
            before, self.kept = self.kept, float(mean[0])
        else:
            before = self.kept.to(x).clone()
            if self.where == "buffer":
                self.kept.copy_(mean)
            else:
                self.kept = mean
        return x + self.size * before


def _gated(draw: Callable[[], Tensor], mix: Mix) -> Mix:
    return lambda x: x + draw().to(x) * (mix(x) - x)


# Each returns other rows for a sample if other samples are there; `a` says how much.
MIXES: dict[str, Callable[[float], Mix]] = {
    "centred": lambda a: lambda x: x - a * x.mean(0),
    "centred, detached": lambda a: lambda x: x - a * x.detach().mean(0),
    "scaled by the batch": lambda a: lambda x: x / (1 + a * x.detach().std(0, unbiased=False)),
    "scaled by the largest": lambda a: lambda x: x / (1 + a * x.detach().abs().amax()),
    "neighbour": lambda a: lambda x: x + a * x.roll(1, 0),
    "running sum": lambda a: lambda x: x + a * (x.cumsum(0) - x),
    "attention over the batch": lambda a: (
        lambda x: x + a * torch.einsum("nm,mtd->ntd", (x.flatten(1) @ x.flatten(1).T / 9).softmax(1), x)
    ),
    "sorted": lambda a: lambda x: x + a * x[x[:, 0, 0].detach().argsort()],
    "only in large batches": lambda a: lambda x: x + (a * x.mean(0) if len(x) > 3 else 0),
    "last sample": lambda a: lambda x: torch.cat([x[:-1], x[-1:] + a * x[:1] * (len(x) > 1)]),
    "swapped pair": lambda a: lambda x: x if len(x) < 2 else torch.cat([x[:2].flip(0), x[2:]]),
    "gate": lambda a: _gated(lambda: torch.rand(1) < 0.3, lambda x: x - x.mean(0)),
    "normal gate": lambda a: _gated(lambda: torch.randn(()) > 0.5, lambda x: x + x.roll(1, 0)),
    "beta": lambda a: _gated(lambda: torch.distributions.Beta(0.5, 0.5).sample(), lambda x: x.flip(0)),
}
STATES = ("buffer", "attribute", "list", "number")


def losses(out: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(out, y, reduction="none")


def _half_of_largest(each: Tensor) -> Tensor:
    return each * (each >= each.detach().median())


# Losses of all samples in which they meet.
COUPLED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "hardest": lambda out, y: _half_of_largest(losses(out, y)),
    "weighted by the batch": lambda out, y: losses(out, y) * len(y) * losses(out, y).detach().softmax(0),
    "variance": lambda out, y: losses(out, y) + (out - out.mean(0)).square().sum(1),
    "contrast": lambda out, y: F.cross_entropy(out @ out.T, torch.arange(len(y)), reduction="none") + losses(out, y),
    "balance": lambda out, y: losses(out, y) + out.softmax(1).mean(0).square().sum(),
}


@dataclass
class Program:
    """What to run; ``fault`` is empty in a sound one."""

    seed: int
    fault: str = ""
    kinds: list[str] = field(default_factory=list)
    loop: str = "bare"
    mode: str = "ghost"
    reduction: str = "mean"
    physical: int | None = None
    dtype: torch.dtype = torch.float64
    size: float = 1.0
    at: int = 0
    bound: float = 1.0
    dropout: bool = False

    @classmethod
    def drawn(cls, seed: int) -> "Program":
        """Draw a program; every second one has a fault."""
        r = random.Random(seed)
        kinds = [r.choice([*LAYERS, *ACTIVATIONS]) for _ in range(r.randint(1, 4))]
        program = cls(
            seed,
            kinds=["linear", *kinds],
            loop=r.choice(["bare", "bare", "function", "scalar function", "two passes", "parts", "forward", "twice"]),
            mode=r.choice(["ghost", "ghost", "hooks", "functorch"]),
            reduction=r.choice(["mean", "sum"]),
            physical=r.choice([None, None, 3]),
            dtype=r.choice([torch.float64, torch.float32]),
            size=r.choice([1.0, 0.3, 0.1]),
            bound=r.choice([0.02, 0.3, 5.0]),
            dropout=r.random() < 0.15,
        )
        program.at = r.randrange(len(program.kinds))
        if program.loop == "two passes":
            program.mode = "ghost"
        if seed % 2:
            program.dropout = False  # or nobody could say what is right
            model, state, loss = (
                [f"model: {m}" for m in MIXES],
                [f"state: {s}" for s in STATES],
                [f"loss: {name}" for name in COUPLED],
            )
            loop = ["loop: chunks", "loop: two batches", "loop: a part of the rows", "loop: rows repeated"]
            program.fault = r.choice([*model, *model, *state, *loss, *loop, "collate: centred", "collate: mixed"])
            if program.fault.startswith("loss:") and program.loop not in ("function", "scalar function", "two passes"):
                program.loop = "function"  # in a bare loop the loss is not looked at
            if program.fault.startswith("loop:"):
                program.loop, program.physical = "bare", None
        return program

    # ------------------------------------------------------------ parts

    def model(self) -> nn.Module:
        """Build it, the same every time."""
        torch.manual_seed(self.seed)
        blocks: list[nn.Module] = []
        for index, kind in enumerate(self.kinds):
            what, _, name = self.fault.partition(": ")
            mix = MIXES[name](self.size) if what == "model" and index == self.at else None
            blocks.append(Block(kind, mix))
            if what == "state" and index == self.at:
                blocks.append(State(name, self.size))
        if self.dropout:
            blocks.append(nn.Dropout(0.3))
        return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(T * D, K)).to(self.dtype)

    def data(self) -> list[tuple[Tensor, Tensor]]:
        g = torch.Generator().manual_seed(self.seed + 1)
        x = torch.randn(2 * N, T, D, generator=g, dtype=torch.float64).to(self.dtype)
        y = torch.randint(0, K, (2 * N,), generator=g)
        return list(zip(x, y, strict=True))

    def collate(self, examples: Sequence[Any]) -> Any:
        x, y = default_collate(examples)
        if self.fault == "collate: centred":
            x = x - x.mean(0)
        elif self.fault == "collate: mixed":
            x = 0.7 * x + 0.3 * x.flip(0)
        return x, y

    def each(self, out: Tensor, y: Tensor) -> Tensor:
        """Per-sample losses."""
        what, _, name = self.fault.partition(": ")
        return COUPLED[name](out, y) if what == "loss" else losses(out, y)

    def reduced(self, each: Tensor) -> Tensor:
        return each.mean() if self.reduction == "mean" else each.sum()

    def call(self, model: Any, x: Tensor) -> Tensor:
        if self.loop == "parts":
            for part in model:
                x = part(x)
            return x
        return model.forward(x) if self.loop == "forward" else model(x)

    # ------------------------------------------------------------ training

    def steps(self, model: nn.Module, opt: Any, loader: Any, after: Callable[[], None]) -> None:
        """Take two steps as the loop is written."""

        def function(model: nn.Module, batch: Any) -> Tensor:
            each = self.each(self.call(model, batch[0]), batch[1])
            return self.reduced(each) if self.loop == "scalar function" else each

        whole = dp_step(function, two_pass=self.loop == "two passes")
        waiting: list[Any] = []
        for x, y in loader:
            if self.loop in ("function", "scalar function", "two passes"):
                whole(model, (x, y))
            elif self.fault == "loop: two batches":
                waiting.append((x, y))
                if len(waiting) < 2:
                    continue
                for a, b in waiting:
                    self.reduced(losses(model(a), b)).backward()
                waiting.clear()
                opt.step()
            else:
                self.backward(model, x, y)
                opt.step()
            after()

    def backward(self, model: nn.Module, x: Tensor, y: Tensor) -> None:
        if self.fault == "loop: chunks":
            for a, b in zip(x.chunk(2), y.chunk(2), strict=True):
                self.reduced(losses(model(a), b)).backward()
        elif self.fault == "loop: a part of the rows":
            self.reduced(losses(model(x[: len(x) // 2]), y[: len(x) // 2])).backward()
        elif self.fault == "loop: rows repeated":
            self.reduced(losses(model(x.repeat(2, 1, 1)), y.repeat(2))).backward()
        else:
            loss = self.reduced(losses(self.call(model, x), y))
            if self.loop == "twice":
                loss = loss + self.reduced(losses(self.call(model, 0.5 * x), y))
            loss.backward()

    def alone(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """The loss of one sample by itself, in a batch of one."""
        loss = self.each(self.call(model, x), y).sum()
        return loss + losses(self.call(model, 0.5 * x), y).sum() if self.loop == "twice" else loss

    def expected(self, model: nn.Module, examples: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """By how much one step of rate 1 moves the parameters, by plain autograd on single samples."""
        rows = []
        for one in examples:  # each finds the model as the batch did
            alone = copy.deepcopy(model)
            rows += rows_by_backward(alone, [self.alone(alone, *self.collate([one]))])
        total = [torch.zeros_like(p, dtype=torch.float64) for p in model.parameters()]
        for row in rows:
            norm = torch.stack([g.double().square().sum() for g in row]).sum().sqrt()
            for t, g in zip(total, row, strict=True):
                t += g.double() * (self.bound / norm.clamp(min=1e-300)).clamp(max=1)
        return [t / (N if self.reduction == "mean" else 1) for t in total]

    def verdict(self) -> str:
        """Train: ``right``, ``refused: ...``, or ``wrong: ...``."""
        model, data = self.model(), self.data()
        for p in model.parameters():
            if not bool(p.any()):
                nn.init.normal_(p, std=0.1)  # an output of zeros has no gradient that could be wrong
        loader = DataLoader(data, batch_size=N, collate_fn=self.collate)  # type: ignore[arg-type]
        opt = torch.optim.SGD(model.parameters(), lr=1.0)
        scope = private_training(
            model,
            opt,
            loader,
            noise_multiplier=0.0,
            max_grad_norm=self.bound,
            loss_reduction=self.reduction,
            poisson_sampling=False,
            grad_sample_mode=self.mode,
            max_physical_batch_size=self.physical,
        )
        start = [p.detach().clone() for p in model.parameters()]
        off: list[float] = []
        state = {"model": copy.deepcopy(model), "step": 0}

        def compare() -> None:
            now = [p.detach().clone() for p in model.parameters()]
            if all(torch.equal(a, b) for a, b in zip(start, now, strict=True)):
                return  # a physical part
            examples = data[N * state["step"] : N * (state["step"] + 1)]
            want = self.expected(state["model"], examples)
            size = torch.stack([w.norm() for w in want]).norm()
            error = torch.stack([(a.double() - b.double() - w).norm() for a, b, w in zip(start, now, want, strict=True)]).norm()
            off.append(float(error / size))
            start[:] = now
            state.update(model=copy.deepcopy(model), step=state["step"] + 1)

        try:
            with scope as (private, batches):
                torch.manual_seed(self.seed)
                self.steps(model, private, batches, compare)
        except errors.DPHooksError as error:
            moved = any(not torch.equal(a, b) for a, b in zip(start, model.parameters(), strict=True))
            return "wrong: refused after a step moved" if moved else f"refused: {error}"
        if self.dropout:
            return "right"  # it was not refused, and nobody can say what it should be
        tolerance = 1e-6 if self.dtype == torch.float64 else 2e-3
        return "right" if off and max(off) <= tolerance else f"wrong: off by {max(off, default=0):.1e}"


def tried(seeds: Sequence[int]) -> dict[int, tuple[Program, str]]:
    """Run programs; return each with its verdict."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {seed: (program, program.verdict()) for seed in seeds for program in [Program.drawn(seed)]}


if __name__ == "__main__":
    torch.set_num_threads(1)
    count, first = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    counts: Counter[tuple[str, str]] = Counter()
    for seed in range(first, first + count):
        ((program, verdict),) = tried([seed]).values()
        kind = verdict.partition(":")[0]
        counts["faulty" if program.fault else "sound", kind] += 1
        if kind == "wrong" or (kind == "refused" and not program.fault):
            print(seed, program, verdict[:300], flush=True)
    print(dict(counts))
