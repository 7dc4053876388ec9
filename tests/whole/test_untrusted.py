"""What comes from elsewhere: states, files and checkpoints run no code, and what was changed is refused or loaded as it is.

Tests make ``DP_HOOKS_MUTATIONS`` changes at random, from fixed seeds: of a state (a fifth as many of its other kinds), a checkpoint
and ``privacy.json``. Those of a ledger are in ``tests/privacy/accounting/test_ledger.py``.
"""

import copy
import io
import json
import os
import pickle
import random
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from dp_hooks import PrivacyEngineHookBased
from dp_hooks.errors import DPHooksError, InvalidArgumentError
from dp_hooks.integrations.spending import NAME, Spending
from dp_hooks.privacy.accounting.history import as_charge

from ..models import build, in_order, scope_over
from ..mutations import MUTATIONS, mutated_bytes, mutated_tree

KINDS: dict[str, dict[str, Any]] = {
    "flat": {"noise_multiplier": 1.0},
    "adaptive": {"noise_multiplier": 0.5, "clipping": "adaptive", "clipping_options": {"unclipped_num_std": 2.0}},
    "budget": {"noise_multiplier": None, "target_epsilon": 5.0, "target_delta": 1e-5, "epochs": 6},
}


def scope_of(kind: str) -> Any:
    """Return a scope over six examples."""
    options = {"poisson_sampling": True, "accountant": "rdp", "self_check": False, **KINDS[kind]}
    return scope_over(build("mlp"), loader=in_order(6, 3), **options)


def spent(kind: str) -> Any:
    """Return the state of a scope after two steps."""
    with (scope := scope_of(kind)) as (opt, loader):
        for _ in loader:
            opt.step_empty()
    return scope.state_dict()


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_that_was_changed_is_refused_or_is_what_it_says(kind: str) -> None:
    """Nothing but errors of this library, after which the scope is what it was; what is loaded is what stands in the state."""
    state, scope, draw = json.loads(json.dumps(spent(kind))), scope_of(kind), random.Random(0)
    bound, loaded, count = scope._sum.clipping.max_grad_norm, 0, MUTATIONS if kind == "flat" else MUTATIONS // 5
    for _ in range(count):
        changed = mutated_tree(state, draw)
        try:
            scope.load_state_dict(changed)
        except DPHooksError:
            assert scope.accountant.history == []
            assert scope.steps == 0
            assert scope._sum.clipping.max_grad_norm == bound
            continue
        loaded += 1
        assert scope.accountant.history == [as_charge(entry) for entry in changed["history"]]
        assert loaded > 10 or scope.report().epsilon >= 0
        scope = scope_of(kind)
    assert loaded > count // 100


class Runs:
    """What would run code if it were unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("where", ["all of it", "in a part", "in an old file"])
def test_a_checkpoint_that_would_run_code_is_refused(where: str, protocol: int, tmp_path: Path) -> None:
    """It is an error of this library that names the file, nothing ran, and nothing was changed."""
    path, ran, model = tmp_path / "checkpoint.pt", tmp_path / "ran", build("mlp")
    engine = PrivacyEngineHookBased(accountant="rdp")
    engine.save_checkpoint(path=path, module=model)
    content = torch.load(path, weights_only=True)
    if where == "in an old file":
        path.write_bytes(pickle.dumps(Runs(ran), protocol=protocol))
    else:
        torch.save(Runs(ran) if where == "all of it" else {**content, "epoch": Runs(ran)}, path, pickle_protocol=protocol)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(InvalidArgumentError, match=r"path=.*checkpoint\.pt.*weights_only"):
        engine.load_checkpoint(path=path, module=model)
    assert not ran.exists()
    assert all(map(torch.equal, before, model.parameters()))


def changed_checkpoint(raw: bytes, content: Any, draw: random.Random) -> bytes:
    """Change the bytes of a checkpoint, those of the pickle in it, or what is in it."""
    kind, out = draw.randrange(3), io.BytesIO()
    if kind == 0:
        return mutated_bytes(raw, draw)
    if kind == 1:
        torch.save(mutated_tree(content, draw), out)
        return out.getvalue()
    with zipfile.ZipFile(io.BytesIO(raw)) as before, zipfile.ZipFile(out, "w") as after:
        for item in before.infolist():
            data = before.read(item)
            after.writestr(item, mutated_bytes(data, draw) if item.filename.endswith("data.pkl") else data)
    return out.getvalue()


@pytest.mark.filterwarnings("ignore:the checkpoint has")
def test_a_checkpoint_that_was_changed_is_refused_or_is_what_it_says() -> None:
    """Nothing but errors of this library; then model, optimizer and engine are what they were."""
    model, file, draw = build("mlp"), io.BytesIO(), random.Random(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sum(p.square().sum() for p in model.parameters()).backward()
    optimizer.step()
    engine = PrivacyEngineHookBased(accountant="rdp")
    engine.accountant.history = [(1.0, 0.5, 4), (2.0, 0.5, 1)]
    engine.save_checkpoint(path=file, module=model, optimizer=optimizer, checkpoint_dict={"epoch": 3})
    content, loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=True), 0
    fresh = build("mlp")
    own = torch.optim.SGD(fresh.parameters(), lr=0.1, momentum=0.9)
    for p in fresh.parameters():
        torch.nn.init.zeros_(p)
    state = str(own.state_dict())
    for _ in range(MUTATIONS):
        data, engine = changed_checkpoint(file.getvalue(), content, draw), PrivacyEngineHookBased(accountant="rdp")
        try:
            engine.load_checkpoint(path=io.BytesIO(data), module=fresh, optimizer=own)
        except DPHooksError:
            assert not any(p.any() for p in fresh.parameters())
            assert str(own.state_dict()) == state
            assert engine.accountant.history == []
            continue
        loaded += 1
        history = torch.load(io.BytesIO(data), weights_only=True)["privacy_accountant_state_dict"]["history"]
        assert engine.accountant.history == [as_charge(entry) for entry in history]
        fresh = build("mlp")
        own = torch.optim.SGD(fresh.parameters(), lr=0.1, momentum=0.9)
        for p in fresh.parameters():
            torch.nn.init.zeros_(p)
    assert loaded > MUTATIONS // 100


def test_what_a_trainer_keeps_beside_its_checkpoints_is_refused_if_it_was_changed(tmp_path: Path) -> None:
    """A file that may know of more than the checkpoint is not passed over because it cannot be read."""
    state, draw, read = spent("flat"), random.Random(2), 0
    later = {**state, "history": [[1.0, 0.5, 5]], "steps": 5}
    whole = json.dumps(later).encode()
    spending = Spending("resume_from_checkpoint")
    for _ in range(MUTATIONS):
        if draw.random() < 0.5:
            data = mutated_bytes(whole, draw, [b"[" * 50_000])
        else:
            tree = mutated_tree(later, draw)
            data = json.dumps(tree, default=lambda value: str(type(value))).encode()
        (tmp_path / NAME).write_bytes(data)
        scope = None
        try:
            found = spending.latest(copy.deepcopy(state), tmp_path, [])
            read += 1
            scope = scope_of("flat")
            scope.resume(found)
        except DPHooksError:
            assert scope is None or scope.accountant.history == []
            continue
        assert scope.accountant.history[0][2] >= 2  # never less than the checkpoint says
    assert read > MUTATIONS // 100


@pytest.mark.parametrize("history", [None, 3, [3], [[1.0, 0.5]], [[1.0, 0.5, "5"]], "missing"])
def test_spending_that_cannot_be_read_is_not_passed_over(history: Any, tmp_path: Path) -> None:
    """The error names the argument and the folder."""
    state = spent("flat")
    later = {**state, "history": history}
    if history == "missing":
        del later["history"]
    (tmp_path / NAME).write_text(json.dumps(later))
    with pytest.raises(InvalidArgumentError, match=r"resume_from_checkpoint=.*damaged"):
        Spending("resume_from_checkpoint").latest(state, tmp_path, [])
