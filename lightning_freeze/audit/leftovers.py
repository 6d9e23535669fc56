"""What freezing should have cleared away: gradients and optimizer state of frozen tensors."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_freeze.audit.findings import Seen
from lightning_freeze.audit.numbers import all_zero
from lightning_freeze.model.index import some

Named = Iterable[tuple[str, Tensor]]


def left_over(
    frozen: Callable[[], Named],
    optimizers: Sequence[Optimizer],
    always: Collection[str] = (),
) -> list[Seen]:
    """Gradients of frozen tensors, and momentum that an optimizer still holds them with.

    Args:
        frozen: gives name and parameter of what was declared frozen.
        optimizers: of the loop.
        always: names of what has been frozen since the fit began.
    """
    held = {
        id(parameter): type(optimizer).__name__
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
        if not parameter.requires_grad
    }
    seen = _gradients(frozen(), held, always)
    return seen + _states(frozen(), held, optimizers, always) if held else seen


def _gradients(frozen: Named, held: Mapping[int, str], always: Collection[str]) -> list[Seen]:
    groups: dict[tuple[str, str], list[str]] = {}
    for name, parameter in frozen:
        if parameter.grad is not None and not parameter.requires_grad:
            why = _why_gradient(parameter, held, name in always)
            groups.setdefault(why, []).append(name)
    return [
        Seen("stale-gradient", tuple(ns), f"{some(ns)} is frozen but has a gradient", *why)
        for why, ns in groups.items()
    ]


def _why_gradient(parameter: Tensor, held: Mapping[int, str], always: bool) -> tuple[str, str]:
    fix = "Set `.grad = None` when you freeze, as `lightning_freeze.freeze` does."
    holder = held.get(id(parameter))
    if holder and parameter.grad is not None and all_zero(parameter.grad):
        return (
            f"It is all zeros: it was zeroed instead of dropped, and {holder}, which holds it, "
            "steps it all the same (weight decay, momentum).",
            fix,
        )
    came = "It was frozen after a backward pass"
    if always:
        came = "It has been frozen since the fit began, so some code gave it one"
    if holder:
        return (f"{came}; {holder}, which holds it, steps it.", fix)
    return (
        f"{came}; no optimizer holds it, so no `zero_grad` clears it: "
        "it takes memory, and moves the weight as soon as one does.",
        fix,
    )


def _states(
    frozen: Named,
    held: Mapping[int, str],
    optimizers: Sequence[Optimizer],
    always: Collection[str],
) -> list[Seen]:
    kept = [(name, parameter) for name, parameter in frozen if id(parameter) in held]
    found = []
    for optimizer in optimizers:
        kind = type(optimizer).__name__
        if kind == "LBFGS":  # what it keeps of all parameters stands under the first
            continue
        names = [n for n, parameter in kept if _has_stepped(optimizer.state.get(parameter))]
        since = [name for name in names if name in always]
        before = [name for name in names if name not in always]
        for ones, came in (
            (before, f"It trained before it was frozen, and stayed in the groups of {kind}."),
            (
                since,
                f"It has been frozen since the fit began, and is in the groups of {kind}: it was "
                "stepped on a gradient that some code gave it, or in an earlier fit.",
            ),
        ):
            if ones:
                found.append(
                    Seen(
                        "stale-optimizer-state",
                        tuple(ones),
                        f"{some(ones)} is frozen but an optimizer holds it with momentum",
                        came,
                        "Remove it from the group and from `optimizer.state`, as `FreezeBackbone` "
                        "does.",
                    )
                )
    return found


def _has_stepped(state: Mapping[str, Any] | None) -> bool:
    """Whether optimizer state came from a step: Adagrad makes its own when it is built."""
    return state is not None and len(state) > 0 and bool(state.get("step", 1))
