"""One small language model on sentences of several lengths, trained privately by every trainer there is."""

import contextlib
import copy
import io
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from dp_hooks import dp_step, private_training
from dp_hooks.integrations import private_trainer

from ..models import drawn

WORDS, LONGEST, EXAMPLES, EPOCHS = 20, 7, 10, 2
EACH, ACCUMULATED = 2, 2  # examples in a part, and parts in a logical batch, as expected
C, DELTA = 0.5, 1e-5


class Sentences(Dataset[dict[str, Tensor]]):
    """Sentences of 3 to 7 words."""

    def __init__(self, *, padded: bool = True) -> None:
        generator = drawn(3)
        self.rows = [torch.randint(1, WORDS, (3 + k % 5,), generator=generator) for k in range(EXAMPLES)]
        self.padded = padded

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, k: int) -> dict[str, Tensor]:
        ids = self.rows[int(k)]
        padding = LONGEST - len(ids)
        return {
            "input_ids": F.pad(ids, (0, padding)),
            "attention_mask": F.pad(torch.ones_like(ids), (0, padding)),
            "labels": F.pad(ids, (0, padding), value=-100),
        }


def sampled(dataset: Any, batch_size: int, collate_fn: Any = None) -> DataLoader[Any]:
    """Return a loader whose private batches are the same every time."""
    return DataLoader(dataset, batch_size=batch_size, shuffle=True, generator=drawn(7), collate_fn=collate_fn)


def language_model(*, lora: bool, kind: str = "LlamaForCausalLM", **more: Any) -> nn.Module:
    """Return a Llama of two layers, with LoRA adapters of which none is zero if asked for."""
    import transformers
    from transformers import LlamaConfig

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(
        vocab_size=WORDS, **sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2, max_position_embeddings=32, **more
    )
    model: nn.Module = getattr(transformers, kind)(config)
    if lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(
            model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM" if "Causal" in kind else "SEQ_CLS")
        )
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    p.normal_(generator=drawn(5))
    return model


def losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Each sentence's loss: the mean over its own words."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
    labels = batch["labels"][:, 1:]
    each = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels, reduction="none", ignore_index=-100)
    return each.sum(1) / (labels != -100).sum(1)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)


OPTIONS: dict[str, Any] = {"noise_multiplier": 0.0, "max_grad_norm": C, "accountant": "rdp"}
IN_LOOPS: dict[str, Any] = {**OPTIONS, "max_physical_batch_size": EACH}


def autocast(bf16: bool) -> Any:
    return torch.autocast("cpu", torch.bfloat16, enabled=bf16)


def scope_over(model: nn.Module) -> Any:
    return private_training(model, sgd(model), sampled(Sentences(), EACH * ACCUMULATED), **IN_LOOPS)


def bare_loop(model: nn.Module, bf16: bool) -> Any:
    with (scope := scope_over(model)) as (opt, loader):
        for _ in range(EPOCHS):
            for batch in loader:
                opt.zero_grad()
                if len(batch["labels"]):
                    with autocast(bf16):
                        loss = losses(model, batch).mean()
                    loss.backward()
                opt.step()
    return scope


def decorated_step(model: nn.Module, bf16: bool) -> Any:
    @dp_step
    def train(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        with autocast(bf16):
            return losses(model, batch)

    with (scope := scope_over(model)) as (_, loader):
        for _ in range(EPOCHS):
            for batch in loader:
                train(model, batch)
    return scope


def accelerated(model: nn.Module, bf16: bool) -> Any:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16" if bf16 else "no")
    with (scope := scope_over(model)) as (opt, loader):
        prepared, opt, loader = accelerator.prepare(model, opt, loader)
        for _ in range(EPOCHS):
            for batch in loader:
                opt.zero_grad()
                if len(batch["labels"]):
                    accelerator.backward(losses(prepared, batch).mean())
                opt.step()
    AcceleratorState._reset_state(True)
    vars(model).pop("forward", None)
    return scope


def arguments(folder: Path, bf16: bool, kind: Any = None, **more: Any) -> Any:
    """Return the arguments of a trainer of transformers; the precision of an earlier one in this process is forgotten."""
    from accelerate.state import AcceleratorState
    from transformers import TrainingArguments

    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
    AcceleratorState._reset_state(True)
    options: dict[str, Any] = {
        "per_device_train_batch_size": EACH,
        "gradient_accumulation_steps": ACCUMULATED,
        "num_train_epochs": EPOCHS,
        "lr_scheduler_type": "constant",
        "use_cpu": True,
        "bf16": bf16,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        **more,
    }
    return (kind or TrainingArguments)(str(folder), **options)


def transformers_trainer(model: nn.Module, folder: Path, bf16: bool = False, eval_dataset: Any = None, **more: Any) -> Any:
    from transformers import Trainer

    data: dict[str, Any] = {"train_dataset": Sentences(), "eval_dataset": eval_dataset}
    trainer = Trainer(model=model, args=arguments(folder, bf16, **more), **data, optimizers=(sgd(model), None))
    trainer.get_train_dataloader = lambda: sampled(trainer.train_dataset, EACH)
    return trainer


def tokenizer() -> Any:
    """Return a tokenizer of twenty words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{k}": k for k in range(3, WORDS)}}
    split = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    split.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=split, pad_token="<pad>", eos_token="</s>", bos_token="<s>")


def sft_trainer(model: nn.Module, folder: Path, bf16: bool = False, **more: Any) -> Any:
    from datasets import Dataset as Table
    from trl import SFTConfig, SFTTrainer

    table = Table.from_list([{"input_ids": ids.tolist()} for ids in Sentences().rows])
    trainer = SFTTrainer(
        model=model,
        args=arguments(folder, bf16, SFTConfig, max_length=16, **more),
        train_dataset=table,
        processing_class=tokenizer(),
        optimizers=(sgd(model), None),
    )
    trainer.get_train_dataloader = lambda: sampled(trainer.train_dataset, EACH, trainer.data_collator)
    return trainer


def preference_trainer(kind: str, model: nn.Module, folder: Path, **more: Any) -> Any:
    """Return TRL's trainer of that kind on pairs of answers of several lengths."""
    import trl
    from datasets import Dataset as Table

    def words(ids: Tensor) -> str:
        return " ".join(f"w{max(3, int(k))}" for k in ids)

    rows = Sentences().rows
    pairs = [
        {"prompt": words(a[:2]), "chosen": words(a), "rejected": words(b)}
        for a, b in zip(rows, [*rows[3:], *rows[:3]], strict=True)
    ]
    others = {"ref_model": copy.deepcopy(model)} if kind == "DPO" and not hasattr(model, "peft_config") else {}
    return getattr(trl, f"{kind}Trainer")(
        model=model,
        args=arguments(folder, False, getattr(trl, f"{kind}Config"), max_length=32, **more),
        train_dataset=Table.from_list(pairs),
        processing_class=tokenizer(),
        optimizers=(sgd(model), None),
        **others,
    )


def trained_by(trainer: Any, **options: Any) -> Any:
    with contextlib.redirect_stdout(io.StringIO()), private_trainer(trainer, **{**OPTIONS, **options}) as scope:
        trainer.train()
    return scope


def lightning(model: nn.Module, bf16: bool, **options: Any) -> Any:
    import lightning as L

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = losses(self.inner, batch).mean()
            self.log("train_loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            return sgd(self.inner)

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    quiet: dict[str, Any] = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    precision: Any = "bf16-mixed" if bf16 else "32-true"
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_epochs=EPOCHS, accumulate_grad_batches=ACCUMULATED, precision=precision, **quiet
    )
    module = Module()
    with private_trainer(trainer, module, train_dataloaders=sampled(Sentences(), EACH), **{**OPTIONS, **options}) as scope:
        trainer.fit(module)
    return scope


TRAINERS: dict[str, Callable[[nn.Module, bool, Path], Any]] = {
    "Trainer": lambda model, bf16, folder: trained_by(transformers_trainer(model, folder, bf16)),
    "SFTTrainer": lambda model, bf16, folder: trained_by(sft_trainer(model, folder, bf16)),
    "Accelerate": lambda model, bf16, folder: accelerated(model, bf16),
    "Lightning": lambda model, bf16, folder: lightning(model, bf16),
    "bare loop": lambda model, bf16, folder: bare_loop(model, bf16),
    "dp_step": lambda model, bf16, folder: decorated_step(model, bf16),
}


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Leave out what the libraries say of themselves."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def trained(trainer: str, folder: Path, *, lora: bool, bf16: bool) -> tuple[list[Tensor], Any]:
    """Train with one of them; return by how much each trained parameter moved, and the scope."""
    model = language_model(lora=lora)
    before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    with quietly():
        scope = TRAINERS[trainer](model, bf16, folder)
    after = [p.detach() for p in model.parameters() if p.requires_grad]
    return [b - a for a, b in zip(after, before, strict=True)], scope


_references: dict[tuple[bool, bool], Any] = {}


def reference(*, lora: bool, bf16: bool) -> tuple[list[Tensor], Any]:
    """What a bare loop does."""
    key = (lora, bf16)
    if key not in _references:
        _references[key] = trained("bare loop", Path(), lora=lora, bf16=bf16)
    moves, history = _references[key]
    return copy.copy(moves), history
