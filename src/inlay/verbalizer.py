"""Classes as words of the vocabulary: how a language model's prediction becomes a class.

Legend: B rows, T tokens, V vocabulary, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from inlay.errors import DataError, nearest

Where = Literal["mask", "last"]


class Verbalizer:
    """Reads classes off the logits at one position: score of class c = mean logit of its words.

    The position is that of the mask token, or the last token of a row in a causal model, whose logits predict the word
    that follows (PET, Schick and Schütze 2021, arXiv:2001.07676; P-tuning, arXiv:2103.10385).

    Args:
        words: for each class its word or words, each one token. A word is written as it stands in the text: with a
            leading blank where the tokenizer keeps blanks (" great"). Token ids may stand in place of words.
        tokenizer: the model's; not needed where all words are ids.
        mask_id: id of the mask token; by default the tokenizer's.

    Raises:
        DataError: a word is not exactly one token, or belongs to two classes.
    """

    def __init__(
        self,
        words: Mapping[str, str | int | Sequence[str | int]],
        tokenizer: Any = None,
        mask_id: int | None = None,
    ) -> None:
        self.labels = tuple(words)
        self.mask_id = mask_id if mask_id is not None else getattr(tokenizer, "mask_token_id", None)
        self.ids = tuple(self._ids(label, value, tokenizer) for label, value in words.items())
        if len(words) < 2:
            raise DataError(f"a verbalizer needs two classes or more, not {list(words)}.")
        owner: dict[int, str] = {}
        for label, ids in zip(self.labels, self.ids, strict=True):
            for token in ids:
                if owner.setdefault(token, label) != label:
                    raise DataError(
                        f"token {token} stands for both {owner[token]!r} and {label!r}; they need other words."
                    )

    def _ids(self, label: str, value: str | int | Sequence[str | int], tokenizer: Any) -> tuple[int, ...]:
        words = [value] if isinstance(value, str | int) else list(value)
        if not words:
            raise DataError(f"class {label!r} has no word.")
        return tuple(word if isinstance(word, int) else self._one_token(label, word, tokenizer) for word in words)

    def _one_token(self, label: str, word: str, tokenizer: Any) -> int:
        if tokenizer is None:
            raise DataError(f"class {label!r}: a tokenizer is needed to turn {word!r} into an id.")
        ids = tokenizer(word, add_special_tokens=False)["input_ids"]
        unknown = getattr(tokenizer, "unk_token_id", None)
        if len(ids) != 1 or ids[0] == unknown:
            pieces = tokenizer.convert_ids_to_tokens(ids)
            raise DataError(
                f"class {label!r}: {word!r} is {pieces} for this tokenizer, and one position predicts one known token. "
                "Choose another word, or write the blank before it where it belongs to the token."
            )
        return int(ids[0])

    def positions(self, batch: Mapping[str, Any], at: Where | None = None) -> Tensor:
        """The position [B] that is read in each row.

        Args:
            batch: `input_ids` [B, T] as given to the model, and `attention_mask` where there is padding.
            at: "mask" or "last"; by default "mask" where the batch has mask tokens.

        Raises:
            DataError: a row has no mask token, or several.
        """
        ids_BT: Tensor = batch["input_ids"]
        found_BT = ids_BT == self.mask_id if self.mask_id is not None else torch.zeros_like(ids_BT, dtype=torch.bool)
        at = at or ("mask" if bool(found_BT.any()) else "last")
        if at == "mask":
            count_B = found_BT.sum(1)
            if bool((count_B != 1).any()):
                row = int((count_B != 1).nonzero()[0])
                raise DataError(
                    f"row {row} has {int(count_B[row])} mask tokens (id {self.mask_id}); a verbalizer reads exactly "
                    "one. Was the row cut off before it?"
                )
            return found_BT.long().argmax(1)
        mask: Tensor | None = batch.get("attention_mask")
        if mask is None:
            return torch.full((ids_BT.shape[0],), ids_BT.shape[1] - 1, device=ids_BT.device)
        return ids_BT.shape[1] - 1 - mask.ne(0).flip(1).long().argmax(1)

    def scores(self, output: Any, batch: Mapping[str, Any], at: Where | None = None) -> Tensor:
        """The score of each class [B, C]: the mean logit of its words.

        Args:
            output: the model's output or its logits [B, T, V], one column for each of the batch's ids.
            batch: as for `positions`.
            at: as for `positions`.
        """
        logits_BV = self._logits(output, batch, at)
        return torch.stack([logits_BV[:, list(ids)].mean(1) for ids in self.ids], dim=1)

    def loss(
        self,
        output: Any,
        batch: Mapping[str, Any],
        labels: Tensor | Sequence[str],
        at: Where | None = None,
        over: Literal["labels", "vocabulary"] = "labels",
    ) -> Tensor:
        """Cross-entropy of the right classes.

        Args:
            output: as for `scores`.
            batch: as for `positions`.
            labels: the number [B] or the name of each row's class.
            at: as for `positions`.
            over: "labels", a softmax of the scores, as for SuperGLUE; "vocabulary", -log of the probability of the
                class's words among all words, as for LAMA.
        """
        target_B = self.numbers(labels).to(batch["input_ids"].device)
        if over == "labels":
            return F.cross_entropy(self.scores(output, batch, at).float(), target_B)
        log_BV = self._logits(output, batch, at).float().log_softmax(1)
        log_BC = torch.stack([log_BV[:, list(ids)].logsumexp(1) for ids in self.ids], dim=1)
        return -log_BC.gather(1, target_B[:, None]).mean()

    def predict(self, output: Any, batch: Mapping[str, Any], at: Where | None = None) -> list[str]:
        """The name of the class with the highest score, for each row."""
        return [self.labels[i] for i in self.scores(output, batch, at).argmax(1).tolist()]

    def numbers(self, labels: Tensor | Sequence[str]) -> Tensor:
        """Class numbers of class names; numbers stay as they are.

        Raises:
            DataError: a name is no class.
        """
        if isinstance(labels, Tensor):
            return labels
        wrong = [label for label in labels if label not in self.labels]
        if wrong:
            raise DataError(f"{wrong[0]!r} is no class of the verbalizer: {nearest(str(wrong[0]), self.labels)}")
        return torch.tensor([self.labels.index(label) for label in labels])

    def _logits(self, output: Any, batch: Mapping[str, Any], at: Where | None) -> Tensor:
        logits_BTV: Tensor = output if isinstance(output, Tensor) else output.logits
        if logits_BTV.ndim != 3 or logits_BTV.shape[:2] != batch["input_ids"].shape:
            raise DataError(
                f"logits of shape {tuple(logits_BTV.shape)} do not have one column for each id of the batch "
                f"{tuple(batch['input_ids'].shape)}; a verbalizer reads those of a language model."
            )
        rows = torch.arange(logits_BTV.shape[0], device=logits_BTV.device)
        return logits_BTV[rows, self.positions(batch, at).to(logits_BTV.device)]
