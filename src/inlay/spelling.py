"""The shortest selectors that name exactly the given modules, and rank mappings to go with them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TypeVar

from inlay.anatomy.base import SEMANTIC, Anatomy
from inlay.errors import SiteError

V = TypeVar("V", int, float)


def spell(found: Anatomy, paths: Iterable[str]) -> tuple[str, ...]:
    """Selectors for these modules and no others: the common end of their paths where it suffices, else whole paths.

    Raises:
        SiteError: a path is no module that pieces can stand at.
    """
    wanted = set(paths)
    chosen: list[str] = []
    for name in sorted({path.rsplit(".", 1)[-1] for path in wanted}):
        own = sorted(p for p in wanted if p.rsplit(".", 1)[-1] == name)
        if name not in SEMANTIC and _leaves(found, name) == set(own):
            chosen.append(name)
        else:
            chosen += [p if p not in SEMANTIC and _leaves(found, p) == {p} else _literal(p) for p in own]
    matched = {s.leave for s in found.select(chosen)} if chosen else set()
    if matched != wanted:
        raise SiteError(f"{sorted(matched ^ wanted)[:5]} cannot be selected one by one in {found.model}.")
    return tuple(chosen)


def _leaves(found: Anatomy, selector: str) -> set[str]:
    return {site.leave for site in found.select(selector)}


def _literal(path: str) -> str:
    """A glob that matches this path alone, even where the path reads like a semantic name or could end another."""
    return f"[{path[0]}]" + "".join(f"[{c}]" if c in "*?[" else c for c in path[1:])


def mapping(values: Mapping[str, V]) -> V | dict[str, V]:
    """One number where all are equal, else the commonest as "default" and the others by path."""
    common = max(sorted(Counter(values.values()).items()), key=lambda item: item[1])[0]
    others = {path: v for path, v in sorted(values.items()) if v != common}
    return {"default": common, **others} if others else common
