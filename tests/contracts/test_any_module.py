"""Any module: each kind of model works, or is an error before the first batch that says what to do.

Field cases: Lightning issues 6481 (TorchScript), lightly-train 171 (Fabric),
segmentation_models.pytorch 79 and 1220 (a loss with a tensor beside a U-Net).
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, spectral_norm, weight_norm

from lightning_freeze import (
    ConflictError,
    DiscoveryError,
    FreezeBackbone,
    FrozenWeightsChanged,
    GradualUnfreeze,
    ReinitError,
    ReinitTopLayers,
    TrainableParamAudit,
    anatomy,
    assert_frozen,
    audit_parameters,
    fingerprint,
    freeze,
    layer_groups,
    reinit,
    summarize,
    unfreeze,
)
from tests.toys import Backbone, Toy, changed, loader, seeded, state, trainable, trainer

# torch tells that TorchScript is going away, and old norms with it
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.*"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated"),
    pytest.mark.filterwarnings("ignore:Lazy modules are a new feature"),
]

Make = Callable[[], nn.Module]


class Model(Toy):
    """The toy with other parts, in the order in which they are given."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        self.parts_of = tuple(parts)
        del self.backbone, self.head
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        for name in self.parts_of:
            x = getattr(self, name)(x)
        return x


def fit(module: LightningModule, *callbacks: Callback, epochs: int = 2) -> set[str]:
    """Fit with an audit, which must find nothing; the names of what changed."""
    audit = TrainableParamAudit(table=False, every="batch")
    before = state(module)
    trainer(*callbacks, audit, epochs=epochs).fit(module, loader())
    assert audit.findings == []
    return changed(before, state(module))


def tops(names: set[str], depth: int = 1) -> set[str]:
    return {".".join(name.split(".")[:depth]) for name in names}


# TorchScript


def scripted() -> Any:
    return torch.jit.script(Backbone())


def from_file() -> Any:
    stream = io.BytesIO()
    torch.jit.save(scripted(), stream)
    stream.seek(0)
    return torch.jit.load(stream).train()


def traced() -> Any:
    return torch.jit.trace(Backbone().eval(), torch.randn(3, 4)).train()


TORCHSCRIPT = pytest.mark.parametrize("make", [scripted, from_file, traced])


@TORCHSCRIPT
@pytest.mark.parametrize("named", [None, "backbone"])
def test_a_torchscript_backbone_stays_as_it_is_and_in_eval_mode(make: Make, named: Any) -> None:
    module = seeded(lambda: Model(backbone=make(), head=nn.Linear(8, 3)))
    asleep: list[bool] = []

    class Look(Callback):
        def on_before_backward(self, *_: Any) -> None:
            asleep.append(not any(part.training for part in module.backbone.modules()))

    assert tops(fit(module, FreezeBackbone(named), Look())) == {"head"}
    assert set(asleep) == {True}


@TORCHSCRIPT
def test_a_torchscript_backbone_trains_under_an_audit_alone(make: Make) -> None:
    moved = fit(seeded(lambda: Model(backbone=make(), head=nn.Linear(8, 3))))
    assert tops(moved) == {"backbone", "head"}


@TORCHSCRIPT
def test_layers_of_a_torchscript_backbone_unfreeze_from_the_top(make: Make) -> None:
    module = seeded(lambda: Model(backbone=make(), head=nn.Linear(8, 3)))
    moved = {name for name in fit(module, GradualUnfreeze()) if "linear" in name}
    assert tops(moved, 3) == {"backbone.blocks.2"}


class Wakes(Callback):
    """Puts all in train mode behind everybody's back."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        pl_module.backbone.train()


@TORCHSCRIPT
@pytest.mark.parametrize(
    "named", ["backbone", ["backbone.blocks.1.linear", "backbone.blocks.1.norm"]]
)
def test_a_frozen_torchscript_part_goes_back_to_eval_mode_when_its_model_is_called(
    make: Make, named: Any
) -> None:
    module = seeded(lambda: Model(backbone=make(), head=nn.Linear(8, 3)))
    moved = fit(module, FreezeBackbone(named), Wakes())
    assert "backbone.blocks.1.norm.running_mean" not in moved
    assert ("backbone.blocks.0.norm.running_mean" in moved) is (
        named != "backbone" and make is not traced
    )


def test_train_bn_and_type_selectors_know_a_torchscript_batch_norm() -> None:
    module = seeded(lambda: Model(backbone=scripted(), head=nn.Linear(8, 3)))
    moved = fit(module, FreezeBackbone(train_bn=True))
    assert {name.split(".")[3] for name in moved if "blocks" in name} == {"norm"}
    assert all("norm" in name for name in freeze(module, "type:BatchNorm1d"))


def test_a_part_that_was_traced_in_train_mode_is_refused_with_what_to_write() -> None:
    model = Model(backbone=torch.jit.trace(Backbone(), torch.randn(3, 4)), head=nn.Linear(8, 3))
    before = [parameter.requires_grad for parameter in model.parameters()]
    for act in (lambda: fit(model, FreezeBackbone()), lambda: freeze(model, "backbone")):
        with pytest.raises(ConflictError, match=r"`backbone\.blocks\.0\.\w+`.*module\.eval\(\)"):
            act()
        assert [parameter.requires_grad for parameter in model.parameters()] == before
    freeze(model, "backbone", eval_mode=False)
    assert trainable(model) == {"head.weight", "head.bias"}


@TORCHSCRIPT
def test_the_functions_take_a_torchscript_part(make: Make) -> None:
    model = Model(backbone=make(), head=nn.Linear(8, 3))
    names = freeze(model, "backbone")
    assert {row.name for row in summarize(model).rows if row.status == "frozen"} == set(names)
    assert [group.name for group in layer_groups(model)][-2:] == ["backbone.blocks.2", "head"]
    assert set(fingerprint(model)) == set(model.state_dict())
    assert audit_parameters(model, torch.optim.SGD(model.head.parameters(), lr=0.1)) == []
    with assert_frozen(model):
        model(torch.randn(3, 4))
    with (
        pytest.raises(FrozenWeightsChanged, match=r"backbone\.embed\.weight"),
        assert_frozen(model),
        torch.no_grad(),
    ):
        model.backbone.embed.weight.add_(1)
    assert unfreeze(model, "backbone") == names
    assert all(part.training for part in model.modules())
    with pytest.raises(ReinitError, match=r"`backbone\.embed\.weight`.*`init`"):
        reinit(model, "backbone")


# what Fabric's `setup` gives back


def parts() -> nn.Module:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.head = Backbone(), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.backbone(x))

    return Net()


def compiled() -> Any:
    return torch.compile(parts(), backend="eager")


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Any:
    """A process group of this process alone."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def set_up(make: Callable[[], Any], *, ddp: bool = False, **how: Any) -> tuple[Any, Any]:
    fabric = Fabric(accelerator="cpu", devices=1)
    inner = make()
    optimizer = torch.optim.SGD(inner.parameters(), lr=0.1)
    if ddp:  # as its strategy does on several ranks
        strategy = fabric.strategy
        strategy.setup_module = nn.parallel.DistributedDataParallel
    return fabric.setup(inner, optimizer, **how)


@pytest.mark.parametrize("ddp", [False, True])
@pytest.mark.parametrize(
    ("make", "how"),
    [(parts, {}), (compiled, {}), (compiled, {"_reapply_compile": False}), (Toy, {})],
)
def test_what_fabric_wraps_has_the_names_of_the_model(
    make: Any, how: Any, ddp: bool, one_process: None
) -> None:
    model, optimizer = set_up(make, ddp=ddp, **how)
    plain = Toy()
    assert list(fingerprint(model)) == list(fingerprint(plain))
    assert freeze(model, "backbone") == freeze(plain, "backbone")
    assert [row.name for row in summarize(model, optimizer).rows] == [
        row.name for row in summarize(plain).rows
    ]
    assert {row.status for row in summarize(model, optimizer).rows[-2:]} == {"trains"}
    assert layer_groups(model) == layer_groups(plain)
    assert audit_parameters(model, optimizer) == []
    assert [row.training for row in summarize(model).rows] == [
        row.training for row in summarize(plain).rows
    ]
    with assert_frozen(model):
        model(torch.randn(3, 4)).sum().backward()
        optimizer.step()
    with (
        pytest.raises(FrozenWeightsChanged, match=r" backbone\.embed\.weight"),
        assert_frozen(model),
    ):
        next(model.parameters()).data.add_(1)
    before = fingerprint(model)
    assert reinit(model, "head", seed=1) == ("head.weight", "head.bias")
    assert {n for n, d in fingerprint(model).items() if d != before[n]} == {
        "head.weight",
        "head.bias",
    }
    assert unfreeze(model, "_forward_module.backbone") == unfreeze(plain, "backbone")


def test_several_models_that_fabric_wraps_keep_their_own_names() -> None:
    both = nn.ModuleDict({"one": set_up(parts)[0], "two": set_up(compiled)[0]})
    assert tops(set(freeze(both, "two.backbone")), 2) == {"two.backbone"}
    assert tops(set(fingerprint(both)), 2) == {
        "one.backbone",
        "one.head",
        "two.backbone",
        "two.head",
    }
    assert trainable(both["one"]) and not both["two"].module.backbone.training


def test_a_compiled_distributed_model_has_the_names_of_the_model(one_process: None) -> None:
    wrapped = torch.compile(nn.parallel.DistributedDataParallel(parts()), backend="eager")
    assert list(fingerprint(wrapped)) == list(fingerprint(parts()))


# layers that have seen no input


def lazy_stem() -> Toy:
    module = Toy()
    module.backbone.embed = nn.LazyLinear(8)
    module.backbone.blocks[0].norm = nn.LazyBatchNorm1d()
    return module


def lazy_head() -> Toy:
    module = Toy()
    module.head = nn.LazyLinear(3)
    return module


class Lateness(Callback):
    """Notes the weights once lazy layers have some."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == 1:
            self.first = state(pl_module)


@pytest.mark.parametrize("make", [lazy_stem, lazy_head])
@pytest.mark.parametrize("named", [None, "backbone"])
def test_a_lazy_layer_is_frozen_from_its_first_input_on(make: Any, named: Any) -> None:
    module, late = seeded(make), Lateness()
    audit = TrainableParamAudit(table=True, every="batch")
    trainer(FreezeBackbone(named), late, audit, epochs=2).fit(module, loader())
    assert audit.findings == []
    assert tops(changed(late.first, state(module))) == {"head"}
    assert trainable(module) == {"head.weight", "head.bias"}
    assert "2 trainable tensors had gradients" in audit.verdict


@pytest.mark.parametrize("callbacks", [[], [GradualUnfreeze(start=0, layers_per_step=9)]])
def test_a_lazy_layer_trains_and_its_gradients_are_watched(callbacks: Any) -> None:
    module, late = seeded(lazy_stem), Lateness()
    audit = TrainableParamAudit(table=False)
    trainer(*copy.deepcopy(callbacks), late, audit, epochs=2).fit(module, loader())
    assert "backbone.embed.weight" in changed(late.first, state(module))
    assert "16 trainable tensors had gradients" in audit.verdict


class Overwrites(Callback):
    """Writes a frozen weight in the second step."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == 2:
            pl_module.backbone.embed.weight.data.add_(1)


@pytest.mark.parametrize("every", ["epoch", "batch"])
def test_a_write_to_what_a_lazy_layer_has_made_is_seen(every: Any) -> None:
    audit = TrainableParamAudit(table=False, every=every)
    with pytest.raises(FrozenWeightsChanged, match=r"backbone\.embed\.weight"):
        trainer(FreezeBackbone(), Overwrites(), audit).fit(seeded(lazy_stem), loader())


def test_the_functions_take_a_lazy_layer() -> None:
    model = lazy_stem()
    assert "backbone.embed" in {group.name for group in layer_groups(model)}
    frozen = freeze(model, "backbone")
    summary = summarize(model, origin={"backbone": Backbone().state_dict()})
    assert [row.name for row in summary.rows if row.status == "frozen"] == list(frozen)
    assert "backbone.embed.weight" in str(summary)
    assert audit_parameters(model, torch.optim.SGD(model.parameters(), lr=0.1)) == []
    assert GradualUnfreeze().preview(model, 3).rows
    with pytest.raises(ReinitError, match=r"`backbone\.embed\.weight` is of a lazy layer"):
        reinit(model, "backbone")
    with assert_frozen(model):
        model(torch.randn(3, 4))
    assert not model.backbone.embed.weight.requires_grad
    assert reinit(model, "backbone.embed")
    unfreeze(model, "**")
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_model_of_lazy_convolutions_has_its_anatomy() -> None:
    stages = {f"layer{i}": nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d()) for i in (1, 2)}
    found = anatomy(nn.ModuleDict({"stem": nn.LazyConv2d(4, 3), **stages, "fc": nn.LazyLinear(3)}))
    assert [block.name for block in found.blocks] == ["layer1", "layer2"]
    assert found.head == ("fc.weight", "fc.bias")


# weights that are computed from others


class Exponential(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.exp(x)

    def right_inverse(self, y: Tensor) -> Tensor:
        return torch.log(y.abs() + 1e-3)


class Squashed(nn.Module):
    """Has no inverse."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x)


def registered(part: Callable[[], nn.Module]) -> Any:
    def wrap(layer: nn.Module) -> nn.Module:
        parametrize.register_parametrization(layer, "weight", part())
        return layer

    return wrap


COMPUTED: dict[str, Any] = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "householder": lambda m: parametrizations.orthogonal(m, orthogonal_map="householder"),
    "cayley": lambda m: parametrizations.orthogonal(
        m, orthogonal_map="cayley", use_trivialization=False
    ),
    "both norms": lambda m: parametrizations.spectral_norm(parametrizations.weight_norm(m)),
    "old weight_norm": weight_norm,
    "old spectral_norm": spectral_norm,
    "a user's own": registered(Exponential),
    "without an inverse": registered(Squashed),
}


def with_computed(kind: str) -> Toy:
    module = Toy()
    for block in module.backbone.blocks:
        block.linear = COMPUTED[kind](block.linear)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=3)  # as trained
    module(torch.randn(8, 4))
    return module


@pytest.mark.parametrize("kind", COMPUTED)
def test_top_layers_with_computed_weights_compute_fresh_ones(kind: str) -> None:
    module = seeded(lambda: with_computed(kind)).eval()
    last, first = (module.backbone.blocks[place].linear for place in (-1, 0))
    before, kept = last.weight.detach().clone(), first.weight.detach().clone()
    own = dict(module.named_parameters())
    callback = ReinitTopLayers(1, seed=1)
    fitted = trainer(callback, max_steps=0)
    fitted.fit(module, loader())
    assert dict(module.named_parameters()) == own
    x = torch.randn(5, 8)
    assert not torch.allclose(last(x), nn.functional.linear(x, before, last.bias), atol=1e-2)
    assert torch.equal(first.weight, kept)
    if "spectral" in kind or kind == "both norms":
        assert abs(float(torch.linalg.matrix_norm(last.weight.detach(), 2)) - 1) < 0.05
    if kind in ("orthogonal", "householder", "cayley"):
        assert torch.allclose(last.weight @ last.weight.T, torch.eye(8), atol=1e-4)


@pytest.mark.parametrize("kind", ["weight_norm", "old weight_norm"])
def test_a_weight_norm_computes_what_the_layer_without_it_is_initialised_with(kind: str) -> None:
    layer = with_computed(kind).backbone.blocks[2].linear
    reinit(layer, "**", seed=1)
    torch.manual_seed(1)
    plain = nn.Linear(8, 8)
    assert torch.allclose(layer.weight, plain.weight, atol=1e-6)
    assert torch.equal(layer.bias, plain.bias)


@pytest.mark.parametrize("kind", COMPUTED)
def test_what_is_computed_anew_trains_by_the_optimizers_own_parameters(kind: str) -> None:
    module = seeded(lambda: with_computed(kind))
    moved = fit(module, ReinitTopLayers(1, seed=1), FreezeBackbone(trainable_layers=1))
    assert tops({name for name in moved if "blocks" in name}, 3) == {"backbone.blocks.2"}
    assert any("linear" in name and "bias" not in name for name in moved)


@pytest.mark.parametrize("kind", COMPUTED)
def test_the_bias_alone_is_reset_and_what_computes_the_weight_is_left(kind: str) -> None:
    module = with_computed(kind)
    before = state(module)
    reinit(module, "backbone.blocks.2.linear.bias", seed=1)
    assert changed(before, state(module)) == {"backbone.blocks.2.linear.bias"}


def test_a_parametrization_with_weights_of_its_own_and_no_reset_is_refused_by_name() -> None:
    class LowRank(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.ones(8, 2))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.a @ self.a.T

    module = Toy()
    parametrize.register_parametrization(module.backbone.blocks[2].linear, "weight", LowRank())
    before = state(module)
    with pytest.raises(ReinitError, match=r"parametrizations\.weight\.0\.a`.*`init`"):
        reinit(module, "backbone.blocks.2")
    assert changed(before, state(module)) == set()


# a loss with tensors of its own beside the model


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layer1, self.layer2 = nn.Linear(4, 8), mlp(), mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer2(self.layer1(self.stem(x)))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x).relu() + x
        return x


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder, self.head = Encoder(), Decoder(), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.decoder(self.encoder(x)))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU())


class Margin(nn.Module):
    """As of ArcFace: a tensor for each class, and no layer of torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.eye(3))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.centres


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.logit_scale.exp()


LOSSES: dict[str, Callable[[], LightningModule]] = {
    "a criterion behind the model": lambda: Model(model=UNet(), criterion=Scale()),
    "a criterion before it": lambda: Model(criterion=Scale(), model=UNet()),
    "a scale of another name": lambda: Model(model=UNet(), calibration=Scale()),
    "a margin with a matrix": lambda: Model(model=UNet(), arcface=Margin()),
    "a metric's layer": lambda: Model(model=UNet(), metric=nn.Linear(3, 3)),
    "a loss of layers": lambda: Model(
        model=UNet(), loss_fn=nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    ),
    "inside a wrapper": lambda: Model(net=nn.Sequential(UNet()), temperature=Scale()),
}


@pytest.mark.parametrize("kind", LOSSES)
def test_the_encoder_is_found_one_level_down_beside_a_loss_and_all_else_trains(kind: str) -> None:
    module = seeded(LOSSES[kind])
    moved = fit(module, FreezeBackbone())
    trained = {name for name, _ in module.named_parameters() if ".encoder." not in name}
    assert moved == trained


def test_a_loose_tensor_beside_the_model_is_no_part_of_the_backbone() -> None:
    class Weighted(Model):
        def __init__(self) -> None:
            super().__init__(model=UNet())
            self.log_vars = nn.Parameter(torch.zeros(2))

    found = anatomy(Weighted())
    assert "log_vars" in found.head
    assert all(name.startswith("model.encoder.") for name in found.backbone)


def test_a_backbone_or_a_sequential_one_level_down_is_found_beside_a_loss() -> None:
    inner = nn.ModuleDict({"backbone": Backbone(), "top": nn.Linear(8, 3)})
    assert anatomy(Model(net=inner, loss=Scale())).rule == "the attribute `net.backbone`"
    plain = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    assert anatomy(Model(net=plain, loss=Scale())).head == (
        "net.2.weight", "net.2.bias", "loss.logit_scale",
    )  # fmt: skip


def test_a_head_beside_a_plain_model_is_still_its_head() -> None:
    found = anatomy(Model(net=Backbone(), classifier=nn.Linear(8, 3)))
    assert found.head == ("classifier.weight", "classifier.bias")
    assert len(found.blocks) == 3


# two towers


class ResNet(nn.Module):
    def __init__(self, head: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Linear(4, 8)
        for number in (1, 2, 3, 4):
            setattr(self, f"layer{number}", mlp())
        if head:
            self.fc = nn.Linear(8, 3)


class Two(Toy):
    """Both see the input."""

    def __init__(self, make: Make, names: tuple[str, str] = ("left", "right")) -> None:
        super().__init__()
        del self.backbone
        self.names = names
        for name in names:
            setattr(self, name, make())

    def forward(self, x: Tensor) -> Tensor:
        one, two = (getattr(self, name) for name in self.names)
        return self.head(one(x) + two(x))


TOWERS: dict[str, Make] = {
    "bodies": Backbone,
    "resnets": ResNet,
    "resnets with heads": lambda: ResNet(head=True),
    "nets with a backbone": lambda: nn.ModuleDict({"backbone": Backbone(), "top": nn.Linear(8, 8)}),
    "u-nets": UNet,
    "torchscript": scripted,
}


@pytest.mark.parametrize("names", [("left", "right"), ("encoder1", "encoder2"), ("a", "b")])
@pytest.mark.parametrize("kind", TOWERS)
def test_of_two_towers_that_are_alike_a_name_is_asked_for(kind: str, names: Any) -> None:
    module = Two(TOWERS[kind], names)
    one, two = names
    message = rf'`{one}`, `{two}`.*FreezeBackbone\(backbone="{one}"\).*\["{one}", "{two}"\]'
    for callback in (FreezeBackbone(), GradualUnfreeze(), ReinitTopLayers(1)):
        with pytest.raises(DiscoveryError, match=message):
            trainer(callback).fit(module, loader())
    assert all(parameter.requires_grad for parameter in module.parameters())


@pytest.mark.parametrize("named", [["left"], ["right"], ["left", "right"]])
def test_the_towers_that_are_named_are_frozen_and_no_other(named: list[str]) -> None:
    moved = fit(seeded(lambda: Two(Backbone)), FreezeBackbone(named))
    assert tops(moved) == {"left", "right", "head"} - set(named)


def test_towers_in_a_dictionary_are_asked_about_by_their_full_names() -> None:
    towers = nn.ModuleDict({"image": Backbone(), "text": Backbone()})
    with pytest.raises(DiscoveryError, match=r'\["towers\.image", "towers\.text"\]'):
        anatomy(nn.ModuleDict({"towers": towers, "head": nn.Linear(8, 3)}))


@pytest.mark.parametrize("make", [Backbone, ResNet])
def test_one_encoder_that_is_used_twice_is_one_backbone(make: Any) -> None:
    shared = make()
    found = anatomy(nn.ModuleDict({"left": shared, "right": shared, "head": nn.Linear(8, 3)}))
    assert tops(set(found.backbone)) == {"left"}
    assert tops(set(found.head)) == {"head"}


def test_a_tower_that_is_called_the_backbone_is_the_backbone() -> None:
    for name in ("backbone", "encoder"):
        found = anatomy(
            nn.ModuleDict({name: Backbone(), "other": Backbone(), "head": nn.Linear(8, 3)})
        )
        assert tops(set(found.backbone)) == {name}


@pytest.mark.parametrize("names", [("left", "right"), ("right", "left"), ("teacher", "student")])
def test_a_tower_that_was_frozen_before_is_not_asked_about(names: Any) -> None:
    module = seeded(lambda: Two(Backbone, names))
    freeze(module, names[0])
    assert tops(set(anatomy(module).backbone)) == {names[1]}
    assert tops(fit(module, FreezeBackbone())) == {"head"}


# a network that is there to be asked


class Vgg(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        widths = [3, 8, 8, 8, 8, 8]
        self.features = nn.Sequential(*map(nn.Linear, widths, widths[1:]))
        self.drop = nn.Dropout(0.5)
        self.classifier = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.drop(self.features(x)))


class Perceptual(nn.Module):
    """A loss around a network that was trained to tell what people see, as LPIPS is."""

    def __init__(self, *, frozen: bool = True) -> None:
        super().__init__()
        self.net = asked(Vgg())
        self.lins = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))
        if frozen:
            asked(self)

    def forward(self, y: Tensor) -> Tensor:
        return self.net(self.lins[2](self.lins[1](self.lins[0](y))))


def asked(module: nn.Module) -> nn.Module:
    return module.requires_grad_(False).eval()


class Reconstructing(Model):
    """A part beside the model judges what that gives."""

    def __init__(self, judge: nn.Module, name: str, model: nn.Module, *, first: bool) -> None:
        parts = {"model": model, name: judge}
        super().__init__(**dict(reversed(parts.items()) if first else parts))
        self.judged_by = name

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        out = self.model(x)
        return (
            nn.functional.cross_entropy(out, y) + getattr(self, self.judged_by)(out).square().mean()
        )


def classifier() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


JUDGES = [(Vgg, "perceptual"), (Vgg, "vgg"), (Perceptual, "lpips"), (Perceptual, "judge")]


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(("make", "name"), JUDGES)
@pytest.mark.parametrize(
    ("model", "backbone"),
    [
        (UNet, "model.encoder"),
        (lambda: nn.Sequential(Backbone(), nn.Linear(8, 3)), "model.0"),
    ],
)
def test_a_frozen_judge_is_left_as_it_is_and_the_backbone_is_found(
    make: Any, name: str, model: Any, backbone: str, first: bool
) -> None:
    module = seeded(lambda: Reconstructing(asked(make()), name, model(), first=first))
    judge = getattr(module, name)
    assert all(n.startswith(f"{backbone}.") for n in anatomy(module).backbone)
    moved = fit(module, FreezeBackbone())
    assert moved == {
        n for n, _ in module.named_parameters() if not n.startswith((f"{backbone}.", f"{name}."))
    }
    assert not any(p.requires_grad for p in judge.parameters())
    assert not any(part.training for part in judge.modules())
    assert fit(module, FreezeBackbone()) == moved  # the flags of an earlier fit don't mislead


def test_a_judge_in_a_loss_with_layers_that_train_is_not_the_backbone() -> None:
    module = seeded(
        lambda: Reconstructing(Perceptual(frozen=False), "perceptual_loss", UNet(), first=True)
    )
    moved = fit(module, FreezeBackbone())
    assert tops(moved, 2) == {"perceptual_loss.lins", "model.decoder", "model.head"}


def test_a_frozen_judge_by_its_name_stands_back_behind_a_model_of_any_kind() -> None:
    module = Reconstructing(asked(Vgg()), "perceptual", classifier(), first=True)
    assert tops(set(anatomy(module).backbone), 2) == {"model.0"}


def test_layer_groups_still_hold_every_tensor_of_a_frozen_judge() -> None:
    module = Reconstructing(asked(Vgg()), "perceptual", UNet(), first=False)
    names = [name for group in layer_groups(module) for name in group.parameters]
    assert sorted(names) == sorted(name for name, _ in module.named_parameters())


def test_a_backbone_that_was_frozen_by_hand_is_still_the_backbone() -> None:
    for module in (
        Model(backbone=asked(Backbone()), head=nn.Linear(8, 3)),
        Model(net=asked(Backbone()), head=nn.Linear(8, 3)),
        Model(net=asked(ResNet()), classifier=classifier()),
        Model(features=asked(classifier()), classifier=nn.Linear(3, 3)),
    ):
        assert tops(set(anatomy(module).backbone)) == {module.parts_of[0]}
