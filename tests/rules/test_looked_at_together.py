"""Norms from Gram matrices that are looked at together, once, and corrected where rounding matters."""

import pytest
import torch

from dp_hooks.rules import OuterProducts, ghost_norms

SAMPLES, TOKENS, SHAPE = 6, 4, torch.Size([40, 50])


def use(cancels=(), scale=1.0):
    """Factors in float32; of the samples in ``cancels`` the tokens nearly cancel, so that a Gram sum has no digits left."""
    left, right = torch.randn(SAMPLES, TOKENS, SHAPE[0]), torch.randn(SAMPLES, TOKENS, SHAPE[1])
    for i in cancels:
        left[i, 1::2], right[i, 1::2] = -left[i, ::2], right[i, ::2] * (1 + 1e-2 * torch.randn(TOKENS // 2, SHAPE[1]))
    return OuterProducts(left, right, SHAPE, scale)


def truth(one):
    grads = torch.einsum("nto,nti->noi", one.left.double(), one.right.double()) * one.scale
    return grads.square().sum((1, 2))


@pytest.fixture
def many():
    torch.manual_seed(0)
    return [use(), use((1, 4)), use((0,), 3.0), use(), use(range(SAMPLES), 0.5)]


@pytest.fixture
def asked(monkeypatch):
    """How many norms were looked at, each time."""
    found, sound = [], ghost_norms._unsure
    monkeypatch.setattr(ghost_norms, "_unsure", lambda total, slack: found.append(len(total)) or sound(total, slack))
    return found


def test_they_are_what_they_are_one_by_one(many, asked):
    """Samples that rounding matters for are corrected, of their own layer and in their own place; all are upper bounds."""
    apart = [ghost_norms.sq_norms([one]) for one in many]
    asked.clear()
    with ghost_norms.looked_at_together():
        norms = [ghost_norms.sq_norms([one]) for one in many]
        assert not asked
        rough = [n.clone() for n in norms]
    assert asked[0] == len(many) * SAMPLES
    for one, found, expected, before in zip(many, norms, apart, rough, strict=True):
        assert torch.equal(found, expected)
        assert (found >= truth(one) * (1 - 1e-5)).all()
        assert (found <= truth(one) * (1 + 1.5e-3)).all()
        assert torch.equal(before, found) == (one in (many[0], many[3])), "these tokens cancel too little to show anything"


def test_one_look_is_enough_where_all_are_sure(asked):
    """Without cancelling tokens a block looks once, an inner block being part of the one around it."""
    torch.manual_seed(0)
    with ghost_norms.looked_at_together():
        for _ in range(3):
            with ghost_norms.looked_at_together():
                ghost_norms.sq_norms([use()])
    assert asked == [3 * SAMPLES]


@pytest.mark.parametrize("kept", [False, True])
def test_copies_are_not_kept_alive_for_long(kept, asked, monkeypatch):
    """Factors that are in memory for the norms alone are let go of as soon as they are many; others may wait."""
    torch.manual_seed(0)
    monkeypatch.setattr(ghost_norms, "CHUNK", 2 * SAMPLES * TOKENS * sum(SHAPE))
    with ghost_norms.looked_at_together():
        for _ in range(7):
            one = use()
            one.is_kept = kept
            ghost_norms.sq_norms([one])
        assert len(asked) == (0 if kept else 2)
    assert sum(asked) == 7 * SAMPLES


def test_a_block_that_is_broken_off_leaves_nothing(asked):
    """After an error inside, norms are looked at one by one again."""
    torch.manual_seed(0)
    with pytest.raises(KeyError), ghost_norms.looked_at_together():  # noqa: PT012
        ghost_norms.sq_norms([use()])
        raise KeyError
    assert not asked
    ghost_norms.sq_norms([use()])
    assert asked == [SAMPLES]
