"""From files to examples: tasks, labels, splits, mixtures, caching, streaming, and every row accounted for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from inlay.data import Batches, DataSpec, prepare
from inlay.data.examples import MASKED
from inlay.data.spec import Prepared
from inlay.errors import DataError

Write = Callable[[str, Any], Path]
Make = Callable[..., PreTrainedTokenizerBase]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def csv_of(rows: list[tuple[Any, ...]], header: str = "text,label") -> str:
    return header + "\n" + "".join(",".join(map(str, row)) + "\n" for row in rows)


def jsonl(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


REVIEWS = [(f"a {'good' if i % 3 else 'bad'} film number {i}", "pos" if i % 3 else "neg") for i in range(60)]


def test_classification(write: Write, cache: Path, pieces_tok: PreTrainedTokenizerBase) -> None:
    path = write("reviews.csv", csv_of(REVIEWS))
    prepared = prepare(DataSpec(str(path), cache_dir=cache), pieces_tok, "encoder")
    assert prepared.task == "sequence-classification"
    assert prepared.format == "text and label (text=text, label=label) for sequence-classification"
    assert prepared.labels == ["neg", "pos"]
    assert not prepared.multi_text
    assert not prepared.multi_label
    assert (len(prepared.train), len(prepared.evals["eval"])) == (54, 6)
    assert prepared.report.rows == 60
    assert prepared.report.classes == {"neg": 18, "pos": 36}
    for part in (prepared.train, prepared.evals["eval"]):
        for i in range(len(part)):
            line = int(part.origin(i).removeprefix("reviews.csv:"))
            text, label = REVIEWS[line - 2]
            assert part[i]["input_ids"] == pieces_tok(text)["input_ids"]
            assert (part[i]["labels"], part.reference(i)) == (["neg", "pos"].index(label), [label])
    assert sum(row["labels"] == 0 for row in prepared.evals["eval"]) == 2  # a third, as in the data


def test_the_same_files_give_the_same_examples(write: Write, cache: Path, pieces_tok: PreTrainedTokenizerBase) -> None:
    spec = DataSpec(str(write("a.csv", csv_of(REVIEWS))), cache_dir=cache)
    first, second = (prepare(spec, pieces_tok, "encoder") for _ in range(2))
    assert [first.train.origin(i) for i in range(54)] == [second.train.origin(i) for i in range(54)]
    assert first.fingerprint == second.fingerprint
    other = prepare(DataSpec(spec.data, cache_dir=cache, seed=1), pieces_tok, "encoder")
    assert other.fingerprint != first.fingerprint
    assert [other.train.origin(i) for i in range(54)] != [first.train.origin(i) for i in range(54)]


def test_rows_are_tokenized_once(write: Write, cache: Path, pieces_tok: PreTrainedTokenizerBase) -> None:
    told: list[tuple[str, int, int]] = []
    spec = DataSpec(str(write("a.csv", csv_of(REVIEWS))), cache_dir=cache)
    prepare(spec, pieces_tok, "encoder", lambda *args: told.append(args))
    assert told[-1] == ("tokenizing a.csv", 60, 60)
    told.clear()
    prepare(spec, pieces_tok, "encoder", lambda *args: told.append(args))
    assert told == []
    prepare(DataSpec(spec.data, cache_dir=cache, max_length=20), pieces_tok, "encoder", lambda *args: told.append(args))
    assert told
    told.clear()
    write("a.csv", csv_of(REVIEWS[:-1]))
    assert prepare(spec, pieces_tok, "encoder", lambda *args: told.append(args)).report.rows == 59
    assert told


def test_damage_to_the_cache_is_repaired_and_told(
    write: Write, cache: Path, pieces_tok: PreTrainedTokenizerBase
) -> None:
    spec = DataSpec(str(write("a.csv", csv_of(REVIEWS))), cache_dir=cache)
    before = list(prepare(spec, pieces_tok, "encoder").train)
    (stored,) = cache.glob("*/examples.arrow")
    stored.write_bytes(stored.read_bytes()[:-1])
    prepared = prepare(spec, pieces_tok, "encoder")
    assert list(prepared.train) == before
    assert "was damaged and is made anew" in str(prepared.report)


BAD = "text,label\na good film,pos\na bad film\n,neg\nthe day,\nthe sea,neg\n"


def test_bad_rows_stop_with_all_of_them(write: Write, cache: Path, pieces_tok: PreTrainedTokenizerBase) -> None:
    path = write("a.csv", BAD)
    with pytest.raises(DataError) as raised:
        prepare(DataSpec(str(path), cache_dir=cache), pieces_tok, "encoder")
    message = str(raised.value)
    assert message.startswith("3 bad rows:\n")
    assert "a.csv:3: 'a bad film'; expected 2 fields (text, label), found: 1 field" in message
    assert "a.csv:4: column 'text': ''; expected a text that is not empty" in message
    assert "a.csv:5: column 'label': ''" in message
    assert list(cache.iterdir()) == []


def test_bad_rows_are_skipped_written_and_counted_also_from_the_cache(
    write: Write, cache: Path, pieces_tok: PreTrainedTokenizerBase
) -> None:
    spec = DataSpec(str(write("a.csv", BAD)), cache_dir=cache, on_bad_row="skip", eval_fraction=0)
    for _ in range(2):
        prepared = prepare(spec, pieces_tok, "encoder")
        assert (len(prepared.train), prepared.report.rows, prepared.report.skipped) == (2, 5, 3)
        (file,) = prepared.report.skipped_files
        assert [json.loads(line)["line"] for line in file.read_text().splitlines()] == [3, 4, 5]
        assert "3 bad rows left out" in str(prepared.report)


def test_a_file_of_bad_rows_only(write: Write, cache: Path, pieces_tok: PreTrainedTokenizerBase) -> None:
    path = write("a.jsonl", "{]\n{]\n")
    with pytest.raises(DataError, match=r"a\.jsonl:1: .*expected a JSON object"):
        prepare(DataSpec(str(path), cache_dir=cache, on_bad_row="skip"), pieces_tok, "encoder")
    spec = DataSpec(str(write("a.csv", "text,label\n,x\n")), cache_dir=cache, on_bad_row="skip")
    with pytest.raises(DataError, match="no good row among its 1"):
        prepare(spec, pieces_tok, "encoder")
    with pytest.raises(DataError, match="holds no rows"):
        prepare(DataSpec(str(write("b.csv", "text,label\n")), cache_dir=cache), pieces_tok, "encoder")


@pytest.mark.parametrize(
    ("labels", "task", "expected"),
    [
        (["10", "9", "1"], None, ("sequence-classification", ["1", "9", "10"])),
        (["0.5", "1", "3.25"], None, ("regression", None)),
        (["1", "2", "3"], "regression", ("regression", None)),
        (["0.5", "1", "3.25"], "sequence_classification", ("sequence-classification", ["0.5", "1", "3.25"])),
    ],
)
def test_numbers_as_labels(
    write: Write, cache: Path, pieces_tok: PreTrainedTokenizerBase, labels: list[str], task: str | None, expected: Any
) -> None:
    path = write("a.csv", csv_of([("a film", label) for label in labels * 10]))
    prepared = prepare(DataSpec(str(path), cache_dir=cache, task=task, eval_fraction=0), pieces_tok, "encoder")
    assert (prepared.task, prepared.labels) == expected
    values = [prepared.train[i]["labels"] for i in range(3)]
    if prepared.labels is None:
        assert values == [float(label) for label in labels]
        assert prepared.format.endswith("for regression")
    else:
        assert values == [prepared.labels.index(label) for label in labels]


@pytest.mark.parametrize(
    ("rows", "task", "words"),
    [
        ([("a", "x")] * 5, None, "all rows have the label 'x'"),
        ([(f"a {i}", f"text {i}") for i in range(30)], None, "has 30 different labels in 30 rows"),
        ([("a", "x"), ("b", "2")], "regression", "'x' is no number"),
    ],
)
def test_labels_that_cannot_be(
    write: Write, cache: Path, pieces_tok: PreTrainedTokenizerBase, rows: Any, task: Any, words: str
) -> None:
    with pytest.raises(DataError, match=words):
        prepare(DataSpec(str(write("a.csv", csv_of(rows))), cache_dir=cache, task=task), pieces_tok, "encoder")


def test_several_labels_per_text(write: Write, cache: Path, pieces_tok: PreTrainedTokenizerBase) -> None:
    rows = [{"text": "a film", "labels": ["x", "z"]}, {"text": "a day", "labels": []}, {"text": "b", "labels": ["y"]}]
    spec = DataSpec(str(write("a.jsonl", jsonl(*rows))), cache_dir=cache, eval_fraction=0)
    prepared = prepare(spec, pieces_tok, "encoder")
    assert prepared.multi_label
    assert prepared.labels == ["x", "y", "z"]
    assert [row["labels"] for row in prepared.train] == [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0]]


def test_several_labels_when_streaming(write: Write, cache: Path, pieces_tok: PreTrainedTokenizerBase) -> None:
    rows = [{"text": "a film", "labels": ["x", "z"]}, {"text": "b", "labels": ["y"]}]
    path = str(write("a.jsonl", jsonl(*rows)))
    spec = DataSpec(path, cache_dir=cache, eval_fraction=0, streaming=True)
    prepared = prepare(spec, pieces_tok, "encoder")
    assert prepared.multi_label
    assert prepared.train[0]["labels"] == [1.0, 0.0, 1.0]


def test_a_copy_of_a_file_is_named_by_its_own_name(
    write: Write, cache: Path, pieces_tok: PreTrainedTokenizerBase
) -> None:
    for name in ("a.csv", "b.csv"):
        spec = DataSpec(str(write(name, csv_of(REVIEWS))), cache_dir=cache)
        assert prepare(spec, pieces_tok, "encoder").train.origin(0).startswith(name)


def test_evaluation_sets_by_name(write: Write, cache: Path, pieces_tok: PreTrainedTokenizerBase) -> None:
    train = str(write("train.csv", csv_of(REVIEWS)))
    near, far = write("near.csv", csv_of(REVIEWS[:5])), write("far.jsonl", jsonl({"sentence": "a day", "label": "neg"}))
    spec = DataSpec(train, eval_data={"near": str(near), "far": str(far)}, cache_dir=cache)
    prepared = prepare(spec, pieces_tok, "encoder")
    assert {name: len(part) for name, part in prepared.evals.items()} == {"near": 5, "far": 1}
    assert len(prepared.train) == 60
    assert prepared.evals["far"][0]["labels"] == 0  # numbered as in training, though it has one class
    one = prepare(DataSpec(train, eval_data=str(near), cache_dir=cache), pieces_tok, "encoder")
    assert list(one.evals) == ["eval"]
    unknown = write("odd.csv", csv_of([("a", "positive")]))
    with pytest.raises(DataError, match=r"labels that the training data has not: 'positive' \(did you mean 'pos'"):
        prepare(DataSpec(train, eval_data=str(unknown), cache_dir=cache), pieces_tok, "encoder")


def test_a_folder_brings_its_evaluation_set(
    write: Write, cache: Path, tmp_path: Path, pieces_tok: PreTrainedTokenizerBase
) -> None:
    write("set/train.csv", csv_of(REVIEWS))
    write("set/test.csv", csv_of(REVIEWS[:7]))
    prepared = prepare(DataSpec(str(tmp_path / "set"), cache_dir=cache), pieces_tok, "encoder")
    assert (len(prepared.train), len(prepared.evals["eval"])) == (60, 7)


def test_tags(write: Write, cache: Path, pieces_tok: PreTrainedTokenizerBase) -> None:
    sentence = "John\tB-per\nwent\tO\nto\tO\nParis\tB-loc\n\n"
    spec = DataSpec(str(write("a.conll", sentence * 10)), cache_dir=cache)
    prepared = prepare(spec, pieces_tok, "encoder")
    assert prepared.task == "token-classification"
    assert prepared.labels == ["O", "B-loc", "B-per"]
    assert [label for label in prepared.train[0]["labels"] if label != MASKED] == [2, 0, 0, 1]
    assert prepared.train.reference(0) == ["B-per", "O", "O", "B-loc"]


def test_prompts_and_completions(write: Write, cache: Path, bytes_tok: PreTrainedTokenizerBase) -> None:
    rows = [{"mr": f"number {i % 5}", "ref": f"the answer {i}"} for i in range(20)]
    spec = DataSpec(str(write("a.jsonl", jsonl(*rows))), cache_dir=cache, eval_fraction=0)
    prepared = prepare(spec, bytes_tok, "decoder")
    assert prepared.task == "causal-lm"
    assert prepared.labels is None
    assert bytes_tok.decode(prepared.train.prompt_ids(7)) == "number 2\n"
    prompts = prepared.train.prompts()
    assert [i for i, _ in prompts] == [0, 1, 2, 3, 4]
    assert prompts[2][1] == ["the answer 2", "the answer 7", "the answer 12", "the answer 17"]


def test_turns_of_a_rewritten_conversation_stay_on_one_side(write: Write, cache: Path, chat_tok: Make) -> None:
    template = (
        "{% for m in messages %}{{ m['role'] + (':' if loop.last else ';') + m['content'] + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    roles = ("user", "assistant", "user", "assistant")
    rows = [{"messages": [{"role": r, "content": f"{r} {i}"} for r in roles]} for i in range(20)]
    spec = DataSpec(str(write("a.jsonl", jsonl(*rows))), cache_dir=cache)
    with pytest.raises(DataError, match="writes the messages before an answer"):
        prepare(spec, chat_tok(template), "decoder")
    template = template.replace("(':' if loop.last else ';')", "(':' if m['role'] == 'user' or loop.last else ':~')")
    prepared = prepare(spec, chat_tok(template), "decoder")
    sides = [{part.origin(i) for i in range(len(part))} for part in (prepared.train, prepared.evals["eval"])]
    assert not sides[0] & sides[1]
    assert len(prepared.train) == 36
    assert len(prepared.evals["eval"]) == 4
    assert "40 conversations made into one example per answer" in str(prepared.report)


def test_what_is_cut_is_told(write: Write, cache: Path, pieces_tok: PreTrainedTokenizerBase) -> None:
    rows = [("a film", "x"), ("the quick brown fox jumps over the lazy dog", "y")]
    spec = DataSpec(str(write("a.csv", csv_of(rows))), cache_dir=cache, max_length=6, eval_fraction=0)
    prepared = prepare(spec, pieces_tok, "encoder")
    assert prepared.report.truncated == 1
    assert "cut to max_length=6: 1 example, 5 tokens lost at the end (first: a.csv:3)" in str(prepared.report)


def test_lost_characters_are_told(write: Write, cache: Path, words_tok: PreTrainedTokenizerBase) -> None:
    rows = [{"prompt": "the fox", "completion": "over Ω"}, {"prompt": "the X", "completion": "dog"}]
    spec = DataSpec(str(write("a.jsonl", jsonl(*rows))), cache_dir=cache, eval_fraction=0)
    report = str(prepare(spec, words_tok, "decoder").report)
    assert "does not know the characters Ω X, and they are lost in 2 rows (first: a.jsonl:1, a.jsonl:2)" in report


def test_running_text_is_held_out_by_windows(write: Write, cache: Path, bytes_tok: PreTrainedTokenizerBase) -> None:
    text = "the quick brown fox jumps over the lazy dog\n" * 60
    spec = DataSpec(str(write("a.txt", text)), cache_dir=cache, max_length=32, packing=True)
    prepared = prepare(spec, bytes_tok, "decoder")
    assert prepared.format.startswith("plain text")
    assert prepared.train.packing
    held = prepared.evals["eval"]
    assert not held.packing
    assert 0 < len(held) < len(prepared.train)
    learned = sum(label != MASKED for part in (prepared.train, held) for row in part for label in row["labels"])
    assert learned == len(bytes_tok(text.strip())["input_ids"])  # all but the first, and the end


def test_mixtures(write: Write, cache: Path, pieces_tok: PreTrainedTokenizerBase) -> None:
    big = str(write("big.csv", csv_of(REVIEWS)))
    small = str(write("small.jsonl", jsonl(*({"sentence": f"a day {i}", "label": "pos"} for i in range(20)))))
    spec = DataSpec([big, small], cache_dir=cache, weights=[1, 3], eval_fraction=0.1)
    prepared = prepare(spec, pieces_tok, "encoder")
    assert len(prepared.train) == 72
    assert len(prepared.evals["eval"]) == 8
    order = prepared.train.order(0, 0)
    of_small = [prepared.train.origin(int(i)).startswith("small") for i in order]
    assert sum(of_small) == round(0.75 * 72)
    assert len(order) == 72
    assert "75% of an epoch" in str(prepared.report)
    plain = prepare(DataSpec([big, small], cache_dir=cache, eval_fraction=0), pieces_tok, "encoder")
    assert sorted(plain.train.order(0, 0)) == list(range(80))
    with pytest.raises(DataError, match="expected a number above 0 for each"):
        prepare(DataSpec([big, small], cache_dir=cache, weights=[1.0]), pieces_tok, "encoder")


def rows_of(prepared: Prepared) -> list[Any]:
    return [(prepared.train.origin(i), prepared.train[i]) for i in range(len(prepared.train))]


def test_streaming_gives_what_a_store_gives(write: Write, cache: Path, pieces_tok: PreTrainedTokenizerBase) -> None:
    path = str(write("a.csv", csv_of(REVIEWS) + "broken\n"))
    specs = [DataSpec(path, cache_dir=cache, on_bad_row="skip", streaming=s, eval_fraction=0) for s in (False, True)]
    stored, streamed = (prepare(spec, pieces_tok, "encoder") for spec in specs)
    assert rows_of(stored) == rows_of(streamed)
    assert streamed.report.skipped == 1
    assert streamed.labels == stored.labels
    assert json.loads(streamed.report.skipped_files[0].read_text())["line"] == 62
    settings: Any = {"seed": 0, "shuffle": True, "pad_token_id": 0, "task": stored.task, "group_by_length": False}
    first, second = (Batches(p.train, 8, **settings) for p in (stored, streamed))
    assert [b.indices for b in first.epoch(1, 3)] == [b.indices for b in second.epoch(1, 3)]


def test_streaming_sorts_by_estimated_length(write: Write, cache: Path, bytes_tok: PreTrainedTokenizerBase) -> None:
    rows = [{"prompt": "x", "completion": "fox " * (1 + i % 10)} for i in range(40)]
    spec = DataSpec(str(write("a.jsonl", jsonl(*rows))), cache_dir=cache, streaming=True, eval_fraction=0)
    train = prepare(spec, bytes_tok, "decoder").train
    true = np.array([len(train[i]["input_ids"]) for i in range(40)])
    assert np.corrcoef(train.lengths, true)[0, 1] > 0.99


def test_streaming_replaces_rows_with_nothing_to_learn(
    write: Write, cache: Path, bytes_tok: PreTrainedTokenizerBase
) -> None:
    rows = [{"prompt": "fox " * (40 if i == 1 else 1), "completion": f"dog {i}"} for i in range(4)]
    path = str(write("a.jsonl", jsonl(*rows)))
    settings: Any = {"cache_dir": cache, "streaming": True, "max_length": 20, "eval_fraction": 0}
    skipping = prepare(DataSpec(path, on_bad_row="skip", **settings), bytes_tok, "decoder")
    assert skipping.train[1] == skipping.train[2]
    assert skipping.report.skipped == 1
    strict = prepare(DataSpec(path, **settings), bytes_tok, "decoder")
    assert strict.train[0]
    with pytest.raises(DataError, match=r"a\.jsonl:2: expected something to learn within max_length=20"):
        strict.train[1]
    with pytest.raises(DataError, match="packing needs the length of every example"):
        prepare(DataSpec(path, packing=True, **settings), bytes_tok, "decoder")


def test_streaming_cuts_running_text_into_rows(write: Write, cache: Path, bytes_tok: PreTrainedTokenizerBase) -> None:
    text = "the quick brown fox jumps over the lazy dog\n" * 40
    spec = DataSpec(str(write("a.txt", text)), cache_dir=cache, streaming=True, max_length=64, eval_fraction=0)
    train = prepare(spec, bytes_tok, "decoder").train
    assert len(train) > 5
    spelled = "".join(bytes_tok.decode(row["input_ids"]) for row in train)
    assert spelled == text.strip() + "<|endoftext|>"


def test_a_date_in_the_template_is_told(write: Write, cache: Path, chat_tok: Make) -> None:
    template = (
        "{{ strftime_now('%Y') }}{% for m in messages %}{{ m['role'] + m['content'] + '<|im_end|>' }}{% endfor %}"
    )
    template += "{% if add_generation_prompt %}{{ 'assistant' }}{% endif %}"
    spec = DataSpec(str(write("a.jsonl", jsonl({"prompt": "a", "completion": "b"}))), cache_dir=cache, eval_fraction=0)
    assert "writes the date into prompts" in str(prepare(spec, chat_tok(template), "decoder").report)


def test_a_cache_folder_that_cannot_be(write: Write, pieces_tok: PreTrainedTokenizerBase) -> None:
    path = write("a.csv", csv_of(REVIEWS))
    with pytest.raises(DataError, match=r"the cache folder .*a\.csv/x cannot be made: Not a directory"):
        prepare(DataSpec(str(path), cache_dir=path / "x"), pieces_tok, "encoder")


def test_limits(write: Write, cache: Path, pieces_tok: PreTrainedTokenizerBase) -> None:
    path = str(write("a.csv", csv_of(REVIEWS)))
    for spec, words in [
        (DataSpec(path, max_length=65), "more than the 64 tokens that the tokenizer's model takes"),
        (DataSpec(path, max_length=1), "expected 2 or more"),
        (DataSpec(path, eval_fraction=1.0), "eval_fraction is 1.0"),
        (DataSpec([]), "data is empty"),
        (DataSpec(path, packing=True), "packing puts texts"),
        (DataSpec([path, str(write("b.conll", "a\tO\n\nb\tO\n"))]), "fit no known form|cannot learn"),
    ]:
        spec.cache_dir = cache
        with pytest.raises(DataError, match=words):
            prepare(spec, pieces_tok, "encoder")


def test_real_data(shared: Path, cache: Path, pieces_tok: PreTrainedTokenizerBase) -> None:
    data = shared / "data"
    reviews = prepare(DataSpec(f"{data / 'mr_sentence_polarity'}#1000", cache_dir=cache), pieces_tok, "encoder")
    assert reviews.labels == ["neg", "pos"]
    assert "a sample of 1000 of 10662 rows" in str(reviews.report)
    assert len(reviews.evals["eval"]) == 100
    tags = prepare(DataSpec(str(data / "wnut17"), cache_dir=cache), pieces_tok, "encoder")
    assert (len(tags.train), len(tags.evals["eval"]), len(tags.labels or [])) == (3394, 1009, 13)
    assert reviews.report.skipped == tags.report.skipped == 0
