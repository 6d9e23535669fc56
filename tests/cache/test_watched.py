"""Layers that somebody looks at, or works otherwise than their class says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

from lightning_freeze import FreezeBackbone, FrozenFeatureCache
from tests.cache.nets import Module, Net, assert_same, both, fitted, loader
from tests.cache.test_exactness import Texts, texts
from tests.zoo import tiny_bert

Chooses = Callable[[Any], nn.Module]


class Records(Callback):
    """Has a hook note the features of a layer, from some moment on."""

    def __init__(self, layer: Chooses, moment: Any) -> None:
        self.layer, self.moment = layer, moment
        self.seen: list[float] = []

    def _now(self, module: Any, moment: Any) -> None:
        def note(_: Any, args: Any, output: Any) -> None:
            tensor = output if isinstance(output, Tensor) else output[0]
            self.seen.append(float(tensor.detach().double().sum()))

        if moment == self.moment:
            self.layer(module).register_forward_hook(note)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self._now(pl_module, "fit start")

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._now(pl_module, "train start")

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self._now(pl_module, trainer.global_step)

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        self._now(pl_module, f"in step {trainer.global_step}")


def second(module: Any) -> nn.Module:
    layer: nn.Module = module.net.front[1]
    return layer


def inner(module: Any) -> nn.Module:
    layer: nn.Module = module.net.front[1][0]
    return layer


def watched(layer: Chooses, moment: Any, first: bool) -> tuple[Any, Any, FrozenFeatureCache]:
    one, other = Records(layer, moment), Records(layer, moment)
    plain = fitted(lambda: Module(Net()), one, epochs=8)
    cache = FrozenFeatureCache()
    cached = fitted(lambda: Module(Net()), *([other, cache] if first else [cache, other]), epochs=8)
    assert one.seen == other.seen != []
    return plain, cached, cache


@pytest.mark.parametrize(
    ("layer", "moment", "first"),
    [
        (second, "fit start", True),
        (second, "train start", True),
        (second, "train start", False),
        (second, 9, True),
        (second, 9, False),
        (second, "in step 9", False),
        (inner, "train start", False),
        (inner, 10, True),
    ],
)
def test_a_hook_sees_all_that_it_would_and_what_is_before_it_is_still_cached(
    layer: Chooses, moment: Any, first: bool
) -> None:
    path = "net.front.1" if layer is second else "net.front.1.0"
    with pytest.warns(UserWarning, match=rf"ends before `{path}`, a \w+, which isn't trained, but"):
        plain, cached, cache = watched(layer, moment, first)
    assert_same(plain, cached)
    assert cache.stats.skipped == "net.front.0"
    assert cache.stats.hits > 24
    assert cached.calls < plain.calls


def test_hooks_around_all_that_is_left_out_are_no_obstacle() -> None:
    plain, cached, cache = watched(lambda module: module.net.front, "train start", False)
    assert_same(plain, cached)
    assert cache.stats.hits > 50
    ours = []

    def callbacks() -> list[Callback]:
        ours.append(Records(lambda module: module.model.bert, "train start"))
        return [FreezeBackbone(trainable_layers=1), ours[-1]]

    plain, cached, cache = both(lambda: Texts(tiny_bert(3)), callbacks, data=texts)
    assert_same(plain, cached)
    assert cache.stats.hits > 50
    assert ours[0].seen == ours[1].seen != []


def test_hooks_on_all_modules_are_said_and_see_all() -> None:
    class Global(Callback):
        def __init__(self) -> None:
            self.seen: list[str] = []

        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 9:
                self.handle = torch_modules.register_module_forward_hook(
                    lambda module, *_: self.seen.append(type(module).__name__)
                )

        def on_train_end(self, *_: Any) -> None:
            self.handle.remove()

    found = []

    def callbacks() -> list[Callback]:
        found.append(Global())
        return [found[-1]]

    with pytest.warns(UserWarning, match="does nothing for now: there are hooks on all modules"):
        plain, cached, _ = both(lambda: Module(Net()), callbacks, epochs=5)
    assert_same(plain, cached)
    assert found[0].seen == found[1].seen != []


class Replaces(Callback):
    """Gives a layer another `forward`, before or in a step."""

    def __init__(self, layer: Chooses, step: int) -> None:
        self.layer, self.step = layer, step

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            layer = self.layer(pl_module)
            before = layer.forward
            layer.forward = lambda *args: before(*args) * 1.5  # type: ignore[method-assign]


@pytest.mark.filterwarnings("ignore:.*FrozenFeatureCache:UserWarning")
@pytest.mark.parametrize(
    ("layer", "step"), [(second, 20), (inner, 35), (lambda module: module.net.front, 20)]
)
def test_a_forward_that_is_replaced_in_the_middle_of_an_epoch_counts_at_once(
    layer: Chooses, step: int
) -> None:
    plain, cached, cache = both(
        lambda: Module(Net()), lambda: [Replaces(layer, step)], data=lambda: loader(96, 6), epochs=4
    )
    never = fitted(lambda: Module(Net()), data=lambda: loader(96, 6), epochs=4)
    assert_same(plain, cached)
    assert plain.losses != never.losses
    assert cache.stats.hits > 96


class Keeps(Net):
    """Puts aside what comes out of the frozen part, and the step reads it."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.front:
            x = layer(x)
        self.last = x.detach()
        return self.head(self.back(x))


def test_what_forward_only_writes_to_its_module_is_no_change_of_it() -> None:
    class Reads(Module):
        def loss(self, batch: Any) -> Tensor:
            return super().loss(batch) * (1 + self.net.last.mean())

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.net.last = torch.zeros(1)
            return super().training_step(batch, batch_idx)

    plain, cached, cache = both(lambda: Reads(Keeps()))
    assert_same(plain, cached)
    assert cache.stats.hits > 50
