"""What pydantic complains of, in words that a user can act on: one complaint a key, and the names perhaps meant."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from inlay.errors import nearest


def complaints(
    error: ValidationError,
    model: type[BaseModel],
    required: tuple[str, ...] = (),
    suggest: Callable[[str], str] | None = None,
) -> list[tuple[str, str]]:
    """(key, complaint) for each error, with one complaint for a key where a union gave several.

    Args:
        error: what validation raised.
        model: the class that was validated.
        required: keys that must be given, where not all without a default must.
        suggest: the clause that names what an unknown key may have meant; by default the nearest keys.
    """
    told: dict[str, str] = {}
    # Of the types of a union, the one that took the value apart knows best what is wrong with it.
    for each in sorted(error.errors(include_url=False), key=lambda each: not _nested(each["loc"])):
        name = str(each["loc"][0]) if each["loc"] else ""
        nested = _nested(each["loc"])
        key = ".".join([name, *nested]) if nested and each["type"] == "extra_forbidden" else name
        if key in told:
            continue
        field = model.model_fields.get(name)
        if each["type"] == "extra_forbidden":
            told[key] = f"unknown key; {suggest(name) if suggest else nearest(name, model.model_fields)}"
        elif each["type"] == "missing":
            told[key] = "is required and was not given" if name in required or not required else "is required"
        elif each["type"] in ("greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number"):
            told[key] = f"{each['msg'].replace('Input should be', 'must be')}, got {_shown(each['input'])}"
        elif each["type"] == "value_error":
            told[key] = str(each["ctx"]["error"])
        else:
            expected = type_name(field.annotation) if field is not None else "something else"
            at = f" at {'.'.join(nested)}" if nested else ""
            close = nearest(str(each["input"]), expected.split("|")) if "|" in expected else ""
            choice = f"; {close}" if close.startswith("did") else ""
            told[key] = f"expected {_english(expected)}{at}, got {_shown(each['input'])}{choice}"
    return list(told.items())


def wrong_settings(cls: type[BaseModel], error: ValidationError) -> str:
    """All complaints about the settings of a class as one message."""
    return f"{cls.__name__}: " + "; ".join(f"{key}: {text}" if key else text for key, text in complaints(error, cls))


def type_name(annotation: Any) -> str:
    """A type as a user would say it.

    >>> type_name(int | None)
    'int'
    """
    if annotation is type(None):
        return ""
    parts = get_args(annotation)
    if get_origin(annotation) is Annotated:
        return type_name(parts[0])
    if parts and all(isinstance(part, str | int) for part in parts):
        return "|".join(map(str, parts))
    if parts and getattr(annotation, "__origin__", None) in (list, dict):
        return f"{annotation.__origin__.__name__} of " + "=".join(filter(None, map(type_name, parts)))
    if parts:
        return " or ".join(dict.fromkeys(filter(None, map(type_name, parts))))
    return "" if annotation is Any else str(getattr(annotation, "__name__", annotation))


def _nested(place: tuple[int | str, ...]) -> list[str]:
    return [str(part) for part in place[1:] if not _union_label(part)]


def _union_label(part: Any) -> bool:
    """Whether a part of a place names one of the types of a union, and nothing that the user wrote."""
    return isinstance(part, str) and bool(
        re.fullmatch(r"(str|int|float|bool|none|constrained-\w+)|(list|dict|constrained|function|literal).*\[.*", part)
    )


def _english(expected: str) -> str:
    words = {"str": "text", "int": "a whole number", "float": "a number", "bool": "true or false"}
    if "|" in expected:
        return "one of " + ", ".join(expected.split("|"))
    parts = expected.split(" or ")
    return " or ".join("a mapping" if part.startswith("dict") else words.get(part, part) for part in parts)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
