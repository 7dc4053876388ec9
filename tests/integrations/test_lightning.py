"""Lightning's own ways in a private scope: logs, hooks, checkpoints, and what is refused."""

import logging

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dp_hooks.errors import BudgetExhaustedError, InvalidArgumentError, ScopeError
from dp_hooks.integrations import private_trainer

from ..models import drawn
from .language import quietly

QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "devices": 1}
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Module(L.LightningModule):
    """A small classifier."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(5, 3)

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("seen", loss, on_epoch=True)
        return {"loss": loss}

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5), "interval": "step"}]


def loader():
    x = torch.randn(12, 5, generator=drawn(1))
    return DataLoader(TensorDataset(x, torch.arange(12) % 3), batch_size=4, shuffle=True)


def scope_of(trainer, module, **options):
    given = {"max_grad_norm": 1.0, "noise_multiplier": 1.0, "accountant": "rdp", **options}
    return private_trainer(trainer, module, train_dataloaders=loader(), **given)


def fit(module, *, checkpoint=None, epochs=2, root=None, **options):
    """Train in a scope; return it, and the trainer."""
    saves = {"default_root_dir": root, "enable_checkpointing": True} if root else {"enable_checkpointing": False}
    trainer = L.Trainer(max_epochs=epochs, **saves, **QUIET)
    with quietly(), scope_of(trainer, module, **options) as scope:
        trainer.fit(module, ckpt_path=checkpoint)
    return scope, trainer


class Transferring(Module):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch[0] * 2, batch[1]


class WithoutIndex(Module):
    def training_step(self, batch):
        return F.cross_entropy(self.net(batch[0]), batch[1])


@pytest.mark.parametrize("kind", [Module, Transferring, WithoutIndex])
def test_a_module_trains_with_the_hooks_it_has(kind):
    """Logs over an epoch, batches changed on their way, schedulers by step; then everything is the trainer's and module's own."""
    module = kind()
    before = dict(vars(module))
    optimizer_of = module.configure_optimizers
    scope, trainer = fit(module)
    assert scope.steps == 6 == trainer.global_step
    assert scope.report().loss_verified
    assert {name: value for name, value in vars(module).items() if name in before and not name.startswith("_")} == {
        name: value for name, value in before.items() if not name.startswith("_")
    }
    assert "training_step" not in vars(module)
    assert module.configure_optimizers == optimizer_of
    assert type(trainer.optimizers[0]) is torch.optim.SGD
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**6)
    with quietly():
        L.Trainer(max_epochs=1, enable_checkpointing=False, **QUIET).fit(module, loader())


def test_a_checkpoint_goes_on_with_what_its_run_has_spent(tmp_path):
    """Six steps and six more are twelve; a checkpoint that was not saved in a scope is refused."""
    fit(Module(), root=tmp_path)
    (path,) = tmp_path.rglob("*.ckpt")
    scope, trainer = fit(Module(), checkpoint=path, epochs=4)
    assert scope.steps == 12 == trainer.global_step
    assert scope.accountant.history[-1][2] == 12
    kept = torch.load(path, weights_only=True)
    del kept["dp_hooks"]
    torch.save(kept, path)
    with pytest.raises(InvalidArgumentError, match="does not say what its run has spent"):
        fit(Module(), checkpoint=path, epochs=4)


def test_a_budget_is_for_the_steps_of_the_trainer():
    """``max_epochs`` says how many steps have to fit."""
    scope, _ = fit(Module(), epochs=3, noise_multiplier=None, target_epsilon=5.0, target_delta=1e-5)
    assert scope.steps == 9
    assert 4.9 < scope.get_epsilon(1e-5) <= 5.0


class OwnBackward(Module):
    def backward(self, loss):
        (100 * loss).backward()


class ReadsAhead(Module):
    def training_step(self, dataloader_iter):
        return super().training_step(next(dataloader_iter)[0], 0)


class TwoOptimizers(Module):
    def configure_optimizers(self):
        return [torch.optim.SGD([p], lr=0.1) for p in self.parameters()]


@pytest.mark.parametrize(
    ("kind", "said"), [(OwnBackward, r"backward\(\) of its own"), (ReadsAhead, "dataloader_iter"), (TwoOptimizers, "pass part=")]
)
def test_what_a_private_step_would_go_past_is_refused(kind, said):
    """The error names it, before anything is changed."""
    module = kind()
    with pytest.raises(InvalidArgumentError, match=said):
        fit(module)
    assert "training_step" not in vars(module)


def test_a_loader_of_the_users_is_refused_in_the_scope():
    """The scope has the loader; another one would be without sampling."""
    module, trainer = Module(), L.Trainer(max_epochs=1, enable_checkpointing=False, **QUIET)
    with quietly(), scope_of(trainer, module), pytest.raises(ScopeError, match="without a loader"):
        trainer.fit(module, loader())


def test_scopes_over_one_module_are_not_nested():
    """The second one is refused by name."""
    module, trainer = Module(), L.Trainer(max_epochs=1, enable_checkpointing=False, **QUIET)
    with quietly(), scope_of(trainer, module), pytest.raises(ScopeError, match="open private scope"), scope_of(trainer, module):
        pass


class Looks(L.Callback):
    """Sees the gradient before each step."""

    def __init__(self):
        self.norms = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.norms.append(float(torch.cat([p.grad.flatten() for p in pl_module.parameters()]).norm()))


def test_a_callback_sees_the_noised_gradient_once_for_each_step():
    """With automatic optimization, too, in which one batch comes in several parts."""
    looks, module = Looks(), Module()
    trainer = L.Trainer(max_epochs=2, enable_checkpointing=False, callbacks=[looks], **QUIET)
    with quietly(), scope_of(trainer, module, noise_multiplier=1000.0, max_physical_batch_size=2) as scope:
        trainer.fit(module)
    assert len(looks.norms) == scope.steps == 6
    assert all(norm > 100 for norm in looks.norms)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [({"gradient_clip_val": 1.0}, "gradient_clip_val=1.0"), ({"min_steps": 20, "max_epochs": -1, "max_steps": 30}, "min_steps=20")],
)
def test_trainers_that_clip_noise_or_never_end_are_refused(wrong, said):
    """Lightning's clipping is not that of a private step; without batches no number of steps is ever reached."""
    module, trainer = Module(), L.Trainer(**{"max_epochs": 1, "enable_checkpointing": False, **wrong}, **QUIET)
    budget = {"noise_multiplier": None, "target_epsilon": 5.0, "target_delta": 1e-5, "epochs": 1}
    refused = pytest.raises((InvalidArgumentError, BudgetExhaustedError), match=said)
    with quietly(), refused, scope_of(trainer, module, **budget):
        trainer.fit(module)
    assert "training_step" not in vars(module)


@pytest.mark.parametrize(
    ("options", "charged"),
    [
        ({"sampling": "random_allocation"}, (("random_allocation", 3), 2)),
        ({"sampling": "truncated_poisson", "max_batch_size": 6}, (("truncated_poisson", 4 / 12, 12, 6), 6)),
    ],
)
def test_a_trainer_takes_other_samplings(options, charged):
    """Two epochs of three batches: charged as passes or as truncated batches."""
    scope, trainer = fit(Module(), accountant="pld", **options)
    assert scope.accountant.history == [(1.0, *charged)]
    assert scope.steps == 6 == trainer.global_step


@pytest.mark.parametrize("sampling", ["random_allocation", "sequential"])
def test_batches_accumulated_by_the_trainer_are_poisson_batches(sampling):
    """An order or allocation of them is refused by name."""
    trainer = L.Trainer(max_epochs=1, accumulate_grad_batches=2, enable_checkpointing=False, **QUIET)
    with pytest.raises(InvalidArgumentError, match=f"sampling='{sampling}'.*accumulate_grad_batches=2"):
        scope_of(trainer, Module(), sampling=sampling, accountant="pld").__enter__()
