"""The command line. One file is one verb: its function `verb` is the command, the first line of its docstring the help.

Verb files import only typer at the top, so that `inlay --help` answers at once; what is heavy is imported when a verb
runs. A new verb is a new file here and nothing else.
"""

from __future__ import annotations

import importlib
import logging
import os
import pkgutil
import signal
import sys
from types import FrameType
from typing import TYPE_CHECKING

from inlay.errors import InlayError

if TYPE_CHECKING:
    import typer

VERB_ORDER = ("demo", "plan", "train", "eval", "predict", "generate", "export", "data", "inspect", "methods")
"""Verbs in the order in which a user meets them; others follow by name."""
INSTALL = "the command line needs more than the library, pip install 'inlay[train]'"


def main() -> None:
    """Run the command line; an `InlayError` becomes one message on stderr and its exit code, a signal 128 + itself."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, _ended)
    # Optional libraries that accelerate imports tell of kernels for other machines; that concerns nobody here.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        # A single verb is imported alone where the first word names one.
        build(sys.argv[1] if len(sys.argv) > 1 else None)()
    except ModuleNotFoundError as error:
        if os.environ.get("INLAY_DEBUG") or (error.name or "").startswith("inlay"):
            raise
        print(f"config error: the package of {error.name!r} is not installed: {INSTALL}", file=sys.stderr)
        raise SystemExit(2) from None
    except InlayError as error:
        if os.environ.get("INLAY_DEBUG"):
            raise
        sys.stdout.flush()
        print(f"{label(error)}: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None


def _ended(signum: int, frame: FrameType | None) -> None:
    """Before a run takes signals over, and for verbs that write nothing: end, without a traceback."""
    raise SystemExit(128 + signum)


def label(error: InlayError) -> str:
    """What a message begins with: `config error`, `data error`, ... or `stopped` for a signal."""
    name = type(error).__name__
    return "stopped" if name == "Interrupted" else f"{name.removesuffix('Error').lower()} error"


def verbs() -> list[str]:
    """Names of all verb files."""
    found = {module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")}
    return [v for v in VERB_ORDER if v in found] + sorted(found.difference(VERB_ORDER))


def build(only: str | None = None) -> typer.Typer:
    """The typer application, with every verb or, where `only` names one, with that one."""
    import typer

    app = typer.Typer(
        name="inlay",
        help="Set small trainable pieces into a frozen pretrained model: train them, keep them, use them.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        context_settings={"help_option_names": ["-h", "--help"]},
        epilog="Start with [bold]inlay demo[/]: it needs neither data nor a network.",
    )

    def version(wanted: bool) -> None:
        if wanted:
            from inlay._version import __version__

            print(f"inlay {__version__}")
            raise typer.Exit

    @app.callback()
    def root(
        version: bool = typer.Option(False, "--version", callback=version, is_eager=True, help="Print the version."),
    ) -> None:
        del version

    known = verbs()
    for name in [only] if only in known else known:
        module = importlib.import_module(f"inlay.cli.{name}")
        app.command(name.replace("_", "-"), **getattr(module, "SETTINGS", {}))(module.verb)
    return app
