"""Verbalizers: which position is read, which words, what loss; and a classifier made of a template and words."""

from __future__ import annotations

import pytest
import torch

import inlay
from inlay.errors import DataError
from test_template import WORDS, tokenizer
from tiny import tiny


def logits(rows=2, columns=5):
    return torch.randn(rows, columns, len(WORDS), generator=torch.Generator().manual_seed(0))


def ids(*rows):
    table = {w: i for i, w in enumerate(WORDS)}
    return torch.tensor([[table[w] for w in row.split()] for row in rows])


def test_scores_are_mean_logits_of_the_words_at_the_mask():
    verbalizer = inlay.Verbalizer({"positive": ["yes", "a"], "negative": "no"}, tokenizer())
    batch = {"input_ids": ids("[CLS] a [MASK] b [SEP]", "[CLS] a b c [MASK]")}
    output = logits()
    scores = verbalizer.scores(output, batch)
    yes, no, a = (WORDS.index(w) for w in ("yes", "no", "a"))
    expected = [[(output[r, p, yes] + output[r, p, a]) / 2, output[r, p, no]] for r, p in ((0, 2), (1, 4))]
    torch.testing.assert_close(scores, torch.tensor(expected))
    assert verbalizer.labels == ("positive", "negative")
    best = [verbalizer.labels[int(row.argmax())] for row in scores]
    assert verbalizer.predict(output, batch) == best


@pytest.mark.parametrize(
    ("mask", "last"),
    [(None, [4, 4]), ([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], [2, 4]), ([[0, 0, 1, 1, 1], [1] * 5], [4, 4])],
)
def test_a_causal_model_is_read_at_the_last_token(mask, last):
    verbalizer = inlay.Verbalizer({"positive": "yes", "negative": "no"}, tokenizer())
    batch = {"input_ids": ids("a b c d e", "a b c d e")}
    if mask is not None:
        batch["attention_mask"] = torch.tensor(mask)
    assert verbalizer.positions(batch).tolist() == last


def test_losses_over_labels_and_over_the_vocabulary():
    verbalizer = inlay.Verbalizer({"positive": ["yes", "a"], "negative": "no"}, tokenizer())
    batch = {"input_ids": ids("a b c d [MASK]", "a b c d [MASK]")}
    output = logits().requires_grad_()
    scores = verbalizer.scores(output, batch)
    loss = verbalizer.loss(output, batch, ["negative", "positive"])
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(scores, torch.tensor([1, 0])))
    torch.testing.assert_close(loss, verbalizer.loss(output, batch, torch.tensor([1, 0])))
    probability = output[:, 4].softmax(-1)
    yes, no, a = (WORDS.index(w) for w in ("yes", "no", "a"))
    expected = -(probability[0, no].log() + (probability[1, yes] + probability[1, a]).log()) / 2
    got = verbalizer.loss(output, batch, ["negative", "positive"], over="vocabulary")
    torch.testing.assert_close(got, expected)
    got.backward()
    assert output.grad[:, :4].eq(0).all()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"positive": "yes"}, "two classes"),
        ({"positive": "yes", "negative": "yes"}, "both 'positive' and 'negative'"),
        ({"positive": "yes", "negative": "a b"}, r"'a b' is \['a', 'b'\].*one known token"),
        ({"positive": "yes", "negative": "zzz"}, r"\['\[UNK\]'\]"),
        ({"positive": "yes", "negative": []}, "no word"),
    ],
)
def test_words_that_are_no_token_are_refused(words, message):
    with pytest.raises(DataError, match=message):
        inlay.Verbalizer(words, tokenizer())


def test_ids_need_no_tokenizer_and_words_do():
    assert inlay.Verbalizer({"a": 5, "b": [6, 7]}).ids == ((5,), (6, 7))
    with pytest.raises(DataError, match="a tokenizer is needed"):
        inlay.Verbalizer({"a": 5, "b": "no"})


def test_rows_without_one_mask_and_foreign_logits_are_refused():
    verbalizer = inlay.Verbalizer({"positive": "yes", "negative": "no"}, tokenizer())
    with pytest.raises(DataError, match="row 1 has 0 mask tokens"):
        verbalizer.positions({"input_ids": ids("a [MASK]", "a b")})
    with pytest.raises(DataError, match="row 0 has 2 mask tokens"):
        verbalizer.positions({"input_ids": ids("[MASK] [MASK]", "a [MASK]")})
    with pytest.raises(DataError, match="do not have one column for each id"):
        verbalizer.scores(logits(), {"input_ids": ids("a [MASK]", "a [MASK]")})
    with pytest.raises(DataError, match=r"'positiv' is no class.*did you mean 'positive'"):
        verbalizer.numbers(["positiv"])


@pytest.mark.parametrize(("family", "task"), [("bert", "mlm"), ("llama", "causal")])
def test_a_language_model_learns_to_classify(family, task):
    """A frozen random model, a template and two words: the loss falls and every training row is classified rightly."""
    own = tokenizer(specials=family == "bert", side="left" if family == "llama" else "right")
    model = tiny(family, task)
    template = "{prompt:4} {x} {prompt:2}" + (" [MASK]" if family == "bert" else "")
    adapter = inlay.attach(model, inlay.PTuning.from_template(own, template, encoder="mlp"))
    verbalizer = inlay.Verbalizer({"positive": "yes", "negative": "no"}, own)
    rows, labels = [{"x": "a b"}, {"x": "c d e"}, {"x": "f"}, {"x": "g h"}], ["positive", "negative"] * 2
    batch = inlay.fill_template(adapter, own, rows)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.02)
    losses = []
    for _ in range(60):
        losses.append(verbalizer.loss(model(**batch), batch, labels))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.5 * losses[0]
    assert verbalizer.predict(model(**batch), batch) == labels
    # The same rows as ordinary ids, without virtual ones.
    plain = own([inlay.Template(template).render(row).text for row in rows], return_tensors="pt", padding=True)
    plain.pop("token_type_ids", None)
    assert verbalizer.predict(model(**plain), plain) == labels
