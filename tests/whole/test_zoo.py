"""Real architectures from transformers, timm, torchvision, peft and torch: right per sample, or refused untouched."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dp_hooks import errors, private_training

from ..cases.zoo import ADAPTERS, ARCHITECTURES, COUPLED, SAMPLES, build, two_adapters
from ..reference import clipped_sum, sample_grads
from ..snapshot import Snapshot

pytestmark = pytest.mark.filterwarnings(
    "ignore:the loss did not reach", "ignore:a step was taken on a batch that did not come from the private loader"
)

WITH_DROPOUT = (
    "bert-mlm bert-checkpointed distilbert deberta-v2 xlnet longformer gpt2 gpt2-checkpointed opt bloom llama "
    "recurrent-gemma t5 bart bert-to-bert vit beit swin swinv2 wav2vec2 whisper blip-captions timm-vit-relpos "
    "timm-cait timm-convnext torchvision-swin-v2 lora-bert-classifier lora-gpt2 dora-llama prompt-llama "
    "torch-transformer class-token"
).split()


def losses_of(specimen, targets):
    """Return ``f(model, *batch) -> [n]``: half the mean squared distance of each sample's output from its target."""

    def losses(model, *batch):
        *inputs, rows = batch
        output = specimen.read(model(**dict(zip(specimen.inputs, inputs, strict=True))))
        return (output.to(specimen.dtype) - targets[rows]).square().flatten(1).mean(1) / 2

    return losses


def prepared(builder, dropout=0.0):
    """Build a model; return it with its losses and its batch, whose last part numbers the samples."""
    specimen = build(builder, dropout)
    with torch.no_grad():
        output = specimen.read(specimen.model(**specimen.inputs))
    losses = losses_of(specimen, torch.randn(output.shape).to(specimen.dtype))
    return specimen.model, losses, (*specimen.inputs.values(), torch.arange(SAMPLES))


def norms_of(grads):
    return torch.stack([g.reshape(len(g), -1).square().sum(1) for g in grads.values()]).sum(0).sqrt()


def distance(found, expected):
    """Return how far the gradients are apart, all parameters together, in parts of the larger norm of a sample."""
    apart = norms_of({name: found[name] - expected[name] for name in expected})
    return float(apart.max() / norms_of(expected).max())


def tolerance(model, losses, batch, expected):
    """Models that compute in float32 in between show it when the batch's gradient is compared with the samples'."""
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(losses(model, *batch).sum(), list(params.values()), allow_unused=True)
    total = {name: p.new_zeros(p.shape) if g is None else g for (name, p), g in zip(params.items(), found, strict=True)}
    rounding = distance(
        {name: g[None] for name, g in total.items()}, {name: g.sum(0)[None] for name, g in expected.items()}
    )
    assert rounding < 1e-3, "the reference contradicts itself"
    return 1e-6 if rounding < 1e-9 else 1e-4


def values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def scope_over(model, bound, **options):
    """Return a scope without noise whose step moves the parameters by a third of the clipped sum over three samples."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    loader = DataLoader(TensorDataset(torch.zeros(SAMPLES, 1)), batch_size=SAMPLES)
    return private_training(
        model,
        optimizer,
        loader,
        noise_multiplier=0.0,
        max_grad_norm=bound,
        poisson_sampling=False,
        accountant="rdp",
        **options,
    )


def private_step(model, losses, batch, bound, **options):
    """Take a step in a scope of its own, and take it back; return the clipped sum that the parameters went down by."""
    before = values(model)
    with scope_over(model, bound, **options) as (opt, _):
        losses(model, *batch).mean().backward()
        opt.step()
    moved = {name: (before[name] - value) * SAMPLES for name, value in values(model).items()}
    with torch.no_grad():
        for name, param in model.named_parameters():
            if name in before:
                param.copy_(before[name])
    return moved


def single(grads):
    """Return gradients summed over a batch in the form of those of one sample."""
    return {name: g[None] for name, g in grads.items()}


@dataclass
class Known:
    """An architecture in a test, and what plain autograd says of it."""

    model: nn.Module
    losses: Callable[..., torch.Tensor]
    batch: tuple[torch.Tensor, ...]
    expected: dict[str, torch.Tensor]
    tolerance: float


@pytest.fixture(scope="module", params=ARCHITECTURES)
def known(request):
    """Build each architecture once, with the gradients of single samples; its tests leave the parameters alone."""
    model, losses, batch = prepared(ARCHITECTURES[request.param])
    expected = sample_grads(model, losses, *batch)
    return Known(model, losses, batch, expected, tolerance(model, losses, batch, expected))


def test_grad_sample_is_the_gradient_of_each_sample_alone(known):
    """In mode "hooks" every trainable parameter carries one gradient per sample after the backward pass."""
    with scope_over(known.model, 1.0, grad_sample_mode="hooks"):
        known.losses(known.model, *known.batch).mean().backward()
        found = {name: p.grad_sample for name, p in known.model.named_parameters() if p.requires_grad}
    assert distance(found, known.expected) < known.tolerance


def test_a_step_moves_a_model_by_the_sum_of_its_clipped_single_sample_gradients(known):
    """The default mode clips what plain autograd gives for each sample alone, and leaves nothing on the model."""
    seen = Snapshot(known.model)
    known.losses(known.model, *known.batch)
    left_by_the_model = seen.differences()
    bound = float(norms_of(known.expected).median())
    moved = private_step(known.model, known.losses, known.batch, bound)
    assert distance(single(moved), single(clipped_sum(known.expected, bound))) < known.tolerance
    assert seen.differences() == left_by_the_model


@pytest.mark.parametrize("name", WITH_DROPOUT)
def test_dropout_draws_what_it_would_draw_without_the_scope(name):
    """With dropout on, a scope sees the very masks of the bare model, and each sample's gradient is under its own."""
    model, losses, batch = prepared(ARCHITECTURES[name], dropout=0.3)
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    torch.manual_seed(5)
    alone = losses(model, *batch)
    assert not torch.equal(alone, losses(model, *batch)), "dropout is off"
    rows = [torch.autograd.grad(loss, list(params.values()), retain_graph=True, allow_unused=True) for loss in alone]
    expected = {
        name: torch.stack([torch.zeros_like(p) if row[k] is None else row[k] for row in rows])
        for k, (name, p) in enumerate(params.items())
    }
    bound = float(norms_of(expected).median())
    torch.manual_seed(5)
    moved = private_step(model, losses, batch, bound)
    assert distance(single(moved), single(clipped_sum(expected, bound))) < 1e-6


@pytest.mark.parametrize("mode", ["ghost", "hooks"])
@pytest.mark.parametrize("name", COUPLED)
def test_a_model_that_couples_samples_is_refused_before_any_parameter_moves(name, mode):
    """Statistics of a batch, outputs that compare samples, and state written in the forward pass, are found in time."""
    model, losses, batch = prepared(COUPLED[name])
    before, seen = values(model), Snapshot(model)
    with pytest.raises(errors.UnsupportedModelError):
        private_step(model, losses, batch, 1.0, grad_sample_mode=mode)
    assert all(torch.equal(value, before[key]) for key, value in values(model).items())
    assert seen.differences() == []


def test_adapters_switched_inside_the_scope_are_trained_one_at_a_time():
    """Each step moves the adapter that is active by its own clipped gradients, and leaves the other where it is."""
    model, losses, batch = prepared(two_adapters)
    expected = {}
    for adapter in ADAPTERS:
        model.set_adapter(adapter)
        expected[adapter] = sample_grads(model, losses, *batch)
    for name, param in model.named_parameters():
        param.requires_grad_("lora_" in name)
    with scope_over(model, 0.01) as (opt, _):
        for adapter in ADAPTERS:
            model.set_adapter(adapter)
            before = {name: p.detach().clone() for name, p in model.named_parameters()}
            losses(model, *batch).mean().backward()
            opt.step()
            opt.zero_grad()
            moved = {name: (before[name] - p.detach()) * SAMPLES for name, p in model.named_parameters()}
            total = clipped_sum(expected[adapter], 0.01)
            assert distance(single(moved), single(total)) < 1e-6
            assert all(name in total for name, move in moved.items() if move.any())
