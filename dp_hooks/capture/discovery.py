"""Runs of a model on other numbers of rows, to find out where the batch is and what has to be repeated sample by sample."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._no_randomness import Draws, NoDropout, other_generators_kept
from .._tree import tree_map
from ..errors import DPHooksError
from .hooked_modules import Sites
from .parameter_swap import attributes_kept
from .samples.probe import BatchAxes, Trial, numbers_of_rows, rows_for_trial
from .samples.tracker import Lifter

# What a model may raise when it is run on another number of rows than it was given.
_CANNOT_RUN = (
    DPHooksError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True, eq=False)
class OutermostCall:
    """The outermost call into the model that is running, on ``rows`` samples; None: it is not known on how many."""

    name: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    rows: int | None


class Trials:
    """Tells the sites and the lifter of a model what runs on a few rows have shown."""

    def __init__(self, model: nn.Module, sites: Sites, lifter: Lifter) -> None:
        """What is learned goes to ``lifter.axes`` and ``sites``."""
        self._model = model
        self._sites = sites
        self._lifter = lifter

    def learn(self, call: OutermostCall) -> None:
        """Find out, once per outermost module and mode, which axes count samples, by runs on other numbers of rows."""
        self._learn(call)

    def learn_again(self, call: OutermostCall, draws: Draws | None) -> None:
        """The same in the middle of ``call``, the way that it went so far; then it goes on as if nothing had been."""
        held = [
            (site, {name: owner._parameters[key] for owner, key, name in site.slots.places}, site.captures, site.entry)
            for site in self._sites
            if site.slots.filled
        ]
        self._learn(call, draws, again=True)
        for site, tensors, captures, entry in held:
            site.slots.fill(tensors)  # type: ignore[arg-type]
            site.captures, site.entry = captures, entry
        self._sites.lift_outside()

    def _learn(self, call: OutermostCall, draws: Draws | None = None, again: bool = False) -> None:
        axes, rows = self._lifter.axes, call.rows
        key, telling = (call.name, call.module.training), (call.name, call.module.training, "several")
        self._lifter.strict = key in axes.shown
        if not rows or (not again and (telling in axes.tried or (rows == 1 and key in axes.tried))):
            return
        for site in self._sites:
            if site.slots.filled:  # an interrupted forward could not put them back
                site.slots.restore()
            if site.slots.foreign():
                return  # a trial would put them back
        axes.tried |= {key} if rows == 1 else {key, telling}
        trials: list[Trial] = []
        counts = numbers_of_rows(self._model, (call.args, call.kwargs))
        done = False
        while not done:
            count, tints = counts[len(trials)], rows > 1 and len(trials) == 1
            trial = self._try(call, rows, count, draws, tints=tints)
            if tints and (trial is None or trial.strayed):
                tinted, trial = trial, self._try(call, rows, count, draws, orders=True)
                if tinted is not None and trial is not None and self._repeat_one(tinted.led_astray(trial)):
                    trials = []
                    continue
            if trial is None:
                return
            trials.append(trial)
            done = len(trials) == len(counts) or (len(trials) > 1 and BatchAxes.agree(trials))
            if self._repeat_where_needed(trials, done):
                trials, done = [], False  # what is repeated as a whole is tried anew
        axes.learn(trials)
        axes.shown.add(key)
        self._lifter.strict = True
        for site in self._sites:
            whole = self._sites.repeated(site.module) is site  # its parameters are those of the sites inside
            touched = [n for n in site.slots.params if self._lifter.is_touched(site.full_name(n))]
            site.outside = () if whole else tuple(touched)

    def _repeat_where_needed(self, trials: list[Trial], done: bool) -> bool:
        """Have modules repeated sample by sample where rows are picked by their values inside; whether any is new."""
        wanted = [(frame.name, frame.module) for trial in trials for frame in trial.frames if frame.repeat]
        for key, agreed in BatchAxes.merged(trials).items() if done else ():
            if agreed is None or any(entry.is_routed for entry in agreed):
                around = [trial.repeated_module(e) for trial in trials for e in trial.entries.get(key, [])]
                wanted += [found for found in around if found is not None]
        new = False
        while self._repeat_one(wanted):
            new = True
        return new

    def _repeat_one(self, calls: Sequence[tuple[str, nn.Module]]) -> bool:
        """Have the first of ``calls`` repeated that is not yet; whether there is one."""
        for name, module in calls:
            if self._sites.repeated(module) is None:
                self._sites.repeat(name, module)
                return True
        return False

    def _try(
        self,
        call: OutermostCall,
        rows: int,
        count: int,
        draws: Draws | None,
        *,
        tints: bool = False,
        orders: bool = False,
    ) -> Trial | None:
        """Run the module on ``count`` rows, without gradients or random numbers, and leave no trace."""
        module, sites, lifter = call.module, self._sites, self._lifter
        kept = (lifter.rows, lifter.counts, sites.repeating)
        trial = Trial(count, telling=rows > 1, tints=tints, orders=orders)
        axis = lifter.axes.axis
        args, kwargs = tree_map(
            lambda leaf: rows_for_trial(leaf, rows, count, axis) if isinstance(leaf, Tensor) else leaf,
            (call.args, call.kwargs),
        )
        buffers = [(b, b.detach().clone()) for b in module.buffers()]
        devices = sorted({p.device.index or 0 for p in module.parameters() if p.device.type == "cuda"})
        lifter.trial, lifter.rows, lifter.counts = trial, count, {}
        try:
            with (
                attributes_kept(module),
                torch.random.fork_rng(devices=devices),
                other_generators_kept(),
                torch.enable_grad(),
                NoDropout(draws=draws) as without,
                trial.watching(),
            ):
                without.begin_again()
                for site in sites:
                    if sites.repeated(site.module) is None:
                        site.outside = tuple(site.slots.params)
                        site.lift_outside(lifter)
                module(*args, **kwargs)
        except _CANNOT_RUN:
            trial.check_inputs()
            return None
        finally:
            for site in sites:
                site.outside = ()
            sites.restore()
            lifter.trial = None
            lifter.rows, lifter.counts, sites.repeating = kept
            with torch.no_grad():
                for buffer, value in buffers:
                    if not torch.equal(buffer, value):
                        buffer.copy_(value)
        trial.check_inputs()
        return trial
