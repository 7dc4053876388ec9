"""The table of the normal distribution, against its closed form in many digits."""

import mpmath
import pytest

from dp_hooks.privacy.noise.normal_table import BITS, CELLS_LOG2, WIDTH_LOG2, alias_table, cell_weights


def test_weights_are_the_probabilities_of_cells_to_178_binary_digits() -> None:
    """Each weight is 2^192 P(c <= 2^10 |X| < c + 1), rounded; what rounding leaves is in cell 0; the tails go out to 16."""
    weights, last = cell_weights(), 2**CELLS_LOG2

    def below(edge: int) -> mpmath.mpf:
        return mpmath.erf(mpmath.mpf(edge) / 2**WIDTH_LOG2 / mpmath.sqrt(2))

    with mpmath.workprec(300):
        errors = {c: abs(weights[c] - (below(c + 1) - below(c)) * 2**BITS) for c in (*range(0, last, 32), last - 1)}
        assert errors.pop(0) < last
        assert max(errors.values()) < 1.001
        assert 1 - below(last) < mpmath.mpf(2) ** -188
    assert len(weights) == last
    assert sum(weights) == 2**BITS
    assert last < 2 ** (BITS - 177)  # so that the total variation is as promised: all that the others lack is in cell 0


def test_the_alias_table_draws_by_exactly_these_weights() -> None:
    """Adding up what each cell is drawn for gives every weight to its last digit."""
    threshold, alias = alias_table()
    full = 2 ** (BITS - CELLS_LOG2)
    drawn_for = list(threshold)
    for kept, other in zip(threshold, alias, strict=True):
        assert 0 <= kept <= full
        drawn_for[other] += full - kept
    assert tuple(drawn_for) == cell_weights()


@pytest.mark.parametrize("factor", [0.95, 1.05])
def test_the_weights_are_those_of_no_other_scale(factor: float) -> None:
    """The probabilities of the first 1024 cells are not those of a normal number that is 5 % smaller or larger."""
    share = sum(cell_weights()[:1024]) / 2**BITS
    assert share == pytest.approx(float(mpmath.erf(1 / mpmath.sqrt(2))), abs=1e-15)
    assert abs(share - float(mpmath.erf(factor / mpmath.sqrt(2)))) > 0.01
