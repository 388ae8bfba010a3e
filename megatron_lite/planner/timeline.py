"""What a rank holds, by part, from event to event; remembers the moment when it held most."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping


class Timeline:
    """Bytes by part, from `staying` on. at: what is going on, a name for the fullest moment. fullest: the parts at that moment."""

    def __init__(self, staying: Mapping[str, int]) -> None:
        self.held: Counter[str] = Counter(staying)
        self.at = self.moment = "between two steps"
        self.fullest: dict[str, int] = dict(self.held)

    def hold(self, part: str, size: int) -> None:
        """From here on `size` bytes more of `part` are held; fewer if it is negative."""
        self.held[part] += size
        assert self.held[part] >= 0, f"{self.at}: {part} was released twice"
        if size > 0 and self.held.total() > sum(self.fullest.values()):
            self.fullest, self.moment = dict(self.held), self.at

    def release(self, part: str, size: int) -> None:
        """From here on `size` bytes less of `part` are held."""
        self.hold(part, -size)

    def spike(self, part: str, size: int) -> None:
        """For a moment `size` bytes more of `part` are held."""
        self.hold(part, size)
        self.release(part, size)
