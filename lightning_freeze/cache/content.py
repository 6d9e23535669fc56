"""Whether skipped modules are still frozen, in eval mode, unwatched, and what they were."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import attrgetter, is_
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

from lightning_freeze import accelerator
from lightning_freeze.audit.moods import minds_its_mode
from lightning_freeze.cache.calls import foreign_hooks
from lightning_freeze.cache.reads import names_read
from lightning_freeze.cache.replay import Entry
from lightning_freeze.digests import dense, digests
from lightning_freeze.engine.flags import NOTES

# what every module has; `_modules` and the tables of tensors are compared one by one
_TABLES = frozenset(vars(nn.Module())) | {"training", "forward"} | NOTES
_CONTAINERS = (list, tuple, dict, set)
_REQUIRES_GRAD = attrgetter("requires_grad")
_TRAINING = attrgetter("training")
_VERSION = attrgetter("_version")
_ATOMS = (type(None), bool, int, float, complex, str, bytes, type)


class Content:
    """What some modules are made of.

    Args:
        modules: with all that is in them.
        around: modules in whose `forward` these are called. Of them counts what their code can
            read.
        outside: other tensors that count.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        around: Sequence[nn.Module] = (),
        outside: Sequence[Tensor] = (),
    ) -> None:
        inner = list(dict.fromkeys(m for module in modules for m in module.modules()))
        self._inner = inner
        self._around = [module for module in around if module not in set(inner)]
        # hooks of the first of those around are called before and after its `forward`
        self._watched = [*inner, *(m for m in self._around if m is not around[0])]
        self._forwards = [(m, vars(m), _forward_of(m)) for m in (*inner, *self._around)]
        self._modes = [m for m in inner if minds_its_mode(m)]
        self._made_of = [(m._modules, list(m._modules.values())) for m in inner if m._modules]
        tables = [t for m in inner for t in (m._parameters, m._buffers) if t]
        self._tables = [(table, list(table.values())) for table in tables]
        attributes = [t for m in inner for t in vars(m).values() if isinstance(t, Tensor)]
        tensors = [t for _, values in self._tables for t in values if t is not None]
        self._tensors = list({id(t): t for t in (*tensors, *attributes, *outside)}.values())
        outer = {id(tensor) for tensor in outside}
        self._named = [
            (table, name, tensor)
            for m in self._around
            for table in (m._parameters, m._buffers)
            for name, tensor in table.items()
            if id(tensor) in outer
        ]
        # writes to tensors that were made in inference mode aren't counted
        self._counted = [p for p, t in enumerate(self._tensors) if not t.is_inference()]
        self._versioned = [self._tensors[p] for p in self._counted]
        self._versions = list(map(_VERSION, self._versioned))
        self._digests = _digests(self._tensors)
        self._attributes = list(self._read())
        self._generation = 0

    def usable(self) -> bool:
        """False where something trains, is in train mode, is hooked into or was exchanged."""
        if torch_modules._global_forward_hooks or torch_modules._global_forward_pre_hooks:
            return False
        if any(map(_TRAINING, self._modes)) or any(map(_REQUIRES_GRAD, self._tensors)):
            return False
        hooked = [m for m in self._watched if m._forward_hooks or m._forward_pre_hooks]
        if any(foreign_hooks(m) for m in hooked):
            return False
        return self.whole()

    def whole(self) -> bool:
        """False where a tensor, a module or its `forward` was exchanged for another one."""
        if any(
            table.get("forward") is not forward and _forward_of(module) is not forward
            for module, table, forward in self._forwards
        ):
            return False
        return all(
            len(table) == len(values) and all(map(is_, table.values(), values))
            for tables in (self._tables, self._made_of)
            for table, values in tables
        ) and all(table.get(name) is tensor for table, name, tensor in self._named)

    def covers(self, other: Content) -> bool:
        """Whether all that another one is made of is looked after here."""
        mine = {id(tensor) for tensor in self._tensors}
        forwards = {module: forward for module, _, forward in self._forwards}
        if any(forwards.get(module) is not forward for module, _, forward in other._forwards):
            return False
        return set(other._inner) <= set(self._inner) and all(
            id(tensor) in mine for tensor in other._tensors
        )

    def changed(self, *, all_bytes: bool = False) -> bool:
        """Whether any tensor or attribute isn't what it was at the last question.

        Args:
            all_bytes: compare the bytes of all, instead of those of which torch says that they
                were written: it isn't told of writes through `.data`.
        """
        changed = self._attributes_changed()
        versions = list(map(_VERSION, self._versioned))
        if not all_bytes and versions == self._versions:
            return changed
        found = zip(self._counted, versions, self._versions)
        written = [position for position, now, before in found if now != before]
        if all_bytes:
            written = list(range(len(self._tensors)))
        self._versions = versions
        for position, digest in zip(written, _digests([self._tensors[p] for p in written])):
            changed = changed or digest != self._digests[position]
            self._digests[position] = digest
        return changed

    def _attributes_changed(self) -> bool:
        for owner, kept, size, absent in self._attributes:
            try:
                same = kept.items() <= owner.items() and owner.keys().isdisjoint(absent)
                if same and (size is None or len(owner) - ("forward" in owner) == size):
                    continue
            except Exception:  # arrays and tensors have no truth value
                pass
            self._attributes = list(self._read())
            self._generation += 1
            return True
        return False

    @property
    def name(self) -> bytes:
        """Of what it is made of now; the same again where all tensors are what they were."""
        return b"|".join((*self._digests, str(self._generation).encode()))

    def _read(self) -> Iterator[tuple[dict[str, Any], dict[str, Any], int | None, frozenset[str]]]:
        """Attributes of the modules, and of what they hold, such as a config."""
        seen: set[int] = set()
        for module in self._inner:
            yield from _kept(vars(module), None, seen)
        for module in self._around:
            kind: Any = type(module)
            yield from _kept(vars(module), names_read(kind), seen)


def _forward_of(module: nn.Module) -> Any:
    """The `forward` that somebody has set on a module itself, if it isn't that of its class."""
    own = vars(module).get("forward")
    if not isinstance(own, Entry):
        return own
    return None if getattr(own.original, "__self__", None) is module else own.original


def _kept(owner: dict[str, Any], names: frozenset[str] | None, seen: set[int]) -> Iterator[Any]:
    kept: dict[str, Any] = {}
    for name, value in owner.items():
        if name in _TABLES or (names is not None and name not in names):
            continue
        # a container is compared with a copy of what is in it
        kept[name] = value.copy() if isinstance(value, (list, dict, set)) else value
        if isinstance(value, (nn.Module, Tensor, *_ATOMS, *_CONTAINERS)) or callable(value):
            continue
        held = getattr(value, "__dict__", None)
        if isinstance(held, dict) and held and id(value) not in seen and len(held) < 1000:
            seen.add(id(value))
            copies = {
                key: one.copy() if isinstance(one, (list, dict, set)) else one
                for key, one in held.items()
            }
            yield held, copies, len(held) - ("forward" in held), frozenset()
    if names is None:
        yield owner, kept, len(owner) - ("forward" in owner), frozenset()
    else:  # what stands in the class may be set on the module later
        yield owner, kept, None, names - kept.keys() - _TABLES


def version_of(tensor: Tensor) -> int:
    """Of writes; those to tensors made in inference mode aren't counted."""
    return -1 if tensor.is_inference() else tensor._version


def _digests(tensors: Sequence[Tensor]) -> list[bytes]:
    if tensors and all(accelerator.served(tensor.device) for tensor in tensors):
        flat = [dense(tensor, lambda: "a frozen tensor", here=False) for tensor in tensors]
        if all(isinstance(one, Tensor) for one in flat):
            return accelerator.reduced([one for one in flat if isinstance(one, Tensor)])
    return digests(tensors)
