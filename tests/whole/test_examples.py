"""The examples run: on their own data where they make it, on a tiny model and data where they would fetch some."""

import csv
import importlib.util
import json
import re
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig, BertModel, BertTokenizerFast

EXAMPLES = Path(__file__).parents[2] / "examples"


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


def test_finetuning_saves_a_checkpoint_that_transformers_loads(tiny_model, tmp_path, monkeypatch, capsys):
    """A run on a CSV file and another model stays within its budget, and the saved model computes what was trained."""
    data, output = tmp_path / "reviews.csv", tmp_path / "out"
    with data.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for i in range(120):
            writer.writerow([f"this {'good' if i % 2 else 'bad'} movie is a film" + " and a story" * (i % 4), i % 2])
    where = ["--data", str(data), "--model", str(tiny_model), "--output", str(output)]
    how = ["--epochs", "3", "--batch-size", "32", "--max-physical-batch-size", "20", "--epsilon", "50"]
    monkeypatch.setattr(sys, "argv", ["finetune_sentiment.py", *where, *how])
    load("finetune_sentiment").main()
    out = capsys.readouterr().out
    last_epoch = out.split("epoch  3: ")[1]
    trained = float(last_epoch.split("accuracy ")[1].split(",")[0])
    saved = float(out.split("\naccuracy ")[1].split(" ")[0])
    assert saved == pytest.approx(trained, abs=0.05)
    assert 0 < float(out.split("at epsilon ")[1].split(",")[0]) <= 50
    model = AutoModelForSequenceClassification.from_pretrained(output)
    assert model.bert.encoder.layer[-1].attention.self.key.weight.abs().sum() > 0


def test_the_keys_written_into_the_model_compute_what_was_trained(tiny_model):
    """The model's own forward equals the top layer that was trained, once the key vectors are filled in."""
    example = load("finetune_sentiment")
    torch.manual_seed(0)
    model = example.build_model(tiny_model)
    top = example.TopLayer(model)
    with torch.no_grad():
        top.keys.weight.normal_(std=0.5)
        model.classifier.weight.normal_()
    top.write_keys()
    ids = torch.randint(5, 20, (6, 9))
    mask = (torch.arange(9)[None] < torch.tensor([9, 4, 5, 9, 2, 7])[:, None]).long()
    hidden = example.encode(model, ids, mask).float()
    expected = model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(top(hidden, mask), expected, atol=2e-2, rtol=2e-2)  # hidden states are kept in float16


@pytest.mark.parametrize("terminal", [True, False])
def test_a_progress_bar_is_for_terminals_only(terminal, monkeypatch, capsys):
    """On a terminal the example shows a bar while it works; in a log, nothing but its lines."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    assert list(load("finetune_sentiment").progress(range(3), "work")) == [0, 1, 2]
    assert ("work" in capsys.readouterr().err) == terminal


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
        load("finetune_sentiment").load_csv(path)


@pytest.mark.parametrize("engine", ["dp_hooks", "dp_hooks-two-pass"])
@pytest.mark.parametrize("name", load("benchmark").WORKLOADS)
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
    found = load("benchmark").overhead.measure(name, rounds=1)
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
