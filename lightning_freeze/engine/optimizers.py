"""The only writer of optimizer groups: the user's, without what is frozen.

Groups keep their number, order, names and options. Freezing and unfreezing filter each group's
`params` list in place, in the user's order, and the lists are whole again around saving and
loading, so that a checkpoint has the user's shape. Factors on learning rates act inside the step
alone: see `step_view`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lightning_freeze.engine.step_view import StepView
from lightning_freeze.errors import ArgumentError, ConflictError, UnsupportedError
from lightning_freeze.model.index import ModelIndex

_REFUSED = {
    "LBFGS": "it takes one parameter group, keeps a list of its own, and moves what was frozen",
    "ZeroRedundancyOptimizer": "it shards a parameter list that it fixed when it was made",
    "DeepSpeedZeroOptimizer": "it flattens the parameters when it is made",
}


@dataclass
class _List:
    """One `params` list of the user's.

    Attributes:
        params: the list itself.
        full: what it holds when nothing is frozen, in the user's order.
        shown: ids of what was left in it last; what the user adds or takes out differs from that.
        names: id of a parameter -> its entry in the group's `param_names`.
    """

    params: list[nn.Parameter]
    full: list[nn.Parameter]
    shown: set[int]
    names: dict[int, str] = field(default_factory=dict)


class OptimizerGroups:
    """The optimizers of one fit, without what is frozen.

    Attributes:
        index: names the parameters; what it doesn't know is never frozen.
        optimizers: as the trainer holds them.
        held: names of the model's parameters that any of them holds, frozen or not.
        factors: name -> factor on its learning rate, where it isn't 1.
        loaded: whether optimizer state was loaded since the last `sync`.
    """

    def __init__(
        self, index: ModelIndex, optimizers: Sequence[Optimizer], factors: Mapping[str, float]
    ) -> None:
        """Take the groups down; nothing is changed yet.

        Args:
            index: of the model.
            optimizers: the trainer's; those that they keep inside are found.
            factors: parameter name -> factor on the learning rate, 1.0 where absent.

        Raises:
            UnsupportedError: an optimizer can't be served; nothing is changed then.
        """
        self.index = index
        self.optimizers = list(optimizers)
        self.factors = {name: factor for name, factor in factors.items() if factor != 1.0}
        self.loaded = False
        self._by_id = {id(index.parameters[n]): factor for n, factor in self.factors.items()}
        self._every = with_inner(optimizers)
        own = [_stepped_by(optimizer) for optimizer in self._every]
        for optimizer, ids in zip(self._every, own):
            _check(optimizer, ids, ids & self._by_id.keys())
        self._frozen: frozenset[int] = frozenset()
        self._open = False  # whether what is frozen stands in the lists for a while
        self._held_open = False
        self._lists: dict[Any, _List] = {}
        self._born = [_state_at_birth(optimizer) for optimizer in self._every]
        self._views = [
            StepView(optimizer, self._by_id, self.settle)
            for optimizer, ids in zip(self._every, own)
            if ids and _runs_hooks(optimizer)
        ]
        self._hooks: list[Any] = []
        for optimizer in self._every:
            with suppress(AttributeError):  # one that never called torch's `__init__` has no hooks
                self._hooks += [
                    optimizer.register_state_dict_pre_hook(lambda _: self.make_whole()),
                    optimizer.register_load_state_dict_pre_hook(self._before_load),
                ]
        self.held = frozenset(
            index.name_of[id(p)]
            for lists in self.whole_lists()
            for params in lists
            for p in params
            if id(p) in index.name_of
        )

    def sync(self, frozen: frozenset[str]) -> None:
        """Take what is frozen out of the groups, and drop its state; the rest comes back.

        Args:
            frozen: names of the parameters that don't train from now on.
        """
        parameters = self.index.parameters
        self._frozen = frozenset(id(parameters[name]) for name in frozen)
        self.loaded = False
        self._show(self._frozen)
        for optimizer, born in zip(self._every, self._born):
            for parameter in [p for p in optimizer.state if id(p) in self._frozen]:
                state, kept = optimizer.state[parameter], born.get(id(parameter), ())
                if not kept:
                    del optimizer.state[parameter]
                    continue
                for key in [key for key in state if key not in kept]:
                    del state[key]

    def settle(self) -> None:
        """Before a batch or step: a checkpoint has been written or read; filter the lists again."""
        if self._open and not self._held_open:
            self._show(self._frozen)

    def make_whole(self) -> None:
        """Before saving and loading: lists as the user made them, until `settle`."""
        self._show(frozenset())

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Inside, lists stay whole, although torch.distributed.checkpoint takes a step there."""
        self._held_open = True
        self.make_whole()
        try:
            yield
        finally:
            self._held_open, self.loaded = False, True

    def stop(self) -> None:
        """At the end of the fit: whole lists, and no hooks."""
        self.make_whole()
        for view in self._views:
            view.stop()
        for hook in self._hooks:
            hook.remove()

    def whole_lists(self) -> list[list[list[nn.Parameter]]]:
        """For each of the trainer's optimizers and its groups: what it holds, frozen or not."""
        known = {id(group["params"]): found.full for group, found in self._follow()}
        return [
            [list(known[id(group["params"])]) for group in optimizer.param_groups]
            for optimizer in self.optimizers
        ]

    def check_scaler(self, frozen: frozenset[str]) -> None:
        """Refuse to freeze all that an optimizer holds where a `GradScaler` would step it.

        Args:
            frozen: names of what is frozen in a stage.

        Raises:
            ConflictError: torch would end the first step with "No inf checks were recorded".
        """
        for number, lists in enumerate(self.whole_lists()):
            held = [self.index.name_of.get(id(p)) for params in lists for p in params]
            if held and all(name in frozen for name in held):
                raise ConflictError(
                    f"All {len(held)} tensors that optimizer {number} "
                    f"({type(self.optimizers[number]).__name__}) holds are frozen in one of the "
                    "stages, and with float16 mixed precision torch's GradScaler can't step an "
                    'optimizer without gradients. Use `precision="bf16-mixed"`, or leave something '
                    "of it trainable."
                )

    def rates(self) -> dict[str, float]:
        """Name -> learning rate that it trains at, or would if it weren't frozen."""
        found = {}
        for optimizer, lists in zip(self.optimizers, self.whole_lists()):
            for group, params in zip(optimizer.param_groups, lists):
                if group.get("lr") is None:
                    continue
                for parameter in params:
                    name = self.index.name_of.get(id(parameter))
                    if name is not None:
                        found[name] = float(group["lr"]) * self.factors.get(name, 1.0)
        return found

    @property
    def steps(self) -> int:
        """How many steps of the optimizers went through this engine."""
        return sum(view.steps for view in self._views)

    def state(self) -> dict[str, Any]:
        """For the callbacks' part of a checkpoint, as plain values."""
        name_of = self.index.name_of
        return {
            "held": [
                [[name_of.get(id(p), "") for p in params] for params in lists]
                for lists in self.whole_lists()
            ],
            "factors": dict(self.factors),
            "parts": [view.state() for view in self._views],
        }

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Take over what `state` gave, beside the optimizers' own state."""
        for view, parts in zip(self._views, saved.get("parts", ())):
            view.restore(parts)

    def difference(self, saved: Mapping[str, Any]) -> str:
        """What a checkpoint has otherwise, and what to do; empty where it fits.

        torch restores optimizer state by place: tensors that lie otherwise would get one another's
        moments, and nothing would say so. A name that is gone was renamed, and is no difference.

        Args:
            saved: what `state` gave.
        """
        held = self.state()["held"]
        theirs = saved.get("held", held)
        sizes, other = ([[len(names) for names in o] for o in each] for each in (held, theirs))
        changed = (
            "The model or `configure_optimizers` have changed since: build them as that run did"
        )
        if sizes != other:
            return (
                f"its optimizer groups hold {other} tensors, those of this run {sizes}. {changed}"
            )
        for groups, saved_groups in zip(held, theirs):
            known = {name for names in groups for name in names}
            for names, saved_names in zip(groups, saved_groups):
                for mine, its in zip(names, saved_names):
                    if mine != its and its in known:
                        return (
                            f"an optimizer group of this run holds `{mine}` where the "
                            f"checkpoint's holds `{its}`. {changed}"
                        )
        factors = saved.get("factors", self.factors)
        for name in self.index.parameters:
            mine, its = self.factors.get(name, 1.0), factors.get(name, 1.0)
            if mine != its:
                return (
                    f"`{name}` trains at {its:.6g} of the learning rate there, and at {mine:.6g} "
                    "in this run. Use the `lr_decay` and `lr_scale` of the run that wrote it"
                )
        return ""

    def _before_load(self, optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
        self.loaded = True
        sizes = [len(group["params"]) for group in optimizer.param_groups]
        if [len(group["params"]) for group in saved["param_groups"]] != sizes:
            self.make_whole()

    def _follow(self) -> list[tuple[dict[str, Any], _List]]:
        """Each group with its list, after what the user has added or taken out since."""
        found = []
        for number, optimizer in enumerate(self._every):
            shown = ids_held(optimizer)
            for place, group in enumerate(optimizer.param_groups):
                now = {id(p) for p in group["params"]}
                known = self._lists.get(id(group["params"]))
                if known is None or known.params is not group["params"]:
                    known = self._lists.get((number, place))  # the user's list is a new one
                if known is None:
                    known = _List(group["params"], list(group["params"]), now)
                hidden_here = {id(p) for p in known.full} - known.shown
                known.full = [
                    p
                    for p in known.full
                    if id(p) in now or (id(p) in hidden_here and id(p) not in shown)
                ]
                kept = {id(p) for p in known.full}
                known.full += [p for p in group["params"] if id(p) not in kept]
                known.params, known.shown = group["params"], now
                self._lists[id(known.params)] = self._lists[number, place] = known
                names = group.get("param_names", ())
                if len(names) == len(now):
                    known.names.update(zip(map(id, known.params), names))
                found.append((group, known))
        return found

    def _show(self, hidden: frozenset[int]) -> None:
        for group, known in self._follow():
            known.params[:] = [p for p in known.full if id(p) not in hidden]
            known.shown = {id(p) for p in known.params}
            if "param_names" in group:
                group["param_names"] = [known.names[id(p)] for p in known.params]
        self._open = hidden != self._frozen


def with_inner(optimizers: Iterable[Any]) -> list[Any]:
    """Optimizers, and those that they keep in an attribute, or a list or dict of one."""
    found = list(optimizers)
    for optimizer in found:
        ids = ids_held(optimizer)
        for name, value in vars(optimizer).items():
            several = value.values() if isinstance(value, dict) else value
            if not isinstance(value, (dict, list, tuple)):
                several = (value,)
            if name not in ("state", "param_groups"):
                found += [
                    inner
                    for inner in several
                    if _is_optimizer(inner)
                    and ids & ids_held(inner)
                    and not any(inner is known for known in found)
                ]
    return found


def _is_optimizer(value: Any) -> bool:
    return hasattr(value, "param_groups") and hasattr(value, "step")


def ids_held(optimizer: Any) -> set[int]:
    """Ids of what stands in an optimizer's groups at present."""
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def _stepped_by(optimizer: Any) -> set[int]:
    """Ids of what an optimizer steps itself: what one inside holds, that one steps."""
    inner = with_inner([optimizer])[1:]
    return ids_held(optimizer).difference(*map(ids_held, inner))


def _runs_hooks(optimizer: Any) -> bool:
    return isinstance(optimizer, Optimizer) and "_optimizer_step_pre_hooks" in vars(optimizer)


def _state_at_birth(optimizer: Any) -> dict[int, frozenset[str]]:
    """Id of a parameter -> keys of the state that its optimizer makes when built, and never again.

    torch's own make theirs anew at the next step, all but Adagrad.
    """
    kind = type(optimizer)
    if kind.__module__.startswith("torch.optim.") and kind.__name__ != "Adagrad":
        return {}
    state = getattr(optimizer, "state", {})
    return {id(p): frozenset(s) for p, s in state.items() if isinstance(s, dict)}


def check_supported(optimizers: Iterable[Any]) -> None:
    """Refuse optimizers whose groups can't be filtered.

    Raises:
        UnsupportedError: with the reason and what to use instead.
    """
    for optimizer in optimizers:
        _check(optimizer, _stepped_by(optimizer), set())


def _check(optimizer: Any, ids: set[int], scaled: set[int]) -> None:
    """Refuse what can't be served.

    Args:
        optimizer: one of the fit.
        ids: of what it steps itself.
        scaled: those of them that have a factor.
    """
    kind = type(optimizer)
    why = next((_REFUSED[base.__name__] for base in kind.__mro__ if base.__name__ in _REFUSED), "")
    if not why and ids and not _reads_its_groups(optimizer):
        why = "its `param_groups` are made anew each time they are read, so they can't be changed"
    if why:
        raise UnsupportedError(
            f"`{kind.__name__}` can't be used with layers that freeze or unfreeze: {why}. Use "
            "AdamW, SGD or another optimizer with parameter groups, or freeze by hand before the "
            "fit and leave the freezing callbacks out."
        )
    if not scaled:
        return
    without = any(
        group.get("lr") is None and any(id(p) in scaled for p in group["params"])
        for group in optimizer.param_groups
    )
    own = _own_list(optimizer, ids)
    if without:
        why = "it chooses its learning rate itself (`lr=None`)"
    elif not _runs_hooks(optimizer):
        why = "its `step` runs no hooks, because it isn't built by `torch.optim.Optimizer.__init__`"
    elif own:
        why = f"it keeps a list of its own beside its groups (`{own}`)"
    if why:
        raise UnsupportedError(
            f"`{kind.__name__}` can't have a factor on its learning rates: {why}. Give it an `lr` "
            "in groups of torch's kind, or leave `lr_decay` and `lr_scale` at 1.0."
        )


def _reads_its_groups(optimizer: Any) -> bool:
    """Whether what is written to its groups is there when they are read again."""
    pairs = list(zip(optimizer.param_groups, optimizer.param_groups))
    return all(
        one is other and isinstance(one["params"], list) and one["params"] is other["params"]
        for one, other in pairs
    )


def _own_list(optimizer: Any, ids: set[int]) -> str:
    """The attribute in which an optimizer keeps its tensors beside its groups; empty if none."""
    lists = [group["params"] for group in optimizer.param_groups]
    for name, value in vars(optimizer).items():
        apart = isinstance(value, (list, tuple)) and not any(value is params for params in lists)
        if apart and value and all(id(item) in ids for item in value):
            return str(name)
    return ""


def listed(given: Any) -> list[Optimizer]:
    """Optimizers as people hand them over: one, several, or what `configure_optimizers` returns.

    Args:
        given: an optimizer, a dict with "optimizer" in it, any nesting of lists and tuples of
            these, or None. Schedulers are passed over.

    Raises:
        ArgumentError: there is something else among them.

    Example:
        >>> from torch import nn, optim
        >>> sgd = optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
        >>> listed(([sgd], [])) == listed({"optimizer": sgd, "lr_scheduler": None}) == [sgd]
        True
    """
    if given is None:
        return []
    if isinstance(given, Optimizer) or hasattr(given, "param_groups"):
        inner = getattr(given, "optimizer", None)  # Lightning's own wrapper
        return [inner if isinstance(inner, Optimizer) else given]
    if isinstance(given, Mapping) and "optimizer" in given:
        return listed(given["optimizer"])
    if isinstance(given, (str, bytes, Mapping)) or not isinstance(given, Iterable):
        if hasattr(given, "step") and hasattr(given, "last_epoch"):
            return []
        raise ArgumentError(
            f"Expected optimizers, got {type(given).__name__}. Give one, a list of them, or what "
            "`configure_optimizers()` returns."
        )
    if isinstance(given, (list, tuple)) and any(_is_scheduler(item) for item in given):
        given = [item for item in given if not _is_scheduler(item)]
    return [optimizer for item in given for optimizer in listed(item)]


def _is_scheduler(item: Any) -> bool:
    inner = item.get("scheduler", item) if isinstance(item, Mapping) else item
    return (
        hasattr(inner, "optimizer")
        and hasattr(inner, "step")
        and not hasattr(inner, "param_groups")
    )


def forget(optimizers: Iterable[Optimizer], parameters: Iterable[nn.Parameter]) -> None:
    """Drop the state that optimizers keep of some parameters, such as momentum."""
    listed = list(parameters)
    for optimizer in optimizers:
        for parameter in listed:
            optimizer.state.pop(parameter, None)


def learning_rates(index: ModelIndex, optimizers: Iterable[Optimizer]) -> dict[str, float]:
    """Parameter name -> learning rate of the group that it stands in at present."""
    found: dict[int, float] = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if group.get("lr") is not None:
                found.update(dict.fromkeys(map(id, group["params"]), float(group["lr"])))
    return {name: found[id(p)] for name, p in index.parameters.items() if id(p) in found}
