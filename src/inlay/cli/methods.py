"""`inlay methods`: what can be trained, with equation and source."""

from __future__ import annotations

import re
from typing import Any

import typer


def verb(
    name: str = typer.Argument(None, help="Show one method whole: its equation, settings and BibTeX."),
    json: bool = typer.Option(False, "--json", help="As JSON, for programs."),
) -> None:
    """List every method with its equation and its source."""
    from inlay.errors import MethodError, nearest
    from inlay.methods.base import methods

    known = methods()
    key = (name or "").lower().replace("-", "").replace("_", "")
    if name is not None and key not in known:
        raise MethodError(f"unknown method {name!r}; {nearest(key, known)}")
    chosen = {key: known[key]} if name is not None else known
    if json:
        import json as json_module

        print(json_module.dumps({spec: facts(cls) for spec, cls in chosen.items()}, indent=1, ensure_ascii=False))
    elif name is not None:
        show(key, known[key])
    else:
        list_all(known)


def facts(cls: Any) -> dict[str, Any]:
    """Name, equation, source and default settings of a method."""
    lines = (cls.__doc__ or "").strip().splitlines() or [""]
    equation = re.sub(r"\s*\([^()]*arXiv[^()]*\)", "", lines[0]).strip().removesuffix(".")
    return {
        "name": cls.__name__,
        "equation": equation,
        "source": source(cls.citation),
        "settings": {
            key: repr(field.get_default(call_default_factory=True)) for key, field in cls.model_fields.items()
        },
    }


def source(bibtex: str) -> str:
    """Authors, year and number of the first BibTeX entry: `Hu et al. 2021, arXiv:2106.09685`."""
    entry = " ".join(bibtex.split())
    authors = re.search(r"author\s*=\s*\{(.+?)\}", entry)
    year = re.search(r"year\s*=\s*\{?(\d{4})", entry)
    number = re.search(r"eprint\s*=\s*\{([\d.]+)\}", entry)
    people = [person.strip() for person in authors[1].split(" and ")] if authors else []
    last = people[0].partition(",")[0] if people else ""
    who = f"{last} et al." if len(people) > 2 else " and ".join(p.partition(",")[0] for p in people)
    parts = [f"{who} {year[1] if year else ''}".strip(), f"arXiv:{number[1]}" if number else ""]
    return ", ".join(filter(None, parts))


def list_all(known: dict[str, Any]) -> None:
    """One row a method."""
    from rich.console import Console
    from rich.table import Table

    table = Table("--method", "what is learned", "source", box=None, pad_edge=False, header_style="bold")
    for key, cls in known.items():
        told = facts(cls)
        table.add_row(key, told["equation"], told["source"])
    console = Console()
    console.print(table)
    hint = "A mix: method: [lora, prefix] in a YAML file. One method whole: inlay methods lora"
    console.print(f"\n{hint}", style="dim", markup=False, highlight=False, soft_wrap=True)


def show(key: str, cls: Any) -> None:
    """A method's docstring, settings and BibTeX."""
    import inspect

    from rich.console import Console

    console = Console()
    console.print(f"{cls.__name__}  (--method {key})\n", style="bold", highlight=False)
    console.print(inspect.getdoc(cls) or "", markup=False, highlight=False, soft_wrap=True)
    defaults = [f"  --method.{name} {value}" for name, value in facts(cls)["settings"].items()]
    console.print("\nDefaults", style="bold")
    console.print("\n".join(defaults) or "  it has no settings", markup=False, highlight=False, soft_wrap=True)
    console.print("\nCite", style="bold")
    console.print(inspect.cleandoc(cls.citation), markup=False, highlight=False, soft_wrap=True)
