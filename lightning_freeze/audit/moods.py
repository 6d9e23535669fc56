"""Does it matter to a module whether it is in train or in eval mode?"""

from __future__ import annotations

from functools import cache
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import nn

from lightning_freeze.engine.flags import graph_of, is_batch_norm

_DROPPING = (nn.MultiheadAttention, nn.RNNBase)


def minds_its_mode(module: nn.Module) -> bool:
    """Whether a module itself, apart from what it holds, may behave otherwise in eval mode.

    Of torch's modules it is known; another one may if any of its methods, or its TorchScript
    graph, reads `training`.

    >>> minds_its_mode(nn.Linear(2, 2)), minds_its_mode(nn.Dropout(0.0)), minds_its_mode(nn.RReLU())
    (False, False, True)
    """
    if is_dropout(module):
        return bool(getattr(module, "p", None))
    if isinstance(module, _DROPPING):
        return bool(module.dropout)
    if is_batch_norm(module) or isinstance(module, nn.modules.instancenorm._InstanceNorm):
        return getattr(module, "running_mean", None) is not None
    if isinstance(module, torch.jit.ScriptModule):
        return "training" in str(graph_of(module))
    # hooks: spectral norm of the older kind
    kind: Any = type(module)
    return bool(module._forward_pre_hooks) or _reads_training(kind)


def is_dropout(module: nn.Module) -> bool:
    """True for dropout of any kind."""
    return isinstance(module, nn.modules.dropout._DropoutNd)


@cache
def _reads_training(kind: Any) -> bool:
    for owner in kind.__mro__:
        if owner is nn.Module:
            return False
        for value in vars(owner).values():
            function = getattr(value, "__func__", value)
            if isinstance(function, FunctionType) and _names_training(function.__code__):
                return True
    return False


def _names_training(code: CodeType) -> bool:
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return "training" in code.co_names or any(map(_names_training, inner))
