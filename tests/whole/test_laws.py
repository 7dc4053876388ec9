"""Every law, for every case, in every mode: a new layer, model, law or mode is one row of its table."""

import pytest

from .. import laws
from ..cases import Case
from ..cases.followed import FOLLOWED
from ..cases.layers import LAYERS
from ..cases.models import MODELS

pytestmark = pytest.mark.filterwarnings(
    "ignore:Using padding='same' with even kernel", "ignore:.*None of the inputs have requires_grad"
)


@pytest.mark.parametrize("mode", laws.MODES, ids=str)
@pytest.mark.parametrize("case", [*LAYERS, *FOLLOWED, *MODELS], ids=str)
@pytest.mark.parametrize("law", laws.LAWS, ids=lambda law: law.__name__)
def test_every_case_obeys_every_law_in_every_mode(law, case: Case, mode: laws.Mode):
    """What a law says is so, whatever the model is made of and whichever way its gradients are come by."""
    law(case, mode)
