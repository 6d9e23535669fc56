"""Give the top layers, or any named tensors, a fresh start."""

from __future__ import annotations

from typing import Any

import torch

from lightning_freeze.arguments import call_of, whole
from lightning_freeze.callbacks._copies import forget_model, own_state
from lightning_freeze.callbacks._lightning import (
    Callback,
    LightningModule,
    Trainer,
    is_fitting,
    rank_zero_warn,
)
from lightning_freeze.callbacks.base import by_tuner, key_of, saved_state, start
from lightning_freeze.callbacks.fit_state import enter, fit_state_of, label
from lightning_freeze.engine import reinitialized as renewed
from lightning_freeze.engine.distributed import check_supported, from_all_ranks, together
from lightning_freeze.engine.optimizers import forget
from lightning_freeze.engine.weights import Init, check_init, check_possible, reinit_names
from lightning_freeze.errors import ArgumentError
from lightning_freeze.model.index import ModelIndex
from lightning_freeze.model.layer_groups import discover
from lightning_freeze.model.selectors import as_selectors, describe, select


class ReinitTopLayers(Callback):
    """Re-initialise the top blocks of the backbone before training, never on a resume.

    Where a resume's checkpoint comes from a run without it, a warning says that it did nothing.

    Pretrained top layers are often too specialised: a fresh start for the top 1 to 6 layers of
    BERT and for its pooler makes fine-tuning on few samples better and steadier (Zhang et al.
    2021, https://arxiv.org/abs/2006.05987).

    Args:
        n_layers: number of blocks at the top.
        params: selectors of further modules or tensors, such as
            `"bert.encoder.layer.0.attention.self.query"`.
        pooler: whether the backbone's pooler goes along with the top layers.
        init: "model" for the model's own way of initialising, or a callable
            `(name, parameter) -> None` that writes each tensor.
        seed: for the random values; drawn from torch's global generator where None. It is the
            same on every rank.

    Raises:
        ArgumentError: an argument is wrong by itself (at construction), or `n_layers` is beyond
            the number of blocks (in `setup`).
        SelectorError, DiscoveryError, ReinitError: in `setup`; the model is left as it was.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[ReinitTopLayers(3, seed=0)], logger=False)
    """

    def __init__(
        self,
        n_layers: int = 0,
        *,
        params: str | list[str] | tuple[str, ...] = (),
        pooler: bool = True,
        init: Init = "model",
        seed: int | None = None,
    ) -> None:
        self.n_layers = whole(n_layers, "n_layers", least=0)
        self.params = as_selectors(params, "params")
        self.pooler = pooler
        check_init(init)
        self.init = init
        self.seed = None if seed is None else whole(seed, "seed", least=0)
        if not self.n_layers and not self.params:
            raise ArgumentError(
                "`ReinitTopLayers` has nothing to do: `n_layers` is 0 and `params` is empty. "
                'Write `ReinitTopLayers(3)`, or `ReinitTopLayers(params=["bert.pooler"])`.'
            )
        self._deferred = False
        self._done: tuple[str, ...] = ()

    def __getstate__(self) -> dict[str, Any]:
        """For pickling and copying."""
        return own_state(self)

    @property
    def state_key(self) -> str:
        """Tells this callback from another `ReinitTopLayers`."""
        init = self.init if isinstance(self.init, str) else describe(self.init)
        return call_of(
            "ReinitTopLayers",
            {"params": [], "pooler": True, "init": "model", "seed": None},
            n_layers=self.n_layers,
            params=key_of(self.params),
            pooler=self.pooler,
            init=init,
            seed=self.seed,
        )

    def reinit_names(self, index: ModelIndex) -> tuple[str, ...]:
        """Names of the tensors that it re-initialises in a model; raises where it can't."""
        chosen = set(select(index, self.params)) if self.params else set()
        if self.n_layers:
            anatomy = discover(index)
            if self.n_layers > anatomy.depth:
                raise ArgumentError(
                    f"`n_layers={self.n_layers}` is beyond the {anatomy.depth} blocks of the "
                    f"backbone, found by {anatomy.rule}. Write at most {anatomy.depth}."
                )
            for block in anatomy.top(self.n_layers):
                chosen.update(block.parameters)
            if self.pooler:
                chosen.update(name for name in anatomy.above if "pooler" in name)
        names = tuple(name for name in index.parameters if name in chosen)
        if self.init == "model":
            check_possible(index, names)
        return names

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Re-initialise, before the weights of a resume are loaded and before ranks are synced."""
        if not is_fitting(trainer):
            return
        check_supported(trainer.strategy)
        # what the module makes later may be the top, or overwrite what is fresh
        self._deferred = enter(trainer, pl_module, self).late
        if not self._deferred and not trainer.global_step:
            with together():
                self._reinit(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Names of what was re-initialised, so that a resume knows."""
        return {"reinitialised": list(self._done)} if self._done else {}

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """On a resume, whose weights stay: say so where they never had a fresh start."""
        if not is_fitting(trainer) or by_tuner(trainer):
            return
        with together():
            saved = saved_state(self, trainer, checkpoint) or {}
            self._done = tuple(saved.get("reinitialised", ()))
            index = ModelIndex.of(pl_module)
            wanted = self.reinit_names(index)
        missed = [name for name in wanted if name not in self._done]
        renewed.forget(index.tensors(missed))
        fit = fit_state_of(trainer)
        if fit is not None:
            fit.fresh -= frozenset(missed)
        if missed:
            many = f" and {len(missed) - 1} more" if missed[1:] else ""
            rank_zero_warn(
                f"`{label(self)}` gives nothing a fresh start on a resume, and the run "
                f"that wrote the checkpoint gave none to `{missed[0]}`{many}: the checkpoint's "
                "weights stay. Load them alone to re-initialise: "
                "`Model.load_from_checkpoint(path)` and `fit` without `ckpt_path`."
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Re-initialise a model that is made in `configure_model`, unless this is a resume."""
        start(trainer, pl_module)

    def start_afresh(self, trainer: Trainer, module: LightningModule) -> None:
        """Before anything else of a fit's start: what `setup` had to leave for later.

        An optimizer that was kept from an earlier fit forgets the moments of what is fresh.
        """
        if trainer.ckpt_path is not None or trainer.global_step:
            return
        with together():
            if self._deferred:
                self._reinit(trainer, module)
            index = ModelIndex.of(module)
            fresh = [index.parameters[name] for name in self.reinit_names(index)]
        forget(trainer.optimizers, fresh)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Keep nothing of the model."""
        forget_model(self)

    def _reinit(self, trainer: Trainer, module: LightningModule) -> None:
        index = ModelIndex.of(module)
        names = self.reinit_names(index)
        drawn: Any = self.seed
        if drawn is None:
            drawn = int(torch.randint(0, 2**31, ()).item())
        seed = from_all_ranks(int(drawn), "the seed of a fresh start")[0]
        reinit_names(index, names, init=self.init, seed=seed)
        self._done = names
        fit = fit_state_of(trainer)
        if fit is not None:
            fit.fresh |= frozenset(names)
