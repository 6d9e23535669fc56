"""What one prefix gives, sample by sample, in a store."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_freeze.cache.replay import Output, Replay
from lightning_freeze.cache.skipped import Layout, Leaf, SkippedActivation
from lightning_freeze.cache.store import RowStore

# shapes that batches are padded to, and the like
_MOST_SPACES = 10_000
_NUMBERS = itertools.count()


class Rows:
    """Rows of the outputs of a prefix.

    Args:
        store: where they are kept.
        replayed: the prefix.
        names: module -> its path: rows are found by it in a later stage, too.

    Attributes:
        number: stands for what made them: weights, modes, attributes.
    """

    def __init__(self, store: RowStore, replayed: Replay, names: Mapping[nn.Module, str]) -> None:
        self.store = store
        self.number = next(_NUMBERS)
        self.by_row: frozenset[Leaf] = frozenset()
        self._skipped = len(replayed.prefix.skipped)
        # the second call of a module has rows of its own
        called: Counter[nn.Module] = Counter()
        self._names = []
        for module in replayed.modules:
            again = f" #{called[module]}" if called[module] else ""
            self._names.append(names[module] + again)
            called[module] += 1
        self._outputs: dict[bytes, dict[int, Output]] = {}

    def renew(self) -> None:
        """Something else makes them from now on."""
        self.number = next(_NUMBERS)

    def inherit(self, other: Rows) -> None:
        """Go on with the rows of a longer prefix of the same calls."""
        self.number = other.number
        if other._names[: self._skipped] == self._names[: self._skipped] and (
            self._skipped <= other._skipped
        ):
            for space, outputs in other._outputs.items():
                self._outputs[space] = {n: outputs[n] for n in range(self._skipped)}

    def knows(self, space: bytes) -> bool:
        """Whether it is known what skipped calls return in a space."""
        return space in self._outputs

    def name(self, leaf: Leaf) -> tuple[str, int]:
        """An output, by the path of its module."""
        return self._names[leaf[0]], leaf[1]

    def missing(self, space: bytes, keys: Sequence[bytes], leaves: Iterable[Leaf]) -> list[int]:
        """Positions of the samples of which one of some outputs isn't there."""
        if not self.knows(space):
            return list(range(len(keys)))
        positions = (self.store.missing(self._place(space, leaf), keys) for leaf in leaves)
        return sorted(set().union(*positions))

    def learn(self, space: bytes, outputs: dict[int, Output]) -> None:
        """Note what skipped calls return beside values.

        Raises:
            SkippedActivation: it isn't what they returned before.
        """
        before = self._outputs.get(space)
        if before is not None and _plain(before) != _plain(outputs):
            raise SkippedActivation("a frozen layer returns other numbers now", frozenset())
        if len(self._outputs) > _MOST_SPACES:
            self._outputs.clear()
        self._outputs[space] = outputs

    def put(self, space: bytes, leaf: Leaf, keys: Sequence[bytes], value: Tensor) -> None:
        """Keep an output of some samples.

        Raises:
            Full: not all fit.
            OSError: a file can't be made.
        """
        self.store.put(self._place(space, leaf), keys, value)

    def get(self, space: bytes, leaf: Leaf, keys: Sequence[bytes]) -> Tensor:
        """An output of some samples, as their call would have given it.

        Raises:
            KeyError: one isn't there.
        """
        layout = self._outputs[space][leaf[0]].leaves[leaf[1]]
        place = self._place(space, leaf)
        found = self.store.get(place, keys, layout.dtype, layout.device)
        arranged: Tensor = layout.arranged(found)
        return arranged

    def joined(
        self,
        space: bytes,
        leaf: Leaf,
        keys: Sequence[bytes],
        fresh: Sequence[tuple[Sequence[int], Tensor]],
    ) -> Tensor:
        """An output of all samples of a call.

        Args:
            space: that of the call.
            leaf: the output.
            keys: of the call's samples.
            fresh: positions of samples that were just computed, and their values; the others come
                from the store.

        Raises:
            SkippedActivation: what was computed doesn't look like what was kept.
        """
        if not fresh:
            return self.get(space, leaf, keys)
        if len(fresh[0][0]) == len(keys):
            return fresh[0][1]
        computed = {row for rows, _ in fresh for row in rows}
        there = [row for row in range(len(keys)) if row not in computed]
        parts = list(fresh)
        if there:
            parts.append((there, self.get(space, leaf, [keys[row] for row in there])))
        if len({(value.shape[1:], value.dtype) for _, value in parts}) > 1:
            raise SkippedActivation("outputs have another shape now", frozenset())
        like = parts[0][1]
        whole = like.new_empty((len(keys), *like.shape[1:]))
        for rows, value in parts:
            whole[torch.tensor(rows, device=whole.device)] = value
        layout = self._outputs[space][leaf[0]].leaves[leaf[1]]
        arranged: Tensor = layout.arranged(whole)
        return arranged

    def shaped(self, space: bytes, rows: int) -> dict[int, Output]:
        """What skipped calls return, for a number of samples."""
        found = {}
        for number, output in self._outputs[space].items():
            leaves = []
            for position, leaf in enumerate(output.leaves):
                if isinstance(leaf, Layout) and (number, position) in self.by_row:
                    shape = torch.Size((rows, *leaf.shape[1:]))
                    leaf = Layout(shape, leaf.dtype, leaf.device, leaf.order)
                leaves.append(leaf)
            found[number] = Output(output.spec, tuple(leaves))
        return found

    def _place(self, space: bytes, leaf: Leaf) -> tuple[int, bytes, str, int]:
        return (self.number, space, *self.name(leaf))


def _plain(outputs: dict[int, Output]) -> Any:
    """What skipped calls return beside tensors."""
    return [
        (number, position, type(leaf), leaf)
        for number, output in outputs.items()
        for position, leaf in enumerate(output.leaves)
        if not isinstance(leaf, Layout)
    ]
