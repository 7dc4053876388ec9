"""Manual optimization in Lightning: a bare loop, and a private discriminator beside an ordinary generator."""

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dp_hooks import private_training
from dp_hooks.errors import InvalidArgumentError, ScopeError
from dp_hooks.integrations import private_trainer

from ..models import drawn
from .language import quietly
from .test_lightning import QUIET

X, Y, C = torch.randn(12, 5, generator=drawn(1)), torch.arange(12) % 3, 0.5
OPTIONS = {"noise_multiplier": 0.0, "max_grad_norm": C, "accountant": "rdp"}


def loader(batch=4):
    return DataLoader(TensorDataset(X, Y), batch_size=batch, shuffle=True, generator=drawn(7))


class Manual(L.LightningModule):
    """A classifier that steps its optimizer itself."""

    def __init__(self, how="zero_grad first"):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
        self.criterion = nn.CrossEntropyLoss()
        self.automatic_optimization = False
        self.how, self.norms, self.calls = how, [], 0

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        opt, self.calls = self.optimizers(), self.calls + 1
        if self.how == "closure":
            opt.step(lambda: (opt.zero_grad(), self.manual_backward(self.criterion(self(x), y))))
        else:
            if self.how == "zero_grad first":
                opt.zero_grad()
            loss = self.criterion(self(x), y)
            if self.how == "zero_grad later":
                opt.zero_grad()
            self.log("seen", loss, on_epoch=True)
            self.manual_backward(loss)
            opt.step()
        self.lr_schedulers().step()

    def on_before_optimizer_step(self, optimizer):
        assert optimizer is self.optimizers().optimizer
        self.norms.append(torch.cat([p.grad.flatten() for p in self.parameters()]).norm())

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.5)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)}


def fit(module, *, batch=4, epochs=3, **options):
    trainer = L.Trainer(max_epochs=epochs, enable_checkpointing=False, **QUIET)
    with quietly(), private_trainer(trainer, module, train_dataloaders=loader(batch), **{**OPTIONS, **options}) as scope:
        trainer.fit(module)
    return scope, trainer


def bare_loop(batch, parts):
    """The same, without Lightning."""
    module = Manual()
    configured = module.configure_optimizers()
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]
    with private_training(module.net, optimizer, loader(batch), max_physical_batch_size=parts, **OPTIONS) as (opt, private):
        for _ in range(3):
            for x, y in private:
                opt.zero_grad()
                if len(x):
                    F.cross_entropy(module.net(x), y).backward()
                opt.step()
                if len(x) and opt.physical_batch.last:
                    schedule.step()
    return module, optimizer


@pytest.mark.parametrize("how", ["zero_grad first", "zero_grad later", "closure"])
@pytest.mark.parametrize(("batch", "parts"), [(4, None), (4, 2), (1, None), (1, 1)])
def test_manual_optimization_is_a_bare_loop(batch, parts, how):
    """Parts of a batch, empty batches, closures: weights, learning rates and steps are those of the loop, and so is the charge."""
    module, (wanted, optimizer) = Manual(how), bare_loop(batch, parts)
    scope, trainer = fit(module, batch=batch, max_physical_batch_size=parts)
    assert all(torch.allclose(p, q, atol=1e-6) for p, q in zip(module.parameters(), wanted.parameters(), strict=True))
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(optimizer.param_groups[0]["lr"])
    assert scope.steps == trainer.global_step == 3 * 12 // batch == len(module.norms)
    assert scope.accountant.history == [(0.0, batch / 12, scope.steps)]
    assert all(norm <= C * 12 / batch for norm in module.norms)
    assert batch > 1 or module.calls < scope.steps
    assert scope.report().model_verified or parts == 1  # single examples cannot show that they do not mix


def test_the_loss_of_a_bare_loop_can_be_checked():
    """With ``criterion`` and the model that it is outside of."""
    module = Manual()
    scope, _ = fit(module, part="net", criterion=module.criterion)
    assert scope.report().loss_verified
    assert scope.steps == 9


def test_what_other_hooks_see_of_a_step_has_its_noise():
    """``on_before_optimizer_step`` is called once for each release, with gradients that are nearly all noise here."""
    module = Manual()
    fit(module, noise_multiplier=1000.0)
    assert len(module.norms) == 9
    assert all(norm > 100 * C for norm in module.norms)


class NeverSteps(Manual):
    def training_step(self, batch, batch_idx):
        return self.criterion(self(batch[0]), batch[1])


class Clips(Manual):
    def training_step(self, batch, batch_idx):
        self.clip_gradients(self.optimizers(), gradient_clip_val=1.0)


class StepsTheOriginal(Manual):
    def training_step(self, batch, batch_idx):
        self.criterion(self(batch[0]), batch[1]).backward()
        self.optimizers().optimizer.original_optimizer.original_optimizer.step()


@pytest.mark.parametrize(("kind", "said"), [(Clips, "clip_gradients"), (StepsTheOriginal, "original optimizer was stepped")])
def test_what_is_not_private_in_a_manual_step_is_refused(kind, said):
    """The error names it; nothing is charged or changed."""
    module = kind()
    before = [p.detach().clone() for p in module.parameters()]
    with pytest.raises(ScopeError, match=said):
        fit(module)
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), before, strict=True))
    assert "clip_gradients" not in vars(module)


def test_a_module_that_never_steps_is_charged_nothing():
    """Batches that are left out are warned of, and nothing is released."""
    trainer, module = L.Trainer(max_epochs=1, enable_checkpointing=False, **QUIET), NeverSteps()
    with (
        private_trainer(trainer, module, train_dataloaders=loader(), **OPTIONS) as scope,
        pytest.warns(UserWarning, match="no step"),
    ):
        trainer.fit(module)
    assert scope.steps == 0


# ---------------------------------------------------------------- several optimizers


class GAN(L.LightningModule):
    """A discriminator that sees private data, and a generator that sees the discriminator."""

    def __init__(self, order="dg", leak=None, toggle=False, name="discriminator"):
        super().__init__()
        torch.manual_seed(0)
        self.generator = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 5))
        self.discriminator = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1))
        self.automatic_optimization = False
        self.order, self.leak, self.toggle, self.name = order, leak, toggle, name
        self.noise, self.steps = drawn(5), []

    def configure_optimizers(self):
        return [torch.optim.Adam(net.parameters(), lr=0.1) for net in (self.generator, self.discriminator)]

    def training_step(self, batch, batch_idx):
        x, _ = batch
        for which in self.order:
            z = torch.randn(len(x), 3, generator=self.noise)
            self.steps.append((which, x.clone(), z))
            opt = self.optimizers()["gd".index(which)]
            if self.toggle:
                self.toggle_optimizer(opt)
            loss = self.loss_of_discriminator(x, z) if which == "d" else self.loss_of_generator(x, z)
            if self.leak != "not cleared" or which == "d":
                opt.zero_grad()
            self.manual_backward(loss)
            opt.step()
            if self.toggle:
                self.untoggle_optimizer(opt)

    def loss_of_discriminator(self, x, z):
        fake = self.generator(z)
        fake = fake if self.leak == "not cleared" else fake.detach()
        return F.softplus(-self.discriminator(x)).mean() + F.softplus(self.discriminator(fake)).mean()

    def loss_of_generator(self, x, z):
        fake = self.generator(z)
        loss = F.softplus(-self.discriminator(fake)).mean()
        if self.leak == "distance":
            loss = loss + (fake - x).abs().mean()
        if self.leak == "features":
            loss = loss + F.mse_loss(self.discriminator[0](fake).mean(0), self.discriminator[0](x).mean(0).detach())
        if self.leak == "weight":
            loss = loss * self.discriminator(x).mean().data
        return loss


def by_plain_autograd(steps, expected):
    """The same steps on the same batches: each example alone, clipped, added up; the generator as ever."""
    module = GAN()
    (of_generator, of_discriminator), params = module.configure_optimizers(), list(module.discriminator.parameters())
    for which, x, z in steps:
        if which == "g":
            of_generator.zero_grad()
            module.loss_of_generator(x, z).backward()
            of_generator.step()
            continue
        total = [torch.zeros_like(p) for p in params]
        for k in range(len(x)):
            grads = torch.autograd.grad(module.loss_of_discriminator(x[k : k + 1], z[k : k + 1]), params)
            factor = min(1.0, float(C / torch.cat([g.flatten() for g in grads]).norm()))
            total = [t + factor * g for t, g in zip(total, grads, strict=True)]
        for p, t in zip(params, total, strict=True):
            p.grad = t / expected
        of_discriminator.step()
    return module


@pytest.mark.parametrize("toggle", [False, True], ids=["", "toggled"])
@pytest.mark.parametrize("order", ["dg", "gd", "dgg", "ggd"])
@pytest.mark.parametrize("batch", [4, 1])
def test_a_private_discriminator_trains_an_ordinary_generator(batch, order, toggle):
    """Both come out as by plain autograd; the discriminator alone is charged, in empty batches as well."""
    module = GAN(order, toggle=toggle)
    scope, trainer = fit(module, batch=batch, part="discriminator")
    wanted = by_plain_autograd(module.steps, batch)
    if batch > 1:  # what noise alone is released for is not among the steps of the module
        assert all(torch.allclose(p, q, atol=1e-4) for p, q in zip(module.parameters(), wanted.parameters(), strict=True))
        assert trainer.global_step == scope.steps * len(order)
    assert scope.accountant.history == [(0.0, batch / 12, 36 // batch)]
    assert [type(optimizer) for optimizer in trainer.optimizers] == [torch.optim.Adam, torch.optim.Adam]
    assert not any(optimizer._optimizer_step_pre_hooks for optimizer in trainer.optimizers)
    assert scope.report().model_verified


@pytest.mark.parametrize("leak", ["distance", "features", "weight", "not cleared"])
def test_gradients_of_private_examples_reach_no_other_optimizer(leak):
    """A generator's loss that looks at private examples, detached or not, stops before anything of them is applied."""
    module = GAN(leak=leak)
    before = [p.detach().clone() for p in module.generator.parameters()]
    with pytest.raises(ScopeError, match="Adam was about to apply gradients that were computed from private examples"):
        fit(module, part="discriminator")
    assert all(torch.equal(p, q) for p, q in zip(module.generator.parameters(), before, strict=True))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "pass part=.* one optimizer over all of them"),
        ({"part": "nobody"}, "part='nobody' .* one optimizer over all of them"),
        ({"part": ["discriminator", "generator"]}, "part=.'discriminator', 'generator'. .* one optimizer over all of them"),
        ({"part": "generator.1"}, "0 of 2 optimizers"),
        ({"part": "discriminator", "target_epsilon": 3.0, "target_delta": 1e-5, "noise_multiplier": None}, "epochs"),
    ],
)
def test_a_part_without_an_optimizer_of_its_own_is_refused(options, said):
    """The error says what can be passed, and nothing was changed. Steps of all optimizers together say nothing of a budget."""
    module = GAN()
    own = dict(vars(module))
    trainer = L.Trainer(max_steps=9, max_epochs=-1, enable_checkpointing=False, **QUIET)
    with (
        pytest.raises(InvalidArgumentError, match=said),
        private_trainer(trainer, module, train_dataloaders=loader(), **OPTIONS | options),
    ):
        pass
    assert dict(vars(module)) == own


class TwoParts(L.LightningModule):
    """Two networks, or one after the other, with an optimizer each; private examples go into both."""

    def __init__(self, chained, together):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(5, 5 if chained else 3), nn.Linear(5, 3)
        self.automatic_optimization = False
        self.chained, self.together = chained, together

    def configure_optimizers(self):
        groups = [{"params": list(net.parameters()), "lr": lr} for net, lr in ((self.first, 0.1), (self.second, 0.2))]
        return torch.optim.SGD(groups) if self.together else [torch.optim.SGD([group]) for group in groups]

    def losses(self, x, y):
        if self.chained:
            return [F.cross_entropy(self.second(torch.tanh(self.first(x))), y)]
        return [F.cross_entropy(self.first(x), y), F.cross_entropy(self.second(x), y)]

    def training_step(self, batch, batch_idx):
        optimizers = [self.optimizers()] if self.together else self.optimizers()
        for opt in optimizers:
            opt.zero_grad()
        self.manual_backward(sum(self.losses(*batch)))
        for opt in optimizers:
            opt.step()


@pytest.mark.parametrize("private", ["first", "second"])
@pytest.mark.parametrize("chained", [False, True], ids=["beside", "chained"])
def test_two_optimizers_on_private_examples_are_refused(chained, private):
    """One of them can be private: what the other would step is stopped, and stays as it was; a second scope is refused."""
    module = TwoParts(chained, together=False)
    other = module.second if private == "first" else module.first
    before = [p.detach().clone() for p in other.parameters()]
    with pytest.raises(ScopeError, match=r"private examples.* One optimizer is private"):
        fit(module, part=private)
    assert all(torch.equal(p, q) for p, q in zip(other.parameters(), before, strict=True))
    trainer = L.Trainer(max_epochs=1, enable_checkpointing=False, **QUIET)
    scopes = [private_trainer(trainer, module, train_dataloaders=loader(), part=part, **OPTIONS) for part in ("first", "second")]
    with scopes[0], pytest.raises(ScopeError, match="in an open private scope already"), scopes[1]:
        pass


@pytest.mark.parametrize("chained", [False, True], ids=["beside", "chained"])
def test_two_parts_in_one_optimizer_are_private_together(chained):
    """What the refusals advise: each example's gradient over both parts is clipped as one, and a step is charged once."""
    module, wanted = TwoParts(chained, together=True), TwoParts(chained, together=True)
    batches = []
    module.losses = lambda x, y: batches.append((x, y)) or TwoParts.losses(module, x, y)
    scope, _ = fit(module)
    assert scope.accountant.history == [(0.0, 4 / 12, 9)]
    optimizer, params = wanted.configure_optimizers(), list(wanted.parameters())
    for x, y in batches:
        total = [torch.zeros_like(p) for p in params]
        for k in range(len(x)):
            grads = torch.autograd.grad(sum(wanted.losses(x[k : k + 1], y[k : k + 1])), params)
            factor = min(1.0, float(C / torch.cat([g.flatten() for g in grads]).norm()))
            total = [t + factor * g for t, g in zip(total, grads, strict=True)]
        for p, t in zip(params, total, strict=True):
            p.grad = t / 4
        optimizer.step()
    assert all(torch.allclose(p, q, atol=1e-6) for p, q in zip(module.parameters(), params, strict=True))
