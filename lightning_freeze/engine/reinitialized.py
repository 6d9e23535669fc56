"""Which tensors were re-initialised, and with which bytes: a record that outlives no tensor."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_freeze.fingerprint import fingerprint

# by identity, and weak: a copy of a model is another one, and a model that is gone is forgotten
_fresh: Any = WeakTensorKeyDictionary()


def remember(tensor: Tensor, digest: str) -> None:
    """Note that a tensor was given a fresh start.

    Args:
        tensor: the Parameter itself.
        digest: its `fingerprint` right after.
    """
    _fresh[tensor] = digest


def forget(tensors: Iterable[Tensor]) -> None:
    """Drop what is noted, as where a resume's weights have taken the place of fresh values."""
    for tensor in tensors:
        _fresh.pop(tensor, None)


def is_renewed(tensor: Tensor) -> bool:
    """Whether a tensor was re-initialised, whatever became of it since."""
    return tensor in _fresh


def is_still_fresh(tensor: Tensor) -> bool:
    """Whether a re-initialised tensor has the bytes that it was given then."""
    return tensor.device.type != "meta" and _fresh.get(tensor) == fingerprint(tensor)
