"""What can be said of where a tensor's values come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

LOADED = "loaded"  # the checkpoint's bytes, or loaded by the word of whoever loaded it
CHANGED = "changed since"  # in the checkpoint, but with other bytes
WRITTEN = "written since"  # loaded, and something wrote to it later
NEW = "new"  # missing in the checkpoint: newly initialised
NEW_OR_WRITTEN = "new or written since"
RENEWED = "re-initialised"
RENEWED_CHANGED = "re-initialised and changed since"
OTHER_SHAPE = "other shape"  # the checkpoint has it in another shape
IN_CHECKPOINT = "in the checkpoint"  # name and shape fit; there are no bytes to compare
ELSEWHERE = "loaded elsewhere"  # not in this checkpoint, but `from_pretrained` loaded it
UNKNOWN = "unknown"

# of several names or checkpoints, the one that says most: equal bytes are a proof
_BEST_FIRST = (LOADED, CHANGED, WRITTEN, IN_CHECKPOINT, OTHER_SHAPE, ELSEWHERE, NEW, NEW_OR_WRITTEN)


@dataclass(frozen=True)
class Origin:
    """Where the values of one tensor come from.

    Attributes:
        state: one of the constants of this module.
        key: its name in the checkpoint, where there is one to look into.
        detail: what else there is to say, such as "from bfloat16".
    """

    state: str = UNKNOWN
    key: str | None = None
    detail: str = ""


@dataclass(frozen=True)
class Origins:
    """Where the tensors of a model come from.

    Attributes:
        parameters: canonical name -> origin.
        buffers: name -> origin, for those that a state dict holds.
        unused: keys of the checkpoints that the model has no tensor for.
        notes: sentences on how it is known.
    """

    parameters: Mapping[str, Origin] = field(default_factory=dict)
    buffers: Mapping[str, Origin] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> Origin:
        return self.parameters.get(name, Origin())


def better(one: Origin | None, two: Origin) -> Origin:
    """The one of two that says more; the later one if they say the same."""
    return two if one is None or _rank(two) <= _rank(one) else one


def _rank(origin: Origin) -> int:
    return _BEST_FIRST.index(origin.state) if origin.state in _BEST_FIRST else len(_BEST_FIRST)
