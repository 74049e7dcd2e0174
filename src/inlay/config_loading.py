"""Where the values of a run configuration come from, and how everything wrong with them is told at once.

A YAML file (YAML 1.2: `1e-4` is a number and `no` is a word), then `key=value` words, then flags; later ones win. Each
value remembers its place, so that a complaint names the file and the line.
"""

from __future__ import annotations

import functools
import operator
import os
import pkgutil
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from inlay.complaints import complaints, type_name
from inlay.config import ALIASES, RunConfig, contradictions
from inlay.errors import ConfigError, nearest

Problem = tuple[str, str, str]  # place, key, what is wrong


class Source:
    """The merged values of a configuration and the place that each one came from."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.places: dict[str, str] = {}
        self.problems: list[Problem] = []

    def place(self, key: str) -> str:
        """Where a dotted key, or the nearest key around it, was written."""
        while key not in self.places and "." in key:
            key = key.rpartition(".")[0]
        return self.places.get(key, "")

    def read(self, path: str | os.PathLike[str]) -> None:
        """Take the values of a YAML file."""
        loaded = _yaml(Path(path))
        self._note(loaded, str(path), "")
        self.values.update(_plain(loaded))

    def _note(self, node: Any, path: str, above: str) -> None:
        entries = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, value in entries:
            line = node.lc.data[key][0] + 1 if key in (node.lc.data or {}) else 0
            dotted = f"{above}{key}"
            self.places[dotted] = f"{path}:{line}"
            self._note(value, path, f"{dotted}.")

    def set(self, key: str, value: Any, place: str) -> None:
        """Set one dotted key. A setting below `method` keeps the method's name, a new method drops old settings."""
        *above, last = key.split(".")
        node = self.values
        for part in above:
            inner = node.get(part)
            if part == "method" and isinstance(inner, str):
                inner = {"name": inner}
            node[part] = dict(inner) if isinstance(inner, dict) else {}
            node = node[part]
        node[last] = value
        self.places = {k: v for k, v in self.places.items() if not k.startswith(f"{key}.")}
        self.places[key] = place

    def words(self, words: Sequence[str]) -> None:
        """Take `key=value`, `--key value`, `--key=value`, `--flag` and `--no-flag`; dashes and underscores are one."""
        rest = list(words)
        while rest:
            word = rest.pop(0)
            if not word.startswith("--"):
                key, found, text = word.partition("=")
                if not found:
                    self.problems.append(("command line", word, "is neither a key=value nor a flag"))
                    continue
                self.set(key, _scalar(text), f"'{word}'")
                continue
            flag, found, text = word[2:].partition("=")
            key = flag.replace("-", "_")
            if found or (rest and not rest[0].startswith("--") and not self._is_switch(key)):
                self.set(key, _scalar(text if found else rest.pop(0)), f"--{flag}")
            elif key.startswith("no_") and key not in RunConfig.model_fields:
                self.set(key[3:], False, f"--{flag}")
            else:
                self.set(key, True, f"--{flag}")

    @staticmethod
    def _is_switch(key: str) -> bool:
        key = key.removeprefix("no_")
        field = RunConfig.model_fields.get(key)
        return field is not None and type_name(field.annotation) == "bool"


def load(
    path: str | os.PathLike[str] | None = None,
    words: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
    required: Iterable[str] = ("model", "data"),
) -> RunConfig:
    """Read a run configuration, or raise one ConfigError that lists everything wrong with it.

    Args:
        path: a YAML file.
        words: `key=value` and `--key value` words of a command line, dotted for nested keys.
        flags: values already parsed; None means "not given".
        required: keys that must be present.
    """
    source = Source()
    if path is not None:
        source.read(path)
    given = {key: value for key, value in (flags or {}).items() if value is not None}
    if "method" in given:  # a new method drops old settings, and those among the words are meant for it
        source.set("method", given.pop("method"), "--method")
    source.words(words)
    for key, value in given.items():
        source.set(key, value, f"--{key.replace('_', '-')}")
    return _checked(source, tuple(required))


def _checked(source: Source, required: tuple[str, ...]) -> RunConfig:
    _lenient_lists(source.values)
    problems = list(source.problems)
    wrong: set[str] = set()
    try:
        config = RunConfig.model_validate(source.values)
    except ValidationError as error:
        config = None
        for key, complaint in complaints(error, RunConfig, required, suggestion):
            wrong.add(key.partition(".")[0])
            problems.append((source.place(key), key, complaint))
    sound = {key: value for key, value in source.values.items() if key not in wrong}
    problems += [(source.place(key), key, complaint) for key, complaint in contradictions(sound)]
    if "method" in sound:
        problems += [(source.place(key), key, text) for key, text in method_problems(sound["method"])]
    if problems or config is None:
        raise ConfigError(_told(problems))
    return config


def _lenient_lists(values: dict[str, Any]) -> None:
    """`report_to: wandb` and `columns: a=b,c=d` are what users write for a list of one and for a mapping; classes are
    texts whatever they look like."""
    if isinstance(values.get("report_to"), str):
        values["report_to"] = [part.strip() for part in values["report_to"].split(",")]
    words = values.get("verbalizer")
    if isinstance(words, dict):  # classes are texts; in YAML, 0 and true are not
        values["verbalizer"] = {str(name): word for name, word in words.items()}
    columns = values.get("columns")
    if isinstance(columns, str) and re.fullmatch(r"\s*[^=,]+=[^=,]+(,[^=,]+=[^=,]+)*", columns):
        pairs = (pair.split("=") for pair in columns.split(","))
        values["columns"] = {role.strip(): column.strip() for role, column in pairs}


def suggestion(key: str) -> str:
    """The clause that names the key meant: another tool's name for it, or the closest ones."""
    if key in ALIASES:
        return f"did you mean {ALIASES[key]!r}?"
    return nearest(key, RunConfig.model_fields)


def method_names() -> set[str]:
    """Names of the method files, read from the folder: knowing a plain name does not need torch."""
    import inlay

    folder = [str(Path(inlay.__path__[0]) / "methods")]
    return {module.name.replace("_", "") for module in pkgutil.iter_modules(folder)} - {"base"}


def method_problems(setting: Any) -> list[tuple[str, str]]:
    """What is wrong with `method`. Only settings, and names that no file bears, take the method classes and torch."""
    if isinstance(setting, str) and setting.lower() in method_names():
        return []
    built, problems = _parts(setting)
    if not problems:
        _mixed(built)
    return problems


def build_method(setting: Any) -> Any:
    """The `inlay.Method` that a `method` entry describes: a name, a mapping with `name`, or a list of those (a mix).

    Raises:
        ConfigError: an unknown method, or settings that its own fields refuse.
    """
    built, problems = _parts(setting)
    if problems:
        raise ConfigError("; ".join(f"{key}: {text}" for key, text in problems))
    return _mixed(built)


def _mixed(built: list[Any]) -> Any:
    return functools.reduce(operator.add, built)


def _parts(setting: Any) -> tuple[list[Any], list[tuple[str, str]]]:
    """The methods of an entry, and what is wrong with it by key."""
    from inlay.methods.base import methods

    known = methods()
    entries = setting if isinstance(setting, list) else [setting]
    built: list[Any] = []
    problems = [] if entries else [("method", "an empty list")]
    for index, entry in enumerate(entries):
        above = f"method.{index}" if isinstance(setting, list) else "method"
        settings = dict(entry) if isinstance(entry, dict) else {"name": entry}
        name = str(settings.pop("name", "lora"))
        cls = known.get(name.lower().replace("-", "").replace("_", ""))
        if cls is None:
            problems.append((above, f"unknown method {name!r}; {nearest(name.lower(), known)}"))
            continue
        try:
            built.append(cls(**settings))
        except ValueError as error:
            if not isinstance(error.__context__, ValidationError):
                problems.append((above, str(error)))
                continue
            problems += [
                (f"{above}.{key}" if key else above, f"{text} (a setting of {cls.__name__})")
                for key, text in complaints(error.__context__, cls)
            ]
    return built, problems


def method_of_words(entry: str, key: str) -> Any:
    """The `method` entry that words of a command line describe: `lora`, `lora:rank=64`, `lora:rank=2+prefix`.

    Args:
        entry: the words.
        key: what an error calls them.

    Raises:
        ConfigError: a setting without a value.
    """
    parts: list[str | dict[str, Any]] = []
    for part in entry.split("+"):
        name, *settings = part.split(":")
        values = Source()
        for setting in settings:
            if "=" not in setting:
                raise ConfigError(f"{key}: {entry!r}: a setting is written key=value, as in lora:rank=4")
            values.words([setting])
        parts.append({"name": name, **values.values} if values.values else name)
    return parts[0] if len(parts) == 1 else parts


def method_name(setting: Any) -> str:
    """The lower-case name of a method entry, `a+b` for a mix."""
    entries = setting if isinstance(setting, list) else [setting]
    names = (str(entry.get("name", "lora") if isinstance(entry, dict) else entry) for entry in entries)
    return "+".join(name.lower().replace("-", "").replace("_", "") for name in names)


def dump(config: RunConfig) -> str:
    """The configuration as YAML that `load` reads back equal."""
    from io import StringIO

    from ruamel.yaml import YAML

    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    text = StringIO()
    yaml.dump(config.model_dump(), text)
    return text.getvalue()


def _yaml(path: Path) -> Any:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    try:
        loaded = YAML(typ="rt").load(text)
    except MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        problem = (error.problem or "is not YAML").split("\n")[0]
        raise ConfigError(f"{path}{line}: {problem}") from None
    except YAMLError as error:
        raise ConfigError(f"{path}: is not YAML: {error}") from None
    if not isinstance(loaded, dict):
        what = "is empty" if loaded is None else f"holds a {type(_plain(loaded)).__name__}"
        raise ConfigError(f"{path}: {what}; expected lines of the form `key: value`")
    return loaded


def _scalar(text: str) -> Any:
    """A word of the command line, read as YAML would read it."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        value = YAML(typ="safe", pure=True).load(text)
    except YAMLError:
        return text
    scalar = isinstance(value, (bool, int, float, list, dict)) or (value is None and text in ("null", "~"))
    return value if scalar else text


def _plain(node: Any) -> Any:
    """Builtin types instead of those that ruamel keeps for round trips."""
    if isinstance(node, dict):
        return {str(key): _plain(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_plain(value) for value in node]
    for builtin in (bool, int, float, str):
        if isinstance(node, builtin):
            return builtin(node)
    return node


def _told(problems: list[Problem]) -> str:
    problems = sorted(problems, key=lambda problem: _line(problem[0]))
    lines = [f"{_where(place, key)}: {text}" for place, key, text in problems]
    if len(lines) == 1:
        return lines[0]
    return "\n".join([f"{len(lines)} problems in the run configuration", *("  " + line for line in lines)])


def _where(place: str, key: str) -> str:
    """`run.yaml:3  key`; a word of the command line names its key itself."""
    if place.replace("-", "_").strip("'_").partition("=")[0] == key:
        return place
    return f"{place}  {key}" if place else key


def _line(place: str) -> int:
    """Lines of the file first, in their order; the command line after them."""
    number = place.rpartition(":")[2]
    return int(number) if number.isdigit() else sys.maxsize
