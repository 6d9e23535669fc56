"""A frozen tensor that changed -> the likely cause, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_freeze.apply import is_batch_norm


def why_changed(
    parameter: nn.Parameter, version: int, optimizers: Sequence[Optimizer], averaging: str
) -> tuple[str, str]:
    """The cause and the fix for a frozen parameter that changed, by looking at it.

    Args:
        parameter: as it is now.
        version: its version counter when it was frozen; a hint, since not every write bumps it.
        optimizers: searched for what holds it.
        averaging: the name of a callback that averages weights, if there is one.
    """
    holder = holder_of(parameter, optimizers)
    if parameter.requires_grad:
        stepped = f", and {holder} holds it" if holder else ""
        return (
            f"`requires_grad` is True: other code turned it on{stepped}.",
            "Find what sets `requires_grad` and leave that to one callback.",
        )
    if holder and parameter.grad is not None:
        return (
            f"{holder} holds it and it has a stale gradient, which each step applies.",
            "Set `.grad = None` when you freeze, as `lightning_freeze.freeze` does.",
        )
    if holder:
        return (
            f"{holder} holds it: weight decay and momentum move what has no gradient, too.",
            "Leave frozen parameters out of the optimizer, as `FreezeBackbone` does.",
        )
    if averaging:
        return (
            f"`{averaging}` averages weights and writes the average back, rounded.",
            "Leave the frozen parameters out of the average, or accept changes in the last bit.",
        )
    if parameter._version == version:
        return (
            "No optimizer holds it and its version didn't change: it was written through `.data` "
            "or from outside of autograd.",
            "Find code that writes `.data` of this tensor.",
        )
    return (
        "No optimizer holds it: it was written in place by other code.",
        "Find an in-place write (`copy_`, `mul_`, `load_state_dict`) to this tensor.",
    )


def why_buffer_changed(module: nn.Module) -> tuple[str, str]:
    """The cause and the fix for a buffer of a frozen module that changed."""
    if is_batch_norm(module) and module.training:
        return (
            "Its batch-norm is in train mode, and `requires_grad=False` doesn't stop running "
            "statistics.",
            "Put it in eval mode on every epoch, as `FreezeBackbone` does, or say `train_bn=True`.",
        )
    return ("Some code wrote to it.", "Find what writes to this buffer and stop it.")


def holder_of(parameter: Tensor, optimizers: Iterable[Optimizer]) -> str:
    """The class of the optimizer that holds a parameter, or an empty text."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if any(p is parameter for p in group["params"]):
                return type(optimizer).__name__
    return ""
