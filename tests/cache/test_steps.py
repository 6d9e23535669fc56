"""How a step calls the model, and how a Trainer makes the steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_freeze import FreezeBackbone, FrozenFeatureCache, GradualFreeze, GradualUnfreeze
from tests.cache.nets import WIDTH, Module, Net, assert_same, both, fitted, loader, stack
from tests.cache.test_exactness import Texts, texts
from tests.toys import trainer
from tests.zoo import tiny_bert


def top_layer() -> list[Any]:
    return [FreezeBackbone(trainable_layers=1)]


class Validates(Texts):
    """Has a metric to watch, and writes it down."""

    def val_dataloader(self) -> Any:
        return texts()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        ids, mask, labels = batch
        loss = self.model(input_ids=ids, attention_mask=mask, labels=labels).loss
        self.losses.append(float(loss))
        self.log("val_loss", loss)


# -- when layers freeze and unfreeze


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (lambda: GradualUnfreeze(unit="step", start=10, every=7), {}),
        (lambda: GradualUnfreeze(unit="step", start=5, every=3), {"accumulate_grad_batches": 3}),
        (lambda: GradualUnfreeze(monitor="val_loss", patience=1), {"val_check_interval": 0.5}),
        (lambda: GradualFreeze(unit="step", start=5, every=9), {"precision": "bf16-mixed"}),
        (
            lambda: GradualFreeze.autofreeze(every=1),
            {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5},
        ),
    ],
    ids=["steps", "steps, accumulating", "monitor", "freezing, bf16", "autofreeze, clipping"],
)
def test_schedules_of_any_clock_end_as_without_a_cache(make: Any, options: dict[str, Any]) -> None:
    plain, cached, cache = both(
        lambda: Validates(tiny_bert(3)), lambda: [make()], data=texts, epochs=10, **options
    )
    assert_same(plain, cached)
    assert cache.stats.hits > 24
    assert cache.stats.aside == ""


def test_a_stage_that_begins_late_in_an_epoch_isnt_judged_by_it() -> None:
    """All that it can find in the next epoch are the few samples that it has seen."""
    plain, cached, cache = both(
        lambda: Texts(tiny_bert(4)),
        lambda: [GradualUnfreeze(unit="step", start=11, every=100)],
        data=texts,
        epochs=6,
    )
    assert_same(plain, cached)
    assert cache.stats.aside == ""
    assert cache.stats.hits > 24


# -- options of the trainer


@pytest.mark.parametrize(
    "options",
    [
        {"overfit_batches": 2},
        {"limit_train_batches": 2, "limit_val_batches": 0.5},
        {"val_check_interval": 1},
        {"inference_mode": False, "num_sanity_val_steps": 2},
        {"callbacks": lambda: [StochasticWeightAveraging(1e-3, swa_epoch_start=2)]},
    ],
    ids=lambda options: next(iter(options)),
)
def test_more_options_of_the_trainer_change_nothing(options: dict[str, Any]) -> None:
    others = dict(options)
    more = others.pop("callbacks", list)
    plain, cached, cache = both(
        lambda: Validates(tiny_bert(3)),
        lambda: [*top_layer(), *more()],
        data=texts,
        epochs=5,
        **others,
    )
    assert_same(plain, cached)
    assert cache.stats.hits > 24


def test_rows_of_a_validation_in_inference_mode_are_fit_for_training() -> None:
    """Half of the samples of an epoch are drawn; all are in the validation set."""
    plain, cached, cache = both(
        lambda: Validates(tiny_bert(3)),
        lambda: [FreezeBackbone()],
        data=lambda: DataLoader(
            texts().dataset, batch_size=6, shuffle=True, generator=torch.Generator().manual_seed(3)
        ),
        epochs=6,
        limit_train_batches=2,
    )
    assert cached.losses == pytest.approx(plain.losses, rel=1e-5)
    assert cache.stats.hits > 100


def test_loaders_that_are_made_anew_each_epoch_are_no_matter() -> None:
    class Reloads(Module):
        made = 0

        def train_dataloader(self) -> Any:
            self.made += 1
            return loader(24, (6, 4, 3, 8)[self.made % 4])

    def fit(*callbacks: Any) -> Any:
        torch.manual_seed(7)
        module = Reloads(Net())
        trainer(*callbacks, epochs=5, reload_dataloaders_every_n_epochs=1).fit(module)
        return module

    cache = FrozenFeatureCache()
    plain, cached = fit(), fit(cache)
    assert cached.losses == pytest.approx(plain.losses, rel=1e-5)
    assert cached.made == 5
    assert cache.stats.hits > 50


@pytest.mark.parametrize("mode", ["min_size", "max_size", "max_size_cycle"])
def test_loaders_in_a_list_share_a_cache(mode: Any) -> None:
    class Pairs(Module):
        def loss(self, batch: Any) -> Tensor:
            return sum((super(Pairs, self).loss(one) for one in batch if one), torch.zeros(()))

        def val_dataloader(self) -> Any:
            return [loader(12, 4, seed=5), loader(13, 4, seed=6)]

        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.losses.append(float(super().loss(batch)))

    plain, cached, cache = both(
        lambda: Pairs(Net()), data=lambda: CombinedLoader([loader(), loader(13, 5, seed=9)], mode)
    )
    assert_same(plain, cached)
    assert cache.stats.hits > 100


class ByStep(Texts):
    """Takes batch and dropout by the step, so that a resumed run does the same."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        torch.manual_seed(1000 + self.global_step)
        batches = list(texts())
        return super().training_step(batches[self.global_step % len(batches)], batch_idx)


@pytest.mark.parametrize("stop", [6, 9])
@pytest.mark.parametrize(
    "make", [top_layer, lambda: [GradualFreeze(unit="step", start=5, every=8)]], ids=["one", "more"]
)
def test_a_resume_within_an_epoch_begins_with_an_empty_cache(
    make: Any, stop: int, tmp_path: Path
) -> None:
    """To the bit the run that was never broken off."""

    def run(cache: list[Any], folder: str) -> Any:
        torch.manual_seed(7)
        first, again = ByStep(tiny_bert(3)), ByStep(tiny_bert(3))
        saver = ModelCheckpoint(tmp_path / folder, every_n_train_steps=stop, save_top_k=-1)
        trainer(*make(), *cache, saver, epochs=9, max_steps=stop, enable_checkpointing=True).fit(
            first, texts()
        )
        (path,) = (tmp_path / folder).glob("*.ckpt")
        trainer(*make(), *cache, epochs=7).fit(again, texts(), ckpt_path=str(path))
        return again

    cache = FrozenFeatureCache()
    plain, cached = run([], "plain"), run([cache], "cached")
    assert_same(plain, cached)
    assert cache.stats.hits > 0
    assert cache.stats.aside == ""


def test_after_the_fit_the_model_is_evaluated_and_fitted_as_ever() -> None:
    class All(Validates):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.validation_step(batch, batch_idx)

        def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
            logits: Tensor = self.model(input_ids=batch[0], attention_mask=batch[1]).logits
            return logits

    def run(*cache: Any) -> Any:
        torch.manual_seed(7)
        module, callbacks = All(tiny_bert(3)), [*top_layer(), *cache]
        fit = trainer(*callbacks, epochs=3)
        fit.fit(module, texts())
        fit.validate(module, texts(), verbose=False)
        fit.test(module, texts(), verbose=False)
        module.losses += [float(t.sum()) for t in fit.predict(module, texts())]
        assert not [m for m in module.modules() if "forward" in vars(m)]
        assert not [m for m in module.modules() if m._forward_hooks or m._forward_pre_hooks]
        fit.fit_loop.max_epochs = 6
        fit.fit(module, texts())  # goes on
        trainer(*callbacks, epochs=2).fit(module, texts())
        return module

    cache = FrozenFeatureCache()
    plain, cached = run(), run(cache)
    assert_same(plain, cached)
    assert cache.stats.hits > 0


# -- what a step does


class TwoCalls(Texts):
    """Steps twice per batch by hand, the second time with other inputs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        ids, mask, labels = batch
        optimizer: Any = self.optimizers()
        for order in (torch.arange(len(ids)), torch.arange(len(ids)).flip(0)):
            out = self.model(input_ids=ids[order], attention_mask=mask[order], labels=labels)
            optimizer.zero_grad()
            self.manual_backward(out.loss)
            optimizer.step()
            self.losses.append(float(out.loss.detach()))


class Contrastive(Texts):
    """The same batch twice: only dropout in what trains makes the difference (SimCSE)."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        ids, mask, _ = batch
        one, other = (
            self.model.bert(input_ids=ids, attention_mask=mask).last_hidden_state[:, 0]
            for _ in range(2)
        )
        assert not torch.equal(one, other)
        likeness = nn.functional.cosine_similarity(one[:, None], other[None], -1) / 0.05
        loss = nn.functional.cross_entropy(likeness, torch.arange(len(ids)))
        self.losses.append(float(loss.detach()))
        return loss


class CallsTrain(Texts):
    """Puts all into train mode in each step; what is frozen goes back to eval as it is entered."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.model.train()
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("kind", [TwoCalls, Contrastive, CallsTrain])
def test_a_model_may_be_called_more_than_once_in_a_step(kind: Any) -> None:
    plain, cached, cache = both(lambda: kind(tiny_bert(3)), top_layer, data=texts)
    assert_same(plain, cached)
    assert cache.stats.hits > 50


class Distils(Module):
    """A frozen teacher that is called after what trains."""

    grad = torch.enable_grad

    def __init__(self) -> None:
        super().__init__(Net())
        self.net.requires_grad_(False).eval()
        self.student = nn.Linear(WIDTH, 3)

    def loss(self, batch: Any) -> Tensor:
        own = self.student(batch[0])
        with self.grad():
            taught = self.net(batch[0])
        return nn.functional.mse_loss(own, taught.clone())


class WithoutGradients(Distils):
    grad = torch.no_grad


class ByInference(Distils):
    grad = torch.inference_mode


@pytest.mark.parametrize("kind", [Distils, WithoutGradients, ByInference])
def test_a_frozen_teacher_is_asked_once_per_sample(kind: Any) -> None:
    plain, cached, cache = both(kind)
    assert_same(plain, cached)
    assert cache.stats.skipped == "net"
    assert cache.stats.hits > 50
    assert cached.calls < plain.calls


class Adversary(Distils):
    """What trains is in front of the frozen part in one of the calls."""

    def loss(self, batch: Any) -> Tensor:
        made = self.net(self.student(batch[0]).repeat(1, 2))
        return made.mean() - self.net(batch[0]).mean()


@pytest.mark.filterwarnings("ignore:.*FrozenFeatureCache:UserWarning")
def test_a_frozen_critic_of_what_trains_is_called_as_it_is() -> None:
    plain, cached, cache = both(Adversary)
    assert_same(plain, cached)
    assert cache.stats.hits == 0


class Prompted(Net):
    """Without gradients one doesn't see that what trains is mixed in."""

    def __init__(self) -> None:
        super().__init__()
        self.prompt = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = self.front[0](x) + self.prompt
        return self.head(self.back(self.front[2](self.front[1](x))))


@pytest.mark.filterwarnings("ignore:.*FrozenFeatureCache:UserWarning")
def test_a_call_without_gradients_first_hides_no_prompt() -> None:
    class Twice(Module):
        def loss(self, batch: Any) -> Tensor:
            with torch.no_grad():
                before = self.net(batch[0])
            return super().loss(batch) + (self.net(batch[0]) - before.sin()).pow(2).mean()

    plain, cached, cache = both(lambda: Twice(Prompted()))
    assert_same(plain, cached)
    assert cache.stats.hits == 0


class InPlaceBetween(nn.Module):
    """Writes to what a layer has returned; a later stage needs what was returned."""

    def __init__(self) -> None:
        super().__init__()
        self.front = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(3)))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.front[0](x)
        for layer in self.front[1:]:
            x += 1.0
            x = layer(x)
        return self.head(x)


@pytest.mark.filterwarnings("ignore:.*FrozenFeatureCache:UserWarning")
def test_rows_for_a_later_stage_are_what_the_layer_returned() -> None:
    plain, cached, cache = both(
        lambda: Module(InPlaceBetween(), lambda net: net.front[0]),
        lambda: [GradualUnfreeze({0: "net.head", 2: "net.front.2", 4: "net.front.1"})],
        data=lambda: loader(48, 6),
        epochs=7,
    )
    assert_same(plain, cached)
    assert cache.stats.hits > 24


class ByTheClock(Module):
    """Its `forward` does something else from a step on, between frozen layers."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.net.front[0](x)
        x = x * 1.5 if self.global_step >= 20 else x
        return self.net.head(self.net.back(self.net.front[1](x)))

    def loss(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])


class Logs(ByTheClock):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.net.front:
            x = layer(x)
        y = self.net.head(self.net.back(x))
        self.log("mean", y.mean())
        return y


def test_a_forward_that_reads_the_step_is_left_alone_and_one_that_logs_is_not() -> None:
    def data() -> DataLoader[Any]:
        return loader(96, 6)

    with pytest.warns(UserWarning, match=r"`ByTheClock.forward` reads `global_step`"):
        plain, cached, cache = both(lambda: ByTheClock(Net()), data=data)
    assert_same(plain, cached)
    assert cache.stats.hits == 0
    plain, cached, cache = both(lambda: Logs(Net()), data=data)
    assert_same(plain, cached)
    assert cache.stats.hits > 96


class NoGradAround(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.front = stack(2).requires_grad_(False).eval()
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.front(x)
        return self.head(x)


def test_a_front_that_is_called_without_gradients_is_cached() -> None:
    plain, cached, cache = both(lambda: Module(NoGradAround()))
    assert_same(plain, cached)
    assert cache.stats.hits > 50


def test_a_fit_with_nothing_in_front_says_so() -> None:
    class Nothing(Net):
        def __init__(self) -> None:
            super().__init__()
            self.requires_grad_(True)

    with pytest.warns(UserWarning, match="did nothing: no frozen layer is called before the first"):
        fitted(lambda: Module(Nothing()), FrozenFeatureCache(), epochs=1)


def test_a_schedule_that_hasnt_frozen_anything_yet_is_no_mistake() -> None:
    fitted(lambda: Texts(tiny_bert(2)), GradualFreeze(start=5), FrozenFeatureCache(), data=texts)
