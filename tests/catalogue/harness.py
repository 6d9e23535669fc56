"""What the tests of the catalogue share: marking a row, a fit with a sabotage, and its findings."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule

from lightning_freeze import Finding, TrainableParamAudit
from tests.toys import changed, loader, seeded, state, trainer


def row(
    number: str, *, found: str = "", prevented: str = "", told: str = "", needs: str = ""
) -> Callable[[Any], Any]:
    """Mark the test of one row of the catalogue.

    Args:
        number: such as "F1".
        found: the finding's code: the failure is injected, and the audit names it.
        prevented: why it can't happen with these callbacks.
        told: by what else a user learns of it: an error before the fit, a table.
        needs: what it would take to try it here; the test is skipped.
    """
    verdict = next(
        text
        for text in (
            found and f"found: {found}",
            prevented and f"impossible: {prevented}",
            told and f"told: {told}",
            needs and f"not tried: needs {needs}",
        )
        if text
    )

    def mark(test: Any) -> Any:
        test = pytest.mark.row(number, verdict)(test)
        return pytest.mark.skip(reason=f"needs {needs}")(test) if needs else test

    return mark


class Do(Callback):
    """Does something in a hook, whenever a condition holds: `Do(on_train_batch_end=act)`.

    `act` gets the trainer and the module. It runs at optimizer step `at`, or always where None.
    """

    def __init__(self, *, at: int | None = None, **acts: Callable[[Any, Any], None]) -> None:
        for hook, act in acts.items():
            setattr(self, hook, self._doing(act, at))

    def _doing(self, act: Callable[[Any, Any], None], at: int | None) -> Any:
        def hook(trainer: Any, module: Any, *rest: Any) -> None:
            if at is None or trainer.global_step == at:
                with torch.no_grad():
                    act(trainer, module)

        return hook


def audited(
    model: LightningModule,
    *callbacks: Callback,
    epochs: int = 2,
    data: Any = None,
    validation: Any = None,
    audit: dict[str, Any] | None = None,
    **options: Any,
) -> TrainableParamAudit:
    """Fit with an audit that warns, behind the other callbacks; returns the audit."""
    watching = TrainableParamAudit(table=False, on_violation="warn", **(audit or {}))
    fit = trainer(*callbacks, watching, epochs=epochs, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit.fit(model, loader() if data is None else data, validation)
    return watching


def one(audit: TrainableParamAudit, code: str) -> Finding:
    """The only finding of a code."""
    found = [finding for finding in audit.findings if finding.code == code]
    assert len(found) == 1, [str(finding) for finding in audit.findings]
    return found[0]


def codes(audit: TrainableParamAudit) -> set[str]:
    """The codes that were found."""
    return {finding.code for finding in audit.findings}


def by_hand(make: Any) -> Any:
    """A model whose backbone is frozen as people do it: the flags, and eval mode once."""
    model = seeded(make)
    model.backbone.requires_grad_(False).eval()
    return model


def fitted(model: Any, *callbacks: Callback) -> set[str]:
    """Fit without an audit; returns the names of what moved."""
    before = state(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(*callbacks, epochs=2).fit(model, loader())
    return changed(before, state(model))


def inside(names: set[str]) -> set[str]:
    """Those of the backbone."""
    return {name for name in names if name.startswith("backbone.")}
