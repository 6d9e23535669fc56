"""The numbers of a tensor, whatever its layout and however it is spread over ranks."""

from __future__ import annotations

import torch
from torch import Tensor


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, and a sparse tensor as a dense one; others as they are."""
    part = getattr(tensor, "to_local", None)
    here = (part() if callable(part) else tensor).detach()
    return here if here.layout == torch.strided else here.to_dense()


def all_zero(tensor: Tensor) -> bool:
    """Whether every number in a tensor is zero."""
    if tensor.layout == torch.sparse_coo:  # not as a dense one: an embedding is large
        tensor = tensor.detach().coalesce().values()
    return not bool(local(tensor).any())
