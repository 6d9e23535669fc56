"""What a model is called with: containers of any kind, batches of any size, any values."""

from __future__ import annotations

import enum
from argparse import Namespace
from collections import UserDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_freeze import FreezeBackbone, FrozenFeatureCache
from tests.cache.nets import WIDTH, Module, Net, assert_same, both, loader
from tests.cache.test_exactness import Texts
from tests.zoo import tiny_bert

Pair = namedtuple("Pair", ["x", "scale"])


@dataclass
class Data:
    x: Tensor
    scale: Any = 1.0


@dataclass(frozen=True)
class Frozen:
    x: Tensor
    scale: Any = 1.0


class Items(UserDict):  # type: ignore[type-arg]
    """A mapping that torch doesn't know."""

    @property
    def x(self) -> Tensor:
        tensor: Tensor = self["x"]
        return tensor

    @property
    def scale(self) -> Any:
        return self["scale"]


class Slots:
    __slots__ = ("scale", "x")

    def __init__(self, x: Tensor, scale: Any) -> None:
        self.x, self.scale = x, scale


class Unpacks(Net):
    """Takes its one argument apart itself."""

    def forward(self, batch: Any) -> Tensor:
        x = batch.x * batch.scale
        for layer in self.front:
            x = layer(x)
        return self.head(self.dropout(self.back(x)))


def called_with(make: Callable[[Tensor, Any], Any]) -> type[Module]:
    class Calls(Module):
        def loss(self, batch: Any) -> Tensor:
            # the same rows with another number beside them are other samples
            scale = 1.0 + self.current_epoch % 2
            return nn.functional.cross_entropy(self.net(make(batch[0], scale)), batch[1])

    return Calls


@pytest.mark.parametrize(
    "make",
    [
        Pair,
        Data,
        Frozen,
        lambda x, scale: Namespace(x=x, scale=scale),
        lambda x, scale: Items(x=x, scale=scale),
        lambda x, scale: Namespace(x=x, scale=scale, more=[Data(x), {"k": Items(x=x)}]),
    ],
    ids=["namedtuple", "dataclass", "frozen dataclass", "namespace", "mapping", "nested"],
)
def test_samples_in_any_container_are_found_again(make: Any) -> None:
    plain, cached, cache = both(lambda: called_with(make)(Unpacks()), epochs=6)
    assert_same(plain, cached)
    assert cache.stats.hits > 50
    assert cached.calls < plain.calls


class Colour(enum.Enum):
    RED = 1


@pytest.mark.parametrize(
    ("more", "name"),
    [
        (lambda: Slots(torch.ones(1), 1.0), "Slots"),
        (lambda: Random(1), "Random"),
        (lambda: Colour.RED, "Colour"),
        (lambda: lambda: 1, "function"),
    ],
)
def test_what_may_keep_its_content_elsewhere_is_named(more: Any, name: str) -> None:
    def make(x: Tensor, scale: Any) -> Any:
        return Namespace(x=x, scale=scale, more=more())

    with pytest.warns(UserWarning, match=f"an input of the frozen part is a {name}"):
        plain, cached, cache = both(lambda: called_with(make)(Unpacks()))
    assert_same(plain, cached)
    assert cache.stats.hits == 0


def test_an_encoding_of_transformers_is_a_container_like_any_other() -> None:
    transformers = pytest.importorskip("transformers")

    class Encoded(Unpacks):
        def forward(self, batch: Any) -> Tensor:
            return super().forward(Namespace(x=batch["x"], scale=batch["scale"]))

    def make(x: Tensor, scale: Any) -> Any:
        return transformers.BatchEncoding({"x": x, "scale": scale})

    plain, cached, cache = both(lambda: called_with(make)(Encoded()))
    assert_same(plain, cached)
    assert cache.stats.hits > 20


class WritesToTheBatch(Net):
    def forward(self, batch: Any) -> Tensor:
        batch["first"] = self.front[0](batch["x"])
        x = self.front[2](self.front[1](batch["first"]))
        return self.head(self.back(x))


class TakesOutOfTheBatch(Net):
    def forward(self, batch: Any) -> Tensor:
        x = batch.pop("x")
        batch["first"] = x
        return self.head(self.back(self.front[2](self.front[1](self.front[0](x)))))


@pytest.mark.parametrize("kind", [WritesToTheBatch, TakesOutOfTheBatch])
def test_a_model_that_writes_to_the_dict_it_is_given_is_left_alone(kind: type[Net]) -> None:
    class Reads(Module):
        def loss(self, batch: Any) -> Tensor:
            given = {"x": batch[0]}
            output = self.net(given)
            return nn.functional.cross_entropy(output, batch[1]) + given["first"].mean()

    with pytest.warns(UserWarning, match="the model changes what is in the batch"):
        plain, cached, cache = both(lambda: Reads(kind()))
    assert_same(plain, cached)
    assert cache.stats.hits == 0


@pytest.mark.parametrize(
    ("rows", "batch"), [(25, 6), (6, 1), (13, 2)], ids=["last is smaller", "of one", "of two"]
)
def test_batches_may_have_any_size(rows: int, batch: int) -> None:
    plain, cached, cache = both(lambda: Module(Net()), data=lambda: loader(rows, batch))
    assert_same(plain, cached)
    assert cache.stats.hits > rows


def test_a_first_batch_of_one_sample_shows_too_little() -> None:
    def batches() -> DataLoader[Any]:
        orders = [[0], [1, 2, 3], [4, 5, 6, 7, 8], [9], [10, 11]]
        return DataLoader(loader(25, 6).dataset, batch_sampler=orders)

    plain, cached, cache = both(lambda: Module(Net()), data=batches, epochs=6)
    assert_same(plain, cached)
    assert cache.stats.hits > 24


def test_calls_without_a_sample_are_made_as_they_are() -> None:
    class Empty(Module):
        def loss(self, batch: Any) -> Tensor:
            rows = 0 if self.global_step % 3 == 1 else len(batch[0])
            return self.net(batch[0][:rows]).sum() + self.net(batch[0][:0]).sum()

    plain, cached, cache = both(lambda: Empty(Net()), epochs=8)
    assert_same(plain, cached)
    assert cache.stats.hits > 50


@pytest.mark.parametrize("dtype", [None, "float16"])
def test_samples_with_nan_and_infinity_are_samples(dtype: Any) -> None:
    def broken() -> DataLoader[Any]:
        made = loader()
        made.dataset.tensors[0][3, 2] = float("nan")  # type: ignore[attr-defined]
        made.dataset.tensors[0][7, 1] = float("inf")  # type: ignore[attr-defined]
        return made

    class Mended(Module):
        def loss(self, batch: Any) -> Tensor:
            return nn.functional.cross_entropy(self.net(batch[0]).nan_to_num(0.0), batch[1])

    plain, cached, cache = both(
        lambda: Mended(Net()), data=broken, cache=lambda: FrozenFeatureCache(dtype=dtype)
    )
    assert cached.losses == pytest.approx(plain.losses, rel=1e-5 if dtype is None else 1e-2)
    assert cache.stats.hits > 50


class Bytes(Net):
    """Normalises whole numbers itself."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((WIDTH,), 0.4))

    def forward(self, x: Tensor) -> Tensor:
        x = x.float() / 255 - self.mean
        for layer in self.front:
            x = layer(x)
        return self.head(self.dropout(self.back(x)))


def test_images_of_bytes_that_the_model_normalises_are_cached() -> None:
    def data() -> DataLoader[Any]:
        made = loader()
        x, y = made.dataset.tensors  # type: ignore[attr-defined]
        whole = (x * 60 + 128).clamp(0, 255).to(torch.uint8)
        return DataLoader(torch.utils.data.TensorDataset(whole, y), batch_size=6)

    plain, cached, cache = both(lambda: Module(Bytes()), data=data)
    assert_same(plain, cached)
    assert cache.stats.hits > 50


def lengths(shuffle: bool) -> DataLoader[Any]:
    """Texts that are padded to the longest of their batch."""
    draw = torch.Generator().manual_seed(0)
    sizes = torch.randint(3, 10, (24,), generator=draw).tolist()
    items = [(torch.randint(3, 50, (size,), generator=draw), size % 2) for size in sizes]

    def pad(batch: Any) -> Any:
        ids = nn.utils.rnn.pad_sequence([text for text, _ in batch], batch_first=True)
        return ids, (ids > 0).long(), torch.tensor([label for _, label in batch])

    order = torch.Generator().manual_seed(3)
    return DataLoader(items, batch_size=5, collate_fn=pad, shuffle=shuffle, generator=order)  # type: ignore[arg-type]


@pytest.mark.parametrize("shuffle", [False, True])
def test_texts_of_any_length_are_found_where_they_are_padded_alike(shuffle: bool) -> None:
    plain, cached, cache = both(
        lambda: Texts(tiny_bert(2)),
        lambda: [FreezeBackbone(trainable_layers=1)],
        data=lambda: lengths(shuffle),
        epochs=6,
    )
    assert cached.losses == pytest.approx(plain.losses, rel=1e-5)
    assert cache.stats.hits > 24
    assert cache.stats.misses > (24 if shuffle else 0)
