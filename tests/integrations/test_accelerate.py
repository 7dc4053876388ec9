"""What accelerate has prepared, in a private scope: accumulation, schedulers, scalers, saved states, and nothing left behind."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler
from transformers import BatchEncoding

from dp_hooks import private_training
from dp_hooks.errors import InvalidArgumentError, ScopeError

from ..models import assert_same, has_hooks, moved, values
from .language import ACCUMULATED, EACH, EPOCHS, OPTIONS, Sentences, language_model, losses, quietly, sampled, sgd

ALL = {**OPTIONS, "sample_rate": 1.0}  # the same examples in every batch, whoever draws


@pytest.fixture(autouse=True)
def _no_accelerator_of_other_tests():
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def accelerator_for(accumulated=1, scaler=None):
    """Return an accelerator; with a ``scaler`` as on a GPU under fp16, which a CPU has no autocast of accelerate's for."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulated)
    if scaler is not None:
        accelerator.scaler, accelerator.native_amp, accelerator.state._mixed_precision = scaler, True, "fp16"
    return accelerator


def prepared(accelerator, each=EACH):
    model = language_model(lora=False)
    optimizer = sgd(model)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    return accelerator.prepare(model, optimizer, sampled(Sentences(), each), schedule)


def train(accelerator, model, opt, loader, schedule, epochs=EPOCHS):
    """Train as accelerate's documentation has it."""
    for _ in range(epochs):
        for batch in loader:
            with accelerator.accumulate(model):
                if len(batch["labels"]):
                    accelerator.backward(losses(model, batch).mean())
                opt.step()
                schedule.step()
                opt.zero_grad()


def by_hand(each):
    """What a bare loop without accelerate does, with logical batches of ``each`` as the divisor."""
    model = language_model(lora=False)
    start, optimizer = values(model), sgd(model)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    with private_training(model, optimizer, sampled(Sentences(), each), **ALL) as (opt, loader):
        for _ in range(EPOCHS):
            for batch in loader:
                opt.zero_grad()
                losses(model, batch).mean().backward()
                opt.step()
                schedule.step()
    return moved(start, model)


@pytest.mark.parametrize("scale", [None, 2.0**12])
@pytest.mark.parametrize("accumulated", [1, ACCUMULATED, 5])
def test_accumulated_batches_are_parts_of_one(accumulated, scale):
    """Steps, schedule and weights are those of a loop over logical batches; accelerate's own settings are back afterwards."""
    scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
    accelerator = accelerator_for(accumulated, scaler)
    model, optimizer, loader, schedule = prepared(accelerator)
    start, before = values(model), dict(vars(GradientState()))
    scope = private_training(model, optimizer, loader, **ALL)
    with quietly(), scope as (opt, private_loader):
        train(accelerator, model, opt, private_loader, schedule)
    assert scope.steps == EPOCHS
    assert schedule.get_last_lr() == [0.5 * 0.5**EPOCHS]
    assert_same(moved(start, model), by_hand(EACH), 1e-5 if scale is None else 2e-2)
    assert vars(GradientState()) == before
    assert scaler is None or (scaler.get_scale() == scale and "step" not in vars(scaler))
    assert not has_hooks(model)
    accelerator.backward(losses(model, next(iter(loader))).mean())  # an ordinary loop goes on
    optimizer.step()


def test_the_rate_is_that_of_the_logical_batch():
    """Each example is in a batch with the probability of the accumulated batches together, and that is what is charged."""
    accelerator = accelerator_for(ACCUMULATED)
    model, optimizer, loader, schedule = prepared(accelerator)
    scope = private_training(model, optimizer, loader, **{**OPTIONS, "noise_multiplier": 1.0})
    sizes = []
    with quietly(), scope as (opt, private_loader):
        train(accelerator, model, opt, (note(batch, opt, sizes) for batch in private_loader), schedule, epochs=1)
    rate = EACH * ACCUMULATED / len(Sentences())
    assert scope.accountant.history == [(1.0, rate, scope.steps)]
    assert scope.report(1e-5).expected_batch_size == EACH * ACCUMULATED
    assert max(sizes) <= EACH


def note(batch, opt, sizes):
    sizes.append(opt.physical_batch.size)
    return batch


def test_accumulation_of_an_optimizer_prepared_in_the_scope_is_refused():
    """An example could be in several of the accumulated batches; the error says what to do, and nothing is released."""
    accelerator, model = accelerator_for(ACCUMULATED), language_model(lora=False)
    start = values(model)
    scope = private_training(model, sgd(model), sampled(Sentences(), EACH), **OPTIONS)
    with quietly(), scope as (opt, private_loader):
        prepared_model, opt, private_loader = accelerator.prepare(model, opt, private_loader)
        schedule = torch.optim.lr_scheduler.StepLR(opt, 1)
        with pytest.raises(ScopeError, match="before the scope is entered"):
            train(accelerator, prepared_model, opt, private_loader, schedule)
    assert_same(values(model), start)


def test_what_was_prepared_cannot_be_stepped_in_the_scope():
    """The user's optimizer is the original one, under whatever wrapper."""
    model, optimizer, loader, _ = prepared(accelerator_for())
    with private_training(model, optimizer, loader, **OPTIONS), pytest.raises(ScopeError, match="was stepped inside"):
        optimizer.step()


@pytest.mark.parametrize("name", ["clip_grad_norm_", "clip_grad_value_"])
def test_clipping_by_accelerate_is_refused_in_a_scope(name):
    """For all or one of a scope's parameters, whichever scope was opened or left first; of other models nothing changes."""
    accelerator, (model, second, other) = accelerator_for(), (language_model(lora=False) for _ in range(3))
    original, clip = vars(Accelerator)[name], getattr(accelerator, name)
    losses(other, next(iter(sampled(Sentences(), EACH)))).mean().backward()
    scopes = [private_training(m, sgd(m), sampled(Sentences(), EACH), **OPTIONS) for m in (model, second)]
    for scope in scopes:
        scope.__enter__()
    for left, gone in ((scopes[0], model), (scopes[1], second)):
        for refused in (gone.parameters(), [*other.parameters(), next(gone.parameters())], next(second.parameters())):
            with pytest.raises(ScopeError, match=rf"accelerator\.{name}\(\) .* max_grad_norm"):
                getattr(accelerator, name)(refused, 1e-9)
        left.__exit__(None, None, None)
        getattr(accelerator, name)([*gone.parameters(), *other.parameters()], 1e9)  # clips nothing
    assert vars(Accelerator)[name] is original
    assert float(other.get_input_embeddings().weight.grad.abs().max()) > 1e-6
    with private_training(model, sgd(model), sampled(Sentences(), EACH), **OPTIONS):
        clip(other.parameters(), 1e-9)
    assert float(other.get_input_embeddings().weight.grad.abs().max()) <= 1e-9


def test_a_loop_that_clips_by_accelerate_releases_nothing():
    """As accelerate's documentation has it, with a line that is to be left out: the error comes before the first step."""
    accelerator = accelerator_for()
    model, optimizer, loader, _ = prepared(accelerator)
    start, scope = values(model), private_training(model, optimizer, loader, **{**OPTIONS, "noise_multiplier": 1.0})
    with quietly(), scope as (_, private_loader):
        for batch in private_loader:
            if len(batch["labels"]):
                accelerator.backward(losses(model, batch).mean())
                with pytest.raises(ScopeError, match="Leave it out"):
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                break
    assert scope.steps == 0
    assert_same(values(model), start)


def test_a_saved_state_goes_on_with_what_was_spent(tmp_path):
    """The scope is registered as any other thing with a state; inside of a running scope it cannot be loaded."""
    accelerator = accelerator_for()
    model, optimizer, loader, schedule = prepared(accelerator)
    scope = private_training(model, optimizer, loader, **{**ALL, "noise_multiplier": 1.0})
    accelerator.register_for_checkpointing(scope)
    with quietly(), scope as (opt, private_loader):
        train(accelerator, model, opt, private_loader, schedule)
        accelerator.save_state(tmp_path)
        with pytest.raises(ScopeError, match="load into a scope before"):
            accelerator.load_state(tmp_path)

    accelerator = accelerator_for()
    model, optimizer, loader, schedule = prepared(accelerator)
    scope = private_training(model, optimizer, loader, **{**ALL, "noise_multiplier": 1.0})
    accelerator.register_for_checkpointing(scope)
    with quietly():
        accelerator.load_state(tmp_path)
    with quietly(), scope as (opt, private_loader):
        train(accelerator, model, opt, private_loader, schedule)
    assert scope.steps == 2 * EPOCHS
    assert scope.accountant.history == [(1.0, 1.0, 2 * EPOCHS)]


def test_batches_are_put_where_accelerate_puts_them():
    """Every part of a batch passes the function that moves it, before anything else sees it."""
    accelerator, model = accelerator_for(), language_model(lora=False)

    def collated(rows):
        return BatchEncoding({name: torch.stack([row[name] for row in rows]) for name in rows[0]})

    optimizer, loader = accelerator.prepare(sgd(model), sampled(Sentences(), EACH, collated))
    moved_to = []
    loader.device = torch.device("cpu")
    with private_training(model, optimizer, loader, **OPTIONS) as (_, private_loader):
        place = private_loader._place
        private_loader._place = lambda batch: moved_to.append(type(batch)) or place(batch)
        batch = next(iter(private_loader))
    assert moved_to == [BatchEncoding]
    assert batch["labels"].device == loader.device


def test_a_prepared_loader_whose_rate_is_not_known_is_refused():
    """A batch sampler of the user's stays one when accelerate has prepared the loader."""

    class Own(BatchSampler):
        pass

    accelerator, model = accelerator_for(), language_model(lora=False)
    own = DataLoader(Sentences(), batch_sampler=Own(SequentialSampler(range(10)), 2, False))
    optimizer, loader = accelerator.prepare(sgd(model), own)
    with pytest.raises(InvalidArgumentError, match="loader"):
        private_training(model, optimizer, loader, **OPTIONS)
