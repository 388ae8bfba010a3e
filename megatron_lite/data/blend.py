"""Sample i of a run, as a pure function: which source, which epoch, which window.

Each phase draws its sources from a balanced binary tree. At a node whose left side has share a of t, of the
first c samples that come there

    left(c) = floor((a * c + floor(t / 2)) / t)

go left: the nearest integer to c * a / t. Sample i goes left if left(i + 1) > left(i), and is then number
left(i) of those that did; else it goes right as number i - left(i). The number with which it arrives at a
leaf is the count of earlier samples that took this source. A node adds at most 1/2 to the error of a count,
so at every prefix every source is within depth / 2 of its share.

A later phase continues the counts of the ones before, so a change of weights repeats and skips nothing. With
n for the count and N for the source's number of windows: epoch = n // N, window = permutation(seed, source,
epoch)(n % N).

Notable features
- Random access and no state: a resumed run needs `consumed_samples` and nothing else.
- Exact integers of any size: right at i = 10^13, on every machine.
- Sources of one group are in one subtree, so the groups keep their shares as closely as single sources.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from megatron_lite.data.config import DataConfig
from megatron_lite.data.packing import Example
from megatron_lite.data.permutation import Key, make_key, permute
from megatron_lite.data.phases import Shares, resolve
from megatron_lite.data.sidecar import TokenizerIdentity
from megatron_lite.data.source import Source, open_sources


class Draw(NamedTuple):
    """A sample's place: window `window` of source `source` in its pass `epoch` (from 0)."""

    source: str
    epoch: int
    window: int


@dataclass(frozen=True)
class _Node:
    """`left` takes `part` of `whole` samples, `right` the others. Leaves are source names."""

    part: int
    whole: int
    left: _Node | str
    right: _Node | str

    def before(self, count: int) -> int:
        """How many of the first `count` samples go left."""
        return (count * self.part + self.whole // 2) // self.whole


class ProportionTree:
    """i -> (source, how many of the samples before i took this source), for fixed shares."""

    def __init__(self, shares: Shares) -> None:
        groups: dict[str, list[str]] = {}
        for name in sorted(shares):
            groups.setdefault(name.split("/")[0], []).append(name)
        self.root = _balanced([_balanced(list(names), shares) for names in groups.values()], shares)

    @property
    def depth(self) -> int:
        """The longest way from the root to a source; counts stay within depth / 2 of the shares."""
        return _depth(self.root)

    def locate(self, i: int) -> tuple[str, int]:
        """(source of sample i, its number among this source's samples)."""
        node = self.root
        while not isinstance(node, str):
            left = node.before(i)
            if node.before(i + 1) > left:
                i, node = left, node.left
            else:
                i, node = i - left, node.right
        return node, i

    def counts(self, stop: int) -> Counter[str]:
        """How many of the samples [0, stop) each source gives."""
        found: Counter[str] = Counter()
        todo: list[tuple[_Node | str, int]] = [(self.root, stop)]
        while todo:
            node, count = todo.pop()
            if isinstance(node, str):
                found[node] = count
            else:
                left = node.before(count)
                todo += [(node.left, left), (node.right, count - left)]
        return found


def _balanced(parts: list[Any], shares: Shares) -> _Node | str:
    """A tree over `parts` (names or trees), halved by number."""
    if len(parts) == 1:
        return parts[0]
    middle = len(parts) // 2
    left, right = _balanced(parts[:middle], shares), _balanced(parts[middle:], shares)
    share = sum(shares[name] for name in _names(left)) / sum(shares[name] for name in _names(left) + _names(right))
    return _Node(share.numerator, share.denominator, left, right)  # type: ignore[union-attr]


def _names(node: _Node | str) -> list[str]:
    return [node] if isinstance(node, str) else _names(node.left) + _names(node.right)


def _depth(node: _Node | str) -> int:
    return 0 if isinstance(node, str) else 1 + max(_depth(node.left), _depth(node.right))


class Blend:
    """All samples of a run, indexed from 0 without end.

    Args:
        sources: by full name; each is read only where a phase gives it a share.
        config: groups, weights and phases.
        seed: of the shuffle.
        total_samples: of the whole run; `until_fraction` is a fraction of it.
        kept_boundaries: sample numbers that fractions became at the run's first start (see
        `resume.resume_blend`).
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        *,
        config: DataConfig,
        seed: int,
        total_samples: int,
        kept_boundaries: Mapping[str, int] | None = None,
    ) -> None:
        self.sources = dict(sources)
        self.config = config
        self.seed = seed
        self.total_samples = total_samples
        tokens = {name: source.num_tokens for name, source in self.sources.items()}
        self.phases = resolve(config, tokens, total_samples=total_samples, kept=kept_boundaries)
        self._starts = [segment.start for segment in self.phases.segments]
        self._trees = [ProportionTree(segment.shares) for segment in self.phases.segments]
        self._bases: list[Counter[str]] = [Counter()]  # what each source gave before each phase
        for tree, start, end in zip(self._trees, self._starts, self._starts[1:]):
            self._bases.append(self._bases[-1] + tree.counts(end - start))
        self._keys: dict[str, tuple[int, Key]] = {}  # round keys of each source's latest epoch

    def locate(self, i: int) -> tuple[str, int]:
        """(source of sample i, number of earlier samples of the whole history that took this source)."""
        if i < 0:
            raise IndexError(f"sample {i}: samples count from 0")
        phase = bisect_right(self._starts, i) - 1
        source, n = self._trees[phase].locate(i - self._starts[phase])
        return source, n + self._bases[phase][source]

    def draw(self, i: int) -> Draw:
        """Where sample i comes from."""
        name, n = self.locate(i)
        epoch, position = divmod(n, self.sources[name].num_windows)
        cached = self._keys.get(name)
        if cached is None or cached[0] != epoch:
            # One assignment of a tuple: safe for readers in other threads.
            cached = self._keys[name] = (epoch, make_key(self.seed, name, epoch))
        return Draw(name, epoch, permute(position, self.sources[name].num_windows, cached[1]))

    def __getitem__(self, i: int) -> Example:
        """Sample i as a training example: arrays (T,), see `packing.pack`."""
        draw = self.draw(i)
        return self.sources[draw.source].example(draw.window)

    def counts(self, start: int, stop: int) -> dict[str, int]:
        """How many of the samples [start, stop) each source gives, without visiting them."""
        upto, below = self._prefix(stop), self._prefix(start)
        return {name: upto[name] - below[name] for name in self.sources}

    def expected(self, stop: int) -> dict[str, float]:
        """The share of the samples [0, stop) that the weights of the phases ask of each source (of the first, at stop 0)."""
        ends = [*self._starts[1:], stop]
        shares = dict.fromkeys(self.sources, 0.0)
        for segment, end in zip(self.phases.segments, ends):
            length = max(0, min(end, stop) - segment.start) if stop else int(segment.start == 0)
            for name, share in segment.shares.items():
                shares[name] += float(share) * length / max(stop, 1)
        return shares

    def _prefix(self, stop: int) -> Counter[str]:
        phase = max(bisect_right(self._starts, stop) - 1, 0)
        return self._bases[phase] + self._trees[phase].counts(stop - self._starts[phase])

    def state(self) -> dict[str, Any]:
        """Plain values that say which samples this blend gives, for the checkpoint's manifest.

        With `consumed_samples` they are the whole state of the data; `resume.check_resume` compares them.
        """
        return {
            "seed": self.seed,
            "seq_len": self.config.seq_len,
            "reset_attention": self.config.reset_attention,
            "mask_eod_loss": self.config.mask_eod_loss,
            "boundaries": dict(self.phases.boundaries),
            "phases": [
                {
                    "start": segment.start,
                    "shares": {name: str(share) for name, share in segment.shares.items()},
                }
                for segment in self.phases.segments
            ],
            "sources": {name: source.state() for name, source in self.sources.items()},
        }


def open_blend(config: DataConfig, *, tokenizer: TokenizerIdentity, seed: int, total_samples: int) -> Blend:
    """Check `config`, open its sources and blend them; no time or memory that grows with the data."""
    config.validate()
    return Blend(open_sources(config, tokenizer), config=config, seed=seed, total_samples=total_samples)
