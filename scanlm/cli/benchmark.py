"""``scanlm benchmark``: measurements of speed and memory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from scanlm.cli.usage import Commands
from scanlm.errors import ScanLMError

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Measure speed and memory, and record them.",
)
PARTS = "step, loader, loading, trainer, modes, compiled, chunks, lengths"


@app.callback()
def _benchmark() -> None:
    """Measure speed and memory, and record them."""


@app.command()
def training(
    models: Annotated[
        str | None,
        typer.Option(help="Registry ids with commas between; the first is the main one."),
    ] = None,
    chunk_sizes: Annotated[str | None, typer.Option(help="Of the scan models: 64,32,128.")] = None,
    seq_lens: Annotated[str | None, typer.Option(help="Tokens a sequence: 512,4096,65536.")] = None,
    batch_tokens: Annotated[int | None, typer.Option(help="Tokens a step.")] = None,
    parts: Annotated[str | None, typer.Option(help=f"Some of {PARTS}.")] = None,
    modes: Annotated[
        str | None, typer.Option(help="Of the parts modes and lengths, e.g. sequential,flash.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Timed at most, a measurement.")] = 50,
    seconds: Annotated[float, typer.Option(help="Time for them, about.")] = 15.0,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    compile_: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="Default: on a GPU.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Default: the GPU if there is one.")] = None,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Recompute activations.")
    ] = False,
    num_workers: Annotated[int, typer.Option(help="Processes that load data.")] = 0,
    max_seconds: Annotated[
        float | None, typer.Option(help="Begin nothing that would end later.")
    ] = None,
    root: Annotated[Path, typer.Option(help="Where the record is written.")] = Path("data/runs"),
) -> None:
    """Time optimiser steps of the scan model, GPT-2, GLA and Gated DeltaNet.

    \b
    Example:
      scanlm benchmark training
      scanlm benchmark training --models scanlm_tiny,gpt2_tiny --seq-lens 128,512 --device cpu
    """
    from scanlm.benchmarks.training import TrainingSpeedSettings, benchmark_training

    given: dict[str, Any] = {"steps": steps, "seconds": seconds, "root": str(root)}
    given |= {"batch_tokens": batch_tokens, "dtype": dtype, "compile": compile_, "device": device}
    given |= {"checkpointing": checkpointing, "num_workers": num_workers}
    given["max_seconds"] = max_seconds
    for name, text in (("models", models), ("modes", modes), ("parts", parts)):
        if text is not None:
            given[name] = tuple(filter(None, text.split(",")))
    given |= {"chunk_sizes": _numbers("--chunk-sizes", chunk_sizes)}
    given |= {"seq_lens": _numbers("--seq-lens", seq_lens)}
    try:
        run = benchmark_training(TrainingSpeedSettings(**given), typer.echo)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("what was measured is kept; the same command goes on") from None
    typer.echo(f"run: {run.folder}")


def _numbers(option: str, text: str | None) -> tuple[int, ...] | None:
    """``64,32`` as numbers."""
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.replace("_", "").split(","))
    except ValueError:
        raise ScanLMError(
            f"{option}={text!r}: expected whole numbers with commas between, e.g. 512,1024"
        ) from None
