"""What is random and frozen: it will never learn."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import Tensor

from lightning_freeze.checkpoints.origin.marks import least_writes
from lightning_freeze.checkpoints.origin.states import NEW, NEW_OR_WRITTEN, RENEWED, Origins
from lightning_freeze.engine.sharded import is_sharded
from lightning_freeze.model.index import ModelIndex, some

# in-place writes that an init function may need; training makes as many steps within a moment
_FEW = 8


def never_learns(index: ModelIndex, origins: Origins, spared: Collection[str] = ()) -> list[str]:
    """Notes on frozen tensors that hold what an init function wrote, and nothing else.

    Args:
        index: the model.
        origins: where its tensors come from.
        spared: names that something will unfreeze.
    """
    frozen = [n for n, p in index.parameters.items() if not p.requires_grad and n not in spared]
    new = untouched(index, origins, frozen)
    renewed = [name for name in frozen if origins[name].state == RENEWED]
    kinds = ((new, "newly initialised"), (renewed, "re-initialised"))
    return [_note(names, how) for names, how in kinds if names]


def untouched(index: ModelIndex, origins: Origins, names: Collection[str]) -> list[str]:
    """Those of some tensors that were newly initialised, and surely not written since.

    A head that is frozen by mistake stays random, and nothing fails. A tensor counts only where
    its module shows that it was neither trained nor loaded: one of its new tensors was written
    once, or its bias is all zeros, as init functions leave it.
    """
    states = {name: origins[name].state for name in index.parameters}
    fresh = {n: p for n, p in index.parameters.items() if states[n] in (NEW, NEW_OR_WRITTEN)}
    if fresh.keys().isdisjoint(names):
        return []
    modules = _untouched(fresh)
    return [name for name in names if name in fresh and name.rpartition(".")[0] in modules]


def _untouched(fresh: Mapping[str, Tensor]) -> frozenset[str]:
    """Paths of modules whose new tensors are as they were initialised."""
    writes = least_writes(fresh.items())
    found = {path for path, least in writes.items() if least == 1}
    for name, tensor in fresh.items():
        path, _, last = name.rpartition(".")
        readable = tensor.device.type != "meta" and not is_sharded(tensor)
        if last == "bias" and readable and writes[path] <= _FEW and not bool(tensor.any()):
            found.add(path)
    return frozenset(found)


def _note(names: Sequence[str], how: str) -> str:
    if len(names) == 1:
        return (
            f"{names[0]} is {how} and frozen: it will never learn. Unfreeze it, or load its values."
        )
    return (
        f"{some(names)} are {how} and frozen: they will never learn. Unfreeze them, or load their "
        "values."
    )
