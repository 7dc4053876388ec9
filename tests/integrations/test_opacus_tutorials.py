"""The training loops of Opacus's tutorials, on small made-up data, with the import line changed and nothing else.

Each is run with its own noise, generator fixed, beside the same loop over a bare private scope that cuts no batch, or without noise
beside plain autograd on single examples; what is charged is what Opacus's own accountant says of the rate and the steps.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from opacus.accountants import RDPAccountant
from opacus.data_loader import DPDataLoader
from opacus.utils.batch_memory_manager import BatchMemoryManager
from opacus.validators import ModuleValidator
from torch import Tensor, nn, optim
from torch.utils.data import DataLoader, Dataset, TensorDataset

from dp_hooks import PrivacyEngineHookBased as PrivacyEngine
from dp_hooks import private_training

from ..models import Net, assert_same, clipped_sum, drawn, moved, sample_gradients, values

DELTA = 1e-5
pytestmark = pytest.mark.filterwarnings("ignore:the loss did not reach", "ignore:Using a non-full backward hook")


def epsilon_by_opacus(sigma: float, rate: float, steps: int) -> float:
    """What Opacus's accountant says of so many steps."""
    accountant = RDPAccountant()
    accountant.history = [(sigma, rate, steps)]
    return float(accountant.get_epsilon(DELTA))


def separable(n: int, *shape: int) -> TensorDataset:
    """Two classes that differ by their mean."""
    labels = torch.arange(n) % 2
    return TensorDataset(torch.randn(n, *shape, generator=drawn(1)) + (2 * labels - 1).view(n, *[1] * len(shape)), labels)


def mean_loss(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> float:
    """The loss in evaluation mode; the mode is as it was afterwards."""
    mode = model.training
    model.eval()
    with torch.no_grad():
        value = float(loss(model))
    model.train(mode)
    return value


def bare(
    model: nn.Module, optimizer: Any, loader: Any, loss: Callable[[nn.Module, Any], Tensor], passes: int, **options: Any
) -> list[Tensor]:
    """Train in a scope, whole batches at a time, and return the parameters."""
    with private_training(model, optimizer, loader, accountant="rdp", check_collate=False, **options) as (opt, own):
        for _ in range(passes):
            for batch in own:
                opt.zero_grad()
                loss(model, batch).backward()
                opt.step()
    return [p.detach().clone() for p in model.parameters() if p.requires_grad]


def trainable(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters() if p.requires_grad]


# ---------------------------------------------------------------- building an image classifier (CIFAR-10, ResNet-18)


def test_cifar10_with_resnet18() -> None:
    """ResNet-18 made compatible, a target epsilon, and BatchMemoryManager: the weights of whole batches, within the budget."""
    from torchvision import models

    data, epochs, physical = separable(24, 3, 32, 32), 1, 5
    torch.manual_seed(0)
    model = ModuleValidator.fix(models.resnet18(num_classes=2))
    assert ModuleValidator.validate(model, strict=False) == []
    reference, budget = copy.deepcopy(model), {"target_epsilon": 50.0, "target_delta": DELTA, "epochs": epochs}
    train_loader = DataLoader(data, batch_size=8, generator=drawn(3))
    criterion = nn.CrossEntropyLoss()
    optimizer = optim.RMSprop(model.parameters(), lr=1e-3)

    privacy_engine = PrivacyEngine(accountant="rdp")
    noise = {"max_grad_norm": 1.2, "noise_generator": drawn(5)}
    model, optimizer, train_loader = privacy_engine.make_private_with_epsilon(
        module=model, optimizer=optimizer, data_loader=train_loader, **budget, **noise
    )
    losses = []
    for _ in range(epochs):
        model.train()
        with BatchMemoryManager(
            data_loader=train_loader, max_physical_batch_size=physical, optimizer=optimizer
        ) as memory_safe_data_loader:
            for images, target in memory_safe_data_loader:
                assert len(images) <= physical
                optimizer.zero_grad()
                output = model(images)
                loss = criterion(output, target)
                losses.append(loss.item())
                loss.backward()
                optimizer.step()
    sigma = optimizer.noise_multiplier
    assert len(losses) > 3
    assert privacy_engine.get_epsilon(DELTA) == pytest.approx(epsilon_by_opacus(sigma, 8 / 24, 3))
    assert privacy_engine.get_epsilon(DELTA) <= 50
    privacy_engine.cleanup()
    again = bare(
        reference,
        optim.RMSprop(reference.parameters(), lr=1e-3),
        DataLoader(data, batch_size=8, generator=drawn(3)),
        lambda m, batch: criterion(m(batch[0]), batch[1]),
        epochs,
        **budget,
        max_grad_norm=1.2,
        noise_generator=drawn(5),
    )
    # RMSprop divides by the size of a gradient, so rounding shows where that is next to nothing
    assert_same(trainable(model), again, 2e-3)


# ---------------------------------------------------------------- MNIST


class SampleConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 8, 2, padding=3)
        self.conv2 = nn.Conv2d(4, 8, 4, 2)
        self.fc1 = nn.Linear(8 * 4 * 4, 8)
        self.fc2 = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2, 1)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2, 1)
        return self.fc2(F.relu(self.fc1(x.view(-1, 8 * 4 * 4))))


@pytest.mark.parametrize("given", [lambda loader: loader, DPDataLoader.from_data_loader], ids=["DataLoader", "DPDataLoader"])
def test_mnist(given: Callable[[Any], Any]) -> None:
    """The convolutional network learns two classes that are easy to tell, whoever has made the Poisson batches before."""
    data = separable(240, 1, 28, 28)
    torch.manual_seed(0)
    model = SampleConvNet()
    optimizer = optim.SGD(model.parameters(), lr=0.3, momentum=0)
    train_loader = given(DataLoader(data, batch_size=60, generator=drawn(3)))
    privacy_engine = PrivacyEngine(accountant="rdp", secure_mode=False)
    model, optimizer, train_loader = privacy_engine.make_private(
        module=model,
        optimizer=optimizer,
        data_loader=train_loader,
        noise_multiplier=1.1,
        max_grad_norm=1.0,
        noise_generator=drawn(5),
    )
    whole = data.tensors
    before = mean_loss(model, lambda m: F.cross_entropy(m(whole[0]), whole[1]))
    criterion = nn.CrossEntropyLoss()
    for _ in range(6):
        model.train()
        for x, target in train_loader:
            optimizer.zero_grad()
            loss = criterion(model(x), target)
            loss.backward()
            optimizer.step()
    assert mean_loss(model, lambda m: F.cross_entropy(m(whole[0]), whole[1])) < before / 3
    assert privacy_engine.get_epsilon(delta=DELTA) == pytest.approx(epsilon_by_opacus(1.1, 0.25, 24))
    privacy_engine.cleanup()


# ---------------------------------------------------------------- text classification: BERT, its last layers only


class Sentences(Dataset[tuple[Tensor, ...]]):
    """Ids, mask, token types and label, as the tutorial's ``TensorDataset`` of features has them."""

    def __init__(self, n: int) -> None:
        self.ids = torch.randint(4, 40, (n, 9), generator=drawn(1))
        self.labels = torch.arange(n) % 2
        self.ids[:, 1] = 2 + self.labels
        lengths = 5 + torch.arange(n) % 5
        self.mask = (torch.arange(9) < lengths[:, None]).long()
        self.ids = self.ids * self.mask

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> tuple[Tensor, ...]:
        return self.ids[i], self.mask[i], torch.zeros_like(self.ids[i]), self.labels[i]


def of_fields(batch: Any) -> dict[str, Tensor]:
    return {"input_ids": batch[0], "attention_mask": batch[1], "token_type_ids": batch[2], "labels": batch[3]}


def small_bert() -> nn.Module:
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24, num_labels=2,
        max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model: nn.Module = transformers.BertForSequenceClassification(config)
    layers = [model.bert.encoder.layer[-1], model.bert.pooler, model.classifier]
    for p in model.parameters():
        p.requires_grad = False
    for layer in layers:
        for p in layer.parameters():
            p.requires_grad = True
    return model.train()


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_text_classification_with_bert(mode: str) -> None:
    """The last layers of BERT through BatchMemoryManager: the weights of whole batches, and nothing else has moved."""
    data = Sentences(24)
    model, reference = small_bert(), small_bert()
    frozen = [p.detach().clone() for p in model.parameters() if not p.requires_grad]
    optimizer = optim.AdamW(model.parameters(), lr=5e-4, eps=1e-2)
    privacy_engine = PrivacyEngine(accountant="rdp")
    noise = {"noise_multiplier": 0.6, "max_grad_norm": 0.1}
    model, optimizer, *_, train_dataloader = privacy_engine.make_private(
        module=model,
        optimizer=optimizer,
        data_loader=DataLoader(data, batch_size=8, generator=drawn(3)),
        **noise,
        grad_sample_mode=mode,
        poisson_sampling=True,
        noise_generator=drawn(5),
    )
    steps = 0
    for _ in range(2):
        with BatchMemoryManager(
            data_loader=train_dataloader, max_physical_batch_size=3, optimizer=optimizer
        ) as memory_safe_data_loader:
            for step, batch in enumerate(memory_safe_data_loader):
                optimizer.zero_grad()
                outputs = model(**of_fields(batch))
                loss = outputs[0]
                loss.backward()
                optimizer.step()
                steps = max(steps, step)
    assert steps > 3
    assert privacy_engine.get_epsilon(DELTA) == pytest.approx(epsilon_by_opacus(0.6, 8 / 24, 6))
    privacy_engine.cleanup()
    again = bare(
        reference,
        optim.AdamW(reference.parameters(), lr=5e-4, eps=1e-2),
        DataLoader(data, batch_size=8, generator=drawn(3)),
        lambda m, batch: m(**of_fields(batch))[0],
        2,
        **noise,
        noise_generator=drawn(5),
    )
    assert_same(trainable(model), again, 1e-5)
    assert_same([p.detach() for p in model.parameters() if not p.requires_grad], frozen, 0.0)


# ---------------------------------------------------------------- names: a character LSTM


class CharNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 6)
        self.lstm = nn.LSTM(6, 8, num_layers=1, batch_first=True)
        self.out_layer = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden, _ = self.lstm(self.embedding(x))
        return self.out_layer(hidden[:, -1])


def padded(names: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    """Pad at the beginning, as the tutorial does, so that the last state is of the name."""
    longest = max(len(name) for name, _ in names)
    return torch.stack([F.pad(name, (longest - len(name), 0)) for name, _ in names]), torch.tensor([y for _, y in names])


def test_names_with_a_character_lstm() -> None:
    """The tutorial's loop, without noise: every step is the clipped sum of single names, by plain autograd."""
    names = [(torch.randint(1, 12, (6,), generator=drawn(k)), k % 3) for k in range(8)]
    torch.manual_seed(0)
    model = CharNN().double()
    criterion = nn.CrossEntropyLoss()
    optimizer = optim.SGD(model.parameters(), lr=2.0)
    privacy_engine = PrivacyEngine(accountant="rdp")
    model, optimizer, train_loader = privacy_engine.make_private(
        module=model,
        optimizer=optimizer,
        data_loader=DataLoader(names, batch_size=4, collate_fn=padded, generator=drawn(3)),
        noise_multiplier=0.0,
        max_grad_norm=0.2,
    )
    steps = 0
    for _ in range(3):
        for names_batch, labels in train_loader:
            before, alone = values(model), copy.deepcopy(model)
            optimizer.zero_grad()
            logits = model(names_batch)
            loss = criterion(logits, labels)
            loss.backward()
            optimizer.step()
            expected = clipped_sum(sample_gradients(alone, names_batch, labels), 0.2) if len(labels) else [0 * b for b in before]
            assert_same(moved(before, model), [2.0 * g / 4 for g in expected])
            steps += 1
    assert privacy_engine.accountant.history == [(0.0, 0.5, steps)]
    privacy_engine.cleanup()


# ---------------------------------------------------------------- LoRA fine-tuning


def test_lora_with_peft() -> None:
    """Adapters alone are trained, through BatchMemoryManager: the weights of whole batches; the base model has not moved."""
    import peft

    data, made = Sentences(24), []
    for _ in range(2):
        base = small_bert()
        torch.manual_seed(1)
        made.append(peft.get_peft_model(base, peft.LoraConfig(task_type="SEQ_CLS", r=2, lora_alpha=8, lora_dropout=0.0)))
    model, reference = made
    frozen = [p.detach().clone() for p in model.parameters() if not p.requires_grad]
    model.train()
    optimizer = optim.AdamW(model.parameters(), lr=5e-4, eps=1e-2)
    privacy_engine = PrivacyEngine(accountant="rdp")
    budget = {"target_delta": DELTA, "target_epsilon": 20.0, "epochs": 2, "max_grad_norm": 0.1}
    model, optimizer, train_dataloader = privacy_engine.make_private_with_epsilon(
        module=model,
        optimizer=optimizer,
        data_loader=DataLoader(data, batch_size=8, generator=drawn(3)),
        **budget,
        noise_generator=drawn(5),
    )
    for _ in range(2):
        with BatchMemoryManager(data_loader=train_dataloader, max_physical_batch_size=3, optimizer=optimizer) as memory_safe_loader:
            for batch in memory_safe_loader:
                optimizer.zero_grad()
                loss = model(**of_fields(batch)).loss
                loss.backward()
                optimizer.step()
    assert privacy_engine.get_epsilon(DELTA) == pytest.approx(epsilon_by_opacus(optimizer.noise_multiplier, 8 / 24, 6))
    assert 15 < privacy_engine.get_epsilon(DELTA) <= 20
    privacy_engine.cleanup()
    again = bare(
        reference,
        optim.AdamW(reference.parameters(), lr=5e-4, eps=1e-2),
        DataLoader(data, batch_size=8, generator=drawn(3)),
        lambda m, batch: m(**of_fields(batch)).loss,
        2,
        **budget,
        noise_generator=drawn(5),
    )
    assert_same(trainable(model), again, 1e-5)
    assert_same([p.detach() for p in model.parameters() if not p.requires_grad], frozen, 0.0)


# ---------------------------------------------------------------- fast gradient and ghost clipping, adaptive clipping


def test_ghost_clipping() -> None:
    """With the criterion that comes back and ``loss.backward()``, as for Opacus's two passes: each update is the clipped sum."""
    x, y = separable(12, 4).tensors
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    data = TensorDataset(x.double(), y)
    privacy_engine = PrivacyEngine(accountant="rdp")
    model_gc, optimizer_gc, criterion_gc, train_loader = privacy_engine.make_private(
        module=model,
        optimizer=optim.SGD(model.parameters(), lr=1.0),
        data_loader=DataLoader(data, batch_size=6, generator=drawn(3)),
        noise_multiplier=0.0,
        max_grad_norm=0.3,
        criterion=nn.CrossEntropyLoss(),
        grad_sample_mode="ghost",
    )
    with BatchMemoryManager(data_loader=train_loader, max_physical_batch_size=2, optimizer=optimizer_gc) as memory_safe_loader:
        before, expected = values(model), [torch.zeros_like(p) for p in model.parameters()]
        first, steps = copy.deepcopy(model), 0
        for data_batch, target in memory_safe_loader:
            optimizer_gc.zero_grad()
            loss = criterion_gc(model_gc(data_batch), target)
            loss.backward()
            optimizer_gc.step()
            for total, g in zip(expected, clipped_sum(sample_gradients(first, data_batch, target), 0.3), strict=True):
                total += g / 6
            if optimizer_gc.physical_batch.last:
                assert_same(moved(before, model), expected)
                before, expected = values(model), [torch.zeros_like(p) for p in model.parameters()]
                first, steps = copy.deepcopy(model), steps + 1
    assert privacy_engine.accountant.history == [(0.0, 0.5, steps)] == [(0.0, 0.5, 2)]
    privacy_engine.cleanup()


def test_adaptive_clipping() -> None:
    """The engine in the place of ``PrivacyEngineAdaptiveClipping``: given its options, the bound follows the median norm."""
    privacy_engine_adaptive = PrivacyEngine  # from opacus.utils.adaptive_clipping...: PrivacyEngineAdaptiveClipping
    data = separable(400, 6)
    torch.manual_seed(0)
    model: nn.Module = Net(lambda m, x: m.layer(x), layer=nn.Linear(6, 2))
    whole, privacy_engine = data.tensors, privacy_engine_adaptive(accountant="rdp")
    with pytest.warns(UserWarning, match="clipping='adaptive' is used"):
        model, optimizer, criterion, train_loader = privacy_engine.make_private(
            module=model,
            optimizer=optim.SGD(model.parameters(), lr=0.05),
            data_loader=DataLoader(data, batch_size=100, generator=drawn(3)),
            noise_multiplier=0.5,
            max_grad_norm=20.0,
            criterion=nn.CrossEntropyLoss(),
            grad_sample_mode="ghost",
            target_unclipped_quantile=0.5,
            min_clipbound=1e-3,
            max_clipbound=100.0,
            clipbound_learning_rate=0.5,
            noise_generator=drawn(5),
        )
    before = mean_loss(model, lambda m: F.cross_entropy(m(whole[0]), whole[1]))
    for _ in range(12):
        with BatchMemoryManager(data_loader=train_loader, max_physical_batch_size=40, optimizer=optimizer) as memory_safe_loader:
            for x, target in memory_safe_loader:
                optimizer.zero_grad()
                criterion(model(x), target).backward()
                optimizer.step()
    rows = sample_gradients(copy.deepcopy(model), *whole)
    norms = torch.tensor([float(torch.cat([g.flatten() for g in row]).norm()) for row in rows])
    assert 0.15 < float((norms <= optimizer.max_grad_norm).double().mean()) < 0.85
    assert mean_loss(model, lambda m: F.cross_entropy(m(whole[0]), whole[1])) < before / 2
    assert privacy_engine.get_epsilon(DELTA) == pytest.approx(epsilon_by_opacus(0.5, 0.25, 48))
    privacy_engine.cleanup()
