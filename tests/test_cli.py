"""Every command: what it passes on, what it prints, and mistakes in one line without traceback."""

import dataclasses
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml
from typer.testing import CliRunner, Result

import scanlm
from scanlm import baselines
from scanlm.benchmark.inference import InferenceSettings
from scanlm.benchmark.state_tracking import StateSpeedSettings
from scanlm.benchmark.training import TrainingSpeedSettings
from scanlm.cli import app
from scanlm.errors import ScanLMError

HEAVY = ["torch", "transformers", "matplotlib", "datasets", "papermill", "pandas", "fla"]
SMALL = ["n_embd=8", "n_head=2", "chunk_size=4", "t2_layers=1", "n_positions=64"]
RECORD = {"run_id": "r", "experiment": "e", "model": "m", "seed": 0, "status": "finished"}
QUICK = ["seq_len=8", "batch_size=2", "steps=4", "save_every=2", "eval_every=2", "log_every=2"]


def scan(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in arguments], prog_name="scanlm")


def fine(*arguments: object) -> str:
    result = scan(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*arguments: object, code: int = 1) -> str:
    """The one line that a mistake ends with."""
    result = scan(*arguments)
    assert result.exit_code == code, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stderr.count("\n") == 1, result.stderr
    return result.stderr


def train_arguments(
    model: str, corpus: Path, root: Path, quick: list[str] | None = None
) -> list[str]:
    fields = [f"config.{field}" for field in SMALL] if model == "scanlm_tiny" else []
    fields += ["config.n_embd=8", "config.n_head=2"] if model == "gpt2_tiny" else []
    options = [*fields, *(quick or QUICK), f"root={root / 'runs'}", f"cache_dir={root / 'cache'}"]
    sets = [word for option in options for word in ("--set", option)]
    return ["train", model, "--corpus", str(corpus), "--tokenizer", "bytes", *sets]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for split, number in (("train", 40), ("validation", 4), ("test", 4)):
        (folder / f"{split}.txt").write_text("the scan folds chunks into states\n" * number)
    return folder


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two models trained by the command, and where everything is."""
    root = tmp_path_factory.mktemp("trained")
    runs = {}
    for model in ("scanlm_tiny", "gpt2_tiny"):
        printed = fine(*train_arguments(model, corpus, root))
        runs[model] = Path(printed.rpartition("run: ")[2].strip())
    return {"runs": runs, "root": root / "runs", "cache": root / "cache", "corpus": corpus}


def evaluate_arguments(trained: dict[str, Any], *targets: object) -> list[object]:
    options = ["--corpus", trained["corpus"], "--cache-dir", trained["cache"]]
    return ["evaluate", *targets, *options, "--root", trained["root"]]


# Help


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "fla.py").touch()  # were it absent, an import of it would go unseen
    code = (
        "import sys\nfrom scanlm.cli import app\n"
        f"try: app({arguments!r})\nexcept SystemExit as end: assert not end.code\n"
        f"print('loaded:', [name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.endswith("loaded: []\n"), done.stdout + done.stderr


def leaves(command: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The commands below a group, by the words that call them."""
    below = getattr(command, "commands", {}).items()
    found = [leaf for name, child in below for leaf in leaves(child, (*path, name))]
    return found or [path]


COMMANDS = leaves(typer.main.get_command(app))


def test_help_lists_every_command() -> None:
    lines = fine("--help").partition("Commands:")[2].splitlines()
    assert {line.split()[0] for line in lines if line.strip()} == {path[0] for path in COMMANDS}
    promised = "models prepare train evaluate run sweep figures export curriculum"
    assert {path[0] for path in COMMANDS} >= set(promised.split())


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_command_shows_an_example(path: tuple[str, ...]) -> None:
    text, words = fine(*path, "--help"), " ".join(["scanlm", *path])
    assert f"Usage: {words} " in text
    assert f"{words} " in text.partition("Example:")[2].replace("\n", " ")


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("training", TrainingSpeedSettings),
        ("inference", InferenceSettings),
        ("state-tracking", StateSpeedSettings),
    ],
)
def test_defaults_in_the_help_of_a_benchmark_are_the_librarys(name: str, settings: Any) -> None:
    group: Any = typer.main.get_command(app)
    options = group.commands["benchmark"].commands[name].params
    usual = {field.name: field.default for field in dataclasses.fields(settings)}
    shown = {o.name: str(o.default) for o in options if o.default is not None and o.name in usual}
    assert {"steps", "seconds", "root"} <= set(shown)
    for option, default in shown.items():
        value = usual[option]
        assert default == (",".join(map(str, value)) if isinstance(value, tuple) else str(value))
    for option in options:  # a number is a default or, after e.g., an example
        assert not re.search(r": \d|; default", option.help.replace("Default: ", ""))


def test_the_version_is_the_packages() -> None:
    assert fine("--version").strip() == scanlm.__version__


def test_the_module_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "scanlm", "train", "scanlm_tny"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("scanlm: unknown model 'scanlm_tny'. Did you mean 'scanlm_tiny'?")
    assert done.stderr.count("\n") == 1


# Wrong usage


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "Did you mean 'train'?; see scanlm --help"),
        (["train"], "scanlm train: Missing argument"),
        (["train", "x", "--lrr", "1"], "--lrr"),
        (["train", "x", "--lr", "fast"], "Invalid value for '--lr': 'fast'"),
        (["train", "x", "--steps", "1.5"], "Invalid value for '--steps': '1.5'"),
        (["sweep", "x.yaml", "--jobs", "0"], "Invalid value for '--jobs': '0': "),
        (["--nonsense"], "; see scanlm --help"),
        (["evaluate"], "scanlm evaluate: Missing argument"),
        (["run", "01", "-p"], "-p"),
        (["run", "01", "-p", "chunks", "--preset", "smoke"], "'chunks' has no value before --pres"),
        (["curriculum", "--presett", "smoke"], "; see scanlm curriculum --help"),
        (["curriculum", "--seeds"], "; see scanlm curriculum --help"),
        (["benchmark", "training", "--steps"], "; see scanlm benchmark training --help"),
    ],
)
def test_wrong_usage_is_one_line(arguments: list[str], message: str) -> None:
    assert message in refused(*arguments, code=2)


def test_no_command_shows_the_help() -> None:
    result = scan()
    assert result.exit_code == 2
    assert "Commands:" in result.stderr


# Models


def test_models_lists_parameters_and_what_differs() -> None:
    rows = {row["id"]: row for row in json.loads(fine("models", "--json"))}
    assert rows["gpt2_small_wikitext103_drop01"]["parameters"] == 124_439_808
    # beta2 is in the entry too, and is the default
    own = {"lr": 1e-4, "steps": 30518}
    assert rows["gpt2_small_wikitext103_drop01"]["differs"] == own
    assert rows["gpt2_small_wikitext103_nodrop"]["differs"] == {"dropout": 0.0, **own}
    assert rows["scanlm_tiny"]["family"] == "scanlm"
    # all that tells two models of a family apart is there
    told = [(row["family"], str(row["differs"])) for row in rows.values()]
    assert len(set(told)) == len(told)
    table = fine("models")
    line = next(line for line in table.splitlines() if "gpt2_small_wikitext103_drop01" in line)
    assert "gpt2 " in line
    assert "124,439,808   lr=0.0001 steps=30518" in line
    assert "124,439,808   dropout=0.0 lr=0.0001 steps=30518" in table
    assert all(f" {name} " in table for name in rows)


@pytest.mark.parametrize(
    ("model", "sets", "millions"),
    [
        ("gla_170M", ["tie_word_embeddings=true"], 123.78),
        ("gla_170M", ["expand_k=1"], 169.53),
        ("gated_deltanet_250M", ["tie_word_embeddings=true"], 208.90),
        ("gated_deltanet_170M_baseline", ["tie_word_embeddings=false"], 169.45),
        ("gated_deltanet_170M_baseline", ["tie_word_embeddings=false", "head_dim=256"], 275.62),
    ],
)
def test_models_counts_the_parameters_of_variants(
    model: str, sets: list[str], millions: float
) -> None:
    options = [word for field in sets for word in ("--set", f"config.{field}")]
    (row,) = json.loads(fine("models", model, *options, "--json"))
    assert (row["id"], round(row["parameters"] / 1e6, 2)) == (model, millions)
    assert f" {row['parameters']:,} " in fine("models", model, *options)


def test_models_shows_those_that_are_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("id: mine\nfamily: gpt2\nconfig: {n_layer: 1, n_embd: 8, n_head: 2}\n")
    sets = ["--set", "config.n_positions=64", "--set", "config.n_layer=12"]  # GPT-2 has 12
    rows = json.loads(fine("models", path, "gpt2_small_untied", *sets, "--json"))
    assert [row["id"] for row in rows] == ["mine", "gpt2_small_untied"]
    assert rows[0]["differs"] == {"n_embd": 8, "n_head": 2, "n_positions": 64}
    untied = {"tie_word_embeddings": False, "n_positions": 64, "dropout": 0.0}
    assert rows[1]["differs"] == untied
    table = fine("models", "gpt2_small_untied", *sets)
    assert " tie_word_embeddings=false n_positions=64 dropout=0.0 " in table


def test_dropouts_that_are_not_equal_are_shown_apart(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    for rates in ({"resid_pdrop": 0.0, "embd_pdrop": 0.0}, {"attn_pdrop": 0.0}):
        path.write_text(yaml.safe_dump({"id": "mine", "family": "gpt2", "config": rates}))
        (row,) = json.loads(fine("models", path, "--json"))
        assert row["differs"] == rates


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["gla_170N"], "unknown model 'gla_170N'. Did you mean 'gla_170M'?"),
        (["gla_tiny", "--set", "config.expandk=1"], "'config.expandk'. Did you mean 'expand_k'?"),
        # the one that does not have it is named
        (["gla_tiny", "gpt2_tiny", "--set", "config.expand_k=1"], "'gpt2_tiny': unknown setting"),
        (["gla_tiny", "--set", "config.foo=1"], "'config.foo'. Known: attn, attn_mode, attn_pdrop"),
        (["gla_tiny", "--set", "config.num_heads=5"], "num_heads=5"),
        (["gla_tiny", "--set", "lr=1"], "'lr' is no field of a model: expected config.<field>"),
        (["gla_tiny", "--set", "config.num_heads"], "is no assignment: expected key=value"),
    ],
)
def test_models_refuses_what_a_model_does_not_have(options: list[str], message: str) -> None:
    assert message in refused("models", *options)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("family: gpt3", "'mine' is of unknown family 'gpt3'. Did you mean 'gpt2'?"),
        ("family: gpt2\nconfig: {n_heads: 4}", "unknown field 'n_heads'"),
        ("family: gpt2\nconfig: {n_head: 7}", "model 'mine' cannot be built"),
    ],
)
def test_models_refuses_a_file_that_no_model_is_built_of(
    tmp_path: Path, fields: str, message: str
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"id: mine\n{fields}\n")
    assert message in refused("models", path)


def test_a_family_without_its_package_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(entry: Any) -> int:
        raise scanlm.ScanLMError("needs a package") from ModuleNotFoundError()

    monkeypatch.setattr(baselines, "count_parameters", missing)
    rows = json.loads(fine("models", "--json"))
    assert {row["parameters"] for row in rows} == {None}
    assert rows[0]["note"] == "needs a package"
    assert "?" in fine("models")


# Prepare


def test_prepare_writes_token_files(corpus: Path, tmp_path: Path) -> None:
    table = fine("prepare", corpus, "--tokenizer", "bytes", "--cache-dir", tmp_path)
    files = {path.stem: path for path in tmp_path.glob("tokens/*/*.bin")}
    assert set(files) == {"train", "validation", "test"}
    line = next(line for line in table.splitlines() if line.strip().startswith("test"))
    assert line.split()[2:] == ["136", "24", "136"]  # tokens, words, bytes


def test_prepare_refuses_what_is_no_corpus(tmp_path: Path) -> None:
    assert "Did you mean 'embedded'?" in refused("prepare", "embeded")
    (tmp_path / "train.txt").write_bytes(b"caf\xe9 and more")
    assert "UTF-8" in refused("prepare", tmp_path, "--tokenizer", "bytes", "--cache-dir", tmp_path)
    assert "unknown tokenizer 'byte'" in refused("prepare", "embedded", "--tokenizer", "byte")


# Train


def test_dry_run_prints_the_whole_configuration_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sets = ["--set", "config.chunk_size=16", "--set", "gradient_accumulation=2"]
    options = ["--lr", "2e-3", "--steps", "7", "--seed", "3", "--batch-size", "4", *sets]
    facts = yaml.safe_load(fine("train", "scanlm_tiny", "--dry-run", "--exp-name", "e", *options))
    settings = {"lr": 2e-3, "steps": 7, "seed": 3, "batch_size": 4, "corpus": "embedded"}
    settings |= {"experiment": "e", "gradient_accumulation": 2, "wandb": False, "beta2": 0.999}
    assert settings.items() <= facts["settings"].items()
    assert facts["config"]["chunk_size"] == 16
    assert facts["parameters"] == "298,752"
    assert facts["tokens"] == "7,168"
    assert facts["memory"].endswith(" GiB")
    assert facts["command"].startswith("scanlm train scanlm_tiny --corpus embedded --set ")
    assert not list(tmp_path.iterdir())


def test_the_printed_command_is_the_same_training(tmp_path: Path) -> None:
    options = ["--preset", "smoke", "--set", "config.chunk_size=16", "--set", "eval_tokens=null"]
    first = yaml.safe_load(fine("train", "scanlm_tiny", *options, "--dry-run"))
    again = yaml.safe_load(fine(*first["command"].split()[1:], "--dry-run"))
    assert again["settings"] == first["settings"]
    assert again["config"] == first["config"]


@pytest.mark.parametrize(
    ("tokenizer", "size", "parameters"),
    [("bytes", 257, "93,328,128"), ("gpt2", 50257, "170,128,128"), ("bpe:4096", 4096, None)],
)
def test_dry_run_has_the_vocabulary_of_the_tokenizer(
    tokenizer: str, size: int, parameters: str | None
) -> None:
    options = ["--corpus", "embedded", "--tokenizer", tokenizer, "--dry-run"]
    text = fine("train", "scanlm_base_c64", *options)
    facts = yaml.safe_load(text)
    assert facts["settings"]["tokenizer"] == tokenizer
    assert facts["config"]["vocab_size"] == size
    assert facts["parameters"] == (parameters or facts["parameters"])
    assert ("  # at most: all 4,096 entries of bpe:4096 used\n" in text) is (parameters is None)
    chosen = fine("train", "scanlm_base_c64", *options, "--set", f"config.vocab_size={size}")
    assert "at most" not in chosen
    assert yaml.safe_load(chosen)["parameters"] == facts["parameters"]


def test_dry_run_without_a_tokenizer_has_the_corpus_default(corpus: Path) -> None:
    for source, size in (("embedded", 257), (corpus, 50257)):
        facts = yaml.safe_load(fine("train", "gpt2_tiny", "--corpus", source, "--dry-run"))
        assert facts["config"]["vocab_size"] == size


def test_dry_run_takes_the_size_of_a_tokenizers_folder(tmp_path: Path) -> None:
    from scanlm.data import load_tokenizer

    folder = tmp_path / "tokenizer"
    arguments = ["train", "scanlm_base_c64", "--tokenizer", folder, "--dry-run"]
    assert f"unknown tokenizer '{folder}'" in refused(*arguments, "--corpus", "embedded")
    load_tokenizer("bytes").save_pretrained(folder)
    facts = yaml.safe_load(fine(*arguments, "--corpus", "embedded"))
    assert (facts["config"]["vocab_size"], facts["parameters"]) == (257, "93,328,128")


def test_the_dry_run_is_what_is_trained(corpus: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"  # its vocabulary is GPT-2's, unlike the corpus'
    path.write_text("id: mine\nfamily: gpt2\nconfig: {n_layer: 1, n_embd: 8, n_head: 2}\n")
    arguments = train_arguments(str(path), corpus, tmp_path)
    planned = yaml.safe_load(fine(*arguments, "--dry-run"))
    run = Path(fine(*arguments).rpartition("run: ")[2].strip())
    summary = json.loads((run / "summary.json").read_text())
    assert planned["parameters"] == f"{summary['num_parameters']:,}"
    config = json.loads((run / "run.json").read_text())["parameters"]["config"]
    shared = config.keys() & planned["config"].keys()
    assert {"vocab_size", "eos_token_id", "n_embd"} <= shared
    assert {name: planned["config"][name] for name in shared} == {n: config[n] for n in shared}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "lrr=1"], "unknown setting 'lrr'. Did you mean 'lr'?"),
        (["--tokenizer", "byte"], "unknown tokenizer 'byte'"),
        (["--tokenizer", "bpe:100"], "expected at least 257 entries"),
        (["--set", "config.chunksize=1"], "'config.chunksize'. Did you mean 'chunk_size'?"),
        (["--set", "confg.chunk_size=1"], "unknown setting 'confg.chunk_size'"),
        (["--set", "lr"], "'lr' is no assignment: expected key=value"),
        (["--lr", "1", "--set", "lr=1"], "'lr' is given twice"),
        (["--lr", "1", "--set", "training.lr=1"], "'training.lr' is given twice"),
        (["--preset", "smokey"], "unknown preset 'smokey'. Did you mean 'smoke'?"),
        (["--lr", "-1"], "lr=-1.0: expected a value greater than 0, e.g. lr=0.0"),
        (["--steps", "0"], "steps=0: expected a value greater than or equal to 1, e.g. st"),
        (
            ["--set", "experiment=2024"],
            'experiment=2024: expected text, e.g. experiment="2024" (with --set in further quotes)',
        ),
        (["--set", "config.chunk_size=0"], "chunk_size"),
        (["--set", "config.n_head=5"], "n_head"),
        (
            ["--set", "dropout=0.2", "--set", "config.resid_pdrop=0"],
            "dropout=0.2 sets all rates of the model, and config.resid_pdrop=0 is one of them: le",
        ),
        (["--set", "seq_len=2048"], "seq_len=2048 is longer than the 1024 positions"),
        (["--corpus", "embeded"], "unknown corpus 'embeded'"),
        (["--set", "config.vocab_size=256"], "'bytes' (257 tokens) and the model has a vocabulary"),
        (["--set", "config.vocab_size=385"], "set config.vocab_size=257 or take another tokenizer"),
    ],
)
def test_wrong_settings_are_one_line(options: list[str], message: str) -> None:
    assert message in refused("train", "scanlm_tiny", "--dry-run", *options)


def test_a_malformed_model_file_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("id: mine\nfamily: [gpt2\n")
    assert "mine.yaml, line 3, is not YAML" in refused("train", path, "--dry-run")


FAMILIES_WITHOUT_THEIR_PACKAGE = {
    "a module": "import absent_package",
    "a module in a package": "from absent_package.models import AbsentForCausalLM",
}


@pytest.mark.parametrize("options", [["--dry-run"], []], ids=["dry run", "training"])
@pytest.mark.parametrize("missing", FAMILIES_WITHOUT_THEIR_PACKAGE)
def test_a_family_without_its_package_ends_in_one_line(
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    missing: str,
    options: list[str],
) -> None:
    """With the two files that the README's section on new families has."""
    program, model = tmp_path / "my_scanlm.py", tmp_path / "mine.yaml"
    program.write_text(
        "from scanlm.baselines import register_family\n"
        "from scanlm.cli import app\n\n\n"
        "def build(fields, device):\n"
        f"    {FAMILIES_WITHOUT_THEIR_PACKAGE[missing]}\n\n\n"
        'register_family("absent", build)\n\n'
        'if __name__ == "__main__":\n'
        "    app()\n"
    )
    model.write_text("id: mine\nfamily: absent\n")
    monkeypatch.setattr(baselines, "_FAMILIES", dict(baselines._FAMILIES))  # forgotten afterwards
    words = [*train_arguments(str(model), corpus, tmp_path), *options]
    monkeypatch.setattr(sys, "argv", [str(program), *words])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(program), run_name="__main__")
    said = "model 'mine' needs the package 'absent_package', which is not installed"
    assert end.value.code == 1
    assert capsys.readouterr().err == f"scanlm: {said}: pip install absent_package\n"
    assert not (tmp_path / "runs").exists()


def test_train_writes_a_run_and_repeats_nothing(trained: dict[str, Any], corpus: Path) -> None:
    run = trained["runs"]["scanlm_tiny"]
    assert json.loads((run / "run.json").read_text())["status"] == "finished"
    assert {path.name for path in run.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    arguments = train_arguments("scanlm_tiny", corpus, trained["root"].parent)
    assert fine(*arguments).startswith(f"already finished: {run}")


def test_divergence_is_one_line_and_recorded(corpus: Path, tmp_path: Path) -> None:
    said = refused(*train_arguments("scanlm_tiny", corpus, tmp_path), "--lr", "1e30")
    assert "training diverged: the validation loss is not finite at step 2" in said
    (record,) = tmp_path.glob("runs/*/*/run.json")
    assert json.loads(record.read_text())["status"] == "diverged"


def test_an_interrupt_is_one_line_and_recorded(corpus: Path, tmp_path: Path) -> None:
    endless = ["seq_len=16", "batch_size=2", "steps=100000", "log_every=1"]
    words = train_arguments("scanlm_tiny", corpus, tmp_path, endless)
    process = subprocess.Popen(
        [sys.executable, "-m", "scanlm", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a shell that started the tests in the background has told them to ignore interrupts
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    assert process.stdout.readline().startswith("step 1/")
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said == "scanlm: interrupted: the same command goes on from the last checkpoint\n"
    (record,) = tmp_path.glob("runs/*/*/run.json")
    assert json.loads(record.read_text())["status"] == "interrupted"


def test_an_unwritable_folder_is_one_line(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    said = refused(*train_arguments("scanlm_tiny", corpus, tmp_path))
    assert f"cannot write to {tmp_path / 'runs'}" in said


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted: the same command goes on from the last"),
        (torch.OutOfMemoryError("CUDA out of memory"), 1, "out of GPU memory: lower the batch"),
        (MemoryError(), 1, "out of memory: lower the batch size"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"),
            1,
            "out of memory: lower the batch size (or raise gradient_accumulation) or the sequence "
            "length; what was saved is kept",
        ),
        (FileNotFoundError(2, "No such file or directory", "a/b"), 1, "scanlm: a/b: No such file"),
        (OSError(28, "No space left on device"), 1, "scanlm: No space left on device"),
    ],
)
def test_what_stops_training_is_one_line(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, message: str
) -> None:
    def stopped(settings: Any) -> None:
        raise error

    monkeypatch.setattr("scanlm.training.train", stopped)
    assert message in refused("train", "scanlm_tiny", code=code)


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(settings: Any) -> None:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr("scanlm.training.train", wrong)
    assert str(scan("train", "scanlm_tiny").exception) == "shapes differ"


# Evaluate


def test_evaluate_prints_json_with_the_loss_by_position(trained: dict[str, Any]) -> None:
    run = trained["runs"]["scanlm_tiny"]
    (row,) = json.loads(fine(*evaluate_arguments(trained, run), "--json"))
    assert (row["model"], row["step"], row["split"]) == ("scanlm_tiny", 4, "test")
    assert row["num_tokens"] == 135
    mean = sum(
        loss * count
        for loss, count in zip(row["loss_by_position"], row["counts_by_position"], strict=True)
    )
    assert mean / row["num_tokens"] == pytest.approx(row["loss"])


def test_evaluate_takes_several_steps(trained: dict[str, Any], tmp_path: Path) -> None:
    run, figure = trained["runs"]["scanlm_tiny"], tmp_path / "steps.png"
    # the target may stand behind the steps
    arguments = ["evaluate", "--steps", "4", "2", *evaluate_arguments(trained, run)[1:]]
    rows = json.loads(fine(*arguments, "--json", "--figure", figure))
    assert [row["step"] for row in rows] == [4, 2]
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_evaluate_takes_several_corpora_and_splits(trained: dict[str, Any]) -> None:
    arguments = evaluate_arguments(trained, trained["runs"]["scanlm_tiny"])
    arguments += ["--corpus", f"{trained['corpus']}#detokenized", "--split", "validation,test"]
    rows = json.loads(fine(*arguments, "--json"))
    name = trained["corpus"].name
    assert [(row["corpus"], row["split"]) for row in rows] == [
        (corpus, split) for corpus in (name, f"{name}#detokenized")
        for split in ("validation", "test")
    ]  # fmt: skip
    assert "of one split of one corpus: give one" in refused(*arguments, "--compare")


def test_a_checkpoint_that_is_scored_on_several_texts_is_loaded_once(
    trained: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from scanlm import checkpoints

    load, loaded = checkpoints.load_checkpoint, []

    def counted(target: Any, *arguments: Any, **options: Any) -> Any:
        loaded.append(target)
        return load(target, *arguments, **options)

    monkeypatch.setattr(checkpoints, "load_checkpoint", counted)
    run, other = map(str, trained["runs"].values())
    fine(*evaluate_arguments(trained, run), "--split", "validation,test")
    assert loaded == [run]
    loaded.clear()
    fine(*evaluate_arguments(trained, run, other))  # checked, then scored; one in memory
    assert loaded == [run, other, run, other]


def records(trained: dict[str, Any]) -> set[Path]:
    """Where a record has been written so far."""
    return {path.parent for path in trained["root"].glob("*/*/run.json")}


def test_evaluate_prints_where_its_records_are(trained: dict[str, Any]) -> None:
    before = records(trained)
    printed = fine(*evaluate_arguments(trained, *trained["runs"].values()))
    places = [Path(line[5:]) for line in printed.splitlines() if line.startswith("run: ")]
    assert len(places) == 2
    assert set(places) == records(trained) - before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["/nowhere"], "no folder '/nowhere'"),
        (["--split", "test,tset"], "has no split 'tset'"),
        (["--corpus", "nowhere"], "unknown corpus 'nowhere'"),
        (["--steps", "4", "3"], "no checkpoint of step 3"),
    ],
)
def test_all_that_is_to_be_evaluated_is_checked_before_any_of_it_is_scored(
    trained: dict[str, Any], words: list[str], message: str
) -> None:
    before = records(trained)
    arguments = evaluate_arguments(trained, trained["runs"]["scanlm_tiny"])
    assert message in refused(*arguments, *words)
    assert records(trained) == before


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_what_was_scored_before_an_error_is_shown(
    trained: dict[str, Any], monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    from scanlm import evaluation

    score, scored = evaluation.evaluate_blocks, []

    def fail_at_the_third(*arguments: Any, **named: Any) -> Any:
        scored.append(arguments)
        if len(scored) == 3:
            raise ScanLMError("the loss is nan at token 3")
        return score(*arguments, **named)

    monkeypatch.setattr(evaluation, "evaluate_blocks", fail_at_the_third)
    arguments = evaluate_arguments(trained, *trained["runs"].values())
    result = scan(*arguments, "--steps", "2", "4", *options)
    assert (result.exit_code, result.stderr) == (1, "scanlm: the loss is nan at token 3\n")
    if options:
        assert [row["step"] for row in json.loads(result.stdout)] == [2, 4]
    else:
        assert result.stdout.count(" test ") == 2
        assert "\nrun: " in result.stdout


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seq_len": 4}, "seq_len is 8 for a, 4 for b: give one for all, e.g. --seq-len 4"),
        (
            {"chunk_size": 2},
            "chunk_size is 4 for a, 2 for b: give one for all, e.g. --chunk",
        ),
        ({"tokenizer_hash": "1"}, "a and b have different tokenizers: leave it out"),
    ],
)
def test_losses_that_are_not_comparable_are_not_ranked(
    changed: dict[str, Any], message: str
) -> None:
    from scanlm.cli.comparison import _check_comparable

    row = {"target": "a", "seq_len": 8, "chunk_size": 4, "tokenizer_hash": "0"}
    _check_comparable([row, row | {"target": "b"}])
    with pytest.raises(ScanLMError, match=message):
        _check_comparable([row, row | {"target": "b"} | changed])


def test_a_run_is_not_ranked_against_itself() -> None:
    result = scan("evaluate", "--compare", "runs/a", "gpt2", "runs/a/", "--corpus", "embedded")
    assert result.exit_code == 1
    assert "--compare: runs/a is given twice: leave one out" in result.stderr


def test_compare_refuses_runs_of_other_lengths(trained: dict[str, Any], tmp_path: Path) -> None:
    source = trained["runs"]["gpt2_tiny"]
    other = Path(shutil.copytree(source, tmp_path / "other"))
    record = json.loads((source / "run.json").read_text())
    record["parameters"]["seq_len"] = 4
    (other / "run.json").write_text(json.dumps(record))
    before = records(trained)
    said = refused(*evaluate_arguments(trained, "--compare", source, other))
    assert f"seq_len is 8 for {source}, 4 for {other}: give one for all, e.g. --seq-len 4" in said
    assert records(trained) == before


def test_compare_sorts_and_draws(trained: dict[str, Any]) -> None:
    runs = trained["runs"].values()
    printed = fine(*evaluate_arguments(trained, "--compare", *runs))
    lines = [line.split() for line in printed.splitlines() if " test " in line]
    distances = [float(words[-1]) for words in lines]
    assert distances[0] == 0
    assert distances[1] > 0
    figure = Path(printed.rpartition("figure: ")[2].strip())
    assert figure.parent == trained["root"] / "comparisons"
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_evaluate_of_one_model_twice_draws_two_curves(trained: dict[str, Any]) -> None:
    from scanlm.cli.comparison import _frame

    run = trained["runs"]["scanlm_tiny"]
    targets = [run / "checkpoint-2", run / "checkpoint-4"]
    rows = json.loads(fine(*evaluate_arguments(trained, *targets), "--json"))
    frame = _frame(rows, by_position=True)
    assert set(frame["series"]) == {"checkpoint-2", "checkpoint-4"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--split", "tset"], "has no split 'tset'; it has train, validation, test"),
        (["--context", "stream"], "unknown context 'stream'. Did you mean 'streaming'?"),
        (["--steps", "3"], "no checkpoint of step 3"),
        (["--stride", "4"], "stride=4 is for context='sliding'"),
        (["--precision", "bf17"], "Did you mean 'bf16'?"),
        (["--device", "nowhere"], "device 'nowhere' cannot be used"),
        (["--chunk-size", "4"], "chunk_size=4 is for original_positions only"),
        (["--seq-len", "128"], "use seq_len=64 or less, or one trained with position_embedding="),
        (["--figure", "curves.doc"], "must end in .png, .pdf, .svg"),
        (["--figure", "/dev/null/a.png"], "cannot write figure '/dev/null/a.png': Not a dir"),
        (["--tokenizer", "bpe:300"], "another tokenizer"),
    ],
)
def test_wrong_evaluations_are_one_line(
    trained: dict[str, Any], options: list[str], message: str
) -> None:
    run = trained["runs"]["scanlm_tiny"]
    assert message in refused(*evaluate_arguments(trained, run), *options)


def test_evaluate_needs_a_target_that_is_there(trained: dict[str, Any], tmp_path: Path) -> None:
    assert "no folder" in refused(*evaluate_arguments(trained, tmp_path / "absent"))
    run = trained["runs"]["scanlm_tiny"]
    assert "is no name that is known: give --corpus" in refused("evaluate", run)
    assert "is no run, so nothing says which corpus" in refused("evaluate", tmp_path)
    assert "does not exist" in refused("evaluate", tmp_path / "absent")
    (tmp_path / "run.json").write_text(json.dumps(RECORD | {"parameters": {"group": "S5"}}))
    assert "was not trained on text" in refused("evaluate", tmp_path)
    (tmp_path / "run.json").write_text("")
    assert "run.json is not JSON" in refused("evaluate", tmp_path)


def test_the_corpus_of_a_run_is_the_default(tmp_path: Path) -> None:
    from scanlm.cli.comparison import trained_on

    record = RECORD | {"parameters": {"corpus": "embedded#test=train[:50%]"}}
    (tmp_path / "run.json").write_text(json.dumps(record))
    assert trained_on(str(tmp_path)) == record["parameters"]["corpus"]
    assert trained_on(str(tmp_path / "checkpoint-4")) == record["parameters"]["corpus"]


def damaged(trained: dict[str, Any], folder: Path, how: str) -> Path:
    """A copy of a checkpoint with something wrong."""
    from safetensors.torch import load_file, save_file

    source = trained["runs"]["gpt2_tiny"] / "checkpoint-4"
    for path in source.glob("*.json"):
        (folder / path.name).write_bytes(path.read_bytes())
    weights, config = folder / "model.safetensors", folder / "config.json"
    content = (source / weights.name).read_bytes()
    weights.write_bytes(content[: len(content) // 2] if how == "truncated" else content)
    if how == "NaN":
        tensors = load_file(weights)
        tensors["transformer.wpe.weight"][0, 0] = float("nan")
        save_file(tensors, weights, metadata={"format": "pt"})
    if how == "of another model":
        config.write_text(config.read_text().replace('"n_layer": ', '"n_layer": 1'))
    if how == "of another vocabulary":
        config.write_text(config.read_text().replace('"vocab_size": 257', '"vocab_size": 300'))
    return folder


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", "model.safetensors"),
        ("NaN", "NaN"),
        ("of another model", "are not those of its gpt2 configuration"),
        ("of another vocabulary", "transformer.wte.weight is (257, 8), not (300, 8)"),
    ],
)
def test_damaged_checkpoints_are_one_line(
    trained: dict[str, Any], tmp_path: Path, how: str, message: str
) -> None:
    assert message in refused(*evaluate_arguments(trained, damaged(trained, tmp_path, how)))


def test_a_distributed_checkpoint_needs_its_config(trained: dict[str, Any], tmp_path: Path) -> None:
    from safetensors.torch import load_file
    from torch.distributed.checkpoint import FileSystemWriter, save

    source = trained["runs"]["gpt2_tiny"] / "checkpoint-4"
    folder = tmp_path / "step-4"
    weights = load_file(source / "model.safetensors")
    save(weights, storage_writer=FileSystemWriter(folder), no_dist=True)
    arguments = [*evaluate_arguments(trained, folder), "--tokenizer", "bytes"]
    assert "give its config.json" in refused(*arguments)
    assert "nowhere" in refused(*arguments, "--config", tmp_path / "nowhere.json")
    (row,) = json.loads(fine(*arguments, "--config", source / "config.json", "--json"))
    (same,) = json.loads(fine(*evaluate_arguments(trained, source), "--seq-len", "8", "--json"))
    assert row["step"] == 4
    again = json.loads(fine(*arguments, "--seq-len", "8", "--json"))  # converted once
    assert again[0]["loss"] == same["loss"]


# Run


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["-p", "steps", "5"], {"steps": 5}),
        (["-p", "steps=5", "-p", "lr", "-1e-3"], {"steps": 5, "lr": -1e-3}),
        (["--parameter", "name", "a=b", "--preset", "smoke"], {"name": "a=b"}),
        (
            ["-p", "name", "two words", "-p", "sizes", "[1, 2]"],
            {"name": "two words", "sizes": [1, 2]},
        ),
        (["-p", "name", ""], {"name": ""}),
        (["-p", "preset=--preset"], {"preset": "--preset"}),
        ([], {}),
    ],
)
def test_parameters_of_a_notebook(
    monkeypatch: pytest.MonkeyPatch, given: list[str], expected: dict[str, Any]
) -> None:
    calls = []

    def record(*arguments: Any) -> str:
        calls.append(arguments)
        return "done.ipynb"

    monkeypatch.setattr("scanlm.batch.run_notebook", record)
    assert fine("run", "01", *given) == "done.ipynb\n"
    preset = "smoke" if given[-1:] == ["smoke"] else None
    assert calls == [("01", preset, expected, None)]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["01", "-p", "chunk", "5"], "has no parameter 'chunk'. Did you mean 'chunks'?"),
        (["01", "-p", "chunks"], "'chunks' is no assignment"),
        (["01", "-p", "chunks", "x"], "chunks='x': expected int"),
        (["01", "--preset", "smok"], "Did you mean 'smoke'?"),
        (["missing.ipynb"], "no notebook 'missing.ipynb': no such file"),
    ],
)
def test_wrong_notebook_runs_are_one_line(given: list[str], message: str) -> None:
    assert message in refused("run", *given)


def test_a_failing_notebook_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from scanlm.batch import NotebookFailed

    def fail(*arguments: Any) -> None:
        raise NotebookFailed("notebook 01, cell [3]: KeyError: 'a' (see x.partial.ipynb)")

    monkeypatch.setattr("scanlm.batch.run_notebook", fail)
    assert "cell [3]: KeyError" in refused("run", "01")


# Export, figures, curriculum


def test_export_and_figures(trained: dict[str, Any], tmp_path: Path) -> None:
    results = tmp_path / "results"
    printed = fine("export", *trained["runs"].values(), "--results", results)
    files = [Path(line) for line in printed.splitlines()]
    assert [path.stem for path in files] == [run.name for run in trained["runs"].values()]
    assert str(tmp_path) not in files[0].read_text()
    drawn = fine("figures", "scan_tree", "--results", results, "--out", tmp_path / "figures")
    assert Path(drawn.strip()).read_bytes().startswith(b"\x89PNG")
    assert "Did you mean 'scan_tree'?" in refused("figures", "scan_tre", "--out", tmp_path)
    said = refused("figures", "comparison", "--results", results, "--out", tmp_path)
    assert "comparison not drawn: no records in" in said


def test_results_that_are_not_there_are_named(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("<!-- results:begin -->\n<!-- results:end -->\n")
    for command in (["figures", "--out", tmp_path / "figures"], ["report", tmp_path / "README.md"]):
        said = refused(*command, "--results", tmp_path / "nowhere")
        assert "nowhere' of exported records: run this in a clone" in said
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_export_refuses_what_is_no_finished_run(trained: dict[str, Any], tmp_path: Path) -> None:
    assert "no run record at" in refused("export", tmp_path)
    record = json.loads((trained["runs"]["gpt2_tiny"] / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps(record | {"status": "interrupted"}))
    assert "only finished runs are exported" in refused("export", tmp_path)
    (tmp_path / "run.json").write_text("{}")
    assert "run.json is no record of a run: run_id must be text" in refused("export", tmp_path)


def test_curriculum_passes_its_options_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = []

    def record(settings: Any, **options: Any) -> list[Any]:
        calls.append((settings, options))
        return []

    monkeypatch.setattr("scanlm.curriculum.train_many", record)
    options = ["--preset", "smoke", "--seeds", "0,2", "--set", "ema=0.99", "--out", tmp_path]
    fine("curriculum", *options, "--max-seconds", 9, "--device", "cpu", "--save-weights", "bf16")
    ((settings, passed),) = calls
    assert [(entry.seed, entry.ema) for entry in settings] == [(0, 0.99), (2, 0.99)]
    expected = {"root": tmp_path, "max_seconds": 9, "device": "cpu", "save_weights": "bf16"}
    assert expected.items() <= passed.items()


def test_wrong_curricula_are_one_line() -> None:
    assert "seeds='a'" in refused("curriculum", "--seeds", "a")
    assert "seed=4294967296" in refused("curriculum", "--seeds", 2**32)
    assert "seed=3 by --set: give seeds by --seeds 3" in refused("curriculum", "--set", "seed=3")
    assert "Did you mean 'smoke'?" in refused("curriculum", "--preset", "smok")
    assert "Did you mean 'ema'?" in refused("curriculum", "--set", "emma=0")
    assert "'ema' is no assignment" in refused("curriculum", "--set", "ema")


def test_a_diverged_curriculum_is_an_error(tmp_path: Path) -> None:
    rates = ["--set", "stages.*.lr=1e30", "--set", "stages.*.warmup=0", "--set", "clip=1e30"]
    said = refused("curriculum", "--preset", "smoke", *rates, "--out", tmp_path)
    assert "1 of 1 runs diverged: scan-s0-" in said


def test_an_interrupted_curriculum_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(settings: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("scanlm.curriculum.train_many", stopped)
    said = refused("curriculum", "--preset", "smoke", code=130)
    assert "the same command goes on from what each run has saved" in said
