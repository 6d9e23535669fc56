"""Stacks, heads, ties and adapters: what discovery says of models with several towers or none."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.data import DataLoader

from lightning_freeze import (
    Anatomy,
    ArgumentError,
    ConflictError,
    DiscoveryError,
    FreezeBackbone,
    GradualUnfreeze,
    ReinitTopLayers,
    TrainableParamAudit,
    anatomy,
    layer_groups,
)
from lightning_freeze.model.index import ModelIndex
from lightning_freeze.model.layer_groups import backbone_at
from tests.families.tiny import small
from tests.test_layers import Head, mlp
from tests.toys import changed, state, trainer
from tests.zoo import TRANSFORMERS, tiny_bert, tiny_bert_lm

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"  # peft's
)


def shape(found: Anatomy) -> dict[str, int]:
    return {stack.name: len(stack.blocks) for stack in found.stacks}


def assert_partition(model: nn.Module) -> None:
    names = [name for group in layer_groups(model) for name in group.parameters]
    assert len(names) == len(set(names))
    assert set(names) == set(ModelIndex.of(model).parameters)


class Contrastive(LightningModule):
    """CLIP, trained on pairs of its own."""

    def __init__(self) -> None:
        super().__init__()
        import transformers as t

        sizes: dict[str, Any] = {
            "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2,
            "intermediate_size": 32,
        }  # fmt: skip
        tokens = {"vocab_size": 60, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        config = t.CLIPConfig(
            text_config={**sizes, **tokens},
            vision_config={**sizes, "image_size": 16, "patch_size": 8},
            projection_dim=8,
        )
        self.model = t.CLIPModel(config)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        pairs = {
            "input_ids": torch.randint(3, 60, (3, 5)),
            "pixel_values": torch.randn(3, 3, 16, 16),
        }
        loss: Tensor = self.model(**pairs, return_loss=True).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def fit(module: LightningModule, *callbacks: Any, epochs: int = 1) -> set[str]:
    """Names of what one epoch of two steps changed; the audit has to agree."""
    audit = TrainableParamAudit(table=False)
    before = state(module)
    trainer(*callbacks, audit, epochs=epochs).fit(module, DataLoader([0, 1]))
    assert audit.findings == []
    return changed(before, state(module))


def test_an_encoder_and_its_decoder_are_two_stacks_in_the_order_of_the_data() -> None:
    found = anatomy(TRANSFORMERS["bart"]())
    assert shape(found) == {"model.encoder": 2, "model.decoder": 2}
    assert [block.name for block in found.blocks] == [
        f"model.{part}.layers.{i}" for part in ("encoder", "decoder") for i in (0, 1)
    ]
    assert not found.parallel
    assert [block.name for block in found.top(3)] == [
        "model.encoder.layers.1", "model.decoder.layers.0", "model.decoder.layers.1",
    ]  # fmt: skip


def test_a_decoders_embeddings_are_in_the_stem_and_not_in_an_encoder_layer() -> None:
    found = anatomy(TRANSFORMERS["bart"]())
    assert found.stem is not None
    assert "model.decoder.embed_positions.weight" in found.stem.parameters
    assert len(found.blocks[0].parameters) == len(found.blocks[1].parameters)


@pytest.mark.parametrize("family", ["dots3_note", "kosmos-2", "inkling2"])
def test_a_vision_tower_that_is_registered_last_comes_first(family: str) -> None:
    pytest.importorskip("transformers", "5.20")
    from tests.families.tiny import on_meta

    found = anatomy(on_meta(family))
    assert "vision" in found.stacks[0].name
    assert any(word in found.stacks[-1].name + found.stacks[0].name for word in ("text", "lang"))
    assert "vision" not in found.blocks[-1].name or family == "dots3_note"


def test_the_stacks_of_a_vision_language_model_are_named_and_can_be_chosen() -> None:
    index = ModelIndex.of(Head(net=small("idefics3")))
    found = anatomy(Head(net=small("idefics3")))
    assert shape(found) == {"net.model.vision_model": 2, "net.model.text_model": 2}
    assert "stacks `net.model.vision_model` (2), then `net.model.text_model` (2)" in found.rule
    tower = backbone_at(index, "net.model.vision_model")
    assert [block.name for block in tower.blocks] == [
        f"net.model.vision_model.encoder.layers.{i}" for i in (0, 1)
    ]
    assert all(name.startswith("net.model.vision_model.") for name in tower.backbone)
    assert "net.lm_head.weight" in tower.head


def test_what_leads_from_a_tower_to_the_next_goes_with_the_lower() -> None:
    found = anatomy(small("idefics3"))
    connector = next(n for n in ModelIndex.of(small("idefics3")).parameters if "connector" in n)
    assert connector in found.stacks[0].blocks[-1].parameters


def test_stacks_side_by_side_are_counted_each() -> None:
    found = anatomy(Contrastive())
    assert found.parallel
    assert shape(found) == {"model.text_model": 3, "model.vision_model": 3}
    assert "`model.text_model` (3) beside `model.vision_model` (3)" in found.rule
    assert [block.name for block in found.top(1)] == [
        "model.text_model.encoder.layers.2", "model.vision_model.encoder.layers.2",
    ]  # fmt: skip
    assert [block.name for block in found.top(-1)] == [
        "model.text_model.encoder.layers.0", "model.vision_model.encoder.layers.0",
    ]  # fmt: skip
    assert found.depth == 3
    assert "model.logit_scale" in found.above


@pytest.mark.slow
def test_the_top_layer_of_both_of_clips_stacks_trains() -> None:
    module = Contrastive()
    moved = fit(module, FreezeBackbone(trainable_layers=1))
    assert any(name.startswith("model.text_model.encoder.layers.2.") for name in moved)
    assert any(name.startswith("model.vision_model.encoder.layers.2.") for name in moved)
    assert not any(".layers.1." in name or ".embeddings." in name for name in moved)


@pytest.mark.slow
def test_a_stack_that_is_named_leaves_the_other_alone() -> None:
    moved = fit(Contrastive(), FreezeBackbone("model.vision_model", trainable_layers=1))
    assert {name.split(".")[4] for name in moved if ".vision_model.encoder." in name} == {"2"}
    assert {name.split(".")[4] for name in moved if ".text_model.encoder." in name} == {
        "0", "1", "2",
    }  # fmt: skip


def test_more_layers_than_a_stack_has_is_an_error_that_names_the_stacks() -> None:
    message = r"`trainable_layers=4` is beyond the 3 blocks of each stack of the backbone.*beside"
    with pytest.raises(ArgumentError, match=message):
        FreezeBackbone(trainable_layers=4).preview(Contrastive())
    with pytest.raises(ArgumentError, match=r"`n_layers=4` is beyond the 3 blocks"):
        ReinitTopLayers(4).reinit_names(ModelIndex.of(Contrastive()))


def test_the_top_layer_of_each_stack_is_re_initialised() -> None:
    names = ReinitTopLayers(1).reinit_names(ModelIndex.of(Contrastive()))
    assert {name.split(".")[1] for name in names} == {"text_model", "vision_model"}
    assert {name.split(".")[4] for name in names if ".layers." in name} == {"2"}


def test_a_tied_head_is_told_of_with_the_lines_to_write() -> None:
    import transformers as t

    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model = t.GPT2LMHeadModel(t.GPT2Config(vocab_size=50, n_embd=16, n_layer=3, n_head=2, **tokens))
    found = anatomy(model)
    assert found.head == ()
    assert found.tied == ("lm_head.weight",)
    message = (
        r"its head `model.lm_head.weight` is one tensor with the input embedding\. Write "
        r"`FreezeBackbone\(trainable_layers=1\)` to train `model.transformer.h.2` as well; or "
        r"`FreezeBackbone\(trainable=\"model.lm_head.weight\"\)` to train that tensor"
    )
    module = Contrastive()
    module.model = model
    with pytest.raises(ConflictError, match=message):
        trainer(FreezeBackbone()).fit(module, DataLoader([0]))


def test_an_encoder_decoder_pair_with_a_tied_head_can_freeze_its_encoder_alone() -> None:
    module = Contrastive()
    module.model = TRANSFORMERS["t5-generation"]()
    with pytest.raises(ConflictError, match=r"or `FreezeBackbone\(\"model.encoder\"\)` to freeze"):
        trainer(FreezeBackbone()).fit(module, DataLoader([0]))


def test_an_untied_head_of_a_model_that_is_its_own_base_is_the_head() -> None:
    import transformers as t

    config = t.T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    config.tie_word_embeddings = False
    assert anatomy(t.T5ForConditionalGeneration(config)).head == ("lm_head.weight",)
    assert anatomy(small("clip")).head == ("classifier.weight", "classifier.bias")
    assert {n.split(".")[0] for n in anatomy(small("whisper")).head} == {"projector", "classifier"}


def test_a_bare_model_says_that_it_has_no_head() -> None:
    module = Contrastive()
    module.model = TRANSFORMERS["bert-bare"]()
    with pytest.raises(ConflictError, match=r"the model has no head beside its backbone\. Write"):
        trainer(FreezeBackbone()).fit(module, DataLoader([0]))


def test_a_model_whose_base_attribute_is_its_encoder_is_its_own_base() -> None:
    found = anatomy(small("dinov3_vit"))
    assert found.head == ()
    assert found.stem is not None
    assert found.stem.name == "embeddings"
    assert found.above == ("norm.weight", "norm.bias")


def test_a_transformers_class_of_the_users_own_has_its_last_part_as_head() -> None:
    import transformers as t

    class Regressor(t.PreTrainedModel):
        config_class = t.BertConfig

        def __init__(self, config: t.BertConfig) -> None:
            super().__init__(config)
            self.text = t.BertModel(config)
            self.regression = nn.Linear(config.hidden_size, 1)

    config = t.BertConfig(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32,
        vocab_size=50,
    )  # fmt: skip
    found = anatomy(Head(model=Regressor(config)))
    assert found.head == ("model.regression.weight", "model.regression.bias")
    assert [block.name for block in found.blocks] == [
        f"model.text.encoder.layer.{i}" for i in range(3)
    ]
    assert found.above == ("model.text.pooler.dense.weight", "model.text.pooler.dense.bias")


def test_stages_that_are_numbered_are_blocks_though_one_holds_most_layers() -> None:
    stages = {f"layers_{i}": mlp(*[4] * (many + 1)) for i, many in enumerate((2, 2, 9, 2))}
    found = anatomy(Head(backbone=Head(**stages), head=nn.Linear(4, 2)))
    assert [block.name for block in found.blocks] == [f"backbone.layers_{i}" for i in range(4)]


def lora(model: Any, **options: Any) -> Any:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(r=2, **options))


def test_peft_adapters_are_in_their_layers_and_not_in_the_backbone() -> None:
    found = anatomy(Head(net=lora(tiny_bert(), target_modules=["query"], task_type="SEQ_CLS")))
    assert found.rule.endswith("with PEFT adapters")
    assert len(found.blocks) == 3
    assert len(found.adapters) == 6
    assert all("lora_" in name for name in found.adapters)
    assert not set(found.adapters) & set(found.backbone)
    assert set(found.adapters) <= {n for block in found.blocks for n in block.parameters}
    assert any("modules_to_save" in name for name in found.head)
    assert "adapters 6 tensors" in str(found)


class Labelled(LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        out = self.model(input_ids=torch.randint(3, 50, (2, 5)), labels=torch.tensor([0, 1]))
        loss: Tensor = out.loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


@pytest.mark.slow
def test_adapters_train_while_the_backbone_is_frozen() -> None:
    moved = fit(
        Labelled(lora(tiny_bert(), target_modules=["query"], task_type="SEQ_CLS")), FreezeBackbone()
    )
    assert {
        part for name in moved for part in ("lora_A", "lora_B", "modules_to_save") if part in name
    }
    assert all("lora_" in name or "modules_to_save" in name for name in moved)
    assert sum("lora_B" in name for name in moved) == 3


@pytest.mark.slow
def test_adapters_unfreeze_with_their_layers() -> None:
    model = Labelled(lora(tiny_bert(), target_modules=["query"], task_type="SEQ_CLS"))
    moved = fit(model, GradualUnfreeze(), epochs=2)
    assert {name.split(".layer.")[1][0] for name in moved if "lora_" in name} == {"2"}


def test_a_head_that_peft_froze_is_told_of() -> None:
    import transformers as t

    model = t.LlamaForCausalLM(
        t.LlamaConfig(
            vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip
    module = Labelled(lora(model, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(ConflictError, match=r"PEFT froze the head.*GradualUnfreeze\(start=0\)"):
        trainer(GradualUnfreeze()).fit(module, DataLoader([0]))


def test_adapters_in_a_backbone_attribute_train_if_peft_wraps_it() -> None:
    wrapped = lora(tiny_bert(), target_modules=["query"], task_type="SEQ_CLS")
    found = anatomy(Head(backbone=wrapped, head=nn.Linear(2, 2)))
    assert found.rule == "the attribute `backbone`, with PEFT adapters"
    assert any("lora_" in name for name in found.adapters)
    assert not any("lora_" in name for name in found.backbone)
    own = anatomy(
        Head(net=lora(Head(layers=mlp(2, 2, 2), out=nn.Linear(2, 2)), target_modules=["0"]))
    )
    assert own.adapters == (
        "net.base_model.model.layers.0.lora_A.default.weight",
        "net.base_model.model.layers.0.lora_B.default.weight",
    )


def test_adapters_that_are_injected_into_a_backbone_of_ones_own_are_a_part_of_it() -> None:
    peft = pytest.importorskip("peft")
    model = Head(backbone=mlp(2, 3, 4), head=nn.Linear(4, 1))
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["0"]), model.backbone)
    found = anatomy(model)
    assert any("lora_" in name for name in found.backbone)
    assert found.adapters == ()


def test_an_adapter_that_is_named_is_frozen() -> None:
    module = Head(net=lora(tiny_bert(), target_modules=["query"], task_type="SEQ_CLS"))
    assert any("lora_" in name for name in backbone_at(ModelIndex.of(module), "net").backbone)


class SentenceTransformer(nn.Sequential):
    """As sentence-transformers builds it: the model is `[0].auto_model`."""


def test_a_sentence_transformer_is_seen_through() -> None:
    encoder = Head(auto_model=TRANSFORMERS["bert-no-pooler"]())
    found = anatomy(Head(net=SentenceTransformer(encoder, nn.Identity(), nn.Linear(16, 4))))
    assert found.rule == "transformers' `base_model` (`net.0.auto_model`)"
    assert len(found.blocks) == 3
    assert found.head == ("net.2.weight", "net.2.bias")


def test_a_segmentation_model_has_its_encoders_stages_as_blocks() -> None:
    models = pytest.importorskip("torchvision.models")
    with torch.device("meta"):
        encoder = models.resnet34()
        del encoder.fc
        net = Head(encoder=encoder, decoder=mlp(2, 3), segmentation_head=nn.Conv2d(3, 2, 1))
    for model in (net, Head(model=net)):
        found = anatomy(model)
        assert [block.name[-6:] for block in found.blocks] == [
            "layer1",
            "layer2",
            "layer3",
            "layer4",
        ]
        assert {n.split("encoder")[0] for n in found.head} != {""}
        assert found.rule.endswith("encoder`")


class SmallResNet(nn.Module):
    """The ResNet of many CIFAR tutorials, whose head is called `linear`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3)
        self.bn1 = nn.BatchNorm2d(4)
        for number, many in enumerate((2, 1, 3), 1):
            setattr(self, f"layer{number}", nn.Sequential(*(nn.Linear(9, 9) for _ in range(many))))
        self.linear = nn.Linear(9, 2)


def test_numbered_modules_are_blocks_rather_than_the_members_of_one() -> None:
    found = anatomy(SmallResNet())
    assert found.rule == "the numbered modules `layer1` ... `layer3`"
    assert found.stem is not None
    assert found.stem.name == "conv1+bn1"
    assert found.head == ("linear.weight", "linear.bias")


def test_lists_that_belong_together_are_one_block_each() -> None:
    parts: dict[str, nn.Module] = {
        "embed": nn.Linear(2, 3),
        "norms": nn.ModuleList(nn.BatchNorm1d(3) for _ in range(3)),
        "convs": nn.ModuleList(nn.Linear(3, 3) for _ in range(3)),
        "out": nn.Linear(3, 2),
    }
    found = anatomy(Head(**parts))
    assert found.blocks[0].name == "convs.0"
    assert set(found.blocks[0].parameters) == {
        "convs.0.weight", "convs.0.bias", "norms.0.weight", "norms.0.bias",
    }  # fmt: skip
    assert found.head == ("out.weight", "out.bias")


def test_the_ways_down_and_up_of_a_unet_are_not_mixed() -> None:
    parts: dict[str, nn.Module] = {
        "downs": nn.ModuleList(nn.Conv2d(2, 2, 3) for _ in range(3)),
        "ups": nn.ModuleList(nn.ConvTranspose2d(2, 2, 2) for _ in range(3)),
        "out": nn.Conv2d(2, 1, 1),
    }
    found = anatomy(Head(**parts))
    assert all(len({n.split(".")[0] for n in block.parameters}) == 1 for block in found.blocks)
    assert_partition(Head(**parts))


def test_a_head_that_is_registered_first_is_still_the_head() -> None:
    parts: dict[str, nn.Module] = {
        "head": nn.Linear(3, 2),
        "patch_embed": nn.Linear(2, 3),
        "norm": nn.LayerNorm(3),
        "blocks": nn.ModuleList(nn.Linear(3, 3) for _ in range(3)),
    }
    found = anatomy(Head(**parts))
    assert found.head == ("head.weight", "head.bias")
    assert found.above == ("norm.weight", "norm.bias")
    assert found.stem is not None
    assert found.stem.name == "patch_embed"


def test_a_torch_transformer_has_the_layers_of_both_halves() -> None:
    found = anatomy(
        Head(
            embed=nn.Embedding(5, 4),
            net=nn.Transformer(4, 2, 2, 2, 8, batch_first=True),
            out=nn.Linear(4, 5),
        )
    )
    assert [block.name for block in found.blocks] == [
        f"net.{part}.layers.{i}" for part in ("encoder", "decoder") for i in (0, 1)
    ]


def test_a_layer_that_is_used_three_times_is_one_block() -> None:
    shared = nn.Linear(3, 3)
    layers = nn.ModuleList([shared, shared, shared])
    found = anatomy(Head(embed=nn.Embedding(5, 3), layers=layers, out=nn.Linear(3, 5)))
    assert [block.name for block in found.blocks] == ["layers.0"]
    assert_partition(Head(layers=layers, out=nn.Linear(3, 5)))


def test_parametrized_and_sharded_layers_are_like_the_others() -> None:
    layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(4))
    weight_norm(layers[1])
    layers[2].__class__ = type("FSDPLinear", (FSDPModule, nn.Linear), {})
    model = Head(layers=layers, out=nn.Linear(3, 2))
    found = anatomy(model)
    assert found.rule == "the list of like modules `layers`"
    assert [block.name for block in found.blocks] == [f"layers.{i}" for i in range(4)]
    assert_partition(model)


def test_a_compiled_layer_inside_is_a_block_as_before() -> None:
    model = tiny_bert()
    plain = anatomy(model)
    model.bert.encoder.layer[1] = torch.compile(model.bert.encoder.layer[1], backend="eager")
    assert anatomy(model) == plain


def test_a_model_in_a_module_dict_and_in_half_precision_is_found() -> None:
    found = anatomy(Head(nets=nn.ModuleDict({"main": tiny_bert().half()})))
    assert found.rule == "transformers' `base_model` (`nets.main.bert`)"


def test_one_of_two_models_can_be_named_with_its_layers() -> None:
    index = ModelIndex.of(Head(teacher=tiny_bert(), student=tiny_bert()))
    found = backbone_at(index, "student.bert")
    assert [block.name for block in found.blocks] == [
        f"student.bert.encoder.layer.{i}" for i in range(3)
    ]
    assert found.above == ("student.bert.pooler.dense.weight", "student.bert.pooler.dense.bias")


def test_an_unknown_model_gets_its_candidates_and_the_line_to_write() -> None:
    parts = {
        name: nn.ModuleList(nn.Linear(2, 2) for _ in range(n)) for name, n in (("a", 2), ("b", 3))
    }
    message = (
        r"Lists of like modules: `a` \(2 Linear\), `b` \(3 Linear\)\. Say it yourself: "
        r"`FreezeBackbone\(backbone=\"a\"\)`, or `GradualUnfreeze\(groups=\['a', 'b'\]\)`"
    )
    with pytest.raises(DiscoveryError, match=message):
        anatomy(Head(**parts))
    with pytest.raises(DiscoveryError, match=r"no parameters\. There is nothing to freeze"):
        anatomy(nn.ReLU())
    with pytest.raises(DiscoveryError, match="The model has: `weight`, `bias`"):
        anatomy(nn.Linear(2, 2))


def test_it_prints_what_was_found() -> None:
    assert str(anatomy(tiny_bert())).splitlines() == [
        "found by transformers' `base_model` (`bert`)",
        "stem    bert.embeddings",
        "blocks  bert.encoder.layer.0 ... bert.encoder.layer.2 (3 blocks)",
        "above   bert.pooler.dense",
        "head    classifier",
    ]
    assert anatomy(tiny_bert_lm()).tied == ()


def _seconds(blocks: int) -> float:
    layers = nn.ModuleList(
        nn.ModuleDict({f"w{i}": nn.Linear(1, 1) for i in range(10)}) for _ in range(blocks)
    )
    model = Head(embed=nn.Embedding(2, 2), layers=layers, out=nn.Linear(1, 1))
    began = time.perf_counter()
    groups = layer_groups(model)
    assert len(groups) == blocks + 2
    return time.perf_counter() - began


@pytest.mark.slow
def test_ten_thousand_tensors_take_a_moment_and_twice_as_many_no_more_than_twice() -> None:
    _seconds(10)
    small_one = min(_seconds(125) for _ in range(3))
    large = min(_seconds(500) for _ in range(3))
    assert large < 2.0
    assert large < 12 * small_one  # four times the tensors: 16 times if it were quadratic


PARTS = (
    ("backbone", "encoder", "decoder", "head", "classifier", "fc", "layers", "blocks", "stages")
    + ("layer1", "layer2", "layer3", "norm", "embed", "features", "visual", "text_model")
    + ("vision_model", "out", "pooler", "connector")
)  # fmt: skip
PLANS: Any = st.recursive(
    st.integers(0, 3),
    lambda inner: st.one_of(
        st.tuples(
            st.sampled_from(["module", "dict"]),
            st.dictionaries(st.sampled_from(PARTS), inner, min_size=1, max_size=4),
        ),
        st.tuples(
            st.sampled_from(["list", "sequential", "shared"]),
            st.lists(inner, min_size=1, max_size=4),
        ),
    ),
    max_leaves=12,
)


def built(plan: Any) -> nn.Module:
    if isinstance(plan, int):
        return (nn.Linear(2, 2), nn.LayerNorm(2), nn.Identity(), nn.Embedding(2, 2))[plan]
    kind, parts = plan
    if kind in ("module", "dict"):
        inside = {name: built(part) for name, part in parts.items()}
        return Head(**inside) if kind == "module" else nn.ModuleDict(inside)
    members = [built(part) for part in parts]
    if kind == "shared":
        members = members + members[:1]
    return nn.Sequential(*members) if kind == "sequential" else nn.ModuleList(members)


@given(PLANS)
@settings(max_examples=150)
def test_any_model_has_disjoint_groups_that_cover_it_or_an_error_that_says_why(plan: Any) -> None:
    model = built(plan)
    index = ModelIndex.of(model)
    try:
        found = anatomy(model)
    except DiscoveryError as error:
        told = str(error)
        if not told.startswith(("No backbone was found", "Several models could")):
            raise
        return
    assert_partition(model)
    assert [block for stack in found.stacks for block in stack.blocks] == list(found.blocks)
    assert set(found.backbone) | set(found.head) == set(index.parameters)
    for block in found.blocks:
        named = backbone_at(index, block.name)
        assert set(named.backbone) | set(named.head) == set(index.parameters)
