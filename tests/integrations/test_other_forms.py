"""The same scopes in other forms: a callback for Lightning, a mix-in for transformers trainers."""

import json
import subprocess
import sys

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import Trainer, TrainerCallback

from dp_hooks.errors import InvalidArgumentError, ScopeError
from dp_hooks.integrations import PrivacyCallback, PrivateTrainerMixin, private_trainer

from ..models import drawn, has_hooks
from .language import EACH, OPTIONS, Sentences, arguments, language_model, quietly, sampled, sft_trainer, sgd
from .test_lightning import QUIET, Module
from .test_lightning_manual import Manual, loader


def both_ways(make, **options):
    """Train once in a ``with`` block and once with the callback; return both modules and scopes."""
    given = {"noise_multiplier": 0.0, "max_grad_norm": 0.5, "accountant": "rdp", **options}
    with quietly():
        module, trainer = make(), L.Trainer(max_epochs=2, enable_checkpointing=False, **QUIET)
        with private_trainer(trainer, module, train_dataloaders=loader(), **given) as scope:
            trainer.fit(module)
        other, callback = make(), PrivacyCallback(**given)
        trainer = L.Trainer(max_epochs=2, enable_checkpointing=False, callbacks=[callback], **QUIET)
        trainer.fit(other, loader())
    return (module, scope), (other, callback.scope), trainer


@pytest.mark.parametrize("kind", [Module, Manual])
def test_the_callback_does_what_the_block_does(kind):
    """The same weights and the same charge; afterwards nothing is left, and the trainer is an ordinary one."""
    (module, scope), (other, known), trainer = both_ways(kind)
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), other.parameters(), strict=True))
    assert known.accountant.history == scope.accountant.history == [(0.0, 4 / 12, 6)]
    assert not known.is_open
    assert not has_hooks(other)
    assert not {"training_step", "setup", "configure_optimizers"} & vars(other).keys()
    assert type(trainer.optimizers[0]) is torch.optim.SGD
    assert "_after_closure" not in vars(trainer.precision_plugin)
    assert "save_checkpoint" not in vars(trainer)


class BuiltLate(L.LightningModule):
    """Makes its data and layers where Lightning says so."""

    def setup(self, stage):
        self.data = TensorDataset(torch.randn(12, 5, generator=drawn(1)), torch.arange(12) % 3)
        self.times = getattr(self, "times", 0) + 1

    def configure_model(self):
        if not hasattr(self, "net"):
            self.net = nn.Linear(5, 3)

    def train_dataloader(self):
        return DataLoader(self.data, batch_size=4)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("accuracy", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

    def val_dataloader(self):
        return DataLoader(self.data, batch_size=4)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Data(L.LightningDataModule):
    """The loader of a data module."""

    def train_dataloader(self):
        return loader()


def test_the_callback_waits_for_what_is_built_in_setup():
    """Data of ``setup``, layers of ``configure_model``, data modules; ``setup`` is called once. Validation is ordinary."""
    for data in (None, Data()):
        callback, module = PrivacyCallback(noise_multiplier=1.0, max_grad_norm=1.0, accountant="rdp"), BuiltLate()
        trainer = L.Trainer(max_epochs=2, enable_checkpointing=False, callbacks=[callback], **QUIET)
        with quietly():
            trainer.fit(module, datamodule=data)
            trainer.validate(module)
        assert callback.scope.steps == 6 == trainer.global_step
        assert module.times == 2  # for the validation, too
        assert "accuracy" in trainer.callback_metrics


class Breaks(L.Callback):
    """Ends a run in its second batch."""

    def __init__(self, error):
        self.error = error

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 1:
            raise self.error


@pytest.mark.parametrize("error", [RuntimeError("out of luck"), SystemExit()])
def test_the_callback_leaves_by_whatever_way(error):
    """After an exception nothing is left on the module, what was spent can be read, and a second fit is refused by name."""
    callback, module = PrivacyCallback(noise_multiplier=1.0, max_grad_norm=1.0, accountant="rdp"), Module()
    trainer = L.Trainer(max_epochs=2, enable_checkpointing=False, callbacks=[callback, Breaks(error)], **QUIET)
    with quietly():
        with pytest.raises(type(error)):
            trainer.fit(module, loader())
        assert callback.scope.steps == 2
        assert not callback.scope.is_open
        assert not has_hooks(module)
        assert "training_step" not in vars(module)
        with pytest.raises(ScopeError, match="in a fit already"):
            trainer.fit(module, loader())
        both = PrivacyCallback(noise_multiplier=1.0, max_grad_norm=1.0, accountant=callback.scope.accountant)
        L.Trainer(max_epochs=1, enable_checkpointing=False, callbacks=[both], **QUIET).fit(module, loader())
    assert both.scope.accountant.history == [(1.0, 4 / 12, 5)]


def test_what_the_callback_cannot_enter_changes_nothing():
    """Bad arguments are errors by name from ``fit``."""
    module = Module()
    trainer = L.Trainer(max_epochs=1, callbacks=[PrivacyCallback(noise_multiplier=1.0, max_grad_norm=-1.0)], **QUIET)
    with quietly(), pytest.raises(InvalidArgumentError, match="max_grad_norm"):
        trainer.fit(module, loader())
    assert not {"training_step", "setup", "configure_optimizers"} & vars(module).keys()


def test_an_interrupted_fit_saves_what_it_has_cost(tmp_path):
    """A checkpoint that another callback saves after the exception goes on with all that was spent."""
    saved = tmp_path / "after.ckpt"

    class Saves(L.Callback):
        def on_exception(self, trainer, pl_module, exception):
            trainer.save_checkpoint(saved)

    def callbacks():
        return PrivacyCallback(noise_multiplier=1.0, max_grad_norm=1.0, accountant="rdp")

    with quietly():
        used = [callbacks(), Breaks(KeyError("lost")), Saves()]
        trainer = L.Trainer(max_epochs=2, enable_checkpointing=False, callbacks=used, **QUIET)
        with pytest.raises(KeyError, match="lost"):
            trainer.fit(Module(), loader())
        privacy = callbacks()
        trainer = L.Trainer(max_epochs=2, enable_checkpointing=False, callbacks=[privacy], **QUIET)
        trainer.fit(Module(), loader(), ckpt_path=saved)
    assert privacy.scope.steps == privacy.scope.accountant.history[0][2] == 2 + 4


def test_no_trainer_library_is_imported_before_it_is_needed():
    """``dp_hooks.integrations`` imports neither Lightning nor transformers; its callback imports Lightning."""
    program = (
        "import sys, json, dp_hooks.integrations as i\n"
        "known = {'lightning', 'transformers', 'trl', 'pytorch_lightning'}\n"
        "def seen(): return sorted({m.split('.')[0] for m in sys.modules} & known)\n"
        "before = seen(); i.PrivacyCallback; print(json.dumps([before, seen()]))"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    before, after = json.loads(ran.stdout.splitlines()[-1])
    assert before == []
    assert "lightning" in after
    with pytest.raises(ImportError, match="Nobody"):
        from dp_hooks.integrations import Nobody  # noqa: F401


# ---------------------------------------------------------------- transformers


class PrivateTrainer(PrivateTrainerMixin, Trainer):
    """A trainer that is private as it is."""

    privacy = OPTIONS


def mixed(folder, **more):
    """Return a trainer of that class."""
    model = language_model(lora=False)
    trainer = PrivateTrainer(
        model=model, args=arguments(folder, False), train_dataset=Sentences(), optimizers=(sgd(model), None), **more
    )
    trainer.get_train_dataloader = lambda: sampled(trainer.train_dataset, EACH)
    return trainer


def test_the_mix_in_does_what_the_block_does(tmp_path):
    """The same weights and the same charge, with the class's arguments; those of the constructor come first."""
    with quietly():
        plain = mixed(tmp_path)
        with private_trainer(plain, **OPTIONS) as scope:
            Trainer.train(plain)
        trainer = mixed(tmp_path)
        result = trainer.train()
        noised = mixed(tmp_path, privacy={**OPTIONS, "noise_multiplier": 2.0})
        noised.train()
    assert all(torch.equal(p, q) for p, q in zip(plain.model.parameters(), trainer.model.parameters(), strict=True))
    assert trainer.privacy_scope.accountant.history == scope.accountant.history
    assert result.global_step == trainer.privacy_scope.steps
    assert noised.privacy_scope.accountant.history[0][0] == 2.0
    assert not has_hooks(trainer.model)
    assert "training_step" not in vars(trainer)


def test_training_again_with_the_mix_in_counts_both_or_is_refused(tmp_path):
    """A second ``train()`` would forget the first one's steps, unless it has its accountant."""
    with quietly():
        trainer = mixed(tmp_path, privacy={**OPTIONS, "noise_multiplier": 1.0})
        trainer.train()
        steps = trainer.privacy_scope.steps
        with pytest.raises(ScopeError, match="has trained already"):
            trainer.train()
        trainer.privacy = {**trainer.privacy, "accountant": trainer.privacy_scope.accountant}
        trainer.train()
    assert trainer.privacy_scope.accountant.history[0][2] == 2 * steps
    with pytest.raises(InvalidArgumentError, match="privacy="):
        mixed(tmp_path, privacy={}).train()


def test_the_mix_in_goes_before_trainers_of_trl(tmp_path):
    """``SFTTrainer`` with two base classes."""
    from trl import SFTTrainer

    with quietly():
        trainer = sft_trainer(language_model(lora=True), tmp_path)
        trainer.__class__ = type("PrivateSFT", (PrivateTrainerMixin, SFTTrainer), {"privacy": OPTIONS})
        trainer.train()
    assert trainer.privacy_scope.steps == 6
    assert trainer.privacy_scope.report().loss_verified


def test_a_callback_of_transformers_comes_too_late(tmp_path):
    """Why there is a mix-in: no event is told the trainer, and the first one of a run comes when its loader was made."""
    order, told = [], set()

    class Looks(TrainerCallback):
        def on_init_end(self, args, state, control, **kwargs):
            told.update(type(value) for value in kwargs.values())

        def on_train_begin(self, args, state, control, **kwargs):
            order.append("begin")
            told.update(type(value) for value in kwargs.values())
            control.should_training_stop = True

    with quietly():
        model = language_model(lora=False)
        trainer = Trainer(model=model, args=arguments(tmp_path, False), train_dataset=Sentences(), callbacks=[Looks()])
        make = trainer.get_train_dataloader
        trainer.get_train_dataloader = lambda: (order.append("loader"), make())[1]
        trainer.train()
    assert order[:2] == ["loader", "begin"]
    assert told
    assert not any(issubclass(kind, Trainer) for kind in told)
