"""The tests that Opacus ships, run with this library in the place of its engine and its hooks.

The classes are imported from the installed ``opacus.tests``; only the class under test is exchanged. What cannot apply
is listed in ``NOT_APPLICABLE``, with the reason and the test of this suite that covers the same ground.
"""

import unittest
from unittest import mock

import hypothesis
import pytest
import torch

# Before the import below: Opacus's decorators take the number of examples from the profile in force.
hypothesis.settings.register_profile("dp_hooks", max_examples=8, derandomize=True, database=None)
hypothesis.settings.load_profile("dp_hooks")

import opacus.tests.grad_sample_hooks_test as hooks_upstream  # noqa: E402
import opacus.tests.privacy_engine_test as engine_upstream  # noqa: E402

from dp_hooks import HookController, PrivacyEngineHookBased  # noqa: E402

NOT_APPLICABLE = {
    "test_per_layer_clipping": (
        "uses optimizer.signal_skip_step() and p.summed_grad, state that Opacus keeps on the user's parameters; "
        "training/test_release.py checks per-layer clipping on the parameters' move"
    ),
    "test_generate_noise_in_secure_mode": "skipped by Opacus itself; it tests Opacus's own noise function",
    "test_standard_module_validation": (
        "looks for the attribute ft_compute_sample_grad on the user's module, where nothing is put here; "
        "rules/test_rules.py covers modules without a rule"
    ),
}

ENGINE_CLASSES = (
    engine_upstream.PrivacyEngineConvNetHooksTest,
    engine_upstream.PrivacyEngineConvNetFrozenHooksTest,
    engine_upstream.PrivacyEngineTextHooksTest,
    engine_upstream.PrivacyEngineTiedWeightsHooksTest,
    engine_upstream.PrivacyEngineCustomLayerHooksTest,
)
# The cases whose outcome depends on how per-sample gradients are computed also run in mode "functorch".
MODE_CASES = {"test_basic", "test_sample_grad_aggregation", "test_flat_clipping"}


class SeededEngine(PrivacyEngineHookBased):
    """Noise and sampling follow ``torch.manual_seed``, which this library otherwise ignores on purpose."""

    def make_private(self, **kwargs):
        seed = torch.initial_seed()
        kwargs["noise_generator"] = torch.Generator().manual_seed(seed)
        kwargs["data_loader"].generator = torch.Generator().manual_seed(seed)
        return super().make_private(**kwargs)


class TimeFirstEngine(PrivacyEngineHookBased):
    """Opacus's text case leaves ``batch_first=False`` out in one place; the self-check refuses that, so it is put in."""

    def make_private_with_epsilon(self, **kwargs):
        return super().make_private_with_epsilon(**{"batch_first": False, **kwargs})


def _engine_for(cls, name):
    if name in ("test_deterministic_run", "test_noise_level"):  # both rely on torch.manual_seed
        return SeededEngine
    if cls is engine_upstream.PrivacyEngineTextHooksTest and name == "test_make_private_with_epsilon":
        return TimeFirstEngine
    return PrivacyEngineHookBased


def _with_summed_grad(case):
    """Let ``p.summed_grad`` be read off ``p.grad``: without noise the two differ by the batch size only."""
    train = case._train_steps

    def train_steps(model, optimizer, *args, **kwargs):
        train(model, optimizer, *args, **kwargs)
        size = getattr(optimizer, "expected_batch_size", 1)
        for p in model.parameters():
            if p.grad is not None:
                p.summed_grad = p.grad * size

    return mock.patch.object(case, "_train_steps", train_steps)


def _names(cls):
    return unittest.TestLoader().getTestCaseNames(cls)


def _engine_cases():
    for cls in ENGINE_CLASSES:
        for name in _names(cls):
            if name in NOT_APPLICABLE:
                continue
            for mode in ("hooks", "functorch") if name in MODE_CASES else ("hooks",):
                yield pytest.param(cls, name, mode, id=f"{cls.__name__}-{name}-{mode}")


def _run(case):
    result = unittest.TestResult()
    case.run(result)
    problems = [text for _, text in [*result.failures, *result.errors]]
    assert not problems, "\n".join(problems)
    assert result.testsRun == 1
    assert not result.skipped


@pytest.mark.parametrize(("cls", "name", "mode"), list(_engine_cases()))
def test_opacus_engine_case(cls, name, mode, monkeypatch):
    """Opacus's engine test passes with the hook-based engine."""
    monkeypatch.setattr(engine_upstream, "PrivacyEngine", _engine_for(cls, name))
    case = cls(name)
    set_up = case.setUp

    def set_up_in_mode():
        set_up()
        case.GRAD_SAMPLE_MODE = mode

    monkeypatch.setattr(case, "setUp", set_up_in_mode)
    if name == "test_flat_clipping":
        with _with_summed_grad(case):
            _run(case)
    else:
        _run(case)


@pytest.mark.parametrize("name", [n for n in _names(hooks_upstream.GradSampleHooksTest) if n not in NOT_APPLICABLE])
def test_opacus_hooks_case(name, monkeypatch):
    """Opacus's GradSampleHooks test passes with HookController in its place."""
    monkeypatch.setattr(hooks_upstream.GradSampleHooksTest, "CLS", HookController)
    monkeypatch.setattr(hooks_upstream, "GradSampleHooks", HookController)
    _run(hooks_upstream.GradSampleHooksTest(name))


def test_every_exclusion_names_a_case_that_exists():
    """The list of cases that cannot apply has no entry that Opacus does not have."""
    existing = {name for cls in (*ENGINE_CLASSES, hooks_upstream.GradSampleHooksTest) for name in _names(cls)}
    assert set(NOT_APPLICABLE) <= existing
