"""`lightning` or `pytorch_lightning`: the same code under two names; take what is there."""

from __future__ import annotations

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.trainer.states import TrainerFn
    from lightning.pytorch.utilities.model_helpers import is_overridden
    from lightning.pytorch.utilities.rank_zero import rank_zero_warn
except ModuleNotFoundError:  # only the older package name is installed
    from pytorch_lightning import Callback, LightningModule, Trainer  # type: ignore
    from pytorch_lightning.trainer.states import TrainerFn  # type: ignore
    from pytorch_lightning.utilities.model_helpers import is_overridden  # type: ignore
    from pytorch_lightning.utilities.rank_zero import rank_zero_warn  # type: ignore

__all__ = ["Callback", "LightningModule", "Trainer", "TrainerFn", "is_overridden", "rank_zero_warn"]
