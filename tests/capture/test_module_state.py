"""The state of a model, used again from step to step, is what one would find who looked through everything anew."""

import numpy
import pytest
import torch
from torch import nn

from dp_hooks.capture.calls.module_state import _LONGEST, ModuleState


class Thing:
    """An object of somebody's own."""

    def __init__(self, **attributes):
        vars(self).update(attributes)


class Other(Thing):
    """A class that an object can change to."""


class OfLibrary(Thing):
    """An object of a class that is not looked into."""

    __module__ = "torch.somewhere"


class Equal:
    """Equal to all others of its kind."""

    def __init__(self):
        self.inside = [0]

    def __eq__(self, other):
        return isinstance(other, Equal)

    def __hash__(self):
        return 1


def made():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    model.number, model.items, model.table = 1000 * 3, [1, [torch.ones(2)]], {"a": Thing(x=1, deep={"b": torch.ones(1)})}
    model.thing, model.kinds, model.mixed = Thing(x=[1], y=torch.zeros(1)), {Equal()}, (1, [2], nn.Linear(1, 1))
    model.long, model.array, model.fixed = list(range(_LONGEST + 1)), numpy.zeros(3), numpy.ones(2)
    model.fixed.flags.writeable = False
    model.closed = OfLibrary(x=[1])
    model.last = [1]
    model.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    return model


def renamed(m):
    m.renamed = m.__dict__.pop("last")
    return m.renamed


def cut(m):
    m.long[3:] = [torch.ones(1)]


def own(m):
    m.thing.__dict__ = {"x": [1], "y": torch.zeros(1)}


CHANGES = {
    "nothing": lambda m: None,
    "an equal number": lambda m: setattr(m, "number", int("3000")),
    "another number": lambda m: setattr(m, "number", 7),
    "a new attribute": lambda m: setattr(m, "new", [torch.ones(1)]),
    "an attribute that is gone": lambda m: delattr(m, "items"),
    "an attribute of another name": renamed,
    "a list that grew": lambda m: m.items.append(torch.ones(1)),
    "a list inside that grew": lambda m: m.items[1].append(Thing(x=1)),
    "a list in a tuple": lambda m: m.mixed[1].append(torch.ones(1)),
    "a dictionary inside an object": lambda m: m.table["a"].deep.update(b=torch.ones(1)),
    "an object's attribute": lambda m: setattr(m.thing, "z", torch.ones(1)),
    "all of an object's attributes": own,
    "an object's class": lambda m: setattr(m.thing, "__class__", Other),
    "an object's class, for one of another library": lambda m: setattr(m.closed, "__class__", Thing),
    "an array that cannot be written to now": lambda m: setattr(m.array.flags, "writeable", False),
    "an equal object in a set": lambda m: (m.kinds.clear(), m.kinds.add(Equal())),
    "a long list that is short now": cut,
    "what is in an array": lambda m: m.array.fill(3.0),
    "the size of an array": lambda m: m.array.resize(5, refcheck=False),
    "an array that can be written to now": lambda m: setattr(m.fixed.flags, "writeable", True),
    "a buffer": lambda m: m[1].register_buffer("running_mean", torch.ones(3)),
    "what is in a buffer": lambda m: m[1].running_mean.add_(1),
    "what a parameter has as .data": lambda m: setattr(m[0].weight, "data", torch.ones(3, 2)),
    "what is trained": lambda m: m[0].weight.requires_grad_(False),
    "another parameter": lambda m: setattr(m[0], "weight", nn.Parameter(torch.ones(3, 2))),
    "a module": lambda m: m.add_module("more", nn.Linear(1, 1)),
    "a module in a hidden one": lambda m: m.mixed[2].add_module("more", nn.Linear(1, 1)),
    "a mode": lambda m: m[1].eval(),
    "a hook": lambda m: m[0].register_forward_hook(lambda *_: None),
    "a hook before": lambda m: m[0].register_forward_pre_hook(lambda *_: None),
}


def inside(contents):
    if isinstance(contents, set):
        return sorted(map(id, contents))
    return [(k, id(v)) for k, v in contents.items()] if isinstance(contents, dict) else [*map(id, contents)]


def described(state):
    """All that a state holds, by identity."""
    held = [(id(m), *(inside(part) for part in (h.attributes, h.buffers, h.hooks, h.pre_hooks))) for m, h in state.modules]
    containers = [(place, id(container), inside(before)) for place, container, before in state.containers]
    arrays = [(place, id(array), before.tolist()) for place, array, before in state.arrays]
    tensors = [(place, id(t)) for place, t in state.tensors]
    counted = [(place, id(t), now) for (place, t), now in zip(state._counted, state._written, strict=True)]
    return held, containers, arrays, tensors, counted, state.found_at


@pytest.mark.parametrize("change", CHANGES)
def test_a_state_that_is_renewed_is_that_of_now(change):
    """Whatever has changed in between, it holds what a state holds that was made from nothing, and sees the next changes."""
    model = made()
    first = ModuleState(model, renewable=True)
    before = described(first)
    kept = CHANGES[change](model)
    renewed, fresh = first.renewed(), ModuleState(model)
    assert described(renewed) == described(fresh)
    assert not renewed.changed()
    assert described(first) == before
    again = renewed.renewed()
    assert described(again) == described(fresh)
    for later in ("a new attribute", "what is in a buffer", "an object's attribute"):
        CHANGES[later](model)
    assert again.changed().keys() == fresh.changed().keys() != set()
    del kept


def test_nothing_is_looked_through_anew_where_nothing_changed(monkeypatch):
    """Then the containers of the state are those of the one before; they are others where something changed."""
    model = made()
    first = ModuleState(model, renewable=True)
    assert first.renewed().containers is first.containers
    model.number = 7
    assert first.renewed().containers is not first.containers


@pytest.mark.parametrize("change", [name for name in CHANGES if name not in ("nothing", "a long list that is short now")])
def test_what_differs_is_known(change):
    """A state tells that something is another object now, or gone; what was written to, and what is trained, is no other object."""
    model = made()
    state = ModuleState(model)
    kept = CHANGES[change](model)
    state.changed()
    same = (
        "what is in",
        "what a parameter",
        "what is trained",
        "the size",
        "an array that",
        "a module",
        "a hook",
        "an object's class",
    )
    unseen = (*same, "all of an object's", "an equal object", "another parameter")
    assert state.differs == (not change.startswith(unseen))
    del kept
