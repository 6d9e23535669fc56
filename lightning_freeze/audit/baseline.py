"""What frozen tensors were, in 150 bytes each, to compare with.

It holds references and digests, no copies: a name, 16 bytes of digest, a version, an address and
since when.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Union

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_freeze import accelerator
from lightning_freeze.digests import SIZE, dense, digests

# a parameter is watched as an object, a buffer where it hangs: it may be assigned anew
Place = Union[nn.Parameter, tuple[nn.Module, str]]
Moment = tuple[int, int]
Form = tuple[torch.dtype, torch.Size]
_NO_FORM: Form = (torch.float32, torch.Size())


class Baseline:
    """Some tensors as they were when each was frozen.

    Attributes:
        names: of the tensors.
        since: (epoch, optimizer step) from which each has had these bytes.
        versions: their version counters at that time; not every write bumps them.
    """

    __slots__ = (
        "_addresses",
        "_digests",
        "_forms",
        "_lazy",
        "_on_device",
        "_places",
        "_position",
        "names",
        "since",
        "versions",
    )

    def __init__(self) -> None:
        self.names: list[str] = []
        self.since: list[Moment] = []
        self.versions: list[int] = []
        self._places: list[Place] = []
        self._digests = bytearray()
        self._addresses = array("Q")
        self._forms: list[Form] = []
        self._lazy: set[int] = set()
        self._on_device: set[int] = set()
        self._position: dict[str, int] | None = None

    def __len__(self) -> int:
        return len(self.names)

    @classmethod
    def of(
        cls,
        places: Iterable[tuple[str, Place]],
        now: Moment,
        before: Baseline | None = None,
    ) -> Baseline:
        """Take down some tensors; one that `before` has, too, keeps what it was there.

        Args:
            places: name and place of each.
            now: epoch and optimizer step.
            before: an older baseline.
        """
        self = cls()
        for name, place in places:
            self.names.append(name)
            self._places.append(place)
        size = len(self.names)
        self.since = [now] * size
        self.versions = [0] * size
        self._digests = bytearray(SIZE * size)
        self._addresses = array("Q", bytes(8 * size))
        self._forms = [_NO_FORM] * size
        kept = self._take_over(before) if before is not None and len(before) else frozenset()
        for block in _blocks(size):
            self.renew([position for position in block if position not in kept], now)
        return self

    def _take_over(self, before: Baseline) -> frozenset[int]:
        """Copy what an older baseline knows of the same tensors; returns their positions."""
        old = {name: position for position, name in enumerate(before.names)}
        kept = set()
        for position, name in enumerate(self.names):
            known = old.get(name)
            if known is None or not _same(before._places[known], self._places[position]):
                continue
            if known in before._lazy:
                continue
            kept.add(position)
            self.since[position] = before.since[known]
            self.versions[position] = before.versions[known]
            self._addresses[position] = before._addresses[known]
            self._forms[position] = before._forms[known]
            self._digests[position * SIZE : (position + 1) * SIZE] = before.digest(known)
            if known in before._on_device:
                self._on_device.add(position)
        return frozenset(kept)

    def renew(self, positions: Iterable[int], now: Moment) -> None:
        """Take some of the tensors down as they are now."""
        positions = list(positions)
        self._lazy.difference_update(positions)
        self._lazy.update(p for p in positions if self._is_lazy(p))
        pairs = self._present(positions)
        same: dict[Form, Form] = {}
        for position, tensor in pairs:
            form = (tensor.dtype, tensor.shape)
            self._forms[position] = same.setdefault(form, form)
            self._on_device.discard(position)
            if not tensor.is_cpu and accelerator.served(tensor.device):
                self._on_device.add(position)
            self.since[position] = now
            self.versions[position] = versions((tensor,))[0]
            self._addresses[position] = address(tensor)
        for (position, _), value in zip(pairs, self._tokens(pairs)):
            self._digests[position * SIZE : (position + 1) * SIZE] = value

    def _is_lazy(self, position: int) -> bool:
        tensor = self.tensor(position)
        return tensor is not None and is_lazy(tensor)

    def settle(self) -> bool:
        """Take down what a lazy layer has made since it was looked at; whether there is any."""
        made = [position for position in self._lazy if not self._is_lazy(position)]
        for position in made:
            self.renew([position], self.since[position])
        return bool(made)

    def _present(self, positions: Iterable[int]) -> list[tuple[int, Tensor]]:
        pairs = [(p, self.tensor(p)) for p in positions if p not in self._lazy]
        return [(position, tensor) for position, tensor in pairs if tensor is not None]

    def tensor(self, position: int) -> Tensor | None:
        """A tensor as it is now; None for a buffer that is gone."""
        place = self._places[position]
        return _buffer(*place) if isinstance(place, tuple) else place

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters among the tensors, which come first."""
        for place in self._places:
            if isinstance(place, tuple):
                return
            yield place

    def is_buffer(self, position: int) -> bool:
        """Whether it is a buffer."""
        return isinstance(self._places[position], tuple)

    def owner(self, position: int) -> nn.Module | None:
        """The module that a buffer hangs from."""
        place = self._places[position]
        return place[0] if isinstance(place, tuple) else None

    def digest(self, position: int) -> bytes:
        """What a tensor's digest was."""
        return bytes(self._digests[position * SIZE : (position + 1) * SIZE])

    def read(self, position: int) -> bytes:
        """What a tensor's digest is now; empty for a buffer that is gone."""
        pairs = self._present([position])
        return self._tokens(pairs)[0] if pairs else b""

    def address(self, position: int) -> int:
        """Where in memory a tensor was."""
        return self._addresses[position]

    def form(self, position: int) -> Form:
        """What dtype and shape a tensor had."""
        return self._forms[position]

    def move(self, position: int, module: nn.Module) -> None:
        """A buffer hangs from another module now; what it was stays."""
        place = self._places[position]
        if isinstance(place, tuple) and _buffer(module, place[1]) is not None:
            self._places[position] = (module, place[1])

    def differs(self, name: str) -> bool:
        """Whether a tensor of this name was taken down and isn't what it was."""
        if self._position is None:
            self._position = {name: position for position, name in enumerate(self.names)}
        position = self._position.get(name)
        return position is not None and bool(self.changed([position]))

    def here(self, position: int) -> bool:
        """Whether a tensor was in this process's memory, and not on an accelerator."""
        return position not in self._on_device

    def fingerprints(self) -> list[str]:
        """The canonical fingerprint of each; what is on an accelerator is read anew."""
        self.settle()
        away = sorted(self._on_device)
        tensors = [self.tensor(position) for position in away]
        known = digests([t for t in tensors if t is not None], lambda p: self.names[away[p]])
        fresh = dict(zip([p for p, t in zip(away, tensors) if t is not None], known))
        return [fresh.get(p, self.digest(p)).hex() for p in range(len(self.names))]

    def changed(self, positions: Iterable[int] | None = None) -> list[int]:
        """Positions of the tensors whose dtype, shape or bytes aren't what they were."""
        self.settle()
        if positions is not None:
            asked = [position for position in positions if position not in self._lazy]
            pairs = self._present(asked)
            tokens = self._tokens(pairs)
            other = {p for (p, _), value in zip(pairs, tokens) if value != self.digest(p)}
            gone = set(asked).difference(p for p, _ in pairs)
            return [position for position in asked if position in other or position in gone]
        found: list[int] = []
        for block in _blocks(len(self.names)):
            tensors = [
                _buffer(*place) if type(place) is tuple else place
                for place in self._places[block.start : block.stop]
            ]
            if self._on_device or self._lazy or any(tensor is None for tensor in tensors):
                found += self.changed(block)
                continue
            name = partial(self._name, block.start)
            now = b"".join(digests(tensors, name))  # type: ignore[arg-type]
            if now != self._digests[block.start * SIZE : block.stop * SIZE]:
                found += [
                    position
                    for i, position in enumerate(block)
                    if now[i * SIZE : (i + 1) * SIZE] != self.digest(position)
                ]
        return found

    def _name(self, start: int, offset: int) -> str:
        return self.names[start + offset]

    def _tokens(self, pairs: Sequence[tuple[int, Tensor]]) -> list[bytes]:
        """Digests of the kind that was taken down, also if a tensor has moved since."""
        here = [(i, t) for i, (p, t) in enumerate(pairs) if p not in self._on_device]
        found = [b""] * len(pairs)
        known = digests([t for _, t in here], lambda p: self.names[pairs[here[p][0]][0]])
        for (index, _), value in zip(here, known):
            found[index] = value
        by_device: dict[str, list[tuple[int, Tensor]]] = {}
        for index, (position, tensor) in enumerate(pairs):
            if position not in self._on_device:
                continue
            flat = dense(tensor, lambda: "a tensor", here=False)
            if isinstance(flat, bytes):
                found[index] = flat
            else:
                by_device.setdefault(str(flat.device), []).append((index, flat))
        for group in by_device.values():
            for (index, _), value in zip(group, accelerator.reduced([t for _, t in group])):
                found[index] = value
        return found


def _blocks(size: int, of: int = 1024) -> Iterator[range]:
    """So many positions at a time, so that what is made on the way stays small."""
    return (range(start, min(start + of, size)) for start in range(0, size, of))


def _buffer(module: nn.Module, key: str) -> Tensor | None:
    try:
        found = module._buffers[key]  # TorchScript's dictionary has no `get`
    except KeyError:
        return None
    return found if isinstance(found, Tensor) else None


def _same(before: Place, now: Place) -> bool:
    if isinstance(before, tuple) and isinstance(now, tuple):
        return before[0] is now[0]
    return before is now


def versions(tensors: Sequence[Tensor]) -> list[int]:
    """The version counter of each tensor; 0 for an inference tensor, which has none."""
    try:
        return [tensor._version for tensor in tensors]
    except RuntimeError:
        return [0 if tensor.is_inference() else tensor._version for tensor in tensors]


def address(tensor: Tensor) -> int:
    """Where a tensor's memory begins; 0 where it has none of its own."""
    try:
        return tensor.data_ptr()
    except RuntimeError:
        return 0
