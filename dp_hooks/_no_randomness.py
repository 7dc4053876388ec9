"""Runs a model without its random numbers, so that runs of different size can be compared."""

import random
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ._dropout_masks import DropoutMasks
from ._operations import (
    BERNOULLI,
    COUNTS,
    DRAWS,
    NOISE,
    RECURRENT,
    alpha_dropped,
    is_dropout,
    noise_quantile,
    probabilities_of,
    randint_bounds,
)

# How many numbers at once may be what a branch hangs on; how many of a pass are kept, so that a check can take the same way.
_COIN, _KEPT = 64, 1 << 16


def _other_generators() -> tuple[Any, Any]:
    numpy = sys.modules.get("numpy")  # a model that draws from it has imported it
    return random.getstate(), None if numpy is None else numpy.random.get_state()


def _set_other_generators(state: tuple[Any, Any]) -> None:
    random.setstate(state[0])
    if state[1] is not None:
        sys.modules["numpy"].random.set_state(state[1])


def set_seeds(seed: int) -> None:
    """Seed the generators of PyTorch on CPU, of Python and of NumPy.

    ``torch.manual_seed`` would look for devices, which takes longer than a small model, and seed those that come later, too.
    """
    torch.default_generator.manual_seed(seed)
    _seed_others(seed)


def _seed_others(seed: int) -> None:
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)


_alone = threading.RLock()


@contextmanager
def generators_kept(devices: Sequence[int] = ()) -> Iterator[None]:
    """Put the generators of PyTorch (on CPU and these CUDA devices), Python and NumPy back afterwards.

    All threads share them: one at a time is in such a block. (Not in a backward pass, for which its thread may wait in one.)
    """
    with undisturbed_generators(), torch.random.fork_rng(devices=devices):
        state = _other_generators()
        try:
            yield
        finally:
            _set_other_generators(state)


def undisturbed_generators() -> AbstractContextManager[Any]:
    """Return a context in which no check of another thread seeds the shared generators, and puts them back."""
    return _alone if torch._C._current_graph_task_id() == -1 else nullcontext()


@dataclass(eq=False)
class Draws:
    """What a pass drew that can decide which way it takes, and the generators beside torch's, unless these are None."""

    numbers: list[tuple[str, Tensor | None]] = field(default_factory=list)  # in their order; None: too many to be kept
    few: bool = False  # whether some of it was for the whole batch, and not much
    generators: tuple[Any, Any] | None = field(default_factory=_other_generators)
    _left: int = _KEPT

    def note(self, name: str, out: Any, rows: int | None) -> None:
        """Keep what the function ``name``, one of :data:`DRAWS`, drew for ``rows`` samples, unless it is much."""
        if not isinstance(out, Tensor):
            return
        few = out.numel() == 1 or (out.numel() <= _COIN and rows not in out.shape)
        kept = few or out.numel() <= self._left
        self._left -= out.numel() if kept and not few else 0
        self.numbers.append((name, out.detach().clone() if kept else None))
        self.few = self.few or few

    def begin_again(self) -> None:
        """Set the generators of Python and NumPy to what they were."""
        if self.generators is not None:
            _set_other_generators(self.generators)


# What few numbers drawn at once are in the trials after the first, as quantiles: gates open and close, and each of a handful of
# choices has its turn.
_LEVELS = (0.02, 0.98, 0.5, 0.26, 0.74, 0.14, 0.86, 0.38, 0.62)
_ALL_ALIKE = 3  # up to this trial several numbers at once are the same; later ones differ: one of them is the largest
_DRAWS = 256  # of which those at the levels are taken, where no formula is known
TRIALS, FEW_TRIALS = 1 + len(_LEVELS), 1 + _ALL_ALIKE


class _Drawing(threading.local):
    depth = 0


_drawing = _Drawing()  # whether one of these modes draws: others around it, of a check that runs a probe, take no part


class TooLong(Exception):
    """A run takes many more operations than it should."""


class NoRandomness(TorchFunctionMode):
    """Replaces dropout by the identity and noise by a constant, so that runs of different size can be compared.

    ``eval()`` would turn dropout off as well, but would also hide BatchNorm's batch statistics. Permutations are left
    alone: a model that shuffles samples mixes them. Random integers are drawn by the run on the whole batch, and a run on
    some samples gets their rows; with ``varied`` so is noise, to tell samples apart, and there is dropout, by :attr:`masks`.
    Given the ``draws`` of a pass, few numbers at once are what it drew, so that a model that tosses a coin goes the same
    way again. In a later ``trial`` numbers for the whole batch are others: near their least, near their largest, in the middle,
    and between. Of numbers with several rows for each sample, those of one are taken to stand together, or, if :attr:`by_turns`
    is set, one of each sample after the other.
    """

    def __init__(
        self, samples: int | None = None, *, draws: Draws | None = None, varied: bool = False, trial: int = 0, choices: int = 0
    ) -> None:
        """For runs on ``samples`` and on some of them; from trial ``TRIALS`` on each of so many ``choices`` has its turn."""
        super().__init__()
        self.samples = samples
        self.draws = draws
        self.varied = varied
        self.trial = trial
        self.by_turns = False
        self.masks = DropoutMasks(samples)
        self.grouped = False  # whether numbers with several rows for each sample were cut
        self.noisy = False  # whether noise with rows for each sample, or much of it, or dropout was replaced
        self.gates = False  # whether a number for the whole batch was drawn
        self.choices = choices  # how many different ones can be drawn at once for the whole batch, if that is not too many
        self.operations = 0  # in the present run
        self._limit: int | None = None  # more than so many in it are an error
        self._coins = 0
        self._some: Tensor | None = None
        self._drawn: list[Tensor] = []
        self._are_gates: list[tuple[bool, bool]] = []  # what was drawn on all samples, and whether it may be rows of them
        self._are_coins: list[bool] = []  # whether what a dropout was given was one number for the whole batch
        self._next = self._count = self._asked = self._drops = 0
        self._generators: dict[torch.Generator, Tensor] = {}
        self._others: tuple[Any, Any] | None = None

    def begin_again(self, some: Tensor | None = None) -> None:
        """A run begins, on all samples or on ``some``: seeds are set, and what is repeated begins at its start."""
        self._note_others()
        _seed_others(self.trial)
        self._seed(0)
        self._put_generators_back()
        self._coins, self._next, self._count, self._asked, self._drops, self._some = 0, 0, 0, 0, 0, some
        self.operations = 0
        self.masks.begin_again(some)
        if some is None:
            self._drawn, self._are_gates, self._are_coins = [], [], []
        if self.draws is not None:
            self.draws.begin_again()
        self._others = _other_generators()

    @contextmanager
    def limited(self, operations: int) -> Iterator[None]:
        """Break the block off with :class:`TooLong` after so many operations."""
        self.operations, self._limit = 0, operations
        try:
            yield
        finally:
            self._limit = None

    def _note_others(self) -> None:
        """Whether the run before drew from the generators of Python or NumPy."""
        if self._others is not None:
            python, numpy = _other_generators()
            before = self._others
            changed = python != before[0] or (numpy is not None and before[1] is not None and numpy[2] != before[1][2])
            self.gates = self.gates or changed

    def _seed(self, count: int) -> None:
        seed = 1000 * self.trial + count
        if torch.cuda.is_initialized():
            torch.manual_seed(seed)
        else:  # that would look for devices, which takes longer than a small model
            torch.default_generator.manual_seed(seed)

    def __exit__(self, *exc: Any) -> None:
        """End it, with the user's own generators as they were."""
        self._note_others()
        self._put_generators_back()
        super().__exit__(*exc)  # type: ignore[no-untyped-call]

    def _put_generators_back(self) -> None:
        for generator, state in self._generators.items():
            generator.set_state(state)

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        name = getattr(func, "__name__", "")
        self.operations += 1
        if self._limit is not None and self.operations > self._limit:
            self._limit = None
            raise TooLong("a run takes many more operations than it should.")
        if name == "gumbel_softmax":  # draws inside
            return self._gumbel_softmax(*args, **(kwargs or {}))
        dropout = is_dropout(name)
        if not dropout and name not in DRAWS:
            return self._without(func, args, kwargs)
        if not dropout and _drawing.depth:
            return func(*args, **(kwargs or {}))
        _drawing.depth += 1
        try:
            return self._drop(func, args, kwargs or {}) if dropout else self._draw(func, name, args, kwargs or {})
        finally:
            _drawing.depth -= 1

    def _drop(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """In place of dropout: nothing, or a mask that is known."""
        settings = dict(zip(("input", "p", "training", "inplace"), args, strict=False)) | kwargs
        x: Tensor = settings["input"]
        p, training = settings.get("p", 0.5), settings.get("training", settings.get("train", True))
        mask = self._mask(x, p) if training is not False and 0 < p < 1 else None
        if func.__name__ == "native_dropout":
            return (x, torch.ones_like(x, dtype=torch.bool)) if mask is None else (x * mask, (mask > 0).expand_as(x))
        if mask is None:
            return x
        if "alpha" in func.__name__:
            return alpha_dropped(x, mask > 0, p)
        return x.mul_(mask) if settings.get("inplace") or func.__name__.endswith("_") else x * mask

    def _mask(self, x: Tensor, p: float) -> Tensor | None:
        if self._some is None:
            self._are_coins.append(x.numel() == 1 and self.samples != 1)
        self._drops += 1
        if self._drops > len(self._are_coins) or not self._are_coins[self._drops - 1]:
            self.noisy = True
            return self.masks.make(x, p) if self.varied else None
        coin = torch.ones_like(x.detach())
        return coin * float(1 - p > self._level()) / (1 - p) if self._is_gate(coin) and self.trial else None

    def _gumbel_softmax(self, logits: Tensor, tau: float = 1, hard: bool = False, eps: float = 1e-10, dim: int = -1) -> Tensor:
        """The softmax of logits with noise (Jang, Gu, Poole, "Categorical reparameterization with Gumbel-softmax", ICLR 2017)."""
        noise = self.__torch_function__(Tensor.exponential_, (), (torch.empty_like(logits).detach(),))
        soft: Tensor = ((logits - noise.log()) / tau).softmax(dim)
        if not hard:
            return soft
        chosen = torch.zeros_like(logits).scatter_(dim, soft.max(dim, keepdim=True)[1], 1.0)
        hardened: Tensor = chosen - soft.detach() + soft
        return hardened

    def _draw(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        generator = kwargs.get("generator")
        if generator is not None and generator not in self._generators:
            self._generators[generator] = generator.get_state()
        if generator is None:  # what is drawn next must not depend on how many numbers came before, one row or many
            self._count += 1
            self._seed(self._count)
        if name in BERNOULLI and not self.varied:  # stochastic depth: keep probability p, divided by p afterwards
            out = probabilities_of(name, args, kwargs)
            if not self._is_gate(out):
                self._note_noise(out)
            elif self.trial:
                out.copy_((out > torch.tensor(self._levels(out), device=out.device).view_as(out)).to(out.dtype))
        else:
            out = func(*args, **kwargs)
            if isinstance(out, Tensor) and name != "randperm":
                drawn, out = out, out.detach() if name == "_standard_gamma" else out
                with torch.no_grad():
                    gate = self._is_gate(out)
                    if gate and self._some is None:
                        self._note_choices(out, name, args, kwargs)
                    if not (gate and self.trial and self._at_level(out, func, name, args, kwargs)):
                        self._repeat(out, constant=name in NOISE and not self.varied)
                if drawn.grad_fn is not None and drawn is not out:  # what is drawn here follows its parameter
                    shape = args[0]
                    out = out + (shape - shape.detach()) * torch._standard_gamma_grad(shape.detach(), out)
            elif isinstance(out, Tensor):
                self.gates = True
        if self.draws is not None and isinstance(out, Tensor) and self._coins < len(self.draws.numbers):
            drew, whole = self.draws.numbers[self._coins]
            self._coins += drew == name
            mine = None if drew != name or whole is None else self._rows_in(whole, out)
            if mine is not None:
                with torch.no_grad():
                    out.copy_(mine)
        return out

    def _level(self) -> float:
        """That of the number drawn now: in later trials the next number has another one."""
        first = self.trial - 1
        if self.trial >= TRIALS:
            return ((self.trial - TRIALS + self._asked - 1) % self.choices + 0.5) / self.choices
        return _LEVELS[first if first < _ALL_ALIKE else (first + self._asked - 1) % len(_LEVELS)]

    def _levels(self, out: Tensor, *, spread: bool = False) -> list[float]:
        """At which quantiles the numbers in ``out`` are in this trial; ``spread``: whole numbers, each of which has its turn."""
        level, count = self._level(), out.numel()
        levels = [level] * count
        later = self.trial - 1 - _ALL_ALIKE
        if later >= 0 and count > 1 and not self._are_gates[self._asked - 1][1]:
            if spread:
                return [(level + i / count) % 1 for i in range(count)]
            levels[later % count], levels[(later + 1) % count] = max(_LEVELS), min(_LEVELS)
        return levels

    def _at_level(self, out: Tensor, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Write into ``out`` what is drawn rarely, or between, as the trial wants it; whether it is known what that is."""
        if name in NOISE:
            numbers: list[Any] = [noise_quantile(name, level, args[name.endswith("_") :], kwargs) for level in self._levels(out)]
        elif name == "multinomial" and out.numel() == 1:
            weights = args[0] if args else kwargs["input"]
            possible = weights.flatten().nonzero().flatten().tolist()
            numbers = [_pick(level, possible) for level in self._levels(out)]
        elif name in ("randint", "randint_like") and (bounds := randint_bounds(args, kwargs)) is not None:
            numbers = [_pick(level, range(*bounds)) for level in self._levels(out, spread=True)]
        elif name in COUNTS and name != "multinomial":
            drawn = torch.stack([func(*args, **kwargs).clone() for _ in range(_DRAWS)]).view(_DRAWS, -1).sort(0).values
            levels = self._levels(out, spread=True)
            numbers = [_pick(level, drawn[:, i].tolist()) for i, level in enumerate(levels)]
        else:
            return False
        out.copy_(torch.tensor(numbers, dtype=out.dtype, device=out.device).view_as(out))
        return True

    def _is_gate(self, out: Tensor) -> bool:
        """Whether numbers are for the whole batch, and so few that it may hang on them what becomes of it."""
        if self._some is None:
            gate = (out.numel() == 1 and self.samples != 1) or (out.numel() <= _COIN and self.samples not in out.shape)
            self._are_gates.append((gate, self._may_be_rows(out)))
            self.gates = self.gates or gate
        # A row for the one sample of a run looks like a number for all.
        self._asked += 1
        return self._asked <= len(self._are_gates) and self._are_gates[self._asked - 1][0]

    def _note_choices(self, out: Tensor, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        count = out.numel()  # the largest of them, as of Gumbel noise
        if name in ("randint", "randint_like") and (bounds := randint_bounds(args, kwargs)) is not None:
            count = bounds[1] - bounds[0]
        elif name == "multinomial":
            count = (args[0] if args else kwargs["input"]).shape[-1]
        if count <= _COIN:
            self.choices = max(self.choices, count)

    def _repeat(self, out: Tensor, *, constant: bool) -> None:
        """Make ``out`` a constant, or the rows of its samples in what the run on the whole batch drew here."""
        if constant:
            self._note_noise(out)
            out.fill_(0.75)
        elif self._some is None:
            self._drawn.append(out.detach().clone())
        elif self._next < len(self._drawn):
            whole = self._drawn[self._next]
            self._next += 1
            mine = self._rows_in(whole, out)
            if mine is not None:
                out.copy_(mine)

    def _note_noise(self, out: Tensor) -> None:
        """A constant takes the place of noise: for each sample, or so much that it is told from a gate by other values only."""
        if self._some is None and self.samples and (out.numel() > _COIN or self._may_be_rows(out)):
            self.noisy = True

    def _may_be_rows(self, out: Tensor) -> bool:
        """Whether numbers drawn on all samples may be for some rows of each."""
        return bool(self.samples) and any(size and size % (self.samples or 1) == 0 for size in out.shape)

    def _rows_in(self, whole: Tensor, out: Tensor) -> Tensor | None:
        """The rows in ``whole``, drawn for all samples, of those that the present run is on, in the shape of ``out``; or None."""
        if whole.shape == out.shape:
            return whole
        axes = [d for d, (a, b) in enumerate(zip(whole.shape, out.shape, strict=False)) if a != b]
        if self._some is None or not self.samples or whole.dim() != out.dim() or len(axes) != 1:
            return None
        (axis,), some = axes, self._some.to(whole.device)
        each, rest = divmod(whole.shape[axis], self.samples)
        if rest or out.shape[axis] != each * len(some):
            return None
        if each > 1:
            self.grouped = True
            inside = torch.arange(each, device=whole.device)
            some = inside[:, None] * self.samples + some if self.by_turns else some[:, None] * each + inside
        return whole.index_select(axis, some.flatten())

    @staticmethod
    def _without(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name == "scaled_dot_product_attention":
            args = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args
            kwargs.pop("dropout_p", None)
        elif name == "multi_head_attention_forward":
            args = (*args[:10], 0.0, *args[11:]) if len(args) > 10 else args
            if "dropout_p" in kwargs:
                kwargs["dropout_p"] = 0.0
        elif name in ("rrelu", "rrelu_"):  # with the slope of an evaluation
            if len(args) > 3:
                args = (*args[:3], False, *args[4:])
            else:
                kwargs["training"] = False
        elif name in RECURRENT:  # of their arguments only dropout is a float
            args = tuple(0.0 if isinstance(arg, float) else arg for arg in args)
        return func(*args, **kwargs)


def _pick(level: float, possible: Sequence[Any]) -> Any:
    """The one of some sorted numbers that is there: at the ends the very first and the very last, however rare."""
    if level in (min(_LEVELS), max(_LEVELS)):
        return possible[0 if level < 0.5 else -1]
    return possible[int(level * len(possible))]
