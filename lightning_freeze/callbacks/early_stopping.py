"""`EarlyStopping` beside stages to come: where its patience ends, a stage ends and not the fit.

While stages are to come, the patience of each stopper is held at a number that is never reached.
So it goes on counting and saving as ever, and whatever else makes it or others stop the fit does,
whichever callback comes first. The count stays what it is until the next stage begins: whoever
goes on from a checkpoint finds it there.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, cast

from lightning_freeze.callbacks._lightning import Trainer, is_a


class HeldPatience(int):
    """A patience that is never exhausted, in place of a stopper's own."""

    own: int

    @classmethod
    def of(cls, patience: int) -> HeldPatience:
        """In place of `patience`."""
        held = cls(sys.maxsize)
        held.own = patience
        return held


def stoppers_of(trainer: Trainer) -> list[Any]:
    """The trainer's `EarlyStopping` callbacks, of any subclass."""
    callbacks = cast("Any", trainer).callbacks
    return [callback for callback in callbacks if is_a(callback, "EarlyStopping")]


def hold(stopper: Any) -> None:
    """Keep a stopper's patience from ending the fit; to do it twice changes nothing."""
    if not isinstance(stopper.patience, HeldPatience):
        stopper.patience = HeldPatience.of(stopper.patience)


def release(stopper: Any) -> None:
    """Give a stopper its own patience back."""
    if isinstance(stopper.patience, HeldPatience):
        stopper.patience = stopper.patience.own


def is_exhausted(stopper: Any) -> bool:
    """Whether a stopper would have ended the fit, had its patience not been held."""
    held = stopper.patience
    return bool(isinstance(held, HeldPatience) and stopper.wait_count >= held.own)


def save_own_patience(trainer: Trainer, checkpoint: Mapping[str, Any]) -> None:
    """Write the stoppers' own patience into a checkpoint."""
    states = checkpoint.get("callbacks") or {}
    for stopper in stoppers_of(trainer):
        state = states.get(stopper.state_key)
        if isinstance(state, dict) and isinstance(state.get("patience"), HeldPatience):
            state["patience"] = state["patience"].own
