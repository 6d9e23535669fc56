from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_freeze import VerifyError
from lightning_freeze.checkpoints.verify.align import CERTIFICATE, Shapes, align, check_stacks

MODEL: dict[str, tuple[int, ...]] = {
    "embed.weight": (50, 8),
    "layer.0.weight": (8, 8),
    "layer.0.bias": (8,),
    "layer.1.weight": (8, 8),
    "layer.1.bias": (8,),
}
HEAD = {"head.weight": (2, 8), "head.bias": (2,)}


def under(prefix: str, names: Shapes) -> dict[str, tuple[int, ...]]:
    return {prefix + name: shape for name, shape in names.items()}


@pytest.mark.parametrize("left", ["", "bert.", "net.model."])
@pytest.mark.parametrize("right", ["", "model.", "model.bert."])
def test_names_correspond_whatever_each_side_begins_with(left: str, right: str) -> None:
    found = align(under(left, MODEL), under(right, {**MODEL, **HEAD}))
    assert found.names == {left + name: right + name for name in MODEL}


@given(st.sampled_from(["", "a.", "a.b."]), st.sampled_from(["", "a.", "c.d."]))
def test_alignment_is_the_same_from_both_sides(left: str, right: str) -> None:
    one, two = under(left, {**MODEL, **HEAD}), under(right, MODEL)
    there, back = align(one, two), align(two, one)
    assert {new: old for old, new in back.names.items()}.items() <= there.names.items()


def test_another_number_of_classes_still_is_the_same_head() -> None:
    found = align({**MODEL, **HEAD}, under("m.", {**MODEL, "head.weight": (5, 8)}))
    assert found.names["head.weight"] == "m.head.weight"


def test_what_stands_beside_the_common_part_keeps_its_name() -> None:
    found = align({**under("net.", MODEL), **HEAD}, {**under("model.", MODEL), **HEAD})
    assert found.names["net.embed.weight"] == "model.embed.weight"
    assert found.names["head.weight"] == "head.weight"


def test_what_stands_beside_the_common_part_is_never_taken_for_what_is_in_it() -> None:
    left = {**under("net.", MODEL), "embed.weight": (50, 8)}
    found = align(left, MODEL)
    assert found.names["net.embed.weight"] == "embed.weight"
    assert found.names["embed.weight"] == "BASE:embed.weight"


def test_the_same_names_win_over_a_copy_under_a_prefix() -> None:
    found = align(MODEL, {**MODEL, **under("momentum.", MODEL)})
    assert (found.left, found.right) == ("", "")


def test_a_model_at_several_places_is_an_error_that_names_the_option() -> None:
    two = {**under("student.", MODEL), **under("teacher.", MODEL)}
    with pytest.raises(
        VerifyError,
        match=r"BASE stands at several places of CHECKPOINT: under `student\.` \(5 tensors\) and "
        r"under `teacher\.` \(5 tensors\)\. Say which one you mean: `--prefix student`",
    ):
        align(MODEL, two)
    assert align(MODEL, two, "teacher").right == "teacher."
    assert align(MODEL, two, "teacher.").right == "teacher."
    assert align(two, MODEL, "teacher").left == "teacher."
    assert align(two, two).names == {name: name for name in two}
    assert align(two, two, "teacher").left == "teacher."


def test_a_place_that_fits_nearly_as_well_is_no_certain_place() -> None:
    whole = {f"part{i}.weight": (i + 1,) for i in range(30)} | HEAD
    other_head = {**whole, "head.weight": (7, 8)}
    two = {**under("student.", other_head), **under("teacher.", whole)}
    with pytest.raises(VerifyError, match=r"`student\.` \(31 tensors\) and under `teacher\.` \(32"):
        align(whole, two)


def test_the_same_names_can_be_chosen_over_a_copy_that_fits_better() -> None:
    whole = {f"part{i}.weight": (i + 1,) for i in range(30)} | HEAD
    right = {**whole, "head.weight": (7, 8), **under("ema.", whole)}
    with pytest.raises(VerifyError, match=r"as it is \(31 .* under `ema\.` .* `--prefix \"\"`"):
        align(whole, right)
    assert align(whole, right, "").right == ""
    assert align(whole, right, "ema").right == "ema."


def test_a_prefix_that_nothing_begins_with_is_an_error() -> None:
    with pytest.raises(VerifyError, match=r"`--prefix bart`: no name .* begin with `embed`, `lay"):
        align(MODEL, MODEL, "bart")


def test_a_model_of_another_size_is_another_model() -> None:
    wide = {name: tuple(2 * size for size in shape) for name, shape in MODEL.items()}
    with pytest.raises(
        VerifyError,
        match=r"different models: none of the 5 .* The names fit, but not the shapes: "
        r"`m\.embed\.weight` is 50x8 in BASE and 100x16 in CHECKPOINT",
    ):
        align(MODEL, under("m.", wide))


def test_a_model_with_other_names_is_another_model() -> None:
    with pytest.raises(
        VerifyError, match=r"The names differ: BASE has `embed\.weight`, .* and 3 m"
    ):
        align(MODEL, {"conv.kernel": (8, 8), "conv.shift": (8,)})


def test_half_of_the_smaller_side_is_enough_and_less_is_not() -> None:
    four = {f"x{i}.w": (i,) for i in range(4)}
    half = {name: shape if i < 2 else (99,) for i, (name, shape) in enumerate(four.items())}
    assert align(four, half).names == {name: name for name in four}
    less = {**half, "x1.w": (98,)}
    with pytest.raises(VerifyError, match=r"only 1 of the 4 tensors of the smaller one"):
        align(four, less)


def test_another_number_of_layers_is_another_model() -> None:
    deep = {**MODEL, "layer.2.weight": (8, 8), "layer.2.bias": (8,)}
    right = under("m.", deep)
    with pytest.raises(VerifyError, match=r"`m\.layer` has 2 layers in BASE and 3 in CHECKPOINT"):
        check_stacks(align(MODEL, right), MODEL, right)
    right = under("m.", MODEL)
    with pytest.raises(VerifyError, match=r"`m\.layer` has 3 layers in BASE and 2 in CHECKPOINT"):
        check_stacks(align(deep, right), deep, right)


def test_a_head_with_more_layers_is_a_head() -> None:
    one = {**MODEL, "head.0.weight": (2, 8)}
    two = {**MODEL, "head.0.weight": (8, 8), "head.2.weight": (2, 8)}
    check_stacks(align(one, two), one, two)
    check_stacks(align(HEAD, HEAD), HEAD, HEAD)


@pytest.mark.parametrize("base_first", [True, False])
def test_a_worse_copy_is_asked_about_too_for_it_may_be_the_one_that_is_meant(
    base_first: bool,
) -> None:
    changed = {**MODEL, "embed.weight": (9, 9), "layer.0.weight": (9, 9)}
    two = {**under("model.", changed), **under("teacher.", MODEL)}
    with pytest.raises(
        VerifyError, match=r"under `model\.` \(3 tensors\) and under `teacher\.` \(5 tensors\)"
    ):
        align(MODEL, two) if base_first else align(two, MODEL)
    assert align(MODEL, two, "model").names["embed.weight"] == "model.embed.weight"


def test_a_copy_of_less_than_half_is_no_second_place() -> None:
    few = {name: MODEL[name] for name in ("layer.0.weight", "layer.0.bias")}
    assert align(MODEL, {**under("model.", MODEL), **under("teacher.", few)}).right == "model."


def test_two_towers_of_one_form_are_no_two_places_of_each_other() -> None:
    towers = {**under("query.", MODEL), **under("passage.", MODEL)}
    assert align(towers, under("model.", towers)).names == {n: f"model.{n}" for n in towers}


ADAPTED = {
    "layer.0.query.base_layer.weight": (8, 8),
    "layer.0.query.lora_A.default.weight": (2, 8),
    "layer.0.norm.weight": (8,),
}
PLAIN = {"layer.0.query.weight": (8, 8), "layer.0.norm.weight": (8,)}


@pytest.mark.parametrize("prefix", ["", "base_model.model."])
def test_what_an_adapter_moved_is_found_again(prefix: str) -> None:
    adapted = under(prefix, ADAPTED)
    moved = f"{prefix}layer.0.query.base_layer.weight"
    assert align(PLAIN, adapted).names["layer.0.query.weight"] == moved
    back = align(adapted, PLAIN).names
    assert back[moved] == "layer.0.query.weight"
    assert back[f"{prefix}layer.0.query.lora_A.default.weight"] not in PLAIN
    assert align(adapted, adapted).names == {name: name for name in adapted}
    check_stacks(align(PLAIN, adapted), PLAIN, adapted)


def test_a_tensor_that_stands_beside_a_base_layer_is_not_taken_for_it() -> None:
    both = {**PLAIN, "layer.0.query.base_layer.weight": (8, 8)}
    assert align(both, PLAIN).names["layer.0.query.weight"] == "layer.0.query.weight"
    assert align(both, PLAIN).names["layer.0.query.base_layer.weight"] not in PLAIN


def test_a_head_alone_has_nothing_that_is_certified() -> None:
    frozen = {"backbone.0.weight": (8, 4), "backbone.0.bias": (8,), "backbone.1.weight": (8,)}
    with pytest.raises(
        VerifyError,
        match=r"^The certificate and CHECKPOINT are different models, or CHECKPOINT was saved "
        r"without what was frozen: CHECKPOINT has none of the 3 certified tensors, such as "
        r"`backbone\.0\.weight`\. It has `head\.weight`, `head\.bias`\.$",
    ):
        align(frozen, HEAD, sides=(CERTIFICATE, "CHECKPOINT"))


def test_a_certificate_of_another_size_names_it_in_the_middle_of_a_sentence() -> None:
    wide = {name: tuple(2 * size for size in shape) for name, shape in MODEL.items()}
    with pytest.raises(
        VerifyError, match=r"`embed\.weight` is 50x8 in the certificate and 100x16 in CHECKPOINT"
    ):
        align(MODEL, wide, sides=(CERTIFICATE, "CHECKPOINT"))


def test_a_name_that_fits_by_chance_is_told_with_the_one_that_it_was_taken_for() -> None:
    with pytest.raises(
        VerifyError,
        match=r"`head\.weight` \(`layer\.0\.weight` in BASE\) is 8x8 in BASE and 2x8 in CHECKPOINT",
    ):
        align(MODEL, HEAD)


def test_one_tensor_is_counted_as_one() -> None:
    with pytest.raises(VerifyError, match=r"none of the 1 tensor of the smaller one"):
        align(MODEL, {"x.y": (3,)})
