"""A freezing callback whose stages pass when gradients settle: AutoFreeze's rule in a fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lightning_freeze.callbacks._lightning import LightningModule, Trainer, rank_zero_warn
from lightning_freeze.callbacks.base import FreezingCallback
from lightning_freeze.engine.distributed import from_all_ranks
from lightning_freeze.engine.gradient_norms import GradientNorms
from lightning_freeze.errors import ResumeError
from lightning_freeze.model.index import ModelIndex
from lightning_freeze.schedule.autofreeze import GradientClock
from lightning_freeze.schedule.schedule import UnfreezeSchedule

_SAVED = ("interval", "previous", "frozen", "totals", "steps")


class GradientDriven(FreezingCallback):
    """Counts stages by the clock, or by the gradients if `monitor="gradient"`.

    An interval is closed at the first hook after its end, so that a checkpoint from its last batch
    holds the norms, and whoever goes on from it decides the same.
    """

    unit: str
    every: int

    def __init__(self, monitor: str | None, percentile: float) -> None:
        super().__init__()
        self.monitor = monitor
        self.percentile = percentile
        self._begin()

    def _begin(self) -> None:
        self._clock = GradientClock(self.percentile)
        self._interval: int | None = None
        self._norms: GradientNorms | None = None
        self._unread: dict[str, Any] | None = None
        self._warned = False
        self._heard = False

    def __getstate__(self) -> dict[str, Any]:
        """For pickling and copying: without the model's parameters."""
        norms = self._unread if self._norms is None else self._norms.state()
        return {**super().__getstate__(), "_norms": None, "_unread": norms}

    def measured(self, index: ModelIndex) -> Sequence[Sequence[str]]:
        """Names of the layers whose gradients count, bottom to top."""
        raise NotImplementedError

    def stage(self, schedule: UnfreezeSchedule, epoch: int, step: int) -> int:
        """The number of the stage now: by the clock, or by the gradients."""
        if self.monitor is not None:
            return min(self._clock.frozen, len(schedule.stages) - 1)
        return super().stage(schedule, epoch, step)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the arguments against the model; nothing freezes yet."""
        if trainer.state.fn == "fit" and not self.goes_on(trainer):
            self._begin()
        super().setup(trainer, pl_module, stage)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Freeze what is due."""
        self._look(trainer)
        super().on_train_epoch_start(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Freeze what is due; an epoch's start is skipped after some resumes."""
        self._look(trainer)
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Read the gradients: reduced over the ranks and unscaled, not yet clipped."""
        norms = self._reader()
        self._heard = True
        if norms is not None:
            held = {id(p) for group in optimizer.param_groups for p in group["params"]}
            norms.read(held, first=self._clock.frozen, scale=_scale(trainer, optimizer))

    def _reader(self) -> GradientNorms | None:
        fit = self._fit
        if self.monitor is None or fit is None or self not in fit.stages:
            return None
        if self._norms is None and fit.index is not None:
            every: dict[str, nn.Parameter] = fit.index.parameters
            layers = self.measured(fit.index)
            self._norms = GradientNorms([[every[name] for name in layer] for layer in layers])
            if self._unread is not None:
                self._norms.restore(self._unread)
                self._unread = None
        return self._norms

    def _look(self, trainer: Trainer) -> None:
        norms = self._reader()
        if norms is None:
            return
        clock = trainer.global_step if self.unit == "step" else trainer.current_epoch
        before, self._interval = self._interval, clock // self.every
        if before is None or before == self._interval:
            return
        # rank 0's for all: they are equal but for what a strategy adds up in another order
        means = from_all_ranks(norms.means(), "the gradients' norms")[0]
        norms.clear()
        if not self._heard and all(mean is None for mean in means):
            self._warn()
        self._heard = False
        self._clock = self._clock.feed(means)

    def _warn(self) -> None:
        if not self._warned:
            self._warned = True
            rank_zero_warn(
                f"{self.state_key} has read no gradient for a whole interval, so it freezes "
                "nothing. It reads them in `on_before_optimizer_step`: with manual optimisation, "
                "step what `self.optimizers()` returns."
            )

    def state_dict(self) -> dict[str, Any]:
        """The stage, and what the gradients have been so far."""
        state = super().state_dict()
        norms = self._reader() if state else None
        if norms is not None:
            state["gradient"] = {
                "interval": self._interval,
                "previous": list(self._clock.previous),
                "frozen": self._clock.frozen,
                **norms.state(),
            }
        return state

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what the gradients have been so far."""
        if self.monitor is None:
            return
        saved = state.get("gradient") or {}
        missing = [key for key in _SAVED if key not in saved]
        if missing:
            raise ResumeError(
                f"The state of `{self.state_key}` in the checkpoint lacks "
                f"`gradient.{missing[0]}`: it was written by a run with other arguments, changed, "
                "or written by another version of lightning-freeze. Resume with those, or load its "
                "weights alone: `Model.load_from_checkpoint(path)` and `fit` without `ckpt_path`."
            )
        self._interval = saved["interval"]
        self._clock = GradientClock(self.percentile, tuple(saved["previous"]), saved["frozen"])
        self._norms = None
        self._heard = True
        self._unread = {"totals": saved["totals"], "steps": saved["steps"]}


def _scale(trainer: Trainer, optimizer: Optimizer) -> float:
    """What gradients are still multiplied by: some fused optimizers unscale in their step."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None or not getattr(optimizer, "_step_supports_amp_scaling", False):
        return 1.0
    return float(scaler.get_scale())
