from __future__ import annotations

import pytest

from lightning_freeze.checkpoints.verify.groups import group_names, in_natural_order, stacks
from tests.zoo import TRANSFORMERS


def groups(*names: str) -> list[str]:
    return list(dict.fromkeys(group_names(names).values()))


def test_the_layers_of_a_stack_are_a_group_each_and_what_stands_beside_it_one() -> None:
    found = groups(
        "bert.embeddings.word.weight",
        "bert.embeddings.norm.weight",
        "bert.encoder.layer.0.a.weight",
        "bert.encoder.layer.1.a.weight",
        "bert.encoder.norm.weight",
        "bert.pooler.weight",
        "classifier.weight",
        "classifier.bias",
    )
    assert found == [
        "bert.embeddings",
        "bert.encoder.layer.0",
        "bert.encoder.layer.1",
        "bert.encoder.norm",
        "bert.pooler",
        "classifier",
    ]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["features.0.weight", "features.0.bias", "fc.weight"], ["features.0", "fc"]),
        (["layer1.0.down.0.w", "layer1.1.down.0.w"], ["layer1.0", "layer1.1"]),
        (["0.weight", "2.weight"], ["0", "2"]),
        (["net.a.w", "net.b.w"], ["net.a", "net.b"]),
        (["fc.weight", "fc.bias"], ["fc"]),
        (["w"], ["w"]),
        (["cls_token", "layer.0.w", "layer.1.w"], ["cls_token", "layer.0", "layer.1"]),
        # a list of tensors is no stack of layers
        (["prompts.0", "prompts.1", "head.w"], ["prompts", "head"]),
        # a number alone holds a whole model at times
        (
            ["m.0.auto.embed.w", "m.0.auto.layer.0.w", "m.0.auto.layer.1.w"],
            ["m.0.auto.embed", "m.0.auto.layer.0", "m.0.auto.layer.1"],
        ),
    ],
)
def test_groups_are_told_from_names_alone(names: list[str], expected: list[str]) -> None:
    assert groups(*names) == expected


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_every_tensor_of_a_known_model_has_a_group_that_its_name_begins_with(name: str) -> None:
    names = list(TRANSFORMERS[name]().state_dict())
    found = group_names(names)
    assert list(found) == names
    assert all((tensor + ".").startswith(group + ".") for tensor, group in found.items())
    assert len(set(found.values())) >= 3


def test_a_stack_is_where_the_numbered_layers_are() -> None:
    assert stacks(["e.w", "enc.layer.0.mlp.1.w", "enc.layer.1.w", "0"]) == {
        "enc.layer.0.mlp.1.w": "enc.layer",
        "enc.layer.1.w": "enc.layer",
    }
    assert stacks(["0.w", "1.w"]) == {"0.w": "", "1.w": ""}


def test_layer_10_comes_after_layer_2() -> None:
    assert in_natural_order(["l.10.w", "l.2.w", "a"]) == ["a", "l.2.w", "l.10.w"]
