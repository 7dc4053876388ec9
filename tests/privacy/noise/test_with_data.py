"""The noise on sums of real gradients: what is released less what would be without noise, for every clipping and mode."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from dp_hooks import private_training
from dp_hooks.privacy.noise import make
from dp_hooks.privacy.noise.secure import SecureNoise

from ...models import drawn, each_mode
from ..gaussian import COUNT, Wide, assert_fits_only, correlation, fits
from ..seeded_bytes import SeededBytes

SIGMA = 0.8
# Options, and the standard deviation of the noise that they need.
CLIPPINGS: dict[str, tuple[dict[str, Any], float]] = {
    "flat": ({"max_grad_norm": 2.0}, 2 * SIGMA),
    "per layer": ({"clipping": "per_layer", "max_grad_norm": [3.0, 4.0]}, 5 * SIGMA),
    "per group": ({"clipping": "per_group", "max_grad_norm": {"a.*": 0.6, "*": 0.8}}, SIGMA),
    "automatic": ({"clipping": "automatic", "max_grad_norm": 0.5}, 0.5 * SIGMA),
    "adaptive": (
        {"clipping": "adaptive", "max_grad_norm": 2.0, "clipping_options": {"unclipped_num_std": 1.0}},
        2 / math.sqrt(SIGMA**-2 - 0.25),
    ),
    "in parts": ({"max_grad_norm": 2.0, "max_physical_batch_size": 3}, 2 * SIGMA),
}


@pytest.fixture(autouse=True)
def seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Secure noise comes from one stream of seeded bytes in place of the operating system."""
    source = SeededBytes(1)
    monkeypatch.setattr(make, "SecureNoise", lambda: SecureNoise(source))


def moves(sigma: float, steps: int, **options: Any) -> list[dict[str, Tensor]]:
    """What each of some steps on ten rows of random numbers subtracts."""
    model, found = Wide(torch.float64), []
    data = TensorDataset(torch.randn(10, COUNT // 2, generator=drawn(1), dtype=torch.float64))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    options = {"loss_reduction": "sum", "sample_rate": 1.0, "accountant": "rdp", "self_check": False, **options}
    with private_training(model, optimizer, DataLoader(data, batch_size=4), noise_multiplier=sigma, **options) as (opt, loader):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        while len(found) < steps:
            for (x,) in loader:
                opt.zero_grad()
                model(x).sum().backward()
                opt.step()
            found.append({name: before[name] - p.detach() for name, p in model.named_parameters()})
            before = {name: p.detach().clone() for name, p in model.named_parameters()}
    return found


@each_mode
@pytest.mark.parametrize("clipping", CLIPPINGS)
@pytest.mark.parametrize("secure", [False, True], ids=["plain", "secure"])
def test_sums_of_data_get_the_noise_that_is_charged(secure: bool, clipping: str, mode: str) -> None:
    """On every parameter it has sigma times the sensitivity, and no other standard deviation fits."""
    options, std = CLIPPINGS[clipping]
    how = {"secure_mode": True} if secure else {"noise_generator": drawn(7)}
    (bare,) = moves(0.0, 1, grad_sample_mode=mode, **options)
    (noised,) = moves(SIGMA, 1, grad_sample_mode=mode, **options, **how)
    assert all(float(move.norm()) > 0.1 for move in bare.values())
    assert_fits_only(noised["a.weight"] - bare["a.weight"], std)
    small = noised["b.weight"] - bare["b.weight"]
    assert fits(small, std)
    assert not any(fits(small, factor * std) for factor in (0.9, 1.1))


@pytest.mark.parametrize("secure", [False, True], ids=["plain", "secure"])
@pytest.mark.parametrize("parts", [None, 3])
def test_noise_on_data_is_new_in_every_step_parameter_and_scope(parts: int | None, secure: bool) -> None:
    """Of two scopes with three steps each, one after the other with one generator: no two pieces of noise are correlated.

    66 pairs at 5.5 standard deviations: a wrong alarm has a chance of 3e-6, were the seeds not fixed.
    """
    generator = drawn(8)
    how = {"secure_mode": True} if secure else {"noise_generator": generator}
    bare, pieces = moves(0.0, 3, max_grad_norm=1.0, max_physical_batch_size=parts), []
    for _ in range(2):
        noised = moves(SIGMA, 3, max_grad_norm=1.0, max_physical_batch_size=parts, **how)
        pieces += [step[name] - without[name] for step, without in zip(noised, bare, strict=True) for name in step]
    assert len(pieces) == 12
    for i, one in enumerate(pieces):
        assert fits(one, SIGMA)
        assert correlation(one, one) > 5.5
        assert correlation(one, one.roll(1)) < 5.5
        assert max([correlation(one, other) for other in pieces[:i]], default=0.0) < 5.5
