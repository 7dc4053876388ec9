"""Whether what a backward pass began with is linear in a criterion's loss, as far as its graph shows."""

from typing import Any

from ..capture.calls.running_backward import losses_in_backward

# Products: by what is seen in the gradient. Their operands are gone by the time that a loss is reached.
_LINEAR = {
    f"{name.rstrip('01')}Backward{name[-1]}"
    for name in (
        "Neg0 Add0 Sub0 Sum0 Sum1 Mean0 Mean1 Rsub0 Rsub1 Mul0 Div0 Stack0 Cat0 Clone0 Alias0 View0 UnsafeView0 ReshapeAlias0 "
        "ToCopy0 Expand0 Squeeze0 Squeeze1 Unsqueeze0"
    ).split()
}
_MOST = 10_000  # nodes that are looked at


def is_linear(end: Any, others: set[Any]) -> bool:
    """Whether the running backward pass came to ``end``, the node of a loss, by linear operations only.

    A threshold, a power or a maximum of the loss of a batch makes the factor of every example depend on all others, also where it
    is a plain number now. The graph is not looked at beyond ``others``, nodes of other losses and of the model's outputs.
    """
    losses = losses_in_backward()
    if losses is None:
        return False
    roots = [loss.grad_fn for loss in losses]
    if roots == [end]:
        return True
    parents: dict[Any, list[Any]] = {}
    waiting = [root for root in roots if root is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        if node is end or node in others:
            continue
        if len(seen) > _MOST:
            return False
        for further, _ in node.next_functions:
            if further is not None:
                parents.setdefault(further, []).append(node)
                if further not in seen:
                    seen.add(further)
                    waiting.append(further)
    waiting, on_the_way = [end], {end}
    while waiting:
        for node in parents.get(waiting.pop(), []):
            if node not in on_the_way:
                if node.name() not in _LINEAR:
                    return False
                on_the_way.add(node)
                waiting.append(node)
    return True
