"""How long whole training steps take, and how much memory, with and without differential privacy.

    python examples/benchmark.py
    python examples/benchmark.py --workload minilm,mlp --engine dp_hooks --rounds 5 --output benchmark.png
    python examples/benchmark.py --workload minilm --engine dp_hooks --profile
    python examples/benchmark.py --overhead

Shows what privacy costs, beside ordinary training and Opacus. Takes three minutes of processor time for ``--workload
mlp,resnet18 --engine dp_hooks --rounds 3``, and more the larger the models are; ``--tiny`` only shows that everything runs.
Prints a table of times and memory as ratios to ordinary training, what fails and why, and with ``--profile`` where the time
of a step goes; ``--output`` draws the table. While it measures, the machine should do nothing else.

Measured are steps of the documented loop (zero_grad, forward, loss, backward, step of AdamW; fetching the batch is left
out) on eight models of random weights and synthetic data. The engines:

- ``ordinary``: plain PyTorch, no privacy; every ratio is relative to it.
- ``dp_hooks``: ``private_training`` with its defaults ("ghost"); ``dp_hooks-hooks`` (on request) with
  ``grad_sample_mode="hooks"``.
- ``dp_hooks-units`` and ``dp_hooks-uneven-units`` (on request): units of four examples, or of one to four, are protected.
- ``opacus-hooks``, ``opacus-ghost``: Opacus's ``PrivacyEngine`` with that ``grad_sample_mode`` and ``wrap_model=False``;
  "ghost" with Opacus's own criterion object, whose ``backward`` makes the two passes.

All get the same model, loss (of an example: the mean over its tokens; of a batch: the mean over its examples), dropout,
attention implementation and inputs. BERT and GPT-2 are given position ids of shape [batch, tokens], since Opacus needs
them. The batches have a fixed size (``poisson_sampling=False``), with noise multiplier 1 and clipping bound 1.

Every model and engine has a process of its own, which builds the model, takes some steps that are not counted (the
self-check of dp_hooks is in the first), and waits. Then the engines take turns, round by round, so that a drift of the
machine hits all of them, and only one process computes at any time. The time of a turn is the median of its steps; a
ratio is a turn divided by the mean of the turns of ``ordinary`` before and after its round. Reported are the median of
the ratios over the rounds and, in brackets, their quartiles. Memory comes after all turns, in processes of its own, and
only on Linux: the peak of the resident set during some steps, minus the resident set before the model was built. These
processes return memory to the system as soon as it is free (MALLOC_MMAP_THRESHOLD_), so that what is measured are the
tensors alive, and not the holes that glibc's heap has by chance. Below the table the same for the processes that were timed,
as a user would see it: with those holes, and with the first step.

An engine that refuses a model, or crashes on it, is listed with the reason.
"""

import argparse
import ctypes
import gc
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import opacus
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dp_hooks import dp_step, private_training

sys.path.insert(0, str(Path(__file__).parent))  # also where this file is not run but loaded
import overhead

TINY = overhead.MODELS

BATCHES = 16  # batches in a pass over the synthetic data
WARM_UP = 3  # steps that are not counted
MEMORY_STEPS = 3  # steps whose peak of memory is measured
TURN_SECONDS = 1.0  # without --steps, a turn has as many steps as take about this long
BASELINE = "ordinary"
EXACT_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # glibc then gives every larger block back when it is freed


# ---------------------------------------------------------------- workloads


@dataclass
class Workload:
    """A model, its data and its batch size; ``forward(model, *inputs)`` gives the logits."""

    model: nn.Module
    inputs: list[Tensor]
    labels: Tensor
    batch_size: int
    forward: Callable[..., Tensor]

    def loader(self) -> DataLoader[Any]:
        """A loader of full batches."""
        return DataLoader(TensorDataset(*self.inputs, self.labels), batch_size=self.batch_size)

    def trainable(self) -> list[nn.Parameter]:
        """What the optimizer updates."""
        return [p for p in self.model.parameters() if p.requires_grad]


class PerSampleLoss(nn.Module):
    """Cross-entropy; an example's loss is the mean over its tokens, if it has several."""

    reduction = "mean"

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the mean over the batch, or one loss per example where ``reduction`` is "none"."""
        losses = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none")
        losses = losses.view(len(labels), -1).mean(1)
        return losses.mean() if self.reduction == "mean" else losses


def call_plain(model: nn.Module, x: Tensor) -> Tensor:
    """Logits of a plain module."""
    return model(x)


def call_tokens(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits of a transformer for token ids."""
    return model(input_ids=ids).logits


def call_positions(model: nn.Module, ids: Tensor, positions: Tensor) -> Tensor:
    """Logits of a transformer for token ids and explicit positions."""
    return model(input_ids=ids, position_ids=positions).logits


def call_pixels(model: nn.Module, pixels: Tensor) -> Tensor:
    """Logits of a vision transformer."""
    return model(pixel_values=pixels).logits


def token_inputs(vocabulary: int, length: int, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, their successors (the labels of a language model), and positions."""
    tokens = torch.randint(0, vocabulary, (BATCHES * batch, length + 1))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), torch.arange(length).repeat(len(tokens), 1)


def minilm(tiny: bool) -> Workload:
    """BERT of the size of MiniLM-L6, classifying sequences."""
    from transformers import BertConfig, BertForSequenceClassification

    layers, width, vocabulary, length, batch = (1, 24, 99, 8, 4) if tiny else (6, 384, 30522, 64, 32)
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=12,
        intermediate_size=4 * width,
        num_labels=2,
    )
    ids, _, positions = token_inputs(vocabulary, length, batch)
    labels = torch.randint(0, 2, (len(ids),))
    return Workload(BertForSequenceClassification(config), [ids, positions], labels, batch, call_positions)


def gpt2(tiny: bool, tied: bool = False) -> Workload:
    """GPT-2 as a language model, with an output layer of its own or tied to the embedding."""
    from transformers import GPT2Config, GPT2LMHeadModel

    layers, width, vocabulary, length, batch = (1, 24, 99, 8, 4) if tiny else (6, 384, 8192, 128, 8)
    config = GPT2Config(
        vocab_size=vocabulary,
        n_positions=length,
        n_embd=width,
        n_layer=layers,
        n_head=6,
        tie_word_embeddings=tied,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    ids, labels, positions = token_inputs(vocabulary, length, batch)
    return Workload(GPT2LMHeadModel(config), [ids, positions], labels, batch, call_positions)


def llama(tiny: bool, checkpointed: bool = False) -> Workload:
    """Llama as a language model, two query heads to a key-value head; checkpointed with four times as many layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    layers, width, vocabulary, length, batch = (1, 40, 99, 8, 4) if tiny else (6, 320, 8192, 256, 4)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=width * 27 // 10,
        num_hidden_layers=layers,
        num_attention_heads=10,
        num_key_value_heads=5,
        max_position_embeddings=length,
        use_cache=False,
    )
    if checkpointed:
        config.num_hidden_layers *= 4
    model = LlamaForCausalLM(config)
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids, labels, _ = token_inputs(vocabulary, length, batch)
    return Workload(model, [ids], labels, batch, call_tokens)


def vit(tiny: bool) -> Workload:
    """A small vision transformer, classifying images."""
    from transformers import ViTConfig, ViTForImageClassification

    layers, width, size, batch = (1, 24, 16, 4) if tiny else (8, 192, 96, 16)
    config = ViTConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=3,
        intermediate_size=4 * width,
        image_size=size,
        patch_size=8,
        num_labels=10,
    )
    images, labels = torch.randn(BATCHES * batch, 3, size, size), torch.randint(0, 10, (BATCHES * batch,))
    return Workload(ViTForImageClassification(config), [images], labels, batch, call_pixels)


def resnet18(tiny: bool) -> Workload:
    """ResNet-18 with GroupNorm; its in-place operations stay as they are."""
    from torchvision.models import resnet18 as build

    size, batch = (16, 2) if tiny else (32, 32)
    model = build(num_classes=10, norm_layer=lambda channels: nn.GroupNorm(32, channels))
    images, labels = torch.randn(BATCHES * batch, 3, size, size), torch.randint(0, 10, (BATCHES * batch,))
    return Workload(model, [images], labels, batch, call_plain)


def mlp(tiny: bool) -> Workload:
    """Three linear layers."""
    inputs, width, batch = (20, 16, 4) if tiny else (784, 1024, 256)
    layers = [nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)]
    data, labels = torch.randn(BATCHES * batch, inputs), torch.randint(0, 10, (BATCHES * batch,))
    return Workload(nn.Sequential(*layers), [data], labels, batch, call_plain)


def lora(tiny: bool) -> Workload:
    """The model of ``minilm``, of which low-rank updates of queries and values and the classifier are trained."""
    from peft import LoraConfig, TaskType, get_peft_model

    workload = minilm(tiny)
    config = LoraConfig(r=8, target_modules=["query", "value"], task_type=TaskType.SEQ_CLS)
    workload.model = get_peft_model(workload.model, config)
    return workload


WORKLOADS: dict[str, Callable[[bool], Workload]] = {
    "minilm": minilm,
    "gpt2": gpt2,
    "gpt2-tied": partial(gpt2, tied=True),
    "llama": llama,
    "vit": vit,
    "resnet18": resnet18,
    "mlp": mlp,
    "lora": lora,
    "llama-checkpointed": partial(llama, checkpointed=True),
}
DEFAULT_WORKLOADS = [name for name in WORKLOADS if name != "llama-checkpointed"]


# ---------------------------------------------------------------- engines


class Training(NamedTuple):
    """What the loop needs."""

    forward: Callable[..., Tensor]
    criterion: Callable[[Tensor, Tensor], Any]
    optimizer: torch.optim.Optimizer
    loader: DataLoader[Any]
    whole_step: Callable[..., Tensor] | None = None  # what to call instead of the loop's own lines


def ordinary(workload: Workload, stack: ExitStack) -> Training:
    """Training without privacy."""
    optimizer = torch.optim.AdamW(workload.trainable(), lr=1e-4)
    return Training(partial(workload.forward, workload.model), PerSampleLoss(), optimizer, workload.loader())


def with_dp_hooks(workload: Workload, stack: ExitStack, mode: str = "ghost") -> Training:
    """Training in a private scope, which ``stack`` will close."""
    plain = ordinary(workload, stack)
    scope = private_training(
        workload.model,
        plain.optimizer,
        plain.loader,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
        grad_sample_mode=mode,
        criterion=plain.criterion,
    )
    optimizer, loader = stack.enter_context(scope)
    return plain._replace(optimizer=optimizer, loader=loader)


def with_units(workload: Workload, stack: ExitStack, sizes: tuple[int, ...]) -> Training:
    """Training in a private scope that protects units of so many examples, in turn; every batch is the same, of all units."""
    plain = ordinary(workload, stack)
    one_batch = TensorDataset(*(part[: workload.batch_size] for part in (*workload.inputs, workload.labels)))
    units = [unit for unit, size in zip(range(len(one_batch)), cycle(sizes)) for _ in range(size)]
    scope = private_training(
        workload.model,
        plain.optimizer,
        DataLoader(one_batch, batch_size=len(one_batch)),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        privacy_unit=units[: len(one_batch)],
        criterion=plain.criterion,
    )
    optimizer, loader = stack.enter_context(scope)
    return plain._replace(optimizer=optimizer, loader=loader)


def with_two_passes(workload: Workload, stack: ExitStack) -> Training:
    """Training in a private scope with a ``@dp_step`` function that makes two backward passes."""
    training = with_dp_hooks(workload, stack)

    @dp_step(two_pass=True)
    def step(model: nn.Module, batch: list[Tensor]) -> Tensor:
        *inputs, labels = batch
        return training.criterion(workload.forward(model, *inputs), labels)

    return training._replace(whole_step=partial(step, workload.model))


def with_opacus(workload: Workload, stack: ExitStack, mode: str) -> Training:
    """Training with Opacus, without its wrapper around the model."""
    plain = ordinary(workload, stack)
    _, optimizer, *criterion, loader = opacus.PrivacyEngine().make_private(
        module=workload.model,
        optimizer=plain.optimizer,
        criterion=plain.criterion,
        data_loader=plain.loader,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
        grad_sample_mode=mode,
        wrap_model=False,
    )
    return Training(plain.forward, criterion[0] if criterion else plain.criterion, optimizer, loader)


ENGINES: dict[str, Callable[[Workload, ExitStack], Training]] = {
    BASELINE: ordinary,
    "dp_hooks": with_dp_hooks,
    "opacus-hooks": partial(with_opacus, mode="hooks"),
    "opacus-ghost": partial(with_opacus, mode="ghost"),
    "dp_hooks-hooks": partial(with_dp_hooks, mode="hooks"),
    "dp_hooks-two-pass": with_two_passes,
    "dp_hooks-units": partial(with_units, sizes=(4,)),
    "dp_hooks-uneven-units": partial(with_units, sizes=(1, 2, 3, 4)),
}
DEFAULT_ENGINES = ["dp_hooks", "opacus-hooks", "opacus-ghost"]


def train(training: Training) -> Iterator[float]:
    """Train forever, and yield the seconds that each step took."""
    forward, criterion, optimizer, loader, whole_step = training
    while True:
        for batch in loader:
            start = time.perf_counter()
            if whole_step is not None:
                whole_step(batch)
            else:
                *inputs, labels = batch
                optimizer.zero_grad()
                criterion(forward(*inputs), labels).backward()
                optimizer.step()
            yield time.perf_counter() - start


def begin(workload: Workload, engine: str, stack: ExitStack) -> tuple[Iterator[float], list[float]]:
    """Prepare training with ``engine``, take the steps that are not counted, and tell how long they took."""
    workload.model.train()
    steps = train(ENGINES[engine](workload, stack))
    return steps, [next(steps) for _ in range(WARM_UP)]


# ---------------------------------------------------------------- the measured process


def resident(field: str) -> int | None:
    """Bytes of this process in memory: now ("VmRSS") or at the peak ("VmHWM"); None where Linux does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(field + ":")), None)


def give_back_memory() -> None:
    """Return memory that is free to the operating system (glibc keeps some of it otherwise)."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def peak_memory(steps: Iterator[float], count: int) -> int | None:
    """The peak of the resident set during ``count`` steps."""
    give_back_memory()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    for _ in range(count):
        next(steps)
    return resident("VmHWM")


def reason(error: BaseException) -> str:
    """An exception in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}{'...' if len(text) > 160 else ''}"


def serve(name: str, engine: str, tiny: bool) -> None:
    """Build and warm up one engine, then do what comes on stdin: "time N" or "memory N". Answers are lines of JSON."""
    warnings.simplefilter("ignore")
    answers, sys.stdout = sys.stdout, sys.stderr

    def answer(**values: Any) -> None:
        print(json.dumps(values), file=answers, flush=True)

    with ExitStack() as stack:
        try:
            WORKLOADS[name](True)  # imports what it needs, which shall not count as memory of the model
            give_back_memory()
            before = resident("VmRSS")
            torch.manual_seed(0)
            workload = WORKLOADS[name](tiny)
            steps, warm_up = begin(workload, engine, stack)
            answer(
                first=warm_up[0],
                seconds=warm_up[-1],
                batch=workload.batch_size,
                parameters=sum(p.numel() for p in workload.model.parameters()),
                trainable=sum(p.numel() for p in workload.trainable()),
                before=before,
            )
            for line in sys.stdin:
                command, count = line.split()
                if command == "time":
                    answer(seconds=[next(steps) for _ in range(int(count))])
                elif command == "resident":
                    answer(peak=resident("VmHWM"))
                else:
                    answer(peak=peak_memory(steps, int(count)))
        except Exception as error:  # noqa: BLE001 - whatever an engine raises is its result
            answer(error=reason(error))


# ---------------------------------------------------------------- the measuring process


class EngineFailure(Exception):
    """An engine refused the model, or its process ended."""


class Child:
    """A process that trains one workload with one engine when it is told to."""

    def __init__(self, workload: str, engine: str, tiny: bool, environment: dict[str, str] | None = None) -> None:
        """Start the process and wait until it has warmed up."""
        command = [sys.executable, __file__, "--child", workload, engine, *(["--tiny"] if tiny else [])]
        pipe = subprocess.PIPE
        variables = {**os.environ, **(environment or {})}
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=variables)
        try:
            self.facts = self._answer()
        except BaseException:
            self.close()
            raise

    def ask(self, command: str, count: int) -> dict[str, Any]:
        """Send a command and return the answer."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(f"{command} {count}\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise EngineFailure(f"the process ended with code {self.process.wait()}") from None
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise EngineFailure(f"the process ended with code {self.process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise EngineFailure(answer["error"])
        return answer

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()


@dataclass
class Result:
    """What was measured of one engine on one workload."""

    facts: dict[str, Any]
    turns: list[list[float]]
    peak: int | None = None
    before: int | None = None
    resident: int | None = None
    failure: str | None = None

    def seconds(self) -> list[float]:
        """The median step of every turn."""
        return [statistics.median(turn) for turn in self.turns]

    def ratios(self, baseline: "Result") -> list[float]:
        """Of every round: the turn relative to the turns of ``baseline`` around it."""
        plain = baseline.seconds()
        around = [(a + b) / 2 for a, b in pairwise(plain)]
        return [mine / other for mine, other in zip(self.seconds(), around, strict=False)]

    def first(self, baseline: "Result") -> float:
        """What the first step takes beyond the first one of ``baseline``, in its steps: learning the layout, self-check."""
        return float(self.facts["first"] - baseline.facts["first"]) / statistics.median(baseline.seconds())

    def whole(self, baseline: "Result") -> float | None:
        """The peak of the resident set over the whole run, first step included, relative to ``baseline``."""
        if self.resident is None or baseline.resident is None:
            return None
        return float((self.resident - self.facts["before"]) / (baseline.resident - baseline.facts["before"]))

    def memory(self, baseline: "Result") -> float | None:
        """What the training needs at its peak, relative to ``baseline``."""
        if self.peak is None or self.before is None or baseline.peak is None or baseline.before is None:
            return None
        return (self.peak - self.before) / (baseline.peak - baseline.before)


def progress(text: str) -> None:
    """Say what is being done; not on stdout, which is for results."""
    print(text, file=sys.stderr, flush=True)


class Measurement:
    """One workload: the processes of its engines, and their results."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        """Note what to do; nothing is started yet."""
        self.name = name
        self.options = options
        self.children: dict[str, Child] = {}
        self.results = {engine: Result({}, []) for engine in [BASELINE, *options.engine]}

    def run(self) -> dict[str, Result]:
        """Start the engines, let them take turns, measure memory, end them."""
        try:
            for engine in self.results:
                self._guard(engine, self._start)
            for number in range(self.options.rounds):
                progress(f"{self.name}: round {number + 1} of {self.options.rounds}")
                for engine in list(self.children):
                    self._guard(engine, self._turn)
            self._guard(BASELINE, self._turn)  # so that the last round, too, has one on both sides
            for engine in list(self.children):
                self._guard(engine, self._resident)
                self._guard(engine, self._memory)
        finally:
            for child in self.children.values():
                child.close()
        return self.results

    def _guard(self, engine: str, action: Callable[[str], None]) -> None:
        try:
            action(engine)
        except EngineFailure as error:
            if engine == BASELINE:
                raise SystemExit(f"{self.name} cannot be trained without privacy: {error}") from error
            progress(f"{self.name}: {engine} fails: {error}")
            self.results[engine].failure = str(error)
            if engine in self.children:
                self.children.pop(engine).close()

    def _start(self, engine: str) -> None:
        progress(f"{self.name}: starting {engine}")
        self.children[engine] = Child(self.name, engine, self.options.tiny)
        self.results[engine].facts = self.children[engine].facts

    def _turn(self, engine: str) -> None:
        turns = self.results[engine].turns
        count = self.options.steps
        if count is None:
            count = min(50, max(2, round(TURN_SECONDS / self.results[engine].facts["seconds"])))
        turns.append(self.children[engine].ask("time", count)["seconds"])

    def _resident(self, engine: str) -> None:
        child = self.children.pop(engine)
        try:
            self.results[engine].resident = child.ask("resident", 0)["peak"]
        finally:
            child.close()

    def _memory(self, engine: str) -> None:
        progress(f"{self.name}: memory of {engine}")
        result = self.results[engine]
        self.children[engine] = Child(self.name, engine, self.options.tiny, EXACT_MEMORY)
        result.before = self.children[engine].facts["before"]
        result.peak = self.children[engine].ask("memory", MEMORY_STEPS)["peak"]
        self.children.pop(engine).close()


# ---------------------------------------------------------------- reports

Results = dict[str, dict[str, Result]]


def machine() -> str:
    """The processor, the threads and the versions."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0] if names else model
    versions = f"torch {torch.__version__}, Opacus {opacus.__version__}, Python {platform.python_version()}"
    return f"{model}, {torch.get_num_threads()} threads, {versions}"


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def row(cells: list[str]) -> str:
    """A line of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


def cells_of(result: Result, baseline: "Result") -> list[str]:
    """Time and memory of one engine on one workload."""
    if result.failure is not None:
        return ["fails", "fails"]
    low, middle, high = quartiles(result.ratios(baseline))
    memory = result.memory(baseline)
    return [f"{middle:.2f} ({low:.2f} to {high:.2f})", "not measured" if memory is None else f"{memory:.2f}"]


def summary_cells(results: Results, engine: str, pick: Callable[[list[float]], float]) -> list[str]:
    """The median or maximum over the workloads that the engine can train."""
    pairs = [(r[engine], r[BASELINE]) for r in results.values() if r[engine].failure is None]
    if not pairs:
        return ["", ""]
    time_cell = f"{pick([statistics.median(mine.ratios(plain)) for mine, plain in pairs]):.2f} (of {len(pairs)})"
    memory = [m for mine, plain in pairs if (m := mine.memory(plain)) is not None]
    return [time_cell, f"{pick(memory):.2f}" if memory else ""]


def table(results: Results, engines: list[str]) -> str:
    """The results as Markdown."""
    titles = [title for engine in engines for title in (f"{engine}: time", f"{engine}: memory")]
    lines = [row(["workload (batch)", "ordinary, ms", *titles]), row(["---"] * (2 + len(titles)))]
    for name, result in results.items():
        plain = result[BASELINE]
        first = [f"{name} ({plain.facts['batch']})", f"{1000 * statistics.median(plain.seconds()):.1f}"]
        lines.append(row(first + [cell for engine in engines for cell in cells_of(result[engine], plain)]))
    for title, pick in (("median", statistics.median), ("maximum", max)):
        lines.append(row([title, ""] + [cell for engine in engines for cell in summary_cells(results, engine, pick)]))
    lines.append("")
    lines.append(
        "Ratios to ordinary training. Time: the median over the rounds (quartiles). "
        + (
            "Memory: the peak of what training needs beyond the interpreter and its libraries."
            if sys.platform == "linux"
            else "Memory is measured on Linux only."
        )
    )
    for engine in [engine for engine in engines if engine.startswith("dp_hooks")]:
        pairs = {name: (r[engine], r[BASELINE]) for name, r in results.items() if r[engine].failure is None}
        firsts = [f"{name} {mine.first(plain):.1f}" for name, (mine, plain) in pairs.items()]
        lines.append(
            f"\nThe first step with {engine}, which checks itself, takes so many ordinary steps more: {', '.join(firsts)}."
        )
        wholes = [f"{name} {ratio:.2f}" for name, (mine, plain) in pairs.items() if (ratio := mine.whole(plain)) is not None]
        if wholes:
            lines.append(
                f"\nThe peak of resident memory with {engine}, over the whole run, with glibc's own settings: {', '.join(wholes)}."
            )
    lines.append("")
    for name, result in results.items():
        for engine in engines:
            if result[engine].failure is not None:
                lines.append(f"- {name}, {engine} fails: {result[engine].failure}")
    return "\n".join(lines)


def bars(axes: Any, results: Results, engines: list[str], value: Callable[[Result, Result], float | None]) -> None:
    """Draw one group of bars per workload."""
    width = 0.8 / len(engines)
    for index, engine in enumerate(engines):
        for place, result in enumerate(results.values()):
            mine = result[engine]
            height = None if mine.failure is not None else value(mine, result[BASELINE])
            x = place + (index - (len(engines) - 1) / 2) * width
            axes.bar(x, height or 0, width, color=f"C{index}", label=engine if place == 0 else None)
            if height is None:
                axes.text(
                    x, 0.05, "fails" if mine.failure is not None else "n/a", rotation=90, ha="center", va="bottom", fontsize=8
                )
            else:
                axes.text(x, height, f"{height:.2f}", ha="center", va="bottom", fontsize=7)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(results)), [f"{name} ({r[BASELINE].facts['batch']})" for name, r in results.items()])
    axes.spines[["top", "right"]].set_visible(False)


def chart(results: Results, engines: list[str], path: str) -> None:
    """Write the bar charts of time and memory."""
    from matplotlib.figure import Figure

    def time_ratio(mine: Result, plain: Result) -> float:
        return statistics.median(mine.ratios(plain))

    def memory_ratio(mine: Result, plain: Result) -> float | None:
        return mine.memory(plain)

    figure = Figure(figsize=(max(6, 1.6 * len(results)), 7.5), layout="constrained")
    upper, lower = figure.subplots(2)
    bars(upper, results, engines, time_ratio)
    upper.set(title="Time of a training step, relative to training without privacy", ylabel="ratio")
    upper.legend(frameon=False, ncols=len(engines))
    bars(lower, results, engines, memory_ratio)
    lower.set(title="Peak memory that the training needs, relative to training without privacy", ylabel="ratio")
    lower.set_xlabel(machine(), fontsize=8)
    figure.savefig(path, dpi=150)


def as_json(results: Results) -> dict[str, Any]:
    """All raw numbers."""
    return {
        "machine": machine(),
        "workloads": {name: {engine: vars(r) for engine, r in result.items()} for name, result in results.items()},
    }


# ---------------------------------------------------------------- profile


def profiled(name: str, engine: str, steps: int, tiny: bool) -> tuple[float, dict[str, tuple[float, float]]]:
    """Milliseconds of a step without the profiler; and, per operator, milliseconds and calls in a step."""
    torch.manual_seed(0)
    with ExitStack() as stack:
        training, _ = begin(WORKLOADS[name](tiny), engine, stack)
        milliseconds = 1000 * statistics.median(next(training) for _ in range(steps))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            for _ in range(steps):
                next(training)
        events = profile.key_averages()
        return milliseconds, {e.key: (e.self_cpu_time_total / 1000 / steps, e.count / steps) for e in events}


def print_profile(name: str, engine: str, steps: int, tiny: bool) -> None:
    """The operators that take longest, beside what they take in ordinary training."""
    mine, mine_ops = profiled(name, engine, steps, tiny)
    plain, plain_ops = profiled(name, BASELINE, steps, tiny)
    print(f"\n{name}: a step takes {mine:.1f} ms with {engine}, {plain:.1f} ms with {BASELINE}")
    print("Self CPU time in ms and calls, of one step under the profiler:")
    print(f"{'':44}{engine:>24}{BASELINE:>24}{'difference':>12}")
    for key in sorted(mine_ops, key=lambda key: -mine_ops[key][0])[:25]:
        (ms, calls), (plain_ms, plain_calls) = mine_ops[key], plain_ops.get(key, (0.0, 0.0))
        print(f"{key[:43]:44}{ms:14.2f}{calls:10.1f}{plain_ms:14.2f}{plain_calls:10.1f}{ms - plain_ms:12.2f}")
    total, plain_total = (sum(ms for ms, _ in ops.values()) for ops in (mine_ops, plain_ops))
    print(f"{'all operators':44}{total:14.2f}{'':10}{plain_total:14.2f}{'':10}{total - plain_total:12.2f}")


# ---------------------------------------------------------------- command line


def choice(known: Any) -> Callable[[str], list[str]]:
    """A parser of comma-separated names out of ``known``."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(known)}")
        return names

    return parse


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--workload",
        type=choice([*WORKLOADS, *TINY]),
        help=f"comma-separated; the default leaves out llama-checkpointed. With --overhead: {', '.join(TINY)}",
    )
    parser.add_argument(
        "--engine",
        type=choice(ENGINES),
        default=DEFAULT_ENGINES,
        help="comma-separated; the default leaves out dp_hooks-hooks, dp_hooks-two-pass and those of units",
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns of every engine")
    parser.add_argument("--overhead", action="store_true", help="measure tiny models, of which overhead is all that is left")
    parser.add_argument("--steps", type=int, help="steps in a turn; default: about a second, at least two steps")
    parser.add_argument("--output", help="write a chart to this PNG file (needs matplotlib)")
    parser.add_argument("--json", help="write the raw numbers to this file")
    parser.add_argument("--profile", action="store_true", help="profile instead of measuring")
    parser.add_argument("--tiny", action="store_true", help="very small models, to see that everything runs")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rounds < 1 or (options.steps is not None and options.steps < 1):
        parser.error("--rounds and --steps are at least 1")
    if options.output and importlib.util.find_spec("matplotlib") is None:
        parser.error("--output draws with matplotlib, which is not installed: pip install matplotlib")
    known = TINY if options.overhead else WORKLOADS
    options.workload = options.workload or list(TINY if options.overhead else DEFAULT_WORKLOADS)
    if foreign := [name for name in options.workload if name not in known]:
        mode = "with" if options.overhead else "without"
        parser.error(f"--workload {', '.join(foreign)}: {mode} --overhead choose from {', '.join(known)}")
    options.engine = [engine for engine in options.engine if engine != BASELINE]
    return options


def main() -> None:
    """Measure, or profile."""
    options = parse_arguments()
    if options.child:
        serve(*options.child, tiny=options.tiny)
        return
    if options.overhead:
        print(f"{machine()}, of which one thread is used\n\n{overhead.report(options.workload, 6 * options.rounds)}")
        return
    if options.profile:
        engines = ["dp_hooks"] if options.engine == DEFAULT_ENGINES else options.engine
        for name in options.workload:
            for engine in engines:
                print_profile(name, engine, options.steps or 5, options.tiny)
        return
    results: Results = {}
    for name in options.workload:
        results[name] = Measurement(name, options).run()
        if options.json:  # after each workload, so that a run that is broken off is not lost
            Path(options.json).write_text(json.dumps(as_json(results), indent=1))
    print(f"{machine()}\n\n{table(results, options.engine)}")
    if options.output:
        chart(results, options.engine, options.output)


if __name__ == "__main__":
    main()
