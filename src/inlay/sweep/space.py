"""What is varied: axes from `key=a,b,c` words, and the points of a grid or of a random sample of it."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from inlay.errors import ConfigError


@dataclass(frozen=True)
class Point:
    """One run of a sweep: a value, as it was written, for each varied key."""

    values: tuple[tuple[str, str], ...]

    @property
    def words(self) -> list[str]:
        """As words of a command line."""
        return [f"{key}={value}" for key, value in self.values]

    @property
    def name(self) -> str:
        """As a folder name; equal points have equal names."""
        return re.sub(r"[^A-Za-z0-9._=,+-]+", "-", ",".join(self.words))


@dataclass(frozen=True)
class Space:
    """The varied keys with their values, and the words that are the same for every run."""

    axes: tuple[tuple[str, tuple[str, ...]], ...]
    fixed: tuple[str, ...]

    @classmethod
    def of(cls, words: Sequence[str]) -> Space:
        """Words with several values, apart from those with one.

        Raises:
            ConfigError: nothing is varied, or a key or a value stands there twice.
        """
        axes: dict[str, tuple[str, ...]] = {}
        fixed: list[str] = []
        for word in words:
            key, found, text = word.partition("=")
            values = _split(text)
            if word.startswith("-") or not found or len(values) < 2:
                fixed.append(word)
                continue
            if key in axes:
                raise ConfigError(f"{key} is varied twice; give all its values in one word")
            twice = sorted({value for value in values if values.count(value) > 1})
            if twice:
                raise ConfigError(f"'{word}': {', '.join(twice)} stands there twice")
            axes[key] = tuple(values)
        if not axes:
            raise ConfigError("nothing is varied; give a key several values, as in learning_rate=1e-4,2e-4")
        return cls(tuple(axes.items()), tuple(fixed))

    def grid(self) -> list[Point]:
        """Every combination, the last key varying fastest."""
        keys = [key for key, _ in self.axes]
        return [Point(tuple(zip(keys, c, strict=True))) for c in itertools.product(*(v for _, v in self.axes))]

    def sample(self, count: int, seed: int) -> list[Point]:
        """`count` different points of the grid, drawn with a seed, in the order of the grid.

        Raises:
            ConfigError: fewer than one.
        """
        if count < 1:
            raise ConfigError(f"--random {count} runs nothing; give 1 or more")
        points = self.grid()
        if count >= len(points):
            return points
        chosen = sorted(random.Random(seed).sample(range(len(points)), count))
        return [points[i] for i in chosen]


def _split(text: str) -> list[str]:
    """At the commas that stand in no brackets or quotes.

    >>> _split("a,[b,c],d")
    ['a', '[b,c]', 'd']
    """
    parts, depth, quote = [""], 0, ""
    for sign in text:
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "'\"":
            quote = sign
        elif sign in "[{(":
            depth += 1
        elif sign in "]})":
            depth -= 1
        elif sign == "," and depth == 0:
            parts.append("")
            continue
        parts[-1] += sign
    return [part.strip() for part in parts if part.strip()]
