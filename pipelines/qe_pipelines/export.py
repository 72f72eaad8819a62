"""`qe-dist export`: writes a checkpoint for engines without qe-dist, and says what it loses."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from qe_pipelines.progress import set_up_logging


def export(
    checkpoint: Annotated[Path, typer.Argument(help="a finished checkpoint")],
    output: Annotated[Path, typer.Option(help="a folder that does not exist yet")],
    base_only: Annotated[bool, typer.Option("--base-only", help="the integer weights alone")] = False,
    peft: Annotated[bool, typer.Option("--peft", help="the integer weights, and their repair as a LoRA")] = False,
) -> None:
    """Write CHECKPOINT for other engines: vLLM and transformers without qe-dist.

    OUTPUT is a compressed-tensors checkpoint (pack-quantized W4A16 or W8A16, with 8-bit activations where the recipe
    rounds whole tokens to 8 bits). What does not exist there is lost, and said: routed experts, channels that leave the
    activation grid (dynamic outlier channels, extracted ones), activations of fewer bits. With --peft the repair of a
    recipe without routed experts (qe, qera, lqer, aser, serq) goes along as a LoRA, in OUTPUT/adapter.
    """
    set_up_logging(None)
    from qe_dist.checkpoint.export import CARD, REPORT
    from qe_dist.checkpoint.export import export as write
    from qe_dist.core.errors import ConfigError

    if base_only == peft:
        raise ConfigError("give either --base-only or --peft")
    exported = write(checkpoint, output, peft)
    console = Console(stderr=True)
    for note in exported.notes:
        style = "bold red" if note.startswith("LOST") else "yellow"
        console.print(f"[{style}]{escape(note)}[/]", highlight=False, soft_wrap=True)
    typer.echo(f"{output} is written; {output / CARD} and {output / REPORT} say what it lacks")
