"""Compiled code runs eagerly while hooks are on a model, and is compiled again afterwards."""

import pytest
import torch

from dp_hooks import HookController
from dp_hooks.capture.compile_stance import eager

from ..models import build, drawn


@pytest.fixture
def compilations():
    """Return a compiled function and the list of compilations it went through."""
    seen = []

    def backend(graph, inputs):
        seen.append(graph)
        return graph.forward

    torch._dynamo.reset()
    function = torch.compile(lambda x: x.sin() + 1, backend=backend)
    yield function, seen
    torch._dynamo.reset()


def test_nothing_is_compiled_while_hooks_are_on(compilations):
    """A compiled function runs as plain Python from add_hooks to remove_hooks, and is compiled after that."""
    function, seen = compilations
    x = torch.randn(3, generator=drawn())
    controller = HookController(build("mlp"))
    torch.testing.assert_close(function(x), x.sin() + 1)
    assert seen == []
    controller.remove_hooks()
    torch.testing.assert_close(function(x), x.sin() + 1)
    assert len(seen) == 1


@pytest.mark.parametrize("first_ends", [True, False])
def test_scopes_may_end_in_any_order(first_ends, compilations):
    """Of two overlapping controllers either may end first: compiled code stays eager until both have."""
    function, seen = compilations
    both = [HookController(build("mlp")), HookController(build("mlp"))]
    both[0 if first_ends else 1].cleanup()
    function(torch.ones(2))
    assert seen == []
    both[1 if first_ends else 0].cleanup()
    function(torch.ones(2))
    assert len(seen) == 1


def test_the_users_stance_comes_back(compilations):
    """Where the user has switched compilation off already, it stays off after the block."""
    function, seen = compilations
    with torch.compiler.set_stance("force_eager"):
        with eager():
            function(torch.ones(2))
        function(torch.ones(2))
        assert seen == []
    function(torch.ones(2))
    assert len(seen) == 1
