"""A model against a checkpoint, tensor by tensor and to the bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from lightning_freeze.checkpoints.origin.keys import match
from lightning_freeze.checkpoints.origin.loading import size
from lightning_freeze.checkpoints.origin.marks import is_marked
from lightning_freeze.checkpoints.origin.states import (
    CHANGED,
    ELSEWHERE,
    IN_CHECKPOINT,
    LOADED,
    NEW,
    OTHER_SHAPE,
    Origin,
    better,
)
from lightning_freeze.checkpoints.origin.tensors import Stored
from lightning_freeze.checkpoints.verify.compare import converted, identical
from lightning_freeze.checkpoints.verify.weights import Weights
from lightning_freeze.engine.sharded import is_sharded
from lightning_freeze.model.index import some


@dataclass(frozen=True)
class Against:
    """What a comparison found.

    Attributes:
        origins: name -> origin.
        unused: keys that the model has no tensor for.
        notes: what was compared with what, and whether it was loaded at all.
    """

    origins: dict[str, Origin]
    unused: tuple[str, ...]
    notes: tuple[str, ...]


def against(stored: Stored, weights: Weights, at: str | None = None) -> Against:
    """Compare a model with a checkpoint.

    Args:
        stored: the model; it isn't changed, and may be on any device. What has no bytes to compare
            (on the meta device, or sharded) is told by name and shape.
        weights: the checkpoint; one tensor of it is read at a time.
        at: path of the module that it belongs to; found by the names where None.

    Raises:
        VerifyError: it is a checkpoint of another model, fits at several places, or a tensor of it
            can't be read.
    """
    keys = match(stored, weights, at)
    found: dict[str, Origin] = {}
    renamed: list[str] = []
    for key in weights.specs:
        for name in keys.names.get(key, ()):
            first = stored.plain[name]
            if key in keys.merged:
                origin = Origin(IN_CHECKPOINT, key, "converted by transformers")
            else:
                origin = _compare(weights, key, stored.tensors[first])
            if key.rpartition(".")[2] != name.rpartition(".")[2]:
                renamed.append(f"{key} = {name}")
            found[first] = better(found.get(first), origin)
    for name in stored.under(at or ""):
        if name not in found:
            found[name] = Origin(ELSEWHERE if is_marked(stored.tensors[name]) else NEW)
    bytes_read = any(origin.state in (LOADED, CHANGED) for origin in found.values())
    how = "compared to the bit with" if bytes_read else "by name and shape, against"
    note = f"Origin: {how} {weights.path} ({_kind(weights)})"
    if renamed:
        note += f"; it has other names for {len(renamed)} of them, such as {some(renamed, most=1)}"
    unused = tuple(key for key in weights.specs if not keys.names.get(key))
    notes = [f"{note}."]
    if _was_never_loaded(found, stored):
        notes.append(
            f"Nothing in the model has the bytes of {weights.path}, but what is constant: it was "
            "never loaded, or all of it was trained since."
        )
    return Against({n: found[n] for n in stored.tensors if n in found}, unused, tuple(notes))


def _was_never_loaded(found: Mapping[str, Origin], stored: Stored) -> bool:
    """Whether only what init functions write, such as a norm's ones, is as in the checkpoint."""
    same = [stored.tensors[name] for name, origin in found.items() if origin.state == LOADED]
    return any(origin.state == CHANGED for origin in found.values()) and not any(
        tensor.numel() > 1 and bool((tensor != tensor.flatten()[0]).any()) for tensor in same
    )


def _kind(weights: Weights) -> str:
    count = len(weights.specs)
    return f"{weights.kind}, {count} tensor{'' if count == 1 else 's'}"


def _compare(weights: Weights, key: str, tensor: Tensor) -> Origin:
    spec = weights.specs[key]
    if spec.shape != tuple(tensor.shape):
        return Origin(OTHER_SHAPE, key, f"{size(spec.shape)} in the checkpoint")
    if tensor.device.type == "meta" or is_sharded(tensor):
        return Origin(IN_CHECKPOINT, key)
    theirs, ours = weights.load(key), tensor.detach().cpu()
    if identical(theirs, ours):
        return Origin(LOADED, key)
    if converted(theirs, ours):
        return Origin(LOADED, key, f"from {spec.dtype}")
    return Origin(CHANGED, key)
