"""Folders that appear whole or not at all, and that say themselves whether they still are what was written.

A folder is filled beside its place under a name that nothing reads, every file is fsynced, a manifest with sizes and
hashes is written last, then the folder is renamed. A kill at any point leaves the old folder or the new one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from inlay.errors import CheckpointError, InlayError

MANIFEST = "manifest.json"
ASIDE = ".writing-"  # a folder being filled
TRASH = ".deleting-"  # a folder being removed
REPLACED = ".replaced"  # the former folder of the same name, for the moment between two renames
MOST_JSON_BYTES = 256 * 2**20


def write_folder(target: Path, fill: Callable[[Path], None], *, manifest: bool = True) -> None:
    """Make `target` a folder with what `fill` writes into the empty folder it is given, atomically and durably."""
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f"{ASIDE}{target.name}")
    remove(aside)
    try:
        aside.mkdir()
        fill(aside)
        _sync_all(aside, manifest)
        _put_in_place(aside, target)
    except Exception:
        with contextlib.suppress(OSError):
            remove(aside)
        raise


def _sync_all(folder: Path, manifest: bool) -> None:
    """Wait until the disk has every file, then write the manifest, then wait for the folders' entries."""
    files = {}
    for path in _files(folder):
        sync(path)
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    if manifest:
        write_synced(folder / MANIFEST, json.dumps({"format": 1, "files": files}, indent=1))
    for inner in sorted({path.parent for path in folder.rglob("*")}):
        sync(inner)


def _put_in_place(aside: Path, target: Path) -> None:
    former = target.with_name(target.name + REPLACED)
    if target.exists():
        remove(former)
        os.rename(target, former)
    try:
        os.rename(aside, target)
    except OSError:
        if former.is_dir() and not target.exists():
            os.rename(former, target)
        raise
    sync(target.parent)
    remove(former)


def recover(target: Path) -> Path:
    """`target`, or the folder it was about to replace when the process died between the two renames."""
    former = target.with_name(target.name + REPLACED)
    return former if former.is_dir() and not target.exists() else target


def verify(folder: Path) -> None:
    """Check every file of a folder against its manifest.

    Raises:
        CheckpointError: no manifest, a missing, truncated or altered file.
    """
    manifest = read_json(folder / MANIFEST)
    files = manifest.get("files")
    if not isinstance(files, dict) or not files:
        raise CheckpointError(f"{folder}: {MANIFEST} lists no files")
    for name, entry in files.items():
        path = folder / name
        if not isinstance(entry, dict) or Path(name).is_absolute() or ".." in Path(name).parts:
            raise CheckpointError(f"{folder}: {MANIFEST} has a bad entry {name!r}")
        if path.is_symlink() or not path.is_file():
            raise CheckpointError(f"{folder}: {name} is missing")
        size = path.stat().st_size
        if size != entry.get("bytes"):
            raise CheckpointError(f"{folder}: {name} has {size} bytes, {entry.get('bytes')} were written")
        if sha256(path) != entry.get("sha256"):
            raise CheckpointError(f"{folder}: {name} was altered (its hash differs from the manifest)")


def remove(folder: Path) -> None:
    """Remove a folder so that no half of it is ever seen under its name."""
    if not folder.is_dir():
        return
    if not folder.name.startswith((ASIDE, TRASH)):
        trash = folder.with_name(f"{TRASH}{folder.name}")
        shutil.rmtree(trash, ignore_errors=True)
        os.rename(folder, trash)
        folder = trash
    shutil.rmtree(folder)


def clear_leftovers(parent: Path) -> None:
    """Remove what a killed process was writing or deleting; a replaced folder goes once its successor stands."""
    for path in parent.iterdir() if parent.is_dir() else ():
        succeeded = path.name.endswith(REPLACED) and path.with_name(path.name.removesuffix(REPLACED)).exists()
        if path.name.startswith((ASIDE, TRASH)) or succeeded:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def holds_something(folder: Path) -> bool:
    """Whether a folder holds anything but what a killed process of ours was writing or deleting."""
    return folder.is_dir() and any(not path.name.startswith((ASIDE, TRASH)) for path in folder.iterdir())


def write_synced(path: Path, text: str) -> None:
    """Write a text file and wait until the disk has it."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def replace_text(path: Path, text: str) -> None:
    """Replace a text file as a whole."""
    aside = path.with_name(f"{ASIDE}{path.name}")
    write_synced(aside, text)
    os.replace(aside, path)


def append_text(path: Path, text: str) -> None:
    """Append to a text file: all of `text`, or nothing where the disk fails."""
    with path.open("ab", buffering=0) as file:
        before, rest = file.tell(), memoryview(text.encode())
        try:
            while rest:
                rest = rest[file.write(rest) or 0 :]
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(before)
            raise


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of bounded size, or a CheckpointError that says what is wrong."""
    try:
        size = path.stat().st_size
        if size > MOST_JSON_BYTES:
            raise CheckpointError(f"{path}: {size} bytes are more than any such file has")
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent}: {path.name} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read: {str(error)[:200]}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a {type(value).__name__}, not an object")
    return value


@contextlib.contextmanager
def understood(file: Path, error: type[InlayError]) -> Iterator[None]:
    """Turn what a value of an unexpected kind causes, while a file is made sense of, into an error that names it."""
    try:
        yield
    except InlayError:
        raise
    except (TypeError, KeyError, AttributeError, ValueError, IndexError) as problem:
        raise error(
            f"{file} holds a value of another kind than is written there ({type(problem).__name__}: "
            f"{str(problem)[:200]}). It was changed; take a copy from its source."
        ) from problem


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Wait until the disk has a file or a folder's entries."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
