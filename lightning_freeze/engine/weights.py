"""The only writer of weights: a fresh start for tensors, in the model's own way."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Union

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

from lightning_freeze.engine.computed import Computed, computed_in, stand_in
from lightning_freeze.engine.distributed import from_all_ranks
from lightning_freeze.engine.reinitialized import remember
from lightning_freeze.engine.sharded import is_sharded, whole
from lightning_freeze.errors import ArgumentError, ReinitError
from lightning_freeze.fingerprint import fingerprint
from lightning_freeze.model.index import ModelIndex
from lightning_freeze.model.selectors import Selectors, describe, select

Init = Union[str, Callable[[str, nn.Parameter], None]]

_FLAG = "_is_hf_initialized"


def reinit(
    model: nn.Module, selectors: Selectors, *, init: Init = "model", seed: int | None = None
) -> tuple[str, ...]:
    """Give tensors a fresh start, in the way in which the model initialises itself.

    In a transformers model that is the nearest `PreTrainedModel`'s ``_init_weights``, elsewhere
    each module's ``reset_parameters()``. transformers marks loaded tensors so that its own init
    functions skip them in silence; that mark is dropped for the chosen tensors alone. Parameter
    objects stay the same, so ties and optimizers survive, and every other tensor keeps its bytes.
    Of a layer with a parametrization, or a weight or spectral norm of the older kind, what its
    weight is computed from is set so that it computes a fresh one.

    Args:
        model: any module; it is changed in place.
        selectors: modules or single tensors; see `lightning_freeze.selectors`.
        init: "model", or a callable ``(name, parameter) -> None`` that writes each tensor.
        seed: for the random values; torch's global generator where None. The global generator
            isn't disturbed by a seed.

    Returns:
        The names of the tensors.

    Raises:
        SelectorError: a selector matches nothing.
        ReinitError: a module has no way to initialise itself, or nothing changed; the model is
            left as it was.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
        >>> reinit(model, "1", seed=0)
        ('1.weight', '1.bias')

    Re-initialising the top layers: Zhang et al. 2021, "Revisiting Few-sample BERT Fine-tuning"
    (https://arxiv.org/abs/2006.05987).
    """
    check_init(init)
    index = ModelIndex.of(model)
    names = select(index, selectors)
    reinit_names(index, names, init=init, seed=seed)
    return names


def check_init(init: Any) -> None:
    """Raise an `ArgumentError` unless `init` is "model" or a callable."""
    if init != "model" and not callable(init):
        raise ArgumentError(
            f'`init` is {init!r}. Write "model", or a callable (name, parameter) -> None such as '
            "`lambda name, p: torch.nn.init.normal_(p, std=0.02)`."
        )


def reinit_names(
    index: ModelIndex, names: Iterable[str], *, init: Init = "model", seed: int | None = None
) -> None:
    """`reinit` for canonical names of a model that is already indexed."""
    chosen = {name: index.parameters[name] for name in names}
    if init == "model":
        check_possible(index, chosen)
    for name, parameter in chosen.items():
        if is_lazy(parameter):
            raise ReinitError(
                f"`{name}` is of a lazy layer that has seen no input: its first one initialises "
                "it. Leave it out, or call `forward` with a batch first."
            )
        if parameter.device.type == "meta":
            raise ReinitError(f"`{name}` is on the meta device. Load the weights first.")
    kept = {name: parameter.detach().clone() for name, parameter in chosen.items()}
    before = {name: fingerprint(tensor) for name, tensor in kept.items()}
    buffers = _buffers(index.modules[path] for path in _owners(index, chosen))
    try:
        with (
            torch.no_grad(),
            _seeded(seed, kept.values()),
            whole(index, chosen) as written,
        ):
            if callable(init):
                for name, parameter in written.items():
                    init(name, parameter)
            else:
                _by_model(index, written)
        after = {name: fingerprint(parameter) for name, parameter in chosen.items()}
        changed = any(after[name] != before[name] for name in chosen) or any(
            not torch.equal(module.get_buffer(key), value) for module, key, _, value in buffers
        )
        sharded = any(is_sharded(parameter) for parameter in chosen.values())
        if not (any(from_all_ranks(changed, "re-initialised shards")) if sharded else changed):
            how = "the model's own init" if init == "model" else f"`{describe(init)}`"
            raise ReinitError(
                f"Re-initialising changed nothing: {how} left the bytes of all {len(chosen)} "
                f"tensors as they were ({', '.join(list(chosen)[:3])}, ...). Give an `init` "
                "that writes into the parameter, such as "
                "`lambda name, p: torch.nn.init.normal_(p, std=0.02)`."
            )
    except BaseException:
        with torch.no_grad():
            for name, tensor in kept.items():
                chosen[name].copy_(tensor)
            for module, key, buffer, value in buffers:
                module._buffers[key] = buffer.copy_(value)
        raise
    for name, digest in after.items():
        remember(chosen[name], digest)


def check_possible(index: ModelIndex, names: Iterable[str]) -> None:
    """Raise a `ReinitError` for a module that has no way to initialise itself."""
    for name in names:
        path = _owner(index, name)
        if _pretrained(index, path) is None and _reset(index.modules[path]) is None:
            kind = type(index.modules[path]).__name__
            raise ReinitError(
                f"`{name}` can't be re-initialised: its module `{path}` ({kind}) has no "
                "`reset_parameters()` and is in no transformers model. Give `init`, a callable "
                "(name, parameter) -> None, or write `reset_parameters()` for the module."
            )


def _owner(index: ModelIndex, name: str) -> str:
    """Path of the module that initialises a tensor: of one under a parametrization, that above."""
    path = index.owner(name)
    if isinstance(index.modules[path], ParametrizationList):
        return index.owner(index.owner(path))
    return path


def _owners(index: ModelIndex, names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(_owner(index, name) for name in names))


def _buffers(modules: Iterable[nn.Module]) -> list[tuple[nn.Module, str, Tensor, Tensor]]:
    """Buffers of modules and of their parametrizations, and a copy of each."""
    parts = [
        part
        for module in modules
        for part in (module, *(getattr(module, "parametrizations", None) or nn.Module()).modules())
    ]
    return [
        (part, key, buffer, buffer.clone())
        for part in parts
        for key, buffer in part._buffers.items()
        if buffer is not None
    ]


def _reset(module: nn.Module) -> Any:
    found = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
    return found if callable(found) else None


def _pretrained(index: ModelIndex, path: str) -> Any:
    """The nearest enclosing transformers model, the module itself included."""
    while True:
        module = index.modules[path]
        if hasattr(type(module), "base_model_prefix") and hasattr(module, "_init_weights"):
            return module
        if not path:
            return None
        path = path.rpartition(".")[0]


@contextmanager
def _seeded(seed: int | None, tensors: Iterable[Tensor]) -> Iterator[None]:
    if seed is None:
        yield
        return
    devices = {t.device for t in tensors if t.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        torch.manual_seed(seed)
        yield


def _by_model(index: ModelIndex, chosen: dict[str, nn.Parameter]) -> None:
    paths = _owners(index, chosen)
    marked = {id(parameter) for parameter in chosen.values()}
    computed = {path: computed_in(index.modules[path]) for path in paths}
    plain = {path: stand_in(index.modules[path], computed[path]) for path in paths}

    def write(path: str, init: Callable[[nn.Module], Any]) -> None:
        init(plain.get(path, index.modules[path]))
        for tensor in computed.get(path, ()):
            tensor.write(plain[path]._parameters[tensor.name], marked)

    # NaN first: an init function that skips a tensor is then seen, even where the fresh value
    # happens to be the old one, as with a LayerNorm's ones
    for parameter in chosen.values():
        if parameter.is_floating_point():
            parameter.fill_(float("nan"))
    with ExitStack() as stack:
        for path in paths:
            kept = _kept(index.modules[path], plain[path], computed[path], marked)
            stack.enter_context(kept)
        inside = {path: None for path in paths if _pretrained(index, path) is not None}
        outside = [path for path in paths if path not in inside]
        for path in sorted(outside, key=_depth, reverse=True):
            write(path, lambda module: _reset(module)())
        if inside:
            stack.enter_context(_transformers_marks(index, list(inside), marked))
            for path in _innermost_first(index, list(inside)):
                write(path, _pretrained(index, path)._init_weights)
    skipped = [n for n, p in chosen.items() if p.is_floating_point() and bool(p.isnan().any())]
    if skipped:
        path = index.owner(skipped[0])
        raise ReinitError(
            f"The model's own init doesn't write `{skipped[0]}` (in a "
            f"{type(index.modules[path]).__name__}), so it can't be re-initialised that way. Give "
            "`init`, a callable (name, parameter) -> None."
        )


@contextmanager
def _kept(
    module: nn.Module, plain: nn.Module, computed: Iterable[Computed], marked: set[int]
) -> Iterator[None]:
    """Put back what an init function wrote beside the chosen tensors.

    Buffers of a module all of whose own parameters are chosen (batch-norm statistics) may change,
    and those that belong to a tensor that is computed from chosen ones.
    """
    own = [p for p in module._parameters.values() if p is not None]
    whole = bool(own) and all(id(p) in marked for p in own)
    kept: list[tuple[Tensor, Tensor]] = []
    for parameter in module.parameters():
        if id(parameter) not in marked:
            kept.append((parameter, parameter.detach().clone()))
    spared = {id(b) for b in module._buffers.values()} if whole else set()
    for made in computed:
        if any(id(p) in marked for p in made.sources):
            spared.update(map(id, made.buffers))
    for buffer in module.buffers():
        if id(buffer) not in spared:
            kept.append((buffer, buffer.clone()))
    registered = [(part, dict(part._parameters)) for part in (plain, *module.modules())]
    try:
        yield
    finally:
        for tensor, value in kept:
            tensor.data.copy_(value)
        for part, before in registered:
            _put_back(part, before, marked)


def _put_back(module: nn.Module, before: dict[str, Any], marked: set[int]) -> None:
    """Undo that an init function made new Parameters, and keep the values it gave them."""
    for name, parameter in before.items():
        new = module._parameters.get(name)
        if parameter is None or new is parameter:
            continue
        if id(parameter) in marked and new is not None and new.shape == parameter.shape:
            parameter.data.copy_(new.data)
        module._parameters[name] = parameter


@contextmanager
def _transformers_marks(index: ModelIndex, paths: list[str], marked: set[int]) -> Iterator[None]:
    """Transformers' "is initialised" mark on every tensor but the chosen ones, and on no module."""
    roots = {id(_pretrained(index, path)): _pretrained(index, path) for path in paths}
    before: dict[int, tuple[Any, Any]] = {}
    for root in roots.values():
        items: list[Any] = [*root.parameters(), *root.buffers(), *root.modules()]
        for item in items:
            before[id(item)] = (item, item.__dict__.get(_FLAG))
            chosen = id(item) in marked or isinstance(item, nn.Module)
            item.__dict__.pop(_FLAG, None) if chosen else setattr(item, _FLAG, True)
    for path in paths:
        module = index.modules[path]
        for buffer in module._buffers.values():
            if buffer is not None and all(id(p) in marked for p in module._parameters.values()):
                buffer.__dict__.pop(_FLAG, None)
    library = sys.modules.get("transformers.initialization")
    guard = getattr(library, "guard_torch_init_functions", None)
    try:
        with guard() if guard else ExitStack():
            yield
    finally:
        for item, flag in before.values():
            if flag is None:
                item.__dict__.pop(_FLAG, None)
            else:
                setattr(item, _FLAG, flag)


def _innermost_first(index: ModelIndex, paths: list[str]) -> list[str]:
    """The modules of the chosen tensors, then those around them that may refine the result.

    GPT-2 scales a projection from the attention module around it. Only where init functions
    heed the mark (transformers 5) may the modules around be asked.
    """
    wanted = dict.fromkeys(paths)  # in model order: a seed gives the same draws in any process
    if "transformers.initialization" in sys.modules:
        for path in paths:
            root = _pretrained(index, path)
            while index.modules[path] is not root:
                path = path.rpartition(".")[0]
                wanted[path] = None
    return sorted(wanted, key=_depth, reverse=True)


def _depth(path: str) -> int:
    return len(path.split(".")) if path else 0
