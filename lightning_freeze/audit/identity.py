"""Are the tensors still the same objects: ties that split, parameters that were replaced."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torch.nn.utils import parametrize

from lightning_freeze.audit.findings import Seen
from lightning_freeze.names import ModelIndex, some


def split_ties(before: ModelIndex, now: ModelIndex) -> list[Seen]:
    """Tensors that had several names and are several tensors now."""
    found = []
    for first, others in before.aliases.items():
        group = [name for name in (first, *others) if name in now.canonical]
        if len({now.canonical[name] for name in group}) < 2:
            continue
        tensor = before.parameters[first]
        fresh = [n for n in group if now.parameters[now.canonical[n]] is not tensor]
        found.append(
            Seen(
                "tie-split",
                tuple(group),
                f"{' and '.join(group)} were one tensor and are several now",
                f"A new Parameter was assigned under {some(fresh)}; the old one is what "
                "optimizers hold."
                if len(fresh) < len(group)
                else "New Parameters were assigned under all of its names.",
                "Assign it under all of them, or call the model's `tie_weights()`.",
            )
        )
    return found


def overlapping(shared: Mapping[str, str], held: frozenset[str]) -> list[Seen]:
    """Frozen tensors in the memory of one that trains.

    Args:
        shared: name of a frozen tensor -> name of a trainable one in the same memory.
        held: names of what an optimizer holds.
    """
    return [
        Seen(
            "tie-split",
            (frozen, partner),
            f"{frozen} is frozen, but it shares its memory with {partner}, which trains",
            "They are two Parameters over one memory, so that freezing one doesn't freeze the "
            "other.",
            f"Freeze `{partner}`, too; or tie them as one Parameter (`a.weight = b.weight`); or "
            "give each its own memory (`.clone()`).",
        )
        for frozen, partner in shared.items()
        if partner in held
    ]


def replaced(before: ModelIndex, now: ModelIndex) -> list[Seen]:
    """Parameters that are other objects than at the fit's start, or gone: one finding a cause."""
    tied = {name for first, others in before.aliases.items() for name in (first, *others)}
    groups: dict[tuple[str, str], list[str]] = {}
    for name, parameter in before.parameters.items():
        current = now.parameters.get(now.canonical.get(name, name))
        if name in tied or current is parameter:
            continue
        why = _why_replaced(name, parameter, current, before, now)
        groups.setdefault(why, []).append(name)
    return [
        Seen(
            "parameter-replaced",
            tuple(names),
            f"{some(names)} is another Parameter object than at fit start, or gone",
            *why,
        )
        for why, names in groups.items()
    ]


def _why_replaced(
    name: str,
    parameter: nn.Parameter,
    current: nn.Parameter | None,
    before: ModelIndex,
    now: ModelIndex,
) -> tuple[str, str]:
    held = "optimizers still hold the old one"
    elsewhere = now.name_of.get(id(parameter))
    path = before.owner(name)
    old, new = before.modules[path], now.modules.get(path)
    if elsewhere is not None:
        return (
            f"It stands under another name now, such as `{elsewhere}`: its module was wrapped, or "
            "a parametrization was put on it.",
            "Wrap or parametrize modules before the fit.",
        )
    key = name.rpartition(".")[2]
    if current is None and new is not None and parametrize.is_parametrized(new, key):
        originals = [n for n in now.parameters if n.startswith(f"{path}.parametrizations.{key}.")]
        return (
            "A parametrization was put on it: it is computed from others now, such as "
            f"`{originals[0]}`; {held}.",
            "Parametrize modules before the fit.",
        )
    if current is None and new is None:
        return (
            f"`{path}` isn't in the model any more; {held}.",
            "Change the model before the fit.",
        )
    if current is None:
        return (f"It was deleted; {held}.", "Change the model before the fit.")
    if new is not old:
        became = type(new).__name__
        size = "" if current.shape == parameter.shape else _resized(parameter, current)
        return (
            f"Its module was replaced by another {became}{size}; {held}.",
            "Replace, convert or resize modules before the fit (`setup`, `configure_model`).",
        )
    if current.shape != parameter.shape:
        return (
            f"It was assigned anew{_resized(parameter, current)}; {held}.",
            "Resize before the fit (`setup`, `configure_model`).",
        )
    flags = ""
    if current.requires_grad != parameter.requires_grad:
        flags = f", with `requires_grad={current.requires_grad}`"
    return (
        f"It was assigned anew{flags}, as `load_state_dict(assign=True)` does, too; {held}.",
        "Write into it (`copy_`, `load_state_dict`) instead of assigning, or do it before the fit.",
    )


def _resized(old: nn.Parameter, new: nn.Parameter) -> str:
    return f" of another shape, {tuple(new.shape)} instead of {tuple(old.shape)}"
