"""The hooks that all freezing callbacks share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_freeze.callbacks._copies import forget_model, own_state
from lightning_freeze.callbacks._lightning import Callback, LightningModule, Trainer, is_fitting
from lightning_freeze.callbacks._sharded import ShardedCheckpoints, restores_late
from lightning_freeze.callbacks.fit_state import (
    FitState,
    Freezing,
    callbacks_of,
    enter,
    fit_state_of,
)
from lightning_freeze.engine.distributed import together
from lightning_freeze.errors import ResumeError
from lightning_freeze.model.selectors import Selector, describe

# what Lightning's LearningRateFinder and BatchSizeFinder save a model in while they try
_TUNERS = (".lr_find_", ".scale_batch_size_")


class FreezingCallback(Freezing):
    """Takes part in the fit of its trainer.

    It keeps no record of what is frozen: that is a function of its schedule and the clock.
    """

    def __init__(self) -> None:
        self._fit: FitState | None = None
        self._loaded: dict[str, Any] | None = None
        self._saved: dict[str, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        """For pickling and copying: without the fit that it takes part in."""
        return own_state(self, _fit=None, _saved={})

    def goes_on(self, trainer: Trainer) -> bool:
        """In `setup`: whether a trainer goes on from its last fit, which had this callback."""
        last = fit_state_of(trainer)
        goes_on = trainer.global_step > 0 and trainer.ckpt_path is None
        return goes_on and last is not None and id(self) in last.entered | last.entered_last

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the arguments against the model; nothing freezes yet."""
        if is_fitting(trainer):
            self._loaded, self._saved = None, {}
            self._fit = enter(trainer, pl_module, self)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """On a resume: find the state that this callback saved."""
        if is_fitting(trainer):
            with together():
                self._take_up(trainer, checkpoint)

    def _take_up(self, trainer: Trainer, checkpoint: Mapping[str, Any]) -> None:
        if self._fit is not None and not by_tuner(trainer):
            self._fit.take_down(checkpoint)
        state = saved_state(self, trainer, checkpoint)
        if not state:
            return  # it was written without it: what trains is what the clock says
        if "layout" in state:
            raise ResumeError(
                f"The state of `{self.state_key}` in the checkpoint is of lightning-freeze 0.1, "
                "which split the optimizer's groups. Load its weights alone: "
                "`Model.load_from_checkpoint(path)` and `fit` without `ckpt_path`."
            )
        number = state.get("stage")
        if type(number) is not int or number < 0:
            raise ResumeError(
                f"`stage` of `{self.state_key}` can't be {number!r}, as in the checkpoint. It was "
                "changed after it was written, or by another version of lightning-freeze. Resume "
                "with that version, or load its weights alone: `Model.load_from_checkpoint(path)` "
                "and `fit` without `ckpt_path`."
            )
        self._loaded = state
        self.restore(self._loaded)

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what a subclass has saved beyond the stage."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Freeze."""
        start(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take what is frozen out of the optimizers again, after a resume."""
        if self._fit is not None:
            self._fit.train_starts(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Unfreeze what is due."""
        if self._fit is not None:
            self._fit.tick(trainer)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Unfreeze what is due; an epoch's start is skipped after some resumes."""
        if self._fit is not None:
            self._fit.tick(trainer)

    def state_dict(self) -> dict[str, Any]:
        """The stage that the optimizer state in the same checkpoint belongs to."""
        return dict(self._saved) if self._fit is None else self._fit.state(self)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take what is frozen out of the optimizers again: their state is in the checkpoint."""
        if self._fit is not None:
            self._fit.settle()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave no trace: the optimizers' lists are whole, and modes what they were."""
        if is_fitting(trainer):
            self._leave()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Leave no trace; give back what a fit that never started claimed.

        What torch and Lightning say of a checkpoint that doesn't fit gets a note on what to do.
        """
        if trainer.ckpt_path is not None:
            _advise(exception)
        if self._fit is not None:
            self._fit.give_back(pl_module)
        self._leave()

    def _leave(self) -> None:
        if self._fit is not None:
            self._saved = self.state_dict()  # a checkpoint may be saved behind the fit
            fit, self._fit = self._fit, None
            fit.stop()
        forget_model(self)


# part of what torch and Lightning say -> what they don't
_ADVICE = {
    "in loading state_dict for": "The checkpoint is of a model with other tensors. Build the model "
    "as the run that wrote it did, or load the weights that fit, "
    '`model.load_state_dict(torch.load(path)["state_dict"], strict=False)`, and `fit` without '
    "`ckpt_path`.",
    "checkpoint contains only the model": "Load its weights alone: "
    "`Model.load_from_checkpoint(path)` and `fit` without `ckpt_path`. The schedule begins anew.",
}


def _advise(exception: BaseException) -> None:
    for said, advice in _ADVICE.items():
        known = getattr(exception, "__notes__", ())
        # Python 3.10 has no notes
        if said in str(exception) and advice not in known and hasattr(exception, "add_note"):
            exception.add_note(advice)


def by_tuner(trainer: Trainer) -> bool:
    """Whether a checkpoint is loaded by a callback that tries something and puts the model back."""
    return Path(trainer.ckpt_path or "").name.startswith(_TUNERS)


def saved_state(
    callback: Callback, trainer: Trainer, checkpoint: Mapping[str, Any]
) -> dict[str, Any] | None:
    """What a callback saved; with other arguments, too, if it was the only one of its class."""
    states = checkpoint.get("callbacks") or {}
    if callback.state_key in states:
        return dict(states[callback.state_key])
    kind = type(callback)
    same = [cb for cb in callbacks_of(trainer) if type(cb) is kind]
    saved = [value for key, value in states.items() if str(key).startswith(kind.__name__)]
    return dict(saved[0]) if len(same) == len(saved) == 1 else None


def start(trainer: Trainer, module: LightningModule) -> FitState | None:
    """Start the trainer's fit, whichever callback comes first."""
    fit = fit_state_of(trainer)
    if fit is not None and not fit.started:
        # other people's callbacks may have no hash: a dataclass has none
        ours = [cb for cb in callbacks_of(trainer) if isinstance(cb, FreezingCallback)]
        fit.start(trainer, module, {cb: cb._loaded for cb in ours if cb._loaded})
        if restores_late(trainer) and fit.groups is not None:

            def resume(saved: Mapping[str, Any]) -> None:
                try:
                    for callback in ours:
                        callback.on_load_checkpoint(trainer, module, dict(saved))
                    fit.resume(trainer, {cb: cb._loaded for cb in ours if cb._loaded})
                except BaseException:
                    fit.undo()
                    raise
                fit.apart = frozenset()  # all ranks load the same

            fit.sharded = ShardedCheckpoints(trainer.strategy, fit.groups, resume)
    return fit


def key_of(selectors: tuple[Selector, ...]) -> list[str]:
    """Selectors as text that is the same in every process."""
    return [describe(selector) for selector in selectors]
