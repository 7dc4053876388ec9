"""What does not change about a transformer when it is trained privately with hooks instead of a wrapper.

    python examples/hook_based_example.py

Shows ``PrivacyEngineHookBased`` in the place of Opacus's engine: a small randomly initialised BERT classifier is trained on
synthetic text for some private steps, and four things are checked on the way, side by side with Opacus's wrapper:
``isinstance``, state-dict keys, direct attribute access, and the structure of the model. Takes 12 seconds of processor time.
Prints each of the four before, with Opacus and with hooks, then loss and epsilon of three epochs.
"""

import torch
from opacus import PrivacyEngine
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertConfig, BertForSequenceClassification

from dp_hooks import PrivacyEngineHookBased

VOCABULARY, LENGTH, EXAMPLES = 200, 16, 512


def make_model() -> BertForSequenceClassification:
    """Build a BERT of two layers; nothing is downloaded."""
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=LENGTH,
        num_labels=2,
    )
    return BertForSequenceClassification(config).train()


def make_data() -> TensorDataset:
    """Sequences labelled by whether their first half holds more small ids than their second."""
    ids = torch.randint(0, VOCABULARY, (EXAMPLES, LENGTH))
    small = (ids < VOCABULARY // 2).long()
    labels = (small[:, : LENGTH // 2].sum(1) > small[:, LENGTH // 2 :].sum(1)).long()
    return TensorDataset(ids, labels)


def facts(model: torch.nn.Module) -> dict[str, object]:
    """The four points, as values that can be compared."""
    try:
        labels = f"{model.config.num_labels} labels"
    except AttributeError as error:
        labels = f"AttributeError: {error}"
    return {
        "isinstance(model, BertForSequenceClassification)": isinstance(model, BertForSequenceClassification),
        "first state-dict key": next(iter(model.state_dict())),
        "model.config.num_labels": labels,
        "outermost module, number of modules": (type(model).__name__, len(list(model.modules()))),
    }


def main() -> None:
    """Compare wrapper and hooks, then train."""
    torch.manual_seed(0)
    loader = DataLoader(make_data(), batch_size=64)

    wrapped = make_model()
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=2e-3)
    wrapped, _, _ = PrivacyEngine().make_private(
        module=wrapped, optimizer=optimizer, data_loader=loader, noise_multiplier=1.0, max_grad_norm=1.0
    )

    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    original, before = model, facts(model)
    with PrivacyEngineHookBased() as engine:
        model, optimizer, private_loader = engine.make_private(
            module=model, optimizer=optimizer, data_loader=loader, noise_multiplier=1.0, max_grad_norm=1.0
        )
        assert model is original

        for point, value in before.items():
            print(f"{point}\n    before  {value}\n    Opacus  {facts(wrapped)[point]}\n    hooks   {facts(model)[point]}")
        assert facts(model) == before

        for epoch in range(3):
            total = 0.0
            for ids, labels in private_loader:
                optimizer.zero_grad()
                loss = torch.nn.functional.cross_entropy(model(input_ids=ids).logits, labels)
                loss.backward()
                optimizer.step()
                total += loss.item() / len(private_loader)
            print(f"epoch {epoch + 1}: loss {total:.4f}, epsilon {engine.get_epsilon(1e-5):.2f} at delta 1e-5")

    assert facts(model) == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    print("after the scope: no hook is left, and the model is what it was, trained")


if __name__ == "__main__":
    main()
