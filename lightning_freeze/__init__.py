"""Freeze, unfreeze and re-initialise layers in PyTorch Lightning, with proof that it held."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_freeze.audit.findings import Finding
from lightning_freeze.audit.guard import assert_frozen, audit_parameters
from lightning_freeze.engine.flags import freeze, unfreeze
from lightning_freeze.engine.weights import reinit
from lightning_freeze.errors import (
    ArgumentError,
    AuditError,
    ConflictError,
    DiscoveryError,
    FreezeError,
    FrozenWeightsChanged,
    ReinitError,
    ResumeError,
    ScheduleError,
    SelectorError,
    UnsupportedError,
    VerifyError,
)
from lightning_freeze.fingerprint import fingerprint
from lightning_freeze.model.discovery.anatomy import Anatomy, Stack
from lightning_freeze.model.layer_groups import LayerGroup, anatomy, layer_groups
from lightning_freeze.report.preview import SchedulePreview
from lightning_freeze.report.summary import Summary, summarize
from lightning_freeze.schedule.plan import FreezePlan
from lightning_freeze.schedule.schedule import UnfreezeSchedule

if TYPE_CHECKING:
    from lightning_freeze.callbacks import (
        FreezeBackbone,
        FrozenFeatureCache,
        GradualFreeze,
        GradualUnfreeze,
        ReinitTopLayers,
        TrainableParamAudit,
    )

__version__ = "0.1.0"

_CALLBACKS = (
    "FreezeBackbone",
    "FrozenFeatureCache",
    "GradualFreeze",
    "GradualUnfreeze",
    "ReinitTopLayers",
    "TrainableParamAudit",
)

__all__ = [
    "Anatomy",
    "ArgumentError",
    "AuditError",
    "ConflictError",
    "DiscoveryError",
    "Finding",
    "FreezeBackbone",
    "FreezeError",
    "FreezePlan",
    "FrozenFeatureCache",
    "FrozenWeightsChanged",
    "GradualFreeze",
    "GradualUnfreeze",
    "LayerGroup",
    "ReinitError",
    "ReinitTopLayers",
    "ResumeError",
    "ScheduleError",
    "SchedulePreview",
    "SelectorError",
    "Stack",
    "Summary",
    "TrainableParamAudit",
    "UnfreezeSchedule",
    "UnsupportedError",
    "VerifyError",
    "anatomy",
    "assert_frozen",
    "audit_parameters",
    "fingerprint",
    "freeze",
    "layer_groups",
    "reinit",
    "summarize",
    "unfreeze",
]


def __getattr__(name: str) -> Any:
    # they take a while to import, and the functions work without them
    if name in _CALLBACKS:
        from lightning_freeze import callbacks

        return getattr(callbacks, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
