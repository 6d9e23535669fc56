"""The audit around any loop: plain torch, transformers' Trainer, a notebook."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lightning_freeze.audit.findings import CHANGED
from lightning_freeze.audit.ledger import Ledger
from lightning_freeze.errors import FrozenWeightsChanged


@contextmanager
def assert_frozen(model: nn.Module) -> Iterator[None]:
    """Raise when what is frozen at the start of the block isn't the same, to the bit, at its end.

    Frozen parameters and the buffers of wholly frozen modules are compared. It works around any
    loop; nothing of the model is changed.

    Args:
        model: any module.

    Raises:
        FrozenWeightsChanged: names what changed, and why.

    Example:
        >>> model = nn.Linear(2, 2).requires_grad_(False)
        >>> with assert_frozen(model):
        ...     _ = model(model.weight)
        >>> with assert_frozen(model):
        ...     _ = model.bias.data.add_(1)
        Traceback (most recent call last):
        ...
        lightning_freeze.errors.FrozenWeightsChanged: [frozen-changed] bias changed although \
frozen (epoch 0, step 0, rank 0). No optimizer holds it and its version didn't change: it was \
written through `.data` or from outside of autograd. Find code that writes `.data` of this tensor.
    """
    ledger = Ledger(model)
    yield
    frozen = {n for n, first in ledger.index.canonical.items() if first in ledger.declared.frozen}
    findings = [
        seen.at(0, 0, 0)
        for seen in ledger.check(flags=False)
        if seen.code in CHANGED
        or (seen.code in ("parameter-replaced", "tie-split") and frozen.intersection(seen.names))
    ]
    if findings:
        raise FrozenWeightsChanged("\n".join(map(str, findings)), findings)
