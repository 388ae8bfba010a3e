"""Which tokens of a divided sequence look at which, as far as it is known before any number is computed.

The unit is a tile: consecutive tokens of one slice. What the queries of a tile see of the keys of another is nothing (then
nothing is computed), all of them, all up to themselves, or some, which takes a mask. A tile is a whole slice where one rule
holds for all of it. With a window it has at most as many tokens as the window, so that work grows with the window and not with the
slice; with documents at most `DOCUMENT_TILE`, so that a short document does not cost a slice. No mask is larger than a tile by a
tile.

What is sent are tiles too, cut to the keys that the receiver's queries reach: with a window the end of the slice before each of
its slices, and the tokens that are always visible, whatever the length of the sequence.

All follows from the tokens' places, so every rank knows what every other one needs. Where documents begin is data: it makes
views narrower (`narrowed`) but never decides about communication.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from torch import Tensor

from megatron_lite.models.attention_mask import Visibility

META = -1  # the number of the "slice" of meta tokens, which every rank holds
DOCUMENT_TILE = 2048
SHORTEST_TILE = 64  # shorter ones are not worth a kernel call


class View(Enum):
    """What the queries of a tile see of the keys of another."""

    NOTHING = "nothing"
    ALL = "all"
    CAUSAL = "the same tokens, each up to itself"
    SOME = "a mask says which"


@dataclass(frozen=True)
class Rule:
    """Who sees whom. prefix: number of meta tokens, the first of the sequence. documents: whether there may be several."""

    visibility: Visibility
    prefix: int
    documents: bool

    @property
    def numbers(self) -> list[int]:
        """What an operator takes instead: window (-1: none), always visible, prefix, documents."""
        window, always = self.visibility.window, self.visibility.always_visible
        return [-1 if window is None else window, always, self.prefix, int(self.documents)]

    @classmethod
    def of(cls, numbers: Sequence[int]) -> Rule:
        """The rule of these numbers."""
        window, always, prefix, documents = numbers
        return cls(Visibility(None if window < 0 else window, always), prefix, bool(documents))

    @property
    def limits_reach(self) -> bool:
        """Whether what a slice sees of others does not grow with the sequence."""
        visibility = self.visibility
        return visibility.window is not None and not (self.documents and visibility.always_visible > self.prefix)

    def tile_length(self, slice_length: int) -> int:
        """The most tokens of a tile."""
        window, length = self.visibility.window, slice_length
        if window is not None:
            length = min(length, max(SHORTEST_TILE, window))
        return min(length, DOCUMENT_TILE) if self.documents else length


@dataclass(frozen=True)
class Tile:
    """`length` tokens from `start` on of the slice `number`; its first one is token `first` of the sequence, meta tokens included."""

    number: int
    start: int
    length: int
    first: int

    @property
    def last(self) -> int:
        """The place of its last token in the sequence."""
        return self.first + self.length - 1

    def of(self, slices: dict[int, Tensor]) -> Tensor:
        """The tile's part of tensors that have their tokens along dimension 2."""
        return slices[self.number].narrow(2, self.start, self.length)


@dataclass(frozen=True)
class Route:
    """What one round of an exchange carries for this rank: the tiles `sent` to rank `to`, and those `received` from rank `sender`.
    Every rank of the group has a route of the same round, and either tuple may be empty."""

    to: int
    sender: int
    sent: tuple[Tile, ...]
    received: tuple[Tile, ...]

    @property
    def back(self) -> Route:
        """The same tiles on their way back."""
        return Route(to=self.sender, sender=self.to, sent=self.received, received=self.sent)


def tiles(numbers: Sequence[int], slice_length: int, rule: Rule) -> Iterator[Tile]:
    """The tiles of these slices. The first one of a slice is the short one: a window reaches over the end of a slice."""
    step = rule.tile_length(slice_length)
    for number in numbers:
        if number == META:
            yield Tile(META, 0, rule.prefix, 0)
            continue
        first, short = rule.prefix + number * slice_length, slice_length % step or step
        for start in (0, *range(short, slice_length, step)):
            yield Tile(number, start, step if start else short, first + start)


def view(query: Tile, key: Tile, rule: Rule) -> View:
    """What is known from places alone. Two tiles are the same tokens or have none in common.

    Within a document positions are as far apart as places, and in meta tokens they are the places.
    """
    if key.first > query.last:
        return View.NOTHING
    known = not rule.documents or key.number == META  # whether keys' positions are their places
    window, always = rule.visibility.window, rule.visibility.always_visible
    some = not known
    in_window = max(key.first, always) if known else key.first  # the first key that a window may hide
    if window is not None and in_window <= key.last:
        if _out_of_reach(query, key, rule):
            return View.NOTHING
        some = some or query.last - in_window > window
    if some:
        return View.SOME
    return View.CAUSAL if key.first == query.first else View.ALL


def _out_of_reach(query: Tile, key: Tile, rule: Rule) -> bool:
    window, always = rule.visibility.window, rule.visibility.always_visible
    assert window is not None, "without a window everything is in reach"
    if rule.documents and (key.number == META or always > rule.prefix):
        return False  # positions count from where the query's document begins, which is anywhere
    return query.first - key.last > window and key.first >= always


def narrowed(found: View, query: Tile, key: Tile, *, rule: Rule, begins_BT: Tensor) -> View:
    """`found`, or less where the documents show that a mask is not needed.

    begins_BT: for the tokens of `query`, where in the sequence their documents begin. They are read, which on a GPU would make
    the host wait for it; so it is asked for those on a CPU.
    """
    if found is not View.SOME or key.number == META:
        return found
    if bool((begins_BT[:, 0] > key.last).all()):
        return View.NOTHING
    one_document = bool((begins_BT[:, -1] <= key.first).all())
    if one_document and rule.visibility.always_visible <= rule.prefix:
        return view(query, key, replace(rule, documents=False))
    return found


@functools.cache
def routes(rank: int, size: int, slice_length: int, rule: Rule) -> tuple[Route, ...]:
    """The rounds in which rank `rank` of `size` gets the keys that its queries see; in round i every rank sends to the one i places
    after it. A round in which no rank needs anything is left out, on all ranks alike."""
    rounds = []
    for step in range(1, size):
        needed = [
            tuple(_needed(reader, (reader - step) % size, size=size, length=slice_length, rule=rule))
            for reader in range(size)
        ]
        if any(needed):
            to = (rank + step) % size
            rounds.append(Route(to, (rank - step) % size, sent=needed[to], received=needed[rank]))
    return tuple(rounds)


def _needed(reader: int, holder: int, *, size: int, length: int, rule: Rule) -> Iterator[Tile]:
    """The holder's keys of which the reader's queries may see something."""
    held, readers = ((rank, 2 * size - 1 - rank) for rank in (holder, reader))
    for key in tiles(held, length, rule):
        following = [number for number in readers if number > key.number]
        reached = _reached(key, rule.prefix + following[0] * length, rule) if following else None
        if reached is not None:
            yield reached


def _reached(key: Tile, query: int, rule: Rule) -> Tile | None:
    """What the tokens from place `query` on, behind the tile, see of it; None: nothing."""
    window, always = rule.visibility.window, rule.visibility.always_visible
    if window is None or key.first < always or (rule.documents and always > rule.prefix):
        return key  # positions count from where a document begins, which is anywhere
    hidden = max(0, query - window - key.first)
    if hidden >= key.length:
        return None
    return Tile(key.number, key.start + hidden, key.length - hidden, key.first + hidden)
