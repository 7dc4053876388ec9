"""Small changes to the package, each of which the test suite has to notice.

Run by hand: ``python -m tests.seeded_bugs`` tries all, ``python -m tests.seeded_bugs 3 7`` some of them. Each is made in a copy of
the repository, in which the tests named with it are run and, if they pass, the whole suite (not with ``--fast``).
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOISE, CLIPPING = "tests/privacy/noise tests/training", "tests/privacy/clipping tests/training"
RULES, SAMPLING = "tests/rules tests/gradients tests/whole/test_laws.py", "tests/privacy/sampling"
TRAINERS = "tests/integrations"
SECURE = "tests/privacy/noise tests/privacy/sampling/test_poisson.py"
ACCOUNTS, CHECKS = "tests/privacy/accounting tests/training", "tests/checks tests/whole/test_faults.py"

# What it is, the file in the package, what stands there, what is put in its place, and the tests that should notice.
LEDGER = "tests/privacy/accounting/test_ledger.py"
BUGS = [
    (
        "noise times 0.95",
        "privacy/noise/standard_deviation.py",
        "return noise_multiplier * sensitivity",
        "return 0.95 * noise_multiplier * sensitivity",
        NOISE,
    ),
    (
        "noise not scaled by the sensitivity",
        "privacy/noise/standard_deviation.py",
        "return noise_multiplier * sensitivity",
        "return noise_multiplier",
        NOISE,
    ),
    ("noise divided twice", "training/optimizer.py", "add_(totals, std, scale, ", "add_(totals, std * scale, scale, ", NOISE),
    (
        "the same noise for every tensor",
        "privacy/noise/gaussian.py",
        "        draw.normal_(0.0, std * scale, generator=generator)\n        if total",
        "        generator.manual_seed(3)\n        draw.normal_(0.0, std * scale, generator=generator)\n        if total",
        NOISE,
    ),
    (
        "bound times 1.01",
        "privacy/clipping/fixed.py",
        "return (bound / norms).clamp(max=1.0)",
        "return (1.01 * bound / norms).clamp(max=1.0)",
        CLIPPING,
    ),
    (
        "small gradients are scaled up",
        "privacy/clipping/fixed.py",
        "return (bound / norms).clamp(max=1.0)",
        "return bound / norms",
        CLIPPING,
    ),
    (
        "squared norm taken for the norm",
        "privacy/clipping/norms.py",
        "total = stacked.sum(0).sqrt()",
        "total = stacked.sum(0)",
        CLIPPING,
    ),
    (
        "norm of the largest parameter only",
        "privacy/clipping/norms.py",
        "total = stacked.sum(0).sqrt()",
        "total = stacked.amax(0).sqrt()",
        CLIPPING,
    ),
    (
        "sensitivity of the largest group",
        "privacy/clipping/fixed.py",
        "return math.sqrt(sum(bound * bound for bound in self.bounds))",
        "return max(self.bounds)",
        CLIPPING,
    ),
    (
        "automatic clipping without gamma",
        "privacy/clipping/fixed.py",
        "return self._bound / (norms + self.gamma)",
        "return self._bound / norms",
        CLIPPING,
    ),
    (
        "count of adaptive clipping for free",
        "privacy/clipping/adaptive.py",
        "return noise_multiplier / math.sqrt((1 - share) * (1 + share))",
        "return noise_multiplier",
        CLIPPING,
    ),
    (
        "count of adaptive clipping without noise",
        "privacy/clipping/adaptive.py",
        "if noise_multiplier > 0:\n            noise.add_",
        "if noise_multiplier < 0:\n            noise.add_",
        CLIPPING,
    ),
    (
        "samples that are not finite count",
        "privacy/clipping/norms.py",
        "self.finite = self.joint.isfinite()",
        "self.finite = torch.ones_like(self.joint, dtype=torch.bool)",
        CLIPPING,
    ),
    (
        "release of what is not finite",
        "training/optimizer.py",
        "if not self._noise.add_(totals, std, scale, sensitivity=clipping.sensitivity):",
        "if not self._noise.add_(totals, std, scale, sensitivity=clipping.sensitivity) and False:",
        "tests/training tests/whole/test_traps.py",
    ),
    (
        "rate times 0.9",
        "privacy/sampling/scheme.py",
        "return self.sample_rate if self.poisson else 1.0",
        "return 0.9 * self.sample_rate if self.poisson else 1.0",
        ACCOUNTS,
    ),
    (
        "drawn at 1.1 times the rate",
        "privacy/sampling/poisson.py",
        "return uniform < self.sample_rate",
        "return uniform < 1.1 * self.sample_rate",
        SAMPLING,
    ),
    (
        "drawn in float32",
        "privacy/sampling/poisson.py",
        "dtype=torch.float64, device=self.generator.device, generator",
        "dtype=torch.float32, device=self.generator.device, generator",
        SAMPLING,
    ),
    (
        "rate from whole batches",
        "privacy/sampling/scheme.py",
        "batch_size / examples, float(batch_size)",
        "1 / len(loader), float(batch_size)",
        SAMPLING,
    ),
    (
        "divisor truncated to an integer",
        "privacy/sampling/scheme.py",
        "return SamplingPlan(examples, rate, rate * examples,",
        "return SamplingPlan(examples, rate, float(int(rate * examples)),",
        SAMPLING + " tests/training",
    ),
    (
        "divided by the drawn size",
        "training/optimizer.py",
        "scale = 1 / self.expected_batch_size",
        "scale = 1 / max(1, self.physical_batch.size if self.physical_batch else 1)",
        "tests/training",
    ),
    ("no charge", "training/optimizer.py", "        self._meter.charge_step(foreign=foreign)\n", "", ACCOUNTS),
    (
        "no charge for empty batches",
        "training/optimizer.py",
        "        self._meter.charge_step(foreign=foreign)\n",
        "        empty or self._meter.charge_step(foreign=foreign)\n",
        ACCOUNTS,
    ),
    (
        "foreign steps charged at the loader's rate",
        "privacy/accounting/meter.py",
        "self._charge(1.0)",
        "self._charge(self.charged_rate)",
        ACCOUNTS,
    ),
    (
        "a pass in order is not charged",
        "privacy/accounting/meter.py",
        "        self._charge(self.charged_rate)\n        self._pass_sigma",
        "        self._pass_sigma",
        ACCOUNTS,
    ),
    (
        "budget may be overdrawn by one",
        "privacy/accounting/meter.py",
        "return max(0, self._allowed - own)",
        "return max(0, self._allowed - own + 1)",
        ACCOUNTS,
    ),
    (
        "budget is not checked for foreign steps",
        "privacy/accounting/meter.py",
        "if not self._allows_one_more(1.0):",
        "if False:",
        ACCOUNTS,
    ),
    (
        "epsilon of no noise is finite",
        "privacy/accounting/opacus.py",
        "if any(sigma == 0 for sigma, _, _ in history):",
        "if False:",
        ACCOUNTS,
    ),
    (
        "sigma rounded up in long histories",
        "privacy/accounting/upper_bound.py",
        "math.floor(math.log2(sigma)",
        "math.ceil(math.log2(sigma)",
        ACCOUNTS,
    ),
    (
        "upper bound with twice delta",
        "privacy/accounting/upper_bound.py",
        "_renyi_epsilon(history, delta))",
        "_renyi_epsilon(history, 2 * delta))",
        ACCOUNTS,
    ),
    (
        "no noise for parameters without gradient",
        "training/optimizer.py",
        "self._noise.add_(totals, std, scale, ",
        "self._noise.add_([total for total in totals if bool(total.any())], std, scale, ",
        NOISE,
    ),
    (
        "parts of a logical batch overwrite each other",
        "training/clipped_sum.py",
        "self._totals[p].add_(total) if p in self._totals else total",
        "total",
        "tests/training",
    ),
    (
        "each part is released",
        "training/optimizer.py",
        "finishes = batch is None or batch.last",
        "finishes = True",
        "tests/training",
    ),
    (
        "the sum of a batch left early stays",
        "training/optimizer.py",
        "        if part.index == 0:\n            self._sum.clear()\n",
        "        if part.index == 0:\n            pass\n",
        "tests/training",
    ),
    ("no cleanup", "training/scope.py", "            stack.callback(controller.cleanup)\n", "", "tests/training tests/capture"),
    (
        "summed gradients are left in p.grad",
        "capture/calls/session.py",
        "            param.grad = None\n            self.running_pass()",
        "            self.running_pass()",
        "tests/capture tests/training",
    ),
    ("cross terms halved", "rules/ghost_norms.py", "(a, b, 2 * a.scale * b.scale)", "(a, b, a.scale * b.scale)", RULES),
    ("blocks of long sequences without cross terms", "rules/outer.py", "(one, two, 2 * weight)]", "(one, two, 0 * weight)]", RULES),
    ("rounding of Gram norms not added", "rules/ghost_norms.py", "norms = total + slack\n", "norms = total.clone()\n", RULES),
    (
        "padding rows counted",
        "rules/embedding.py",
        "    if padding is not None:\n        g = g.masked_fill",
        "    if False:\n        g = g.masked_fill",
        RULES,
    ),
    ("mean of bags over all ids", "rules/embedding.py", "counted.sum(1, keepdim=True).clamp(min=1)", "ids.shape[1]", RULES),
    (
        "bias of the first token only",
        "rules/linear.py",
        "_as_tokens(wide(call.grad), _tokens(call)).sum(1)",
        "_as_tokens(wide(call.grad), _tokens(call))[:, 0]",
        RULES,
    ),
    (
        "bias of convolutions averaged",
        "rules/convolution.py",
        'out["bias"] = wide(call.grad).flatten(2).sum(2)',
        'out["bias"] = wide(call.grad).flatten(2).mean(2)',
        RULES,
    ),
    (
        "groups of convolutions mixed",
        "rules/convolution.py",
        'if "weight" not in call.names or layer.groups > 1:',
        'if "weight" not in call.names:',
        RULES,
    ),
    (
        "eps of layer norm forgotten",
        "rules/normalisation.py",
        "layer.normalized_shape, eps=layer.eps) if",
        "layer.normalized_shape) if",
        RULES,
    ),
    (
        "the mean over the batch is not undone",
        "capture/calls/session.py",
        'return float(samples) if self.loss_reduction == "mean" else 1.0',
        "return 1.0",
        RULES + " tests/capture",
    ),
    (
        "a use of a parameter forgotten",
        "gradients/sample_gradients.py",
        "                    total.add_(value)\n",
        "                    pass\n",
        RULES,
    ),
    (
        "self-check never runs",
        "checks/self_check.py",
        "        if samples == 0 or recorder.paused:\n            return False",
        "        return False",
        CHECKS,
    ),
    (
        "self-check of values off",
        "checks/comparison.py",
        "        for rows in parts_of(again.samples, twice=again.has_scalar, alone=alone):",
        "        for rows in []:",
        CHECKS,
    ),
    (
        "self-check of gradients lax",
        "checks/compare.py",
        "_SAME_PASS = {torch.float64: 1e-5, torch.float32: 5e-4}",
        "_SAME_PASS = {torch.float64: 2e-1, torch.float32: 2e-1}",
        CHECKS,
    ),
    (
        "state between batches not looked at",
        "checks/comparison.py",
        "if again.samples < 2 or (kept and not now.unlike(before)):",
        "if again.samples < 2 or before:",
        CHECKS,
    ),
    ("gates not tried", "checks/comparison.py", "if samples > 1 and without.gates:", "if False:", CHECKS),
    (
        "spot checks never drawn",
        "checks/spot_check.py",
        "self.now = wanted and _ENTROPY.random() < self._rate",
        "self.now = False",
        CHECKS,
    ),
    (
        "criterion is always all of the loss",
        "checks/criterion.py",
        "return self._off is not None and float(self._off) < _OTHER_TERMS",
        "return True",
        CHECKS,
    ),
    (
        "number of rows not compared",
        "training/rows_are_examples.py",
        "if expected is None or samples == expected:",
        "if True:",
        "tests/training tests/whole/test_programs.py",
    ),
    (
        "batches read ahead not noticed",
        "training/rows_are_examples.py",
        "            if len(self._unused) > 1:\n",
        "            if False:\n",
        "tests/training tests/whole/test_programs.py",
    ),
    (
        "collate functions may mix",
        "training/scope.py",
        "if self._wants_collate_check:",
        "if False:",
        "tests/privacy/sampling tests/whole/test_programs.py",
    ),
    (
        "padding not looked at",
        "checks/padding.py",
        "            if off > tolerance(",
        "            if False and off > tolerance(",
        CHECKS,
    ),
    (
        "hooks on parameters allowed",
        "capture/validate.py",
        "if not all(isinstance(hook, LeakHook) for hook in hooks):",
        "if False:",
        "tests/training tests/capture",
    ),
    (
        "generators survive a fork",
        "privacy/noise/gaussian.py",
        "if os.getpid() != self._process:",
        "if False:",
        "tests/training tests/privacy/noise",
    ),
    (
        "noise of small tensors drawn once",
        "privacy/noise/gaussian.py",
        "        draw.normal_(0.0, std * scale, generator=generator)\n        if scale",
        "        if not hasattr(self, 'once'):\n            draw.normal_(0.0, std * scale, generator=generator)\n"
        "        self.once = True\n        if scale",
        NOISE,
    ),
    (
        "small tensors not divided",
        "privacy/noise/gaussian.py",
        "            torch._foreach_mul_(totals, scale)",
        "            pass",
        NOISE,
    ),
    (
        "norms of small gradients without their scale",
        "gradients/joined.py",
        "sum_of_squares(self.rows) * self.scale**2",
        "sum_of_squares(self.rows) * self.scale",
        RULES,
    ),
    (
        "sums of small gradients without their scale",
        "gradients/joined.py",
        "factor.to(rows.dtype) * self.scale",
        "factor.to(rows.dtype)",
        RULES,
    ),
    (
        "small gradients of the first group only",
        "gradients/joined.py",
        "itertools.groupby(self.params, key=lambda p: id(factors[p]))",
        "itertools.groupby(self.params, key=lambda p: 0)",
        RULES,
    ),
    (
        "gradients of single samples not compared where there are rows",
        "checks/gradient_comparison.py",
        "if again.samples > 1 or again.has_scalar or not agreed:",
        "if again.has_scalar or not agreed:",
        CHECKS,
    ),
    (
        "only the last call of a criterion",
        "checks/criterion.py",
        "for call in self._used():",
        "for call in self._used()[-1:]:",
        CHECKS,
    ),
    (
        "evaluations not looked at",
        "capture/model_calls.py",
        "if session.recorder is not None and session.enabled:",
        "if session.recorder is not None and session.enabled and module.training:",
        CHECKS,
    ),
    (
        "attributes that change later not looked at",
        "checks/self_check.py",
        "or recorder.quiet or recorder.changed:",
        "or recorder.quiet:",
        CHECKS,
    ),
    (
        "gradients outside the model forgotten",
        "training/outside.py",
        "if id(leaf) in held and leaf.grad is grad]",
        "if id(leaf) in held and leaf.grad is grad and False]",
        "tests/training",
    ),
    (
        "what evaluations left is tried once only",
        "capture/calls/call_recorder.py",
        "            self.left_quietly[what] = (",
        "            if not self.checked:\n                self.left_quietly[what] = (",
        CHECKS,
    ),
    ("only the next call after one that left something", "checks/comparison.py", "_LATER = 8", "_LATER = 1", CHECKS),
    (
        "evaluations with gradients forgotten",
        "capture/calls/call_recorder.py",
        "self.quiet = [call for call in self.quiet if not call.reached]",
        "self.quiet = [call for call in self.quiet if not call.with_gradients]",
        CHECKS,
    ),
    (
        "modules in lists not looked into",
        "capture/calls/module_state.py",
        "            self._waiting += hidden\n",
        "            hidden.clear()\n",
        CHECKS,
    ),
    (
        "writing to trained parameters not looked at",
        "checks/left_behind.py",
        "if unlike.trained:",
        "if unlike.trained and not found:",
        CHECKS,
    ),
    (
        "tensors in attributes not written back",
        "capture/calls/undisturbed.py",
        "                write_back(tensor, value)\n",
        "                assert tensor is not None or value\n",
        CHECKS,
    ),
    ("places in rows not counted", "training/row_order.py", "* _PRIME % _BELOW + 1", "* 0 + 1", "tests/training"),
    (
        "whole numbers that are alike not told apart",
        "capture/discovery.py",
        "tell_apart=True, whole_numbers=True)",
        "tell_apart=True, whole_numbers=False)",
        "tests/capture",
    ),
    (
        "operations with other switches are the same",
        "capture/calls/trace.py",
        "operation = (function.name, where, named, *_kinds(args, sized))",
        "operation = (function.name, where, named, len(args))",
        CHECKS,
    ),
    (
        "what a criterion leaves not looked at",
        "checks/criterion.py",
        "if any(t is not output for t in left):",
        "if not left and any(t is not output for t in left):",
        CHECKS,
    ),
    (
        "no other values of parameters",
        "checks/comparison.py",
        "for sign in (1, -1):\n                for",
        "for sign in ():\n                for",
        CHECKS,
    ),
    ("other values of one sign", "checks/other_weights.py", "p.copy_(sign * (mean", "p.copy_(abs(sign) * (mean", CHECKS),
    (
        "other values stay where a forward pass puts new data",
        "checks/other_weights.py",
        "            if p.data.data_ptr() != data.data_ptr():\n                p.data = data\n",
        "",
        CHECKS,
    ),
    (
        "gradients of a few samples without those of extreme size",
        "checks/comparison.py",
        "first = extreme_samples(self._norms, samples, ends=False) if known else []",
        "first = []",
        CHECKS,
    ),
    (
        "stacked calls in the wrong order",
        "gradients/stacked.py",
        "return torch.stack(tensors, axis + 1).flatten(axis, axis + 1)",
        "return torch.stack(tensors, axis).flatten(axis, axis + 1)",
        "tests/gradients tests/training",
    ),
    (
        "norms with other settings are computed as one",
        "rules/normalisation.py",
        'getattr(module, "num_groups", None), module.eps)',
        'getattr(module, "num_groups", None))',
        "tests/gradients tests/training",
    ),
    ("rare whole numbers not tried", "_no_randomness.py", "        elif name in COUNTS and", "        elif name in () and", CHECKS),
    (
        "coins of samples never fall in checks",
        "_no_randomness.py",
        "if name in BERNOULLI and not self.varied:",
        "if name in BERNOULLI:",
        "tests/checks/test_masks.py",
    ),
    (
        "nothing is dropped in checks",
        "_no_randomness.py",
        "return self.masks.make(x, p) if self.varied else None",
        "return None",
        "tests/checks/test_masks.py",
    ),
    (
        "large masks are constants in checks",
        "_no_randomness.py",
        "(out.numel() > _COIN or self._may_be_rows(out))",
        "self._may_be_rows(out)",
        "tests/checks/test_masks.py",
    ),
    (
        "three of many choices are tried",
        "_no_randomness.py",
        "TRIALS, FEW_TRIALS = 1 + len(_LEVELS), 1 + _ALL_ALIKE",
        "TRIALS, FEW_TRIALS = 1 + _ALL_ALIKE, 1 + _ALL_ALIKE",
        "tests/checks/test_masks.py",
    ),
    ("gradients behind zeros not compared", "checks/comparison.py", "if gradients and again.is_finite:", "if False:", CHECKS),
    (
        "hooks inside a model hand out what is in it",
        "checks/criterion.py",
        "if index == 0 and self._controller.hands_out:",
        "if False:",
        CHECKS,
    ),
    ("no reset gate in the gradient of the state", "rules/recurrent.py", "[*both, dn * r]", "[*both, dn]", RULES),
    (
        "joined uses lose a scale",
        "rules/outer.py",
        "first = OuterProducts(left, right, first.shape, first.scale)",
        "first = OuterProducts(left, right, first.shape)",
        RULES,
    ),
    (
        "large calls may be overwritten before the step",
        "gradients/sinks.py",
        "if t._version != version]",
        "if t._version < version]",
        "tests/gradients",
    ),
    (
        "weights are forgotten after norms were taken",
        "training/clipped_sum.py",
        "clipped = [factor * weights.to(factor) for factor in clipped]",
        "clipped = [factor * 1.0 for factor in clipped]",
        CLIPPING,
    ),
    (
        "norms without weights",
        "privacy/clipping/norms.py",
        "self._squares * weights.to(self._squares).square()",
        "self._squares * weights.to(self._squares)",
        CLIPPING,
    ),
    (
        "powers of a criterion's loss count as linear",
        "checks/linear_path.py",
        "if node.name() not in _LINEAR:",
        "if False:",
        CHECKS,
    ),
    (
        "tokens of a trainer's examples are not counted",
        "integrations/token_losses.py",
        "1 / tokens.float()",
        "1 + 0 * tokens.float()",
        TRAINERS,
    ),
    (
        "a trainer goes on with what the checkpoint knows only",
        "integrations/spending.py",
        "        for later in known:",
        "        for later in ():",
        TRAINERS,
    ),
    (
        "noise on the grid for the sensitivity before rounding",
        "privacy/noise/grid.py",
        "std / sensitivity * (sensitivity / spacing + root)",
        "std / spacing",
        SECURE,
    ),
    (
        "sums are cut off to the grid, not rounded",
        "privacy/noise/grid.py",
        "(numbers / self.spacing).round_()",
        "(numbers / self.spacing)",
        SECURE,
    ),
    (
        "sums keep what lies between the points of the grid",
        "privacy/noise/secure.py",
        ".add_(numbers.mul_(0))",
        ".add_(numbers.remainder_(grid.spacing), alpha=scale)",
        SECURE,
    ),
    (
        "one key for all calls",
        "privacy/noise/secret_bytes.py",
        "    def read(count: int) -> bytearray:\n        cipher: Any = Cipher"
        "(algorithms.ChaCha20(os.urandom(32), bytes(4) + os.urandom(12))",
        "    key = os.urandom(32), bytes(4) + os.urandom(12)\n\n"
        "    def read(count: int) -> bytearray:\n        cipher: Any = Cipher(algorithms.ChaCha20(*key)",
        SECURE,
    ),
    (
        "cells next to the right ones",
        "privacy/noise/rounded_gaussian.py",
        "torch.where(share < begins, first, alias)",
        "torch.where(share < begins, first, alias + 1)",
        SECURE,
    ),
    (
        "numbers whose digits do not decide are taken as they are",
        "privacy/noise/rounded_gaussian.py",
        "    if left.numel():",
        "    if left.numel() < 0:",
        SECURE,
    ),
    (
        "the table's first weights are off by one part in 100,000",
        "privacy/noise/normal_table.py",
        "weights[0] += (1 << BITS) - sum(weights)",
        "weights[1] -= weights[1] // 100_000\n    weights[0] += (1 << BITS) - sum(weights)",
        SECURE,
    ),
    (
        "secure batches from PyTorch's generator",
        "privacy/sampling/loader.py",
        "SecurePoissonSampler(*drawn) if plan.secure else",
        "SecurePoissonSampler(*drawn) if False else",
        SECURE,
    ),
    (
        "a state forgets what was charged",
        "training/saved_state.py",
        "        meter.accountant.history = history\n",
        "",
        "tests/training/test_saved_state.py",
    ),
    (
        "a lightning checkpoint without what was spent is taken",
        "integrations/lightning_checkpoints.py",
        "        if KEY not in checkpoint:",
        "        if False:",
        TRAINERS,
    ),
    (
        "the scale of a GradScaler is left on the gradients",
        "training/loss_scale.py",
        "torch.full((samples,), 1 / self.factor, device=device)",
        "torch.full((samples,), 1.0, device=device)",
        "tests/training/test_loss_scale.py",
    ),
    (
        "a charge is not on the disk before its release",
        "privacy/accounting/ledger_file.py",
        "            os.fsync(self._descriptor)\n",
        "",
        LEDGER,
    ),
    (
        "a ledger forgets what was lost with a process",
        "privacy/accounting/open_ledger.py",
        "        return whole\n",
        "        return history\n",
        LEDGER,
    ),
    (
        "a total over runs knows of this run alone",
        "privacy/accounting/open_ledger.py",
        "history = [*self.spent.history, *self._brought, (sigma, rate, steps)]",
        "history = [*self._brought, (sigma, rate, steps)]",
        LEDGER,
    ),
    (
        "accumulated batches are charged at the rate of one",
        "training/prepared.py",
        "loader.batch_sampler.batch_size * accumulated",
        "loader.batch_sampler.batch_size",
        "tests/integrations/test_accelerate.py",
    ),
]


def survives(number: int, *, whole_suite: bool = True) -> bool:
    """Make change ``number`` in a copy, and run tests; whether all of them pass."""
    what, file, old, new, tests = BUGS[number]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "__pycache__", ".*_cache", "*.egg-info"))
        path = copy / "dp_hooks" / file
        text = path.read_text(encoding="utf-8")
        assert text.count(old) == 1, f"{what}: {text.count(old)} places in {file}"
        path.write_text(text.replace(old, new), encoding="utf-8")
        for selected in (tests.split(), *([[]] if whole_suite else [])):
            command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *selected]
            run = subprocess.run(command, cwd=copy, env=_environment(copy), capture_output=True, text=True, check=False)
            if re.search(r"\d failed", run.stdout):
                return False
            assert run.returncode == 0, f"{what}: {run.stdout[-2000:]}{run.stderr[-2000:]}"
    return True


def _environment(copy: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(copy)}


if __name__ == "__main__":
    chosen = [int(number) for number in sys.argv[1:] if number.isdigit()] or range(len(BUGS))
    alive = []
    for number in chosen:
        began = time.monotonic()
        alive += [BUGS[number][0]] if (survived := survives(number, whole_suite="--fast" not in sys.argv)) else []
        print(
            f"{number:3} {'SURVIVES' if survived else 'noticed'}  {BUGS[number][0]}  ({time.monotonic() - began:.0f} s)", flush=True
        )
    print(f"{len(alive)} of {len(chosen)} survive: {alive}")
