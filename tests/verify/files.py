"""Files to verify, made by a real run: weights before it, a checkpoint after it, a certificate."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_freeze import FreezeBackbone, fingerprint
from lightning_freeze.checkpoints.certificate import Certificate, Certified
from tests.toys import Toy, loader, seeded, state, trainer

State = Mapping[str, Tensor]


def certified(weights: State, epoch: int = 0, step: int = 0) -> dict[str, Certified]:
    """What a certificate says of some tensors."""
    return {
        name: Certified(
            fingerprint=fingerprint(tensor),
            kind="parameter",
            dtype=str(tensor.dtype).removeprefix("torch."),
            shape=tuple(tensor.shape),
            epoch=epoch,
            step=step,
        )
        for name, tensor in weights.items()
    }


def certificate(weights: State, **changes: Any) -> Certificate:
    """A certificate of some tensors, frozen from the start."""
    whole = Certificate(
        certified(weights), 2, 8, (), {"torch": torch.__version__}, "2026-01-01T00:00:00+00:00"
    )
    return replace(whole, **changes)


def write_certificate(path: Path, content: Certificate) -> str:
    path.write_text(json.dumps(content.to_dict()), encoding="utf-8")
    return str(path)


def save(path: Path, content: Any) -> str:
    torch.save(content, path)
    return str(path)


@dataclass(frozen=True)
class Run:
    """What a run with a frozen backbone left.

    Attributes:
        before: the weights that it began with.
        base: their file.
        checkpoint: what the Trainer saved at the end.
        certificate: of the frozen tensors, as JSON.
        content: the checkpoint's content.
    """

    before: dict[str, Tensor]
    base: str
    checkpoint: str
    certificate: str
    content: dict[str, Any]

    @property
    def after(self) -> dict[str, Tensor]:
        return dict(self.content["state_dict"])

    def changed(self, path: Path, changes: State) -> str:
        """A copy of the checkpoint with some tensors exchanged."""
        return save(path, {**self.content, "state_dict": {**self.after, **changes}})


def run_in(folder: Path) -> Run:
    model = seeded(Toy)
    before = state(model)
    fit = trainer(FreezeBackbone(), epochs=2)
    fit.fit(model, loader())
    fit.save_checkpoint(folder / "run.ckpt")
    content = torch.load(folder / "run.ckpt", weights_only=True)
    frozen = {name: t for name, t in state(model).items() if name.startswith("backbone.")}
    return Run(
        before=before,
        base=save(folder / "base.pt", before),
        checkpoint=str(folder / "run.ckpt"),
        certificate=write_certificate(folder / "certificate.json", certificate(frozen)),
        content=content,
    )
