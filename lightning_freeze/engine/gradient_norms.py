"""Norms of the gradients of layers, added up over optimizer steps on the device."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Optional

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_freeze.engine.sharded import is_sharded


class GradientNorms:
    """The mean over optimizer steps of each layer's gradient norm.

    Nothing waits for the device until the means are asked for, and nothing but two numbers for
    each layer is kept. A step in which a layer's gradient isn't finite is left out: a gradient
    scaler leaves it out, too. The norm is that of all elements (L2): the sum of absolute values
    takes 15 to 60 times as long on a CPU.

    Args:
        layers: the parameters of each, bottom to top.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> norms = GradientNorms([tuple(layer.parameters())])
        >>> layer.weight.grad = torch.tensor([[3.0, -4.0]])
        >>> norms.read({id(layer.weight)})
        >>> norms.means()
        [5.0]
    """

    def __init__(self, layers: Sequence[Sequence[nn.Parameter]]) -> None:
        self.layers = layers
        device = layers[0][0].device
        self._totals = torch.zeros(len(layers), device=device)
        self._steps = torch.zeros(len(layers), device=device)

    def read(self, held: Collection[int], *, first: int = 0, scale: float = 1.0) -> None:
        """Add the gradients as they are now.

        Args:
            held: ids of the parameters that are about to be updated.
            first: the lowest layer to read.
            scale: what a gradient scaler has multiplied the gradients by.
        """
        places: list[int] = []
        sizes: list[int] = []
        found: list[Tensor] = []
        for place, layer in enumerate(self.layers[first:], first):
            own = [p.grad for p in layer if p.grad is not None and id(p) in held]
            if own:
                places.append(place)
                sizes.append(len(own))
                found += own
        if not found:
            return
        each = _norms([_local(gradient) for gradient in found], self._totals.device)
        squares = torch.stack([part.sum() for part in torch.split((each / scale).square(), sizes)])
        if any(is_sharded(gradient) for gradient in found):
            dist.all_reduce(squares)  # the gradient as a whole, the same on every rank
        norms = squares.sqrt()
        usable = torch.isfinite(norms)
        self._totals[places] += torch.where(usable, norms, 0.0)
        self._steps[places] += usable

    def means(self) -> list[Optional[float]]:
        """Each layer's mean, None where no step had a gradient of it."""
        pairs = zip(self._totals.tolist(), self._steps.tolist())
        return [total / steps if steps else None for total, steps in pairs]

    def clear(self) -> None:
        """Begin anew."""
        self._totals.zero_()
        self._steps.zero_()

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"totals": self._totals.tolist(), "steps": self._steps.tolist()}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Go on from what a checkpoint has."""
        self._totals.copy_(torch.tensor(saved["totals"]))
        self._steps.copy_(torch.tensor(saved["steps"]))


def _local(gradient: Tensor) -> Tensor:
    """This rank's part of a DTensor; the values of a sparse tensor."""
    if is_sharded(gradient):
        gradient = gradient.to_local()  # type: ignore[attr-defined]
    return gradient.coalesce().values() if gradient.is_sparse else gradient


def _norms(gradients: list[Tensor], device: torch.device) -> Tensor:
    """One number for each, in float32: float16 would overflow."""
    if all(g.dtype == torch.float32 and g.device == device for g in gradients):
        return torch.stack(list(torch._foreach_norm(gradients)))
    low = (torch.float16, torch.bfloat16)
    norms = [
        torch.linalg.vector_norm(g, dtype=torch.float32 if g.dtype in low else None)
        for g in gradients
    ]
    return torch.stack([each.to(device, torch.float32) for each in norms])
