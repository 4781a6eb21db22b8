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
PARTS = "step, trainer, loader, loading, kernels, modes, compiled, chunks, lengths"
DTYPE = "float32, bfloat16 or float16. Default: bfloat16 on a GPU, else float32."


@app.callback()
def _benchmark() -> None:
    """Measure speed and memory, and record them."""


@app.command()
def training(
    models: Annotated[
        str | None,
        typer.Option(
            help="Registry ids with commas between; the first is the main one. Default: a scan "
            "model, GPT-2, GLA and Gated DeltaNet, tiny ones without a GPU."
        ),
    ] = None,
    chunk_sizes: Annotated[
        str | None,
        typer.Option(help="Of the scan models, e.g. 64,32,128. Default: each model's own."),
    ] = None,
    seq_lens: Annotated[
        str | None,
        typer.Option(help="Tokens a sequence, e.g. 512,4096. Default: 512 on a GPU, else 256."),
    ] = None,
    batch_tokens: Annotated[
        int | None, typer.Option(help="Tokens a step. Default: 32768 on a GPU, else 2048.")
    ] = None,
    parts: Annotated[str | None, typer.Option(help=f"Some of {PARTS}. Default: all.")] = None,
    modes: Annotated[
        str | None,
        typer.Option(help="Of the parts modes and lengths, e.g. sequential,flash. Default: all."),
    ] = None,
    steps: Annotated[int, typer.Option(help="Timed at most, a measurement.")] = 50,
    seconds: Annotated[float, typer.Option(help="Time for them, about.")] = 15.0,
    dtype: Annotated[str | None, typer.Option(help=DTYPE)] = None,
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
    from scanlm.benchmark.training import TrainingSpeedSettings, benchmark_training

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


@app.command()
def inference(
    size: Annotated[
        str, typer.Option(help="tiny, original (256 wide, 2 + 2 blocks) or base.")
    ] = "original",
    models: Annotated[
        str, typer.Option(help="Names with commas between.")
    ] = "scanlm,gpt2_graph,gpt2_dynamic",
    device: Annotated[str | None, typer.Option(help="Default: the GPU if there is one.")] = None,
    dtype: Annotated[str | None, typer.Option(help=DTYPE)] = None,
    chunk_size: Annotated[int, typer.Option(help="Of the scan model.")] = 64,
    batch_size: Annotated[int, typer.Option(help="Rows.")] = 1,
    prompt_len: Annotated[int, typer.Option(help="Tokens read first.")] = 100,
    max_new_tokens: Annotated[
        int, typer.Option(help="Tokens timed one by one; 0 for none.")
    ] = 10_000,
    timeline_models: Annotated[
        str | None, typer.Option(help="Which of the models write them. Default: all.")
    ] = None,
    positions: Annotated[
        str | None, typer.Option(help="Also after prompts of these lengths, e.g. 1000,131072.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Tokens timed at each of them.")] = 256,
    seconds: Annotated[float, typer.Option(help="Time for them, about.")] = 20.0,
    batch_sizes: Annotated[str | None, typer.Option(help="Throughput of these, e.g. 1,64.")] = None,
    batch_models: Annotated[
        str | None, typer.Option(help="Which of the models have it measured. Default: all.")
    ] = None,
    chunk_sizes: Annotated[str | None, typer.Option(help="Also with these, e.g. 16,256.")] = None,
    batch_position: Annotated[
        int, typer.Option(help="Where batch and chunk sizes are measured.")
    ] = 1000,
    seed: Annotated[int, typer.Option(help="Of weights and prompts.")] = 42,
    root: Annotated[Path, typer.Option(help="Where the record is written.")] = Path("data/runs"),
    picture: Annotated[
        Path | None, typer.Option(help="Also draw the tokens' times, e.g. inference_speed.png.")
    ] = None,
) -> None:
    """Time a token and memory against position, batch and chunk size.

    Without options it is the original's benchmark: a prompt of 100 tokens, then 10,000 new ones,
    each of them timed. An interrupted run keeps what it measured; the same command goes on.

    \b
    Example:
      scanlm benchmark inference --picture inference_speed.png
      scanlm benchmark inference --size tiny --device cpu --max-new-tokens 500
      scanlm benchmark inference --size base --max-new-tokens 0 --positions 1000,40000,131072
    """
    from scanlm.benchmark.inference import InferenceSettings, benchmark_inference

    given: dict[str, Any] = {"size": size, "device": device, "dtype": dtype, "seed": seed}
    given |= {"chunk_size": chunk_size, "batch_size": batch_size, "prompt_len": prompt_len}
    given |= {"max_new_tokens": max_new_tokens, "steps": steps, "seconds": seconds}
    given |= {"batch_position": batch_position, "root": str(root)}
    given["picture"] = str(picture) if picture is not None else None
    chosen = {"models": models, "timeline_models": timeline_models, "batch_models": batch_models}
    for name, text in chosen.items():
        given[name] = None if text is None else tuple(filter(None, text.split(",")))
    given |= {"positions": _numbers("--positions", positions)}
    given |= {"batch_sizes": _numbers("--batch-sizes", batch_sizes)}
    given |= {"chunk_sizes": _numbers("--chunk-sizes", chunk_sizes)}
    settings = InferenceSettings(**{k: v for k, v in given.items() if v is not None})
    try:
        run = benchmark_inference(settings, typer.echo)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("what was measured is kept; the same command goes on") from None
    typer.echo(f"run: {run.folder}")


@app.command("state-tracking")
def state_tracking(
    preset: Annotated[str, typer.Option(help="paper, original, laptop or smoke.")] = "paper",
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="key=value, as of scanlm curriculum; repeatable."),
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            help="Of the words, e.g. 2,4. Default: 3, or the preset's first if it has no 3, and "
            "its last."
        ),
    ] = None,
    ways: Annotated[
        str | None,
        typer.Option(help="Some of eager, captured, compiled. Default: all on a GPU, else eager."),
    ] = None,
    runs: Annotated[str, typer.Option(help="Runs side by side.")] = "1,2,5",
    steps: Annotated[int, typer.Option(help="Timed at most, of each run.")] = 400,
    seconds: Annotated[float, typer.Option(help="Time for them, about.")] = 3.0,
    device: Annotated[str | None, typer.Option(help="Default: the GPU if there is one.")] = None,
    root: Annotated[Path, typer.Option(help="Where the record is written.")] = Path("data/runs"),
) -> None:
    """Time optimiser steps of state tracking, of one run and of several side by side.

    \b
    Example:
      scanlm benchmark state-tracking
      scanlm benchmark state-tracking --preset smoke --lengths 2,4 --runs 1 --device cpu
    """
    from scanlm.benchmark.state_tracking import StateSpeedSettings, benchmark_state_tracking

    given: dict[str, Any] = {"preset": preset, "changes": tuple(set_ or ()), "root": str(root)}
    given |= {"steps": steps, "seconds": seconds, "device": device}
    given["ways"] = None if ways is None else tuple(filter(None, ways.split(",")))
    numbers = {"lengths": _numbers("--lengths", lengths), "runs": _numbers("--runs", runs)}
    given |= {name: values for name, values in numbers.items() if values is not None}
    try:
        run = benchmark_state_tracking(StateSpeedSettings(**given), typer.echo)
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
