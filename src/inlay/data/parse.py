"""Raw rows into records: every field is there, has the right type and is not empty, or the row is an error."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from inlay.data.formats import ANSWERING, REGRESSION, SEQUENCE, Format
from inlay.data.readers import FIRST, LAST
from inlay.data.rows import (
    Chat,
    Document,
    Labelled,
    Prompted,
    Record,
    RowError,
    Spans,
    Tagged,
    get_label,
    get_text,
)
from inlay.errors import nearest

UNANSWERABLE = "unanswerable"
"""What a generating model learns to say where a question has no answer in its context."""

_SHAREGPT = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
_ROLES = ("system", "developer", "user", "assistant", "tool", "function")


def parse(row: Mapping[str, Any], form: Format, *, targets: bool = True) -> Record:
    """The record that `row` holds.

    Args:
        row: column -> value.
        form: which column is what.
        targets: whether what is to be learned must be there; false for prediction.

    Raises:
        RowError: a field is missing, empty or of another type.
    """
    roles = form.roles
    match form.kind:
        case "labelled":
            return _labelled(row, form, targets)
        case "tagged":
            return _tagged(row, roles, targets)
        case "spans":
            return _spans(row, form, targets)
        case "alpaca":
            return _alpaca(row, roles, targets)
        case "chat":
            return _chat(row, roles, targets)
        case "prompted":
            prompt = get_text(row, roles["prompt"])
            system = get_text(row, roles["system"], empty=True) if "system" in roles else ""
            plain = f"{system}\n\n{prompt}" if system else prompt
            return Prompted(prompt, plain, _references(row, roles.get("completion"), targets), system or None)
    return Document(get_text(row, roles["text"]), bool(row.get(FIRST, True)), bool(row.get(LAST, True)))


def alpaca_prompt(instruction: str, given: str, system: str) -> str:
    """The prompt of an instruction for a model without chat template."""
    parts = [system] if system else []
    parts.append(f"### Instruction:\n{instruction}")
    if given:
        parts.append(f"### Input:\n{given}")
    return "\n\n".join([*parts, "### Response:\n"])


def _references(row: Mapping[str, Any], column: str | None, targets: bool) -> list[str]:
    """What should be written; several where the column holds a list, the first is learned."""
    if column is None or (not targets and row.get(column) is None):
        return []
    value = row.get(column)
    if isinstance(value, list) and value:
        return [get_text({column: each}, column) for each in value]
    return [get_text(row, column)]


def _labelled(row: Mapping[str, Any], form: Format, targets: bool) -> Record:
    roles = form.roles
    text = get_text(row, roles["text"])
    pair = get_text(row, roles["text_pair"]) if "text_pair" in roles else None
    label: str | tuple[str, ...] | None = None
    if "label" in roles and (targets or row.get(roles["label"]) is not None):
        column = roles["label"]
        value = row.get(column)
        if isinstance(value, list):
            label = tuple(dict.fromkeys(get_label({column: each}, column) for each in value))
        else:
            label = get_label(row, column)
    if form.task in (SEQUENCE, REGRESSION):
        return Labelled(text, pair, label)
    prompt = text if pair is None else f"{text}\n\n{pair}"
    return Prompted(prompt, prompt, [", ".join([label] if isinstance(label, str) else label)] if label else [])


def _tagged(row: Mapping[str, Any], roles: Mapping[str, str], targets: bool) -> Tagged:
    tokens = _texts(row, roles["tokens"], split=not targets)
    if "tags" not in roles or (not targets and row.get(roles["tags"]) is None):
        return Tagged(tokens, None)
    column = roles["tags"]
    value = _listed(row, column, "a list of tags")
    tags = [get_label({column: tag}, column) for tag in value]
    if len(tags) != len(tokens):
        raise RowError(f"{len(tokens)} tags, one per token; there are {len(tags)}", column=column, value=tags)
    return Tagged(tokens, tags)


def _texts(row: Mapping[str, Any], column: str, split: bool) -> list[str]:
    value = row.get(column)
    if split and isinstance(value, str) and not value.lstrip().startswith("["):
        return get_text(row, column).split()
    return [get_text({column: token}, column) for token in _listed(row, column, "a list of words")]


def _listed(row: Mapping[str, Any], column: str, expected: str) -> list[Any]:
    """The list in `column`; as JSON where the file can hold texts only (CSV)."""
    value = row.get(column)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise RowError(f"{expected}, as JSON", column=column, value=value) from None
    if not isinstance(value, list) or not value:
        raise RowError(expected, column=column, value="missing" if column not in row else value)
    return value


def _spans(row: Mapping[str, Any], form: Format, targets: bool) -> Record:
    roles = form.roles
    question, context = get_text(row, roles["question"]), get_text(row, roles["context"])
    answers: list[str] | None = None
    starts: list[int] = []
    column = roles.get("answers")
    if column is not None and (targets or row.get(column) is not None):
        answers = []
        value = row.get(column)
        if isinstance(value, list):  # [{"text": ..., "answer_start": ...}, ...]
            value = {
                key: [each.get(key) for each in value if isinstance(each, dict)] for key in ("text", "answer_start")
            }
        if not isinstance(value, dict) or not all(isinstance(value.get(k), list) for k in ("text", "answer_start")):
            raise RowError("answers with 'text' and 'answer_start'", column=column, value=row.get(column))
        if len(value["text"]) != len(value["answer_start"]):
            raise RowError("as many 'text' as 'answer_start'", column=column, value=value)
        for text, start in zip(value["text"], value["answer_start"], strict=True):
            if not isinstance(text, str) or not isinstance(start, int) or context[start : start + len(text)] != text:
                raise RowError(f"an answer that stands at character {start} of the context", column=column, value=text)
            answers.append(text)
            starts.append(start)
    if form.task == ANSWERING:
        return Spans(question, context, answers, starts)
    prompt = f"{context}\n\n{question}"
    return Prompted(prompt, prompt, [] if answers is None else answers or [UNANSWERABLE])


def _alpaca(row: Mapping[str, Any], roles: Mapping[str, str], targets: bool) -> Prompted:
    instruction = get_text(row, roles["instruction"])
    given = get_text(row, roles["input"], empty=True) if "input" in roles else ""
    system = get_text(row, roles["system"], empty=True) if "system" in roles else ""
    prompt = f"{instruction}\n\n{given}" if given else instruction
    references = _references(row, roles.get("output"), targets)
    return Prompted(prompt, alpaca_prompt(instruction, given, system), references, system or None)


def _chat(row: Mapping[str, Any], roles: Mapping[str, str], targets: bool) -> Chat:
    column = roles["messages"]
    messages, trained = [], []
    for number, each in enumerate(_listed(row, column, "a list of messages"), 1):
        message, train = _message(each, f"{column}[{number}]")
        messages.append(message)
        trained.append(train)
    if targets and not any(trained):
        raise RowError("a message of the assistant to learn from", column=column, value=[m["role"] for m in messages])
    return Chat(messages, trained, _tools(row, roles.get("tools")))


def _message(given: Any, where: str) -> tuple[dict[str, Any], bool]:
    if not isinstance(given, dict):
        raise RowError("a message with 'role' and 'content'", column=where, value=given)
    message = {key: value for key, value in given.items() if value is not None}
    if "role" not in message and "from" in message:
        sender = message.pop("from")
        if sender not in _SHAREGPT:
            raise RowError(f"a sender ({nearest(str(sender), _SHAREGPT)})", column=where, value=sender)
        message = {"role": _SHAREGPT[sender], "content": message.pop("value", ""), **message}
    role = message.get("role")
    if role not in _ROLES:
        raise RowError(f"a role ({nearest(str(role), _ROLES)})", column=where, value=role)
    train = _trained(message, where)
    content = message.get("content", "")
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else part for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) < len(parts):
            raise RowError("content of text alone", column=where, value=content)
        message["content"] = content = "".join(texts)
    if not isinstance(content, str) or not (content.strip() or message.get("tool_calls")):
        raise RowError("content that is a text and not empty", column=where, value=content)
    if content:
        get_text({where: content}, where, empty=True)
    message.setdefault("content", "")
    return message, train


def _trained(message: dict[str, Any], where: str) -> bool:
    """Takes `train` (or OpenAI's `weight`) out of a message; absent, the assistant's messages are learned."""
    assistant = message["role"] == "assistant"
    flag = message.pop("train", None)
    weight = message.pop("weight", None)
    if flag is None and weight is None:
        return bool(assistant)
    train = flag if flag is not None else weight
    if train not in (True, False):
        raise RowError("train: true or false (or weight: 1 or 0)", column=where, value=train)
    if train and not assistant:
        raise RowError("train: true on messages of the assistant alone", column=where, value=message["role"])
    return bool(train)


def _tools(row: Mapping[str, Any], column: str | None) -> list[dict[str, Any]] | None:
    if column is None or not row.get(column):
        return None
    tools = _listed(row, column, "a list of tools")
    if any(isinstance(tool, str) for tool in tools):  # JSON inside JSON, as some sets keep them
        tools = [_listed({column: f"[{tool}]"}, column, "a tool")[0] for tool in tools]
    if not all(isinstance(tool, dict) for tool in tools):
        raise RowError("a list of tools, each a JSON schema", column=column, value=tools)
    return tools
