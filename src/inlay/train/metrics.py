"""Metrics of every task, through scikit-learn, SciPy, sacrebleu and rouge-score where they have them.

Values are plain floats in [0, 1], except `loss` (nats per target), `perplexity` and `bleu` (0 to 100, as sacrebleu).
"""

from __future__ import annotations

import math
import re
import string
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

LOWER_IS_BETTER = frozenset({"loss", "perplexity", "mse", "mae"})
HIGHER_IS_BETTER = frozenset(
    {"accuracy", "f1", "macro_f1", "mcc", "pearson", "spearman", "precision", "recall", "token_accuracy",
     "exact_match", "bleu", "rouge1", "rouge2", "rougeL"}
)  # fmt: skip
MAIN = {
    "sequence-classification": "accuracy",
    "regression": "spearman",
    "token-classification": "f1",
    "question-answering": "f1",
    "causal-lm": "loss",
    "seq2seq": "loss",
}
_NEEDED_AT_EVALUATION = {
    "sequence-classification": ("loss", "accuracy", "macro_f1", "mcc"),
    "regression": ("loss", "mse", "mae", "pearson", "spearman"),
    "token-classification": ("loss", "accuracy", "precision", "recall", "f1"),
    "question-answering": ("loss", "exact_match", "f1"),
    "causal-lm": ("loss", "perplexity", "token_accuracy"),
    "seq2seq": ("loss", "perplexity", "token_accuracy"),
}


def names(task: str) -> tuple[str, ...]:
    """The metrics that every evaluation of a task reports."""
    return _NEEDED_AT_EVALUATION[task]


def greater_is_better(metric: str) -> bool | None:
    """The direction of a metric; None for one that is not known."""
    if metric in LOWER_IS_BETTER:
        return False
    return True if metric in HIGHER_IS_BETTER else None


def classification(predicted: Sequence[int], gold: Sequence[int]) -> dict[str, float]:
    """Accuracy, macro F1 and Matthews' correlation over single labels."""
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    return {
        "accuracy": float(accuracy_score(gold, predicted)),
        "macro_f1": float(f1_score(gold, predicted, average="macro", zero_division=0.0)),
        "mcc": float(matthews_corrcoef(gold, predicted)),
    }


def multilabel(predicted: Sequence[Sequence[int]], gold: Sequence[Sequence[int]]) -> dict[str, float]:
    """Exact-set accuracy, micro F1 and macro F1 over sets of labels given as 0/1 vectors."""
    from sklearn.metrics import accuracy_score, f1_score

    return {
        "accuracy": float(accuracy_score(gold, predicted)),
        "f1": float(f1_score(gold, predicted, average="micro", zero_division=0.0)),
        "macro_f1": float(f1_score(gold, predicted, average="macro", zero_division=0.0)),
    }


def regression(predicted: Sequence[float], gold: Sequence[float]) -> dict[str, float]:
    """Mean squared and absolute error, Pearson's and Spearman's correlation (0 where one side is constant)."""
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import mean_absolute_error, mean_squared_error

    scores = {
        "mse": float(mean_squared_error(gold, predicted)),
        "mae": float(mean_absolute_error(gold, predicted)),
    }
    varied = len(gold) > 1 and len(set(predicted)) > 1 and len(set(gold)) > 1
    for name, correlation in (("pearson", pearsonr), ("spearman", spearmanr)):
        scores[name] = float(correlation(gold, predicted)[0]) if varied else 0.0
    return scores


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """Entities (type, first, after last) of one BIO, IOB or BIOES tag sequence, as conlleval reads them.

    An I- tag that continues nothing of its type begins an entity.

    >>> sorted(entities(["B-per", "I-per", "O", "I-loc"]))
    [('loc', 3, 4), ('per', 0, 2)]
    """
    found = set()
    kind, start = "", 0
    for index, tag in enumerate([*tags, "O"]):
        prefix, _, name = tag.partition("-") if tag != "O" else ("O", "", "")
        if kind and (prefix in "OBSU" or name != kind):
            found.add((kind, start, index))
            kind = ""
        if prefix != "O" and not kind:
            kind, start = name, index
        if kind and prefix in ("E", "L", "S", "U"):
            found.add((kind, start, index + 1))
            kind = ""
    return found


def tagging(predicted: Sequence[Sequence[str]], gold: Sequence[Sequence[str]]) -> dict[str, float]:
    """Token accuracy and micro precision, recall and F1 over whole entities (type and both borders right)."""
    found = wanted = both = tokens = right = 0
    for guess, truth in zip(predicted, gold, strict=True):
        ours, theirs = entities(guess), entities(truth)
        found, wanted, both = found + len(ours), wanted + len(theirs), both + len(ours & theirs)
        tokens += len(truth)
        right += sum(a == b for a, b in zip(guess, truth, strict=True))
    precision, recall = both / max(found, 1), both / max(wanted, 1)
    return {
        "accuracy": right / max(tokens, 1),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / max(precision + recall, 1e-300),
    }


def language_model(loss: float, right: int, targets: int) -> dict[str, float]:
    """Perplexity (infinite above e^700) and the part of target tokens that are the model's first choice."""
    return {
        "perplexity": math.exp(loss) if loss < 700 else math.inf,
        "token_accuracy": right / max(targets, 1),
    }


def normalized_answer(text: str) -> str:
    """Lower case, without punctuation, articles and repeated blanks (SQuAD's rule)."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def answers(predicted: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """SQuAD's exact match and token F1: the best over each question's references."""
    exact = overlap = 0.0
    for guess, truths in zip(predicted, references, strict=True):
        exact += max((normalized_answer(guess) == normalized_answer(t) for t in truths), default=False)
        overlap += max((_token_f1(guess, t) for t in truths), default=0.0)
    count = max(len(predicted), 1)
    return {"exact_match": exact / count, "f1": overlap / count}


def _token_f1(guess: str, truth: str) -> float:
    ours, theirs = normalized_answer(guess).split(), normalized_answer(truth).split()
    if not ours or not theirs:
        return float(ours == theirs)
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs))


def generation(predicted: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Exact match, corpus BLEU (sacrebleu) and mean ROUGE-1, -2, -L F (rouge-score, best reference)."""
    if not predicted:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # rouge-score imports nltk, which warns of things that do not concern it
        from rouge_score.rouge_scorer import RougeScorer
        from sacrebleu.metrics.bleu import BLEU

        most = max(len(r) for r in references)
        streams: list[Sequence[str]] = [[r[i] if i < len(r) else None for r in references] for i in range(most)]  # type: ignore[misc]
        scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
        rouge = [scorer.score_multi(list(r), p) for p, r in zip(predicted, references, strict=True)]
        bleu = float(BLEU().corpus_score(list(predicted), streams).score)
    exact = sum(p.strip() in {t.strip() for t in r} for p, r in zip(predicted, references, strict=True))
    scores = {name: sum(s[name].fmeasure for s in rouge) / len(rouge) for name in ("rouge1", "rouge2", "rougeL")}
    return {"exact_match": exact / len(predicted), "bleu": bleu, **scores}


def better(metric: str, new: float, old: float | None, threshold: float = 0.0, greater: bool | None = None) -> bool:
    """Whether a value beats the best so far by more than a threshold."""
    if math.isnan(new):
        return False
    if old is None:
        return True
    greater = greater_is_better(metric) if greater is None else greater
    return new > old + threshold if greater else new < old - threshold


def shown(metrics: dict[str, float], only: Iterable[str] | None = None) -> str:
    """Metrics on one line, as `loss 0.412  accuracy 0.871`."""
    chosen: dict[str, Any] = {k: metrics[k] for k in (only or metrics) if k in metrics}
    return "  ".join(f"{name} {value:.4g}" for name, value in chosen.items())
