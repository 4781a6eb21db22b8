"""The command ``scanlm``: thin, each command calls one function of the library.

Nothing heavy is imported here, so that ``--help`` is quick; commands import what they use.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from scanlm.cli import benchmark
from scanlm.cli.curriculum import curriculum
from scanlm.cli.sweep import sweep
from scanlm.cli.usage import Commands, NamedValues, SeveralSteps
from scanlm.errors import ScanLMError

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

app.add_typer(benchmark.app, name="benchmark")

CORPUS = "embedded, wikitext-2, wikitext-103, a folder or a file; see data/README.md"
CacheDir = Annotated[Path, typer.Option(help="Where token files and tokenizers are kept.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def _version(wanted: bool) -> None:
    if wanted:
        from scanlm import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _scanlm(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    """TransformerScanModel: a GPT-2 whose long-range memory is a Blelloch prefix scan.

    \b
    Example:
      scanlm train scanlm_tiny --corpus embedded
    """
    # what goes wrong with the hub is said once, by the command
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")


@app.command()
def models(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="MODEL", help="Registry ids or YAML files. Default: the registry."),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="config.<field>=value, changed in every model; repeatable."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the models that can be trained: parameters, and what differs from the defaults.

    The defaults are those of the model's family and of training settings.

    \b
    Example:
      scanlm models
      scanlm models gla_170M my_gpt2.yaml --json
      scanlm models gla_170M --set config.tie_word_embeddings=true
    """
    from scanlm.baselines import change_config, list_entries
    from scanlm.cli import tables
    from scanlm.values import parse_assignments

    changes = parse_assignments(set_ or ())
    shown = names or [entry.id for entry in list_entries()]
    rows = tables.model_rows([change_config(name, changes) for name in shown])
    if as_json:
        tables.show_json(rows)
    else:
        tables.show(tables.models_table(rows))


@app.command()
def prepare(
    corpus: Annotated[str, typer.Argument(help=CORPUS)],
    tokenizer: Annotated[
        str | None, typer.Option(help="gpt2, bytes, bpe:<size> or a folder.")
    ] = None,
    cache_dir: CacheDir = Path("data/cache"),
) -> None:
    """Download and tokenise a corpus once, so that later runs need no network.

    \b
    Example:
      scanlm prepare wikitext-103
      scanlm prepare my_texts --tokenizer bpe:8192
    """
    from scanlm.cli import tables
    from scanlm.data import prepare as prepare_corpus

    tables.show(tables.corpus_table(prepare_corpus(corpus, tokenizer, cache_dir)))


@app.command()
def train(
    model: Annotated[str, typer.Argument(help="Registry id (scanlm models), or a YAML file.")],
    corpus: Annotated[str | None, typer.Option(help=CORPUS)] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="gpt2, bytes, bpe:<size> or a folder.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="smoke, embedded, laptop or paper.")] = None,
    exp_name: Annotated[
        str | None, typer.Option(help="Experiment the run belongs to. Default: the corpus.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences an optimiser step.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps.")] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of initial weights, dropout and data order.")
    ] = None,
    wandb: Annotated[
        bool | None,
        typer.Option("--wandb/--no-wandb", help="Weights & Biases; offline without its key."),
    ] = None,
    tensorboard: Annotated[
        bool | None, typer.Option("--tensorboard/--no-tensorboard", help="Write its event files.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="key=value: any setting, or config.<field> of the model; repeatable."
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be trained, and stop.")
    ] = False,
) -> None:
    """Train a model, or continue the run of these settings where it stopped.

    \b
    Example:
      scanlm train scanlm_tiny --corpus embedded
      scanlm train scanlm_base_c64 --preset paper --set config.t1_layers=2 --dry-run
    """
    from scanlm.cli import tables
    from scanlm.settings import resolve_settings
    from scanlm.values import parse_assignments

    options: dict[str, Any] = {"corpus": corpus, "tokenizer": tokenizer, "experiment": exp_name}
    options |= {"batch_size": batch_size, "lr": lr, "steps": steps, "seed": seed}
    options |= {"wandb": wandb, "tensorboard": tensorboard}
    given = {name: value for name, value in options.items() if value is not None}
    assigned = parse_assignments(set_ or ())
    for name in assigned:
        if name.removeprefix("training.") in given:
            raise ScanLMError(f"{name!r} is given twice, once with --set: leave one out")
    settings = resolve_settings(model, preset, given | assigned)
    from scanlm import training

    if dry_run:
        typer.echo(tables.describe_run(training.describe(settings)))
        return
    try:
        training.train(settings)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("the same command goes on from the last checkpoint") from None


@app.command(cls=SeveralSteps)
def evaluate(
    targets: Annotated[
        list[str],
        typer.Argument(metavar="TARGET", help="Runs, checkpoints, folders or names on the hub."),
    ],
    corpus: Annotated[
        list[str] | None,
        typer.Option(help=f"{CORPUS}. Default: what the first target's run names. Repeatable."),
    ] = None,
    split: Annotated[
        str, typer.Option(help="train, validation or test; several with commas between.")
    ] = "test",
    context: Annotated[
        str, typer.Option(help="blocks, sliding or streaming (with carried state).")
    ] = "blocks",
    seq_len: Annotated[
        int | None, typer.Option(help="Tokens a block, window or piece. Default: the run's.")
    ] = None,
    stride: Annotated[
        int | None, typer.Option(help="Of sliding windows. Default: half of seq-len.")
    ] = None,
    steps: Annotated[
        list[str] | None,
        typer.Option(help="Checkpoints of a run: steps, best, latest or all; several are fine."),
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Best first, with distances, and draw the curves.")
    ] = False,
    figure: Annotated[
        Path | None,
        typer.Option(help="PNG, PDF or SVG: loss by position; with several steps, loss by step."),
    ] = None,
    original_positions: Annotated[
        bool,
        typer.Option(
            "--original-positions", help="Skip each chunk's first token, as the original."
        ),
    ] = False,
    chunk_size: Annotated[
        int | None, typer.Option(help="For --original-positions of a model without chunks.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Blocks at a time; changes no result.")] = 16,
    max_tokens: Annotated[int | None, typer.Option(help="Score only the first so many.")] = None,
    device: Annotated[str | None, typer.Option(help="Default: the GPU if there is one.")] = None,
    precision: Annotated[
        str | None, typer.Option(help="fp32, bf16 or fp16. Default: the weights' own.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="config.json of a distributed checkpoint.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Of a model that comes without one.")
    ] = None,
    cache_dir: CacheDir = Path("data/cache"),
    root: Annotated[Path, typer.Option(help="Where the record is written.")] = Path("data/runs"),
    as_json: AsJson = False,
) -> None:
    """Measure loss and perplexity of trained models.

    \b
    Example:
      scanlm evaluate data/runs/embedded/scanlm_tiny-s0-1a2b3c4d --context sliding
      scanlm evaluate RUN --steps 5000 10000 --corpus wikitext-103
      scanlm evaluate RUN --corpus 'wikitext-103#detokenized' --split validation,test
      scanlm evaluate --compare RUN_A RUN_B gpt2 --corpus wikitext-2 --figure curves.png
    """
    from scanlm.cli import comparison, tables
    from scanlm.values import check_picture

    splits = [name.strip() for name in split.split(",")]
    if figure is not None:
        check_picture(figure)
    if (compare or figure is not None) and max(len(splits), len(corpus or ())) > 1:
        raise ScanLMError("a comparison and a figure are of one split of one corpus: give one")
    rows: list[dict[str, Any]] = []
    try:
        comparison.evaluate_all(
            targets,
            corpus or None,
            splits,
            compare,
            rows.append,
            context=context,
            seq_len=seq_len,
            stride=stride,
            steps=steps or None,
            batch_size=batch_size,
            original_positions=original_positions,
            chunk_size=chunk_size,
            device=device,
            precision=precision,
            config=config,
            tokenizer=tokenizer,
            max_tokens=max_tokens,
            cache_dir=cache_dir,
            root=root,
        )
    finally:  # what was scored before an error is shown, too
        if compare:
            rows.sort(key=lambda row: row["loss"])
        if rows and as_json:
            tables.show_json(rows)
        elif rows:
            tables.show(tables.evaluation_table(rows, compare))
            for folder in dict.fromkeys(row["record"] for row in rows):
                typer.echo(f"run: {folder}")
    if compare and figure is None:
        figure = comparison.default_figure(rows, root)
    if figure is not None:
        typer.echo(f"figure: {comparison.draw(rows, figure)}", err=as_json)


@app.command(cls=NamedValues)
def run(
    notebook: Annotated[str, typer.Argument(help="Number, name or path: 01.")],
    preset: Annotated[
        str | None, typer.Option(help="smoke, laptop, paper, or a YAML file of parameters.")
    ] = None,
    parameters: Annotated[
        list[str] | None,
        typer.Option("-p", "--parameter", metavar="NAME VALUE", help="Or NAME=VALUE; repeatable."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Executed notebook. Default: in data/runs/notebooks/.")
    ] = None,
) -> None:
    """Run a notebook with parameters, and keep the executed one.

    \b
    Example:
      scanlm run 01 --preset smoke
      scanlm run 01_scan_visualization -p chunks 16
    """
    from scanlm.batch import run_notebook
    from scanlm.values import parse_assignments

    typer.echo(run_notebook(notebook, preset, parse_assignments(parameters or ()), output))


app.command()(sweep)
app.command()(curriculum)


@app.command()
def figures(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME", help="Default: all that have records.")
    ] = None,
    results: Annotated[Path, typer.Option(help="Exported records.")] = Path("data/results"),
    out: Annotated[Path, typer.Option(help="Folder of the pictures.")] = Path("figures"),
) -> None:
    """Make the committed pictures from exported records.

    \b
    Example:
      scanlm figures
      scanlm figures scan_tree --out /tmp/figures
    """
    from scanlm.plotting.figures import make_figures

    for path in make_figures(results, out, names or None):
        typer.echo(path)


@app.command()
def export(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Folders of runs.")],
    results: Annotated[Path, typer.Option(help="Where to.")] = Path("data/results"),
    unfinished: Annotated[
        bool, typer.Option("--unfinished", help="Also stopped ones, with what they have measured.")
    ] = False,
) -> None:
    """Write finished runs, without weights, to data/results, which is committed.

    \b
    Example:
      scanlm export data/runs/embedded/scanlm_tiny-s0-1a2b3c4d
    """
    from scanlm.records import export as export_run

    for folder in runs:
        typer.echo(export_run(folder, results, unfinished))


@app.command()
def report(
    document: Annotated[
        Path, typer.Argument(help="Markdown with the two markers of results.")
    ] = Path("README.md"),
    results: Annotated[Path, typer.Option(help="Exported records.")] = Path("data/results"),
) -> None:
    """Make the README's headlines and the tables of data/results from exported records.

    \b
    Example:
      scanlm report
    """
    from scanlm.report import update_documents

    changed = update_documents(document, results)
    typer.echo("\n".join(f"{path}: updated" for path in changed) or "up to date")
