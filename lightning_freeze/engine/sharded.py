"""Tensors that are sharded over ranks (DTensor): this rank's part, and whole for a while."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_freeze.model.index import ModelIndex


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor."""
    return hasattr(tensor, "to_local") and hasattr(tensor, "device_mesh")


@contextmanager
def whole(
    index: ModelIndex, names: Mapping[str, nn.Parameter]
) -> Iterator[dict[str, nn.Parameter]]:
    """Inside, sharded parameters stand in their modules as whole ones; afterwards, their shards.

    What is written to the whole tensors, the same on every rank, ends up in the shards: the
    result doesn't depend on how many ranks there are.

    Args:
        index: the model.
        names: name -> parameter, of those that are to be written.

    Yields:
        Name -> the parameter to write.
    """
    shards = {name: p for name, p in names.items() if is_sharded(p)}
    full = {
        name: nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device=p.device), p.requires_grad)
        for name, p in shards.items()
    }
    by_id = {id(p): full[name] for name, p in shards.items()}
    places = [
        (module, key, parameter)
        for module in {id(m): m for m in index.modules.values()}.values()
        for key, parameter in module._parameters.items()
        if parameter is not None and id(parameter) in by_id
    ]
    for module, key, parameter in places:
        module._parameters[key] = by_id[id(parameter)]
    try:
        yield {name: full.get(name, parameter) for name, parameter in names.items()}
    finally:
        for module, key, parameter in places:
            module._parameters[key] = parameter
    for name, shard in shards.items():
        _write(shard, full[name])


@torch.no_grad()
def _write(shard: Any, full: Tensor) -> None:
    """Every rank takes its own part of what it has drawn itself."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh = shard.device_mesh
    everywhere = DTensor.from_local(full.detach(), mesh, [Replicate()] * mesh.ndim, run_check=False)
    shard.copy_(everywhere.redistribute(mesh, shard.placements))
