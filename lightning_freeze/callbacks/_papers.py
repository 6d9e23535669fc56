"""Report and certificate of a fit: whether they can be written, and writing them."""

from __future__ import annotations

import os
from pathlib import Path

from lightning_freeze.audit.record import Record
from lightning_freeze.audit.run import AuditRun
from lightning_freeze.callbacks._lightning import Trainer, is_a, rank_zero_warn
from lightning_freeze.callbacks.frozen_feature_cache import FrozenFeatureCache
from lightning_freeze.checkpoints.files import write_json
from lightning_freeze.errors import ArgumentError


class Papers:
    """The files that one audit writes, by rank 0.

    A file that can't be written is told of before the fit where it can be known; later it is a
    warning, which costs neither the checkpoint that is being saved nor the error that ends a fit.
    """

    def __init__(self, record: Record, report: Path | None, certificate: Path | bool) -> None:
        self._record = record
        self._report = report
        self._certificate = certificate

    def check(self, trainer: Trainer) -> None:
        """Before the fit: refuse a path that no file can be written to.

        Raises:
            ArgumentError: with the reason.
        """
        if trainer.is_global_zero:
            if self._report is not None:
                check_writable(self._report, "report")
            if isinstance(self._certificate, Path):
                check_writable(self._certificate, "certificate")

    def write(self, trainer: Trainer, run: AuditRun) -> None:
        """Write report and certificate."""
        callbacks = trainer.callbacks  # type: ignore[union-attr]
        for cache in (one for one in callbacks if isinstance(one, FrozenFeatureCache)):
            self._record.cache = cache.stats.to_dict()
        if self._report is not None and trainer.is_global_zero:
            self._record.take(run)
            _written(self._report, self._record.to_dict(run))
        self.certify(trainer, run)

    def certify(self, trainer: Trainer, run: AuditRun) -> None:
        """Write the certificate, if there is a place for it."""
        path = self._certificate_path(trainer)
        if path is not None and trainer.is_global_zero:
            self._record.take(run)
            _written(path, self._record.certificate(run).to_dict())

    def _certificate_path(self, trainer: Trainer) -> Path | None:
        if isinstance(self._certificate, Path):
            return self._certificate
        # what saves once after an error is one of them, too
        savers = sorted(trainer.checkpoint_callbacks, key=lambda s: not is_a(s, "ModelCheckpoint"))
        folder = getattr(savers[0], "dirpath", None) if savers else None
        if not self._certificate or not folder or "://" in str(folder):
            return None
        return Path(folder) / "certificate.json"


def _written(path: Path, content: dict[str, object]) -> None:
    try:
        write_json(path, content)
    except OSError as error:
        rank_zero_warn(f"`{path}` couldn't be written: {error}. The fit goes on without it.")


def check_writable(path: Path, argument: str) -> None:
    """Refuse a path under which no file can be made.

    Raises:
        ArgumentError: it is a folder, stands below a file, or nobody may write there.
    """
    why = ""
    nearest = path
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    if path.is_dir():
        why = "it is a folder; name a file in it"
    elif nearest != path and not nearest.is_dir():
        why = f"`{nearest}` is a file, not a folder"
    elif not os.access(nearest, os.W_OK):
        why = f"`{nearest}` can't be written to"
    if why:
        raise ArgumentError(f"`{argument}={str(path)!r}` can't be written: {why}.")
