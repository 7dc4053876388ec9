"""Changes: where calls have changed the state of a model, as far as no check has covered that."""

from collections import Counter

from .module_state import ModuleState, Place

# So many checks look at what is added to a container or to the attributes of a module; it may be another item in every call.
_GROWS = 3


class Changes:
    """Places in a model's state that calls have changed.

    Attributes:
        open: those that no check has covered; for one that is new, what it was added to.
    """

    def __init__(self) -> None:
        """Nothing has changed yet."""
        self.open: dict[Place, Place | None] = {}
        self._covered: set[Place] = set()
        self._grown: Counter[Place] = Counter()  # how many checks looked at what was added there

    def new_in(self, state: ModuleState | None) -> dict[Place, Place | None]:
        """What has changed since ``state`` was kept, and is not covered."""
        return {
            place: holder
            for place, holder in (state.changed() if state is not None else {}).items()
            if place not in self._covered and (holder is None or self._grown[holder] < _GROWS)
        }

    def note(self, state: ModuleState | None) -> dict[Place, Place | None]:
        """Add it, and return it."""
        found = self.new_in(state)
        self.open |= found
        return found

    def cover(self) -> None:
        """A check has looked at all of them."""
        self._covered |= self.open.keys()
        self._grown.update({holder for holder in self.open.values() if holder is not None})
        self.open = {}
