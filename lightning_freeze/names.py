"""Model -> one name per tensor: wrappers stripped, ties resolved by identity."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, nn

_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


def clean(name: str) -> str:
    """Drop the components that torch's wrappers put into a dotted name.

    >>> clean("model._orig_mod.layer.1.weight")
    'model.layer.1.weight'
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside of torch.compile's and FSDP's wrappers; any other as it is."""
    while inside := _WRAPPERS.intersection(module._modules):
        module = module.get_submodule(min(inside))
    return module


def some(names: Sequence[str], most: int = 4) -> str:
    """Names for a message, the first few of them.

    >>> some(["a", "b", "c"], most=2)
    'a, b and 1 more'
    """
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def _is_wrapper(module: nn.Module) -> bool:
    """True for DistributedDataParallel, DataParallel, AveragedModel: all under one `module`."""
    return (
        set(module._modules) == {"module"}
        and not module._parameters
        and type(module).__module__.startswith(("torch.", "lightning", "pytorch_lightning"))
    )


def named_tensors(model: nn.Module) -> tuple[list[str], list[Tensor]]:
    """Names and tensors of all parameters, then of all buffers; tied ones once for each name."""
    found = Members.of(peel(model))
    return found.names + found.buffer_names, [*found.parameters, *found.buffers]


def peel(model: nn.Module) -> nn.Module:
    """The model inside of DistributedDataParallel and the like."""
    while _is_wrapper(model):
        model = model.get_submodule("module")
    return model


class Members:
    """All that hangs from a module, in the order of `named_parameters`, in one quick walk.

    Attributes:
        names: of the parameters, as torch gives them, without wrappers' components.
        parameters: one for each name: a tied tensor stands here several times.
        buffer_names: of the buffers.
        buffers: one for each name.
        paths: of the modules; the model itself is "".
        modules: one for each path. A wrapper and what it wraps share one.
    """

    __slots__ = ("buffer_names", "buffers", "modules", "names", "parameters", "paths")

    def __init__(self) -> None:
        self.names: list[str] = []
        self.parameters: list[nn.Parameter] = []
        self.buffer_names: list[str] = []
        self.buffers: list[Tensor] = []
        self.paths: list[str] = []
        self.modules: list[nn.Module] = []

    @classmethod
    def of(cls, model: nn.Module) -> Members:
        """Walk a model."""
        found = cls()
        found._walk(model, "", "")
        return found

    def _walk(self, module: nn.Module, path: str, prefix: str) -> None:
        self.paths.append(path)
        self.modules.append(module)
        for key, parameter in module._parameters.items():
            if parameter is not None:
                self.names.append(prefix + key)
                self.parameters.append(parameter)
        for key, buffer in module._buffers.items():
            if buffer is not None:
                self.buffer_names.append(prefix + key)
                self.buffers.append(buffer)
        for key, child in module._modules.items():
            if child is None:
                continue
            if key in _WRAPPERS:
                self._walk(child, path, prefix)
            else:
                self._walk(child, prefix + key, f"{prefix}{key}.")


@dataclass(frozen=True)
class ModelIndex:
    """The names of one model, and what they stand for.

    A tensor with several names (a tie) is indexed once, under its first name; the others are its
    aliases. Build it with `ModelIndex.of`.

    Attributes:
        parameters: name -> parameter, one entry per tensor, in the order of registration.
        canonical: every parameter name, aliases included -> the name in `parameters`.
        modules: every module name -> module; the model itself is "".
    """

    parameters: dict[str, nn.Parameter]
    canonical: dict[str, str]
    modules: dict[str, nn.Module]

    @classmethod
    def of(cls, model: nn.Module) -> ModelIndex:
        """Index `model`.

        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> model[1].weight = model[0].weight
        >>> ModelIndex.of(model).aliases
        {'0.weight': ('1.weight',)}
        """
        found = Members.of(peel(model))
        parameters: dict[str, nn.Parameter] = {}
        canonical: dict[str, str] = {}
        first_name: dict[int, str] = {}
        for name, parameter in zip(found.names, found.parameters):
            first = first_name.setdefault(id(parameter), name)
            if first is name:
                parameters[name] = parameter
            canonical[name] = first
        # a wrapper and what it wraps share a path: the inner one comes later and wins
        return cls(parameters, canonical, dict(zip(found.paths, found.modules)))

    @cached_property
    def aliases(self) -> dict[str, tuple[str, ...]]:
        """Canonical name -> its other names, for tied tensors only."""
        found: dict[str, list[str]] = {}
        for name, first in self.canonical.items():
            if name != first:
                found.setdefault(first, []).append(name)
        return {first: tuple(names) for first, names in found.items()}

    def forget(self) -> None:
        """Drop what is worked out again when it is asked for; a fit may be long."""
        for made in ("name_of", "order", "_own", "_paths", "roots"):
            vars(self).pop(made, None)

    @cached_property
    def name_of(self) -> dict[int, str]:
        """Id of a parameter -> its canonical name."""
        return {id(parameter): name for name, parameter in self.parameters.items()}

    @cached_property
    def order(self) -> dict[str, int]:
        """Canonical name of a parameter -> its position in the model."""
        return {name: position for position, name in enumerate(self.parameters)}

    @cached_property
    def _own(self) -> dict[int, tuple[str, ...]]:
        """Id of a module -> canonical names of the parameters in its subtree."""
        return {
            id(module): tuple(
                dict.fromkeys(
                    self.name_of[id(p)] for p in module.parameters() if id(p) in self.name_of
                )
            )
            for module in self.modules.values()
        }

    def within(self, module: nn.Module) -> tuple[str, ...]:
        """Canonical names of the parameters in a module's subtree."""
        return self._own[id(unwrap(module))]

    def path(self, module: nn.Module) -> str:
        """The first name of a module of this model."""
        return self._paths[id(unwrap(module))]

    @cached_property
    def _paths(self) -> dict[int, str]:
        paths: dict[int, str] = {}
        for name, module in self.modules.items():
            paths.setdefault(id(module), name)
        return paths

    def children(self, path: str) -> list[tuple[str, nn.Module]]:
        """Direct children of the module at `path` that hold parameters, with their full names."""
        module = self.modules[path]
        found = []
        for name, child in module.named_children():
            full = clean(f"{path}.{name}" if path else name)
            if full in self.modules and self.within(child):
                found.append((full, self.modules[full]))
        return found

    @cached_property
    def roots(self) -> list[str]:
        """The model, and what it wraps as its only child with parameters, outermost first."""
        roots = [""]
        while True:
            inside = self.children(roots[-1])
            own = [p for p in self.modules[roots[-1]]._parameters.values() if p is not None]
            if len(inside) != 1 or own or isinstance(inside[0][1], nn.ModuleList):
                return roots
            roots.append(inside[0][0])

    def owner(self, name: str) -> str:
        """The module name that a parameter name hangs from."""
        return name.rpartition(".")[0]

    def tensors(self, names: Iterable[str]) -> list[Tensor]:
        """The parameters behind some canonical names."""
        return [self.parameters[name] for name in names]
