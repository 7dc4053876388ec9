"""A default device that is set around training is a matter of the user's tensors only."""

from typing import Any

import pytest
import torch
from torch import nn

from dp_hooks import private_training

from .. import laws
from ..models import Net, loader_of, randn

D = 4


@pytest.mark.parametrize("mode", laws.MODES, ids=str)
@pytest.mark.parametrize("clipping", ["flat", "automatic"])
def test_steps_and_checks_do_not_depend_on_the_default_device(mode: Any, clipping: str) -> None:
    """On "meta" whatever was made without saying where could not be computed with."""
    model = Net(lambda s, x: s.b(s.drop(s.a(x).tanh())), a=nn.Linear(D, D), b=nn.Linear(D, 3), drop=nn.Dropout(0.5)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    options: dict[str, Any] = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "poisson_sampling": False, "clipping": clipping}
    step, batches = laws.step_in(mode, lambda m, x: m(x).square().mean(1)), loader_of([randn(16, D)], 8)
    with torch.device("meta"):
        scope = private_training(model, optimizer, batches, grad_sample_mode=mode.grad_sample_mode, **options)
    with scope as (opt, loader):
        for batch in loader:  # PyTorch's own loader draws a seed on the default device
            before = [p.detach().clone() for p in model.parameters()]
            with torch.device("meta"):
                step(model, opt, batch)
            assert all(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    with torch.device("meta"):
        assert scope.get_epsilon(1e-5) > 0
