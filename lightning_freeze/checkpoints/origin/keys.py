"""Keys of a checkpoint -> names of a model."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_freeze.checkpoints.origin.tensors import Stored
from lightning_freeze.checkpoints.verify.align import SeveralPlacesError, align
from lightning_freeze.checkpoints.verify.weights import Weights
from lightning_freeze.errors import VerifyError

# what TensorFlow calls the weight and bias of a LayerNorm; BERT's first checkpoints have them
_LEGACY = {"gamma": "weight", "beta": "bias"}


@dataclass(frozen=True)
class Keys:
    """How the keys of a checkpoint correspond to names of a model.

    Attributes:
        names: key -> names of the model; a key that is in none of them isn't used.
        merged: keys whose tensor transformers changes when it loads it (splits, stacks).
    """

    names: Mapping[str, tuple[str, ...]]
    merged: frozenset[str] = frozenset()


def match(stored: Stored, weights: Weights, at: str | None = None) -> Keys:
    """Find the keys' names: by transformers' own rules for its models, or by one prefix per side.

    Args:
        stored: the model.
        weights: the checkpoint.
        at: path of the module that the checkpoint belongs to; the best place where None.

    Raises:
        VerifyError: it is a checkpoint of another model, or fits at several places.
    """
    model = {
        name: tuple(stored.tensors[first].shape)
        for name, first in stored.plain.items()
        if not at or name.startswith(f"{at}.")
    }
    there = {key: spec.shape for key, spec in weights.specs.items()}
    if not model:
        raise VerifyError(f"The model holds no tensors to compare `{weights.path}` with.")
    theirs = _by_transformers(stored, list(there), at)
    try:
        ours = _by_alignment(there, model, weights.path)
    except VerifyError:
        need = (min(len(there), len(model)) + 1) // 2
        if theirs is None or _fitting(theirs, there, model) < need:
            raise
        return theirs
    if theirs is None or _fitting(ours, there, model) > _fitting(theirs, there, model):
        return ours
    return theirs


def _fitting(keys: Keys, there: Mapping[str, Any], model: Mapping[str, Any]) -> int:
    return sum(
        key in keys.merged or model.get(name) == there[key]
        for key, names in keys.names.items()
        for name in names[:1]
    )


def _by_alignment(there: Mapping[str, Any], model: Mapping[str, Any], path: str) -> Keys:
    sides = (f"`{path}`", "the model")
    spellings = [{key: key for key in there}]
    legacy = {key: _modern(key) for key in there}
    if len(set(legacy.values())) == len(there) and legacy != spellings[0]:
        spellings.append(legacy)
    found: list[Keys] = []
    errors: list[VerifyError] = []
    for spelled in spellings:
        try:
            aligned = align({spelled[k]: shape for k, shape in there.items()}, model, sides=sides)
        except SeveralPlacesError as error:
            told = str(error).partition(" Say which")[0]
            raise VerifyError(
                f"{told} Say which one you mean by its path in the model: "
                f'`origin={{"{error.place}": "{path}"}}`.'
            ) from None
        except VerifyError as error:
            errors.append(error)
            continue
        names = {key: aligned.names[spelled[key]] for key in there}
        found.append(Keys({key: (name,) for key, name in names.items() if name in model}))
    if not found:
        raise errors[0]
    return max(found, key=lambda keys: _fitting(keys, there, model))


def _modern(key: str) -> str:
    parent, _, last = key.rpartition(".")
    return f"{parent}.{_LEGACY[last]}" if parent and last in _LEGACY else key


def _by_transformers(stored: Stored, keys: list[str], at: str | None) -> Keys | None:
    """What transformers makes of the keys when it loads them, if there is one model of its."""
    library: Any = sys.modules.get("transformers.core_model_loading")
    mapping: Any = sys.modules.get("transformers.conversion_mapping")
    paths = [path for path in stored.libraries if not at or f"{path}.".startswith(f"{at}.")]
    if library is None or mapping is None or len(paths) != 1:
        return None
    path = paths[0]
    start = f"{path}." if path else ""
    module: Any = stored.index.modules[path]
    inside = {n.removeprefix(start): True for n in stored.plain if n.startswith(start)}
    try:
        rules = mapping.get_model_conversion_mapping(module)
        converters = [rule for rule in rules if isinstance(rule, library.WeightConverter)]
        renamings = [rule for rule in rules if isinstance(rule, library.WeightRenaming)]
        by_pattern = {p: rule for rule in converters for p in rule.source_patterns}
        names: dict[str, tuple[str, ...]] = {}
        merged = set()
        for key in keys:
            for raw in dict.fromkeys([key, key.removeprefix(start)]):
                new, pattern = library.rename_source_key(
                    raw, renamings, converters, module.base_model_prefix, inside
                )
                if new not in inside and raw in inside:
                    new, pattern = raw, None
                if new not in inside:
                    continue
                targets = [new]
                if pattern is not None:
                    first, *others = by_pattern[pattern].target_patterns
                    targets += [new.replace(first, other) for other in others]
                    merged.add(key)
                names[key] = tuple(start + name for name in targets if name in inside)
                break
    except (AttributeError, TypeError, KeyError, ValueError):  # another release of transformers
        return None
    return Keys(names, frozenset(merged))


def source_name(given: Any) -> str:
    """What messages and notes call a checkpoint."""
    return str(given) if isinstance(given, (str, Path)) else "the state dict"
