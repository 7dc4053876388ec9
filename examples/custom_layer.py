"""Teach the library a layer of your own, and see what that is worth.

    python examples/custom_layer.py

Shows ``register_rule`` on a locally connected layer: a convolution with other weights in every place, which ``torch.nn`` does not
have. Takes about half a minute. Prints the time of a training step, ordinary and private, without a rule and with one; the error
that a wrong rule ends with; and the test accuracy on images of digits of the majority class, without privacy and with it.

Without a rule the layer is right already, since the operations on its parameters are followed one by one. A rule with
``sq_norms`` and ``weighted_sums`` spares writing out a gradient for each example. In each place the gradient of an example is an
outer product of a patch x and an output gradient g, so its length is known without it: ``|x g^T| = |x| |g|``.
"""

import statistics
import time
from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from example_data import majority, split_digits
from example_training import DELTA, accuracy, losses_of, settings_of, settings_parser, train, train_privately, train_step
from images import NON_PRIVATE, PRIVATE
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dp_hooks import private_training, register_rule
from dp_hooks.errors import SelfCheckError
from dp_hooks.rules import Call


class LocallyConnected(nn.Module):
    """Patches of an image, each with weights of its own: ``[n, 1, 28, 28]`` to ``[n, places, outputs]``."""

    def __init__(self, kernel: int = 6, stride: int = 2, outputs: int = 16) -> None:
        """Patches of ``kernel`` x ``kernel`` pixels, ``stride`` apart."""
        super().__init__()
        self.kernel, self.stride = kernel, stride
        places, pixels = ((28 - kernel) // stride + 1) ** 2, kernel * kernel
        self.weight = nn.Parameter(torch.randn(places, pixels, outputs) / pixels**0.5)
        self.bias = nn.Parameter(torch.zeros(places, outputs))

    def patches(self, images: Tensor) -> Tensor:
        """Return ``[n, places, pixels]``."""
        return F.unfold(images, self.kernel, stride=self.stride).transpose(1, 2)

    def forward(self, images: Tensor) -> Tensor:
        """Return ``[n, places, outputs]``."""
        return torch.einsum("nlk,lko->nlo", self.patches(images), self.weight) + self.bias


class WithRule(LocallyConnected):
    """The same. A rule is for one class alone: what a subclass computes is not known."""


class WithWrongRule(LocallyConnected):
    """The same, for a rule with a mistake in it."""


def gradients(call: Call) -> dict[str, Tensor]:
    """Return the gradient of each example, written out; ``call.grad`` is what came back to the output, ``[n, places, outputs]``."""
    return {"weight": torch.einsum("nlk,nlo->nlko", call.module.patches(call.input), call.grad), "bias": call.grad}


def squared_norms(call: Call) -> dict[str, Tensor]:
    """Return the squared lengths of these gradients, ``[n]``."""
    x, g = call.module.patches(call.input).square().sum(2), call.grad.square().sum(2)
    return {"weight": (x * g).sum(1), "bias": g.sum(1)}


def weighted_sums(call: Call, factors: Tensor) -> dict[str, Tensor]:
    """Return the sum over the examples of factor times gradient."""
    g = call.grad * factors[:, None, None]
    return {"weight": torch.einsum("nlk,nlo->lko", call.module.patches(call.input), g), "bias": g.sum(0)}


def wrong_norms(call: Call) -> dict[str, Tensor]:
    """Return lengths that are too small (a mean over places): clipping would let an example count more than epsilon says."""
    x, g = call.module.patches(call.input).square().sum(2), call.grad.square().sum(2)
    return {"weight": (x * g).mean(1), "bias": g.sum(1)}


register_rule(WithRule, sq_norms=squared_norms, weighted_sums=weighted_sums)(gradients)
register_rule(WithWrongRule, sq_norms=wrong_norms, weighted_sums=weighted_sums)(gradients)


def build_model(layer: type[LocallyConnected], seed: int = 0) -> nn.Module:
    """Return a classifier of digits with the layer at the bottom."""
    torch.manual_seed(seed)
    below = layer()
    return nn.Sequential(below, nn.ReLU(), nn.Flatten(), nn.Linear(below.bias.numel(), 10))


def times_of_steps(model: nn.Module, data: TensorDataset, batch_size: int, steps: int, private: bool) -> Iterator[float]:
    """Yield the seconds of each of some steps, without the first ones, in which the library checks itself."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    images, labels = data.tensors[0][:batch_size], data.tensors[1][:batch_size]
    if not private:
        for _ in range(steps):
            begun = time.perf_counter()
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            yield time.perf_counter() - begun
        return
    loader = DataLoader(TensorDataset(images, labels), batch_size=batch_size)
    how = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "poisson_sampling": False, "spot_check_rate": 0.0}
    with private_training(model, optimizer, loader, **how) as (_, private_loader):
        for step in range(steps + 2):
            (batch,) = private_loader
            begun = time.perf_counter()
            train_step(model, batch)
            if step >= 2:
                yield time.perf_counter() - begun


def compare_times(data: TensorDataset, batch_size: int, steps: int) -> None:
    """Print the time of a step, of all kinds."""
    print(f"time of a step of {batch_size} images, median of {steps}:")
    ordinary = statistics.median(times_of_steps(build_model(LocallyConnected), data, batch_size, steps, private=False))
    print(f"  without privacy          {1000 * ordinary:6.1f} ms")
    for name, layer in (("private, no rule", LocallyConnected), ("private, with the rule", WithRule)):
        found = statistics.median(times_of_steps(build_model(layer), data, batch_size, steps, private=True))
        print(f"  {name:24} {1000 * found:6.1f} ms, {found / ordinary:.2f} of that without privacy")


def main() -> None:
    """Compare, be refused, and train."""
    parser = settings_parser(__doc__, replace(PRIVATE, learning_rate=2e-3))
    parser.add_argument("--examples", type=int, default=5000, help="images to train on and to test with, together")
    parser.add_argument("--steps", type=int, default=20, help="steps that are timed")
    args, begun = parser.parse_args(), time.perf_counter()
    data, (images, labels) = split_digits(args.examples)
    compare_times(data, min(250, len(data)), args.steps)
    settings = settings_of(args)
    try:
        train_privately(build_model(WithWrongRule), data, settings, args.epsilon, train_step)
    except SelfCheckError as error:
        print(f"the wrong rule is refused before anything is released:\n  {str(error).splitlines()[0]}")
    else:
        raise SystemExit("the wrong rule was not noticed.")
    print(f"majority class: test accuracy {majority(labels):.3f}")
    model = build_model(WithRule)
    train(model, data, NON_PRIVATE, losses_of)
    print(f"without privacy: test accuracy {accuracy(model, images, labels):.3f}")
    model = build_model(WithRule)
    spent = train_privately(model, data, settings, args.epsilon, train_step)
    print(f"with epsilon {spent:.2f}, delta {DELTA:g}: test accuracy {accuracy(model, images, labels):.3f}")
    print(f"{time.perf_counter() - begun:.0f} seconds in all")


if __name__ == "__main__":
    main()
