"""FLOPs of a real training step on real tensors, and by hand: what the count is compared with."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def really_counted(
    model: nn.Module,
    stages: Sequence[Collection[str]],
    call: Callable[[], Any],
    root: Callable[[Any], Tensor] = lambda output: output,
) -> list[int]:
    """A forward and a backward pass per stage, with exactly that trainable.

    Attention is computed by its definition: of the CPU's fused kernel torch counts nothing.
    """
    found = []
    for names in stages:
        for name, parameter in model.named_parameters():
            parameter.requires_grad = name in names
            parameter.grad = None
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            output = root(call())
            if output.requires_grad:
                output.sum().backward()
            found.append(counter.get_total_flops())
    for parameter in model.parameters():
        parameter.requires_grad, parameter.grad = True, None
    return found


def linears_by_hand(sizes: Sequence[int], rows: int, trains: Sequence[tuple[bool, bool]]) -> int:
    """A stack of Linears: 2 x rows x in x out forward, as much for weights, and for inputs.

    Args:
        sizes: of the layers' inputs, then of the last one's output.
        rows: samples.
        trains: weight and bias of each layer.
    """
    total = 0
    for layer, (width, height) in enumerate(pairwise(sizes)):
        once = 2 * rows * width * height
        below = any(weight or bias for weight, bias in trains[:layer])
        total += once + once * trains[layer][0] + once * below
    return total


def state_of(model: nn.Module) -> Mapping[str, Any]:
    """All of a model that a look at it might change."""
    return {
        "flags": [p.requires_grad for p in model.parameters()],
        "grads": [None if p.grad is None else id(p.grad) for p in model.parameters()],
        "versions": [t._version for t in (*model.parameters(), *model.buffers())],
        "identities": [id(t) for t in (*model.parameters(), *model.buffers())],
        "devices": [t.device for t in (*model.parameters(), *model.buffers())],
        "modes": [module.training for module in model.modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "hooks": [len(module._forward_hooks) for module in model.modules()],
        "random": torch.get_rng_state().tolist(),
    }
