from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_freeze import VerifyError
from lightning_freeze.verify.align import Shapes, align, check_stacks, tidy

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


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (["module.a.w", "module.b.w"], ["a.w", "b.w"]),
        (["_orig_mod.a.w"], ["a.w"]),
        (["model._orig_mod.module.a.w", "head.w"], ["model.a.w", "head.w"]),
        # a user's own module of this name, beside others
        (["module.a.w", "head.w"], ["module.a.w", "head.w"]),
        (["a.module"], ["a.module"]),
        # two names that would become one
        (["_orig_mod.a", "a"], ["_orig_mod.a", "a"]),
    ],
)
def test_components_of_wrappers_are_left_out_of_names(raw: list[str], expected: list[str]) -> None:
    assert list(tidy(raw).values()) == expected
