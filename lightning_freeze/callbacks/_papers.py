"""Report and certificate of a fit: whether they can be written, and writing them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Union

from lightning_freeze.audit.record import Record
from lightning_freeze.audit.run import AuditRun
from lightning_freeze.callbacks._lightning import Trainer, is_a, rank_zero_warn
from lightning_freeze.callbacks.frozen_feature_cache import FrozenFeatureCache
from lightning_freeze.checkpoints.certificate import Certificate, sha256, until
from lightning_freeze.checkpoints.files import write_json
from lightning_freeze.checkpoints.verify.matching import escaped, quoted
from lightning_freeze.errors import ArgumentError
from lightning_freeze.fingerprint import fingerprint
from lightning_freeze.model.index import named_tensors


class Papers:
    """The files that one audit writes, by rank 0.

    A file that can't be written is told of before the fit where it can be known; later it is one
    warning, which costs neither the checkpoint that is being saved nor the error that ends a fit.
    """

    def __init__(
        self,
        record: Record,
        report: Path | None,
        certificate: Path | bool,
        digest: str = "xxh3_128",
    ) -> None:
        self._record = record
        self._report = report
        self._certificate = certificate
        self._digest = digest
        self._told: set[str] = set()

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
        """At the end of the fit: write report and certificate."""
        callbacks = trainer.callbacks  # type: ignore[union-attr]
        for cache in (one for one in callbacks if isinstance(one, FrozenFeatureCache)):
            self._record.cache = cache.stats.to_dict()
        if not trainer.is_global_zero:
            return
        self._record.take(run)
        path = self._certificate_path(trainer)
        if self._report is not None:
            self._write(self._report, self._record.to_dict(run))
        if path is not None:
            certificate = self._record.certificate(run)
            if self._digest == "sha256":
                certificate = _with_sha256(certificate, trainer.lightning_module)
            self._write(path, self._told_until(certificate))

    def certify(self, trainer: Trainer, saved: Mapping[str, Any]) -> None:
        """Beside a checkpoint that is being saved: write the certificate that it holds.

        Args:
            trainer: of the fit.
            saved: the audit's state in the checkpoint; nothing is compared once more for this.
        """
        path = self._certificate_path(trainer)
        if path is not None and trainer.is_global_zero and "certificate" in saved:
            held = Certificate.from_dict(saved["certificate"], "the checkpoint that is being saved")
            self._write(path, self._told_until(held))

    def _told_until(self, certificate: Certificate) -> dict[str, Any]:
        moments = [moment.to_dict() for moment in self._record.moments]
        return replace(certificate, until=until(moments)).to_dict()

    def _certificate_path(self, trainer: Trainer) -> Union[Path, str, None]:
        if isinstance(self._certificate, Path):
            return self._certificate
        # what saves once after an error is one of them, too
        savers = sorted(trainer.checkpoint_callbacks, key=lambda s: not is_a(s, "ModelCheckpoint"))
        folder = getattr(savers[0], "dirpath", None) if savers else None
        if not self._certificate or not folder:
            return None
        if "://" in str(folder):
            return f"{str(folder).rstrip('/')}/certificate.json"
        return Path(folder) / "certificate.json"

    def _write(self, path: Union[Path, str], content: dict[str, Any]) -> None:
        try:
            write_json(path, content)
        except Exception as error:
            # what a remote file system raises is of any kind
            if not isinstance(error, OSError) and "://" not in str(path):
                raise
            if str(path) not in self._told:
                self._told.add(str(path))
                rank_zero_warn(
                    f"{quoted(path)} couldn't be written: {escaped(str(error))}. The fit goes on."
                )


def _with_sha256(certificate: Certificate, module: Any) -> Certificate:
    """The same by SHA-256, of the tensors that still have the bytes that are certified.

    What has others is a finding already; what has no bytes of its own (sparse, quantised by a
    wrapper of several tensors) is left out.
    """
    tensors = dict(zip(*named_tensors(module)))
    frozen = {}
    for name, entry in certificate.frozen.items():
        tensor = tensors.get(name)
        if tensor is not None and fingerprint(tensor) == entry.fingerprint:
            digest = sha256(tensor)
            if digest is not None:
                frozen[name] = replace(entry, fingerprint=digest)
    return replace(certificate, frozen=frozen, digest="sha256")


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
