"""`inlay generate`: what a trained language model writes for new prompts."""

from __future__ import annotations

import typer


def verb(
    run: str = typer.Argument(..., help="A run folder, or a checkpoint in it."),
    file: str = typer.Argument(None, help="Prompts in any form that train reads; answers may be missing."),
    prompt: list[str] = typer.Option(None, "--prompt", "-p", help="A prompt; again for several."),
    max_new_tokens: int = typer.Option(None, "--max-new-tokens", min=1, help="Longest answer; as in training."),
    num_beams: int = typer.Option(None, "--num-beams", min=1, help="Beams; as in training."),
    sample: bool = typer.Option(False, "--sample", help="Draw tokens at random instead of taking the likeliest."),
    temperature: float = typer.Option(1.0, "--temperature", help="With --sample: below 1 is safer, above is wilder."),
    top_p: float = typer.Option(1.0, "--top-p", help="With --sample: draw from this much probability."),
    seed: int = typer.Option(42, "--seed", help="With --sample: the same seed draws the same."),
    output: str = typer.Option(None, "--output", "-o", help="Write JSON lines to this file."),
    adapter: str = typer.Option(None, "--adapter", help="Another adapter folder than RUN/adapter."),
    cpu: bool = typer.Option(False, "--cpu", help="Stay on the CPU."),
    json: bool = typer.Option(False, "--json", help="Print JSON lines."),
) -> None:
    """Write texts for new prompts."""
    from inlay.cli import _rows

    rows = _rows.given(file, prompt, None, option="--prompt")
    from inlay.train.generate import Decoding
    from inlay.train.session import seed_everything
    from inlay.train.trained import open_trained

    trained = open_trained(run, adapter=adapter, words=["use_cpu=true"] if cpu else [], say=_rows.say(json))
    decoding = Decoding(
        max_new_tokens=max_new_tokens or trained.config.generation_max_new_tokens,
        num_beams=num_beams or trained.config.generation_num_beams,
        sample=sample,
        temperature=temperature,
        top_p=top_p,
    )
    seed_everything(seed)
    _rows.put(trained.generate(rows, decoding), rows, output, as_json=json)
