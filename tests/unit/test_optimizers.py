"""The user's groups without what is frozen, and a step at each tensor's own rate: no Trainer."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import LBFGS, SGD, Adafactor, Adagrad, AdamW, Optimizer
from torch.optim.lr_scheduler import OneCycleLR

from lightning_freeze.engine.optimizers import OptimizerGroups, check_supported, with_inner
from lightning_freeze.errors import UnsupportedError
from lightning_freeze.model.index import ModelIndex

NAMES = ("low.weight", "low.bias", "high.weight", "high.bias", "head.weight", "head.bias")
LOW = frozenset(NAMES[:2])
DECAY = dict.fromkeys(NAMES[:2], 0.25) | dict.fromkeys(NAMES[2:4], 0.5)


def toy() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"low": nn.Linear(2, 2), "high": nn.Linear(2, 2), "head": nn.Linear(2, 1)})


def taken(
    model: nn.Module, *optimizers: Optimizer, factors: dict[str, float] | None = None
) -> OptimizerGroups:
    return OptimizerGroups(ModelIndex.of(model), optimizers, factors or {})


def names_in(model: nn.Module, optimizer: Any) -> list[list[str]]:
    name_of = {id(p): name for name, p in model.named_parameters()}
    return [[name_of[id(p)] for p in group["params"]] for group in optimizer.param_groups]


def gradients(model: nn.ModuleDict, frozen: frozenset[str] = frozenset()) -> None:
    for name, p in model.named_parameters():
        p.grad = None if name in frozen else torch.ones_like(p)


def moved_by(
    model: nn.ModuleDict, optimizer: Any, frozen: frozenset[str] = frozenset()
) -> dict[str, float]:
    """How far a step on gradients of 1 moves each tensor: SGD's learning rate."""
    gradients(model, frozen)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()
    after = {name: p.detach() for name, p in model.named_parameters()}
    return {name: round(float((was - after[name]).flatten()[0]), 5) for name, was in before.items()}


# Lists


def test_groups_keep_number_order_options_and_identity() -> None:
    model = toy()
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = AdamW([{"params": matrices, "name": "m", "weight_decay": 0.3}, {"params": vectors}])
    dicts, lists = list(optimizer.param_groups), [g["params"] for g in optimizer.param_groups]
    options = [{k: v for k, v in g.items() if k != "params"} for g in dicts]
    groups = taken(model, optimizer, factors=DECAY)
    for frozen in (LOW, frozenset(NAMES[:4]), frozenset(NAMES), frozenset[str]()):
        groups.sync(frozen)
        assert all(a is b for a, b in zip(dicts, optimizer.param_groups))
        assert all(a is g["params"] for a, g in zip(lists, dicts))
        assert [{k: v for k, v in g.items() if k != "params"} for g in dicts] == options
        shown = [name for names in names_in(model, optimizer) for name in names]
        assert set(shown) == set(NAMES) - frozen
    assert names_in(model, optimizer) == [list(NAMES[::2]), list(NAMES[1::2])]


def test_param_names_follow_their_parameters() -> None:
    model = toy()
    optimizer = SGD(model.named_parameters(), lr=0.1)
    groups = taken(model, optimizer)
    groups.sync(frozenset({"high.weight"}))
    assert optimizer.param_groups[0]["param_names"] == [n for n in NAMES if n != "high.weight"]
    groups.stop()
    assert optimizer.param_groups[0]["param_names"] == list(NAMES)


def test_what_the_user_adds_moves_or_takes_out_in_between_is_respected() -> None:
    model = toy()
    optimizer = SGD(
        [{"params": [model["low"].weight, model["low"].bias]}, {"params": [model["head"].weight]}],
        lr=0.1,
    )
    groups = taken(model, optimizer)
    groups.sync(LOW)
    optimizer.param_groups[1]["params"].append(model["head"].bias)
    optimizer.add_param_group({"params": [model["high"].weight]})
    optimizer.param_groups[1]["params"].append(model["low"].bias)  # moved, while frozen
    groups.sync(frozenset())
    assert names_in(model, optimizer) == [
        ["low.weight"],
        ["head.weight", "head.bias", "low.bias"],
        ["high.weight"],
    ]
    del optimizer.param_groups[1]["params"][1]
    groups.sync(LOW)
    groups.sync(frozenset())
    assert names_in(model, optimizer)[1] == ["head.weight", "low.bias"]


def test_parameters_outside_of_the_model_are_kept_and_never_frozen() -> None:
    model, foreign = toy(), nn.Parameter(torch.zeros(1))
    optimizer = SGD([*model.parameters(), foreign], lr=0.1)
    groups = taken(model, optimizer)
    groups.sync(frozenset(NAMES))
    assert optimizer.param_groups[0]["params"] == [foreign]
    assert groups.held == set(NAMES)


def test_a_state_dict_has_the_users_shape_and_lists_are_filtered_again_afterwards() -> None:
    model = toy()
    optimizer = AdamW(model.parameters())
    groups = taken(model, optimizer)
    groups.sync(LOW)
    moved_by(model, optimizer, LOW)
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["params"] == list(range(6))
    assert set(saved["state"]) == {2, 3, 4, 5}
    optimizer.load_state_dict(saved)
    assert groups.loaded
    groups.settle()
    assert names_in(model, optimizer) == [list(NAMES[2:])]
    assert optimizer.state[model["head"].weight]["step"] == 1


def test_a_state_of_another_shape_is_refused_by_torch_as_ever() -> None:
    model = toy()
    optimizer = AdamW(model.parameters())
    taken(model, optimizer).sync(LOW)
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict(AdamW([{"params": [p]} for p in toy().parameters()]).state_dict())


def test_stopping_leaves_no_trace_and_no_factor() -> None:
    model = toy()
    optimizer = SGD(model.parameters(), lr=0.8)
    before = {key for key in vars(optimizer) if vars(optimizer)[key]}
    for _ in range(2):  # a second fit doesn't scale twice
        groups = taken(model, optimizer, factors=DECAY)
        groups.sync(LOW)
        assert moved_by(model, optimizer, LOW)["high.bias"] == 0.4
        groups.stop()
        assert names_in(model, optimizer) == [list(NAMES)]
        assert {key for key in vars(optimizer) if vars(optimizer)[key]} == before
        assert set(moved_by(model, optimizer).values()) == {0.8}


# State


def test_what_is_frozen_loses_its_state_and_the_rest_keeps_it() -> None:
    model = toy()
    optimizer = AdamW(model.parameters())
    groups = taken(model, optimizer)
    moved_by(model, optimizer)
    groups.sync(LOW)
    assert model["low"].weight not in optimizer.state
    assert optimizer.state[model["head"].weight]["step"] == 1


class SlowWeights(SGD):
    """Makes state when it is built, as Lookahead does, and never again."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr=lr, momentum=0.9)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["slow"] = p.detach().clone()


@pytest.mark.parametrize("kind", [SlowWeights, Adagrad])
def test_state_from_birth_is_kept_and_what_came_later_is_dropped(kind: Any) -> None:
    model = toy()
    optimizer = kind(model.parameters(), lr=0.1)
    born = set(optimizer.state[model["low"].weight])
    groups = taken(model, optimizer)
    moved_by(model, optimizer)
    groups.sync(LOW)
    assert set(optimizer.state[model["low"].weight]) == born
    assert set(optimizer.state[model["high"].weight]) >= born
    groups.sync(frozenset())
    moved_by(model, optimizer)


# The step


def test_factors_act_in_the_step_alone() -> None:
    model = toy()
    optimizer = SGD(model.parameters(), lr=0.8)
    groups = taken(model, optimizer, factors=DECAY)
    assert optimizer.param_groups[0]["lr"] == 0.8
    moved = moved_by(model, optimizer)
    assert [moved[n] for n in ("low.bias", "high.bias", "head.bias")] == [0.2, 0.4, 0.8]
    optimizer.param_groups[0]["lr"] = 0.4
    assert moved_by(model, optimizer)["low.bias"] == 0.1
    assert optimizer.param_groups[0]["lr"] == 0.4
    assert groups.rates()["low.bias"] == 0.1
    assert groups.steps == 2


def test_a_tensor_rate_is_written_in_place_and_keeps_its_address() -> None:
    model = toy()
    optimizer = SGD(model.parameters(), lr=torch.tensor(0.8))
    taken(model, optimizer, factors=DECAY)
    seen = []

    class Spy(SGD):
        def step(self, closure: Any = None) -> None:
            seen.append([(g["lr"].data_ptr(), float(g["lr"])) for g in self.param_groups])

    optimizer.__class__ = Spy
    Spy.step.hooked = False  # type: ignore[attr-defined]
    optimizer._patch_step_function()
    groups = taken(model, optimizer, factors=DECAY)
    optimizer.step()
    optimizer.param_groups[0]["lr"].fill_(0.4)
    optimizer.step()
    groups.stop()
    assert [lr for _, lr in seen[0]] == pytest.approx([0.8, 0.4, 0.2])
    assert [lr for _, lr in seen[1]] == pytest.approx([0.4, 0.2, 0.1])
    assert [at for at, _ in seen[0]] == [at for at, _ in seen[1]]


def test_an_exception_in_the_step_leaves_nothing_to_put_back() -> None:
    model = toy()
    optimizer = SGD(model.parameters(), lr=0.8)
    taken(model, optimizer, factors=DECAY)
    groups = optimizer.param_groups

    def broken() -> None:
        raise RuntimeError("in the closure")

    with pytest.raises(RuntimeError, match="in the closure"):
        optimizer.step(broken)
    assert optimizer.param_groups is groups
    assert type(optimizer) is SGD
    assert moved_by(model, optimizer)["low.bias"] == 0.2


def test_what_is_empty_or_all_frozen_is_hidden_in_the_step() -> None:
    class Muonlike(Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {"lr": 0.1})

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            assert self.param_groups[0] is not None
            self.seen = [len(group["params"]) for group in self.param_groups]

    model = toy()
    optimizer = Muonlike([{"params": list(part.parameters())} for part in model.values()])
    groups = taken(model, optimizer)
    for frozen, seen in ((LOW, [2, 2]), (frozenset(NAMES), [0]), (frozenset(), [2, 2, 2])):
        groups.sync(frozen)
        optimizer.step()
        assert optimizer.seen == seen


class Estimates(SGD):
    """Writes what it learns into its groups in each step, as Prodigy and schedule-free do."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["d"] = group.get("d", 1.0) * 2 + len(group["params"])
        return super().step(closure)


def test_what_the_optimizer_writes_into_a_group_goes_back_and_parts_keep_their_own() -> None:
    model = toy()
    optimizer = Estimates(model.parameters(), lr=0.1)
    groups = taken(model, optimizer, factors=dict.fromkeys(NAMES[:3], 0.5))
    moved_by(model, optimizer)
    assert optimizer.param_groups[0]["d"] == 5.0  # 1 * 2 + 3: the first part's
    moved_by(model, optimizer)
    assert optimizer.param_groups[0]["d"] == 13.0
    [[(place, factor, own)]] = groups.state()["parts"]  # the other part has its own
    assert (place, factor, own) == (0, 0.5, {"d": 13.0})


def test_parts_that_differ_come_back_from_a_checkpoint() -> None:
    def made() -> tuple[nn.ModuleDict, Any, OptimizerGroups]:
        model = toy()
        optimizer = Estimates(model.parameters(), lr=0.1)
        return model, optimizer, taken(model, optimizer, factors={"low.weight": 0.5})

    model, optimizer, groups = made()
    moved_by(model, optimizer)
    saved = copy.deepcopy(groups.state()), copy.deepcopy(optimizer.state_dict())
    moved_by(model, optimizer)
    whole = groups.state()["parts"]
    assert whole[0][0][2] != {"d": optimizer.param_groups[0]["d"]}  # control: they do differ
    model, optimizer, groups = made()
    optimizer.load_state_dict(saved[1])
    groups.restore(saved[0])
    groups.sync(frozenset())
    moved_by(model, optimizer)
    assert groups.state()["parts"] == whole


def test_schedulers_and_optimizers_pickle() -> None:
    model = toy()
    optimizer = SGD(model.parameters(), lr=0.8, momentum=0.9)
    scheduler = OneCycleLR(optimizer, max_lr=0.8, total_steps=9)
    groups = taken(model, optimizer, factors=DECAY)
    groups.sync(LOW)
    moved_by(model, optimizer, LOW)
    scheduler.step()
    other: Any = pickle.loads(pickle.dumps(optimizer))
    assert other.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    assert type(scheduler) is OneCycleLR
    assert type(optimizer) is SGD


# Several as one


class Hybrid(Optimizer):
    """Joins the groups of optimizers inside; it never calls torch's `__init__`."""

    def __init__(self, *inner: Any) -> None:
        self.inner, self.defaults = inner, {}

    @property
    def param_groups(self) -> Any:  # type: ignore[override]
        return [group for optimizer in self.inner for group in optimizer.param_groups]

    @property
    def state(self) -> Any:  # type: ignore[override]
        return {k: v for optimizer in self.inner for k, v in optimizer.state.items()}

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.inner:
            optimizer.zero_grad(set_to_none)

    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for optimizer in self.inner:
            optimizer.step()
        return loss


class Wrapper(Optimizer):
    """Holds the groups of one optimizer and adds to its step, as SAM and Lookahead do."""

    def __init__(self, base: Any) -> None:
        super().__init__(base.param_groups, {})
        self.base, self.param_groups = base, base.param_groups

    def step(self, closure: Any = None) -> Any:
        return self.base.step(closure)


def hybrid(model: nn.ModuleDict) -> Any:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    return Hybrid(SGD(matrices, lr=0.8), SGD(vectors, lr=0.8))


def wrapper(model: nn.ModuleDict) -> Any:
    return Wrapper(SGD(model.parameters(), lr=0.8))


def twice(model: nn.ModuleDict) -> Any:
    return Wrapper(Wrapper(SGD(model.parameters(), lr=0.8)))


@pytest.mark.parametrize("make", [hybrid, wrapper, twice])
def test_optimizers_inside_of_one_are_served(make: Any) -> None:
    model = toy()
    optimizer = make(model)
    groups = taken(model, optimizer, factors=DECAY)
    assert len(with_inner([optimizer])) > 1
    groups.sync(LOW)
    moved = moved_by(model, optimizer, LOW)
    assert {n for n in NAMES if moved[n] == 0} == LOW
    assert moved["high.weight"] == moved["high.bias"] == 0.4
    assert moved["head.weight"] == moved["head.bias"] == 0.8
    groups.sync(frozenset())
    assert moved_by(model, optimizer)["low.bias"] == 0.2
    assert names_in(model, optimizer) == names_in(model, make(model))


# Refused


def test_lbfgs_is_refused_before_anything_changes() -> None:
    class Mine(LBFGS):
        pass

    model = toy()
    first = SGD(model["low"].parameters(), lr=0.1)
    with pytest.raises(UnsupportedError, match=r"`Mine` can't be used.*Use AdamW, SGD or another"):
        taken(model, first, Mine(model["head"].parameters()))
    assert not first._optimizer_step_pre_hooks
    check_supported([first])


class Rebuilt(Optimizer):
    """Its groups are new dicts at each access: what is written to them is lost."""

    def __init__(self, params: Any) -> None:
        self.all, self.defaults, self.state = list(params), {}, {}  # type: ignore[assignment]

    @property
    def param_groups(self) -> Any:  # type: ignore[override]
        return [{"params": self.all, "lr": 0.1}]


class Hookless(Optimizer):
    """Has groups of its own, and runs no hooks."""

    def __init__(self, params: Any) -> None:
        self.param_groups = [{"params": list(params), "lr": 0.8}]
        self.defaults, self.state = {}, {}  # type: ignore[assignment]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            p.data -= self.param_groups[0]["lr"] * p.grad


class OwnList(SGD):
    """Steps a list that it made for itself."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr=lr)
        self.mine = list(self.param_groups[0]["params"])


def without_lr(params: Any) -> Any:
    return Adafactor(params, lr=0.1)


def test_what_ignores_its_groups_is_refused_by_looking() -> None:
    model = toy()
    with pytest.raises(UnsupportedError, match=r"`Rebuilt` can't be used.*made anew each time"):
        taken(model, Rebuilt(model.parameters()))


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (Hookless, "`Hookless` .*runs no hooks"),
        (lambda p: OwnList(p, 0.1), "`OwnList` .*a list of its own .*`mine`"),
    ],
)
def test_a_factor_that_could_not_act_is_refused_and_freezing_alone_is_not(
    make: Any, why: str
) -> None:
    model = toy()
    optimizer = make(model.parameters())
    with pytest.raises(UnsupportedError, match=why):
        taken(model, optimizer, factors=DECAY)
    groups = taken(model, optimizer)
    groups.sync(LOW)
    moved = moved_by(model, optimizer, LOW)
    assert {name for name in NAMES if moved[name] == 0} == LOW


def test_a_factor_on_an_optimizer_without_a_learning_rate_is_refused() -> None:
    model = toy()
    optimizer = SGD(model.parameters(), lr=0.1)
    optimizer.param_groups[0]["lr"] = None
    with pytest.raises(UnsupportedError, match=r"chooses its learning rate itself \(`lr=None`\)"):
        taken(model, optimizer, factors=DECAY)
    taken(model, optimizer).sync(LOW)
    assert names_in(model, optimizer) == [list(NAMES[2:])]
