"""Hooks on the optimizers of a fit: who is about to step, and who has."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from torch.optim import Optimizer

from lightning_freeze.audit.baseline import Moment
from lightning_freeze.audit.run import AuditRun


class StepHooks:
    """Tells a run of every step of the optimizers that were added."""

    def __init__(self) -> None:
        self._hooks: dict[int, tuple[Any, Any]] = {}

    def add(self, optimizer: Any, run: AuditRun, now: Callable[[], Moment]) -> None:
        """Watch an optimizer, once.

        Args:
            optimizer: what Lightning steps; a wrapper that isn't a whole optimizer is left alone.
            run: what is told.
            now: gives epoch and optimizer step.
        """
        if id(optimizer) in self._hooks or not isinstance(optimizer, Optimizer):
            return
        with suppress(TypeError, AttributeError):
            self._hooks[id(optimizer)] = (
                optimizer.register_step_pre_hook(lambda o, *_: run.step_starts(o, now())),
                optimizer.register_step_post_hook(lambda o, *_: run.update_ends(o, now())),
            )

    def remove(self) -> None:
        """Take them off."""
        for hook in (hook for pair in self._hooks.values() for hook in pair):
            hook.remove()
        self._hooks = {}
