"""The hooks that all freezing callbacks share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_freeze.callbacks import fit_state as _session
from lightning_freeze.callbacks._copies import own_state
from lightning_freeze.callbacks._lightning import Callback, LightningModule, Trainer, is_fitting
from lightning_freeze.callbacks._sharded import ShardedCheckpoints, restores_late
from lightning_freeze.engine.distributed import together
from lightning_freeze.errors import ResumeError
from lightning_freeze.model.selectors import Selector, describe

# what Lightning's LearningRateFinder and BatchSizeFinder save a model in while they try
_TUNERS = (".lr_find_", ".scale_batch_size_")


class FreezingCallback(_session.Freezing):
    """Takes part in the session of its trainer.

    It keeps no record of what is frozen: that is a function of its schedule and the clock.
    """

    def __init__(self) -> None:
        self._session: _session.Session | None = None
        self._loaded: dict[str, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """For pickling and copying: without the fit that it takes part in."""
        return own_state(self, _session=None)

    def goes_on(self, trainer: Trainer) -> bool:
        """In `setup`: whether a trainer goes on from its last fit, which had this callback."""
        last = self._session
        goes_on = trainer.global_step > 0 and trainer.ckpt_path is None
        return goes_on and last is not None and last.of is not None and last.of() is trainer

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the arguments against the model; nothing freezes yet."""
        if is_fitting(trainer):
            self._loaded = None
            self._session = _session.enter(trainer, pl_module, self)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """On a resume: find the state that this callback saved."""
        if is_fitting(trainer):
            with together():
                self._take_up(trainer, checkpoint)

    def _take_up(self, trainer: Trainer, checkpoint: Mapping[str, Any]) -> None:
        state = saved_state(self, trainer, checkpoint)
        if not state and by_tuner(trainer):
            return  # it was saved before anything was frozen
        if not state:
            raise ResumeError(
                f"The checkpoint has no state of `{self.state_key}`: it was written without it, "
                "so its optimizer groups have another shape. Use the callbacks of the run that "
                "wrote it, or load its weights alone: `Model.load_from_checkpoint(path)` and `fit` "
                "without `ckpt_path`."
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
        """Split the optimizers' groups and freeze."""
        start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Unfreeze what is due."""
        if self._session is not None:
            self._session.tick(trainer)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Unfreeze what is due; an epoch's start is skipped after some resumes."""
        if self._session is not None:
            self._session.tick(trainer)

    def state_dict(self) -> dict[str, Any]:
        """The stage that the optimizer state in the same checkpoint belongs to."""
        return {} if self._session is None else self._session.state(self)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the mode guards off the model."""
        if is_fitting(trainer) and self._session is not None:
            self._session.stop()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Take the mode guards off the model; give back what a fit that never started claimed.

        What torch and Lightning say of a checkpoint that doesn't fit gets a note on what to do.
        """
        if trainer.ckpt_path is not None:
            _advise(exception)
        if self._session is not None:
            self._session.give_back(pl_module)
            self._session.stop()


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
    same = [cb for cb in _session.callbacks_of(trainer) if type(cb) is kind]
    saved = [value for key, value in states.items() if str(key).startswith(kind.__name__)]
    return dict(saved[0]) if len(same) == len(saved) == 1 else None


def check_layout(trainer: Trainer, checkpoint: Mapping[str, Any]) -> None:
    """On a resume: without the callbacks that split them, torch says only that groups don't match.

    Raises:
        ResumeError: the checkpoint was written with freezing callbacks, and this run has none.
    """
    saved = [
        str(key)
        for key, state in (checkpoint.get("callbacks") or {}).items()
        if isinstance(state, dict) and "layout" in state
    ]
    ours = [cb for cb in _session.callbacks_of(trainer) if isinstance(cb, _session.Freezing)]
    if saved and not ours:
        raise ResumeError(
            f"The checkpoint was written with {', '.join(saved)}, and this run has no freezing "
            "callback: its optimizer groups have another shape. Use the callbacks of the run that "
            "wrote it, or load its weights alone: `Model.load_from_checkpoint(path)` and `fit` "
            "without `ckpt_path`."
        )


def start(trainer: Trainer, module: LightningModule) -> _session.Session | None:
    """Start the trainer's session, whichever callback comes first."""
    session = _session.session_of(trainer)
    if session is not None and not session.started:
        # other people's callbacks may have no hash: a dataclass has none
        ours = [cb for cb in _session.callbacks_of(trainer) if isinstance(cb, FreezingCallback)]
        session.start(trainer, module, {cb: cb._loaded for cb in ours if cb._loaded})
        if restores_late(trainer) and session.groups is not None:

            def resume(saved: Mapping[str, Any]) -> None:
                try:
                    for callback in ours:
                        callback.on_load_checkpoint(trainer, module, {"callbacks": dict(saved)})
                    session.resume(trainer, {cb: cb._loaded for cb in ours if cb._loaded})
                except BaseException:
                    session.undo()
                    raise
                session.apart = frozenset()  # all ranks load the same

            session.sharded = ShardedCheckpoints(trainer.strategy, session.groups, resume)
    return session


def key_of(selectors: tuple[Selector, ...]) -> list[str]:
    """Selectors as text that is the same in every process."""
    return [describe(selector) for selector in selectors]
