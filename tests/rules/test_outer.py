"""Gradients kept as factors: norms and sums equal those of gradients written out, whatever way is taken."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dp_hooks import HookController
from dp_hooks.gradients import joined, terms
from dp_hooks.rules import OuterProducts, ghost_norms
from dp_hooks.rules.convolution import Patches

from ..models import Net

N = 5
ROWS, COLUMNS = 6, 12
CONV_WEIGHTS = {1: conv1d_weight, 2: conv2d_weight, 3: conv3d_weight}


class Made(TorchDispatchMode):
    """Records the largest number of elements of a tensor made inside; views of what is there already do not count."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.device.type != "meta" and t.untyped_storage().data_ptr() not in given:
                self.largest = max(self.largest, t.untyped_storage().nbytes() // t.element_size())
        return out


def dense(tokens, scale=1.0, n=N, shape=(ROWS, COLUMNS)):
    shape = torch.Size(shape)
    return OuterProducts(torch.randn(n, tokens, shape[0]), torch.randn(n, tokens, shape[1:].numel()), shape, scale)


def lookup(tokens, scale=1.0, n=N, shape=(ROWS, COLUMNS)):
    shape = torch.Size(shape)
    return OuterProducts(torch.randint(0, shape[0], (n, tokens)), torch.randn(n, tokens, shape[1:].numel()), shape, scale)


def patches(layer, size, scale=1.0, n=N):
    """Patches of random pixels for ``layer``, which has no padding, meeting random gradients."""
    seen = torch.randn(n, layer.in_channels, *size)
    seeing = torch.randn_like(layer(seen).detach())
    return Patches(seen, seeing, layer, layer.weight.shape, scale)


def conv(scale=1.0, n=N, size=(6, 5), **kwargs):
    return patches(nn.Conv2d(3, ROWS, 2, **kwargs), size, scale, n)


def cast(use, dtype):
    def to(t):
        return t.to(dtype) if t.is_floating_point() else t

    if isinstance(use, Patches):
        return Patches(to(use._seen), to(use._seeing), use._layer, use.shape, use.scale)
    return OuterProducts(to(use.left), to(use.right), use.shape, use.scale)


def written_out(use):
    """The per-sample gradients of ``use`` ``[n, o * i]`` in float64, by formulas of their own."""
    if isinstance(use, Patches):
        x, g, layer = use._seen.double(), use._seeing.double(), use._layer
        weight_of = CONV_WEIGHTS[len(layer.kernel_size)]
        rows = [weight_of(x[i : i + 1], layer.weight.shape, g[i : i + 1], layer.stride, 0, layer.dilation) for i in range(len(x))]
        grads = torch.stack(rows) if rows else x.new_zeros(0, *layer.weight.shape)
    else:
        left = F.one_hot(use.left, use.shape[0]) if use.left.dim() == 2 else use.left
        grads = torch.einsum("nto,nti->noi", left.double(), use.right.double())
    return grads.flatten(1) * use.scale


def squares(uses):
    return torch.stack([written_out(use) for use in uses]).sum(0).square().sum(1)


USES = {
    "dense": lambda n: [dense(7, n=n)],
    "dense-one-token": lambda n: [dense(1, -3.0, n=n)],
    "dense-one-half": lambda n: [dense(63, n=n)],
    "dense-two-halves": lambda n: [dense(64, -2.0, n=n)],
    "dense-two-unequal-halves": lambda n: [dense(65, n=n)],
    "dense-wide": lambda n: [dense(3, n=n, shape=(90, 80))],
    "dense-no-token": lambda n: [dense(0, n=n)],
    "lookup": lambda n: [lookup(9, -2.0, n=n)],
    "lookup-one-token": lambda n: [lookup(1, n=n)],
    "lookup-no-token": lambda n: [lookup(0, n=n)],
    "lookup-many-tokens": lambda n: [lookup(70, n=n)],
    "patches": lambda n: [conv(n=n)],
    "patches-negative": lambda n: [conv(-2.0, n=n, stride=2)],
    "patches-one-position": lambda n: [conv(n=n, size=(2, 2))],
    "dense-twice": lambda n: [dense(5, n=n), dense(8, n=n)],
    "dense-12-times": lambda n: [dense(4, 0.5 * (-1) ** k, n=n) for k in range(12)],
    "dense-twice-with-halves": lambda n: [dense(66, 2.0, n=n), dense(67, -1.0, n=n)],
    "one-token-twice": lambda n: [dense(1, n=n), dense(1, -1.5, n=n)],
    "lookup-twice": lambda n: [lookup(5, n=n), lookup(4, -0.5, n=n)],
    "lookup-and-dense": lambda n: [lookup(5, -2.0, n=n), dense(4, 3.0, n=n)],
    "dense-and-lookup": lambda n: [dense(4, n=n), lookup(70, n=n)],
    "lookup-and-dense-twice": lambda n: [lookup(5, n=n), dense(4, -1.0, n=n), dense(65, 0.5, n=n)],
    "patches-twice": lambda n: [conv(n=n), conv(-1.0, n=n, dilation=2, stride=2)],
    "patches-and-dense": lambda n: [conv(2.0, n=n), dense(5, -1.0, n=n, shape=(ROWS, 3, 2, 2))],
    "patches-and-lookup": lambda n: [lookup(5, n=n, shape=(ROWS, 3, 2, 2)), conv(-1.0, n=n)],
}


@pytest.fixture
def take(monkeypatch):
    """Return a function that makes Gram matrices or written-out gradients look cheap; "pixels" and "cut" are for patches."""

    def choose(way):
        free = {"gram": "gram_cost", "pixels": "gram_cost", "cut": "gram_cost", "written-out": "instantiation_cost"}
        for cls in (OuterProducts, Patches):
            monkeypatch.setattr(cls, "gram_cost", lambda self, others: 1.0)
            monkeypatch.setattr(cls, "instantiation_cost", lambda self: 1.0)
            monkeypatch.setattr(cls, free[way], lambda self, *others: 0.0)
        if way in ("pixels", "cut"):
            monkeypatch.setattr(Patches, "_cost_of_pixels", lambda self: float(way == "cut"))
            monkeypatch.setattr(Patches, "_cost_of_patches", lambda self: float(way == "pixels"))

    return choose


def assert_bounds(norms, truth, dtype):
    """Norms never fall below the truth by more than rounding, nor exceed it by more than the slack that is allowed."""
    below, above = (1e-12, 1e-10) if dtype == torch.float64 else (2e-6, 1.5e-3)
    assert norms.shape == truth.shape
    assert norms.dtype == dtype
    assert (norms.double() >= truth * (1 - below)).all()
    assert (norms.double() <= truth * (1 + above)).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("way", ["as-it-comes", "gram", "pixels", "cut", "written-out"])
@pytest.mark.parametrize("name", USES)
def test_norms_equal_those_of_gradients_written_out(name, way, dtype, take):
    """Whichever way is taken, the norms of the sum of all uses are those of the gradients written out."""
    if way != "as-it-comes":
        take(way)
    uses = [cast(use, dtype) for use in USES[name](N)]
    assert_bounds(ghost_norms.sq_norms(uses), squares(uses), dtype)
    assert_bounds(ghost_norms.sq_norms(uses[::-1]), squares(uses), dtype)
    some = [use.pick(torch.tensor([3, 1])) for use in uses]
    assert_bounds(ghost_norms.sq_norms(some), squares(uses)[[3, 1]], dtype)


@pytest.mark.parametrize("tokens", [3, 40])
def test_rounded_norms_of_gram_sums_are_not_below_the_truth(tokens, take):
    """The bound of rounding is part of the norm: no sample of many in float32 falls below the norm in float64, by any digit."""
    take("gram")
    uses = [cast(dense(tokens, n=2000), torch.float32)]
    norms, truth = ghost_norms.sq_norms(uses).double(), squares(uses)
    assert (norms >= truth).all()
    assert (norms <= truth * (1 + 1.5e-3)).all()
    assert (ghost_norms.instantiated_norms(uses).double() < truth).any()  # as rounded numbers are


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", USES)
def test_gradients_and_weighted_sums_equal_those_written_out(name, dtype):
    """Each use gives its gradients, those of chosen samples, and their weighted sum."""
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    factors = torch.linspace(-0.5, 1.0, N, dtype=dtype)
    for use in (cast(use, dtype) for use in USES[name](N)):
        truth = written_out(use).to(dtype).view(N, *use.shape)

        def close(found, expected):
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=50 * tolerance)

        close(use.grads(), truth)
        for some in (slice(None), slice(1, 3), torch.tensor([4, 0]), torch.tensor([], dtype=torch.long)):
            close(use.pick(some).grads(), truth[some])
            close(use.pick(some).weighted_sum(factors[some]), torch.tensordot(factors[some], truth[some], 1))


@pytest.mark.parametrize("name", USES)
def test_no_sample_gives_no_norm_and_a_sum_of_zero(name):
    """Factors of an empty batch have empty norms and gradients, and a sum of zero."""
    uses = USES[name](0)
    assert ghost_norms.sq_norms(uses).shape == (0,)
    for use in uses:
        assert use.grads().shape == (0, *use.shape)
        total = use.weighted_sum(torch.zeros(0))
        assert total.shape == use.shape
        assert not total.any()


@pytest.mark.parametrize("way", ["gram", "written-out"])
@pytest.mark.parametrize("name", USES)
def test_norms_in_chunks_of_samples_are_the_same(name, way, take, monkeypatch):
    """With room for little at once, samples are taken a few at a time, with the same result."""
    take(way)
    uses = [cast(use, torch.float64) for use in USES[name](N)]
    whole = ghost_norms.sq_norms(uses)
    for room in (1, 150, 1000):
        monkeypatch.setattr(ghost_norms, "CHUNK", room)
        torch.testing.assert_close(ghost_norms.sq_norms(uses), whole, rtol=1e-10, atol=0)


@pytest.mark.parametrize(("way", "tokens"), [("gram", 20), ("written-out", 6)])
def test_chunks_bound_the_memory_of_norms(way, tokens, take, monkeypatch):
    """No temporary tensor is larger than the room that is allowed, however many samples there are."""
    take(way)
    use = dense(tokens, n=64, shape=(30, 20))
    monkeypatch.setattr(ghost_norms, "CHUNK", 3000)
    with Made() as made:
        ghost_norms.sq_norms([use])
    assert 300 < made.largest <= 3000
    monkeypatch.setattr(ghost_norms, "CHUNK", 1 << 24)
    with Made() as made:
        ghost_norms.sq_norms([use])
    assert made.largest > 3000


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: [dense(4, shape=(64, 64))], "gram"),
        (lambda: [dense(64, shape=(16, 16))], "written-out"),
        (lambda: [dense(2, shape=(64, 64)) for _ in range(2)], "gram"),
        (lambda: [dense(2, shape=(64, 64)) for _ in range(60)], "written-out"),
        (lambda: [lookup(4, shape=(500, 12)), dense(4, shape=(500, 12))], "gram"),
        (lambda: [lookup(80, shape=(8, 12)), dense(80, shape=(8, 12))], "written-out"),
        (lambda: [patches(nn.Conv2d(64, 64, 3), (5, 5))], "gram of pixels"),
        (lambda: [patches(nn.Conv2d(64, 64, 4, dilation=6), (20, 20))], "gram of patches"),
        (lambda: [patches(nn.Conv2d(3, 4, 3), (16, 16))], "written-out"),
        (lambda: [dense(1)], "neither"),
        (lambda: [lookup(70)], "neither"),
    ],
)
def test_the_cheaper_way_is_taken(make, expected, monkeypatch):
    """Few tokens of wide layers are met by Gram matrices, of pixels where they are fewer; many tokens of narrow ones are not."""
    taken = []

    def spied(owner, name, label):
        original = getattr(owner, name)

        def spy(*args):
            taken.append(label)
            return original(*args)

        monkeypatch.setattr(owner, name, spy)

    uses = make()
    spied(ghost_norms, "_gram_norms", "gram")
    spied(ghost_norms, "instantiated_norms", "written-out")
    spied(Patches, "_products_of_pixels", "of pixels")
    if isinstance(uses[0], Patches):
        monkeypatch.setattr(Patches, "right", property(lambda self, cut=Patches.right.fget: spy_cut(self, cut)))

    def spy_cut(use, cut):
        taken.append("of patches")
        return cut(use)

    assert_bounds(ghost_norms.sq_norms(uses), squares(uses), torch.float32)
    if expected == "written-out":
        assert taken[0] == "written-out"
    else:
        assert " ".join(taken) == ("" if expected == "neither" else expected)


@pytest.mark.parametrize(
    ("layer", "size"),
    [
        (nn.Conv1d(3, 4, 2), (7,)),
        (nn.Conv1d(3, 4, 1), (7,)),
        (nn.Conv1d(3, 4, 3, stride=2, dilation=2), (10,)),
        (nn.Conv2d(3, 4, (3, 2), stride=(1, 2), dilation=(2, 1)), (7, 8)),
        (nn.Conv2d(1, 4, 2), (3, 3)),
        (nn.Conv3d(2, 4, (2, 1, 2), stride=(2, 1, 1), dilation=(1, 1, 2)), (5, 2, 4)),
    ],
    ids=str,
)
@pytest.mark.parametrize("order", ["plain", "channels-last", "sliced"])
def test_products_of_patches_follow_from_pixels(layer, size, order, take):
    """Inner products of all patches, written out, equal sums of inner products of pixels, in any memory layout."""
    use = cast(patches(layer, size), torch.float64)
    if order == "channels-last":
        use._seen = use._seen.movedim(1, -1).contiguous().movedim(-1, 1)
    elif order == "sliced":
        use._seen = use._seen.repeat_interleave(2, -1)[..., ::2]
    take("cut")
    cut = use.right_products(use)
    take("pixels")
    torch.testing.assert_close(use.right_products(use), cut, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(cut, torch.einsum("npc,nqc->npq", use.right, use.right), rtol=1e-12, atol=1e-12)


VOCABULARY, WIDTH, LENGTH = 2000, 64, 6


def test_norms_of_a_tied_table_need_no_gradient_of_every_sample():
    """Cross terms of an embedding and a linear layer: exact, from tensors far smaller than one gradient of the table."""
    uses = [lookup(LENGTH, shape=(VOCABULARY, WIDTH)), dense(LENGTH, shape=(VOCABULARY, WIDTH))]
    uses[1].left.mul_(0.02).scatter_add_(2, uses[0].left[..., None], torch.full((N, LENGTH, 1), -1.0))
    uses[1].right.add_(uses[0].right)
    with Made() as made:
        norms = ghost_norms.sq_norms(uses)
    assert_bounds(norms, squares(uses), torch.float32)
    assert made.largest < VOCABULARY * WIDTH / 100
    apart = ghost_norms.sq_norms(uses[:1]) + ghost_norms.sq_norms(uses[1:])
    assert ((apart - norms).abs() > 1e-2 * norms).any(), "without cross terms the norms would have been right, too"


@pytest.mark.parametrize("is_tied", [False, True], ids=["alone", "tied"])
def test_hidden_states_that_are_much_alike_do_not_force_a_gradient_of_every_sample(is_tied, monkeypatch):
    """Gradients of logits hardly overlap between tokens: their norms are known well, however alike the hidden states are."""
    n, tokens, shape = 2, 70, torch.Size([20000, 256])
    hidden = torch.randn(n, tokens, shape[1]) + 3 * torch.randn(shape[1])
    logits = torch.randn(n, tokens, shape[0]).mul_(2).softmax(-1)
    logits.scatter_add_(2, torch.randint(0, shape[0], (n, tokens, 1)), -torch.ones(n, tokens, 1))
    uses = [OuterProducts(logits, hidden, shape, -2.0)]
    if is_tied:
        uses.append(OuterProducts(torch.randint(0, shape[0], (n, 5)), torch.randn(n, 5, shape[1]), shape))
    truth = squares(uses)
    with Made() as made:
        norms = ghost_norms.sq_norms(uses)
    assert_bounds(norms, truth, torch.float32)
    assert made.largest <= n * tokens * shape[0] < shape.numel()
    monkeypatch.setattr(ghost_norms, "_size_of_terms", lambda uses: torch.full((uses[0].samples,), torch.inf))
    with Made() as made:
        ghost_norms.sq_norms(uses)
    assert made.largest >= shape.numel(), "the inputs are too tame: the looser bound would have done"


def test_a_whole_step_of_a_tied_table_needs_no_gradient_of_every_sample():
    """Backward, norms and sums of a tied table never hold more than its size or that of the logits."""
    parts = {"table": nn.Embedding(VOCABULARY, WIDTH), "out": nn.Linear(WIDTH, VOCABULARY, bias=False)}
    model = Net(lambda s, ids: s.out(s.table(ids).tanh()), **parts)
    model.out.weight = model.table.weight
    ids = torch.randint(0, VOCABULARY, (N, LENGTH))
    controller = HookController(model, grad_sample_mode="ghost")
    loss = (model(ids).square().sum((1, 2)) / VOCABULARY).mean()
    with Made() as made:
        loss.backward()
        found = controller.take()
        norms = found.sq_norms(found.params)
        found.weighted_sums(dict.fromkeys(found.params, torch.ones(N)), torch.ones(N, dtype=torch.bool), consume=True)
    assert len(norms) == 1
    assert made.largest <= max(VOCABULARY * WIDTH, N * LENGTH * VOCABULARY)
    controller.cleanup()


def plain_gram(uses):
    """The sum over all pairs of tokens as it stands, which cancellation ruins."""
    total = torch.zeros(uses[0].samples)
    for a in uses:
        for b in uses:
            total += (a.left_products(b) * a.right_products(b)).sum((1, 2)) * (a.scale * b.scale)
    return total


def tokens_that_cancel(kind, spread, dtype, n=8):
    """Uses with inputs of mean/std ``spread`` and gradients that cancel, as they come out of layers in ``dtype``."""
    count, rows, columns = (80, 48, 200) if kind == "halves" else (16, 64, 64)
    x, g = torch.randn(n, count, columns) + spread, torch.randn(n, count, rows)
    if kind == "clusters":  # of identical tokens, as padding makes them; what they get cancels between clusters
        x = x[:, ::4].repeat_interleave(4, 1)
        g = g[:, ::4].repeat_interleave(4, 1)
    if kind == "padding":  # one token at most places, with one gradient that the others cancel
        x[:, 4:], g[:, 4:] = x[:, 4:5].clone(), g[:, 4:5].clone()
    if kind == "signs":  # gradients of a few large powers apart
        g = g * 10.0 ** torch.randint(-2, 3, (n, count, 1))
    g = g - g.mean(1, keepdim=True)
    x, g = x.to(dtype).float(), g.to(dtype).float()
    shape = torch.Size([rows, columns])
    if kind == "two uses":  # that cancel each other
        g = torch.randn(n, count, rows).to(dtype).float()
        other = torch.randn(n, count, columns) + spread
        return [OuterProducts(g, x, shape, 3.0), OuterProducts(g, other.to(dtype).float(), shape, -3.0)]
    if kind == "table":  # tied: what the lookups get cancels what the linear layer gets
        chosen = torch.randint(0, rows, (n, count))
        return [OuterProducts(chosen, x, shape), OuterProducts(-F.one_hot(chosen, rows).float(), x.roll(1, 1), shape)]
    if kind == "pixels":
        layer = nn.Conv2d(columns, rows, 2)
        seen = (torch.randn(n, columns, 4, 4) + spread).to(dtype).float()
        g = torch.randn(n, rows, 3, 3)
        return [Patches(seen, (g - g.mean((2, 3), keepdim=True)).to(dtype).float(), layer, layer.weight.shape)]
    return [OuterProducts(g, x, shape)]


KINDS = ["mean", "halves", "clusters", "padding", "signs", "two uses", "table", "pixels"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_norms_never_fall_below_the_truth_where_tokens_cancel(kind, dtype, take):
    """G24: clipped with these norms no sample contributes more than 1.001 C, and none is clipped without need."""
    take("gram")
    plain = []
    for spread in (1.0, 1e1, 1e2, 1e3, 1e4, 1e5):
        uses = tokens_that_cancel(kind, spread, dtype)
        truth = squares(uses)
        norms = ghost_norms.sq_norms(uses).double()
        assert torch.isfinite(norms).all()
        assert (truth.sqrt() <= 1.001 * norms.sqrt()).all(), spread
        # Below this the numbers themselves, in float32, do not say what the gradient is.
        size = sum(written_norms(use) for use in uses)
        known = truth.sqrt() > 30 * torch.finfo(torch.float32).eps * size
        assert (norms[known] <= 1.002 * truth[known]).all(), spread
        plain.append(truth.sqrt() <= 1.001 * plain_gram(uses).double().sqrt())  # not so for NaN either
    assert not torch.cat(plain).all(), "the inputs are too tame: a plain Gram sum would have passed"


def written_norms(use):
    """``sum_t |left_t| |right_t|`` ``[n]``: the size of a gradient in which nothing cancels."""
    left = use.left.norm(dim=2) if use.left.dim() == 3 else torch.ones_like(use.left, dtype=torch.float32)
    return (left * use.right.norm(dim=2)).sum(1).double() * abs(use.scale)


@pytest.mark.parametrize("deferred", [True, False], ids=["deferred", "written-out"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_layers_with_inputs_far_from_zero_are_clipped_enough(dtype, deferred, monkeypatch):
    """G24 end to end: the clipped contribution of each sample alone is at most 1.001 C."""
    if deferred:
        monkeypatch.setattr(terms, "_GENEROSITY", 0)
        monkeypatch.setattr(joined, "_SMALL", {"cpu": -1})
    n, tokens, width = 6, 16, 64
    for spread in (1e2, 1e3, 1e4, 1e5):
        model = nn.Linear(width, width, bias=False).to(dtype)
        x = (torch.randn(n, tokens, width) + spread).to(dtype)
        g = torch.randn(n, tokens, width)
        g = (g - g.mean(1, keepdim=True)).to(dtype)
        controller = HookController(model, grad_sample_mode="ghost", loss_reduction="sum")
        model(x).backward(g)
        found = controller.take()
        truth = torch.einsum("nto,nti->noi", g.double(), x.double()).flatten(1).norm(dim=1)
        (norms,) = found.sq_norms(found.params).values()
        factors = 1 / norms.sqrt()
        assert (truth * factors.double() <= 1.001).all()
        for i in range(n):
            alone = torch.zeros(n)
            alone[i] = factors[i]
            (total,) = found.weighted_sums({model.weight: alone}, torch.ones(n, dtype=torch.bool)).values()
            assert total.dtype == torch.float32
            assert total.double().norm() <= 1.001
        controller.cleanup()


def test_norms_that_overflow_on_the_way_only_are_found(take):
    """Gram matrices that overflow, where the gradient itself does not, are replaced by the gradient's own norm."""
    take("gram")
    for left, right in ((1e20, 1e-10), (1e-10, 1e20), (1e25, 1e-25)):
        use = dense(7)
        use = OuterProducts(use.left * left, use.right * right, use.shape)
        assert_bounds(ghost_norms.sq_norms([use]), squares([use]), torch.float32)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("way", ["gram", "written-out"])
@pytest.mark.parametrize("name", ["dense", "dense-two-halves", "lookup", "lookup-and-dense", "patches", "dense-one-token"])
def test_a_norm_that_is_not_finite_stays_so_and_touches_no_other_sample(name, way, value, take):
    """NaN, infinity and overflow give a norm that is not finite, for their own sample alone."""
    take(way)
    uses = USES[name](N)
    expected = squares(uses)
    for use in uses:
        use.right[2, 0, 0] = value  # of patches this is a copy
        if isinstance(use, Patches):
            use._seen[2, 0, 0, 0] = value
    norms = ghost_norms.sq_norms(uses)
    assert torch.isfinite(norms).tolist() == [True, True, False, True, True]
    others = torch.tensor([0, 1, 3, 4])
    assert_bounds(norms[others], expected[others], torch.float32)
