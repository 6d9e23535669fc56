"""Every module and parameter of a model as objects: a quick way to see that all are the same."""

from __future__ import annotations

import operator

from torch import nn

from lightning_freeze.model.index import peel


class Roster:
    """Who belonged to a model at one moment.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> roster = Roster(model)
        >>> roster.fits(model)
        True
        >>> model[0].weight = nn.Parameter(model[0].weight.detach().clone())
        >>> roster.fits(model)
        False
    """

    __slots__ = ("_modules", "_parameters")

    def __init__(self, model: nn.Module) -> None:
        self._modules: list[nn.Module] = []
        self._parameters: list[nn.Parameter] = []
        _walk(peel(model), self._modules, self._parameters)

    def fits(self, model: nn.Module) -> bool:
        """Whether a model has just these objects in just this order."""
        modules: list[nn.Module] = []
        parameters: list[nn.Parameter] = []
        _walk(peel(model), modules, parameters)
        return (
            len(modules) == len(self._modules)
            and len(parameters) == len(self._parameters)
            and all(map(operator.is_, modules, self._modules))
            and all(map(operator.is_, parameters, self._parameters))
        )


def _walk(module: nn.Module, modules: list[nn.Module], parameters: list[nn.Parameter]) -> None:
    modules.append(module)
    parameters += [p for p in module._parameters.values() if p is not None]
    for child in module._modules.values():
        if child is not None:
            _walk(child, modules, parameters)
