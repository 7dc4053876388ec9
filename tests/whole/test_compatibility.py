"""The compatibility example: what it says about a model type is what happens, and a wrong engine does not go unnoticed."""

import dataclasses
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from dp_hooks.checks.self_check import SelfCheck
from dp_hooks.rules import registry
from dp_hooks.rules.linear import LINEAR

PATH = Path(__file__).parents[2] / "examples" / "compatibility.py"


@pytest.fixture
def compatibility(monkeypatch):
    """The example as a module."""
    spec = importlib.util.spec_from_file_location("compatibility", PATH)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "compatibility", module)
    spec.loader.exec_module(module)
    return module


class Mixing(nn.Module):
    """Takes part of the batch's mean away from every sample."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 3)

    def forward(self, x):
        return (self.lin(x) - 0.5 * self.lin(x).mean(0)).tanh()


class Apart(Mixing):
    """The same without that."""

    def forward(self, x):
        return self.lin(x).tanh()


def make_model():
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))


def make_inputs():
    return torch.randn(3, 4)


def run_apart(*lines):
    """Run Python in a process of its own: the example forks, and autograd allows no forks once it has threads."""
    start = ["import sys", f"sys.path.insert(0, {str(PATH.parent)!r})", "import compatibility"]
    command = [sys.executable, "-W", "ignore", "-c", "\n".join([*start, *lines])]
    return subprocess.run(command, cwd=PATH.parents[1], check=True, capture_output=True, text=True).stdout


def test_three_types_end_to_end(tmp_path):
    """A text and a vision model come out right, one with BatchNorm refused with the reason; table and JSON say the same."""
    table, results = tmp_path / "table.md", tmp_path / "results.json"
    arguments = "--transformers --types gpt2,vit,resnet --jobs 2 --output".split()
    out = run_apart(f"compatibility.main({[*arguments, str(table), '--json', str(results)]!r})")
    records = {record["type"]: record for record in json.loads(results.read_text())}
    assert {name: record["verdict"] for name, record in records.items()} == {
        "gpt2": "right", "vit": "right", "resnet": "refused"
    }  # fmt: skip
    assert "BatchNorm2d" in records["resnet"]["reason"]
    assert records["resnet"]["mixes"]
    assert not records["gpt2"]["mixes"]
    text = table.read_text()
    assert "| all | 3 | 2 | 1 | 0 | 0 | 0 | 0 |" in text
    assert "- `resnet` ResNetForImageClassification (samples mix): UnsupportedModelError" in text
    assert "[3/3: 2 right, 1 refused]" in out


def break_the_engine(checks):
    """Swap the samples of linear layers, and blind the self-check unless it ``checks``."""

    def swapped(call):
        return {name: grads.roll(1, 0) for name, grads in LINEAR.grad_samples(call).items()}

    registry._RULES[nn.Linear] = dataclasses.replace(LINEAR, grad_samples=swapped, outer_products=None, alike=None)
    if not checks:
        SelfCheck.check_calls = lambda self, samples, captured=None: None


def test_a_wrong_engine_is_reported():
    """With the samples of linear layers swapped, the step is refused by the self-check, or wrong if that is blind."""
    out = run_apart(
        "import json",
        "from tests.whole.test_compatibility import break_the_engine",
        "for checks in (True, False):",
        "    break_the_engine(checks)",
        "    print(json.dumps(compatibility.run_all(['vit'], jobs=1)))",
    )
    records = [json.loads(line)[0] for line in out.splitlines() if line.startswith("[{")]
    assert [record["verdict"] for record in records] == ["refused", "wrong"]
    assert all(re.search(r"vit\.\S+\.(weight|bias)", record["reason"]) for record in records)


def test_a_wrong_verdict_ends_with_an_error_code(compatibility, monkeypatch):
    """The command fails if any verdict is wrong."""
    record = {"type": "vit", "family": "vision", "verdict": "wrong", "reason": "moved otherwise"}
    monkeypatch.setattr(compatibility, "run_all", lambda *args, **kwargs: [record])
    with pytest.raises(SystemExit) as raised:
        compatibility.main(["--transformers", "--types", "vit"])
    assert raised.value.code == 1


def test_models_that_mix_samples_are_noted(compatibility, monkeypatch):
    """A model whose samples mix is refused, and noted as such; one whose samples do not is right."""
    inputs = {"x": torch.randn(3, 4, dtype=torch.float64)}
    monkeypatch.setattr(compatibility, "_outputs", lambda found: [found])
    record = compatibility.judge(Mixing().double(), inputs)
    assert (record["verdict"], record["mixes"]) == ("refused", True)
    record = compatibility.judge(Apart().double(), inputs)
    assert (record["verdict"], record["mixes"]) == ("right", False)


def test_what_cannot_be_built_is_not_counted_as_refused(compatibility):
    """A part of another model has no class, and a type that is not finished in time is not built."""
    (part,) = compatibility.run_all(["align_text_model"], jobs=1)
    assert part["verdict"] == "no class"
    (late,) = compatibility.run_all(["gpt2"], jobs=1, seconds=0.01)
    assert (late["verdict"], late["reason"]) == ("not built", "not finished after 0 s")


def test_a_model_of_ones_own_is_explained(compatibility, capsys):
    """``--model`` with ``--inputs`` prints the explanation of that model."""
    compatibility.main(
        ["--model", "tests.whole.test_compatibility:make_model", "--inputs", "tests.whole.test_compatibility:make_inputs"]
    )
    out = capsys.readouterr().out
    assert "Sequential in training mode" in out
    assert "checked against single-sample autograd: yes" in out


def test_a_model_of_ones_own_without_inputs_needs_a_configuration(compatibility):
    """Without ``--inputs`` a model that is not from transformers is an error that says what to give."""
    with pytest.raises(SystemExit, match="give --inputs"):
        compatibility.main(["--model", "tests.whole.test_compatibility:make_model"])
