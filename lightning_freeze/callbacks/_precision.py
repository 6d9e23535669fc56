"""Mixed precision with float16: a gradient scaler wants something to look at in each optimizer."""

from __future__ import annotations

from lightning_freeze.callbacks._lightning import Trainer
from lightning_freeze.engine.optimizers import OptimizerGroups
from lightning_freeze.errors import ConflictError


def scales(trainer: Trainer) -> bool:
    """Whether a `GradScaler` steps the optimizers."""
    return getattr(trainer.precision_plugin, "scaler", None) is not None


def check_scaler(groups: OptimizerGroups, frozen: frozenset[str]) -> None:
    """Refuse to freeze all that an optimizer holds where a `GradScaler` would step it.

    Args:
        groups: the optimizers' groups.
        frozen: names of what is frozen in a stage.

    Raises:
        ConflictError: torch would end the first step with "No inf checks were recorded".
    """
    name_of = groups.index.name_of
    for number, lists in enumerate(groups.whole_lists()):
        optimizer = groups.optimizers[number]
        held = [p for params in lists for p in params]
        if held and all(name_of.get(id(p)) in frozen for p in held):
            raise ConflictError(
                f"All {len(held)} tensors that optimizer {number} ({type(optimizer).__name__}) "
                "holds are frozen in one of the stages, and with float16 mixed precision torch's "
                "GradScaler can't step an optimizer without gradients. Use "
                '`precision="bf16-mixed"`, or leave something of it trainable.'
            )
