"""Training runs of a sweep: settings as ``scanlm train`` takes them, and the record they have.

A record belongs to settings if it agrees with all that they decide. The run id says more (the
precision that "auto" became, the tokenizer's content), which only the machine that trains knows;
so a sweep can be looked at anywhere, and what has finished on a GPU is finished.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from scanlm.baselines import TOKEN_IDS
from scanlm.data import Corpus, default_tokenizer, experiment_name, load_corpus
from scanlm.data.token_files import content_fingerprint
from scanlm.records import RUN_FILE, Run, model_name, plain, run_id
from scanlm.settings import TrainingSettings, resolve_settings
from scanlm.sweeps.plans import State, optional_text, text
from scanlm.trainer import saved_steps
from scanlm.training import command_words, sizes

BY_TOKENS = ("vocab_size", *TOKEN_IDS)  # fields that the tokenizer decides


def training_run(values: dict[str, Any], out: Path | None) -> dict[str, Any]:
    """The fields of a ``SweepRun``.

    Args:
        values: ``model``, perhaps ``preset``, and any setting or ``config.<field>``.
        out: folder of the records; wins over ``root``.

    Raises:
        ScanLMError: settings that ``scanlm train`` would refuse. A corpus that is a path need not
            be there yet.
    """
    model = text(values, "model", "a model (scanlm models lists them)")
    preset = optional_text(values, "preset")
    if out is not None:
        values["root"] = str(out)
    settings = resolve_settings(model, preset, values)
    facts = sizes(settings)
    source = _source(settings.corpus)
    corpus = source.name if source is not None else Path(settings.corpus).name
    experiment = settings.experiment or experiment_name(corpus)
    # what the hash in the run's id is made of is known only when it runs
    prefix = run_id(model_name(model), {}, settings.seed).rpartition("-")[0]
    pattern = Path(settings.root) / experiment / f"{prefix}-"
    wanted = plain(settings.identity() | {"corpus": corpus, "config": facts["config"]})
    wanted["tokenizer"] = settings.tokenizer or (default_tokenizer(source) if source else "gpt2")
    return {
        "words": command_words(settings),
        "label": prefix,
        "root": Path(settings.root),
        "identity": json.dumps([str(pattern), wanted], sort_keys=True),
        "find": partial(_state, settings, source, wanted, pattern),
        "sizes": facts,
    }


def _source(corpus: str) -> Corpus | None:
    """The corpus; ``None`` for a path where there is nothing (yet)."""
    base = corpus.partition("#")[0]
    if "/" in base and not Path(base).expanduser().exists():
        return None
    return load_corpus(corpus)


def _state(
    settings: TrainingSettings, source: Corpus | None, wanted: Mapping[str, Any], pattern: Path
) -> State:
    """Of the record that agrees, the one that is furthest if there are several."""
    found = [
        (run.finished, (saved_steps(run.folder) or [0])[-1], run.folder, run)
        for path in sorted(pattern.parent.glob(f"{pattern.name}*/{RUN_FILE}"))
        if _agrees((run := Run.open(path.parent)).info.get("parameters") or {}, wanted)
        and _same_content(run, source, settings.cache_dir)
    ]
    if not found:
        note = f"no corpus {settings.corpus} here" if source is None else ""
        return State("new", pattern.with_name(f"{pattern.name}…"), note=note)
    finished, step, folder, run = max(found)
    if finished:
        return State("finished", folder, note=f"loss {run.summary['loss']:.4f}")
    if run.status in ("failed", "diverged"):
        return State("failed", folder, step, str(run.info.get("message", run.status)))
    return State("unfinished", folder, step)


def _agrees(recorded: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether a record's parameters are these settings."""
    for name, value in wanted.items():
        if name == "config":
            config = recorded.get(name) or {}
            # fused and plain models of a family have different fields besides the shared ones
            shared = (value.keys() & config.keys()).difference(BY_TOKENS)
            if any(config[field] != value[field] for field in shared):
                return False
        elif name == "precision" and value == "auto":
            continue
        elif name not in recorded or recorded[name] != value:
            return False
    return True


def _same_content(run: Run, source: Corpus | None, cache_dir: str) -> bool:
    """Whether the corpus is still the one that was trained on, as far as can be told here."""
    if source is None or source.offline_key:
        return True
    return run.info["parameters"].get("corpus_fingerprint") == content_fingerprint(
        source, cache_dir
    )
