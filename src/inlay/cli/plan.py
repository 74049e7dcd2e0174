"""`inlay plan`: what every method would cost on a model, from its configuration alone."""

from __future__ import annotations

import typer


def verb(
    model: str = typer.Option(..., "--model", "-m", help="Folder or hub name of the model; only its config is read."),
    method: list[str] = typer.Option(None, "--method", help="lora, lora:rank=64, lora+prefix; all when absent."),
    base: list[str] = typer.Option(None, "--base", help="How weights are stored: fp32, bf16, int8, nf4, nf4-dq."),
    gpu: str = typer.Option(
        None, "--gpu", help="Memory of the device with its unit, as 24GB: what fits, and how much of it."
    ),
    batch: int = typer.Option(8, "--batch", help="Rows of a step."),
    length: int = typer.Option(512, "--length", help="Tokens of a row."),
    target_length: int = typer.Option(None, "--target-length", help="Tokens of an answer (seq2seq)."),
    task: str = typer.Option(None, "--task", help="The task whose head the model has."),
    checkpointing: bool = typer.Option(False, "--checkpointing", help="Compute activations again, do not keep them."),
    optim: str = typer.Option("adamw_torch_fused", "--optim", help="An optimizer of inlay train."),
    device: str = typer.Option("cuda", "--device", help="cuda or cpu."),
    revision: str = typer.Option(None, "--revision", help="Branch, tag or commit on the hub."),
    picture: str = typer.Option(None, "--picture", help="Draw the memory as stacked bars: FILE.png or FILE.svg."),
    json: bool = typer.Option(False, "--json", help="As JSON, for programs."),
) -> None:
    """Say what training would cost: parameters, memory, time, and what fits."""
    from pathlib import Path

    from rich.console import Console

    from inlay.errors import ConfigError
    from inlay.planning.bases import BASES
    from inlay.planning.plan import plan

    if picture is not None and not Path(picture).absolute().parent.is_dir():
        raise ConfigError(f"picture: there is no folder {Path(picture).absolute().parent} to write it to")
    bases = list(base or BASES)
    detail = bases[0] if "bf16" not in bases else "bf16"
    aside = Console(stderr=True)
    with aside.status("planning") as status:
        made = plan(
            model,
            list(method) if method else None,
            bases=bases,
            detail=detail,
            batch=batch,
            length=length,
            target_length=target_length,
            task=task,
            gpu=gpu,
            checkpointing=checkpointing,
            optim=optim,
            device=device,  # type: ignore[arg-type]
            revision=revision,
            told=lambda name, index, count: status.update(f"{index + 1}/{count} {name}"),
        )
    if json:
        import json as json_module

        print(json_module.dumps(made.to_dict(), indent=1))
    else:
        from inlay.planning.table import tables

        console = Console()
        for part in tables(made):
            console.print(part, highlight=False)
    if picture is not None:
        from inlay.planning.picture import picture as draw

        draw(made, picture, detail)
        aside.print(f"picture in {picture}", style="dim", markup=False, highlight=False)
