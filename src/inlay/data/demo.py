"""The embedded task: which subject area of the standard library does this docstring describe?

The texts are the first paragraphs of the docstrings of the Python installation that runs this code, read with `ast` and
never imported; the classes are ten subject areas. So every machine has a real text classification task, offline.

The task depends on the Python minor version alone: packages that distributions ship apart (tkinter, idlelib, lib2to3,
distutils, ensurepip, turtle) are left out, and a text is held out when its hash is among the smallest, so a patch
release that changes one docstring moves no other one across the split.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import sys
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from inlay.errors import DataError

HELD_OUT = 600
SHORTEST = 20
"""Characters below which a paragraph says too little to be told apart ("See above.")."""

AREAS = {
    "web and networks": (
        "http urllib xmlrpc wsgiref cgi cgitb html _markupbase webbrowser socket socketserver ssl ftplib "
        "telnetlib ipaddress asyncore asynchat uuid selectors"
    ),
    "mail and news": ("email mailbox imaplib poplib smtplib smtpd nntplib mimetypes mailcap quopri netrc uu"),
    "concurrency": (
        "asyncio threading _threading_local multiprocessing concurrent queue sched subprocess signal contextvars"
    ),
    "numbers and time": (
        "_pydecimal decimal fractions statistics random numbers datetime _pydatetime calendar _strptime "
        "zoneinfo secrets hmac hashlib colorsys"
    ),
    "files and archives": (
        "pathlib os shutil tempfile tarfile zipfile gzip bz2 lzma _compression glob fnmatch fileinput filecmp "
        "posixpath ntpath nturl2path genericpath stat io _pyio linecache zipapp dbm shelve sqlite3"
    ),
    "text and data formats": (
        "difflib textwrap string re codecs encodings locale gettext stringprep csv json configparser xml "
        "plistlib tomllib pickle pickletools base64 xdrlib pprint wave aifc sunau chunk"
    ),
    "python code": (
        "ast dis inspect tokenize symtable pyclbr code codeop compileall py_compile opcode importlib pkgutil "
        "runpy modulefinder zipimport imp tabnanny keyword token pydoc rlcompleter copyreg"
    ),
    "testing and debugging": (
        "unittest doctest pdb bdb traceback trace tracemalloc profile cProfile pstats timeit logging warnings "
        "faulthandler"
    ),
    "data structures and types": (
        "collections _collections_abc enum dataclasses typing types abc _py_abc functools operator weakref "
        "_weakrefset contextlib copy heapq bisect graphlib reprlib"
    ),
    "command line and system": (
        "argparse optparse getopt cmd platform sysconfig site _sitebuiltins getpass shlex curses pty tty "
        "pipes crypt venv ctypes _osx_support _aix_support"
    ),
}
"""Subject area -> top-level modules of the standard library."""

_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "__pycache__", "site-packages", "dist-packages"}


@dataclass(frozen=True)
class Docstring:
    """One text of the task: the paragraph, its area, and where it stands (`asyncio/queues.py:42`)."""

    text: str
    label: str
    origin: str


def read_stdlib(root: Path | None = None) -> list[Docstring]:
    """All texts of the task, sorted by hash, each once. Takes about two seconds.

    A paragraph that stands in modules of different areas is left out, because it has no one right label.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    labels: dict[str, set[str]] = {}
    found: dict[str, Docstring] = {}
    for area, modules in AREAS.items():
        for module in modules.split():
            for file in _files(root, module):
                for text, line in _paragraphs(file):
                    origin = f"{file.relative_to(root).as_posix()}:{line}"
                    labels.setdefault(text, set()).add(area)
                    found.setdefault(text, Docstring(text, area, origin))
    unique = [found[text] for text, areas in labels.items() if len(areas) == 1]
    if len(unique) < 2 * HELD_OUT:
        raise DataError(
            f"{root} holds {len(unique)} docstrings, too few for the demo task: this Python is installed without the"
            " sources of its standard library. Give your own data with --data."
        )
    return sorted(unique, key=lambda item: _digest(item.text))


def files(cache_dir: Path) -> tuple[Path, Path]:
    """`(train, held_out)`: the task as two JSONL files with `text`, `label`, `origin`, made once per installation."""
    root = Path(sysconfig.get_paths()["stdlib"])
    code = _digest(Path(__file__).read_text(encoding="utf-8"))
    folder = cache_dir / f"demo-{_digest(sys.version + str(root) + code)[:16]}"
    train, held_out = folder / "train.jsonl", folder / "held_out.jsonl"
    if not (train.is_file() and held_out.is_file()):
        rows = read_stdlib(root)
        folder.mkdir(parents=True, exist_ok=True)
        _write(held_out, rows[:HELD_OUT])
        _write(train, rows[HELD_OUT:])
    return train, held_out


def _files(root: Path, module: str) -> list[Path]:
    if (single := root / f"{module}.py").is_file():
        return [single]
    return sorted(
        path
        for path in (root / module).rglob("*.py")
        if not _SKIPPED_FOLDERS.intersection(path.relative_to(root).parts)
    )


def _paragraphs(file: Path) -> Iterator[tuple[str, int]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the library's own invalid escapes are none of the reader's business
        try:
            tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError) as error:
            raise DataError(f"{file} of this Python installation cannot be parsed: {error}") from error
    for node in _documented(tree.body, tree):
        if docstring := ast.get_docstring(node):
            text = " ".join(docstring.strip().split("\n\n")[0].split())
            if len(text) >= SHORTEST:
                yield text, getattr(node, "lineno", 1)


_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _documented(body: Sequence[ast.stmt], owner: _Documented | None) -> Iterator[_Documented]:
    if owner is not None:
        yield owner
    for node in body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _documented(node.body, node)
        elif isinstance(node, (ast.If, ast.Try)):
            yield from _documented([*node.body, *node.orelse], None)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _write(path: Path, rows: Sequence[Docstring]) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    lines = (json.dumps(vars(row), ensure_ascii=False) + "\n" for row in rows)
    aside.write_text("".join(lines), encoding="utf-8")
    os.replace(aside, path)
