"""Which tensors were re-initialised, and with which bytes: a note on the tensor itself.

A copy of a model is another one: copies of tensors don't have the note.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from lightning_freeze.fingerprint import fingerprint

_NOTE = "_reinitialized_by_lightning_freeze"


def remember(tensor: Tensor, digest: str) -> None:
    """Note that a tensor was given a fresh start.

    Args:
        tensor: the Parameter itself.
        digest: its `fingerprint` right after.
    """
    setattr(tensor, _NOTE, digest)


def forget(tensors: Iterable[Tensor]) -> None:
    """Drop what is noted, as where a resume's weights have taken the place of fresh values."""
    for tensor in tensors:
        vars(tensor).pop(_NOTE, None)


def is_renewed(tensor: Tensor) -> bool:
    """Whether a tensor was re-initialised, whatever became of it since."""
    return hasattr(tensor, _NOTE)


def is_still_fresh(tensor: Tensor) -> bool:
    """Whether a re-initialised tensor has the bytes that it was given then."""
    noted = getattr(tensor, _NOTE, None)
    return noted is not None and tensor.device.type != "meta" and noted == fingerprint(tensor)
