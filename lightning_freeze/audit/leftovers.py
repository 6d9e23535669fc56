"""What freezing should have cleared away: gradients and optimizer state of frozen tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import Tensor
from torch.optim import Optimizer

from lightning_freeze.audit.findings import Seen
from lightning_freeze.names import some

Named = Iterable[tuple[str, Tensor]]


def left_over(frozen: Callable[[], Named], optimizers: Sequence[Optimizer]) -> list[Seen]:
    """Gradients of frozen tensors, and momentum that an optimizer still holds them with.

    Args:
        frozen: gives name and parameter of what was declared frozen.
        optimizers: of the loop.
    """
    held = {
        id(parameter): type(optimizer).__name__
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
        if not parameter.requires_grad
    }
    seen = _gradients(frozen(), held)
    return seen + _states(frozen(), held, optimizers) if held else seen


def _gradients(frozen: Named, held: Mapping[int, str]) -> list[Seen]:
    groups: dict[tuple[str, str], list[str]] = {}
    for name, parameter in frozen:
        if parameter.grad is not None and not parameter.requires_grad:
            groups.setdefault(_why_gradient(parameter, held), []).append(name)
    return [
        Seen("stale-gradient", tuple(ns), f"{some(ns)} is frozen but has a gradient", *why)
        for why, ns in groups.items()
    ]


def _why_gradient(parameter: Tensor, held: Mapping[int, str]) -> tuple[str, str]:
    fix = "Set `.grad = None` when you freeze, as `lightning_freeze.freeze` does."
    holder = held.get(id(parameter))
    if holder and not parameter.grad.any():  # type: ignore[union-attr]
        return (
            f"It is all zeros: it was zeroed instead of dropped, and {holder}, which holds it, "
            "steps it all the same (weight decay, momentum).",
            fix,
        )
    if holder:
        return (
            f"It was frozen after a backward pass; {holder}, which holds it, steps it.",
            fix,
        )
    return (
        "It was frozen after a backward pass; no optimizer holds it, so no `zero_grad` clears it: "
        "it takes memory, and moves the weight as soon as one does.",
        fix,
    )


def _states(frozen: Named, held: Mapping[int, str], optimizers: Sequence[Optimizer]) -> list[Seen]:
    kept = [(name, parameter) for name, parameter in frozen if id(parameter) in held]
    found = []
    for optimizer in optimizers:
        names = [name for name, parameter in kept if optimizer.state.get(parameter)]
        if names:
            kind = type(optimizer).__name__
            found.append(
                Seen(
                    "stale-optimizer-state",
                    tuple(names),
                    f"{some(names)} is frozen but an optimizer holds it with momentum",
                    f"It trained before it was frozen, and stayed in the groups of {kind}.",
                    "Remove it from the group and from `optimizer.state`, as `FreezeBackbone` "
                    "does.",
                )
            )
    return found
