"""The cost of a training step equals a real one's, without weights and without leaving a trace."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
import transformers as t
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from lightning_freeze import layer_groups
from lightning_freeze.report.step_cost import step_cost
from tests.toys import Toy
from tests.zoo import TRANSFORMERS, tiny_bert


def really_counted(
    model: nn.Module,
    stages: Sequence[Collection[str]],
    call: Callable[[], Any],
    root: Callable[[Any], Any] = lambda output: output,
) -> list[int]:
    """A forward and a backward pass per stage, with exactly that trainable.

    Attention is computed by its definition: of the CPU's fused kernel torch counts nothing.
    """
    found = []
    for names in stages:
        for name, parameter in model.named_parameters():
            parameter.requires_grad = name in names
            parameter.grad = None
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            output = root(call())
            if output.requires_grad:
                output.sum().backward()
            found.append(counter.get_total_flops())
    for parameter in model.parameters():
        parameter.requires_grad, parameter.grad = True, None
    return found


def linears_by_hand(sizes: Sequence[int], rows: int, trains: Sequence[tuple[bool, bool]]) -> int:
    """Linears with a weight and a bias each: 2 x rows x in x out forward, as much for weights,
    and for inputs."""
    total = 0
    for layer, (width, height) in enumerate(pairwise(sizes)):
        once = 2 * rows * width * height
        below = any(weight or bias for weight, bias in trains[:layer])
        total += once + once * trains[layer][0] + once * below
    return total


def state_of(model: nn.Module) -> Mapping[str, Any]:
    """All of a model that a look at it might change."""
    return {
        "flags": [p.requires_grad for p in model.parameters()],
        "grads": [None if p.grad is None else id(p.grad) for p in model.parameters()],
        "versions": [t._version for t in (*model.parameters(), *model.buffers())],
        "identities": [id(t) for t in (*model.parameters(), *model.buffers())],
        "devices": [t.device for t in (*model.parameters(), *model.buffers())],
        "modes": [module.training for module in model.modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "hooks": [len(module._forward_hooks) for module in model.modules()],
        "random": torch.get_rng_state().tolist(),
    }


def stages_of(model: nn.Module) -> list[set[str]]:
    """Head first, then group by group."""
    names = [set(group.parameters) for group in reversed(layer_groups(model))]
    return [set().union(*names[: n + 1]) for n in range(len(names))]


@settings(max_examples=30)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=2, max_size=6),
    rows=st.integers(1, 5),
    data=st.data(),
)
def test_a_stack_of_linears_costs_what_is_counted_by_hand(
    sizes: list[int], rows: int, data: st.DataObject
) -> None:
    model = nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(sizes)))
    flags = st.tuples(st.booleans(), st.booleans())
    trains = data.draw(st.lists(flags, min_size=len(sizes) - 1, max_size=len(sizes) - 1))
    names = {
        f"{layer}.{part}"
        for layer, both in enumerate(trains)
        for part, flag in zip(("weight", "bias"), both)
        if flag
    }
    found = step_cost(model, [names], batch=rows)
    assert found.stages == (linears_by_hand(sizes, rows, trains),)
    assert found.full == linears_by_hand(sizes, rows, [(True, True)] * (len(sizes) - 1))
    assert found.inputs == f"{rows}x{sizes[0]}"


FAMILIES = [name for name in TRANSFORMERS if name not in ("bart", "t5-classification", "wav2vec2")]


@pytest.mark.parametrize("family", FAMILIES)
def test_each_stage_of_a_transformer_costs_what_a_real_step_does(family: str) -> None:
    model: Any = TRANSFORMERS[family]().train()
    stages = stages_of(model)
    found = step_cost(model, stages)
    tokens = 28 if family == "opt" else 128
    inputs = {"input_ids": torch.ones(1, tokens, dtype=torch.long)}
    if family == "vit":
        inputs = {"pixel_values": torch.zeros(1, 3, 32, 32)}
    if family == "t5-generation":
        inputs["decoder_input_ids"] = inputs["input_ids"]

    def root(output: Any) -> Tensor:
        if "logits" in output:
            return output.logits
        pooled = output.get("pooler_output")
        return output.last_hidden_state.sum() + (0 if pooled is None else pooled.sum())

    assert list(found.stages) == really_counted(model, stages, lambda: model(**inputs), root)
    assert (
        found.full
        == really_counted(
            model, [dict(model.named_parameters())], lambda: model(**inputs), root
        ).pop()
    )
    assert 0 < found.stages[0] < found.stages[-1] == found.full


@pytest.mark.parametrize(
    "make",
    [
        lambda: torchvision.models.resnet18(weights=None),
        lambda: timm.create_model("mobilenetv3_small_050"),
        lambda: timm.create_model("levit_128s"),
    ],
    ids=["resnet", "mobilenet", "levit"],
)
def test_each_stage_of_an_image_model_costs_what_a_real_step_does(make: Any) -> None:
    model = make().eval()
    stages = stages_of(model)[:: max(1, len(stages_of(model)) // 3)]
    image = torch.zeros(1, 3, 224, 224)
    found = step_cost(model, stages)
    assert found.inputs == "1x3x224x224"
    assert list(found.stages) == really_counted(model, stages, lambda: model(image))


class Odd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, w = ctx.saved_tensors
        needs = ctx.needs_input_grad
        return (g @ w.T if needs[0] else None), (x.T @ g if needs[1] else None)


class Unusual(nn.Module):
    """A function of its own, or a checkpoint of either kind, in the middle."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 5), nn.Linear(5, 6), nn.Linear(6, 7)
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if self.kind == "function":
            return self.c(Odd.apply(x, self.b.weight.T))
        again = checkpoint(
            lambda z: self.b(torch.tanh(self.b(z)[:, :5])), x, use_reentrant=self.kind == "old"
        )
        return self.c(again)


@pytest.mark.parametrize("kind", ["function", "old", "new"])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_a_backward_pass_that_computes_more_is_counted_as_it_is(kind: str) -> None:
    model = Unusual(kind)
    names = [name for name, _ in model.named_parameters()]
    stages = [set(), {"c.weight"}, {"b.weight"}, {"a.bias"}, {"a.weight", "c.bias"}, set(names)]
    found = step_cost(model, stages)
    assert list(found.stages) == really_counted(model, stages, lambda: model(torch.zeros(1, 4)))


class Written(nn.Module):
    """Writes to a part of a tensor, uses one tensor twice, and leaves results unused."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        kept = torch.zeros_like(a)
        kept[:, :2] = a[:, :2]
        self.b(self.b(a))  # nobody needs it
        self.seen = self.c(a.detach()).detach()
        return self.c(kept) @ self.c(self.b(kept)).T


def test_a_tensor_that_is_written_to_and_results_that_nobody_uses_are_counted_as_they_are() -> None:
    model = Written()
    names = [name for name, _ in model.named_parameters()]
    stages = [{n for n, f in zip(names, flags) if f} for flags in product([0, 1], repeat=6)]
    found = step_cost(model, stages, torch.zeros(3, 4))
    assert list(found.stages) == really_counted(model, stages, lambda: model(torch.zeros(3, 4)))


def test_a_parametrized_weight_is_counted_with_what_makes_it() -> None:
    parts = torch.nn.utils.parametrizations
    model = nn.Sequential(
        parts.weight_norm(nn.Linear(4, 5)), nn.Linear(5, 6), parts.orthogonal(nn.Linear(6, 6))
    )
    names = [name for name, _ in model.named_parameters()]
    stages = [{name} for name in names]
    found = step_cost(model, stages, torch.zeros(2, 4))
    assert list(found.stages) == really_counted(model, stages, lambda: model(torch.zeros(2, 4)))


def test_what_is_frozen_above_costs_input_gradients_and_what_is_frozen_below_nothing() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    top, bottom, nothing = step_cost(model, [{"2.weight"}, {"0.weight"}, set()]).stages
    assert (nothing, top, bottom) == (3 * 32, 4 * 32, 6 * 32)


def test_a_recurrent_layer_is_counted() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.lstm(x)[0])

    head = {"head.weight", "head.bias"}
    unknown = step_cost(Recurrent(), [head])
    assert unknown.full is None and unknown.stages == ()
    assert "no inputs could be guessed for Recurrent. Give `inputs=`" in unknown.notes[0]
    found = step_cost(Recurrent(), [head], inputs=torch.zeros(2, 7, 4))
    # input and hidden state each go to four gates; then the head, and its weight once more
    assert found.stages == (2 * 14 * 20 * (4 + 5) + 2 * 2 * 14 * 5 * 2,)


def test_inputs_may_be_a_tensor_a_tuple_or_a_mapping() -> None:
    model = nn.Bilinear(2, 3, 4)
    pair = (torch.zeros(5, 2), torch.zeros(5, 3))
    by_name = dict(zip(("input1", "input2"), pair))
    for batch, said in ((pair, "5x2, 5x3"), (by_name, "input1 5x2, input2 5x3")):
        # torch's counter has no number for this layer
        assert (
            f"no FLOPs were counted for the inputs {said}."
            in (step_cost(model, [], inputs=batch).notes[0])
        )
    bert = tiny_bert()
    ids = torch.ones(3, 7, dtype=torch.long)
    found = step_cost(bert, [], inputs={"input_ids": ids, "labels": torch.zeros(3).long()})
    assert found.inputs == "input_ids 3x7, labels 3"
    assert found.full == step_cost(bert, [], inputs=ids).full
    assert found.full != step_cost(bert, []).full


def test_a_lightning_module_is_called_with_its_example() -> None:
    model = Toy()
    guessed = step_cost(model, [])
    model.example_input_array = torch.zeros(5, 4)
    found = step_cost(model, [])
    assert (guessed.inputs, found.inputs) == ("1x4", "5x4")
    assert found.full == 5 * (guessed.full or 0) > 0


def test_a_model_that_decides_by_its_numbers_has_no_cost_but_a_reason() -> None:
    class Decides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) if x.sum() > 0 else x

    found = step_cost(Decides(), [set()])
    assert (found.full, found.stages) == (None, ())
    assert "Decides doesn't run without real numbers" in found.notes[0]
    given = step_cost(Decides(), [set()], inputs=torch.zeros(1, 3))
    assert "on the inputs given" in given.notes[0]
    wrong = step_cost(nn.Sequential(nn.Linear(3, 3)), [], inputs=torch.zeros(1, 4))
    assert wrong.full is None and "on the inputs given" in wrong.notes[0]


def test_a_layer_that_is_dropped_by_chance_is_counted_as_there() -> None:
    class Chance(nn.Module):
        def __init__(self, source: str) -> None:
            super().__init__()
            self.a, self.b, self.source = nn.Linear(3, 3), nn.Linear(3, 3), source

        def forward(self, x: Tensor) -> Tensor:
            draw = {"python": random.random, "numpy": np.random.random}.get(self.source, torch.rand)
            chance = draw([]) if self.source == "torch" else draw()
            return self.a(x) if self.training and chance < 2 else self.b(self.a(x))

    for source in ("python", "numpy", "torch"):
        assert step_cost(Chance(source), [set()]).stages == (36,)


def test_a_model_without_parameters_has_no_cost() -> None:
    assert "no parameters" in step_cost(nn.ReLU(), [set()]).notes[0]


def test_parameters_without_a_part_in_the_result_are_named() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model.register_parameter("idle", nn.Parameter(torch.zeros(3)))
    assert "1 of 3 tensors have no part in the result" in step_cost(model, [set()]).notes[0]


@pytest.mark.parametrize("training", [True, False])
def test_counting_leaves_no_trace(training: bool) -> None:
    written: list[Any] = []
    bert = tiny_bert(20).train(training)
    bert.bert.embeddings.requires_grad_(False)
    bert.classifier.weight.grad = torch.ones_like(bert.classifier.weight)
    for model in (bert, Toy().train(training), timm.create_model("levit_128s").train(training)):
        model.register_forward_hook(lambda *_: written.append(_))
        kept = [p.detach().clone() for p in model.parameters()]
        python, numpy = random.getstate(), np.random.get_state()[1].tolist()
        before = state_of(model)
        assert step_cost(model, [set()]).full
        assert state_of(model) == before
        assert (random.getstate(), np.random.get_state()[1].tolist()) == (python, numpy)
        assert all(torch.equal(a, b) for a, b in zip(kept, model.parameters()))
    assert not written
    assert torch.backends.mkldnn.enabled


def test_a_half_model_and_one_on_the_meta_device_cost_the_same() -> None:
    full = step_cost(tiny_bert(), []).full
    assert step_cost(tiny_bert().half(), []).full == full
    with torch.device("meta"):
        assert step_cost(tiny_bert(), []).full == full


@pytest.mark.parametrize(
    "upper",
    [nn.Conv2d(4, 5, 3), nn.Conv2d(4, 8, 3, groups=2), nn.ConvTranspose2d(4, 6, 3, groups=2)],
)
def test_every_combination_of_two_convolutions(upper: nn.Module) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), upper)
    names = [name for name, _ in model.named_parameters()]
    stages = [{n for n, f in zip(names, flags) if f} for flags in product([0, 1], repeat=6)]
    image = torch.zeros(2, 3, 9, 9)
    found = step_cost(model, stages, inputs=image)
    assert list(found.stages) == really_counted(model, stages, lambda: model(image))


_SMALL = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
    "vocab_size": 99, "num_key_value_heads": 2,
}  # fmt: skip


def test_a_mixture_of_experts_costs_what_its_experts_do_one_by_one() -> None:
    config = t.MixtralConfig(**_SMALL, num_local_experts=4, num_experts_per_tok=2)
    model = t.MixtralForCausalLM(config).train()
    stages = stages_of(model)
    found = step_cost(model, stages)
    model.set_experts_implementation("eager")
    ids = torch.randint(0, 99, (1, 128))
    real = really_counted(model, stages, lambda: model(ids, use_cache=False).logits)
    assert list(found.stages) == real


def test_a_decoder_and_an_image_get_inputs_of_the_sizes_that_the_config_says() -> None:
    whisper = t.WhisperForConditionalGeneration(
        t.WhisperConfig(
            vocab_size=99, d_model=32, encoder_layers=1, decoder_layers=1, num_mel_bins=20,
            encoder_attention_heads=2, decoder_attention_heads=2, max_source_positions=50,
            encoder_ffn_dim=32, decoder_ffn_dim=32, max_target_positions=60, pad_token_id=0,
            bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        )
    )  # fmt: skip
    assert step_cost(whisper, []).inputs == "input_features 1x20x100, decoder_input_ids 1x60"
    part = {**_SMALL, "image_size": 32, "patch_size": 16}
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    clip = t.CLIPModel(
        t.CLIPConfig(text_config={**_SMALL, **tokens}, vision_config=part, projection_dim=8)
    )
    found = step_cost(clip, [])
    assert found.inputs == "input_ids 1x73, pixel_values 1x3x32x32"
    assert not found.notes


def test_a_lightning_module_around_a_model_is_counted_with_the_models_inputs() -> None:
    class Wrapped(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = tiny_bert()

    assert step_cost(Wrapped(), []) == step_cost(tiny_bert(), [])
    assert step_cost(torch.compile(tiny_bert(), backend="eager"), []) == step_cost(tiny_bert(), [])


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_gradient_checkpointing_is_counted_with_what_it_recomputes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_bert().train()
    plain = step_cost(model, []).full or 0
    model.gradient_checkpointing_enable()
    stages = stages_of(model)[::3]
    found = step_cost(model, stages)
    ids = torch.ones(1, 128, dtype=torch.long)
    assert list(found.stages) == really_counted(model, stages, lambda: model(ids).logits)
    assert (found.full or 0) > 1.3 * plain
    monkeypatch.setattr("lightning_freeze.report.step_cost.MOST_OPERATIONS", 1000)
    assert step_cost(model, []) == step_cost(model, [])
    many = step_cost(model, stages * 10)
    assert many.full is None
    assert "Preview fewer stages, or without gradient checkpointing" in many.notes[0]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_counting_works_where_gradients_are_off(mode: Any) -> None:
    with mode():
        assert step_cost(nn.Sequential(nn.Linear(2, 2)), [set()]).full == 16
