"""F12, F13, F16 to F19, F23: one tensor under two names, other tensors under the old names."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from transformers import BertConfig, BertForMaskedLM

from lightning_freeze import FreezeBackbone, TrainableParamAudit, freeze
from tests.catalogue.harness import Do, audited, codes, one, row
from tests.toys import Backbone, Toy, changed, loader, seeded, state, trainable, trainer

BACKBONE = tuple(f"backbone.{name}" for name, _ in Backbone().named_parameters())
NORMS = tuple(name for name in BACKBONE if ".norm." in name)


def in_epoch_1(act: Callable[[Any], Any]) -> Do:
    """Does something to the module at the start of epoch 1."""
    return Do(at=4, on_train_epoch_start=lambda trainer, module: act(module))


def frozen_with(act: Callable[[Any], Any], make: Any = Toy) -> TrainableParamAudit:
    """A fit with a frozen backbone, in which something is done at the start of epoch 1."""
    return audited(seeded(make), FreezeBackbone(), in_epoch_1(act))


# F12, F13


class MaskedLM(Toy):
    """A language model whose decoder is its word embedding."""

    def __init__(self, *, tied: bool = True) -> None:
        super().__init__(lambda m: torch.optim.SGD(m.parameters(), 0.1))
        del self.backbone, self.head
        sizes = {"hidden_size": 8, "intermediate_size": 16, "max_position_embeddings": 8}
        layers = {"num_hidden_layers": 1, "num_attention_heads": 2}
        config = BertConfig(vocab_size=20, tie_word_embeddings=tied, **sizes, **layers)
        self.model = BertForMaskedLM(config).train()

    def forward(self, x: Tensor) -> Tensor:
        tokens = (x.abs() * 10).long() % 20
        return self.model(input_ids=tokens).logits[:, 0, :3]


WORDS = "model.bert.embeddings.word_embeddings.weight"
DECODER = "model.cls.predictions.decoder.weight"


@row("F12", told="the table, and what `freeze` returns: one tensor, frozen under both names")
def test_f12_head_that_freezes_with_the_embedding_is_told_in_the_table(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, selector in ((WORDS, "bert.embeddings"), (DECODER, "cls.predictions.decoder")):
        model = seeded(MaskedLM)
        assert WORDS in freeze(model, selector)
        assert not moved_in_fit(model) & {WORDS, DECODER}
        assert f"one tensor: {WORDS} = {DECODER}" in capsys.readouterr().out
        model = seeded(lambda: MaskedLM(tied=False))  # control
        assert name in freeze(model, selector)
        assert moved_in_fit(model) & {WORDS, DECODER} == {WORDS, DECODER} - {name}
        assert WORDS not in capsys.readouterr().out


def moved_in_fit(model: Any) -> set[str]:
    before = state(model)
    trainer(TrainableParamAudit(), epochs=1).fit(model, loader())
    return changed(before, state(model))


def resize(module: Any) -> None:
    module.model.resize_token_embeddings(24, mean_resizing=False)


def resize_as_it_was(module: Any) -> None:
    """In older transformers: another module, whose tensor is new and trains."""
    embedding = nn.Embedding(24, 8)
    embedding.weight.data[:20] = module.model.get_input_embeddings().weight
    module.model.set_input_embeddings(embedding)
    module.model.config.vocab_size = 24
    module.model.tie_weights()


@row("F13", found="parameter-replaced")
def test_f13_embedding_that_was_resized_is_told_with_its_shapes() -> None:
    for make in (lambda: MaskedLM(tied=False), MaskedLM):
        model = seeded(make)  # control: before the fit
        resize(model)
        assert audited(model, FreezeBackbone()).findings == []
        audit = frozen_with(resize_as_it_was, make)
        replaced = [found for found in audit.findings if found.code == "parameter-replaced"]
        (words,) = [found for found in replaced if WORDS in found.names]
        assert "(24, 8) instead of (20, 8)" in words.cause
        assert any(f.code == "flag-changed" and WORDS in f.names for f in audit.findings)
        # transformers 5 gives the old Parameter other memory, in which the old rows are the same
        words = one(frozen_with(resize, make), "frozen-changed")
        assert words.names == (WORDS,)
        assert "(24, 8) instead of (20, 8)" in words.cause


# F16


def convert(module: nn.Module) -> nn.Module:
    """`convert_sync_batchnorm` as it was in torch 1.1: other Parameters, another mode."""
    converted = module
    if isinstance(module, nn.BatchNorm1d):
        converted = nn.SyncBatchNorm(module.num_features, module.eps, module.momentum)
        converted.weight.data = module.weight.data.clone().detach()
        converted.bias.data = module.bias.data.clone().detach()
        converted.running_mean = module.running_mean
        converted.running_var = module.running_var
        converted.num_batches_tracked = module.num_batches_tracked
    for name, child in module.named_children():
        converted.add_module(name, convert(child))
    return converted


@row("F16", found="parameter-replaced")
def test_f16_conversion_to_sync_batch_norm_that_turns_flags_on_is_told() -> None:
    audit = frozen_with(lambda module: convert(module.backbone))
    replaced = one(audit, "parameter-replaced")
    assert replaced.names == NORMS
    assert "SyncBatchNorm" in replaced.cause
    assert "optimizers still hold" not in replaced.cause  # what is frozen is in no optimizer
    flags = one(audit, "flag-changed")
    assert flags.names == NORMS
    assert "requires a gradient although it was declared frozen" in flags.message
    # today's keeps Parameters and modes
    now = nn.SyncBatchNorm.convert_sync_batchnorm
    assert frozen_with(lambda module: now(module.backbone)).findings == []

    def convert_and_write(module: Any) -> None:  # ... and what is frozen in them is still compared
        now(module.backbone).blocks[0].norm.running_mean.add_(1)

    assert codes(frozen_with(convert_and_write)) == {"frozen-buffer-changed"}


# F17


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class OldColwise(ColwiseParallel):
    """As up to torch 2.10: a sharded Parameter trains, whatever the original did."""

    def _partition_linear_fn(self, name: str, module: nn.Module, device_mesh: Any) -> None:
        for key, parameter in module.named_parameters():
            sharded = distribute_tensor(parameter, device_mesh, [Shard(0)])
            module.register_parameter(key, nn.Parameter(sharded))


@row("F17", found="parameter-replaced")
@pytest.mark.usefixtures("one_process")
def test_f17_tensor_parallel_wrap_that_makes_frozen_parameters_train_is_told() -> None:
    def wrap(module: Any, style: Any = OldColwise) -> None:
        linear = module.backbone.blocks[0].linear
        mesh = init_device_mesh("cpu", (1,))
        with torch.enable_grad():
            parallelize_module(linear, mesh, style(output_layouts=Replicate()))

    names = ("backbone.blocks.0.linear.weight", "backbone.blocks.0.linear.bias")
    audit = frozen_with(wrap)
    replaced = one(audit, "parameter-replaced")
    assert replaced.names == names
    assert "with `requires_grad=True`" in replaced.cause
    flags = one(audit, "flag-changed")
    assert flags.names == names
    assert "requires a gradient although it was declared frozen" in flags.message
    model = seeded(Toy)  # control: today's keeps the flags, and before the fit nothing is amiss
    model.backbone.requires_grad_(False)
    wrap(model, ColwiseParallel)
    assert audited(model, FreezeBackbone()).findings == []
    assert trainable(model) == {"head.weight", "head.bias"}
    assert "DTensor" in replaced.cause
    assert "requires_grad_()" not in flags.cause  # nobody called that: the tensor is another one


# F18


def load(module: Any, *, assign: bool) -> None:
    other = Toy()
    other.load_state_dict(module.state_dict())
    module.load_state_dict(other.state_dict(keep_vars=True), assign=assign)


@row("F18", found="parameter-replaced")
def test_f18_load_state_dict_that_assigns_is_told_for_what_is_frozen_and_what_trains() -> None:
    audit = frozen_with(lambda module: load(module, assign=True))
    replaced = [found for found in audit.findings if found.code == "parameter-replaced"]
    head = ("head.weight", "head.bias")
    assert {name for found in replaced for name in found.names} == {*BACKBONE, *head}
    assert all("load_state_dict(assign=True)" in found.cause for found in replaced)
    orphans = one(audit, "not-in-optimizer")
    assert orphans.names == head
    assert "another Parameter than when the fit began: optimizers were given the" in orphans.cause
    assert codes(audit) == {"parameter-replaced", "not-in-optimizer"}
    assert frozen_with(lambda module: load(module, assign=False)).findings == []  # control


# F19


class Reloads(Toy):
    """Freezes its backbone; when it is resumed, makes it anew, as `from_pretrained` does."""

    def __init__(self, *, anew: bool = True) -> None:
        super().__init__()
        self.backbone.requires_grad_(False).eval()
        self.anew = anew

    def on_load_checkpoint(self, checkpoint: Any) -> None:
        if self.anew:
            self.backbone = Backbone().eval()


def resumed(folder: Path, *callbacks: Callback, anew: bool = True) -> TrainableParamAudit:
    """The audit of the second half of a fit."""
    save = ModelCheckpoint(folder, filename="half", enable_version_counter=False)
    audited(seeded(Reloads), *callbacks, save, epochs=1, enable_checkpointing=True)
    audit = TrainableParamAudit(table=False, on_violation="warn")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit = trainer(*callbacks, audit, epochs=2)
        fit.fit(seeded(lambda: Reloads(anew=anew)), loader(), ckpt_path=save.best_model_path)
    return audit


@row("F19", found="resume-mismatch")
def test_f19_freeze_that_is_lost_when_a_resume_makes_the_model_anew_is_told(
    tmp_path: Path,
) -> None:
    finding = one(resumed(tmp_path), "resume-mismatch")
    assert set(finding.names) == set(BACKBONE)
    assert finding.step == 4
    assert "was frozen when the checkpoint was saved, and trains now" in finding.message
    assert "its freeze was lost" in finding.cause
    assert resumed(tmp_path, anew=False).findings == []  # control
    assert resumed(tmp_path, FreezeBackbone()).findings == []  # freezes what is there


# F23


LORA = LoraConfig(target_modules=["linear"], r=2)


@row("F23", found="flag-changed")
def test_f23_new_trainable_tensors_inside_a_frozen_tower_are_told() -> None:
    audit = frozen_with(lambda module: inject_adapter_in_model(LORA, module.backbone))
    new = [f for f in audit.findings if "is a new trainable parameter in a frozen" in f.message]
    assert [found.code for found in new] == ["flag-changed"]
    assert set(new[0].names) == {
        f"backbone.blocks.{i}.linear.lora_{side}.default.weight" for i in range(3) for side in "AB"
    }
    assert "added it after the fit began" in new[0].cause
    moved = {n for f in audit.findings if f.code == "parameter-replaced" for n in f.names}
    assert moved == {name for name in BACKBONE if ".linear." in name}
    # control: what is injected before the fit freezes with the tower
    model = seeded(Toy)
    inject_adapter_in_model(LORA, model.backbone)
    before = state(model)
    assert audited(model, FreezeBackbone()).findings == []
    assert changed(before, state(model)) == {"head.weight", "head.bias"}
    # nobody called `train()`: the modules are other ones
    assert not [found for found in audit.findings if "called `train()`" in found.cause]
