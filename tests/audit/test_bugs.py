"""Every seeded privacy bug is found by the audit that is said to find it, and runs without one are left alone."""

from typing import Any

import pytest

from dp_hooks.errors import DPHooksError

from .bugs import BUGS, Bug
from .runs import Train, audited, loop, measured, step

EXPECTED = [(bug, audit) for bug in BUGS for audit in bug.finds]


def test_there_are_more_than_thirty() -> None:
    """The table is long, and no bug is in it twice."""
    assert len({bug.name for bug in BUGS}) == len(BUGS) >= 40


@pytest.mark.parametrize(("bug", "audit"), EXPECTED, ids=str)
def test_each_bug_is_found(bug: Bug, audit: str) -> None:
    """The audit tells of it, in words, and says that the run does not hold."""
    found = bug.found_by(audit)
    assert found.findings
    assert not found.holds
    assert found.as_dict()["holds"] is False
    assert f"FOUND: {found.findings[0]}" in str(found)


HONEST: list[tuple[Train, dict[str, Any]]] = [
    (loop(), {}),
    (step, {}),
    (loop(), {"max_physical_batch_size": 5}),
    (loop(), {"clipping": "automatic"}),
    (loop(), {"clipping": "adaptive", "clipping_options": {"unclipped_num_std": 1.0}}),
    (loop(), {"clipping": "per_group", "max_grad_norm": {"head*": 0.6, "*": 0.8}}),
    (loop(), {"grad_sample_mode": "hooks"}),
    (loop(), {"grad_sample_mode": "functorch"}),
    (loop(), {"poisson_sampling": False}),
    (loop(), {"noise_multiplier": 0.0}),
    (loop(), {"noise_multiplier": None, "target_epsilon": 8.0, "target_delta": 1e-5, "epochs": 1}),
]


@pytest.mark.parametrize(("train", "options"), HONEST, ids=lambda part: "-".join(map(str, part)) if isinstance(part, dict) else "")
def test_a_private_step_has_the_sensitivity_that_it_says(train: Train, options: dict[str, Any]) -> None:
    """Whatever the options: one example moves the sum by C at most and by nearly that, and examples do nothing to each other."""
    found = measured(train, **options)
    assert found.holds
    assert 0.99 < found.value < 1.0001
    assert found.coupling < 1e-5 > found.rounding
    assert found.tried == 8


@pytest.mark.parametrize("seed", range(20))
def test_no_honest_run_is_found_to_spend_more_than_it_says(seed: int) -> None:
    """In twenty runs at an epsilon of 8 each bound is below that; the closer one is above 5 with 2,000 canaries."""
    full: dict[str, Any] = {"examples": 4000, "sample_rate": 1.0, "noise_multiplier": 0.86, "train": loop(passes=2)}
    sampled: dict[str, Any] = {"examples": 1000, "batch_size": 250}
    found = audited(seed=seed, **(full if seed % 4 else sampled))
    assert found.holds, str(found)
    assert 0 < found.epsilon_guessed < found.epsilon_lower < found.epsilon < 8
    assert found.epsilon > 7.8
    assert found.epsilon_lower > 5 or not seed % 4


@pytest.mark.parametrize(
    "options",
    [
        {"clipping": "adaptive"},
        {"clipping": "per_group", "max_grad_norm": {"head*": 0.6, "*": 0.8}},
        {"max_physical_batch_size": 70},
        {"secure_mode": True},
        {"poisson_sampling": False},
        {"train": step},
        {"grad_sample_mode": "hooks"},
    ],
    ids=lambda options: "-".join(options),
)
def test_honest_runs_of_other_kinds_are_left_alone(options: dict[str, Any]) -> None:
    """Nothing is found in them, and epsilon is not more than stated."""
    found = audited(**{"train": loop(passes=3), "noise_multiplier": 1.0, **options})
    assert found.holds, str(found)
    assert found.epsilon_lower < found.epsilon


def test_what_one_example_sends_can_be_what_canaries_send() -> None:
    """With canaries as long as the sensitivity of a broken clipping the run is found to spend more than it says."""
    bug = next(bug for bug in BUGS if bug.name == "bound times 2")
    reach = bug.found_by("sensitivity").value
    assert audited(reach=1.0).holds
    found = audited(reach=reach)
    assert "epsilon is at least" in found.findings[0]
    assert found.epsilon_lower > found.epsilon


def test_a_run_without_noise_has_no_epsilon() -> None:
    """It says so itself: infinite, and there is nothing to be found."""
    found = audited(noise_multiplier=0.0, train=loop())
    assert found.epsilon == found.epsilon_lower == float("inf")
    assert found.holds


def test_batches_from_elsewhere_are_no_run_of_the_loader() -> None:
    """A loop that steps what the private loader did not hand out is refused."""

    def train(model: Any, opt: Any, loader: Any) -> None:
        opt.step_empty()

    for audit in (measured, audited):
        with pytest.raises(DPHooksError, match="private loader"):
            audit(train)
