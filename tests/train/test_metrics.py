"""Metrics against numbers that are known, or computed in another way."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inlay.train import metrics

TAGS = ["O", "B-per", "I-per", "B-loc", "I-loc"]


def naive_entities(tags: list[str]) -> set[tuple[str, int, int]]:
    """BIO by the book: an entity begins at B-x, or at I-x after anything that is not of type x."""
    found = set()
    for start, tag in enumerate(tags):
        kind = tag[2:]
        before = tags[start - 1] if start else "O"
        if tag == "O" or (tag.startswith("I") and before[2:] == kind and before != "O"):
            continue
        end = start + 1
        while end < len(tags) and tags[end] == f"I-{kind}":
            end += 1
        found.add((kind, start, end))
    return found


@given(st.lists(st.sampled_from(TAGS), max_size=12))
def test_entities_of_any_bio_sequence(tags):
    assert metrics.entities(tags) == naive_entities(tags)


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        (["B-per", "E-per", "S-loc", "O"], {("per", 0, 2), ("loc", 2, 3)}),
        (["B-per", "L-per", "U-loc", "U-loc"], {("per", 0, 2), ("loc", 2, 3), ("loc", 3, 4)}),
        (["I-per", "I-loc"], {("per", 0, 1), ("loc", 1, 2)}),
        (["B-per", "B-per"], {("per", 0, 1), ("per", 1, 2)}),
        (["B-x-y", "I-x-y"], {("x-y", 0, 2)}),
        ([], set()),
    ],
)
def test_entities_of_other_schemes(tags, expected):
    assert metrics.entities(tags) == expected


def test_entity_f1_counts_whole_entities():
    gold = [["B-per", "I-per", "O", "B-loc"], ["O", "B-per"]]
    guess = [["B-per", "O", "O", "B-loc"], ["B-loc", "B-per"]]
    scores = metrics.tagging(guess, gold)
    assert scores["precision"] == pytest.approx(2 / 4)  # per[0:1] wrong, loc right; loc wrong, per right
    assert scores["recall"] == pytest.approx(2 / 3)
    assert scores["f1"] == pytest.approx(2 * (0.5 * 2 / 3) / (0.5 + 2 / 3))
    assert scores["accuracy"] == pytest.approx(4 / 6)


def test_no_entities_at_all_is_zero_not_an_error():
    assert metrics.tagging([["O"]], [["O"]])["f1"] == 0.0


def test_classification_by_hand():
    scores = metrics.classification([0, 1, 1, 2], [0, 1, 2, 2])
    assert scores["accuracy"] == 0.75
    assert scores["macro_f1"] == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)
    # covariance form of Matthews' correlation: (c s - Σ p t) / sqrt((s² - Σ p²)(s² - Σ t²))
    assert scores["mcc"] == pytest.approx((3 * 4 - (1 + 2 + 2)) / math.sqrt((16 - 6) * (16 - 6)))


def test_regression_by_hand():
    scores = metrics.regression([1.0, 2.0, 4.0], [1.0, 2.0, 3.0])
    assert scores["mse"] == pytest.approx(1 / 3)
    assert scores["spearman"] == pytest.approx(1.0)
    assert scores["pearson"] == pytest.approx(0.9819805, abs=1e-6)
    assert metrics.regression([1.0, 1.0], [1.0, 2.0])["pearson"] == 0.0


def test_sets_of_labels():
    scores = metrics.multilabel([[1, 0, 1], [0, 1, 0]], [[1, 0, 0], [0, 1, 0]])
    assert scores["accuracy"] == 0.5
    assert scores["f1"] == pytest.approx(2 * 2 / (2 * 2 + 1))


def test_answers_follow_squad():
    scores = metrics.answers(["The Eiffel Tower!", "in Paris", ""], [["eiffel tower"], ["Paris", "London"], [""]])
    assert scores["exact_match"] == pytest.approx(2 / 3)
    assert scores["f1"] == pytest.approx((1 + 2 / 3 + 1) / 3)


def test_generation_against_several_references():
    perfect = metrics.generation(["the cat sat on the mat"], [["a dog", "the cat sat on the mat"]])
    assert perfect == pytest.approx({"exact_match": 1.0, "bleu": 100.0, "rouge1": 1.0, "rouge2": 1.0, "rougeL": 1.0})
    half = metrics.generation(["the cat"], [["the dog"]])
    assert half["rouge1"] == pytest.approx(0.5)
    assert half["rouge2"] == 0.0
    assert metrics.generation([], []) == {}


def test_bleu_is_sacrebleus_with_unequal_numbers_of_references():
    import sacrebleu

    predicted = ["the cat is on the mat", "there is a dog here"]
    ours = metrics.generation(predicted, [["the cat sat on the mat", "a cat is on the mat"], ["there is a dog"]])
    theirs = sacrebleu.corpus_bleu(
        predicted, [["the cat sat on the mat", "there is a dog"], ["a cat is on the mat", None]]
    )
    assert ours["bleu"] == pytest.approx(theirs.score)


def test_perplexity():
    assert metrics.language_model(math.log(8), 3, 4) == pytest.approx({"perplexity": 8.0, "token_accuracy": 0.75})
    assert metrics.language_model(1e4, 0, 1)["perplexity"] == math.inf


@pytest.mark.parametrize(
    ("metric", "new", "old", "threshold", "expected"),
    [
        ("accuracy", 0.6, None, 0.0, True),
        ("accuracy", 0.6, 0.5, 0.0, True),
        ("accuracy", 0.5, 0.5, 0.0, False),
        ("accuracy", 0.55, 0.5, 0.1, False),
        ("loss", 0.4, 0.5, 0.0, True),
        ("loss", 0.6, 0.5, 0.0, False),
        ("loss", math.nan, 0.5, 0.0, False),
        ("loss", math.nan, None, 0.0, False),
    ],
)
def test_better(metric, new, old, threshold, expected):
    assert metrics.better(metric, new, old, threshold) is expected


def test_every_metric_has_a_direction_and_every_task_a_main_one():
    for task, main in metrics.MAIN.items():
        assert main in metrics.names(task)
        assert all(metrics.greater_is_better(name) is not None for name in metrics.names(task))
