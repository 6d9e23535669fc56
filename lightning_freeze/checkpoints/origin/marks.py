"""What a transformers model itself tells of its loading.

`from_pretrained` sets `_is_hf_initialized` on each tensor that it takes from a checkpoint, so that
no init function overwrites it; what was missing there has no such mark. A tensor that was loaded
has never been written in place, so its version is 0; an optimizer's step or `load_state_dict` write
in place. Versions miss some writes (a fused optimizer's, those through `.data`): they tell that
something was written, never that nothing was.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from lightning_freeze.checkpoints.origin.states import LOADED, NEW, NEW_OR_WRITTEN, WRITTEN, Origin
from lightning_freeze.checkpoints.origin.tensors import Stored, versions
from lightning_freeze.engine.reinitialized import is_renewed

_FLAG = "_is_hf_initialized"


def by_marks(stored: Stored) -> dict[str, Origin]:
    """Name -> origin, for the tensors of transformers models that `from_pretrained` loaded.

    A model that was made from a config, or copied, has no mark: nothing is known of it.
    """
    found: dict[str, Origin] = {}
    for path in stored.libraries:
        found.update(_of_one({name: stored.tensors[name] for name in stored.under(path)}))
    return found


def is_marked(tensor: Tensor) -> bool:
    """Whether `from_pretrained` loaded it, or what it is tied to."""
    return bool(getattr(tensor, _FLAG, False))


def _of_one(tensors: Mapping[str, Tensor]) -> dict[str, Origin]:
    loaded = {name: tensor for name, tensor in tensors.items() if is_marked(tensor)}
    if not loaded:
        return {}
    touched = any(versions(t) > 0 and not is_renewed(t) for t in loaded.values())
    writes = least_writes((n, t) for n, t in tensors.items() if n not in loaded)
    found: dict[str, Origin] = {}
    for name, tensor in tensors.items():
        if name in loaded:
            found[name] = Origin(WRITTEN if versions(tensor) > 0 else LOADED)
        elif versions(tensor) > 0:
            # an init function writes some tensors several times, but hardly a whole module
            surely = writes[name.rpartition(".")[0]] == 1 or not touched
            found[name] = Origin(NEW if surely else NEW_OR_WRITTEN)
    return found


def least_writes(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, int]:
    """Path of a module -> the smallest version among its own tensors: one is one init's."""
    least: dict[str, int] = {}
    for name, tensor in tensors:
        path = name.rpartition(".")[0]
        least[path] = min(versions(tensor), least.get(path, versions(tensor)))
    return least
