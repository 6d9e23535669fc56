"""Which code of the user's runs between two looks of an audit, and which callbacks average."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_freeze.audit import trace as looks
from lightning_freeze.audit.scene import Average
from lightning_freeze.callbacks._lightning import Callback, Trainer
from lightning_freeze.callbacks.fit_state import callbacks_of

# the hook in which each look is taken
_HOOK = {
    looks.BEGIN: "on_fit_start",
    looks.FIT: "on_train_start",
    looks.EPOCH: "on_train_epoch_start",
    looks.START: "on_train_batch_start",
    looks.UPDATE: "on_before_optimizer_step",
    looks.END: "on_train_batch_end",
    looks.VALIDATION: "on_validation_start",
    looks.VALIDATED: "on_validation_end",
    looks.EPOCH_END: "on_train_epoch_end",
    looks.SAVED: "on_save_checkpoint",
    looks.FIT_END: "on_fit_end",
}
_PASSES = (
    "on_before_zero_grad",
    "optimizer_zero_grad",
    "on_before_backward",
    "backward",
    "on_after_backward",
    "optimizer_step",
)
_UPDATE = ("configure_gradient_clipping",)
_STEP = (*_PASSES, "on_before_optimizer_step", *_UPDATE, "lr_scheduler_step")
_DATA = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
_BEHIND_VALIDATION = ("on_validation_model_train",)
_IN_BETWEEN = {
    (looks.BEGIN, looks.FIT): ("on_sanity_check_start", "on_sanity_check_end"),
    (looks.START, looks.UPDATE): _PASSES,
    (looks.START, looks.UPDATED): _STEP,
    (looks.START, looks.END): _STEP,
    (looks.UPDATE, looks.UPDATED): _UPDATE,
    (looks.UPDATED, looks.END): ("optimizer_step", "lr_scheduler_step"),
    (looks.END, looks.START): _DATA,
    (looks.EPOCH, looks.START): _DATA,
    (looks.END, looks.VALIDATION): ("on_validation_model_zero_grad", "on_validation_model_eval"),
    (looks.EPOCH_END, looks.FIT_END): ("on_train_end",),
    (looks.VALIDATED, looks.START): _BEHIND_VALIDATION,
    (looks.VALIDATED, looks.END): _BEHIND_VALIDATION,
    (looks.VALIDATED, looks.EPOCH): _BEHIND_VALIDATION,
    (looks.VALIDATED, looks.EPOCH_END): _BEHIND_VALIDATION,
    (looks.VALIDATION, looks.VALIDATED): (
        "on_validation_epoch_start",
        "on_validation_batch_start",
        "on_validation_batch_end",
        "on_validation_epoch_end",
    ),
}
_LIBRARIES = ("lightning", "pytorch_lightning", "lightning_freeze")


def who_runs(trainer: Trainer, ours: Callback, after: str, before: str) -> str:
    """The hooks of the user's callbacks and module between two looks, in words."""
    found = list(_between(trainer, ours, after, before))
    in_step = after == looks.START and before in (looks.UPDATE, looks.UPDATED, looks.END)
    if not trainer.lightning_module.automatic_optimization:
        # there the step goes on behind the update
        in_step = in_step or (after == looks.UPDATED and before in (looks.UPDATE, looks.END))
    if in_step:
        found.append(f"{type(trainer.lightning_module).__name__}.training_step")
    if (after, before) == (looks.VALIDATION, looks.VALIDATED):
        found.append(f"{type(trainer.lightning_module).__name__}.validation_step")
    return ", ".join(f"`{name}`" for name in dict.fromkeys(found))


def _between(trainer: Trainer, ours: Callback, after: str, before: str) -> Iterator[str]:
    callbacks = callbacks_of(trainer)
    place = callbacks.index(ours) if ours in callbacks else len(callbacks)
    begins, ends = _HOOK.get(after, ""), _HOOK.get(before, "")
    yield from _overriding(callbacks[place + 1 :], begins)
    yield from _overriding([trainer.lightning_module], begins)
    for hook in _IN_BETWEEN.get((after, before), ()):
        yield from _overriding([*callbacks, trainer.lightning_module], hook)
    yield from _overriding(callbacks[:place], ends)


def _overriding(owners: list[Any], hook: str) -> Iterator[str]:
    """Those of the user's own that have something to do in a hook."""
    for owner in owners:
        kind = type(owner)
        if hook and hook in vars(owner):  # as `LambdaCallback` has them
            yield f"{kind.__name__}.{hook}"
            continue
        for definer in kind.__mro__:
            if hook and hook in vars(definer):
                if definer.__module__.split(".")[0] not in _LIBRARIES:
                    yield f"{kind.__name__}.{hook}"
                break


def averages_of(trainer: Trainer, *, ended: bool) -> list[Average]:
    """The averaged copies of the model that callbacks keep.

    Args:
        trainer: whose callbacks are looked through.
        ended: whether the last epoch is over, so that they may have been written back.
    """
    found = []
    for callback in callbacks_of(trainer):
        for value in list(vars(callback).values()):
            if not isinstance(value, nn.Module) or value is trainer.lightning_module:
                continue
            if isinstance(value, AveragedModel):
                used = bool(int(value.n_averaged))
                found.append(Average(type(callback).__name__, value, used, ended))
            elif hasattr(callback, "n_averaged") and hasattr(callback, "swa_end"):
                used = callback.n_averaged is not None and bool(int(callback.n_averaged))
                written = ended or trainer.current_epoch > callback.swa_end
                found.append(Average(type(callback).__name__, value, used, written))
    return found


def batches_per_step(trainer: Trainer) -> int:
    """Batches after which Lightning steps the optimizer; 0 where the module decides."""
    if not trainer.lightning_module.automatic_optimization or trainer.fit_loop._skip_backward:
        return 0
    return trainer.accumulate_grad_batches
