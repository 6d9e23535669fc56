from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_freeze.checkpoints.verify.spelling import printable, printable_lines, tidy


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


ESCAPE = "a.\x1b[31m.w"


def test_a_name_with_control_characters_is_shown_with_what_they_are_called() -> None:
    assert tidy([ESCAPE, "b.w"])[ESCAPE] == "a.\\x1b[31m.w"
    assert tidy(["_orig_mod.\nverdict: fine", "\nverdict: fine"])["\nverdict: fine"] == (
        "\\nverdict: fine"
    )


@given(st.lists(st.text("a\x1b\n\\x1bn\u202e\ud800"), unique=True))
def test_names_that_differ_still_differ_when_they_can_be_printed(names: list[str]) -> None:
    shown = [printable(name) for name in names]
    assert len(set(shown)) == len(names)
    assert all(name.isprintable() for name in shown)


def test_a_text_keeps_its_lines_and_loses_what_acts_on_a_terminal() -> None:
    assert printable_lines("┃ a\x1b]0;t\x07 ┃\nC:\\\n") == "┃ a\\x1b]0;t\\x07 ┃\nC:\\\n"
