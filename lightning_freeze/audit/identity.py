"""Are the tensors still the same objects: ties that split, parameters that were replaced."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import nn
from torch.nn.utils import parametrize

from lightning_freeze.audit.findings import Seen
from lightning_freeze.model.index import ModelIndex, some


def untied(aliases: Mapping[str, tuple[str, ...]], now: ModelIndex) -> list[Seen]:
    """Ties that came apart while a fit was being set up.

    Args:
        aliases: name of a tensor -> its other names, in `setup`.
        now: the model when the fit starts.
    """
    found = []
    for first, others in aliases.items():
        group = [name for name in (first, *others) if name in now.canonical]
        if len({now.canonical[name] for name in group}) > 1:
            found.append(
                Seen(
                    "tie-split",
                    tuple(group),
                    f"{' and '.join(group)} were one tensor in `setup` and are several now",
                    "Building or sharding the model in `configure_model` parted them, as "
                    "`to_empty` and FSDP2 do.",
                    "Tie them again behind it, with the model's `tie_weights()`.",
                )
            )
    return found


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


def replaced(before: ModelIndex, now: ModelIndex, held: Collection[int] = ()) -> list[Seen]:
    """Parameters that are other objects than at the fit's start, or gone: one finding a cause.

    Args:
        before: the model at the fit's start.
        now: the model as it is.
        held: ids of what optimizers hold.
    """
    groups: dict[tuple[str, str], list[str]] = {}
    examples: dict[tuple[str, str], str] = {}
    for name, parameter in before.parameters.items():
        names = (name, *before.aliases.get(name, ()))
        if len({now.canonical[n] for n in names if n in now.canonical}) > 1:
            continue  # told of as a tie that split
        current = now.parameters.get(now.canonical.get(name, name))
        if current is parameter:
            continue
        template, fix, example = _why_replaced(name, parameter, current, before, now)
        if id(parameter) in held:
            template += "; optimizers still hold the old one"
        examples.setdefault((template, fix), example)
        groups.setdefault((template, fix), []).append(name)
    return [
        Seen(
            "parameter-replaced",
            tuple(names),
            f"{some(names)} is another Parameter object than at fit start, or gone",
            f"{template.format(examples[template, fix])}.",
            fix,
        )
        for (template, fix), names in groups.items()
    ]


def _why_replaced(
    name: str,
    parameter: nn.Parameter,
    current: nn.Parameter | None,
    before: ModelIndex,
    now: ModelIndex,
) -> tuple[str, str, str]:
    """What happened, with a gap for an example, how to mend it, and the example."""
    elsewhere = now.name_of.get(id(parameter))
    path, _, key = name.rpartition(".")
    old, new = before.modules[path], now.modules.get(path)
    if elsewhere is not None:
        return (
            "It stands under another name now, such as `{}`: its module was wrapped, or a "
            "parametrization was put on it",
            "Wrap or parametrize modules before the fit.",
            elsewhere,
        )
    if current is None and new is not None and parametrize.is_parametrized(new, key):
        return (
            "A parametrization was put on it: it is computed from others now, such as `{}`",
            "Parametrize modules before the fit.",
            next(n for n in now.parameters if n.startswith(f"{path}.parametrizations.{key}.")),
        )
    if current is None and new is None:
        return "`{}` isn't in the model any more", "Change the model before the fit.", path
    if current is None:
        return "It was deleted", "Change the model before the fit.", ""
    flags = ""
    if current.requires_grad != parameter.requires_grad:
        flags = f", with `requires_grad={current.requires_grad}`"
    if type(current) is not type(parameter):
        return (
            f"It was assigned anew as a {{}}{flags}, as tensor parallelism and FSDP do",
            "Distribute the model before the fit (`configure_model`).",
            type(current).__name__,
        )
    resized = current.shape != parameter.shape
    sizes = f"{tuple(current.shape)} instead of {tuple(parameter.shape)}" if resized else ""
    if new is not old:
        article = "another" if type(new) is type(old) else "a"
        return (
            f"Its module was replaced by {article} {type(new).__name__}"
            f"{' of another shape, {}' if resized else ''}",
            "Replace, convert or resize modules before the fit (`setup`, `configure_model`).",
            sizes,
        )
    if resized:
        return (
            "It was assigned anew of another shape, {}",
            "Resize before the fit (`setup`, `configure_model`).",
            sizes,
        )
    return (
        f"It was assigned anew{flags}, as `load_state_dict(assign=True)` does, too",
        "Write into it (`copy_`, `load_state_dict`) instead of assigning, or do it before the fit.",
        "",
    )
