"""Several processes of torch.distributed take the private steps of one, or say why they do not."""

import itertools
import math

import pytest
import torch

import dp_hooks
from dp_hooks.errors import ScopeError

from . import jobs
from .group import Group

EXACT = {"rtol": 0, "atol": 1e-12}
ROUNDED = {"rtol": 0, "atol": 1e-7}
# Of the zoo: language models with tied tables, convolutions, recurrences, state spaces, adapters.
ZOO = (
    "bert-mlm distilbert gpt2 llama t5 bart vit swin timm-convnext opt bloom albert electra roberta-tokens mobilebert lora-gpt2 "
    "lora-bert-classifier xlnet beit whisper mamba deberta-v2 resnet-groupnorm timm-vit dinov2 deit"
).split()
# Parts of these compute in float32 whatever the weights are in, and what they round depends on how many rows there are.
IN_FLOAT32 = {"llama", "t5", "bloom", "mamba"}


@pytest.fixture(scope="module")
def two():
    with Group(2) as group:
        yield group


@pytest.fixture(scope="module")
def four():
    with Group(4) as group:
        yield group


RUNS = {
    "plain": {},
    "DistributedDataParallel": {"ddp": True},
    "physical batches": {"max_physical_batch_size": 2},
    "hooks": {"grad_sample_mode": "hooks", "passes": 2},
    "per layer": {"clipping": "per_layer", "max_grad_norm": [0.1, 0.2, 0.1, 0.2]},
    "adaptive": {"clipping": "adaptive", "passes": 3},
    "decorated": {"how": "step", "max_physical_batch_size": 4},
    "decorated, DistributedDataParallel": {"how": "step", "ddp": True, "batch": 2},
    "engine, DistributedDataParallel": {"how": "engine", "ddp": True},
    "sums": {"loss_reduction": "sum"},
    "batches that leave processes without examples": {"batch": 1},
    "tied": {"name": "tied"},
    "tied, DistributedDataParallel": {"name": "tied", "ddp": True},
}
each_run = pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)


def check_same(found, options):
    expected = jobs.trained(**{**options, "ddp": False})
    for result in found:
        assert not isinstance(result, Exception), result
        for mine, first, alone in zip(result["weights"], found[0]["weights"], expected["weights"], strict=True):
            assert torch.equal(mine, first)
            torch.testing.assert_close(mine, alone, **EXACT)
        assert (result["steps"], result["epsilon"]) == (expected["steps"], expected["epsilon"])
        assert all(result["left"])  # of DistributedDataParallel, as it was
        assert result["bound"] == pytest.approx(expected["bound"], rel=1e-12)
    assert sum(sum(result["sizes"]) for result in found) == sum(expected["sizes"])


@each_run
def test_two_processes_take_the_steps_of_one(two, options):
    """Weights after a pass are those of one process with the same batches, and the same in both to the bit."""
    check_same(two.run("trained_by", options), options)


def test_four_processes_take_the_steps_of_one(four):
    """The same with four processes, of which some are without examples at times."""
    for options in (RUNS["plain"], RUNS["tied, DistributedDataParallel"], {"batch": 3, "max_physical_batch_size": 1}):
        check_same(four.run("trained_by", options), options)


@pytest.mark.parametrize("name", ZOO)
def test_architectures_have_the_sums_of_one_process(two, name):
    """Real architectures move by the clipped sums of one process."""
    alone = jobs.architecture(name)
    for moved in two.run("architecture", name):
        assert not isinstance(moved, Exception), moved
        for mine, expected in zip(moved, alone, strict=True):
            torch.testing.assert_close(mine, expected, **(ROUNDED if name in IN_FLOAT32 else EXACT))


def test_noise_is_added_once(two, four):
    """The noise of several processes together has the declared scale: 0.95 and 1.05 of it are told apart, and so is sqrt(2)."""
    for group in (two, four):
        moves = torch.stack(group.run("noise", 1.5, 100)[0])
        count, std = moves.numel(), 2.0 * 1.5
        found, error = float(moves.square().mean().sqrt()), std / math.sqrt(2 * count)
        assert abs(found - std) < 4 * error  # false alarms: 6e-5
        assert 8 * error < 0.05 * std


def test_noise_is_independent_between_numbers_and_steps(two):
    """No two numbers, of the same or of different processes' parts, and no two steps have correlated noise."""
    moves = torch.stack(two.run("noise", 1.0, 400)[0])
    moves = (moves - moves.mean(0)) / moves.std(0)
    between = (moves.T @ moves / len(moves)).fill_diagonal_(0).abs().max()
    half = moves.shape[1] // 2
    lagged = (moves[:-1] * moves[1:]).mean(0).abs().max()
    assert between < 6 / math.sqrt(len(moves))  # of 11,000 pairs; false alarms: 2e-5
    assert (moves[:, :half] * moves[:, half : 2 * half]).mean().abs() < 5 / math.sqrt(len(moves) * half)
    assert lagged < 6 / math.sqrt(len(moves))


def test_repeatable_noise_is_that_of_one_process(two):
    """With noise_generator=, in the same state in every process, the noise is that of one process, and no two parts are alike."""
    options = {"noise_multiplier": 1.0, "noise": 7}
    check_same(two.run("trained_by", options), options)


def test_processes_share_one_global_batch(two):
    """The parts of a batch are apart, and together a Poisson sample at the declared rate; a process has no dataset of its own."""
    parts = two.run("drawn", 120)
    batches = [one + other for one, other in zip(*parts, strict=True)]
    assert all(len(set(batch)) == len(batch) for batch in batches)
    size = sum(map(len, batches)) / len(batches)
    error = math.sqrt(8 * 0.8 / len(batches))
    assert abs(size - 8) < 4 * error
    assert 8 * error < 0.2 * 8  # a rate of half or twice that would be seen
    counts = torch.bincount(torch.tensor(list(itertools.chain(*batches))), minlength=jobs.EXAMPLES)
    assert counts.min() > 0
    assert abs(len(list(itertools.chain(*parts[0]))) / sum(map(len, batches)) - 0.5) < 0.1


def test_passes_that_are_left_early_begin_together_again(two):
    """Where workers have drawn ahead, by each process as far as it had parts, the next pass has the same batches in all again."""
    mine, others = two.run("drawn_and_left", 4, 2)
    assert len(mine) == len(others) == 8
    for one, other in zip(mine, others, strict=True):
        batch = sorted(one + other)
        assert len(set(batch)) == len(batch)
        assert (one, other) == (batch[::2], batch[1::2])


def test_no_two_scopes_draw_the_same_batches(two):
    """Batches come from fresh entropy of the first process in every scope."""
    assert two.run("drawn", 5)[0] != two.run("drawn", 5)[0]


DIFFERENT = {
    "noise_multiplier": ({"noise_multiplier": 0.9}, {}, "noise_multiplier"),
    "max_grad_norm": ({"max_grad_norm": 2.0}, {}, "max_grad_norm"),
    "rate": ({"sample_rate": 0.1}, {"sample_rate": 0.2}, "the sampling rate"),
    "dataset": ({"dataset": "fewer"}, {}, "the number of examples"),
    "loss_reduction": ({"loss_reduction": "sum"}, {}, "loss_reduction"),
    "clipping": ({"clipping": "automatic"}, {}, "clipping"),
    "accountant": ({"accountant": "rdp"}, {}, "accountant"),
    "options of clipping": (
        {"clipping_options": {"gamma": 0.1}},
        {"clipping": "automatic", "clipping_options": {"gamma": 0.2}},
        "clipping",
    ),
    "ledger": ({"ledger": "unused.jsonl"}, {}, "ledger (given or not)"),
    "noise_generator": ({"noise": 1}, {}, "noise_generator (given or not)"),
    "order of the examples": ({"dataset": "reversed"}, {}, "the dataset (some examples that were compared)"),
    "weights": ({}, {"other_weights": True}, "the parameter 0.weight"),
}


@pytest.mark.parametrize("case", DIFFERENT.values(), ids=DIFFERENT)
def test_what_differs_between_processes_is_refused(two, case):
    """Where processes do not open the same scope, entering names what is different, in all of them."""
    differences, same, named = case
    for said in two.run("refused", differences, same):
        assert said.startswith("ScopeError")
        assert f"{named} is not the same in all processes" in said


ALONE = {
    "secure_mode": ({"secure_mode": True}, "secure_mode=True"),
    "own order": ({"poisson_sampling": False}, "sampling='sequential'"),
    "truncated batches": ({"sampling": "truncated_poisson"}, "sampling='truncated_poisson'"),
    "users": ({"privacy_unit": list(range(jobs.EXAMPLES))}, "privacy_unit"),
    "statistics": ({"nonprivate_statistics": True}, "nonprivate_statistics=True"),
    "DistributedSampler": ({"sampler": True}, "takes its part"),
}


@pytest.mark.parametrize("case", ALONE.values(), ids=ALONE)
def test_what_takes_one_process_is_refused_by_name(two, case):
    """What several processes cannot have is refused before anything is sent."""
    options, named = case
    assert all(named in said for said in two.run("refused", {}, options))


APART = {
    "raises": ("KeyError: 'of my own'", "process 1 failed"),
    "breaks": ("process 0 took step 3; process 1 left the scope", "process 1 left the scope"),
    "skips": ("process 1 took step 4", "process 0 took step 3"),
    "less noise": ("process 1 took step 3, with another noise_multiplier", "with another noise_multiplier"),
    "another bound": ("process 1 took step 3, with another noise_multiplier or max_grad_norm", "with another"),
    "freezes": ("others frozen", "others frozen"),
    "fails late": ("have parted", "process 1 failed"),
    "changes": ("other values in them", "other values in them"),
    "mixes": ("the same rows in another order", "process 1 failed"),
}


@pytest.mark.parametrize("what", APART)
def test_a_process_that_goes_its_own_way_is_an_error_in_all(two, what):
    """An exception, break or skipped batch in one process ends the scope in all, at once, and leaves nothing behind."""
    found = two.run("apart", what)
    for (raised, clean, steps), named in zip(reversed(found), APART[what], strict=True):
        assert named in raised
        assert clean
        assert steps == (3 if what == "fails late" else 2)


def test_a_further_scope_draws_other_batches(two):
    """A loader's generator goes on in the first process: scopes that are charged one after the other are independent."""
    first, second = (one + other for one, other in zip(*two.run("twice"), strict=True))
    assert first
    assert first != second


STEPS = {
    "foreign": "ScopeError: opt.step() on a batch that did not come from the private loader: with several processes",
    "order": "another order of them",
    "generator": "ScopeError: one generator for batches and for noise",
    "paused": "ScopeError: scope.paused() with DistributedDataParallel",
}


@pytest.mark.parametrize("what", STEPS)
def test_what_one_process_could_do_is_refused(two, what):
    """Batches from elsewhere, parameters in another order, one generator for two things, and public steps beside the reducer."""
    assert all(STEPS[what] in said for said in two.run("refused_step", what))


def test_a_process_that_dies_is_an_error_in_the_others():
    """The others learn of a process that is killed, at their next step."""
    with Group(2) as group:
        (raised, clean, steps), gone = group.run("apart", "dies")
    assert gone == "gone"
    assert raised.startswith("ScopeError: another process of this scope is gone")
    assert clean
    assert steps == 2


def test_an_infinite_sum_of_one_process_is_refused_by_all(two):
    """What cannot be released is known to all processes before anything is charged."""
    for said in two.run("infinite"):
        assert "is not finite" in said


def test_one_process_writes_the_ledger(two, tmp_path):
    """Two runs in two processes add up in the ledger as two runs of one process."""
    path = str(tmp_path / "ledger.jsonl")
    results = [two.run("with_ledger", path) for _ in range(2)]
    assert results[0][0] == results[0][1]
    assert [run.releases for run in dp_hooks.budget(path).runs] == [5, 5]


def test_a_run_goes_on_with_another_number_of_processes(two):
    """A budget that was begun by two processes is continued by one, and by two again, to the calibrated number of steps."""
    (state, taken, _), other = two.run("resumed", None, 4)
    assert taken == 4
    assert other[0] == {**state, "ledger_run": other[0]["ledger_run"]}
    state, taken, _ = jobs.resumed(state, 3)
    assert taken == 3
    for last, taken, epsilon in two.run("resumed", state, 100):
        assert taken == 3  # of 10
        assert 7.9 < epsilon <= 8.0
        assert last["steps"] == 10


def test_what_is_exchanged_depends_on_the_parameters_alone(two):
    """A step sends the numbers of the trained parameters once each way, and three meetings of some bytes; nothing else."""
    numbers = sum(p.numel() for p in jobs.Tied().parameters())
    whole, half = 4 * numbers, 4 * -(-numbers // 2)
    step = [("meeting", 24), ("reduce-scatter", 2 * half), ("all-gather", half), ("meeting", 8), ("meeting", 24)]
    assert whole <= 2 * half <= whole + 4
    for batch, tokens in ((4, 3), (16, 3), (16, 50)):
        for steps in two.run("exchanged", batch, tokens):
            assert steps == [step] * -(-jobs.EXAMPLES // batch)


def test_sharded_parameters_are_refused_by_name(two):
    """A model under fully_shard is not taken for an ordinary one."""
    for said in two.run("sharded"):
        assert said.startswith("ScopeError: parameters that are sharded")


def test_the_example_has_the_same_result_with_two_processes(two):
    """``examples/distributed.py`` prints the accuracy of one process, from the first of two, plain and with --ddp."""
    options = ("--batch-size", "80", "--epsilon", "100", "--learning-rate", "0.01")
    wanted = jobs.example(*options).splitlines()
    for more in ((), ("--ddp",)):
        first, other = two.run("example", *options, *more)
        assert first.splitlines()[1] == wanted[1]
        assert first.startswith("2 processes")
        assert other == ""


def test_a_scope_that_was_made_before_the_processes_joined_takes_no_step(monkeypatch):
    """A scope that knows of no other process refuses to step once there are some, before anything is charged."""
    model, data = jobs.made()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = torch.utils.data.DataLoader(data, batch_size=8)
    scope = dp_hooks.private_training(model, optimizer, loader, noise_multiplier=1.0, max_grad_norm=1.0)
    with scope as (opt, private):
        x, y = next(iter(private))
        torch.nn.functional.cross_entropy(model(x), y).backward()
        monkeypatch.setattr("dp_hooks.training.shared_release.processes", lambda: 2)
        with pytest.raises(ScopeError, match="initialised after the scope was made"):
            opt.step()
    assert scope.steps == 0
