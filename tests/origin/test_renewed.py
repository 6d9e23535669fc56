"""What we re-initialised: a record, and whether it still has the bytes that it was given."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from torch import nn

from lightning_freeze import ReinitTopLayers, reinit, summarize
from lightning_freeze.errors import ReinitError
from tests.origin.asking import states
from tests.toys import Toy, loader, seeded, trainer
from tests.verify.files import save

HEAD = ("head.weight", "head.bias")


def renewed(model: nn.Module, origin: Any = None) -> set[str]:
    return {name for name, state in states(model, origin).items() if state == "re-initialised"}


def details(model: nn.Module) -> dict[str, str]:
    return {row.name: row.origin_detail for row in summarize(model).rows}


def test_plain_modules_have_a_record_too() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    reinit(model, "1")
    assert states(model) == {
        "0.weight": "unknown",
        "0.bias": "unknown",
        "1.weight": "re-initialised",
        "1.bias": "re-initialised",
    }


def test_weights_that_are_loaded_afterwards_end_it(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    path = save(tmp_path / "net.pt", model.state_dict())
    reinit(model, "1", seed=1)
    assert renewed(model, path) == {"1.weight", "1.bias"}
    model.load_state_dict(torch.load(path))
    assert details(model)["1.weight"] == "changed since"
    assert set(states(model, path).values()) == {"loaded"}


@pytest.mark.parametrize("how", ["data", "copy_", "step"])
def test_any_write_ends_it_whatever_versions_say(how: str) -> None:
    model = nn.Linear(2, 2)
    reinit(model, "**")
    with torch.no_grad():
        if how == "data":
            model.weight.data = torch.ones(2, 2)
        elif how == "copy_":
            model.weight.copy_(torch.ones(2, 2))
        else:
            model.weight.grad = torch.ones(2, 2)
            torch.optim.AdamW([model.weight], fused=True).step()
    assert set(states(model).values()) == {"re-initialised"}
    assert details(model) == {"weight": "changed since", "bias": ""}
    assert "re-initialised (changed since)" in summarize(model).to_text("parameter")


def test_moving_a_module_keeps_it() -> None:
    model = nn.Linear(2, 2)
    reinit(model, "**")
    model.to("cpu").requires_grad_(False)
    assert renewed(model) == {"weight", "bias"}


def test_a_failed_re_initialisation_leaves_no_record() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ReinitError, match="changed nothing"):
        reinit(model, "weight", init=lambda name, parameter: None)
    assert states(model)["weight"] == "unknown"


def test_a_replaced_parameter_has_no_record() -> None:
    model = nn.Linear(2, 2)
    reinit(model, "**")
    model.weight = nn.Parameter(model.weight.detach().clone())
    assert states(model)["weight"] == "unknown"


def test_the_record_keeps_no_model_alive() -> None:
    model = nn.Linear(2, 2)
    reinit(model, "**")
    held = weakref.ref(model.weight)
    del model
    gc.collect()
    assert held() is None


def test_an_equal_value_by_chance_is_still_a_fresh_start(saved: Path) -> None:
    model = t.BertForMaskedLM.from_pretrained(saved)
    for _ in range(2):  # the second time, ones are ones again
        reinit(model, ["bert.embeddings.LayerNorm", "bert.embeddings.token_type_embeddings"])
        assert states(model)["bert.embeddings.LayerNorm.weight"] == "re-initialised"


# In a fit


def test_the_callback_leaves_it_and_training_changes_it() -> None:
    model = seeded(Toy)
    callback = ReinitTopLayers(params="head", seed=3)
    trainer(callback, epochs=0).fit(model, loader())
    assert {states(model)[name] for name in HEAD} == {"re-initialised"}
    trainer(epochs=1).fit(model, loader())
    assert {states(model)[name] for name in HEAD} == {"re-initialised"}
    assert {details(model)[name] for name in HEAD} == {"changed since"}


def test_a_resume_of_a_run_that_gave_no_fresh_start_leaves_none(tmp_path: Path) -> None:
    model = seeded(Toy)
    first = trainer(epochs=1)
    first.fit(model, loader())
    first.save_checkpoint(tmp_path / "run.ckpt")
    with pytest.warns(UserWarning, match="gives nothing a fresh start on a resume"):
        trainer(ReinitTopLayers(params="head"), epochs=1).fit(
            model, loader(), ckpt_path=tmp_path / "run.ckpt"
        )
    assert "re-initialised" not in str(summarize(model))
