"""Which of the known forms a file has, by its columns; said in words, and an error where two readings are possible.

| kind | roles |
|---|---|
| labelled | text, label; text_pair for two texts |
| tagged | tokens, tags |
| spans | question, context, answers (as SQuAD has them) |
| prompted | prompt, completion; system |
| alpaca | instruction, output; input, system |
| chat | messages (OpenAI's or ShareGPT's keys); tools |
| document | text |

`--columns role=column` names a column of another name. The task follows from the kind and from the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from inlay.data.readers import FIRST, LAST
from inlay.errors import DataError, nearest

ModelKind = Literal["encoder", "decoder", "encoder-decoder"]

SEQUENCE, REGRESSION, TOKEN = "sequence-classification", "regression", "token-classification"
ANSWERING, CAUSAL, SEQ2SEQ = "question-answering", "causal-lm", "seq2seq"
TASKS = (SEQUENCE, REGRESSION, TOKEN, ANSWERING, CAUSAL, SEQ2SEQ)


@dataclass(frozen=True)
class Kind:
    """A form that rows can have: its roles, and the column names that are taken for them unasked, best first."""

    title: str
    required: tuple[str, ...]
    optional: tuple[str, ...]
    rank: int
    targets: tuple[str, ...]
    """The roles that rows to predict for need not have."""


KINDS = {
    "chat": Kind("conversations", ("messages",), ("tools",), 0, ()),
    "spans": Kind("question answering with spans", ("question", "context", "answers"), (), 1, ("answers",)),
    "alpaca": Kind("instruction and output (alpaca)", ("instruction", "output"), ("input", "system"), 2, ("output",)),
    "tagged": Kind("words and tags", ("tokens", "tags"), (), 2, ("tags",)),
    "labelled": Kind("text and label", ("text", "label"), ("text_pair",), 3, ("label",)),
    "prompted": Kind("prompt and completion", ("prompt", "completion"), ("system",), 3, ("completion",)),
    "document": Kind("plain text", ("text",), (), 4, ()),
}
ROLES = sorted({role for kind in KINDS.values() for role in kind.required + kind.optional})
_ALIASES = {"text_a": "text", "text_b": "text_pair"}
_OPTIONAL = {"tools": ("tools", "functions"), "input": ("input",), "system": ("system", "system_prompt")}

Tier = list[tuple[str, ...]]


def _tier(words: str) -> Tier:
    return [tuple(names.split()) for names in words.split(",")]


# Column names that are taken for roles unasked: per kind, groups of roles, and for each group tiers of names. The first
# tier with a match counts; two matches in one tier are two readings.
_KNOWN: dict[str, list[tuple[tuple[str, ...], list[Tier]]]] = {
    "chat": [(("messages",), [_tier("messages"), _tier("conversations,conversation,chat")])],
    "spans": [
        (("question",), [_tier("question")]),
        (("context",), [_tier("context")]),
        (("answers",), [_tier("answers")]),
    ],
    "alpaca": [(("instruction",), [_tier("instruction")]), (("output",), [_tier("output"), _tier("response")])],
    "tagged": [
        (("tokens",), [_tier("tokens"), _tier("words"), _tier("text,sentence")]),
        (("tags",), [_tier("tags"), _tier("ner_tags,labels,label,pos_tags,chunk_tags,slots,upos")]),
    ],
    "labelled": [
        (
            ("text", "text_pair"),
            [
                _tier(
                    "text text_pair,text_a text_b,text1 text2,sentence1 sentence2,sentence_1 sentence_2,"
                    "premise hypothesis,question passage,question1 question2,question sentence,query document,"
                    "query passage,claim evidence"
                ),
                _tier("text"),
                _tier("sentence,content,review,tweet,comment,utterance,document,body,query,question,title,headline"),
            ],
        ),
        (("label",), [_tier("label"), _tier("labels"), _tier("category,class,intent,sentiment,topic,score,answer")]),
    ],
    "prompted": [
        (
            ("prompt", "completion"),
            [
                _tier("prompt completion"),
                _tier(
                    "prompt response,prompt answer,question answer,query response,query answer,instruction response,"
                    "source target,src tgt,input output,input target,inputs targets,mr ref,article highlights,"
                    "article summary,document summary,dialogue summary,text summary,text target,context response"
                ),
            ],
        )
    ],
    "document": [(("text",), [_tier("text"), _tier("content,document,story")])],
}

TASK_KINDS = {
    SEQUENCE: ("labelled",),
    REGRESSION: ("labelled",),
    TOKEN: ("tagged",),
    ANSWERING: ("spans",),
    CAUSAL: ("chat", "spans", "alpaca", "prompted", "document", "labelled"),
    SEQ2SEQ: ("chat", "spans", "alpaca", "prompted", "labelled"),
}
"""Task -> kinds of rows that it can be learned from. Labels are completions where a task generates."""
_MODEL_TASKS = {
    "encoder": {"labelled": SEQUENCE, "tagged": TOKEN, "spans": ANSWERING},
    "decoder": {"labelled": SEQUENCE, "tagged": TOKEN, **dict.fromkeys(TASK_KINDS[CAUSAL][:5], CAUSAL)},
    "encoder-decoder": {"labelled": SEQUENCE, "tagged": TOKEN, **dict.fromkeys(TASK_KINDS[SEQ2SEQ][:4], SEQ2SEQ)},
}
"""What a model learns from a kind of rows when nothing is said."""
_AN = {"encoder": "an encoder", "decoder": "a decoder", "encoder-decoder": "an encoder-decoder"}
_IMPOSSIBLE = {("encoder", CAUSAL), ("encoder", SEQ2SEQ), ("encoder-decoder", CAUSAL), ("decoder", SEQ2SEQ)}


@dataclass(frozen=True)
class Format:
    """What was found: the kind of rows, which column plays which role, and the task."""

    kind: str
    roles: dict[str, str]
    task: str
    unused: tuple[str, ...] = ()

    def __str__(self) -> str:
        title = KINDS[self.kind].title
        if self.kind == "labelled" and "text_pair" in self.roles:
            title = "text pair and label"
        mapped = ", ".join(f"{role}={column}" for role, column in self.roles.items())
        unused = f"; columns not used: {', '.join(self.unused)}" if self.unused else ""
        return f"{title} ({mapped}) for {self.task}{unused}"

    @property
    def multi_text(self) -> bool:
        """Whether rows are pairs of texts."""
        return "text_pair" in self.roles


def checked_task(task: str | None, model_kind: ModelKind | None = None) -> str | None:
    """`task` as it is named here (`causal_lm` is `causal-lm`).

    Raises:
        DataError: it is unknown, or one that this kind of model cannot do.
    """
    if task is None:
        return None
    name = task.replace("_", "-")
    if name not in TASKS:
        raise DataError(f"task is {task!r}; {nearest(name, TASKS)}")
    if model_kind is not None and (model_kind, name) in _IMPOSSIBLE:
        able = {CAUSAL: "a decoder", SEQ2SEQ: "an encoder-decoder"}[name]
        other = {
            "decoder": f"; a decoder learns it as {CAUSAL}",
            "encoder-decoder": f"; this model learns it as {SEQ2SEQ}",
        }
        raise DataError(f"task {name} needs {able}, and the model is {_AN[model_kind]}{other.get(model_kind, '')}")
    return name


def detect(
    columns: Sequence[str],
    sample: Sequence[Mapping[str, Any]],
    *,
    where: str,
    model_kind: ModelKind | None,
    task: str | None = None,
    mapping: Mapping[str, str] | None = None,
    targets: bool = True,
) -> Format:
    """Find the format of rows.

    Args:
        columns: the columns that there are.
        sample: some rows, to tell lists from texts.
        where: the name of the file, for messages.
        model_kind: what the model is; None when `task` alone decides.
        task: the task, where it is given.
        mapping: role -> column, where it is given.
        targets: whether rows must say what is to be learned; false for prediction.

    Raises:
        DataError: no form fits, more than one does, or a given column does not exist.
    """
    columns = [column for column in columns if column not in (FIRST, LAST)]
    task = checked_task(task, model_kind)
    fixed = _checked_mapping(mapping or {}, columns, where, targets)
    fitting = [
        (kind, roles)
        for kind in KINDS
        for roles in _assignments(kind, columns, sample, fixed, targets)
        if set(fixed) <= set(roles)
    ]
    able = [(kind, roles, found) for kind, roles in fitting if (found := _task_of(kind, task, model_kind))]
    if task in (CAUSAL, SEQ2SEQ) and any(kind != "labelled" for kind, _, _ in able) and "label" not in fixed:
        able = [option for option in able if option[0] != "labelled"]  # a label is a completion only for want of one
    best = min((KINDS[kind].rank for kind, _, _ in able), default=None)
    able = [option for option in able if KINDS[option[0]].rank == best]
    if len(able) == 1:
        kind, roles, found = able[0]
        return Format(kind, roles, found, tuple(c for c in columns if c not in roles.values()))
    listing = ", ".join(map(repr, columns)) or "none"
    if able:
        options = "\n".join(f"  --task {found} --columns {_flag(roles)}" for _, roles, found in able)
        raise DataError(f"{where} can be read in {len(able)} ways; its columns are {listing}. Say which:\n{options}")
    if {"chosen", "rejected"} <= set(columns) and not fixed:
        raise DataError(
            f"{where} holds preference pairs (chosen, rejected), which inlay does not train on;"
            " to learn from the chosen ones: --columns prompt=prompt,completion=chosen"
        )
    if fitting:
        kinds = " or ".join(dict.fromkeys(KINDS[kind].title for kind, _ in fitting))
        what = f"task {task}" if task else f"{_AN[model_kind]}" if model_kind else "no task"
        wanted = _wanted(task, model_kind)
        raise DataError(f"{where} holds {kinds} (columns {listing}), which {what} cannot learn from. {wanted}")
    raise DataError(f"{where} has the columns {listing}, which fit no known form. {_wanted(task, model_kind)}")


def _wanted(task: str | None, model_kind: ModelKind | None) -> str:
    kinds = TASK_KINDS[task] if task else tuple(_MODEL_TASKS[model_kind] if model_kind else KINDS)
    forms = "; ".join(",".join(f"{role}=COLUMN" for role in KINDS[kind].required) for kind in kinds)
    return f"Name the columns with --columns: {forms}"


def _flag(roles: Mapping[str, str]) -> str:
    return ",".join(f"{role}={column}" for role, column in roles.items())


def _task_of(kind: str, task: str | None, model_kind: ModelKind | None) -> str | None:
    if task is not None:
        return task if kind in TASK_KINDS[task] else None
    return _MODEL_TASKS[model_kind].get(kind) if model_kind is not None else None


def _checked_mapping(mapping: Mapping[str, str], columns: Sequence[str], where: str, targets: bool) -> dict[str, str]:
    fixed = {}
    for given, column in mapping.items():
        role = _ALIASES.get(given, given)
        if role not in ROLES:
            raise DataError(f"--columns names the role {given!r}; {nearest(given, ROLES)}")
        if column not in columns:
            if not targets and any(role in kind.targets + kind.optional for kind in KINDS.values()):
                continue
            raise DataError(
                f"--columns says {given}={column}; {where} has no column {column!r} ({nearest(column, columns)})"
            )
        fixed[role] = column
    return fixed


def _assignments(
    kind: str, columns: Sequence[str], sample: Sequence[Mapping[str, Any]], fixed: Mapping[str, str], targets: bool
) -> list[dict[str, str]]:
    """Every way in which the columns can play the roles of a kind."""
    form = KINDS[kind]
    if not set(fixed) <= {*form.required, *form.optional}:
        return []
    free = {column.casefold(): column for column in columns if column not in fixed.values()}
    needed = {role for role in form.required if targets or role not in form.targets} - set(fixed)
    ways: list[dict[str, str]] = [dict(fixed)]
    for roles, tiers in _KNOWN[kind]:
        if needed.intersection(roles):
            absent = set(fixed) | {role for role in roles if role in form.required and role not in needed}
            matches = _matches(roles, tiers, free, absent)
            ways = [way | match for way in ways for match in matches]
    found = []
    for way in ways:
        left = {name: column for name, column in free.items() if column not in way.values()}
        for role in form.optional:
            if column := next((left[name] for name in _OPTIONAL.get(role, ()) if name in left), None):
                way.setdefault(role, column)
        if len(set(way.values())) == len(way) and _shaped(kind, way, sample, targets):
            found.append({role: way[role] for role in form.required + form.optional if role in way})
    return found


def _matches(
    roles: Sequence[str], tiers: Sequence[Tier], free: Mapping[str, str], absent: set[str]
) -> list[dict[str, str]]:
    for tier in tiers:
        matches = []
        for names in tier:
            wanted = {role: name for role, name in zip(roles, names, strict=False) if role not in absent}
            match = {role: free[name] for role, name in wanted.items() if name in free}
            if wanted and len(match) == len(wanted) and match not in matches:
                matches.append(match)
        if matches:
            return matches
    return []


def _shaped(kind: str, roles: Mapping[str, str], sample: Sequence[Mapping[str, Any]], targets: bool) -> bool:
    """Whether the values have the shape that the roles need, by the first row that has one."""

    def first(role: str) -> Any:
        return next((row[roles[role]] for row in sample if row.get(roles.get(role, "")) is not None), None)

    def listed(role: str) -> bool:
        value = first(role)
        return value is None or isinstance(value, list) or (isinstance(value, str) and value.lstrip().startswith("["))

    if kind == "chat":
        return listed("messages")
    if kind == "tagged":
        return not targets or (listed("tokens") and listed("tags"))  # words to tag may come as a text
    if kind == "spans":
        return isinstance(first("answers"), (dict, list, type(None)))
    if kind == "prompted":
        return not isinstance(first("completion"), (dict, bool, int, float))
    if kind == "labelled":
        named_answer = roles.get("label", "").casefold() == "answer"
        return not isinstance(first("text"), list) and (not named_answer or isinstance(first("label"), (bool, int)))
    return True
