"""Real architectures from transformers, timm, torchvision and peft: right per sample, or refused untouched."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from dp_hooks import errors

from .. import laws
from ..cases.zoo import ADAPTERS, ARCHITECTURES, COUPLED, SAMPLES, build, two_adapters
from ..models import loader_of, moved, put, scope_over, values
from ..reference import by_name, clipped_sum, rows_by_backward, sample_grads
from ..snapshot import Snapshot

pytestmark = pytest.mark.filterwarnings(
    "ignore:the loss did not reach", "ignore:a step was taken on a batch that did not come from the private loader"
)

WITH_DROPOUT = (
    "bert-mlm bert-checkpointed distilbert deberta-v2 xlnet longformer gpt2 gpt2-checkpointed opt bloom llama "
    "recurrent-gemma t5 bart bert-to-bert vit beit swin swinv2 wav2vec2 whisper blip-captions timm-vit-relpos "
    "timm-cait timm-convnext torchvision-swin-v2 lora-bert-classifier lora-gpt2 dora-llama prompt-llama"
).split()


# In two passes: with weights used by other modules than their own, checkpoints, tables and tokens.
IN_TWO_PASSES = ("mobilebert", "bert-mlm", "gpt2-checkpointed", "llama", "t5", "vit", "swin", "mamba")


def norms_of(grads):
    return torch.stack([g.reshape(len(g), -1).square().sum(1) for g in grads.values()]).sum(0).sqrt()


def distance(found, expected):
    """Return how far the gradients are apart, all parameters together, in parts of the larger norm of a sample."""
    apart = norms_of({name: found[name] - expected[name] for name in expected})
    return float(apart.max() / norms_of(expected).max())


def single(grads):
    """Return gradients summed over a batch in the form of those of one sample."""
    return {name: g[None] for name, g in grads.items()}


@dataclass
class Known:
    """An architecture in a test, with losses for it and a batch whose last part numbers the samples."""

    model: Any
    losses: Any
    batch: tuple[torch.Tensor, ...]

    @classmethod
    def of(cls, builder, dropout=0.0):
        """Build it; the losses are half the mean squared distance of each sample's output from a target."""
        specimen = build(builder, dropout)
        with torch.no_grad():
            output = specimen.read(specimen.model(**specimen.inputs))
        targets = torch.randn(output.shape).to(specimen.dtype)

        def losses(model, *batch):
            *inputs, rows = batch
            output = specimen.read(model(**dict(zip(specimen.inputs, inputs, strict=True))))
            return (output.to(specimen.dtype) - targets[rows]).square().flatten(1).mean(1) / 2

        return cls(specimen.model, losses, (*specimen.inputs.values(), torch.arange(SAMPLES)))

    def scope(self, bound, **options):
        """Return a scope whose step moves the parameters by a third of the clipped sum over three samples."""
        optimizer = torch.optim.SGD([p for p in self.model.parameters() if p.requires_grad], lr=1.0)
        options = {"loader": loader_of([torch.zeros(SAMPLES, 1)]), "accountant": "rdp", **options}
        return scope_over(self.model, optimizer=optimizer, max_grad_norm=bound, **options)

    def step(self, bound, mode=laws.MODE["ghost"]):
        """Take a step in a scope of its own, and take it back; return the clipped sum that the parameters went down by."""
        before = values(self.model)
        with mode.on() as name, self.scope(bound, grad_sample_mode=name) as (opt, _):
            laws.step_in(mode, self.losses)(self.model, opt, self.batch)
        moves = zip(self.model.named_parameters(), moved(before, self.model), strict=True)
        found = {name: move * SAMPLES for (name, p), move in moves if p.requires_grad}
        put(self.model, before)
        return found


@pytest.fixture(scope="module", params=ARCHITECTURES)
def known(request):
    """Build each architecture once, with the gradients of single samples; its tests leave the parameters alone.

    Models that compute in float32 in between show it when the batch's gradient is compared with the samples'.
    """
    known = Known.of(ARCHITECTURES[request.param])
    known.expected = sample_grads(known.model, known.losses, *known.batch)
    whole = by_name(known.model, rows_by_backward(known.model, [known.losses(known.model, *known.batch).sum()]))
    rounding = distance(whole, {name: g.sum(0)[None] for name, g in known.expected.items()})
    assert rounding < 1e-3, "the reference contradicts itself"
    known.tolerance = 1e-6 if rounding < 1e-9 else 1e-4
    return known


def test_grad_sample_is_the_gradient_of_each_sample_alone(known):
    """In mode "hooks" every trainable parameter carries one gradient per sample after the backward pass."""
    with known.scope(1.0, grad_sample_mode="hooks"):
        known.losses(known.model, *known.batch).mean().backward()
        found = {name: p.grad_sample for name, p in known.model.named_parameters() if p.requires_grad}
    assert distance(found, known.expected) < known.tolerance


def test_a_step_moves_a_model_by_the_sum_of_its_clipped_single_sample_gradients(known):
    """The default mode clips what plain autograd gives for each sample alone, and leaves nothing on the model."""
    seen = Snapshot(known.model)
    known.losses(known.model, *known.batch)
    left_by_the_model = seen.differences()
    bound = float(norms_of(known.expected).median())
    assert distance(single(known.step(bound)), single(clipped_sum(known.expected, bound))) < known.tolerance
    assert seen.differences() == left_by_the_model


@pytest.mark.parametrize("name", IN_TWO_PASSES)
def test_two_passes_move_a_model_by_the_same(name):
    """What two passes clip is what plain autograd gives for each sample alone, too."""
    known = Known.of(ARCHITECTURES[name])
    expected = sample_grads(known.model, known.losses, *known.batch)
    bound = float(norms_of(expected).median())
    assert distance(single(known.step(bound, laws.MODE["two-pass"])), single(clipped_sum(expected, bound))) < 1e-6


@pytest.mark.parametrize("name", WITH_DROPOUT)
def test_dropout_draws_what_it_would_draw_without_the_scope(name):
    """With dropout on, a scope sees the very masks of the bare model, and each sample's gradient is under its own."""
    known = Known.of(ARCHITECTURES[name], dropout=0.3)
    torch.manual_seed(5)
    alone = known.losses(known.model, *known.batch)
    assert not torch.equal(alone, known.losses(known.model, *known.batch)), "dropout is off"
    expected = by_name(known.model, rows_by_backward(known.model, alone, retain_graph=True))
    bound = float(norms_of(expected).median())
    torch.manual_seed(5)
    assert distance(single(known.step(bound)), single(clipped_sum(expected, bound))) < 1e-6


@pytest.mark.parametrize("mode", [laws.MODE["ghost"], laws.MODE["hooks"]], ids=str)
@pytest.mark.parametrize("name", COUPLED)
def test_a_model_that_couples_samples_is_refused_before_any_parameter_moves(name, mode):
    """Statistics of a batch, outputs that compare samples, and state written in the forward pass, are found in time."""
    known = Known.of(COUPLED[name])
    before, seen = values(known.model), Snapshot(known.model)
    with pytest.raises(errors.UnsupportedModelError):
        known.step(1.0, mode)
    assert all(torch.equal(a, b) for a, b in zip(before, values(known.model), strict=True))
    assert seen.differences() == []


def test_adapters_switched_inside_the_scope_are_trained_one_at_a_time():
    """Each step moves the adapter that is active by its own clipped gradients, and leaves the other where it is."""
    known = Known.of(two_adapters)
    model, expected = known.model, {}
    for adapter in ADAPTERS:
        model.set_adapter(adapter)
        expected[adapter] = sample_grads(model, known.losses, *known.batch)
    for name, param in model.named_parameters():
        param.requires_grad_("lora_" in name)
    with known.scope(0.01) as (opt, _):
        for adapter in ADAPTERS:
            model.set_adapter(adapter)
            before = {name: p.detach().clone() for name, p in model.named_parameters()}
            known.losses(model, *known.batch).mean().backward()
            opt.step()
            opt.zero_grad()
            moves = {name: (before[name] - p.detach()) * SAMPLES for name, p in model.named_parameters()}
            total = clipped_sum(expected[adapter], 0.01)
            assert distance(single(moves), single(total)) < 1e-6
            assert all(name in total for name, move in moves.items() if move.any())
