"""The lifetime of a private scope: it ends when it is left, and at the latest when nobody can use it any more."""

from contextlib import ExitStack
from types import TracebackType


class Lifetime:
    """What has to be undone at the end of a scope; the scope, its optimizer and its loader hold it.

    Nothing on the model, and nothing global, refers to it: when a program loses the three of them (an engine made in a function, a
    notebook cell that is run again), the garbage collector ends the scope. So it dies with its model, too.
    """

    def __init__(self) -> None:
        """Not begun yet."""
        self._stack: ExitStack | None = None
        self.ended = False

    @property
    def is_open(self) -> bool:
        """Whether it has begun and not ended."""
        return self._stack is not None

    def begin(self, stack: ExitStack) -> None:
        """Take over what ``stack`` has to undo."""
        self._stack = stack.pop_all()

    def end(
        self, kind: type[BaseException] | None = None, exc: BaseException | None = None, trace: TracebackType | None = None
    ) -> None:
        """Undo everything; may be called again."""
        if self._stack is not None:
            stack, self._stack, self.ended = self._stack, None, True
            stack.__exit__(kind, exc, trace)

    def __del__(self) -> None:
        """Lost without an end."""
        self.end()
