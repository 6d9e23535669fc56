"""Model -> one name per tensor: wrappers stripped, ties resolved by identity."""

from __future__ import annotations

import operator
from array import array
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

# what torch's and Fabric's wrappers call what they wrap; of Fabric's two the second is the user's
_WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_original_module")
_WRAPPERS = frozenset({*_WRAPPED, "_forward_module"})


def clean(name: str) -> str:
    """Drop the components that wrappers put into a dotted name.

    >>> clean("model._orig_mod.layer.1.weight")
    'model.layer.1.weight'
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside of torch.compile's, FSDP's and Fabric's wrappers; any other as it is."""
    while _WRAPPERS.issuperset(module._modules.keys()):
        inside = next((key for key in _WRAPPED if key in module._modules), None)
        if inside is None:
            break
        module = module.get_submodule(inside)
    return module


def class_names(module: nn.Module) -> tuple[str, ...]:
    """Names of a module's class and of its bases; of TorchScript's, that of the class it was."""
    if isinstance(module, torch.jit.ScriptModule):
        return (getattr(module, "original_name", type(module).__name__),)
    return tuple(kind.__name__ for kind in type(module).__mro__)


def size_of(tensor: Tensor) -> int:
    """Number of elements; none of a lazy layer's tensor before its first input."""
    return 0 if is_lazy(tensor) else tensor.numel()


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    """Dimensions; (0,) of a lazy layer's tensor before its first input."""
    return (0,) if is_lazy(tensor) else tuple(tensor.shape)


def some(names: Sequence[str], most: int = 4) -> str:
    """Names for a message, the first few of them.

    >>> some(["a", "b", "c"], most=2)
    'a, b and 1 more'
    """
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def named_tensors(model: nn.Module) -> tuple[list[str], list[Tensor]]:
    """Names and tensors of all parameters, then of all buffers; tied ones once for each name."""
    found = Members.of(model)
    buffers = found.buffers()
    return found.names + [n for n, _ in buffers], [*found.parameters, *(b for _, b in buffers)]


def peel(model: nn.Module) -> nn.Module:
    """The model inside of any wrappers, DistributedDataParallel and the like among them."""
    while True:
        model = unwrap(model)
        parallel = (
            set(model._modules.keys()) == {"module"}
            and not len(model._parameters)
            and type(model).__module__.startswith(("torch.", "lightning", "pytorch_lightning"))
        )
        if not parallel:
            return model
        model = model.get_submodule("module")


class Members:
    """All that hangs from a module, in the order of `named_parameters`, in one quick walk.

    Attributes:
        names: of the parameters, as torch gives them, without wrappers' components.
        parameters: one for each name: a tied tensor stands here several times.
        paths: of the modules; the model itself is "".
        modules: one for each path; wrappers aren't among them.
        begins: for each module, the position in `names` of the first parameter under it.
        ends: the position behind its last one.
        kinds: the class that each module, then each parameter was of: lazy layers,
            parametrizations and sharding change it in place.
    """

    __slots__ = (
        "_without", "begins", "ends", "kinds", "modules", "names", "parameters", "paths",
    )  # fmt: skip

    def __init__(self) -> None:
        self.names: list[str] = []
        self.parameters: list[nn.Parameter] = []
        self.paths: list[str] = []
        self.modules: list[nn.Module] = []
        self.begins = array("q")
        self.ends = array("q")
        self.kinds: list[type] = []
        self._without: frozenset[int] = frozenset()

    @classmethod
    def of(cls, model: nn.Module, without: Iterable[nn.Module] = ()) -> Members:
        """Walk a model, but for some of its modules."""
        found = cls()
        found._without = frozenset(map(id, without))
        found._walk(peel(model), "")
        found.kinds = [*map(type, found.modules), *map(type, found.parameters)]
        return found

    def _walk(self, module: nn.Module, path: str) -> None:
        names, place, prefix = self.names, len(self.paths), f"{path}." if path else ""
        self.paths.append(path)
        self.modules.append(module)
        self.begins.append(len(names))
        self.ends.append(0)
        for key, parameter in module._parameters.items():
            if parameter is not None:
                names.append(prefix + key)
                self.parameters.append(parameter)
        for key, child in module._modules.items():
            inner = None if child is None else unwrap(child)
            if inner is not None and id(inner) not in self._without:
                self._walk(inner, prefix + key)
        self.ends[place] = len(names)

    def buffers(self) -> list[tuple[str, Tensor]]:
        """Names and buffers, in the order of `named_buffers`; tied ones once for each name."""
        return [
            (f"{path}.{key}" if path else key, buffer)
            for path, module in zip(self.paths, self.modules)
            for key, buffer in module._buffers.items()
            if buffer is not None
        ]

    def same(self, other: Members) -> bool:
        """Whether two walks met the same objects under the same names, and each of its class."""
        return (
            self.names == other.names
            and self.paths == other.paths
            and self.ends == other.ends
            and self.kinds == other.kinds
            and all(map(operator.is_, self.parameters, other.parameters))
            and all(map(operator.is_, self.modules, other.modules))
        )


@dataclass(frozen=True)
class ModelIndex:
    """The names of one model, and what they stand for.

    A tensor with several names (a tie) is indexed once, under its first name; the others are its
    aliases. Build it with `ModelIndex.of`.

    Attributes:
        parameters: name -> parameter, one entry per tensor, in the order of registration.
        canonical: every parameter name, aliases included -> the name in `parameters`.
        modules: every module name -> module; the model itself is "".
        members: what the walk met.
    """

    parameters: dict[str, nn.Parameter]
    canonical: dict[str, str]
    modules: dict[str, nn.Module]
    members: Members = field(repr=False, compare=False)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        known: ModelIndex | None = None,
        *,
        without: Iterable[nn.Module] = (),
    ) -> ModelIndex:
        """Index `model`.

        Args:
            model: any module.
            known: an index of it from before. It is returned, with what was found out with it, if
                the model still has the same objects in the same places; it is walked in any case.
            without: modules that are left out with all that is in them.

        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> model[1].weight = model[0].weight
        >>> ModelIndex.of(model).aliases
        {'0.weight': ('1.weight',)}
        """
        found = Members.of(model, without)
        if known is not None and known.members.same(found):
            return known
        parameters: dict[str, nn.Parameter] = {}
        canonical: dict[str, str] = {}
        first_name: dict[int, str] = {}
        for name, parameter in zip(found.names, found.parameters):
            first = first_name.setdefault(id(parameter), name)
            if first is name:
                parameters[name] = parameter
            canonical[name] = first
        return cls(parameters, canonical, dict(zip(found.paths, found.modules)), found)

    @cached_property
    def aliases(self) -> dict[str, tuple[str, ...]]:
        """Canonical name -> its other names, for tied tensors only."""
        found: dict[str, list[str]] = {}
        for name, first in self.canonical.items():
            if name != first:
                found.setdefault(first, []).append(name)
        return {first: tuple(names) for first, names in found.items()}

    @cached_property
    def found(self) -> dict[str, Any]:
        """What was found out about the model by whoever asked, such as its anatomy."""
        return {}

    def forget(self) -> None:
        """Drop what is worked out again when it is asked for; a fit may be long."""
        for made in _MADE:
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
        """Id of a module -> canonical names of the parameters in its subtree, once asked for."""
        return {}

    @cached_property
    def _places(self) -> dict[int, int]:
        """Id of a module -> its place in the walk."""
        return {id(module): place for place, module in enumerate(self.members.modules)}

    @cached_property
    def _firsts(self) -> list[str]:
        return [self.canonical[name] for name in self.members.names]

    def within(self, module: nn.Module) -> tuple[str, ...]:
        """Canonical names of the parameters in a module's subtree."""
        key = id(unwrap(module))
        names = self._own.get(key)
        if names is None:
            place = self._places[key]
            begin, end = self.members.begins[place], self.members.ends[place]
            names = self._own[key] = tuple(dict.fromkeys(self._firsts[begin:end]))
        return names

    def held(self, names: Container[str]) -> Iterator[tuple[str, int, int]]:
        """For each module: its path, how many parameters it holds, and how many of some of them.

        One pass, however deep the modules are nested. A tied tensor counts once for each name.

        Args:
            names: canonical ones.

        >>> index = ModelIndex.of(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
        >>> list(index.held({"0.bias"}))
        [('', 2, 1), ('0', 2, 1), ('1', 0, 0)]
        """
        before = [0, *accumulate(name in names for name in self._firsts)]
        begins, ends = self.members.begins, self.members.ends
        # few objects are made: more would set off the garbage collector, which looks at all
        for path, place in dict(zip(self.members.paths, range(len(ends)))).items():
            begin, end = begins[place], ends[place]
            yield path, end - begin, before[end] - before[begin]

    def holds(self, module: nn.Module) -> bool:
        """Whether there are parameters in a module's subtree."""
        place = self._places[id(unwrap(module))]
        return self.members.ends[place] > self.members.begins[place]

    @cached_property
    def kinds(self) -> frozenset[type]:
        """The classes that its modules and parameters are of."""
        return frozenset(self.members.kinds)

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
            if full in self.modules and self.holds(child):
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

    def called(self, path: str) -> str:
        """The path of a module, or of the outermost TorchScript module around it.

        A hook on what is inside of one doesn't run: Python sees no more than its own call.
        """
        parts = path.split(".") if path else []
        around = [".".join(parts[:depth]) for depth in range(len(parts) + 1)]
        scripted = (p for p in around if isinstance(self.modules[p], torch.jit.ScriptModule))
        return next(scripted, path)

    def owner(self, name: str) -> str:
        """The module name that a parameter name hangs from."""
        return name.rpartition(".")[0]

    def tensors(self, names: Iterable[str]) -> list[Tensor]:
        """The parameters behind some canonical names."""
        return [self.parameters[name] for name in names]


_MADE = tuple(name for name, made in vars(ModelIndex).items() if isinstance(made, cached_property))
