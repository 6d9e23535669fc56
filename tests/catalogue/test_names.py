"""Names: a list that matches nothing, or too much, or something else than its writer thinks."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.utils.data import DataLoader, TensorDataset

from lightning_freeze import (
    AuditError,
    FreezeBackbone,
    GradualUnfreeze,
    SelectorError,
    TrainableParamAudit,
    UnsupportedError,
    freeze,
    summarize,
)
from lightning_freeze.engine.distributed import check_supported
from tests.catalogue.harness import Do, audited, row
from tests.oracle import Oracle
from tests.toys import Backbone, Toy, changed, loader, seeded, state, trainable, trainer
from tests.zoo import tiny_bert_lm


class Wrapped(LightningModule):
    """A language model of transformers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.model(input_ids=batch[0], labels=batch[0]).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def words() -> DataLoader[Any]:
    tokens = torch.randint(0, 50, (8, 6), generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(tokens), batch_size=4)


def mixtral() -> Wrapped:
    config = transformers.MixtralConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
        vocab_size=50,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return Wrapped(transformers.MixtralForCausalLM(config))


def moved(model: nn.Module, *callbacks: Any, data: Any = None, **options: Any) -> set[str]:
    """Parameters that a fit moves; the audit is to find nothing."""
    before = state(model)
    audit = audited(model, *callbacks, data=data, **options)
    assert audit.findings == []
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return changed(before, state(model)) & names


def freeze_but(model: nn.Module, patterns: Iterable[str]) -> None:
    """Freeze by a list of names, as trainers do that don't look whether it matches."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad = any(re.match(pattern, name) for pattern in patterns)


@row("C1", told="an error before the first batch names the selector and what exists")
def test_c1_a_shipped_example_that_matches_nothing_is_an_error() -> None:
    # the example was written for other names: transformers 5 has `mlp.gate`
    example = ["re:^lm_head.weight$", r"re:model.layers.\d+.block_sparse_moe.gate"]
    model = mixtral()
    freeze_but(model.model, [pattern[3:] for pattern in example])
    assert trainable(model) == {"model.lm_head.weight"}  # the failure: half of the list is void
    model = mixtral()
    before, batches = state(model), []
    note = Do(on_train_batch_end=lambda *_: batches.append(1))
    with pytest.raises(SelectorError, match=r"`re:model.layers.\\d\+.block_sparse_moe.gate`"):
        trainer(note, FreezeBackbone(trainable=example), epochs=1).fit(model, words())
    assert not batches and not changed(before, state(model))
    assert trainable(model) == {name for name, _ in model.named_parameters()}
    with pytest.raises(SelectorError, match=r"`model.model.layers.1` has: .*mlp"):
        trainer(FreezeBackbone(trainable="model.layers.1.block_sparse_moe"), epochs=1).fit(model)
    healthy = [r"re:model.layers.\d+.mlp.gate"]
    assert moved(model, FreezeBackbone(trainable=healthy), data=words(), epochs=1) == {
        "model.model.layers.0.mlp.gate.weight",
        "model.model.layers.1.mlp.gate.weight",
        "model.lm_head.weight",
    }


@row("C2", prevented="wrappers' prefixes are dropped from names and selectors")
def test_c2_a_list_with_a_wrappers_prefix_means_the_same_tensors() -> None:
    listed = [name for name, _ in nn.DataParallel(seeded(Toy)).named_parameters()]
    listed = [name for name in listed if "backbone" in name]
    assert len(listed) == 14 and all(name.startswith("module.backbone.") for name in listed)
    model = seeded(Toy)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name not in listed
    assert len(trainable(model)) == 16  # the failure: nothing froze
    heads = {"head.weight", "head.bias"}
    for selectors in (listed, "module.backbone", "module._orig_mod.backbone", "backbone"):
        assert moved(seeded(Toy), FreezeBackbone(selectors)) == heads
    # the other way round: the model has the prefix and the list doesn't
    wrapped = torch.compile(seeded(Toy).backbone, backend="eager")
    assert freeze(nn.DataParallel(wrapped), "blocks.0.norm") == (
        "blocks.0.norm.weight",
        "blocks.0.norm.bias",
    )
    with pytest.raises(SelectorError, match="Top-level modules: backbone, head"):
        freeze(seeded(Toy), "module.encoder")


@row("C3", prevented="a tied tensor is found under each of its names")
def test_c3_a_tied_head_is_found_by_its_own_name() -> None:
    def masked_lm() -> Wrapped:
        return Wrapped(tiny_bert_lm(2))

    decoder = "model.cls.predictions.decoder.weight"
    embedding = "model.bert.embeddings.word_embeddings.weight"
    assert decoder not in dict(masked_lm().named_parameters())  # the failure: it isn't listed
    model = masked_lm()
    assert model.get_parameter(decoder) is model.get_parameter(embedding)
    head = {name for name in state(model) if name.startswith("model.cls.")}
    # frozen under one name is frozen under both, and so is trainable
    assert moved(masked_lm(), FreezeBackbone(), data=words()) == head - {decoder}
    named = FreezeBackbone(trainable="cls.predictions.decoder.weight")
    assert moved(masked_lm(), named, data=words()) == head | {embedding}
    tied = {row.name: row.tied_to for row in summarize(model).rows}
    assert tied[embedding] == (decoder,)


def strict_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Optimizer groups by patterns over what trains; one that matches nothing is an error."""
    left = {name: p for name, p in module.named_parameters() if p.requires_grad}
    groups = []
    for pattern, lr in (("*.embed.*", 1e-3), ("*.blocks.*", 1e-2), ("head.*", 1e-1)):
        hits = [name for name in left if fnmatch.fnmatch(name, pattern)]
        if not hits:
            raise ValueError(f"override pattern {pattern!r} does not match any parameters")
        groups.append({"params": [left.pop(name) for name in hits], "lr": lr})
    return groups


@row("C4", prevented="`configure_optimizers` runs while all that will ever train can")
def test_c4_an_optimizer_pattern_for_frozen_parameters_still_matches() -> None:
    def strict() -> Toy:
        return seeded(lambda: Toy(lambda module: torch.optim.SGD(strict_groups(module))))

    model = strict()
    model.backbone.embed.requires_grad_(False)
    with pytest.raises(ValueError, match=r"'\*.embed.\*' does not match any parameters"):
        trainer(epochs=1).fit(model, loader())  # the failure
    oracle, late = Oracle(), GradualUnfreeze({0: ["head", "blocks.2"], 1: "**"})
    model = strict()
    assert "backbone.embed.weight" in moved(model, late, oracle)
    assert oracle.wrong == []  # its group waited for it, with its rate
    assert set(oracle.lrs[0]) == {1e-3, 1e-2, 1e-1}
    kept = moved(strict(), GradualUnfreeze({0: ["head", "blocks.2"], 9: "**"}))
    assert not any("embed" in name for name in kept)  # and until then it stayed


@row("C6", told="the table gives it a status of its own: in no optimizer")
def test_c6_what_is_frozen_by_omission_alone_has_its_own_status(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fit(make: Any) -> tuple[set[str], str]:
        model = seeded(lambda: Toy(make))
        before = state(model)
        audit = TrainableParamAudit(log_metrics=False)
        trainer(audit, epochs=1).fit(model, loader())
        assert audit.findings == []
        names = {name for name, _ in model.named_parameters()}
        return changed(before, state(model)) & names, capsys.readouterr().out

    kept, printed = fit(lambda module: torch.optim.SGD(module.head.parameters(), lr=0.1))
    assert kept == {"head.weight", "head.bias"}
    assert "in no optimizer" in printed
    assert "14 tensors require a gradient but are in no optimizer." in printed
    # control
    kept, printed = fit(lambda module: torch.optim.SGD(module.parameters(), lr=0.1))
    assert {"backbone.embed.weight", "backbone.blocks.1.norm.bias", "head.weight"} <= kept
    assert "in no optimizer" not in printed
    # nobody leaves out a head on purpose
    model = seeded(lambda: Toy(lambda module: torch.optim.SGD(module.backbone.parameters(), 0.1)))
    with pytest.raises(AuditError, match=r"not-in-optimizer.*head.weight, head.bias"):
        trainer(TrainableParamAudit(table=False), epochs=1).fit(model, loader())


@row("C7", told="the error says that the modules exist and have no parameters")
def test_c7_modules_without_parameters_are_not_called_missing() -> None:
    dropouts = "backbone.blocks.*.dropout"
    model = seeded(Toy)
    told = r"blocks\.0\.dropout, .*blocks\.2\.dropout, which has no parameters: there is nothing to"
    with pytest.raises(SelectorError, match=told):
        trainer(FreezeBackbone(dropouts), epochs=1).fit(model, loader())
    with pytest.raises(SelectorError, match=r"No parameter matches `backbone.blocks.\*.droput`"):
        trainer(FreezeBackbone("backbone.blocks.*.droput"), epochs=1).fit(model, loader())
    # control: among others they are no trouble, and go to eval mode with what they are in
    modes: list[bool] = []
    note = Do(on_train_batch_end=lambda _, m: modes.append(m.backbone.blocks[0].dropout.training))
    assert not any("blocks.0" in name for name in moved(model, FreezeBackbone("blocks.0"), note))
    assert modes == [False] * 8
    modes.clear()
    moved(seeded(Toy), FreezeBackbone("blocks.1"), note)
    assert modes == [True] * 8


class Toggles(Toy):
    """Steps two optimizers by hand, as a GAN does."""

    def __init__(self) -> None:
        super().__init__(blocks=1)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        parts = (self.backbone, self.head)
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in parts]


@pytest.mark.slow
@row("C9", prevented="frozen parameters are in no group, so that toggling passes them by")
def test_c9_toggling_optimizers_of_a_compiled_module_leaves_the_frozen_alone() -> None:
    embed, block, head = "backbone.embed.weight", "backbone.blocks.0.norm.weight", "head.weight"

    def moves(model: Toggles, *callbacks: Any, backend: str = "eager") -> set[str]:
        torch._dynamo.reset()
        before = state(model)
        compiled: Any = torch.compile(model, backend=backend) if backend else model
        audit = audited(compiled, *callbacks, epochs=1, limit_train_batches=2)
        assert audit.findings == []
        return changed(before, state(model)) & {embed, block, head}

    model = seeded(Toggles)
    assert moves(model, GradualUnfreeze({0: ["head", "blocks.0"]})) == {block, head}
    assert not model.backbone.embed.weight.requires_grad
    # by hand it stays in its group, is toggled off and on, and comes back as it was
    model = seeded(Toggles)
    model.backbone.embed.requires_grad_(False)
    assert moves(model) == {block, head}
    assert not model.backbone.embed.weight.requires_grad
    assert moves(seeded(Toggles), backend="") == {embed, block, head}  # control


class FSDP1(SingleDeviceStrategy):
    """A stand-in that Lightning starts on a CPU; the real one wants an accelerator."""


FSDP1.__name__ = "FSDPStrategy"


@row("C10", prevented="FSDP1 is refused at fit start, and the model is left as it was")
def test_c10_fsdp1_is_refused_before_a_mixed_flat_parameter_can_be() -> None:
    model = seeded(Toy)
    model.backbone.requires_grad_(False)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="uniform `requires_grad`"):  # the failure
            FullyShardedDataParallel(
                model,
                sharding_strategy=ShardingStrategy.NO_SHARD,
                device_id=torch.device("cpu"),
            )
    finally:
        dist.destroy_process_group()
    for callback in (FreezeBackbone(), GradualUnfreeze()):
        model = seeded(Toy)
        before = state(model)
        run = trainer(callback, strategy=FSDP1(torch.device("cpu")), epochs=1)
        with pytest.raises(UnsupportedError, match=r'FSDP1 flattens .* `strategy="ddp"`'):
            run.fit(model, loader())
        assert len(trainable(model)) == 16 and not changed(before, state(model))
    with pytest.raises(UnsupportedError, match="`FSDPStrategy` isn't supported"):
        check_supported(FSDPStrategy())
    check_supported(DDPStrategy())  # control
    assert moved(seeded(Toy), FreezeBackbone()) == {"head.weight", "head.bias"}


class Experts(nn.Module):
    """A layer of experts whose numbers look like those of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return x + sum(torch.relu(expert(x)) for expert in self.experts)


class Deep(Toy):
    """Twelve layers of experts."""

    def __init__(self) -> None:
        super().__init__(lambda module: torch.optim.SGD(module.parameters(), lr=0.1))
        self.backbone = Backbone(blocks=0)
        self.backbone.blocks = nn.ModuleList(Experts() for _ in range(12))


@row("C11", prevented="a selector matches whole components of a path")
def test_c11_layer_1_is_neither_layer_10_nor_expert_1() -> None:
    names = {name for name, _ in seeded(Deep).named_parameters()}
    layer = {name for name in names if name.startswith("backbone.blocks.1.")}
    head = {"head.weight", "head.bias"}
    naive = {name for name in names if "blocks.1" in name}
    assert len(layer) == 4 and len(naive) == 12  # the failure: 10 and 11 come along
    assert len([name for name in names if ".1." in name]) == 26  # or each second expert
    for selector in ("blocks.1", "backbone.blocks.1", "backbone.blocks.1.**", "*.blocks.1"):
        assert moved(seeded(Deep), GradualUnfreeze({0: ["head", selector]})) == layer | head
    expert = {name for name in names if ".experts.1." in name}
    assert moved(seeded(Deep), GradualUnfreeze({0: ["head", "**.experts.1"]})) == expert | head
    assert moved(seeded(Deep)) == names  # control
    with pytest.raises(SelectorError, match=r"`experts.1` stands at 12 places: .*\*\*.experts.1"):
        freeze(seeded(Deep), "experts.1")
