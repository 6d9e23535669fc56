"""The table of families is what docs/families.md shows, and one step of training agrees with it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_freeze import FreezeBackbone, TrainableParamAudit, anatomy
from tests.families.known import DIFFERS, TIMM, TORCHVISION, TRANSFORMERS
from tests.families.rows import Row
from tests.families.table import (
    differs,
    made_with,
    page,
    timm_rows,
    torchvision_rows,
    transformers_rows,
)
from tests.families.tiny import small
from tests.toys import changed, state, trainer

PAGE = Path(__file__).parents[2] / "docs" / "families.md"

# families whose smallest model trains in a moment on the CPU
TRAINED = """
albert big_bird bert camembert convbert data2vec-text distilbert electra ernie fnet ibert
mobilebert modernbert mpnet nomic_bert nystromformer roberta roformer squeezebert xlm xlm-roberta
xlnet
bamba biogpt bloom cohere ctrl deepseek_v3 falcon falcon_mamba gemma gemma2 glm gpt2 gpt_bigcode
gpt_neo gpt_neox gpt_oss gptj helium jamba lfm2 llama mamba minimax mistral mixtral olmo opt phi
phi3 qwen2 qwen2_moe qwen3 qwen3_moe recurrent_gemma rwkv stablelm starcoder2 xglm
bart blenderbot led longt5 m2m_100 mt5 pegasus prophetnet switch_transformers t5 umt5
deit dinov2 ijepa poolformer resnet segformer vit vit_msn
data2vec-audio hubert speecht5 wav2vec2 wavlm whisper
clip idefics3 siglip
"""


@pytest.fixture(scope="module")
def rows() -> list[tuple[Row, list[int]]]:
    return list(transformers_rows())


@pytest.fixture(scope="module")
def others() -> list[Row]:
    pytest.importorskip("timm")
    pytest.importorskip("torchvision.models")
    return [*timm_rows(), *torchvision_rows()]


@pytest.mark.slow
def test_the_page_is_what_the_command_makes(
    rows: list[tuple[Row, list[int]]], others: list[Row]
) -> None:
    kept = PAGE.read_text(encoding="utf-8")
    if made_with() not in kept:
        pytest.skip(f"docs/families.md was made with other versions; here: {made_with()}")
    made = page(rows, others[: len(TIMM)], others[len(TIMM) :])
    again = "run `python -m tests.families --write`, and read the diff"
    assert made == kept, again


@pytest.mark.slow
def test_each_family_has_blocks_and_each_parameter_is_in_one_group(
    rows: list[tuple[Row, list[int]]], others: list[Row]
) -> None:
    every = [row for row, _ in rows] + others
    assert len(every) == len(TRANSFORMERS) + len(TIMM) + len(TORCHVISION) > 250
    assert [row.family for row in every if not row.partition] == []
    assert [row.family for row in every if sum(row.sizes) < 1] == []


@pytest.mark.slow
def test_each_number_of_blocks_is_in_the_config_or_explained(
    rows: list[tuple[Row, list[int]]],
) -> None:
    if made_with() not in PAGE.read_text(encoding="utf-8"):
        pytest.skip("another version of transformers may have other defaults")
    odd = {row.family for row, named in rows if differs(row, named)}
    assert odd == set(DIFFERS)
    assert len(odd) < len(rows) / 8


class Wrapped(LightningModule):
    """A model from transformers with one batch of its own."""

    def __init__(self, model: nn.Module, batch: dict[str, Tensor]) -> None:
        super().__init__()
        self.model = model
        self.batch = batch

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss: Tensor = self.model(**self.batch).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def batch_for(model: Any) -> dict[str, Tensor]:
    name, config = model.main_input_name, model.config
    size = getattr(getattr(config, "vision_config", config), "image_size", 64)
    size = size if isinstance(size, int) and size <= 64 else 64
    tokens = torch.randint(3, 50, (2, 6))
    tokens[:, -1] = 2
    shapes = {"pixel_values": (2, 3, size, size), "input_values": (2, 400)}
    if name == "input_features":
        shapes[name] = (2, config.num_mel_bins, 128)
    batch = {name: torch.randn(shapes[name]) if name in shapes else tokens}
    classes = any(word in type(model).__name__ for word in ("SequenceC", "ImageC", "AudioC"))
    batch["labels"] = torch.tensor([0, 1]) if classes else tokens.flip(0)
    return batch


@pytest.mark.slow
@pytest.mark.parametrize("family", TRAINED.split())
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_one_step_moves_the_top_block_of_a_family_and_nothing_below(family: str) -> None:
    model = small(family)
    module = Wrapped(model, batch_for(model))
    found = anatomy(module)
    audit = TrainableParamAudit(table=False)
    before = state(module)
    run = trainer(FreezeBackbone(trainable_layers=1), audit, epochs=1)
    run.fit(module, DataLoader([0]))
    moved = changed(before, state(module))
    top = {name for block in found.top(1) for name in block.parameters}
    below = set(found.backbone) - top - set(found.above)
    assert audit.findings == []
    assert moved & top, "the top block didn't move"
    assert not moved & below
    assert found.stem is not None or found.depth > 1


def test_at_least_forty_families_are_trained() -> None:
    assert len(set(TRAINED.split())) >= 40
    assert max(Counter(TRAINED.split()).values()) == 1
