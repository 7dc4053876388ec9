"""What a private step costs where nothing but overhead is left: deep, tiny models, and two samples.

    python examples/overhead.py
    python examples/overhead.py --model gpt2,resnet50 --rounds 5

Shows how much work there is around the operations of a private step: calls of hooks and of PyTorch. On an accelerator it keeps
the device waiting. Takes two and a half minutes. Prints a table; ``examples/benchmark.py --overhead`` prints the same.

Of such models the products themselves take hardly any time. Counted are, for one whole step (zero_grad, forward, loss, backward,
AdamW), beside an ordinary one in the same process:

- **time**: medians of steps that take turns, on one thread;
- **operations**: calls of PyTorch's operators, of any size, as its dispatcher sees them;
- **synchronisations**: operations whose result the program looks at (``item``, ``nonzero``, ``unique``, ...), at which an
  accelerator would have to be waited for. Those of the optimizer, which reads its step counters on the CPU, are left out.

The first steps, in which the library checks itself, are not counted.
"""

import argparse
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from dp_hooks import private_training

SAMPLES, TOKENS, LAYERS, WIDTH, WORDS = 2, 8, 12, 24, 99
WARM_UP = 6  # steps that are not counted
LOOKED_AT = ("_local_scalar_dense", "nonzero", "is_nonzero", "_unique", "unique", "masked_select", "equal", "item")

Forward = Callable[[nn.Module, Tensor], Tensor]
Made = tuple[nn.Module, Tensor, Tensor, Forward]


def _tokens() -> Tensor:
    return torch.randint(0, WORDS, (4 * SAMPLES, TOKENS + 1))


def gpt2() -> Made:
    """GPT-2 as a language model."""
    from transformers import GPT2Config, GPT2LMHeadModel

    ids = _tokens()
    sizes: dict[str, Any] = {"vocab_size": WORDS, "n_positions": TOKENS, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": 3}
    model = GPT2LMHeadModel(GPT2Config(**sizes, use_cache=False, bos_token_id=0, eos_token_id=0))
    return model, ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), lambda m, x: m(input_ids=x).logits


def bert() -> Made:
    """BERT, classifying sequences."""
    from transformers import BertConfig, BertForSequenceClassification

    sizes: dict[str, Any] = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 3}
    model = BertForSequenceClassification(BertConfig(vocab_size=WORDS, intermediate_size=4 * WIDTH, **sizes))
    return model, _tokens(), torch.randint(0, 2, (4 * SAMPLES,)), lambda m, x: m(input_ids=x).logits


def vit() -> Made:
    """A vision transformer."""
    from transformers import ViTConfig, ViTForImageClassification

    sizes: dict[str, Any] = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 3}
    model = ViTForImageClassification(ViTConfig(**sizes, intermediate_size=4 * WIDTH, image_size=16, patch_size=8, num_labels=10))
    return model, torch.randn(4 * SAMPLES, 3, 16, 16), torch.randint(0, 10, (4 * SAMPLES,)), lambda m, x: m(pixel_values=x).logits


def llama() -> Made:
    """Llama as a language model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    ids = _tokens()
    sizes: dict[str, Any] = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": LAYERS}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=WORDS, **sizes, **heads, max_position_embeddings=TOKENS, use_cache=False))
    return model, ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), lambda m, x: m(input_ids=x).logits


def resnet50() -> Made:
    """ResNet-50 with GroupNorm on images of 32 x 32."""
    from torchvision.models import resnet50 as build

    model = build(num_classes=10, norm_layer=lambda channels: nn.GroupNorm(32, channels))
    return model, torch.randn(4 * SAMPLES, 3, 32, 32), torch.randint(0, 10, (4 * SAMPLES,)), lambda m, x: m(x)


MODELS: dict[str, Callable[[], Made]] = {"gpt2": gpt2, "bert": bert, "vit": vit, "llama": llama, "resnet50": resnet50}


class Loss(nn.Module):
    """Cross-entropy; an example's loss is the mean over its tokens."""

    reduction = "mean"

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the mean over the batch."""
        losses = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none")
        return losses.view(len(labels), -1).mean(1).mean()


class Count(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        """Nothing was counted."""
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Count one and run it."""
        self.found[func.__name__.partition(".")[0]] += 1
        return func(*args, **(kwargs or {}))

    @property
    def looked_at(self) -> int:
        """How many of them an accelerator would have to be waited for."""
        return sum(self.found[name] for name in LOOKED_AT)


def steps_of(name: str, stack: ExitStack, *, private: bool) -> Iterator[float]:
    """Train a model forever; yields the seconds that each step took."""
    torch.manual_seed(0)
    model, x, y, forward = MODELS[name]()
    optimizer: Any = torch.optim.AdamW(model.train().parameters(), lr=1e-4)
    loader: Any = DataLoader(TensorDataset(x, y), batch_size=SAMPLES)
    criterion = Loss()
    if private:
        options: dict[str, Any] = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "poisson_sampling": False, "criterion": criterion}
        optimizer, loader = stack.enter_context(private_training(model, optimizer, loader, **options, spot_check_rate=0.0))

    def run() -> Iterator[float]:
        while True:
            for inputs, labels in loader:
                start = time.perf_counter()
                optimizer.zero_grad()
                criterion(forward(model, inputs), labels).backward()
                optimizer.step()
                yield time.perf_counter() - start

    return run()


def measure(name: str, rounds: int) -> dict[str, float]:
    """Compare private and ordinary steps of one model; with 0 ``rounds``, which are turns of four steps, no times are taken."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ExitStack() as stack:
            both = [steps_of(name, stack, private=private) for private in (False, True)]
            for steps in both:
                for _ in range(WARM_UP):
                    next(steps)
            counts = []
            for steps in both:
                with Count() as count:
                    next(steps)
                counts.append(count)
            seconds: list[list[float]] = [[], []]
            for _ in range(rounds):
                for taken, steps in zip(seconds, both, strict=True):
                    taken += [next(steps) for _ in range(4)]
    finally:
        torch.set_num_threads(threads)
    plain, private = (statistics.median(taken) if taken else math.nan for taken in seconds)
    operations = [sum(count.found.values()) for count in counts]
    return {
        "milliseconds": 1000 * plain,
        "time": private / plain,
        "operations": operations[0],
        "operations ratio": operations[1] / operations[0],
        "synchronisations": counts[1].looked_at - counts[0].looked_at,
    }


def report(names: list[str], rounds: int) -> str:
    """Measure models, and return a Markdown table."""
    lines = [
        "| model | ordinary step | operations | private: time | operations | synchronisations more |",
        "|---|---|---|---|---|---|",
    ]
    for name in names:
        found = measure(name, rounds)
        lines.append(
            f"| {name} | {found['milliseconds']:.1f} ms | {found['operations']:.0f} | {found['time']:.2f} | "
            f"{found['operations ratio']:.2f} | {found['synchronisations']:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=",".join(MODELS), help="comma-separated")
    parser.add_argument("--rounds", type=int, default=20, help="turns of four steps")
    options = parser.parse_args()
    names = options.model.split(",")
    if unknown := [name for name in names if name not in MODELS]:
        parser.error(f"--model {', '.join(unknown)}: choose from {', '.join(MODELS)}")
    if options.rounds < 1:
        parser.error("--rounds is at least 1")
    print(report(names, options.rounds))


if __name__ == "__main__":
    main()
