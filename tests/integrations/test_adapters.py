"""Adapters of PEFT in a trainer, against the trainer's own loss on one example after the other, by plain autograd."""

import math

import pytest
import torch
from torch import Tensor, nn

from ..models import drawn
from .language import DELTA, EXAMPLES, language_model, quietly, sft_trainer, trained_by, transformers_trainer
from .test_examples_of_a_trainer import clipped_mean


def adapted(kind):
    """A small Llama with adapters of a kind, of which none is zero."""
    from peft import IA3Config, LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model

    layers = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
    configs = {
        "LoRA": LoraConfig(r=2, task_type="CAUSAL_LM", **layers),
        "LoRA of embeddings": LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["embed_tokens", "lm_head", "k_proj"]),
        "DoRA": LoraConfig(r=2, task_type="CAUSAL_LM", use_dora=True, **layers),
        "IA3": IA3Config(task_type="CAUSAL_LM", feedforward_modules=["down_proj"], **layers),
        "prompt tuning": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        "p-tuning": PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8),
        "prefix tuning": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    }
    model = get_peft_model(language_model(lora=False), configs["LoRA" if kind == "quantised" else kind])
    if kind == "quantised":
        quantise(model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name or "lora_embedding" in name:
                p.normal_(generator=drawn(5))
    return model


class Product(torch.autograd.Function):
    """``x @ W.T`` of a matrix in int8, which gets no gradient: as the kernels of quantised layers do it."""

    @staticmethod
    def forward(ctx, x: Tensor, numbers: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(numbers, scale)
        return x @ (numbers.to(x.dtype) * scale).T

    @staticmethod
    def backward(ctx, grad: Tensor):
        numbers, scale = ctx.saved_tensors
        return grad @ (numbers.to(grad.dtype) * scale), None, None


class QuantisedLinear(nn.Module):
    """A frozen linear layer whose weights are int8 with one scale for each row, in buffers."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        scale = layer.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("numbers", (layer.weight.detach() / scale).round().to(torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        return Product.apply(x, self.numbers, self.scale)


def quantise(model: nn.Module) -> None:
    """Every frozen linear layer below an adapter, and beside it, becomes a quantised one."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and not child.weight.requires_grad and name != "lm_head":
                setattr(module, name, QuantisedLinear(child))


KINDS = ["LoRA", "LoRA of embeddings", "DoRA", "IA3", "prompt tuning", "p-tuning", "prefix tuning", "quantised"]
# With checkpoints transformers drops the cache that prefixes are in.
CASES = [(kind, again) for kind in KINDS for again in (False, True) if not again or kind != "prefix tuning"]
MAKE = {"Trainer": transformers_trainer, "SFTTrainer": sft_trainer}


def checkpoints(again):
    return {"gradient_checkpointing": bool(again), "gradient_checkpointing_kwargs": {"use_reentrant": again == "reentrant"}}


@pytest.mark.parametrize(
    ("kind", "again", "make"),
    [
        *[(*case, "Trainer") for case in CASES],
        *[(kind, "reentrant", "Trainer") for kind in ("LoRA", "IA3")],
        *[(kind, True, "SFTTrainer") for kind in ("DoRA", "prompt tuning")],
    ],
)
def test_adapters_are_trained_as_each_example_says_alone(kind, again, make, tmp_path):
    """One step on all examples is the sum of what each of them gives alone, clipped, with gradient checkpointing as well."""
    with quietly():
        model = adapted(kind)
        trainer = MAKE[make](model, tmp_path, max_steps=1, **checkpoints(again))
        trained = [p for p in model.parameters() if p.requires_grad]
        before = [p.detach().clone() for p in trained]
        wanted = clipped_mean(trainer, model, EXAMPLES)
        scope = trained_by(trainer, sample_rate=1.0)
    off = math.hypot(*[float((b - p.detach() - 0.5 * w).norm()) for p, b, w in zip(trained, before, wanted, strict=True)])
    size = math.hypot(*[float(0.5 * w.norm()) for w in wanted])
    assert size > 1e-3
    assert off < 1e-4 * size + 1e-7 * math.hypot(*[float(b.norm()) for b in before])  # as far as parameters can be told apart
    assert scope.report(DELTA).loss_verified
