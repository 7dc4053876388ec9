"""Train a small GPT-2 with tied embeddings on text, letter by letter, with and without privacy.

    python examples/language_model.py
    python examples/language_model.py --epsilon 3

Shows a language model whose input and output embeddings are one parameter, with a loss for each text, in the plain loop of
``examples/example_training.py``. Takes about two minutes on two idle cores. Prints the perplexity (per character, the lower the
better) on topics held out: of the frequencies of single characters, before training, without privacy, and with it; on a terminal
there is a progress bar with the epsilon so far.

Text: the help topics of Python itself (``pydoc_data.topics`` of the standard library, so figures depend a little on the version of
Python), every fifth topic held out, cut into windows. The vocabulary is ASCII: one made from the text would tell something of it.
What is protected is one window. The settings are the first that were tried: nothing was chosen by looking at results.
"""

import math
import pydoc_data.topics
import time

import torch
import torch.nn.functional as F
from example_training import DELTA, Settings, settings_of, settings_parser, train, train_privately
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from transformers import GPT2Config, GPT2LMHeadModel

from dp_hooks import dp_step

VOCABULARY = 128
NON_PRIVATE = Settings(epochs=5, batch_size=64, learning_rate=3e-3)
PRIVATE = Settings(epochs=12, batch_size=512, learning_rate=3e-3)


def windows(topics: list[str], length: int) -> Tensor:
    """Return the topics one after another as character codes, ``[n, length]``; what is no ASCII is a question mark."""
    codes = torch.tensor(list("\n".join(topics).encode("ascii", errors="replace")))
    return codes[: len(codes) // length * length].view(-1, length)


def load_text(length: int, part: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return windows to train on and windows held out; with ``part`` below 1 only the first ones of each."""
    topics = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    train, test = windows([t for i, t in enumerate(topics) if i % 5], length), windows(topics[::5], length)
    return train[: round(part * len(train))], test[: round(part * len(test))]


def build_model(length: int, seed: int = 0) -> GPT2LMHeadModel:
    """Return a GPT-2 of two layers without dropout; its head and its embedding are one parameter."""
    torch.manual_seed(seed)
    sizes = {"n_positions": length, "n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY}
    none = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return GPT2LMHeadModel(GPT2Config(**sizes, **none, bos_token_id=0, eos_token_id=0))


def losses_of(model: nn.Module, batch: list[Tensor]) -> Tensor:
    """Return the mean loss of each window, ``[n]``."""
    (codes,) = batch
    logits = model(input_ids=codes).logits[:, :-1]
    return F.cross_entropy(logits.transpose(1, 2), codes[:, 1:], reduction="none").mean(1)


@dp_step
def train_step(model: nn.Module, batch: list[Tensor]) -> Tensor:
    """Return one loss per window."""
    return losses_of(model, batch)


@torch.no_grad()
def perplexity(model: nn.Module, codes: Tensor) -> float:
    """Return the exponential of the mean loss per character."""
    return math.exp(torch.cat([losses_of(model, [part]) for part in codes.split(256)]).mean())


def perplexity_of_frequencies(train: Tensor, test: Tensor) -> float:
    """Return that of a model which knows the frequency of each character, and nothing of what is before it."""
    counts = train.flatten().bincount(minlength=VOCABULARY) + 1.0
    return math.exp(-(counts / counts.sum()).log()[test[:, 1:]].mean())


def main() -> None:
    """Train twice."""
    parser = settings_parser(__doc__, PRIVATE)
    parser.add_argument("--length", type=int, default=64, help="characters in a window")
    parser.add_argument("--part", type=float, default=1.0, help="which part of the text is used")
    args, begun = parser.parse_args(), time.perf_counter()
    codes, test = load_text(args.length, args.part)
    model, data = build_model(args.length), TensorDataset(codes)
    print(
        f"{len(codes)} windows of {args.length} characters to train on, {len(test)} held out; {model.num_parameters():,} parameters"
    )
    print(f"frequencies of characters: perplexity {perplexity_of_frequencies(codes, test):.2f}")
    print(f"before training: perplexity {perplexity(model, test):.2f}")
    train(model, data, NON_PRIVATE, losses_of)
    print(f"without privacy: perplexity {perplexity(model, test):.2f}", flush=True)
    model = build_model(args.length)
    spent = train_privately(model, data, settings_of(args), args.epsilon, train_step, max_physical_batch_size=128)
    print(f"with epsilon {spent:.2f}, delta {DELTA:g}: perplexity {perplexity(model, test):.2f}")
    print(f"{time.perf_counter() - begun:.0f} seconds in all")


if __name__ == "__main__":
    main()
