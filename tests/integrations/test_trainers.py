"""Trainers of other libraries in a private scope: the same steps as a bare loop takes, and nothing left behind."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch.utils.data import ChainDataset, default_collate
from transformers import TrainerCallback

from dp_hooks.errors import InvalidArgumentError, ScopeError, SelfCheckError
from dp_hooks.integrations import private_trainer
from dp_hooks.training.wrapped_optimizer import WrappedOptimizer

from ..models import has_hooks
from .language import (
    DELTA,
    EXAMPLES,
    TRAINERS,
    Sentences,
    arguments,
    language_model,
    losses,
    quietly,
    reference,
    sgd,
    trained,
    trained_by,
    transformers_trainer,
)


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("trainer", list(TRAINERS))
def test_every_trainer_takes_the_steps_of_a_bare_loop(trainer, lora, bf16, tmp_path):
    """Without noise and with the same sampling the weights come out the same, and so does the charge."""
    moves, scope = trained(trainer, tmp_path, lora=lora, bf16=bf16)
    wanted, other = reference(lora=lora, bf16=bf16)
    off = torch.cat([(a - b).flatten() for a, b in zip(moves, wanted, strict=True)]).norm()
    size = torch.cat([b.flatten() for b in wanted]).norm()
    assert float(size) > 0.1
    assert float(off / size) < (0.1 if bf16 else 1e-5)  # the mechanism is the same; in bf16 every trainer rounds elsewhere
    assert scope.accountant.history == other.accountant.history
    assert scope.steps == other.steps > 3
    report = scope.report(DELTA)
    assert report.expected_batch_size == other.report(DELTA).expected_batch_size
    assert report.model_verified
    assert report.loss_verified or trainer in ("Accelerate", "bare loop")


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_trainer_with_a_grad_scaler_takes_the_same_steps(lora, tmp_path):
    """Under float16 losses are scaled, and C means what it says; accelerate has this on GPUs only, so it is put there by hand."""
    model = language_model(lora=lora)
    trained_ones = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained_ones]
    with quietly():
        trainer = transformers_trainer(model, tmp_path)
        trainer.accelerator.scaler = scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
        trainer.accelerator.native_amp, trainer.accelerator.state._mixed_precision = True, "fp16"
        scope = trained_by(trainer)
    wanted, other = reference(lora=lora, bf16=False)
    moves = [b - p.detach() for p, b in zip(trained_ones, before, strict=True)]
    off = torch.cat([(a - b).flatten() for a, b in zip(moves, wanted, strict=True)]).norm()
    assert 1e-6 < float(off / torch.cat([b.flatten() for b in wanted]).norm()) < 3e-2  # rounding of float16; the scale is 4096
    assert scope.accountant.history == other.accountant.history
    assert scope.report(DELTA).loss_verified
    assert scaler.get_scale() == 2.0**12
    assert "scale" not in vars(scaler)


def test_the_own_clipping_of_a_trainer_changes_nothing(tmp_path):
    """``max_grad_norm`` of its arguments is 1.0 by default, and whatever it is: weights are those of a bare loop."""
    model = language_model(lora=False)
    before = [p.detach().clone() for p in model.parameters()]
    with quietly():
        scope = trained_by(transformers_trainer(model, tmp_path, max_grad_norm=1e-9))
    wanted, other = reference(lora=False, bf16=False)
    moves = [b - p.detach() for p, b in zip(model.parameters(), before, strict=True)]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(moves, wanted, strict=True))
    assert scope.accountant.history == other.accountant.history


def state_of(thing):
    """What is on an object itself."""
    return dict(vars(thing))


@pytest.mark.parametrize("ending", ["ordinary", "exception in the loop", "interrupt in the loop", "refused on entering"])
def test_nothing_is_left_on_a_trainer(ending, tmp_path):
    """Whatever ends the scope: methods, arguments and accelerator of the trainer are its own again, and it trains on."""
    model = language_model(lora=False)
    with quietly():
        trainer = transformers_trainer(model, tmp_path)
        before = {name: state_of(t) for name, t in (("args", trainer.args), ("accelerator", trainer.accelerator))}
        own = state_of(trainer)
        optimizer, steps = trainer.optimizer, []

        class Ending(TrainerCallback):
            def on_step_end(self, *args, **kwargs):
                steps.append(1)
                if ending == "interrupt in the loop":
                    raise KeyboardInterrupt
                if ending.startswith("exception"):
                    raise RuntimeError("out of luck")

        trainer.add_callback(Ending())
        expected = {"ordinary": nullcontext(), "interrupt in the loop": pytest.raises(KeyboardInterrupt)}
        with expected.get(ending, pytest.raises((RuntimeError, InvalidArgumentError))):
            trained_by(trainer, **({"max_grad_norm": -1.0} if ending.startswith("refused") else {}))
        for name in ("training_step", "floating_point_ops", "log", "_save_checkpoint"):
            assert name not in vars(trainer)
        assert trainer.optimizer is optimizer
        assert trainer.get_train_dataloader is own["get_train_dataloader"]
        assert vars(trainer.args) == before["args"]
        assert set(vars(trainer.accelerator)) <= {*before["accelerator"], "step", "flag_tensor"}
        assert "backward" not in vars(trainer.accelerator)
        assert not any(isinstance(getattr(held, "optimizer", None), WrappedOptimizer) for held in trainer.accelerator._optimizers)
        assert not has_hooks(model)
        start = [p.detach().clone() for p in model.parameters()]
        trainer.remove_callback(Ending)
        trainer.train()
    assert any(not torch.equal(a, b) for a, b in zip(start, model.parameters(), strict=True))


def test_a_budget_is_for_the_steps_that_the_arguments_ask_for(tmp_path):
    """``num_train_epochs`` or ``max_steps`` say how many steps have to fit; epsilon ends at the target, and is in the logs."""
    for more, steps in (({}, 6), ({"max_steps": 4}, 4), ({"num_train_epochs": 1.5}, 5)):
        with quietly():
            trainer = transformers_trainer(language_model(lora=False), tmp_path, **more)
            del trainer.get_train_dataloader
            budget = {"noise_multiplier": None, "target_epsilon": 6.0, "target_delta": DELTA}
            scope = trained_by(trainer, **budget)
            logged = [entry["epsilon"] for entry in trainer.state.log_history if "loss" in entry]
            assert scope.steps == steps == trainer.state.global_step
            assert 5.9 < scope.get_epsilon(DELTA) <= 6.0
            assert logged == sorted(logged)
            assert logged[-1] == pytest.approx(scope.get_epsilon(DELTA))


class Generates(TrainerCallback):
    """Writes two words after every epoch."""

    def on_epoch_end(self, args, state, control, model=None, **kwargs):
        assert model.eval().generate(torch.tensor([[3, 4]]), max_new_tokens=2).shape == (1, 4)


def test_evaluation_and_generation_in_the_scope_are_ordinary(tmp_path):
    """Evaluation after every epoch, and text generated by a callback, change nothing of the steps."""
    moves = []
    for evaluates in (False, True):
        model = language_model(lora=False)
        before = [p.detach().clone() for p in model.parameters()]
        with quietly():
            more = {"eval_strategy": "epoch"} if evaluates else {}
            trainer = transformers_trainer(model, tmp_path, eval_dataset=Sentences(), **more)

            if evaluates:
                trainer.add_callback(Generates())
            trained_by(trainer)
        assert (len([e for e in trainer.state.log_history if "eval_loss" in e]) == 2) == evaluates
        moves.append([b - p.detach() for p, b in zip(model.parameters(), before, strict=True)])
    assert all(torch.equal(a, b) for a, b in zip(*moves, strict=True))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"auto_find_batch_size": True}, "auto_find_batch_size"),
        ({"model_init": True}, "model_init"),
        ({"train_dataset": None}, "no train_dataset"),
        ({"train_dataset": []}, "train_dataset is empty"),
        ({"train_dataset": ChainDataset([])}, "is an IterableDataset"),
        ({"group_by_length": True}, "train_sampling_strategy"),
    ],
)
def test_what_cannot_be_private_is_refused_on_entering(wrong, said, tmp_path):
    """The error names what it is about the trainer, and nothing has been changed."""
    with quietly():
        trainer = transformers_trainer(language_model(lora=False), tmp_path)
        for name, value in wrong.items():
            setattr(trainer if name in vars(trainer) else trainer.args, name, value)
        own = state_of(trainer)
        with pytest.raises(InvalidArgumentError, match=said):
            trained_by(trainer)
        assert state_of(trainer) == own


def test_what_is_no_trainer_is_refused():
    """The error says what can be passed."""
    with pytest.raises(InvalidArgumentError, match=r"transformers\.Trainer or a lightning\.Trainer"):
        private_trainer(torch.nn.Linear(1, 1), max_grad_norm=1.0)
    one = type("Trainer", (), {"__module__": "transformers.trainer"})()
    with pytest.raises(InvalidArgumentError, match="it is the trainer's"):
        private_trainer(one, max_grad_norm=1.0, loader=[])
    with pytest.raises(InvalidArgumentError, match="has its model"):
        private_trainer(one, torch.nn.Linear(1, 1), max_grad_norm=1.0)


@pytest.mark.parametrize("divided", [None, 3.0])
def test_losses_of_tokens_are_means_within_each_example(divided, tmp_path):
    """Each example counts by its own tokens, or all by the same number: never by how many tokens the others have."""
    model = language_model(lora=False)
    start = copy.deepcopy(model)
    with quietly():
        trainer = transformers_trainer(model, tmp_path, max_steps=1)
        trained_by(trainer, sample_rate=1.0, max_grad_norm=1e3, tokens_per_example=divided)
    batch = default_collate([Sentences()[k] for k in range(EXAMPLES)])
    each = losses(start, batch)
    if divided is not None:
        each = each * (batch["labels"][:, 1:] != -100).sum(1) / divided
    wanted = torch.autograd.grad(each.mean(), list(start.parameters()))
    for p, before, g in zip(model.parameters(), start.parameters(), wanted, strict=True):
        assert torch.allclose(before - p, 0.5 * g, atol=1e-6)


def test_a_loss_that_couples_examples_is_refused_in_a_trainer(tmp_path):
    """A ``compute_loss`` of the user's is looked at as a train function is."""
    from transformers import Trainer

    class Coupled(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            each = losses(model, inputs)
            return (each * (each > each.detach().mean())).sum()

    model = language_model(lora=False)
    start = [p.detach().clone() for p in model.parameters()]
    with quietly():
        trainer = Coupled(model=model, args=arguments(tmp_path, False), train_dataset=Sentences(), optimizers=(sgd(model), None))
        with pytest.raises(SelfCheckError):
            trained_by(trainer, sample_rate=0.9)
    assert all(torch.equal(a, b) for a, b in zip(start, model.parameters(), strict=True))


def test_scopes_over_one_trainer_are_not_nested(tmp_path):
    """The second one is refused by name, and the first one goes on."""
    with quietly():
        trainer = transformers_trainer(language_model(lora=False), tmp_path)
        with private_trainer(trainer, noise_multiplier=1.0, max_grad_norm=1.0, accountant="rdp") as scope:
            with pytest.raises(ScopeError, match="open private scope"):
                trained_by(trainer)
            trainer.train()
    assert scope.steps > 0
