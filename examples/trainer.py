"""Fine-tune a pretrained transformer on movie reviews with the Trainer of transformers, with and without privacy.

    python examples/trainer.py
    python examples/trainer.py --lora

Shows ``private_trainer`` around ``trainer.train()``: the private form has one line more and is ordinary otherwise. Takes
about two and a half minutes of processor time for both trainings, with ``--lora`` about four. Prints the trainer's logs (with
epsilon), the privacy report, and the test accuracy of the majority class, before training, without privacy and with it.

Reviews and model are those of ``examples/finetune_sentiment.py``, which is the better way to this goal: it runs the frozen layers
once. Here the whole model runs in every step, as in any Trainer, so part of the reviews has to do: 2,400 to train on, cut after 32
tokens. What is trained is little: the classifier, and with ``--lora`` adapters of the attention in the top layer (``peft``).

Private training of the adapters has a learning rate and a number of epochs of its own. They were chosen, among 23 settings, by
accuracy on the 7,168 reviews that are neither trained on nor tested with (on what the frozen layers make of them, in a plain loop).
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from example_data import load_csv, load_reviews, majority
from peft import LoraConfig, get_peft_model
from sentiment_model import FROZEN_LAYERS, LORA_RANK, build_model, model_directory, start_from_public_sentences
from torch import Tensor, nn
from transformers import AutoTokenizer, DataCollatorWithPadding, Trainer, TrainingArguments

from dp_hooks.integrations import private_trainer

DELTA = 1e-5
WITHOUT_PRIVACY = {"num_train_epochs": 4, "learning_rate": 1e-3}
PRIVATE = {"classifier": WITHOUT_PRIVACY, "lora": {"num_train_epochs": 8, "learning_rate": 4e-2}}


def trained_model(directory: Path, tokenizer: Any, lora: bool) -> nn.Module:
    """Return the model with what is trained switched on."""
    torch.manual_seed(0)
    model = build_model(directory)
    start_from_public_sentences(model, tokenizer)
    if lora:
        targets = rf".*layer\.{FROZEN_LAYERS}\.attention\.(self\.key|self\.value|output\.dense)"
        model = get_peft_model(model, LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=targets))
    model.get_submodule("base_model.model.classifier" if lora else "classifier").requires_grad_(True)
    return model


def trainer_for(model: nn.Module, data: Any, tokenizer: Any, folder: str, **sizes: Any) -> Trainer:
    """Return an ordinary trainer."""
    quiet = {"save_strategy": "no", "report_to": [], "logging_strategy": "epoch", "disable_tqdm": not sys.stderr.isatty()}
    arguments = TrainingArguments(folder, use_cpu=True, seed=0, **sizes, **quiet)
    return Trainer(model, arguments, train_dataset=data, data_collator=DataCollatorWithPadding(tokenizer))


@torch.no_grad()
def accuracy(model: nn.Module, test: list[dict[str, Any]], collate: DataCollatorWithPadding) -> float:
    """Return the share of reviews labelled correctly."""
    right = 0
    for start in range(0, len(test), 100):
        batch = collate(test[start : start + 100])
        labels: Tensor = batch.pop("labels")
        right += int((model(**batch).logits.argmax(1) == labels).sum())
    return right / len(test)


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lora", action="store_true", help="train adapters in the top layer as well")
    parser.add_argument("--epsilon", type=float, default=8.0, help="privacy budget")
    parser.add_argument("--epochs", type=int, help="of the private training; this and the next: default as chosen")
    parser.add_argument("--learning-rate", type=float, help="of the private training")
    parser.add_argument("--batch-size", type=int, default=80, help="reviews that are run at a time; six times as many are a batch")
    parser.add_argument("--examples", type=int, default=3400, help="reviews in all; 1,000 of them, or half, are to test with")
    parser.add_argument("--max-length", type=int, default=32, help="tokens per review")
    parser.add_argument("--data", type=Path, help="CSV file with columns text and label (0 or 1) instead of the reviews")
    parser.add_argument("--model", type=Path, help="directory of a BERT encoder instead of MiniLM")
    return parser.parse_args()


def main() -> None:
    """Train twice."""
    args, begun = arguments(), time.perf_counter()
    directory = args.model or model_directory()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    rows = load_csv(args.data) if args.data else load_reviews()
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[: args.examples].tolist()
    encoded = [{**tokenizer(rows[i][0], truncation=True, max_length=args.max_length), "labels": rows[i][1]} for i in order]
    cut = max(len(encoded) - 1000, len(encoded) // 2)
    data, test = encoded[:cut], encoded[cut:]
    collate = DataCollatorWithPadding(tokenizer)

    model = trained_model(directory, tokenizer, args.lora)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"{len(data)} reviews to train on, {len(test)} to test with; {count:,} trainable parameters")
    print(f"majority class: test accuracy {majority(torch.tensor([row['labels'] for row in test])):.3f}")
    print(f"before training: test accuracy {accuracy(model, test, collate):.3f}")
    with tempfile.TemporaryDirectory() as folder:
        sizes = {"per_device_train_batch_size": 40, **WITHOUT_PRIVACY}
        trainer = trainer_for(model, data, tokenizer, folder, **sizes)
        trainer.train()
        print(f"without privacy: test accuracy {accuracy(model, test, collate):.3f}", flush=True)

        model = trained_model(directory, tokenizer, args.lora)
        given = {"num_train_epochs": args.epochs, "learning_rate": args.learning_rate}
        sizes = {
            "per_device_train_batch_size": args.batch_size,
            "gradient_accumulation_steps": 6,
            **PRIVATE["lora" if args.lora else "classifier"],
            **{name: value for name, value in given.items() if value is not None},
        }
        trainer = trainer_for(model, data, tokenizer, folder, **sizes)
        with private_trainer(trainer, target_epsilon=args.epsilon, target_delta=DELTA, max_grad_norm=1.0) as scope:
            trainer.train()
        print(scope.report())
        print(f"with privacy: test accuracy {accuracy(model, test, collate):.3f}")
    print(f"{time.perf_counter() - begun:.0f} seconds in all")


if __name__ == "__main__":
    main()
