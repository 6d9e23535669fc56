"""All that can be said of where a model's tensors come from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_freeze.checkpoints.origin.loading import as_info, by_info
from lightning_freeze.checkpoints.origin.marks import by_marks
from lightning_freeze.checkpoints.origin.states import (
    LOADED,
    RENEWED,
    RENEWED_CHANGED,
    Origin,
    Origins,
    better,
)
from lightning_freeze.checkpoints.origin.tensors import Stored
from lightning_freeze.engine.reinitialized import is_renewed, is_still_fresh
from lightning_freeze.errors import ArgumentError
from lightning_freeze.model.index import ModelIndex, some

_BY_MARKS = (
    "Origin: by the marks that `from_pretrained` left. With `origin=FILE` it is compared to the "
    "bit."
)


def find_origins(index: ModelIndex, given: Any = None) -> Origins:
    """Tell where each tensor's values come from.

    Args:
        index: the model.
        given: what it was loaded from, as `summarize` takes it; what the model itself tells where
            None.

    Raises:
        ArgumentError: `given` is something else, or doesn't tell which part it is about.
        VerifyError: a checkpoint can't be read, or is of another model.

    Example:
        >>> from torch import nn
        >>> model = nn.Linear(2, 1)
        >>> found = find_origins(ModelIndex.of(model), {"weight": model.weight.detach()})
        >>> found["weight"].state, found["bias"].state
        ('loaded', 'new')
    """
    stored = Stored.of(index)
    found: dict[str, Origin] = {}
    unused: list[str] = []
    notes: list[str] = []
    sources = _sources(given, stored)
    for at, source in sources:
        if at is not None and not stored.under(at):
            tops = dict.fromkeys(name.partition(".")[0] for name in stored.canonical)
            raise ArgumentError(
                f"`origin` names `{at}`, but nothing of the model is there. Its parts are "
                f"{some([f'`{top}`' for top in tops], most=8)}."
            )
        info = as_info(source)
        if info is not None:
            new, rest = by_info(stored, info, at), info.unexpected
            notes.append("Origin: by what was reported when the model was loaded.")
        else:
            # what reads checkpoints isn't loaded as long as none is given
            from lightning_freeze.checkpoints.origin.against import against
            from lightning_freeze.checkpoints.verify.weights import open_weights, weights_in

            weights = open_weights(source) if _is_path(source) else weights_in(source)
            compared = against(stored, weights, at)
            new, rest = compared.origins, compared.unused
            notes += compared.notes
        for name, origin in new.items():
            found[name] = better(found.get(name), origin)
        unused += [key for key in rest if key not in unused]
    marks = by_marks(stored)
    if not sources and marks:
        notes.append(_BY_MARKS)
    for name, tensor in stored.tensors.items():
        origin = found.get(name) or marks.get(name) or Origin()
        if is_renewed(tensor):
            origin = _renewed(origin, tensor)
        found[name] = origin
    return Origins(
        {name: found.get(name, Origin()) for name in index.parameters},
        {name: found[name] for name in stored.tensors if name not in index.parameters},
        tuple(unused),
        tuple(notes),
    )


def _renewed(origin: Origin, tensor: Tensor) -> Origin:
    """What we re-initialised, unless the bytes that it has now come from a checkpoint."""
    if is_still_fresh(tensor):
        return Origin(RENEWED, origin.key)
    if origin.state == LOADED and origin.key is not None:
        return origin
    return Origin(RENEWED_CHANGED, origin.key)


def _is_path(source: Any) -> bool:
    return isinstance(source, (str, Path))


def _sources(given: Any, stored: Stored) -> list[tuple[str | None, Any]]:
    """(path in the model or None, loading info, path of a file, or state dict), for each one."""
    if given is None:
        return []
    if as_info(given) is None and isinstance(given, (list, tuple)):
        if not given:
            raise ArgumentError("`origin` is an empty list. Leave it out, or name a checkpoint.")
        return [pair for one in given for pair in _sources(one, stored)]
    if as_info(given) is not None or _is_path(given):
        return [(None, given)]
    if isinstance(given, Mapping) and given:
        if _is_by_part(given, stored):
            return [(str(part).strip("."), source) for part, source in given.items()]
        return [(None, given)]
    what = "an empty dict" if isinstance(given, Mapping) else f"of type {type(given).__name__}"
    raise ArgumentError(
        f"`origin` is {what}. Give a checkpoint (a file, a folder or a state dict), what "
        "`from_pretrained(..., output_loading_info=True)` or `load_state_dict` returned, a list of "
        'these, or a dict from a part of the model to one of these: `{"encoder": "weights.pt"}`.'
    )


def _is_by_part(given: Mapping[Any, Any], stored: Stored) -> bool:
    """Whether it maps parts of the model to checkpoints, and isn't one itself."""
    if all(_is_path(source) or as_info(source) for source in given.values()):
        return True
    return all(
        isinstance(part, str)
        and (_is_path(source) or isinstance(source, Mapping))
        and bool(stored.under(part.strip(".")))
        for part, source in given.items()
    )
