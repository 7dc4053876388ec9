"""README tells the truth: its code runs, its signatures, links, paths, options and error texts exist.

A block of Python in README is one of two kinds, and all of them are run. One that begins with an import is a complete
program and runs in a namespace of its own. Any other is a piece of the guide, and runs in a fresh copy of :func:`prelude`,
which holds the names of the quick start, with fewer examples.
"""

import ast
import inspect
import os
import re
import tempfile
import textwrap
from contextlib import redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import GPT2Config, GPT2LMHeadModel

import dp_hooks
from dp_hooks import PrivacyReport, errors, private_training
from dp_hooks.errors import SelfCheckError
from dp_hooks.training.nonprivate_statistics import NonprivateStatistics

ROOT = Path(__file__).parents[2]
PACKAGE = Path(dp_hooks.__file__).parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
LINES = README.splitlines()
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))

# Objects that the library hands out and nobody builds: the reference shows what can be called on them instead.
HANDED_OUT = {
    "PrivateTraining": ("get_epsilon", "report", "paused", "state_dict", "load_state_dict"),
    "PrivateOptimizer": ("zero_grad", "step", "step_empty", "attach_step_hook", "keep_rows", "weigh_rows", "skip_batch"),
    "PrivateDataLoader": (),
    "PrivacyPlan": ("as_dict", "plot"),
    "PrivacyReport": ("as_dict", "as_json", "as_markdown", "plot"),
    "Spending": ("as_dict",),
    "Explanation": ("as_dict",),
}
WIDTH = 150


def fenced(language):
    """Return ``(line number, text)`` of every block fenced as ``language``."""
    pattern = re.compile(rf"^```{language}\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    return [(README.count("\n", 0, found.start()) + 2, found[1]) for found in pattern.finditer(README)]


PYTHON = dict(fenced("python"))
PROSE = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)


def section(title):
    """Return the text from the heading ``title`` to the next one of its level or above."""
    start = next(i for i, line in enumerate(LINES) if re.fullmatch(rf"#+ {re.escape(title)}", line))
    level = len(LINES[start]) - len(LINES[start].lstrip("#"))
    rest = LINES[start + 1 :]
    inside = False
    for i, line in enumerate(rest):
        inside ^= line.startswith("```")
        if not inside and re.match(rf"#{{1,{level}}} ", line):
            return "\n".join(rest[:i])
    return "\n".join(rest)


def spans(text):
    """Return the code spans of a piece of prose."""
    return re.findall(r"(?<!`)`([^`]+)`(?!`)", text)


def rows(text):
    """Return the cells of the tables in ``text``, without heads."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:]]


def block_of(title):
    """Return the line number of the first Python block under the heading ``title``."""
    return next(number for number, text in PYTHON.items() if text in section(title))


def prelude():
    """Names that pieces of the guide use: those of the quick start, a batch, ``train_epoch``, and a small language model."""
    inputs = torch.randn(300, 20)
    labels = (inputs[:, 0] > 0).long()
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 2))
    loader = DataLoader(TensorDataset(inputs, labels), batch_size=150, shuffle=True)
    sizes = {"vocab_size": 50, "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2}
    language_model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2))
    mask = (torch.arange(12) < torch.randint(3, 12, (20, 1))).long()
    texts = TensorDataset(torch.randint(3, 50, (20, 12)) * mask, mask)
    names = {
        **{name: getattr(dp_hooks, name) for name in dp_hooks.__all__},
        "torch": torch,
        "nn": nn,
        "F": F,
        "model": model,
        "optimizer": torch.optim.Adam(model.parameters(), lr=1e-2),
        "loader": loader,
        "criterion": nn.CrossEntropyLoss(),
        "target": {"target_epsilon": 8, "target_delta": 1e-5, "epochs": 10, "accountant": "rdp"},  # "prv" takes longer
        "x": inputs[:8],
        "y": labels[:8],
        "language_model": language_model,
        "text_optimizer": torch.optim.Adam(language_model.parameters(), lr=1e-3),
        "text_loader": DataLoader(texts, batch_size=10),
    }
    exec(PYTHON[block_of("The scope")].split("\n\n")[0], names)  # train_epoch
    return names


@cache
def run(number):
    """Run the block that begins at a line; return its names and what it printed."""
    torch.manual_seed(0)
    text = PYTHON[number]
    complete = text.startswith(("import ", "from "))
    names, printed, before = {} if complete else prelude(), StringIO(), Path.cwd()
    code = compile("\n" * (number - 1) + text, str(ROOT / "README.md"), "exec")  # errors then point into README
    with tempfile.TemporaryDirectory() as directory, redirect_stdout(printed):
        os.chdir(directory)
        try:
            exec(code, names)
        finally:
            os.chdir(before)
    return names, printed.getvalue()


@pytest.mark.filterwarnings("ignore:the privacy budget is used up", "ignore:Optimal order")
@pytest.mark.parametrize("number", PYTHON)
def test_code_runs(number):
    """Every block of Python runs: programs on their own, pieces of the guide with the names of the quick start."""
    run(number)


def test_the_quick_start_learns_and_is_verified():
    """The quick start ends within its budget, with a useful model and a report that says that the loss was verified."""
    names, printed = run(block_of("Quick start"))
    assert re.search(r"^  loss +verified$", printed, re.MULTILINE)
    assert 7.9 < names["scope"].get_epsilon(1e-5) <= 8
    assert names["accuracy"] > 0.85


def test_a_continued_run_takes_exactly_the_steps_that_were_left():
    """A scope that is handed what was spent takes the rest of the planned steps, and ends at the same epsilon."""
    names, _ = run(block_of("Saving and continuing a run"))
    scope = names["scope"]
    assert scope.steps == 10 * len(names["loader"])
    assert sum(steps for _, _, steps in scope.accountant.history) == 10 * len(names["loader"])
    assert 7.9 < scope.get_epsilon(1e-5) <= 8


def test_the_loss_to_copy_is_that_of_transformers_for_every_text_alone():
    """The loss per text equals what the model of transformers gives for that text without its padding."""
    names, _ = run(block_of("Language models and mixed precision"))
    model, ids, mask = names["language_model"].eval(), *names["text_loader"].dataset.tensors
    with torch.no_grad():
        losses = names["train_step"].__wrapped__(model, (ids, mask))
        alone = [model(input_ids=i[m == 1][None], labels=i[m == 1][None]).loss for i, m in zip(ids, mask, strict=True)]
    torch.testing.assert_close(losses, torch.stack(alone), atol=0.02, rtol=0.02)  # the loss to copy is under autocast


def test_the_mean_over_all_tokens_is_refused():
    """The loss that a model of transformers computes itself, a mean over the tokens of the batch, is refused."""
    names = prelude()
    model = names["language_model"]
    scope = private_training(
        model, names["text_optimizer"], names["text_loader"], noise_multiplier=1.0, max_grad_norm=1.0, poisson_sampling=False
    )
    with scope as (opt, loader):
        ids, mask = next(iter(loader))
        model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss.backward()
        with pytest.raises(SelfCheckError):
            opt.step()


def test_clip_grad_norm_in_a_scope_has_nothing_to_clip():
    """Before the step there is no gradient that ``clip_grad_norm_`` could change."""
    names = prelude()
    model, x, y = names["model"], names["x"], names["y"]
    with private_training(model, names["optimizer"], names["loader"], noise_multiplier=1.0, max_grad_norm=1.0):
        names["criterion"](model(x), y).backward()
        assert nn.utils.clip_grad_norm_(model.parameters(), 1.0) == 0


def signature(thing, *, bound=False):
    """Return ``(arguments)`` with defaults and without types, as the reference writes it."""
    parameters = [p.replace(annotation=p.empty) for p in inspect.signature(thing).parameters.values()][int(bound) :]
    return str(inspect.Signature(parameters)).replace("'", '"')


def reference():
    """Return the lines of the reference, broken where they are long."""
    names = [name for name in dp_hooks.__all__ if callable(getattr(dp_hooks, name))]
    lines = []
    for name in sorted(names, key=lambda name: (name in HANDED_OUT, name[0].isupper(), name)):
        thing = getattr(dp_hooks, name)
        calls = [f".{method}{signature(getattr(thing, method), bound=True)}" for method in HANDED_OUT.get(name, ())]
        words = f"{name}: {'  '.join(calls) or 'a DataLoader'}" if name in HANDED_OUT else name + signature(thing)
        lines += textwrap.wrap(words, WIDTH, subsequent_indent="    ")
    return "\n".join(lines)


def test_the_reference_has_every_public_name_with_its_signature():
    """Each name of ``__all__`` is in the reference, and each signature there is the real one."""
    ((_, text),) = [block for block in fenced("text") if block[1] in section("Reference")]
    assert text.rstrip("\n") == reference()
    missing = [name for name in dp_hooks.__all__ if not re.search(rf"(?<!\w){name}(?!\w)", section("Reference"))]
    assert not missing


def test_the_reference_names_attributes_that_exist():
    """Every attribute and error that the reference lists below the signatures exists, and no error is left out."""
    names, text = prelude(), re.sub(r"^```.*?^```$", "", section("Reference"), flags=re.MULTILINE | re.DOTALL)
    words = {word for word in spans(text) if re.fullmatch(r"\w+", word)}
    scope = private_training(names["model"], names["optimizer"], names["loader"], noise_multiplier=1.0, max_grad_norm=1.0)
    with scope as (opt, loader):
        statistics = NonprivateStatistics(torch.device("cpu"))
        known = set().union(*map(dir, (scope, opt, loader, scope.controller, errors, dp_hooks, statistics)))
    assert words <= known | {"opt", "DataLoader", "PrivacyEngine", "dp_hooks"}
    raised = {n for n, e in vars(errors).items() if isinstance(e, type) and issubclass(e, errors.DPHooksError)}
    assert raised <= words


def test_every_line_of_the_report_is_explained():
    """Every line that a report can print has a row in the table that tells how to read it."""
    fields = dict.fromkeys(PrivacyReport.__dataclass_fields__, 1)
    special = {"not_covered": ("this",), "clipping_details": {}, "accountant": "prv"}
    report = PrivacyReport(**fields | special | {"nonprivate_statistics": {"last": {"mean_norm": 1.0}, "remark": "not private"}})
    printed = {line[2:].split("  ")[0].strip() for line in str(report).splitlines()[1:]}
    explained = {span for row in rows(section("Reading the report")) for span in spans(row[0])}
    assert printed <= explained


def test_readme_is_short_enough():
    """README has at most 640 lines."""
    assert len(LINES) <= 640


def test_links_lead_somewhere():
    """Every heading of the second level is in the contents, and every link into the page leads to a heading."""
    titles = re.findall(r"^(#+) (.*)$", PROSE, re.MULTILINE)
    anchors = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for _, title in titles]
    assert len(set(anchors)) == len(anchors)
    assert set(re.findall(r"\]\(#([^)]+)\)", PROSE)) <= set(anchors)
    contents = re.findall(r"\]\(#([^)]+)\)", PROSE[: PROSE.index("\n## ")])
    assert contents == [anchor for (level, _), anchor in zip(titles, anchors, strict=True) if level == "##"]


def test_paths_exist():
    """Files and folders that README names exist, seen from the root or, in the text on architecture, from the package."""
    drawn = "".join(text for _, text in fenced("mermaid"))
    words = {word for span in [*spans(PROSE), *(t for _, t in fenced("sh")), drawn] for word in re.split(r'[\s,":]+', span)}
    paths = {word for word in words if re.fullmatch(r"[\w.]+/[\w./]*|\w+\.(py|md|toml)", word)}
    assert {"rules/", "examples/choosing.py"} <= paths
    roots = (ROOT, PACKAGE, ROOT / "examples")
    assert not {path for path in paths if not any((root / path).exists() for root in roots)}


def commands():
    """Return every command that README shows, one string each."""
    shown = [*spans(PROSE), *(line for _, text in fenced("sh") for line in text.splitlines())]
    return [part.strip() for text in shown for part in text.replace("\n", " ").split("&&")]


def options_of(path):
    """Return the options that a script gives to argparse."""
    calls = [n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Call)]
    added = [call.args[0] for call in calls if getattr(call.func, "attr", "") == "add_argument" and call.args]
    return {arg.value for arg in added if isinstance(arg, ast.Constant)}


def test_commands_name_files_and_options_that_exist():
    """Commands name examples, options and extras that exist; they are not run here."""
    seen = set()
    for command in commands():
        named = re.match(r"(?:python )?(?:examples/)?(\w+\.py)( .*)?$", command)
        if named and (ROOT / "examples" / named[1]).exists():
            seen.add(named[1])
            assert set(re.findall(r"--[\w-]+", named[2] or "")) <= options_of(ROOT / "examples" / named[1]), command
    assert seen == {path.name for path in EXAMPLES}
    known = set().union(*map(options_of, [*EXAMPLES, PACKAGE / "__main__.py"]))
    planned = [command for command in commands() if command.startswith("python -m dp_hooks plan")]
    assert planned
    assert {word for command in planned for word in re.findall(r"--[\w-]+", command)} <= options_of(PACKAGE / "__main__.py")
    assert {word for command in commands() if command.startswith("--") for word in re.findall(r"--[\w-]+", command)} <= known
    extras = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE))
    wanted = set(re.findall(r"\.\[(\w+)\]", README))
    assert {"test", "examples"} <= wanted <= extras


def test_workloads_and_engines_in_commands_exist():
    """What commands pass to the benchmark's options are names that it knows."""
    source = (ROOT / "examples" / "benchmark.py").read_text(encoding="utf-8")
    named = [v for c in commands() for v in re.findall(r"--(?:workload|engine) ([\w,-]+)", c)]
    assert named
    assert all(f'"{name}"' in source for value in named for name in value.split(","))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_every_example_is_listed_and_says_what_it_does(path):
    """README lists the example, whose head says how to call it, what it shows, how long it takes and what it prints."""
    assert f"`examples/{path.name}`" in section("Two commands")
    head = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert f"python examples/{path.name}" in head
    assert all(word in head for word in ("Shows", "Takes", "Prints"))


def literals():
    """Return every text in the package, adjacent pieces joined; what is filled in later is a NUL character."""
    found = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(str(v.value) if isinstance(v, ast.Constant) else "\0" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_error_texts_are_those_of_the_library():
    """Every message in the troubleshooting table is one that the library really gives."""
    texts = literals()
    messages = [span for row in rows(section("Troubleshooting")) for span in spans(row[0])]
    assert len(messages) > 10
    assert not {message for message in messages if not any(message in text for text in texts)}


def test_the_two_commands_are_marked_and_first():
    """The test command follows its marker, where the continuous integration finds it, after the main job's command."""
    shell = [text.strip() for _, text in fenced("sh")]
    assert shell[:2] == [
        'pip install -e ".[examples]" && python examples/finetune_sentiment.py',
        'pip install -e ".[test]" && pytest',
    ]
    assert '<!-- tests -->\n```sh\npip install -e ".[test]" && pytest\n```\n' in README
    assert README.count("<!-- tests -->") == README.count("<!-- benchmark -->") == 1
