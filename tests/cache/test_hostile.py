"""Models, callbacks and weights that change in ways that torch doesn't tell of: never wrong."""

from __future__ import annotations

import copy
import pickle
import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_freeze import FreezeBackbone, FrozenFeatureCache, GradualUnfreeze
from tests.cache.nets import WIDTH, Module, Net, assert_same, both, fitted, loader, stack
from tests.cache.test_exactness import Texts, texts
from tests.zoo import tiny_bert

pytestmark = pytest.mark.filterwarnings("ignore:.*FrozenFeatureCache:UserWarning")


class Temperature(Net):
    temperature = 1.0

    def forward(self, x: Tensor) -> Tensor:
        x = self.front[0](x) * self.temperature
        return self.head(self.back(self.front[2](self.front[1](x))))


class At(Callback):
    """Does something to the module before some batches."""

    def __init__(self, does: Callable[[Any], None], *steps: int) -> None:
        self.does = does
        self.steps = steps

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step in self.steps:
            self.does(module)


def warmer(module: Any) -> None:
    module.net.temperature *= 1.0005


def other_weight(module: Any) -> None:
    weight = torch.ones(WIDTH, WIDTH)
    module.net.front[0][0].weight = nn.Parameter(weight, requires_grad=False)


def other_state(module: Any) -> None:
    front = module.net.front
    front.load_state_dict({name: 1.1 * tensor for name, tensor in front.state_dict().items()})


@pytest.mark.parametrize("does", [warmer, other_weight, other_state])
def test_what_is_changed_in_the_middle_of_an_epoch_counts_at_once(does: Any) -> None:
    plain, cached, cache = both(lambda: Module(Temperature()), lambda: [At(does, 9)], epochs=6)
    assert_same(plain, cached)
    assert cache.stats.hits > 24


class Statistics(Net):
    """A buffer of the model itself, not of a frozen layer."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - self.mean)


def other_mean(module: Any) -> None:
    module.net.mean.add_(0.01)


def test_a_buffer_that_is_read_between_frozen_layers_counts() -> None:
    plain, cached, cache = both(lambda: Module(Statistics()), lambda: [At(other_mean, 9)], epochs=6)
    assert_same(plain, cached)
    assert cache.stats.hits > 24


class Detached(Net):
    """What trains reaches a frozen layer without a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.prompt = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = self.front[1](self.front[0](x) + self.prompt.detach())
        return self.head(self.back(x) + self.prompt)


class Returns(Net):
    """A frozen layer that returns a number as well."""

    number: Callable[[Tensor], Any] = staticmethod(lambda y: float(y.mean()))

    class Layer(nn.Linear):
        owner: Any

        def forward(self, x: Tensor) -> Any:
            y = super().forward(x)
            return y, type(self.owner[0]).number(y)

    def __init__(self) -> None:
        super().__init__()
        self.front[0] = self.Layer(WIDTH, WIDTH)
        self.front[0].owner = [self]
        self.front.requires_grad_(False).eval()

    def forward(self, x: Tensor) -> Tensor:
        y, number = self.front[0](x)
        return self.head(self.back(y)) * (1.0 + number)


class ReturnsAny(Returns):
    number = staticmethod(lambda y: bool((y > 1.1).any()))


class SmallInfluence(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.front[0](x)
        return self.head(self.back(self.front[1](x - 1e-3 * x.mean(0))))


class OwnGenerator(Net):
    def __init__(self) -> None:
        super().__init__()
        self.generator = np.random.default_rng(1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.front[0](x) * (1.0 + 1e-4 * float(self.generator.random()))
        return self.head(self.back(self.front[1](x)))


def second(net: Any) -> nn.Module:
    layer: nn.Module = net.front[1][0]
    return layer


@pytest.mark.parametrize("kind", [Detached, Returns, ReturnsAny, SmallInfluence, OwnGenerator])
def test_these_are_left_alone(kind: type[Net]) -> None:
    plain, cached, cache = both(lambda: Module(kind(), second))
    assert_same(plain, cached)
    assert cache.stats.hits == 0
    assert cache.stats.aside != ""


class Swallows(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.front[0](x)
        try:
            factor = 2.0 if float(x.sum()) > 0 else 1.0
        except Exception:
            factor = 1.0
        return self.head(self.back(self.front[2](self.front[1](x)))) * factor


def test_a_model_that_catches_all_errors_gets_its_values() -> None:
    plain, cached, _ = both(lambda: Module(Swallows()), data=lambda: loader(48, 3))
    assert_same(plain, cached)


class CountingHead(nn.Linear):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.calls = 0
        self.seen: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y = super().forward(x) * random.random() / self.calls
        self.seen.append(float(y.detach().mean()))
        return y


def test_trying_out_leaves_no_trace_in_what_trains() -> None:
    def make() -> Module:
        random.seed(3)
        net = Net()
        net.head = CountingHead(WIDTH, 3)
        return Module(net)

    plain, cached, cache = both(make)
    assert_same(plain, cached)
    assert plain.net.head.seen == cached.net.head.seen
    assert cache.stats.hits > 50


class Validates(Module):
    def val_dataloader(self) -> Any:
        return loader()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(self.loss(batch)))


class DoublesInTraining(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.front[0](x)
        x = 2 * x if self.training else x
        return self.head(self.back(self.front[1](x)))


def test_training_and_validation_may_differ_between_frozen_layers() -> None:
    plain, cached, cache = both(lambda: Validates(DoublesInTraining()))
    assert_same(plain, cached)
    assert cache.stats.hits > 50


class Swaps(Validates):
    def on_validation_epoch_start(self) -> None:
        weight = self.net.front[0][0].weight
        self.old = weight.detach().clone()
        weight.data.mul_(1.5)

    def on_validation_epoch_end(self) -> None:
        self.net.front[0][0].weight.data.copy_(self.old)


def test_weights_that_are_exchanged_for_validation_have_rows_of_their_own() -> None:
    plain, cached, cache = both(lambda: Swaps(Net()))
    assert_same(plain, cached)
    assert cache.stats.hits > 100


def test_averaged_weights_are_validated_as_without_a_cache() -> None:
    class Plain(Validates):
        def _count(self, layer: nn.Module) -> None:
            """Copies of a counted layer can't be made."""

    plain, cached, cache = both(lambda: Plain(Net()), lambda: [EMAWeightAveraging(decay=0.9)])
    assert_same(plain, cached)
    assert cache.stats.hits > 50


def test_a_frozen_part_that_moves_all_the_time_ends_the_cache() -> None:
    class Momentum(Module):
        def on_train_batch_end(self, *_: Any) -> None:
            with torch.no_grad():
                for parameter in self.net.front.parameters():
                    parameter.mul_(0.999)

    plain, cached, cache = both(lambda: Momentum(Net()), epochs=6)
    assert_same(plain, cached)
    assert "changes again and again" in cache.stats.aside


class Copies(Callback):
    def __init__(self) -> None:
        self.made: list[nn.Module] = []

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        self.made.append(copy.deepcopy(module.net))
        pickle.dumps(module.net)


def test_copies_that_are_made_in_a_batch_stand_on_their_own() -> None:
    class Plain(Module):
        def _count(self, layer: nn.Module) -> None:
            """Local classes can't be pickled."""

    copies = Copies()
    module = fitted(lambda: Plain(Net()), copies, FrozenFeatureCache())
    x = torch.randn(6, WIDTH)
    for made in copies.made:
        again = Net()
        again.load_state_dict(made.state_dict())
        assert torch.equal(made.eval()(x), again.eval()(x))
    assert len(copies.made) == len(module.losses)
    assert not torch.equal(copies.made[0](x), copies.made[-1](x))


def test_a_forward_that_somebody_replaces_in_a_batch_stays() -> None:
    def twice(module: Any) -> None:
        old = module.net.forward
        module.net.forward = lambda *args: old(*args) * 2

    class Late(At):
        def on_train_batch_start(self, *_: Any) -> None:
            """Not yet."""

        def on_before_backward(self, trainer: Any, module: Any, loss: Any) -> None:
            if trainer.global_step in self.steps:
                self.does(module)

    plain, cached, _ = both(lambda: Module(Net()), lambda: [Late(twice, 6)])
    assert plain.losses == cached.losses


class Siamese(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.front = stack(2).requires_grad_(False).eval()
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.front(x) - self.front(x.flip(1))).abs())


def test_an_encoder_that_is_called_twice_has_rows_for_each_call() -> None:
    plain, cached, cache = both(lambda: Module(Siamese()))
    assert_same(plain, cached)
    assert cache.stats.hits > 50


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.front = nn.ModuleList([nn.Sequential(nn.Embedding(9, WIDTH))])
        self.places = nn.Embedding(20, WIDTH).requires_grad_(False)
        self.head = nn.Linear(WIDTH, 3)
        self.front.requires_grad_(False)

    def forward(self, ids: Tensor) -> Tensor:
        places = self.places(torch.arange(ids.shape[1]))
        return self.head((self.front[0](ids) + places).mean(1))


@pytest.mark.parametrize("rows", [24, 22])
def test_a_table_of_positions_may_be_as_long_as_the_batch(rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 9, (rows, 6), generator=generator)
    labels = torch.randint(0, 3, (rows,), generator=generator)
    plain, cached, cache = both(
        lambda: Module(Positions()),
        data=lambda: DataLoader(TensorDataset(ids, labels), batch_size=6),
    )
    assert_same(plain, cached)
    assert cache.stats.hits > 40


@pytest.mark.parametrize("preset", ["chain_thaw", "lisa"])
def test_layers_that_freeze_again_are_computed_anew(preset: str) -> None:
    plain, cached, _ = both(
        lambda: Texts(tiny_bert(3)),
        lambda: [getattr(GradualUnfreeze, preset)()],
        data=texts,
        epochs=8,
    )
    assert_same(plain, cached)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_is_the_same_with_the_cache(reentrant: bool) -> None:
    def make() -> LightningModule:
        model: Any = tiny_bert(3)
        name = "activation_checkpointing_enable"
        enable = getattr(model, name, model.gradient_checkpointing_enable)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            enable({"use_reentrant": reentrant})
        return Texts(model)

    plain, cached, _ = both(make, lambda: [FreezeBackbone(trainable_layers=1)], data=texts)
    assert_same(plain, cached)


def test_a_compiled_model_is_left_alone() -> None:
    def make() -> Module:
        module = Module(Net())
        module.net.back.compile(backend="eager")
        return module

    plain, cached, cache = both(make)
    assert plain.losses == pytest.approx(cached.losses, rel=1e-5)
    assert cache.stats.aside == "the model is compiled"
