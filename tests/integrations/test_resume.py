"""Runs of a trainer that were killed: what they have spent is never forgotten, and they train on."""

import json
import logging
import os
import random
from itertools import count

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from transformers import TrainerCallback

from dp_hooks.errors import InvalidArgumentError, ScopeError
from dp_hooks.integrations import private_trainer
from dp_hooks.privacy.accounting.meter import PrivacyMeter

from .language import DELTA, language_model, quietly, trained_by, transformers_trainer
from .test_lightning import QUIET, Module, loader
from .test_lightning_manual import Manual

STEPS = 8
KILLS = int(os.environ.get("DP_HOOKS_KILLS", "12"))
BUDGET = {"noise_multiplier": None, "target_epsilon": 6.0, "target_delta": DELTA, "accountant": "pld"}


class Killed(BaseException):
    """Nothing catches it, and nothing is tidied up by hand."""


class Kill(TrainerCallback):
    """Ends the run where somebody says."""

    def __init__(self, where, step):
        self.where, self.step = where, step

    def on_step_begin(self, args, state, control, **kwargs):
        if self.where == "before a step" and state.global_step == self.step:
            raise Killed

    def on_step_end(self, args, state, control, **kwargs):
        if self.where == "after a step" and state.global_step == self.step + 1:
            raise Killed

    def on_save(self, args, state, control, **kwargs):
        if self.where == "after saving" and state.global_step == self.step + 1:
            raise Killed


def run_of(folder, *, kill=None, resume=None, **options):
    """Train a transformers trainer, or go on; return the scope and the trainer."""
    trainer = transformers_trainer(
        language_model(lora=False), folder, max_steps=STEPS, save_strategy="steps", save_steps=2, logging_steps=100
    )
    del trainer.get_train_dataloader
    if kill is not None:
        trainer.add_callback(kill)
        if kill.where == "while saving":
            save = trainer.save_model
            trainer.save_model = lambda *a, **k: die() if trainer.state.global_step == kill.step + 1 else save(*a, **k)
        if kill.where == "in a step":
            trainer.data_collator = dying(trainer, kill.step)
    if resume:
        train = trainer.train
        trainer.train = lambda: train(resume_from_checkpoint=resume)
    return trained_by(trainer, **{**BUDGET, **options}), trainer


def die():
    raise Killed


def dying(trainer, step):
    """Return a collate function that ends the run at a step."""
    collate = trainer.data_collator
    return lambda rows: die() if trainer.state.global_step == step and trainer.is_in_train else collate(rows)


class KillLightning(L.Callback):
    """The same for Lightning."""

    def __init__(self, kill):
        self.kill = kill

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.kill.where == "before a step" and trainer.global_step == self.kill.step:
            raise Killed

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if self.kill.where == "in a step" and trainer.global_step == self.kill.step:
            raise Killed

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self.kill.where == "after a step" and trainer.global_step == self.kill.step + 1:
            raise Killed

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        if self.kill.where == "while saving" and trainer.global_step == self.kill.step + 1:
            raise Killed


def lightning_run_of(folder, *, module=None, kill=None, resume=None, **options):
    """The same for Lightning, with checkpoints after every second step."""
    saves = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    used = [saves] if kill is None else [saves, KillLightning(kill)]
    trainer = L.Trainer(max_steps=STEPS, max_epochs=-1, callbacks=used, **QUIET)
    if kill is not None and kill.where == "after saving":
        save = trainer.save_checkpoint

        def save_and_die(*args, **kwargs):
            save(*args, **kwargs)
            if trainer.global_step == kill.step + 1:
                raise Killed

        trainer.save_checkpoint = save_and_die
    given = {"max_grad_norm": 1.0, **BUDGET, **options}
    module = module or Module()
    with private_trainer(trainer, module, train_dataloaders=loader(), **given) as scope:
        trainer.fit(module, ckpt_path=resume)
    return scope, trainer


def number_of(path):
    """The step that a checkpoint is of."""
    return int(path.stem.partition("step=")[2] or path.stem.partition("-")[2])


RUNS = {
    # what trains, where its checkpoints are, and what a whole one has
    "Trainer": (run_of, "checkpoint-*", "trainer_state.json"),
    "Lightning": (lightning_run_of, "*.ckpt", ""),
    "Lightning, manual": (lambda *a, **k: lightning_run_of(*a, module=Manual(), **k), "*.ckpt", ""),
}
WHERE = ["before a step", "after a step", "while saving", "after saving", "in a step"]


@pytest.mark.parametrize("trainer", RUNS)
def test_runs_that_are_killed_never_forget_what_was_spent(trainer, tmp_path, monkeypatch):
    """Every charge that was ever made is in the epsilon of the run that goes on, a budget is kept, and it trains on to its end."""
    run, pattern, whole = RUNS[trainer]
    choose, kills, made = random.Random(0), 0, []
    charge = PrivacyMeter.charge_step
    monkeypatch.setattr(PrivacyMeter, "charge_step", lambda self, *, foreign: (made.append(1), charge(self, foreign=foreign)))
    for number in count():
        if kills >= KILLS:
            break
        folder = tmp_path / str(number)
        while True:
            # One that was being saved is torn, and nothing to go on from.
            found = sorted((path for path in folder.glob(pattern) if (path / whole).exists()), key=number_of)
            if not found:
                made.clear()
            kill = Kill(choose.choice(WHERE), choose.randrange(STEPS)) if choose.random() < 0.9 else None
            try:
                with quietly():
                    going_on = {"resume": str(found[-1]), "self_check": False} if found else {}  # the model was checked
                    scope, trainer = run(folder, kill=kill, **going_on)
            except Killed:
                kills += 1
                assert spent_in(folder) == len(made)
                continue
            break
        assert scope.steps == sum(steps for *_, steps in scope.accountant.history) == len(made) <= STEPS
        assert scope.get_epsilon(DELTA) <= 6.0
        reached = trainer.global_step if isinstance(trainer, L.Trainer) else trainer.state.global_step
        assert reached <= STEPS
        assert len(made) == STEPS or reached == STEPS


def spent_in(folder):
    """How many charges are on disk."""
    path = folder / "privacy.json"
    return sum(steps for *_, steps in json.loads(path.read_text())["history"]) if path.exists() else 0


logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


@pytest.fixture
def stopped(tmp_path):
    """A run that was killed in its fifth step, with checkpoints after two and four."""
    with quietly(), pytest.raises(Killed):
        run_of(tmp_path, kill=Kill("after a step", 4))
    return tmp_path


def test_steps_after_the_last_checkpoint_stay_spent(stopped):
    """Five steps were released and four are in the checkpoint: three are left of eight, and epsilon is that of eight."""
    with quietly():
        scope, trainer = run_of(stopped, resume=True)
    assert scope.steps == STEPS
    assert trainer.state.global_step == STEPS - 1
    assert 5.9 < scope.get_epsilon(DELTA) <= 6.0


def test_a_checkpoint_that_was_moved_goes_on_by_itself(stopped, tmp_path_factory):
    """A checkpoint has in it what was spent until then."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (stopped / "checkpoint-4").rename(elsewhere / "checkpoint-4")
    with quietly():
        scope, trainer = run_of(elsewhere, resume=str(elsewhere / "checkpoint-4"))
    assert scope.steps == STEPS == trainer.state.global_step


@pytest.mark.parametrize("fault", ["missing", "torn", "foreign", "older", "other data"])
def test_a_checkpoint_without_what_it_has_cost_is_refused(stopped, fault):
    """A file that is missing, torn, of something else or of a run on other data is an error by name; nothing is trained."""
    (stopped / "privacy.json").unlink()
    path = stopped / "checkpoint-4" / "privacy.json"
    text = path.read_text()
    changed = {
        "torn": text[: len(text) // 2],
        "foreign": "[1, 2]",
        "older": text.replace("scope 1", "scope 0"),
        "other data": text.replace('"dataset_size": 10', '"dataset_size": 11'),
    }
    if fault == "missing":
        path.unlink()
    else:
        path.write_text(changed[fault])
    with quietly(), pytest.raises(InvalidArgumentError, match=r"privacy\.json|format|dataset_size"):
        run_of(stopped, resume=True)


def test_a_new_run_in_the_same_folder_says_that_it_counts_anew(stopped):
    """What an earlier run has spent is kept under another name."""
    with pytest.warns(UserWarning, match="earlier run has spent"):
        scope, _ = run_of(stopped)
    assert scope.steps == STEPS
    assert spent_in(stopped) == STEPS
    assert (stopped / "privacy.1.json").exists()


def test_a_budget_is_not_refilled_by_going_on(stopped):
    """To go on with the end of a run that has spent everything trains nothing more."""
    with quietly():
        run_of(stopped, resume=True)
        start = dict(load_file(stopped / "checkpoint-4" / "model.safetensors"))
        scope, trainer = run_of(stopped, resume=str(stopped / "checkpoint-4"))
    assert scope.steps == STEPS
    now = trainer.model.state_dict()
    assert start
    assert all(torch.equal(now[name], value) for name, value in start.items())


def test_going_on_in_a_scope_that_has_trained_is_refused(stopped):
    """What was spent is loaded before the first step, or not at all."""
    with quietly():
        trainer = transformers_trainer(language_model(lora=False), stopped, max_steps=STEPS)
        del trainer.get_train_dataloader
        train = trainer.train

        def twice():
            train()
            train(resume_from_checkpoint=True)

        trainer.train = twice
        with pytest.raises(ScopeError, match="steps were taken in this scope already"):
            trained_by(trainer, noise_multiplier=1.0)


def test_a_run_that_goes_on_in_another_folder_counts_what_it_spent_there(stopped, tmp_path_factory):
    """Killed before it saved a checkpoint of its own, and begun once more from the same one: its steps are not forgotten."""
    other = tmp_path_factory.mktemp("other")
    from_there = str(stopped / "checkpoint-4")
    with quietly():
        with pytest.raises(Killed):
            run_of(other, kill=Kill("after a step", 4), resume=from_there)
        assert spent_in(other) == 6
        scope, trainer = run_of(other, resume=from_there)
    assert scope.steps == STEPS
    assert trainer.state.global_step == STEPS - 2


@pytest.fixture
def stopped_lightning(tmp_path):
    """The same of a Lightning trainer."""
    with quietly(), pytest.raises(Killed):
        lightning_run_of(tmp_path, kill=Kill("after a step", 4))
    return tmp_path


def test_steps_after_the_last_checkpoint_of_lightning_stay_spent(stopped_lightning, tmp_path_factory):
    """What is beside a checkpoint is later than what is in it, and counts; a checkpoint that was moved goes on by itself."""
    assert spent_in(stopped_lightning) == 5
    checkpoint = stopped_lightning / "step=4.ckpt"
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "moved.ckpt"
    elsewhere.write_bytes(checkpoint.read_bytes())
    with quietly():
        scope, trainer = lightning_run_of(stopped_lightning, resume=checkpoint)
        assert (scope.steps, trainer.global_step) == (STEPS, STEPS - 1)
        assert 5.9 < scope.get_epsilon(DELTA) <= 6.0
        scope, trainer = lightning_run_of(elsewhere.parent, resume=elsewhere)
        assert scope.steps == STEPS == trainer.global_step


def test_a_lightning_run_that_goes_on_in_another_folder_counts_what_it_spent_there(stopped_lightning, tmp_path_factory):
    """Killed before it saved a checkpoint of its own, and begun once more from the same one: its steps are not forgotten."""
    other, checkpoint = tmp_path_factory.mktemp("other"), stopped_lightning / "step=4.ckpt"
    with quietly():
        with pytest.raises(Killed):
            lightning_run_of(other, kill=Kill("after a step", 4), resume=checkpoint)
        assert spent_in(other) == 6
        scope, trainer = lightning_run_of(other, resume=checkpoint)
    assert (scope.steps, trainer.global_step) == (STEPS, STEPS - 2)


def test_a_new_lightning_run_in_the_same_folder_says_that_it_counts_anew(stopped_lightning):
    """What an earlier run has spent is kept under another name; a damaged file is refused by name."""
    with pytest.warns(UserWarning, match="earlier run has spent"):
        lightning_run_of(stopped_lightning)
    assert spent_in(stopped_lightning) == STEPS
    assert (stopped_lightning / "privacy.1.json").exists()
    (stopped_lightning / "privacy.json").write_text("{")
    with quietly(), pytest.raises(InvalidArgumentError, match=r"ckpt_path.*damaged"):
        lightning_run_of(stopped_lightning, resume=stopped_lightning / "step=4.ckpt")


def test_what_is_saved_by_hand_has_its_cost_beside_it(tmp_path):
    """``trainer.save_checkpoint`` to any folder, without callbacks that save: steps after it are known there."""

    class Saves(L.Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 1:
                trainer.save_checkpoint(tmp_path / "by_hand" / "one.ckpt")
            if trainer.global_step == 4:
                raise Killed

    def fit(callbacks, resume=None):
        trainer, module = L.Trainer(max_epochs=2, enable_checkpointing=False, callbacks=callbacks, **QUIET), Module()
        options = {"max_grad_norm": 1.0, "accountant": "rdp", "noise_multiplier": 1.0}
        with quietly(), private_trainer(trainer, module, train_dataloaders=loader(), **options) as scope:
            trainer.fit(module, ckpt_path=resume)
        return scope

    with pytest.raises(Killed):
        fit([Saves()])
    assert spent_in(tmp_path / "by_hand") == 4
    assert fit([], tmp_path / "by_hand" / "one.ckpt").steps == 4 + 5
