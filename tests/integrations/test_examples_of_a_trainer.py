"""What a trainer does in a private scope, against its own loss on one example after the other."""

import copy

import pytest
import torch

from .language import DELTA, EXAMPLES, C, language_model, preference_trainer, quietly, sft_trainer, trained_by, transformers_trainer


def clipped_mean(trainer, model, expected, units=None):
    """Return the sum of the clipped gradients of each example alone, by the trainer's own ``compute_loss``, divided.

    With ``units``, of each example, those of a unit are added up before they are clipped.
    """
    if getattr(model, "is_gradient_checkpointing", False):
        # As train() will do: trainers of TRL 0.24 begin with reentrant ones, whatever they are told.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    params = [p for p in model.parameters() if p.requires_grad]
    total = [torch.zeros_like(p) for p in params]
    loader = trainer.get_train_dataloader()
    of_unit = {}
    for k in range(EXAMPLES):
        batch = trainer._prepare_inputs(loader.collate_fn([copy.deepcopy(loader.dataset[k])]))
        loss = trainer.compute_loss(model.train(), batch)
        grads = torch.autograd.grad(loss, params, allow_unused=True)
        grads = [torch.zeros_like(p) if g is None else g for p, g in zip(params, grads, strict=True)]
        unit = k if units is None else units[k]
        of_unit[unit] = [a + b for a, b in zip(of_unit[unit], grads, strict=True)] if unit in of_unit else grads
    for grads in of_unit.values():
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


def of_tokens(kind):
    """Return a case of a model with labels for tokens, which need not care for ``num_items_in_batch``."""

    def case(model_is_lora, folder, **more):
        import transformers

        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
        if kind == "T5ForConditionalGeneration":
            sizes = {
                "d_model": 16,
                "d_kv": 8,
                "d_ff": 24,
                "num_layers": 1,
                "num_heads": 2,
                "decoder_start_token_id": 0,
                "dropout_rate": 0.0,
            }
        elif kind.startswith("Bert"):  # a number in the attention of some versions, and no module that could be switched off
            sizes |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        config = getattr(transformers, f"{kind[:2] if kind[:2] == 'T5' else kind.partition('For')[0]}Config")
        model = getattr(transformers, kind)(config(vocab_size=20, **({} if "Token" not in kind else {"num_labels": 20}), **sizes))
        return transformers_trainer(model, folder, **more), model

    return case


@pytest.mark.parametrize("part", [1, 3])
@pytest.mark.parametrize("kind", ["BertForMaskedLM", "BertForTokenClassification", "T5ForConditionalGeneration", "GPT2LMHeadModel"])
def test_losses_of_tokens_are_taken_apart_whatever_the_model_makes_of_their_number(kind, part, tmp_path):
    """Many models take ``num_items_in_batch`` and leave it: their mean over all tokens is not taken for the sum."""
    kind_of = language_model_of_gpt2 if kind.startswith("GPT2") else of_tokens(kind)
    with quietly():
        trainer, model = kind_of(False, tmp_path, max_steps=1, per_device_train_batch_size=part)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
        wanted = clipped_mean(trainer, model, EXAMPLES)
        trained_by(trainer, sample_rate=1.0)
    after = [p.detach() for p in model.parameters() if p.requires_grad]
    off = torch.cat([(b - a - 0.5 * w).flatten() for a, b, w in zip(after, before, wanted, strict=True)]).norm()
    assert float(off / torch.cat([0.5 * w.flatten() for w in wanted]).norm()) < 1e-4


def language_model_of_gpt2(model_is_lora, folder, **more):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    dropped = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=16, n_embd=16, n_layer=1, n_head=2, **dropped))
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
    assert_moved(model, before, wanted)
    assert scope.report(DELTA).loss_verified


@pytest.mark.parametrize("kind", ["SFTTrainer", "DPOTrainer"])
def test_a_step_is_the_sum_of_units_of_several_examples(kind, tmp_path):
    """``privacy_unit`` goes to the scope: pairs, tokens and their weights are those of examples, and units are clipped as one."""
    units = [k // 2 for k in range(EXAMPLES)]
    with quietly():
        trainer, model = CASES[kind](False, tmp_path, max_steps=1)
        before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
        wanted = clipped_mean(trainer, model, EXAMPLES, units)
        scope = trained_by(trainer, sample_rate=1.0, privacy_unit=units)
    assert_moved(model, before, wanted)
    assert scope.report(DELTA).units == max(units) + 1


def assert_moved(model, before, wanted):
    """Assert that parameters moved by half of what is ``wanted``."""
    after = [p.detach() for p in model.parameters() if p.requires_grad]
    off = torch.cat([(b - a - 0.5 * w).flatten() for a, b, w in zip(after, before, wanted, strict=True)]).norm()
    size = torch.cat([0.5 * w.flatten() for w in wanted]).norm()
    assert float(size) > 1e-3
    assert float(off / size) < 1e-4
