"""How many operations a private step takes beside an ordinary one, and how often it waits for a result; exact, on any machine."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..models import Net, loader_of, randn, scope_over
from ..reference import losses_of

LOOKED_AT = ("_local_scalar_dense", "nonzero", "is_nonzero", "_unique", "_unique2", "unique_dim", "masked_select", "equal", "item")
LAYERS, WIDTH, SAMPLES = 8, 12, 4


class Counted(TorchDispatchMode):
    """Counts operations by name, and those whose result the program waits for."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, fn, types, args=(), kwargs=None):
        self.found[fn.__name__.partition(".")[0]] += 1
        return fn(*args, **(kwargs or {}))

    @property
    def looked_at(self):
        return sum(self.found[name] for name in LOOKED_AT)

    @property
    def total(self):
        return sum(self.found.values())


def blocks():
    """Linear layers and norms, all small: they are written out side by side."""
    layers = [nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(LAYERS)]
    return nn.Sequential(*layers, nn.Linear(WIDTH, 3)), randn(3 * SAMPLES, WIDTH).float()


def wide_convolutions():
    """Convolutions of many channels on few pixels: norms come from Gram matrices, of which each has to be looked at."""
    stem, head = nn.Conv2d(3, 160, 3, padding=1), nn.Linear(160, 3)
    layers = nn.ModuleList([nn.Conv2d(160, 160, 3, padding=1) for _ in range(LAYERS)])

    def forward(s, x):
        h = s.stem(x)
        for layer in s.layers:
            h = h + 0.1 * F.relu(layer(h))
        return s.head(h.mean((2, 3)))

    return Net(forward, stem=stem, layers=layers, head=head), randn(3 * SAMPLES, 3, 4, 4).float()


def counted(made, **options):
    """The operations of the third step of an ordinary run, and of a private one."""
    runs = []
    for private in (False, True):
        torch.manual_seed(0)
        model, data = made()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loader = loader_of([data], SAMPLES)
        if not private:
            for (x,) in loader:
                with Counted() as count:
                    optimizer.zero_grad()
                    losses_of(model, x).mean().backward()
                    optimizer.step()
        else:
            scope = scope_over(model, optimizer=optimizer, loader=loader, noise_multiplier=1.0, max_grad_norm=1.0, **options)
            with scope as (opt, private_loader):
                for (x,) in private_loader:
                    with Counted() as count:
                        opt.zero_grad()
                        losses_of(model, x).mean().backward()
                        opt.step()
        runs.append(count)
    return runs


@pytest.mark.parametrize(("made", "ratio", "looked_at"), [(blocks, 1.6, 2), (wide_convolutions, 5.1, 3)])
def test_operations_and_waits_of_a_step(made, ratio, looked_at):
    """However many layers there are, a step waits for whether all samples are finite, for Gram norms together, and for the sums."""
    ordinary, private = counted(made, spot_check_rate=0.0)
    assert private.total <= ratio * ordinary.total
    assert private.looked_at - ordinary.looked_at <= looked_at


def test_waits_are_counted():
    """The counter sees what it is for: a result that is read, and one whose shape is in the data."""
    with Counted() as count:
        torch.ones(3).sum().item()
        torch.ones(3).nonzero()
        bool(torch.ones(3).any())
    assert count.looked_at == 3
