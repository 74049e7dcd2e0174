"""The extra keys and values of one attention for one forward pass, all rows together.

Rows may have different numbers of them: each has as many as the row with most, and those that it lacks get no share of
the attention.

Legend: B batch, G further batch axes, H heads, T queries, K keys, P extra keys, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from inlay.anatomy.base import Heads
from inlay.errors import AttachmentError, SiteError
from inlay.hosts.attend import Inputs, Plan, Recording, serve
from inlay.route import join

ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
"""Those of `torch.nn.functional.scaled_dot_product_attention`, in order."""


class Extras:
    """What the pieces of each group give for the input x of a module.

    Attributes:
        batch: B.
        length: P, of the row with most.
    """

    def __init__(self, module: Any, plan: Plan | Recording, x_BTI: Tensor, heads: Heads) -> None:
        self.module, self.plan, self.x, self.heads = module, plan, x_BTI, heads
        self.batch = x_BTI.shape[0]
        self._made: tuple[Tensor, Tensor, Tensor | None, Tensor | None] | None = None

    @property
    def length(self) -> int:
        """P"""
        return 0 if self._all is None else self._all[0].shape[3]

    @property
    def _all(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None] | None:
        """k and v [B, 1, H, P, D], gates [B, 1, 1, T, P], and which keys a row lacks [B, P]; made when asked for."""
        plan = self.plan
        if isinstance(plan, Recording) or not any(acts.kv for acts in plan.groups):
            return None
        if self._made is None:
            self._made = self._make(plan)
        return self._made

    def _make(self, plan: Plan) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        parts = []
        for acts in plan.groups:
            if plan.padding is not None:
                plan.padding.rows = acts.rows if len(plan.groups) > 1 else None
            x = acts.rows.take(self.x)
            parts.append((x.shape[0], [piece(x) for piece in acts.kv]))
        if plan.padding is not None:
            plan.padding.rows = None
        most = max(sum(k.shape[2] for k, *_ in given) for _, given in parts)
        several = len(parts) > 1
        gated = any(len(entry) > 2 for _, given in parts for entry in given)
        keys, values, gates, lacks = [], [], [], []
        for rows, given in parts:
            count = rows if several else 1
            own = sum(k.shape[2] for k, *_ in given)
            keys.append(self._stack([k for k, *_ in given], self.heads.key_size, count, most))
            values.append(self._stack([v for _, v, *_ in given], self.heads.value_size, count, most))
            if gated:
                gates.append(self._gates(given, rows, most))
            lacks.append((torch.arange(most, device=self.x.device) >= own).expand(count, -1))
        return (
            self._each(join(plan.joins, keys)),
            self._each(join(plan.joins, values)),
            join(plan.joins, gates)[:, None, None] if gated else None,
            join(plan.joins, lacks) if several else None,
        )

    def _stack(self, parts: list[Tensor], size: int, rows: int, most: int) -> Tensor:
        """Keys or values of the pieces of one group in a row, zeros behind them."""
        for part in parts:
            if part.shape[1] != self.heads.kv or part.shape[3] != size:
                raise SiteError(
                    f"{self.module._inlay.path} has {self.heads.kv} key/value heads of size {size}, but a piece gave "
                    f"{part.shape[1]} of size {part.shape[3]}."
                )
        if not parts:
            return self.x.new_zeros(rows, self.heads.kv, most, size)
        count = max(rows, *(p.shape[0] for p in parts))
        whole = torch.cat([p.expand(count, -1, -1, -1) for p in parts], dim=2)
        return F.pad(whole, (0, 0, 0, most - whole.shape[2]))

    def _gates(self, given: list[tuple[Tensor, ...]], rows: int, most: int) -> Tensor:
        """[B, T, P], one where there is no gate."""
        tokens = max((e[2].shape[1] for e in given if len(e) > 2), default=self.x.shape[1])
        found = [
            (e[2] if len(e) > 2 else self.x.new_ones(rows, 1, 1)).expand(rows, tokens, e[0].shape[2]) for e in given
        ]
        whole = torch.cat(found, dim=-1) if found else self.x.new_ones(rows, tokens, 0)
        return F.pad(whole, (0, most - whole.shape[-1]), value=1.0)

    def _each(self, x_BHPD: Tensor) -> Tensor:
        """One for each query head, as [B, 1, H, P, D]."""
        times = self.heads.query // self.heads.kv
        return (x_BHPD if times == 1 else x_BHPD.repeat_interleave(times, 1)).unsqueeze(1)

    def scores(self, q_BGHTD: Tensor) -> Tensor:
        """q kᵀ of the extra keys, [B, G, H, T, P]."""
        made = self._all
        if made is None:
            return q_BGHTD.new_zeros(*q_BGHTD.shape[:-1], 0)
        k, _, gate, _ = made
        if gate is not None and gate.shape[3] not in (1, q_BGHTD.shape[3]):
            raise AttachmentError(
                f"{self.module._inlay.path} has {q_BGHTD.shape[3]} queries for an input of {gate.shape[3]} tokens, so "
                'a gate for each token does not fit. Use a gate of form "mean", or a prefix without gates.'
            )
        scores = q_BGHTD @ k.to(q_BGHTD.dtype).mT
        return scores if gate is None else scores * gate.to(scores.dtype)

    def hidden(self, scores: Tensor) -> Tensor:
        """Scores [B, ..., P] or [B H, ..., P] with -inf at the keys that a row lacks."""
        made = self._all
        if made is None or made[3] is None:
            return scores
        lacks_BP = made[3]
        each, rest = divmod(scores.shape[0], self.batch)
        if rest:
            raise AttachmentError(
                f"{self.module._inlay.path}: the scores {tuple(scores.shape)} do not begin with the {self.batch} rows "
                "of the batch, so rows cannot differ in adapters here. Use one adapter for all rows."
            )
        lacks = lacks_BP.repeat_interleave(each, 0)
        return scores.masked_fill(lacks.reshape(-1, *([1] * (scores.ndim - 2)), lacks.shape[-1]), float("-inf"))

    def outputs(self, shares_BGHTP: Tensor, q_BGHTD: Tensor, scale: float | Tensor | None) -> Tensor | None:
        """What is added to the heads' output [B, G, H, T, D]: shares times values, and the heads' own deltas."""
        out, made = None, self._all
        if made is not None:
            _, v, gate, _ = made
            weighed = shares_BGHTP if gate is None else shares_BGHTP * gate.to(shares_BGHTP.dtype)
            out = weighed @ v.to(weighed.dtype)
        plan = self.plan
        if isinstance(plan, Recording) or not any(acts.heads for acts in plan.groups):
            return out
        if scale is None:
            raise AttachmentError(
                f"{self.module._inlay.path} scales its scores by more than one number, so queries scaled alike are not "
                "to be had for deltas on the heads. Use a prefix, or methods that do not act on heads."
            )
        scaled = q_BGHTD * scale
        parts = []
        for acts in plan.groups:
            q = acts.rows.take(scaled)
            parts.append(sum((head(q) for head in acts.heads), q.new_zeros(*q.shape[:-1], self.heads.value_size)))
        deltas = join(plan.joins, parts)
        return deltas if out is None else out + deltas

    def see_keys(self, k_BGHKD: Tensor, scale: float | Tensor) -> None:
        """Notes the module's own keys, where a recording asks for them."""
        if isinstance(self.plan, Recording):
            self.plan.key = self._own(k_BGHKD) / scale

    def see_values(self, v_BGHKD: Tensor) -> None:
        """Notes the module's own values, where a recording asks for them."""
        if isinstance(self.plan, Recording):
            self.plan.value = self._own(v_BGHKD)

    def _own(self, x_BGHKD: Tensor) -> Tensor:
        """[B, H, K, D] with each key/value head once."""
        x = x_BGHKD[:, 0]
        return x[:, :: max(1, x.shape[1] // self.heads.kv)]

    def attention(self, function: Any, args: Any, kwargs: Any) -> Tensor:
        """torch's own attention function, [B, H, T, D] -> [B, H, T, D], with the extra keys before the others."""
        given = dict(zip(ARGUMENTS, args, strict=False)) | dict(kwargs)
        query, key, value = (given.pop(n) for n in ARGUMENTS[:3])
        if isinstance(self.plan, Recording):
            self.plan.key, self.plan.value = key, value
            result: Tensor = function(query, key, value, **given)
            return result
        if query.ndim != 4 or query.shape[0] != self.batch:
            raise AttachmentError(
                f"{self.module._inlay.path} gives torch's attention function queries of shape {tuple(query.shape)}, "
                f"not [{self.batch}, heads, tokens, size], so extra keys cannot be added. Use methods without prefixes."
            )
        mask, scale = given.pop("attn_mask", None), given.pop("scale", None)
        causal = bool(given.pop("is_causal", False))

        def attend(_: Any, q: Tensor, k: Tensor, v: Tensor, m: Tensor | None, **kw: Any) -> tuple[Tensor, None]:
            out = function(q, k, v, attn_mask=m, scale=kw["scaling"], is_causal=causal and m is None, **given)
            return out.transpose(1, 2), None

        inputs = Inputs(query, key, value, mask, {"scaling": scale, "is_causal": causal})
        return serve(self.module, "sdpa", attend, self.plan, self.x, inputs)[0].transpose(1, 2)


__all__ = ["Extras"]
