"""Masks and choices drawn at random: whatever happens where something was masked, dropped or chosen is run in the check."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dp_hooks import errors

from .. import laws
from ..models import Net, randn
from ..reference import losses_of

N, T, D = 8, 3, 6

MODE = laws.MODE["ghost"]
STYLES = ("ghost", "two-pass")


def refusal(model: nn.Module, x: Tensor, style: str = "ghost") -> Any:
    """What a first step is refused with, of a bare loop or a train function; None if it is taken."""
    mode = laws.MODE[style]
    return laws.released(model, [x], laws.step_in(mode, losses_of), mode)


def masked(drawn: Callable[[Tensor], Tensor], other: Callable[[Tensor], Tensor]) -> nn.Module:
    """Two layers; where ``drawn(h)`` is true, ``other(h)`` takes the place of what is between them."""

    def forward(s: Any, x: Tensor) -> Tensor:
        h = s.a(x).sin()
        return s.b(torch.where(drawn(h), other(h), h).tanh())

    return Net(forward, a=nn.Linear(D, D), b=nn.Linear(D, 3)).double()


def mean_of_batch(h: Tensor) -> Tensor:
    return h.mean(0).expand_as(h)


def neighbour(h: Tensor) -> Tensor:
    return h.roll(1, 0)


MASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "bernoulli as bool": lambda h: torch.bernoulli(torch.full_like(h, 0.4)).bool(),
    "bernoulli is 1": lambda h: torch.bernoulli(torch.full_like(h, 0.4)) == 1,
    "bernoulli by its argument": lambda h: torch.bernoulli(torch.zeros_like(h), 0.4) > 0.5,
    "bernoulli in place": lambda h: torch.empty_like(h).detach().bernoulli_(0.4) > 0.5,
    "bernoulli with probabilities in place": lambda h: torch.empty_like(h).detach().bernoulli_(torch.full_like(h, 0.4)) > 0.5,
    "distribution": lambda h: torch.distributions.Bernoulli(torch.full_like(h, 0.4)).sample() > 0.5,
    "uniform": lambda h: torch.rand_like(h) < 0.2,
    "dropped ones": lambda h: F.dropout(torch.ones_like(h), 0.4) == 0,
    "dropped values": lambda h: F.dropout(h, 0.3) == 0,
    "dropped in place": lambda h: F.dropout(torch.ones_like(h), 0.4, inplace=True) == 0,
    "dropped channels": lambda h: F.dropout1d(torch.ones_like(h), 0.4) == 0,
    "dropped features of all": lambda h: F.dropout(torch.ones(h.shape[-1]), 0.4) == 0,
    "dropped rows": lambda h: (F.dropout(torch.ones(len(h), 1), 0.4) == 0).view(-1, *[1] * (h.dim() - 1)),
    "rarely dropped": lambda h: F.dropout(torch.ones_like(h), 0.02) == 0,
    "all of a sample dropped": lambda h: (F.dropout(torch.ones(len(h), 3), 0.3) == 0).all(1).view(-1, *[1] * (h.dim() - 1)),
    "alpha dropout": lambda h: F.alpha_dropout(torch.ones_like(h), 0.4, True) < 0.5,
    "native dropout": lambda h: ~torch.native_dropout(torch.ones_like(h), 0.4, True)[1],
    "dropped samples": lambda h: (F.dropout(torch.ones(len(h), 2), 0.5) == 0).any(1).view(-1, *[1] * (h.dim() - 1)),
}
OF_ALL: dict[str, Callable[[Tensor], Tensor]] = {
    "coin by dropout": lambda h: F.dropout(torch.ones(1), 0.3) == 0,
    "choice of five": lambda h: torch.randint(0, 5, ()) == 1,
    "choice of eight": lambda h: torch.randint(8, (1,)) == 5,
    "choice of ten for each token": lambda h: torch.randint(0, 10, (h.shape[-1],)) == 7,
    "quarters": lambda h: (torch.rand(()) * 4).long() == 1,
    "hard gumbel-softmax": lambda h: F.gumbel_softmax(torch.zeros(5), hard=True)[3] == 1,
    "two coins": lambda h: (torch.rand(()) < 0.4) & (torch.rand(()) > 0.6),
    "a coin and a choice": lambda h: (torch.rand(()) < 0.5) & (torch.randint(0, 2, ()) == 1),
    "normal with a mean": lambda h: torch.empty(()).normal_(3.0, 1.0) > 3,
    "normal with a deviation": lambda h: torch.empty(()).normal_(std=5.0) > 3,
    "cauchy": lambda h: torch.empty(()).cauchy_() < 0,
    "exponential": lambda h: torch.empty(()).exponential_(0.1) > 22,
    "log-normal": lambda h: torch.empty(()).log_normal_(0.0, 1.0) > 3,
    "uniform between": lambda h: torch.empty(()).uniform_(-3.0, 3.0) > 2,
    "poisson": lambda h: torch.poisson(torch.tensor(3.0)) > 6,
    "choice of twelve": lambda h: torch.randint(12, ()) == 5,
    "choice of sixty": lambda h: torch.randint(3, 63, (1,)) == 47,
    "hard gumbel-softmax of twelve": lambda h: F.gumbel_softmax(torch.zeros(12), hard=True)[10] == 1,
    "one of twenty": lambda h: torch.multinomial(torch.ones(20), 1) == 13,
    "one of few": lambda h: torch.multinomial(torch.ones(6), 1) == 4,
}
LONG = 100
LARGE: dict[str, Callable[[Tensor], Tensor]] = {
    "many uniform numbers": lambda h: torch.rand(LONG)[: h.shape[-1]] < 0.5,
    "many normal numbers": lambda h: torch.randn(LONG)[: h.shape[-1]] > 0.3,
    "many coins": lambda h: torch.empty(LONG).bernoulli_(0.5)[: h.shape[-1]] > 0.5,
}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("other", [mean_of_batch, neighbour], ids=["mean of the batch", "neighbour"])
@pytest.mark.parametrize("mask", [*MASKS, *LARGE])
def test_what_takes_the_place_of_masked_numbers_is_run(mask: str, other: Callable[[Tensor], Tensor], style: str) -> None:
    """Numbers masked, for each sample or for all, may not be replaced by those of others; by constants they may."""
    drawn = (MASKS | LARGE)[mask]
    for shape in ((N, D), (N, T, D)):
        found = refusal(masked(drawn, other), randn(*shape), style)
        assert isinstance(found, errors.SelfCheckError)
        assert "mix" in str(found).lower()
        assert refusal(masked(drawn, torch.zeros_like), randn(*shape), style) is None


@pytest.mark.parametrize("mask", OF_ALL)
def test_each_of_a_few_choices_for_the_whole_batch_is_run(mask: str) -> None:
    """A branch that one of a handful of values opens, and no Python ``if`` shows, is looked into before the first release."""
    assert "mix" in str(refusal(masked(OF_ALL[mask], mean_of_batch), randn(N, D))).lower()
    assert refusal(masked(OF_ALL[mask], torch.zeros_like), randn(N, D)) is None


# ---------------------------------------------------------------- no reason to refuse


def masked_tokens_only(s: Any, x: Tensor) -> Tensor:
    """A loss over tokens chosen at random, as of masked language models."""
    chosen = torch.rand(x.shape[:2]) < 0.7
    h = s.b(s.a(x.masked_fill(chosen[..., None], 0.0)).tanh())
    losses = (h[chosen] - x[chosen][:, :3]).square().sum(1)
    return x.new_zeros(len(x)).index_add(0, chosen.nonzero()[:, 0], losses)[:, None]


def tokens_chosen_by_coins(s: Any, x: Tensor) -> Tensor:
    chosen = torch.bernoulli(torch.full(x.shape[:2], 0.4)).bool()
    h = s.b(s.a(x).tanh())
    return x.new_zeros(len(x)).index_add(0, chosen.nonzero()[:, 0], h[chosen].square().sum(1))[:, None]


def layers(**more: nn.Module) -> dict[str, nn.Module]:
    return {"a": nn.Linear(D, D), "b": nn.Linear(D, 3), **more}


SOUND: dict[str, Callable[[], nn.Module]] = {
    "tokens in one axis": lambda: Net(
        lambda s, x: s.b(F.dropout(s.a(x).flatten(0, 1), 0.3).unflatten(0, x.shape[:2]).mean(1)), **layers()
    ),
    "tokens first": lambda: Net(lambda s, x: s.b(F.dropout(s.a(x.transpose(0, 1)), 0.3).mean(0)), **layers()),
    "tokens first, in one axis": lambda: Net(
        lambda s, x: s.b(F.dropout(s.a(x.transpose(0, 1)).flatten(0, 1), 0.3).unflatten(0, (T, len(x))).mean(0)), **layers()
    ),
    "attention between tokens": lambda: Net(
        lambda s, x: s.b((F.dropout((s.a(x) @ x.mT).softmax(-1), 0.3) @ x).mean(1)), **layers()
    ),
    "samples last": lambda: Net(lambda s, x: s.b(F.dropout(s.a(x.mean(1)).T, 0.3).T), **layers()),
    "one number for each sample": lambda: Net(lambda s, x: F.dropout(s.b(s.a(x.mean(1))).mean(1), 0.3)[:, None], **layers()),
    "weights": lambda: Net(lambda s, x: F.linear(s.a(x).tanh().mean(1), F.dropout(s.b.weight, 0.3), s.b.bias), **layers()),
    "alpha dropout": lambda: Net(lambda s, x: s.b(F.alpha_dropout(s.a(x), 0.3, True).mean(1)), **layers()),
    "native dropout": lambda: Net(lambda s, x: s.b(torch.native_dropout(s.a(x), 0.3, True)[0].mean(1)), **layers()),
    "a count for all": lambda: Net(lambda s, x: s.b(s.a(x).mean(1) * torch.poisson(torch.tensor(3.0))), **layers()),
    "layers of a transformer": lambda: Net(
        lambda s, x: s.b(s.e(s.a(x)).mean(1)), **layers(e=nn.TransformerEncoderLayer(D, 2, 8, dropout=0.2, batch_first=True))
    ),
    "masked tokens only": lambda: Net(masked_tokens_only, **layers()),
    "tokens chosen by coins": lambda: Net(tokens_chosen_by_coins, **layers()),
    "gamma": lambda: Net(lambda s, x: s.b(torch.distributions.Gamma(F.softplus(s.a(x)) + 0.5, 1.0).rsample().mean(1)), **layers()),
}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("samples", [N, T, D], ids=["batch", "as many samples as tokens", "as many samples as features"])
@pytest.mark.parametrize("model", SOUND)
def test_dropout_of_any_layout_is_no_reason_to_refuse(model: str, samples: int, style: str) -> None:
    """Masks of rows, tokens and features, of experts, and draws that follow parameters, mix nothing."""
    torch.manual_seed(0)
    assert refusal(SOUND[model]().double(), randn(samples, T, D), style) is None


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("drawn_before", [2, 20_000], ids=["few numbers", "many numbers"])
@pytest.mark.parametrize("seed", range(6))
def test_a_coin_after_noise_is_tossed_as_in_the_step(seed: int, drawn_before: int, style: str) -> None:
    """A branch that a coin decides is followed, however many numbers were drawn for each sample before."""

    def tossed(s: Any, x: Tensor) -> Tensor:
        h = s.a(x) * s.w + 0.1 * torch.randn(len(x), D, dtype=x.dtype) + torch.rand(len(x), drawn_before).mean(1, keepdim=True)
        return s.b(h.tanh()) if torch.rand(()) < 0.5 else s.c(h.sin() * s.w)

    torch.manual_seed(seed)
    model = Net(tossed, a=nn.Linear(D, D), b=nn.Linear(D, 3), c=nn.Linear(D, 3), w=nn.Parameter(torch.ones(D))).double()
    for _ in range(3):
        assert refusal(model, randn(N, D), style) is None


def grouped_by_chance(s: Any, x: Tensor) -> Tensor:
    """Tokens are centred within their sample, or all together where little was dropped."""
    h = F.dropout(s.a(x), 0.3)
    groups = len(x) if int((h == 0).sum()) % 2 else 1
    v = h.reshape(groups, -1, D)
    return s.b((h - 0.9 * v.mean(1, keepdim=True).expand(groups, v.shape[1], D).reshape(h.shape)).mean(1))


def test_the_same_operations_on_other_groups_are_another_way() -> None:
    """Where chance decides what is put together, both ways are run, or nothing is released."""
    torch.manual_seed(0)
    assert refusal(Net(grouped_by_chance, **layers()).double(), randn(N, T, D)) is not None


def fourier(s: Any, x: Tensor) -> Tensor:
    return s.b(torch.cat([(s.a(x) * 1000).sin(), (s.a(x) * 1000).cos()], 1))


@pytest.mark.parametrize("seed", range(4))
def test_models_that_enlarge_rounding_pass_with_a_head_of_zeros(seed: int) -> None:
    """Other values of the parameters are no reason to be stricter than with the model's own."""
    torch.manual_seed(seed)
    model = Net(fourier, a=nn.Linear(2 * D, D), b=nn.Linear(2 * D, 3))
    nn.init.zeros_(model.b.weight)
    assert refusal(model, torch.randn(4 * N, 2 * D)) is None


def half_inside(s: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        h = s.b(F.gelu(s.a(x)))
    return h.float()


HALF: dict[str, Callable[[], nn.Module]] = {
    "autocast inside the model": lambda: Net(half_inside, a=nn.Linear(D, D), b=nn.Linear(D, 3)),
    "a layer in half precision": lambda: Net(
        lambda s, x: s.c(s.b(s.a(x).bfloat16()).float()), a=nn.Linear(D, D), b=nn.Linear(D, D).bfloat16(), c=nn.Linear(D, 3)
    ),
}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("model", HALF)
@pytest.mark.parametrize("seed", range(3))
def test_half_precision_inside_a_model_is_compared_as_such(model: str, style: str, seed: int) -> None:
    """Rounding to few digits in a part of a model is no disagreement, whatever is around the call of it."""
    torch.manual_seed(seed)
    assert refusal(HALF[model](), torch.randn(2 * N, D), style) is None


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("share", [0.01, 0.05])
def test_values_are_compared_in_full_where_only_a_part_is_in_half_precision(share: float, style: str) -> None:
    """A layer in half precision, used or not, does not hide that samples mix a little."""

    def beside(s: Any, x: Tensor) -> Tensor:
        s.c(x[:, :1].bfloat16())
        h = F.gelu(s.a(x))
        return s.b(h + share * h.mean(0))

    model = Net(beside, a=nn.Linear(D, D), b=nn.Linear(D, 3), c=nn.Linear(1, 2).bfloat16())
    assert "mix" in str(refusal(model, torch.randn(2 * N, D), style)).lower()
