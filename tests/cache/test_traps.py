"""Where the frozen front can't be left out the cache steps aside, and is never wrong."""

from __future__ import annotations

import errno
import os
import re
import warnings
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn

from lightning_freeze import FreezeBackbone, FrozenFeatureCache
from tests.cache.nets import WIDTH, Module, Net, assert_same, both, fitted, loader
from tests.cache.test_exactness import Texts, texts
from tests.zoo import tiny_bert


class Dropping(Net):
    def __init__(self) -> None:
        super().__init__()
        self.front[0].append(nn.Dropout(0.5))
        self.front.train()


class Noisy(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 0.0 * self.front(x + torch.rand(1)))


class RandomBetween(Net):
    """Draws between two frozen layers, outside of any module."""

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.dropout(self.front[0](x), 0.5)
        return self.head(self.back(self.front[2](self.front[1](x))))


class Statistics(Net):
    def __init__(self) -> None:
        super().__init__()
        self.front[0].append(nn.BatchNorm1d(WIDTH).requires_grad_(False))
        self.front.train()


class AcrossTheBatch(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.front[0](x)
        return self.head(self.back(self.front[2](self.front[1](x - x.mean(0)))))


class Stash(Net):
    """A layer that puts its activation aside; the loss reads it there."""

    class Layer(nn.Linear):
        kept: Tensor

        def forward(self, x: Tensor) -> Tensor:
            self.kept = super().forward(x)
            return self.kept

    def __init__(self) -> None:
        super().__init__()
        self.front[0][0] = self.Layer(WIDTH, WIDTH)
        self.front.requires_grad_(False).eval()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.front[0][0].kept[:, :3].mean()


SEEN: list[Tensor] = []


class Globally(Net):
    """A layer whose activation goes into a list that is somewhere else."""

    class Layer(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            SEEN.append(y.clone())
            return y

    def __init__(self) -> None:
        super().__init__()
        self.front[0][0] = self.Layer(WIDTH, WIDTH)
        self.front.requires_grad_(False).eval()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + SEEN[-1].mean()


class Counting(Net):
    """A layer that works otherwise each time."""

    class Layer(nn.Linear):
        count = 0

        def forward(self, x: Tensor) -> Tensor:
            self.count = self.count + 1
            return super().forward(x) * self.count

    def __init__(self) -> None:
        super().__init__()
        self.front[0][0] = self.Layer(WIDTH, WIDTH)
        self.front.requires_grad_(False).eval()


class Prompted(Net):
    """What trains is mixed in between frozen layers."""

    def __init__(self) -> None:
        super().__init__()
        self.prompt = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = self.front[0](x) + self.prompt
        return self.head(self.back(self.front[2](self.front[1](x))))


class WritesToItsInput(Net):
    def forward(self, x: Tensor) -> Tensor:
        x.mul_(1.5)
        y = self.front[2](self.front[1](self.front[0](x)))
        return self.head(self.back(y)) + x.mean()


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Noisy, "draws random numbers"),
        (RandomBetween, "draws random numbers"),
        (AcrossTheBatch, "samples of a batch influence each other"),
        (Stash, "changes itself as it is called"),
        (Globally, "kept somewhere"),
        (Counting, "changes itself as it is called"),
        (Prompted, "the output of a frozen Sequential needs a gradient"),
        (WritesToItsInput, "changes its input in place"),
    ],
)
def test_a_model_that_needs_its_front_is_left_alone(kind: type[Net], reason: str) -> None:
    with pytest.warns(UserWarning, match=f"FrozenFeatureCache .*{reason}"):
        plain, cached, cache = both(lambda: Module(kind()))
    assert_same(plain, cached)
    assert cache.stats.hits == 0


@pytest.mark.parametrize(
    ("kind", "before", "write", "skipped"),
    [
        (Dropping, "Dropout", "p = 0.0", "net.front.0.0 ... net.front.0.1"),
        (Statistics, "BatchNorm1d", "eval()", "net.front.0.0 ... net.front.0.1"),
    ],
)
def test_the_front_ends_where_a_layer_may_not_be_left_out(
    kind: type[Net], before: str, write: str, skipped: str
) -> None:
    said = re.escape(
        f"less than it could: it ends before `net.front.0.2`, a {before}, which isn't trained, but "
        f"is in train mode (if that isn't wanted, write `net.front.0.2.{write}` before the fit)"
    )
    with pytest.warns(UserWarning, match=said):
        plain, cached, cache = both(lambda: Module(kind()))
    assert_same(plain, cached)
    assert cache.stats.skipped == skipped


class UNet(Net):
    """What a frozen layer gives is used far behind."""

    def forward(self, x: Tensor) -> Tensor:
        first = self.front[0](x)
        second = self.front[2](self.front[1](first))
        return self.head(self.back(second) + first)


class Returned(Net):
    def forward(self, x: Tensor) -> Any:
        hidden = []
        for layer in self.front:
            x = layer(x)
            hidden.append(x)
        return self.head(self.back(x)) + torch.stack(hidden).mean()


@pytest.mark.parametrize("kind", [UNet, Returned])
def test_activations_that_are_used_elsewhere_are_kept_as_well(kind: type[Net]) -> None:
    plain, cached, cache = both(lambda: Module(kind()))
    assert_same(plain, cached)
    assert cache.stats.hits > 50
    _, _, one = both(lambda: Module(Net()))
    assert cache.stats.nbytes > one.stats.nbytes


class InPlace(Net):
    """Writes to what the frozen front returned."""

    def forward(self, x: Tensor) -> Tensor:
        features = self.front(x)
        features += 1.0
        return self.head(self.back(features))


class ChangesItsBatch(Module):
    def loss(self, batch: Any) -> Tensor:
        loss = super().loss(batch)
        batch[0].zero_()
        return loss


def test_writing_to_features_or_to_the_batch_afterwards_changes_no_row() -> None:
    plain, cached, cache = both(lambda: Module(InPlace()))
    assert_same(plain, cached)
    assert cache.stats.hits > 50
    plain, cached, cache = both(lambda: ChangesItsBatch(Net()))
    assert_same(plain, cached)
    assert cache.stats.hits > 50


def test_hidden_states_that_are_asked_for_are_right() -> None:
    class Hidden(Texts):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            ids, mask, labels = batch
            out = self.model(
                input_ids=ids, attention_mask=mask, labels=labels, output_hidden_states=True
            )
            loss = out.loss + sum(h.pow(2).mean() for h in out.hidden_states)
            self.losses.append(float(loss.detach()))
            return loss

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain, cached, _ = both(
            lambda: Hidden(tiny_bert(3)), lambda: [FreezeBackbone(trainable_layers=1)], data=texts
        )
    assert_same(plain, cached)


def test_inputs_that_require_a_gradient_get_it() -> None:
    class Adversarial(Module):
        def loss(self, batch: Any) -> Tensor:
            x = batch[0].clone().requires_grad_()
            loss = nn.functional.cross_entropy(self.net(x), batch[1])
            (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
            return loss + gradient.pow(2).sum()

    with pytest.warns(UserWarning, match="an input of the frozen part requires a gradient"):
        plain, cached, cache = both(lambda: Adversarial(Net()))
    assert_same(plain, cached)
    assert cache.stats.hits == 0


class Augmented(Module):
    def loss(self, batch: Any) -> Tensor:
        return super().loss((batch[0] + torch.rand(()), batch[1]))


def test_augmented_samples_miss_and_the_cache_steps_aside() -> None:
    with pytest.warns(UserWarning, match="samples don't come back"):
        plain, cached, cache = both(lambda: Augmented(Net()))
    assert_same(plain, cached)
    assert cache.stats.hits == 0
    assert cache.stats.misses < 24 * 4  # it gave up before the end


def test_two_loaders_share_a_cache() -> None:
    class Pairs(Module):
        def loss(self, batch: Any) -> Tensor:
            return super().loss(batch["a"]) + super().loss(batch["b"])

    plain, cached, cache = both(
        lambda: Pairs(Net()), data=lambda: {"a": loader(), "b": loader(seed=9)}
    )
    assert_same(plain, cached)
    assert cache.stats.hits > 100


def test_a_cache_without_room_for_all_uses_what_it_has() -> None:
    plain, cached, cache = both(lambda: Module(Net()), cache=lambda: FrozenFeatureCache(3300))
    assert cached.losses == pytest.approx(plain.losses, rel=1e-5)
    assert 0 < cache.stats.nbytes <= 3300
    assert 0.2 < cache.stats.hit_rate < 0.6


def test_a_full_disk_ends_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.warns(UserWarning, match="No space left on device"):
        plain, cached, cache = both(
            lambda: Module(Net()), cache=lambda: FrozenFeatureCache(store="disk", folder=tmp_path)
        )
    assert_same(plain, cached)
    assert cache.stats.hits == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("files", [1, 3])
def test_a_limit_of_the_system_on_files_is_a_full_disk(files: int, tmp_path: Any) -> None:
    """A real one: the kernel refuses to make a file so large, the first or a later one."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    row = WIDTH * 4
    largest = (6 if files == 1 else 13) * row - 1
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, before[1]))
        with pytest.warns(UserWarning, match="its file can't be written: File too large"):
            plain, cached, cache = both(
                lambda: Module(Net()),
                cache=lambda: FrozenFeatureCache(store="disk", folder=tmp_path),
                data=lambda: loader(48, 6),
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert_same(plain, cached)
    assert cache.stats.aside != ""
    assert (cache.stats.misses > 0) is (files > 1)
    assert list(tmp_path.iterdir()) == []


def test_files_are_gone_after_the_fit_and_after_an_exception(tmp_path: Any) -> None:
    class Breaks(Callback):
        def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
            if trainer.current_epoch == 2:
                raise RuntimeError("broken off")

    for extra in ([], [Breaks()]):
        cache = FrozenFeatureCache(store="disk", folder=tmp_path)
        if extra:
            with pytest.raises(RuntimeError, match="broken off"):
                fitted(lambda: Module(Net()), cache, *extra)
        else:
            fitted(lambda: Module(Net()), cache)
        assert cache.stats.nbytes > 0
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("hidden", [False, True], ids=["in place", "through .data"])
def test_frozen_weights_that_change_make_old_rows_worthless(hidden: bool) -> None:
    class Drift(Callback):
        def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
            if trainer.current_epoch == 2:
                weight = module.net.front[0][0].weight
                with torch.no_grad():
                    (weight.data if hidden else weight).add_(0.5)

    # it comes before the cache in the list: epoch starts are seen in that order
    plain, cached, cache = both(lambda: Module(Net()), lambda: [Drift()], epochs=5)
    assert_same(plain, cached)
    assert cache.stats.misses == 24 + 24
    assert cache.stats.hits > 20


def test_nothing_is_left_on_the_model() -> None:
    module = fitted(lambda: Module(Net()), FrozenFeatureCache())
    assert not [m for m in module.modules() if "forward" in vars(m)]
    again = fitted(lambda: module, FrozenFeatureCache())
    assert len(again.losses) == 32


def test_the_same_callback_starts_clean_in_a_second_fit() -> None:
    cache = FrozenFeatureCache()
    fitted(lambda: Module(Net()), cache)
    first = cache.stats
    fitted(lambda: Module(Net()), cache)
    assert cache.stats is not first
    assert (cache.stats.hits, cache.stats.misses) == (first.hits, first.misses)


def test_layers_called_from_the_training_step_itself_are_cached_one_by_one() -> None:
    class Inline(Module):
        def loss(self, batch: Any) -> Tensor:
            x = self.net.front(batch[0])
            return nn.functional.cross_entropy(self.net.head(self.net.back(x)), batch[1])

    plain, cached, cache = both(lambda: Inline(Net()))
    assert_same(plain, cached)
    assert cache.stats.hits > 50


def test_an_error_of_the_models_own_stays_what_it_was() -> None:
    class Fails(Net):
        def forward(self, x: Tensor) -> Tensor:
            y = self.head(self.back(self.front[2](self.front[1](self.front[0](x)))))
            self.count = getattr(self, "count", 0) + 1
            if self.count > 9:
                raise ArithmeticError("of the model's own")
            return y

    with pytest.raises(ArithmeticError, match="of the model's own"):
        fitted(lambda: Module(Fails()), FrozenFeatureCache())
