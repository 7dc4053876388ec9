"""What a trainer does in a private scope, against its own loss on one example after the other."""

import copy

import pytest
import torch

from .language import DELTA, EXAMPLES, C, language_model, preference_trainer, quietly, sft_trainer, trained_by, transformers_trainer


def clipped_mean(trainer, model, expected):
    """Return the sum of the clipped gradients of each example alone, by the trainer's own ``compute_loss``, divided."""
    params = [p for p in model.parameters() if p.requires_grad]
    total = [torch.zeros_like(p) for p in params]
    loader = trainer.get_train_dataloader()
    for k in range(EXAMPLES):
        batch = trainer._prepare_inputs(loader.collate_fn([copy.deepcopy(loader.dataset[k])]))
        loss = trainer.compute_loss(model.train(), batch)
        grads = torch.autograd.grad(loss, params, allow_unused=True)
        grads = [torch.zeros_like(p) if g is None else g for p, g in zip(params, grads, strict=True)]
        norm = torch.cat([g.flatten() for g in grads]).norm()
        for t, g in zip(total, grads, strict=True):
            t.add_(g * min(1.0, float(C / norm)))
    return [t / expected for t in total]


def reward(model_is_lora, folder, **more):
    model = language_model(lora=model_is_lora, kind="LlamaForSequenceClassification", num_labels=1)
    return preference_trainer("Reward", model, folder, **more), model


def preference(model_is_lora, folder, **more):
    model = language_model(lora=model_is_lora)
    return preference_trainer("DPO", model, folder, **more), model


def supervised(model_is_lora, folder, **more):
    model = language_model(lora=model_is_lora)
    return sft_trainer(model, folder, **more), model


def plain(model_is_lora, folder, **more):
    model = language_model(lora=model_is_lora)
    return transformers_trainer(model, folder, **more), model


CASES = {"Trainer": plain, "SFTTrainer": supervised, "DPOTrainer": preference, "RewardTrainer": reward}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", CASES)
def test_a_step_is_the_sum_of_what_each_example_gives_alone(kind, lora, checkpointing, tmp_path):
    """Pairs, tokens and adapters: the trainer's own loss of one example, by plain autograd, clipped, added up and divided."""
    with quietly():
        # With reentrant checkpoints PyTorch itself leaves out gradients behind frozen embeddings.
        more = {"gradient_checkpointing": checkpointing, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
        trainer, model = CASES[kind](lora, tmp_path, max_steps=1, **more)
        before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
        wanted = clipped_mean(trainer, model, EXAMPLES)
        scope = trained_by(trainer, sample_rate=1.0)
    after = [p.detach() for p in model.parameters() if p.requires_grad]
    off = torch.cat([(b - a - 0.5 * w).flatten() for a, b, w in zip(after, before, wanted, strict=True)]).norm()
    size = torch.cat([0.5 * w.flatten() for w in wanted]).norm()
    assert float(size) > 1e-3
    assert float(off / size) < 1e-4
    assert scope.report(DELTA).loss_verified
