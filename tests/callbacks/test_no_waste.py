"""Frozen layers cost nothing: no graph, no saved activations, gradients or optimizer state."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lightning_freeze import FreezeBackbone, GradualFreeze, GradualUnfreeze, TrainableParamAudit
from tests.cache.test_exactness import texts
from tests.toys import trainer
from tests.zoo import tiny_bert

LAYERS = 4


class Watched(LightningModule):
    """Notes, for each step, the bytes that the forward pass saves for the backward pass."""

    def __init__(self, by_hand: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model: Any = tiny_bert(LAYERS)
        self.saved: list[int] = []
        self.graphs: list[list[bool]] = []
        if by_hand is not None:
            body = self.model.bert
            frozen = [body.embeddings, *body.encoder.layer[: LAYERS - by_hand]]
            for module in frozen if by_hand else [body]:
                module.requires_grad_(False).eval()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        ids, mask, labels = batch
        weights = {p.untyped_storage().data_ptr() for p in self.parameters()}
        seen: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            made = self.model(
                input_ids=ids, attention_mask=mask, labels=labels, output_hidden_states=True
            )
        self.saved.append(sum(seen.values()))
        self.graphs.append([state.grad_fn is not None for state in made.hidden_states])
        loss: Tensor = made.loss
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)


class Held(Callback):
    """Notes, at each epoch's first step, bytes of gradients and of optimizer state."""

    def __init__(self) -> None:
        self.gradients: list[int] = []
        self.state: list[int] = []
        self.trained: list[int] = []

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 0:
            self._note(trainer, pl_module)

    def _note(self, trainer: Trainer, module: nn.Module) -> None:
        weights = list(module.parameters())
        grads = [p.grad for p in weights if p.grad is not None]
        tables = trainer.optimizers[0].state.values()
        moments = [t for table in tables for t in table.values() if t.dim()]
        self.gradients.append(sum(t.nbytes for t in grads))
        self.state.append(sum(t.nbytes for t in moments))
        self.trained.append(sum(p.nbytes for p in weights if p.requires_grad))


def fitted(module: Watched, *callbacks: Callback, epochs: int = 1) -> Watched:
    trainer(*callbacks, epochs=epochs).fit(module, texts())
    return module


def test_a_frozen_front_builds_no_graph_and_saves_nothing() -> None:
    full = fitted(Watched())
    for layers in (0, 2):
        ours = fitted(Watched(), FreezeBackbone(trainable_layers=layers), TrainableParamAudit())
        hand = fitted(Watched(by_hand=layers))
        assert (
            ours.graphs[-1] == hand.graphs[-1] == [False] * (LAYERS + 1 - layers) + [True] * layers
        )
        assert ours.saved == hand.saved
        assert 0 < ours.saved[-1] < full.saved[-1] / (2 if layers == 0 else 1)
    assert full.graphs[-1] == [True] * (LAYERS + 1)


def test_what_freezes_gives_gradients_and_optimizer_state_back_at_once() -> None:
    held = Held()
    fitted(Watched(), GradualFreeze(start=1, every=1), held, epochs=LAYERS + 2)
    assert held.trained == sorted(held.trained, reverse=True)
    assert held.trained[-1] < held.trained[0] / 2
    # AdamW keeps two numbers for each weight; at the first step there is none yet
    assert held.state[1:] == [2 * size for size in held.trained[1:]]
    assert all(given <= size for given, size in zip(held.gradients, held.trained))


def test_what_is_still_frozen_has_no_state_and_no_gradients_yet() -> None:
    held = Held()
    fitted(Watched(), GradualUnfreeze(start=1, every=1), held, epochs=LAYERS + 2)
    assert held.trained == sorted(held.trained)
    assert held.trained[0] < held.trained[-1] / 2
    # what an epoch trains has state when the next one begins
    assert held.state[1:] == [2 * size for size in held.trained[:-1]]
