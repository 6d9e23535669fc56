"""Which name of one file is which of the other: exact names, one common prefix, or a question."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_freeze import VerifyError
from lightning_freeze.checkpoints.verify.compare import group_names
from lightning_freeze.checkpoints.verify.files import natural
from lightning_freeze.checkpoints.verify.matching import (
    CERTIFICATE,
    Shapes,
    escaped,
    match,
    printable,
    tidy,
)
from tests.zoo import TRANSFORMERS

MODEL: dict[str, tuple[int, ...]] = {
    "embed.weight": (50, 8),
    "layer.0.weight": (8, 8),
    "layer.0.bias": (8,),
    "layer.1.weight": (8, 8),
    "layer.1.bias": (8,),
}
HEAD = {"head.weight": (2, 8), "head.bias": (2,)}
WIDE = {name: tuple(2 * size for size in shape) for name, shape in MODEL.items()}
CERTIFIED = (CERTIFICATE, "CHECKPOINT")


def under(prefix: str, names: Shapes) -> dict[str, tuple[int, ...]]:
    return {prefix + name: shape for name, shape in names.items()}


# Exact names, then one prefix


@pytest.mark.parametrize("left", ["", "bert.", "net.model."])
@pytest.mark.parametrize("right", ["", "model.", "model.bert.", "module."])
def test_names_correspond_whatever_each_side_begins_with(left: str, right: str) -> None:
    found = match(under(left, MODEL), under(right, {**MODEL, **HEAD}))
    assert found.names == {left + name: right + name for name in MODEL}


@given(st.sampled_from(["", "a.", "a.b."]), st.sampled_from(["", "a.", "c.d."]))
def test_they_do_so_from_both_sides(left: str, right: str) -> None:
    one, two = under(left, {**MODEL, **HEAD}), under(right, MODEL)
    there, back = match(one, two), match(two, one)
    assert {new: old for old, new in back.names.items()}.items() <= there.names.items()


def test_an_exact_name_wins_over_a_copy_elsewhere_whatever_its_shape() -> None:
    right = {**MODEL, "embed.weight": (9, 9), **under("old.", MODEL)}
    assert match(MODEL, right).names == {name: name for name in MODEL}
    both = {**WIDE, **under("old.", MODEL)}
    assert match(MODEL, both, None, CERTIFIED).names == {name: name for name in MODEL}
    with pytest.raises(VerifyError, match=r"different models.*`embed\.weight` is 50x8 in BASE and"):
        match(MODEL, both)


def test_what_stands_beside_the_common_part_keeps_its_name() -> None:
    found = match({**under("net.", MODEL), **HEAD}, {**under("model.", MODEL), **HEAD})
    assert found.names["net.embed.weight"] == "model.embed.weight"
    assert found.names["head.weight"] == "head.weight"


def test_no_two_names_become_one() -> None:
    found = match({**under("net.", MODEL), "embed.weight": (50, 8)}, MODEL)
    assert found.names["embed.weight"] == "embed.weight"
    assert found.names["net.embed.weight"] not in MODEL
    assert len(set(found.names.values())) == len(found.names)


def test_another_number_of_classes_still_is_the_same_head() -> None:
    found = match({**MODEL, **HEAD}, under("m.", {**MODEL, "head.weight": (5, 8)}))
    assert found.names["head.weight"] == "m.head.weight"


def test_two_towers_of_one_form_are_no_two_places_of_each_other() -> None:
    towers = {**under("query.", MODEL), **under("passage.", MODEL)}
    assert match(towers, under("model.", towers)).names == {n: f"model.{n}" for n in towers}


def test_the_first_names_of_layer_norms_are_found_and_a_gamma_of_ones_own_is_none() -> None:
    old = {"norm.gamma": (8,), "norm.beta": (8,), **MODEL}
    new = {"norm.weight": (8,), "norm.bias": (8,), **MODEL}
    assert match(old, under("m.", new)).names["norm.gamma"] == "m.norm.weight"
    assert match(old, {**new, "norm.gamma": (8,)}).names["norm.gamma"] == "norm.gamma"


def test_something_before_the_names_is_likelier_than_something_in_its_place() -> None:
    right = {"backbone.linear.weight": (8, 8), "head.weight": (8, 8)}
    assert match({"linear.weight": (8, 8)}, right).right == "backbone."
    # but not than all of them
    more = {**under("model.", MODEL), **{f"x.net.{n}": MODEL[n] for n in list(MODEL)[:3]}}
    with pytest.raises(VerifyError, match=r"under `model\.`.*under `x\.`|under `x\.`.*`model\."):
        match(under("net.", MODEL), more)


# A question


def test_a_model_at_several_places_is_an_error_that_asks() -> None:
    two = {**under("student.", MODEL), **under("teacher.", MODEL)}
    with pytest.raises(
        VerifyError, match=r"`student\.` \(5 .* `teacher\.` \(5 .* `--prefix teacher`"
    ):
        match(MODEL, two)
    assert match(MODEL, two, "teacher").right == "teacher."
    assert match(two, MODEL, "teacher.").left == "teacher."
    assert match(two, two).names == {name: name for name in two}
    assert match(two, two, "teacher").left == "teacher."


@pytest.mark.parametrize("base_first", [True, False])
def test_a_changed_copy_is_asked_about_too_for_it_may_be_the_one_that_is_meant(
    base_first: bool,
) -> None:
    two = {**under("model.", {**WIDE, "layer.0.bias": (8,)}), **under("teacher.", MODEL)}
    with pytest.raises(
        VerifyError, match=r"under `model\.` .*under `teacher\.` .*`--prefix teacher`"
    ):
        match(MODEL, two) if base_first else match(two, MODEL)
    assert match(MODEL, two, "teacher").names["embed.weight"] == "teacher.embed.weight"


def test_a_copy_beside_the_same_names_can_be_chosen() -> None:
    both = {**MODEL, **under("ema.", MODEL)}
    assert match(MODEL, both).right == ""
    assert match(MODEL, both, "ema").names == {name: f"ema.{name}" for name in MODEL}
    fewer = {**MODEL, "ema.embed.weight": (50, 8), "ema.layer.0.bias": (8,), "ema.x": (1,)}
    del fewer["layer.0.weight"]
    with pytest.raises(VerifyError, match="different models"):
        match(MODEL, fewer, "ema")


def test_a_command_that_is_suggested_quotes_what_it_names() -> None:
    two = {**under("a b.", MODEL), **under("a $c.", MODEL)}
    with pytest.raises(VerifyError, match=r"`--prefix 'a b'`"):
        match(MODEL, two)


def test_a_prefix_that_nothing_begins_with_is_an_error() -> None:
    with pytest.raises(VerifyError, match=r"`--prefix bart`: no name .* begin with `embed`, `lay"):
        match(MODEL, MODEL, "bart")


# Another model


@pytest.mark.parametrize("sides", [("BASE", "CHECKPOINT"), CERTIFIED])
def test_a_model_of_another_size_is_another_model(sides: tuple[str, str]) -> None:
    with pytest.raises(
        VerifyError, match=rf"`m\.embed\.weight` .* is 50x8 in {sides[0]} and 100x16 in CHECKPOINT"
    ):
        match(MODEL, under("m.", WIDE), None, sides)


def test_a_model_with_other_names_is_another_model() -> None:
    with pytest.raises(VerifyError, match=r"BASE has `embed\.weight`, .*CHECKPOINT has `conv\.ker"):
        match(MODEL, {"conv.kernel": (8, 8), "conv.shift": (8,)})


def test_half_of_the_smaller_side_is_enough_and_less_is_not() -> None:
    four = {f"x{i}.w": (i,) for i in range(4)}
    half = {name: shape if i < 2 else (99,) for i, (name, shape) in enumerate(four.items())}
    assert match(four, half).names == {name: name for name in four}
    with pytest.raises(VerifyError, match=r"different models: 1 of 4 names"):
        match(four, {**half, "x1.w": (98,)})


def test_of_a_certificate_one_exact_name_is_enough_and_a_head_alone_is_not_accused() -> None:
    few = {"embed.weight": (50, 8), **under("trained.", WIDE)}
    assert match(MODEL, few, None, CERTIFIED).names["layer.0.bias"] == "layer.0.bias"
    frozen = {"backbone.0.weight": (8, 4), "backbone.0.bias": (8,), "backbone.1.weight": (8,)}
    with pytest.raises(
        VerifyError, match=r"was saved without what was frozen.*`head\.weight` \(`backb"
    ):
        match(frozen, HEAD, None, CERTIFIED)


# Names as they are compared and shown


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (["_orig_mod.a.w"], ["a.w"]),
        (["module._orig_mod.a.w", "module.b.w"], ["module.a.w", "module.b.w"]),
        (["q.base_layer.weight", "q.lora_A.weight"], ["q.weight", "q.lora_A.weight"]),
        (["c.original_module.w", "c.modules_to_save.x.w"], ["c.w", "c.modules_to_save.x.w"]),
        # two names that would become one
        (["_orig_mod.a", "a"], ["_orig_mod.a", "a"]),
        (["q.base_layer.weight", "q.weight"], ["q.base_layer.weight", "q.weight"]),
    ],
)
def test_components_of_wrappers_and_adapters_are_left_out_of_names(
    raw: list[str], expected: list[str]
) -> None:
    assert list(tidy(raw).values()) == expected


def test_a_name_with_control_characters_is_shown_with_what_they_are_called() -> None:
    assert tidy(["a.\x1b[31m.w", "b.w"])["a.\x1b[31m.w"] == "a.\\x1b[31m.w"
    assert printable("_orig_mod.\nOK: fine") == "_orig_mod.\\nOK: fine"
    assert escaped("┃ a\x1b]0;t\x07 ┃\nC:\\\n", keep="\n") == "┃ a\\x1b]0;t\\x07 ┃\nC:\\\n"


@given(st.lists(st.text("a\x1b\n\\x1bn\u202e\ud800"), unique=True))
def test_names_that_differ_still_differ_when_they_can_be_printed(names: list[str]) -> None:
    shown = list(tidy(names).values())
    assert len(set(shown)) == len(names)
    assert all(name.isprintable() for name in shown)


# Layer groups, by names alone


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (
            ["b.emb.word.w", "b.enc.layer.0.a.w", "b.enc.layer.1.a.w", "b.enc.norm.w", "head.w"],
            ["b.emb", "b.enc.layer.0", "b.enc.layer.1", "b.enc.norm", "head"],
        ),
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
        (["m.0.auto.layer.0.w", "m.0.auto.layer.1.w"], ["m.0.auto.layer.0", "m.0.auto.layer.1"]),
    ],
)
def test_groups_are_told_from_names_alone(names: list[str], expected: list[str]) -> None:
    assert list(dict.fromkeys(group_names(names).values())) == expected


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_every_tensor_of_a_known_model_has_a_group_that_its_name_begins_with(name: str) -> None:
    names = list(TRANSFORMERS[name]().state_dict())
    found = group_names(names)
    assert list(found) == names
    assert all((tensor + ".").startswith(group + ".") for tensor, group in found.items())
    assert len(set(found.values())) >= 3


def test_layer_10_comes_after_layer_2() -> None:
    assert sorted(["l.10.w", "l.2.w", "a"], key=natural) == ["a", "l.2.w", "l.10.w"]
