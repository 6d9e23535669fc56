"""How each tensor of a model got its values.

A transformers model tells by itself: `from_pretrained` sets `_is_hf_initialized` on each tensor
that it takes from a checkpoint, and what was missing there has no such mark. A tensor that was
loaded has never been written in place, so its version is 0. Versions miss some writes (a fused
optimizer's, those through `.data`): they tell that something was written, never that nothing was.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from lightning_freeze.engine.reinitialized import is_renewed, is_still_fresh
from lightning_freeze.engine.sharded import is_sharded
from lightning_freeze.errors import ArgumentError, VerifyError
from lightning_freeze.model.index import ModelIndex, some

LOADED = "loaded"  # the checkpoint's bytes, or by `from_pretrained`'s marks
CHANGED = "changed since"  # in the checkpoint, but with other bytes
WRITTEN = "written since"  # loaded, and something wrote to it later
NEW = "new"  # missing in the checkpoint: newly initialised
RENEWED = "re-initialised"
IN_CHECKPOINT = "in the checkpoint"  # name and shape fit; there are no bytes to compare
OTHER_SHAPE = "other shape"  # the checkpoint has it in another shape
UNKNOWN = "unknown"

_MARK = "_is_hf_initialized"
_BY_MARKS = (
    "Origin: by the marks that `from_pretrained` left. With `origin=FILE` it is compared to the "
    "bit."
)
# in-place writes that an init function may need; training makes as many steps within a moment
_FEW = 8


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


def find_origins(index: ModelIndex, given: Any = None) -> Origins:
    """Tell where each tensor's values come from.

    Args:
        index: the model; it isn't changed.
        given: what it was loaded from, as `summarize` takes it; what the model itself tells where
            None.

    Raises:
        ArgumentError: `given` is something else, or names a part that isn't there.
        VerifyError: a checkpoint can't be read, or is of another model.

    Example:
        >>> from torch import nn
        >>> model = nn.Linear(2, 1)
        >>> found = find_origins(ModelIndex.of(model), {"weight": model.weight.detach()})
        >>> found["weight"].state, found["bias"].state
        ('loaded', 'new')
    """
    tensors: dict[str, Tensor] = {n: p for n, p in index.parameters.items() if not is_lazy(p)}
    canonical = {name: first for name, first in index.canonical.items() if first in tensors}
    for path, module in index.modules.items():
        for key, buffer in module._buffers.items():
            name = f"{path}.{key}" if path else key
            if (
                buffer is not None
                and key not in module._non_persistent_buffers_set
                and not is_lazy(buffer)
            ):
                tensors[name] = buffer
                canonical[name] = name
    marks = _by_marks(index, tensors)
    found: dict[str, Origin] = {}
    unused: list[str] = []
    notes = [_BY_MARKS] if marks and given is None else []
    for at, source in _sources(given, canonical):
        inside = {n: f for n, f in canonical.items() if not at or n.startswith(f"{at}.")}
        if not inside:
            tops = dict.fromkeys(name.partition(".")[0] for name in canonical)
            raise ArgumentError(
                f"`origin` names `{at}`, but nothing of the model is there. Its parts are "
                f"{some([f'`{top}`' for top in tops], most=8)}."
            )
        new, rest, note = _against(source, _spellings(index, inside, tensors), tensors, marks)
        found.update(new)
        unused += rest
        notes.append(note)
    for name, tensor in tensors.items():
        origin = found.get(name) or marks.get(name) or Origin()
        if is_renewed(tensor):
            # unless the bytes that it has now are those of a checkpoint
            compared = origin.state == LOADED and origin.key is not None
            if is_still_fresh(tensor):
                origin = Origin(RENEWED, origin.key)
            elif not compared:
                origin = Origin(RENEWED, origin.key, CHANGED)
        found[name] = origin
    return Origins(
        {name: found.get(name, Origin()) for name in index.parameters},
        {name: found[name] for name in tensors if name not in index.parameters},
        tuple(dict.fromkeys(unused)),
        tuple(notes),
    )


def _sources(given: Any, names: Collection[str]) -> list[tuple[str, Any]]:
    """(path in the model or "", path of a file or state dict), for each one."""
    if given is None:
        return []
    if isinstance(given, (str, Path)):
        return [("", given)]
    if isinstance(given, Mapping) and given:
        by_part = all(
            isinstance(source, (str, Path))
            or (isinstance(source, Mapping) and any(n.startswith(f"{part}.") for n in names))
            for part, source in given.items()
        )
        return [(str(p).strip("."), s) for p, s in given.items()] if by_part else [("", given)]
    what = "an empty dict" if isinstance(given, Mapping) else f"of type {type(given).__name__}"
    raise ArgumentError(
        f"`origin` is {what}. Give a checkpoint (a file, a folder or a state dict), or a dict from "
        'a part of the model to one: `{"encoder": "weights.pt"}`.'
    )


def _spellings(
    index: ModelIndex, inside: Mapping[str, str], tensors: Mapping[str, Tensor]
) -> list[dict[str, str]]:
    """Name in a checkpoint -> canonical name: as the model calls it, and as transformers saves it.

    It renames, stacks and splits when it loads, and undoes that when it saves. What it renames can
    be found in a checkpoint; what it stacks or splits can't.
    """
    from lightning_freeze.checkpoints.verify.matching import tidy

    spellings = [{short: inside[name] for name, short in tidy(inside).items()}]
    library = sys.modules.get("transformers.core_model_loading")
    revert = getattr(library, "revert_weight_conversion", None)
    if revert is None:
        return spellings
    saved = dict(inside)
    for path in _libraries(index):
        start = f"{path}." if path else ""
        empty = {
            name.removeprefix(start): torch.empty_like(tensors[first], device="meta")
            for name, first in inside.items()
            if name.startswith(start)
        }
        try:
            called = {id(t): key for key, t in revert(index.modules[path], dict(empty)).items()}
        except Exception:  # another release of transformers, or a part of a model
            continue
        for name, tensor in empty.items():
            first = saved.pop(start + name)
            if id(tensor) in called:
                saved[start + called[id(tensor)]] = first
    if saved.keys() != inside.keys():
        spellings.append({short: saved[name] for name, short in tidy(saved).items()})
    return spellings


def _against(
    source: Any,
    spellings: Sequence[Mapping[str, str]],
    tensors: Mapping[str, Tensor],
    marks: Mapping[str, Origin],
) -> tuple[dict[str, Origin], list[str], str]:
    """Compare a part of a model with a checkpoint: origins, keys that aren't used, and a note."""
    # what reads checkpoints isn't loaded as long as none is given
    from lightning_freeze.checkpoints.verify.files import open_weights, weights_in
    from lightning_freeze.checkpoints.verify.matching import escaped

    weights = open_weights(source) if isinstance(source, (str, Path)) else weights_in(source)
    fits, error = [], None
    for spelling in spellings:
        try:
            at = _match(weights, {n: tuple(tensors[f].shape) for n, f in spelling.items()})
            fits.append((sum(new in spelling for new in at.names.values()), at, spelling))
        except VerifyError as wrong:
            error = error or wrong
    if not fits:
        assert error is not None
        raise error
    _, at, plain = max(fits, key=lambda fit: fit[0])
    found: dict[str, Origin] = {}
    unused = []
    for key, name in at.names.items():
        if name not in plain:
            unused.append(key)
        elif found.get(plain[name], Origin()).state != LOADED:
            found[plain[name]] = _compare(weights, key, tensors[plain[name]])
    compared = any(origin.state in (LOADED, CHANGED) for origin in found.values())
    how = "compared to the bit with" if compared else "by name and shape, against"
    note = f"Origin: {how} {escaped(weights.path)} ({weights.kind}"
    note += f", {len(weights.specs)} tensor{'s' if len(weights.specs) != 1 else ''})."
    missing = [first for first in dict.fromkeys(spellings[0].values()) if first not in found]
    elsewhere = [f for f in missing if marks.get(f, Origin()).state in (LOADED, WRITTEN)]
    found |= {first: Origin(NEW) for first in missing}
    found |= {first: Origin(marks[first].state, None, "not compared") for first in elsewhere}
    if elsewhere:
        # transformers renames, splits and stacks: which keys it used can't be told from names
        unused = []
        note += (
            f" It has no tensor by the name of {some(elsewhere, most=1)}, which `from_pretrained` "
            "loaded all the same; those are told by its marks."
        )
    return found, unused, note


def _match(weights: Any, shapes: Mapping[str, tuple[int, ...]]) -> Any:
    from lightning_freeze.checkpoints.verify.matching import SeveralPlacesError, match, quoted

    try:
        return match(weights.shapes, shapes, sides=(quoted(weights.path), "the model"))
    except SeveralPlacesError as error:
        raise VerifyError(
            f"{str(error).partition(' Say which')[0]} Say which one you mean by its path in the "
            f'model: `origin={{"{error.place}": {weights.path!r}}}`.'
        ) from None


def _compare(weights: Any, key: str, tensor: Tensor) -> Origin:
    from lightning_freeze.checkpoints.verify.compare import converted, identical
    from lightning_freeze.checkpoints.verify.matching import size

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


def _by_marks(index: ModelIndex, tensors: Mapping[str, Tensor]) -> dict[str, Origin]:
    """Name -> origin, for the tensors of transformers models that `from_pretrained` loaded.

    A model that was made from a config, or copied, has no mark: nothing is known of it.
    """
    found: dict[str, Origin] = {}
    for path in _libraries(index):
        inside = {n: t for n, t in tensors.items() if not path or n.startswith(f"{path}.")}
        found.update(_of_one(inside))
    return found


def _libraries(index: ModelIndex) -> list[str]:
    """Paths of the outermost `PreTrainedModel`s; transformers needn't be installed to ask."""
    paths: list[str] = []
    for path, module in index.modules.items():
        ours = hasattr(type(module), "base_model_prefix") and hasattr(module, "_init_weights")
        if ours and not any(not outer or path.startswith(f"{outer}.") for outer in paths):
            paths.append(path)
    return paths


def _of_one(tensors: Mapping[str, Tensor]) -> dict[str, Origin]:
    loaded = {name: t for name, t in tensors.items() if getattr(t, _MARK, False)}
    if not loaded:
        return {}
    touched = any(_versions(t) > 0 and not is_renewed(t) for t in loaded.values())
    writes = _least_writes((n, t) for n, t in tensors.items() if n not in loaded)
    found: dict[str, Origin] = {}
    for name, tensor in tensors.items():
        if name in loaded:
            found[name] = Origin(WRITTEN if _versions(tensor) > 0 else LOADED)
        elif _versions(tensor) > 0 and (writes[name.rpartition(".")[0]] == 1 or not touched):
            # an init function writes some tensors several times, but hardly a whole module
            found[name] = Origin(NEW)
    return found


def _versions(tensor: Tensor) -> int:
    """How often torch saw an in-place write to a tensor, -1 where it doesn't count."""
    try:
        return tensor._version
    except RuntimeError:  # made in inference mode
        return -1


def _least_writes(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, int]:
    """Path of a module -> the smallest version among its own tensors: one is one init's."""
    least: dict[str, int] = {}
    for name, tensor in tensors:
        path = name.rpartition(".")[0]
        least[path] = min(_versions(tensor), least.get(path, _versions(tensor)))
    return least


def never_learns(index: ModelIndex, origins: Origins, spared: Collection[str] = ()) -> list[str]:
    """Notes on frozen tensors that hold what an init function wrote, and nothing else.

    Args:
        index: the model.
        origins: where its tensors come from.
        spared: names that something will unfreeze.
    """
    frozen = [n for n, p in index.parameters.items() if not p.requires_grad and n not in spared]
    new = untouched(index, origins, frozen)
    renewed = [name for name in frozen if origins[name] == Origin(RENEWED, origins[name].key)]
    kinds = ((new, "newly initialised"), (renewed, "re-initialised"))
    return [_note(names, how) for names, how in kinds if names]


def untouched(index: ModelIndex, origins: Origins, names: Collection[str]) -> list[str]:
    """Those of some tensors that were newly initialised, and surely not written since.

    A head that is frozen by mistake stays random, and nothing fails. A tensor counts only where
    its module shows that it was neither trained nor loaded: one of its new tensors was written
    once, or its bias is all zeros, as init functions leave it.
    """
    fresh = {n: p for n, p in index.parameters.items() if origins[n].state == NEW}
    if fresh.keys().isdisjoint(names):
        return []
    writes = _least_writes(fresh.items())
    modules = {path for path, least in writes.items() if least == 1}
    for name, tensor in fresh.items():
        path, _, last = name.rpartition(".")
        readable = tensor.device.type != "meta" and not is_sharded(tensor)
        if last == "bias" and readable and writes[path] <= _FEW and not bool(tensor.any()):
            modules.add(path)
    return [name for name in names if name in fresh and name.rpartition(".")[0] in modules]


def _note(names: Sequence[str], how: str) -> str:
    are, they, them = ("is", "it", "it") if len(names) == 1 else ("are", "they", "them")
    values = "its" if len(names) == 1 else "their"
    return (
        f"{some(names)} {are} {how} and frozen: {they} will never learn. Unfreeze {them}, or load "
        f"{values} values."
    )
