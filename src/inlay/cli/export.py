"""`inlay export`: a trained run in a form that other programs load."""

from __future__ import annotations

import typer

FORMS = ("merged", "peft", "native")


def verb(
    run: str = typer.Argument(..., help="A run folder, or a checkpoint in it."),
    output: str = typer.Argument(None, help="The folder to write; RUN/merged or RUN/peft when absent."),
    to: str = typer.Option("merged", "--to", help="merged: a plain model; peft: PEFT's adapter; native: inlay's own."),
    dtype: str = typer.Option(None, "--dtype", help="merged: bf16, fp16 or fp32; a quantised base needs it."),
    adapter: str = typer.Option(None, "--adapter", help="Another adapter folder than RUN/adapter."),
    cpu: bool = typer.Option(False, "--cpu", help="Stay on the CPU."),
) -> None:
    """Write a run as a model that plain transformers loads, or as an adapter folder of PEFT."""
    from pathlib import Path

    from inlay.errors import ConfigError, nearest

    if to not in FORMS:
        raise ConfigError(f"--to {to}: {nearest(to, FORMS)}")
    if dtype is not None and to != "merged":
        raise ConfigError(f"--dtype is that of a merged model; --to {to} writes the adapter as it was trained")
    target = Path(output) if output else Path(run) / to
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} is there already and not empty; name another folder")

    from inlay.cli import _rows
    from inlay.train.trained import open_trained

    trained = open_trained(run, adapter=adapter, words=["use_cpu=true"] if cpu else [], say=_rows.say(False))
    if to != "merged":
        trained.adapter.save(target, format=to)
        loads = (
            f"PeftModel.from_pretrained(model, {str(target)!r})"
            if to == "peft"
            else f"inlay.load(model, {str(target)!r})"
        )
        print(f"{target}: {trained.title} as an adapter folder. Load it: {loads}")
        return
    from inlay.export import export_merged
    from inlay.folders import write_folder

    def fill(folder: Path) -> None:
        export_merged(trained.model, folder, trained.adapter.name, to=dtype)
        trained.tokenizer.save_pretrained(folder)

    write_folder(target, fill, manifest=False)
    print(
        f"{target}: the model with {trained.title} in its weights, and its tokenizer; compared after loading it again"
    )
    print(f"Load it: {type(trained.model).__name__}.from_pretrained({str(target)!r})")
