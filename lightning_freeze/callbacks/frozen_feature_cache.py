"""`FrozenFeatureCache`: the frozen part of the model computed once per sample."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional, Union

from lightning_freeze.cache.stats import CacheStats
from lightning_freeze.cache.store import STORES, RowStore, as_bytes, dtype_of
from lightning_freeze.callbacks._copies import forget_model, own_state
from lightning_freeze.callbacks._lightning import (
    Callback,
    LightningModule,
    Trainer,
    is_fitting,
    rank_zero_info,
    rank_zero_warn,
)
from lightning_freeze.callbacks.fit_state import fit_state_of
from lightning_freeze.errors import ArgumentError

if TYPE_CHECKING:
    from lightning_freeze.callbacks._caching import Caching


class FrozenFeatureCache(Callback):
    """Computes the output of the frozen layers once per sample, and replays it afterwards.

    What stands in front of the first layer that trains, and is frozen, in eval mode and without
    randomness, gives the same output for the same sample in each epoch. From the second time on
    that is looked up: by a 128-bit fingerprint of the sample's inputs, so shuffling, several
    workers and repeated samples don't matter. Results are those without the cache, to the bit
    where batches have the same shape.

    It finds out by itself where it can be used, with any model and any way of freezing, and what
    can be left out grows and shrinks with the schedule. The first two batches of each stage run
    as they are, and are compared with a replay. Where it can't be used (dropout in the frozen
    part, hooks on its layers, inputs that differ each time), it steps aside with one line that
    says why. A value that wasn't computed never reaches the loss: in its place stands a tensor
    without values, and where one is read, the model is called as it is.

    A frozen part is taken for changed when its tensors, modes, modules or plain attributes are.
    What else it may read (a global, a class attribute, a nested container), and writes through
    `.data` within an epoch, are found only by recomputing two samples now and then.

    Args:
        max_bytes: how much may be kept: a number of bytes, or such as "2GiB".
        store: "memory", or "disk" for memory-mapped files.
        dtype: what floating-point outputs are kept as, such as "bfloat16": half the memory, but no
            longer exact. As they are where None.
        folder: where the files of `store="disk"` are made; the system's temporary folder if None.

    Attributes:
        stats: hits, misses, bytes and time saved in the fit, as a `CacheStats`.

    Raises:
        ArgumentError: an argument isn't one of these.

    Example:
        >>> from lightning_freeze import FreezeBackbone
        >>> callbacks = [FreezeBackbone(), FrozenFeatureCache("500MB")]

    See AutoFreeze (Liu et al. 2021, https://arxiv.org/abs/2102.01386), which caches activations of
    frozen BERT layers.
    """

    def __init__(
        self,
        max_bytes: Union[int, str] = "2GiB",
        *,
        store: str = "memory",
        dtype: Optional[str] = None,
        folder: Union[str, Path, None] = None,
    ) -> None:
        self.max_bytes = as_bytes(max_bytes)
        if store not in STORES:
            raise ArgumentError(f'`store` is {store!r}. Write "memory" or "disk".')
        if folder is not None and store != "disk":
            raise ArgumentError('`folder` is for `store="disk"`.')
        self.store = store
        self.folder = folder
        self.dtype = dtype_of(dtype)
        self.stats = CacheStats()
        self._run: Caching | None = None

    def __getstate__(self) -> dict[str, Any]:
        """For pickling and copying: without the fit that it takes part in."""
        return own_state(self, _run=None)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a second one.

        Raises:
            ArgumentError: there are several among the trainer's callbacks.
        """
        several = [c for c in _callbacks_of(trainer) if isinstance(c, FrozenFeatureCache)]
        if len(several) > 1:
            raise ArgumentError(
                f"The trainer has {len(several)} FrozenFeatureCache callbacks. Write one."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with an empty cache."""
        self.stats = CacheStats()
        from lightning_freeze.callbacks._caching import Caching  # it takes a while to import

        rows = RowStore(self.max_bytes, self.store, self.folder, self.dtype)
        self._run = Caching(trainer, pl_module, rows, self.stats)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Have the frozen part compared with what it was."""
        if self._run is not None:
            self._run.epoch_starts()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Put the cache in front of the model."""
        if self._run is not None:
            self._run.begin(may_plan=True)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Leave the model as it was."""
        if self._run is not None:
            self._run.end()

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Samples of the validation set come back, too."""
        if self._run is not None and is_fitting(trainer):
            self._run.begin(may_plan=False, first=batch_idx == 0)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Leave the model as it was."""
        if self._run is not None:
            self._run.end()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See whether samples repeat at all."""
        if self._run is not None:
            self._run.epoch_ends()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let go of what was kept."""
        if self._run is not None:
            if self.stats.hits:
                rank_zero_info(_told(self.stats))
            elif self._run.useless:
                # that a schedule hasn't frozen anything yet is nobody's mistake
                fit = fit_state_of(trainer)
                waits = fit is not None and fit.managed and not fit.plan.frozen
                (rank_zero_info if waits else rank_zero_warn)(
                    "FrozenFeatureCache did nothing: no frozen layer is called before the first "
                    "that trains, or apart from it."
                )
            self._run.stop()
            self._run = None

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Leave the model as it was."""
        if self._run is not None:
            self._run.stop()
            self._run = None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Keep nothing of the model."""
        forget_model(self)


def _callbacks_of(trainer: Trainer) -> list[Callback]:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[union-attr]
    return callbacks


def _told(stats: CacheStats) -> str:
    samples = stats.hits + stats.misses
    seconds = stats.seconds_saved
    time = f"about {seconds:.1f} s saved" if seconds >= 0 else f"{-seconds:.1f} s lost by it"
    return (
        f"FrozenFeatureCache: {stats.hits:,} of {samples:,} samples ({100 * stats.hit_rate:.0f} %) "
        f"didn't run through the frozen layers; {time}, {stats.nbytes / 2**20:.1f} MiB kept."
    )
