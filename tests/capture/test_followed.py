"""Parameters that are followed outside the rules of layers: what is learned of them, what is refused, what is left."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dp_hooks import HookController, errors
from dp_hooks.capture.discovery import Discovery

from .. import laws
from ..cases import N, param
from ..cases.followed import ALIKE, MISLEADING, Product, head, linear
from ..cases.models import D, T, vision
from ..models import Net, randn
from ..reference import by_name, losses_of, rows_by_backward, sample_grads


@pytest.fixture
def attached():
    """Return a function that puts a controller over a model, which is closed at the end of the test."""
    controllers = []

    def attach(model, **options):
        controllers.append(HookController(model, **options))
        return controllers[-1]

    yield attach
    for controller in controllers:
        controller.cleanup()


@pytest.mark.parametrize("mode", laws.MODES, ids=str)
@pytest.mark.parametrize("name", MISLEADING)
def test_a_misleading_first_batch(name, mode):
    """Layouts that hold on the first batch only, by coincidence, are never relied on: right, or refused."""
    make, batches = MISLEADING[name]
    model, right = make().double(), 0
    with laws.attached(model, mode) as controller:
        for batch in batches():
            controller.disable_hooks()
            expected = sample_grads(model, losses_of, *batch)
            controller.enable_hooks()
            try:
                laws.agrees(controller, mode, lambda batch=batch: losses_of(model, *batch), expected)
            except errors.UnsupportedModelError:
                controller.discard()
                continue
            right += 1
    assert right > 0


@pytest.mark.parametrize("mode", laws.MODES, ids=str)
@pytest.mark.parametrize("name", ALIKE)
def test_a_first_batch_whose_rows_are_alike(name, mode):
    """The order of samples is found where the first batch, or zeros in the model, do not show it, for this batch and the next."""
    make, first = ALIKE[name]
    model = make().double()
    with laws.attached(model, mode) as controller:
        for batch in ([first], [randn(3, 5, 4)], [randn(2, 6 if "values" not in name else 5, 4)]):
            controller.disable_hooks()
            expected = sample_grads(model, losses_of, *batch)
            controller.enable_hooks()
            laws.agrees(controller, mode, lambda batch=batch: losses_of(model, *batch), expected)


@pytest.mark.parametrize("mode", laws.MODES, ids=str)
@pytest.mark.parametrize("time_first", [False, True])
@pytest.mark.parametrize("first", [0, 1])
def test_whole_numbers_that_are_all_alike_are_learned_once(first, time_first, mode, monkeypatch):
    """Types of tokens that are the same in every choice of every sample: known after one batch, in whatever order they come."""

    def forward(s, x, types):
        rows = [t.transpose(0, 1).flatten(0, 1) if time_first else t.flatten(0, 1) for t in (x, types)]
        h = (s.a(rows[0]) + s.types(rows[1])).tanh()
        return h.unflatten(0, (3, len(x))).transpose(0, 1) if time_first else h.unflatten(0, (len(x), 3))

    runs, original = [], Discovery._run_probe
    monkeypatch.setattr(Discovery, "_run_probe", lambda self, *args, **kw: (runs.append(1), original(self, *args, **kw))[1])
    model, x = Net(forward, a=linear(), types=nn.Embedding(2, 4)).double(), randn(4, 3, 5, 4)
    with laws.attached(model, mode) as controller:
        for types in (torch.full((4, 3, 5), first), torch.arange(60).reshape(4, 3, 5) % 2):
            controller.disable_hooks()
            expected, before = sample_grads(model, losses_of, x, types), len(runs)
            controller.enable_hooks()
            laws.agrees(controller, mode, lambda types=types: losses_of(model, x, types), expected)
    assert 0 < before == len(runs)  # none in the second batch


def transformer():
    return Net(lambda s, x: s.m(x, x), m=nn.Transformer(4, 2, 1, 1, 8, dropout=0.5, batch_first=True))


@pytest.mark.parametrize("mode", laws.MODES, ids=str)
@pytest.mark.parametrize("make", [lambda: vision(0.5), transformer], ids=["owner", "transformer"])
def test_dropout_in_the_owner_of_parameters(make, mode):
    """With dropout inside the owner of parameters, gradients belong to the masks that the forward pass drew."""
    model, x = make().double(), randn(N, T, D)

    def losses():
        torch.manual_seed(3)
        return losses_of(model, x)

    expected = by_name(model, rows_by_backward(model, losses(), retain_graph=True))
    with laws.attached(model, mode) as controller:
        laws.agrees(controller, mode, losses, expected)


def one_output_for_each_sample(s, x):
    """A module that is repeated on each sample, since it picks rows, also returns a list that is as long as the batch."""
    picked = x[..., 0] > 0
    x = x.masked_scatter(picked[..., None].expand_as(x), x[picked] * s.scale)
    return x, list(s.last(x))


@pytest.mark.parametrize("mode", laws.MODES, ids=str)
def test_a_list_that_is_as_long_as_the_batch(mode):
    """What a repeated module returns besides, with one entry for each sample, is left out, as long as the loss leaves it out."""
    inner = Net(one_output_for_each_sample, scale=param(4), last=linear())
    model = Net(lambda s, x: s.head(s.inner(x)[0]), inner=inner, head=head()).double()
    batches = [randn(n, 5, 4) for n in (3, 5)]
    expected = [sample_grads(model, losses_of, x) for x in batches]
    with laws.attached(model, mode) as controller:
        for x, wanted in zip(batches, expected, strict=True):
            laws.agrees(controller, mode, lambda x=x: losses_of(model, x), wanted)
        model.fn = (lambda s, x: torch.stack(s.inner(x)[1]),)
        loss = losses_of(model, x).mean()
        with pytest.raises(errors.UnsupportedModelError, match="inner"):
            loss.backward()


@pytest.mark.parametrize("flat", [5, 12])
@pytest.mark.parametrize("last", [True, False])
def test_flat_ids_as_inputs_of_the_model_are_refused_with_what_to_do(flat, last, attached):
    """A batch of flat ids and offsets has no rows to take samples from: the error says so, and how to pass them instead."""
    bag = nn.EmbeddingBag(7, 4, include_last_offset=last)
    model = Net(lambda s, i, o: s.head(s.bag(i, o)), bag=bag, head=head())
    attached(model)
    with pytest.raises(errors.UnsupportedModelError, match=r"bag \(EmbeddingBag\).*offsets.*\[samples, longest\].*padding_idx"):
        model(torch.arange(flat) % 7, torch.tensor([0, 1, 3] + [flat] * last))


def test_a_custom_function_next_to_random_numbers_is_refused(attached):
    """Where parameters meet the batch in a function and the module around draws numbers, repeating it would draw others."""
    model = Net(lambda s, x: F.dropout(Product.apply(x, s.a), 0.5), a=param(4)).double()
    attached(model)
    loss = losses_of(model, randn(N, 4)).mean()
    with pytest.raises(errors.UnsupportedModelError, match="it draws random numbers"):
        loss.backward()


@pytest.mark.parametrize(
    ("mix", "shape"),
    [(lambda s, x: (x @ x.t() * s.scale).softmax(-1) @ x, ()), (lambda s, x: x * s.scale - (x * s.scale).mean(0), (4,))],
    ids=["attention", "batch mean"],
)
def test_samples_that_mix_are_refused(mix, shape):
    """Where samples mix in the owner of a parameter, nothing is released."""
    assert laws.released(Net(mix, scale=param(*shape)).double(), [randn(N, 4)]) is not None


def test_a_shared_tensor_returned_by_the_model_is_refused_when_used(attached):
    """A lifted tensor never leaves the model; a gradient that reaches it from outside is an error that names it."""
    model = Net(lambda s, x: (x * s.scale, s.scale.exp()), scale=param(4)).double()
    attached(model)
    out, scale = model(randn(N, 4))
    assert type(scale) is torch.Tensor
    with pytest.raises(errors.UnsupportedModelError, match="scale"):
        (out * scale).sum().backward()


def test_a_lifted_tensor_kept_by_the_model_is_an_ordinary_one_after_the_scope(attached):
    """What the model stored of a shared computation goes on working as a tensor when the controller is closed."""

    def forward(s, x):
        s.kept = s.scale.exp()
        return x * s.kept

    model, x = Net(forward, scale=param(4)).double(), randn(N, 4)
    controller = attached(model)
    losses_of(model, x).mean().backward()
    controller.cleanup()
    assert type(model.kept * x) is torch.Tensor
    torch.testing.assert_close(model.kept * x, model.scale.exp() * x)


@pytest.mark.parametrize("in_place", [True, False])
def test_a_buffer_written_in_forward_is_refused_by_name(in_place, attached):
    """A forward pass that stores statistics of the batch in a buffer is an error that names the buffer."""

    def forward(s, x):
        if in_place:
            s.seen += x.detach().mean(0)
        else:
            s.seen = s.seen + x.detach().mean(0)
        return x * s.scale

    model = Net(forward, scale=param(4), seen=torch.zeros(4)).double()
    attached(model)
    with pytest.raises(errors.UnsupportedModelError, match="seen"):
        model(randn(N, 4))


def test_trials_leave_random_state_and_buffers_alone(attached):
    """The first forward pass draws the same numbers and leaves the same buffers as without a controller."""

    def forward(s, x):
        return F.dropout(x, 0.5) * s.scale + torch.rand(4, dtype=x.dtype)

    model, x = Net(forward, scale=param(4)).double(), randn(N, 4)
    torch.manual_seed(5)
    expected, after = model(x), torch.rand(3)
    attached(model)
    torch.manual_seed(5)
    torch.testing.assert_close(model(x), expected)
    assert torch.equal(torch.rand(3), after)
