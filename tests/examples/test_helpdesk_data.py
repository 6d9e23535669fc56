"""Checks of the help desk data set that the fine-tuning demo reads."""

import itertools
import re
from collections import Counter
from pathlib import Path

import pytest

DATA = Path(__file__).parents[2] / "examples" / "data"
FILES = ("helpdesk_train.tsv", "helpdesk_test.tsv")

Row = tuple[str, str]


def lines_of(name: str) -> list[str]:
    return (DATA / name).read_bytes().decode("utf-8").removesuffix("\n").split("\n")


def rows_of(name: str) -> list[Row]:
    rows = []
    for line in lines_of(name)[1:]:
        text, label = line.split("\t")
        rows.append((text, label))
    return rows


def all_rows() -> list[Row]:
    return [row for name in FILES for row in rows_of(name)]


def words_of(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"[\w']+", text.lower()))


def jaccard(left: frozenset[str], right: frozenset[str]) -> float:
    return len(left & right) / len(left | right)


@pytest.mark.parametrize("name", FILES)
def test_the_header_names_text_and_label(name: str) -> None:
    assert lines_of(name)[0] == "text\tlabel"


@pytest.mark.parametrize("name", FILES)
def test_every_line_has_two_columns_and_nothing_that_breaks_the_format(name: str) -> None:
    for line in lines_of(name):
        assert line.count("\t") == 1, line
        assert '"' not in line and "\r" not in line, line


@pytest.mark.parametrize("name", FILES)
def test_no_text_or_label_is_blank_or_padded(name: str) -> None:
    for text, label in rows_of(name):
        assert text and text == text.strip(), text
        assert re.fullmatch(r"[a-z]+(_[a-z]+)*", label), label


def test_there_are_at_least_600_sentences_and_8_classes() -> None:
    rows = all_rows()
    assert len(rows) >= 600
    assert len({label for _, label in rows}) >= 8


def test_every_class_is_in_both_files() -> None:
    train, test = ({label for _, label in rows_of(name)} for name in FILES)
    assert train == test


def test_every_class_is_equally_frequent_in_the_test_file() -> None:
    counts = Counter(label for _, label in rows_of("helpdesk_test.tsv"))
    assert len(set(counts.values())) == 1, counts


@pytest.mark.parametrize("name", FILES)
def test_the_classes_are_interleaved(name: str) -> None:
    labels = [label for _, label in rows_of(name)]
    runs = [len(list(group)) for _, group in itertools.groupby(labels)]
    assert max(runs) <= 6


def test_every_sentence_has_between_3_and_40_words() -> None:
    for text, _ in all_rows():
        assert 3 <= len(text.split()) <= 40, text


def test_no_sentence_occurs_twice_when_case_and_punctuation_are_ignored() -> None:
    bare = Counter(
        " ".join(re.sub(r"[\W_]+", " ", text.casefold()).split()) for text, _ in all_rows()
    )
    assert [text for text, count in bare.items() if count > 1] == []


@pytest.mark.parametrize("name", FILES)
def test_no_two_sentences_of_a_file_are_near_duplicates(name: str) -> None:
    texts = [(text, words_of(text)) for text, _ in rows_of(name)]
    close = [
        (left, right)
        for (left, left_words), (right, right_words) in itertools.combinations(texts, 2)
        if jaccard(left_words, right_words) >= 0.6
    ]
    assert close == []


def test_no_test_sentence_is_a_near_duplicate_of_a_training_sentence() -> None:
    train, test = ([(text, words_of(text)) for text, _ in rows_of(name)] for name in FILES)
    close = [
        (left, right)
        for (left, left_words), (right, right_words) in itertools.product(train, test)
        if jaccard(left_words, right_words) >= 0.5
    ]
    assert close == []
