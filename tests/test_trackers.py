"""TensorBoard and Weights & Biases: asked for, offline without a key, a clear error if missing."""

import os
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from scanlm.config import ScanLMConfig
from scanlm.data import prepare
from scanlm.errors import ScanLMError
from scanlm.model import ScanLMForCausalLM
from scanlm.records import Run
from scanlm.settings import TrainingSettings
from scanlm.training import _trackers, train

VARIABLES = ("WANDB_", "TENSORBOARD_")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """This process' variables without any of a tracker; what is set in them is forgotten."""
    variables = {k: v for k, v in os.environ.items() if not k.startswith(VARIABLES)}
    monkeypatch.setattr(os, "environ", variables)
    return variables


class Tracked(SimpleNamespace):
    """What reached the stubs: wandb's environment when it began, and values by name."""

    begun: list[dict[str, str]]
    ended: list[int]
    wandb: dict[str, Any]
    folder: str
    tensorboard: dict[str, Any]


@pytest.fixture
def tracked(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> Tracked:
    """Both packages as stubs. There is no ``login``: whatever asked for a key would fail."""
    seen = Tracked(begun=[], ended=[], wandb={}, folder="", tensorboard={})

    def module(name: str, **members: Any) -> ModuleType:
        made = ModuleType(name)
        made.__spec__ = ModuleSpec(name, None)
        vars(made).update(members)
        monkeypatch.setitem(sys.modules, name, made)
        return made

    def begin(**how: Any) -> None:
        variables = {k: v for k, v in environment.items() if k.startswith("WANDB_")}
        seen.begun.append({**how, **variables})
        wandb.run = SimpleNamespace(_label=lambda code: None, summary={})  # type: ignore[attr-defined]

    def finish(exit_code: int) -> None:
        seen.ended.append(exit_code)
        wandb.run = None  # type: ignore[attr-defined]

    class Writer:
        def __init__(self, log_dir: str) -> None:
            seen.folder = log_dir

        def add_scalar(self, name: str, value: float, step: int) -> None:
            seen.tensorboard[name] = value

        def add_text(self, *text: Any) -> None:
            pass

        def flush(self) -> None:
            pass

        def close(self) -> None:
            pass

    logged = seen.wandb.update
    wandb = module("wandb", run=None, config={}, init=begin, log=logged, finish=finish)
    module("wandb.sdk.lib.config_util", ConfigError=ValueError)
    module("tensorboard")
    module("torch.utils.tensorboard", SummaryWriter=Writer)
    return seen


def train_tracked(folder: Path, **settings: Any) -> Run:
    for split in ("train", "validation"):
        (folder / f"{split}.txt").write_text("the scan folds chunks into states\n" * 10)
    values = {"model": "test", "corpus": "test", "seq_len": 16, "batch_size": 2, "steps": 2}
    values |= {"log_every": 1, "root": str(folder / "runs"), **settings}
    torch.manual_seed(0)
    sizes = {"vocab_size": 257, "n_embd": 8, "n_head": 2, "chunk_size": 4, "t2_layers": 1}
    return train(
        TrainingSettings(**values),
        ScanLMForCausalLM(ScanLMConfig(**sizes)),
        prepare(folder, "bytes", folder / "cache"),
    )


def test_none_is_asked_for_by_default(environment: dict[str, str], tmp_path: Path) -> None:
    before = dict(environment)
    assert _trackers(TrainingSettings(), tmp_path) == ["none"]
    assert environment == before


def test_both_receive_what_is_logged(tracked: Tracked, tmp_path: Path) -> None:
    run = train_tracked(tmp_path, tensorboard=True, wandb=True)
    assert tracked.folder == str(run.folder / "tensorboard")
    assert {"train/loss", "train/learning_rate"} <= set(tracked.tensorboard)
    assert tracked.wandb["train/loss"] == tracked.tensorboard["train/loss"] > 0
    (begun,) = tracked.begun
    assert begun == {
        "name": run.folder.name,
        "project": "scanlm",
        "WANDB_MODE": "offline",
        "WANDB_PROJECT": "scanlm",
        "WANDB_DIR": str(run.folder),
    }


@pytest.mark.parametrize("key", [{}, {"WANDB_API_KEY": ""}])
def test_wandb_without_a_key_is_offline(
    tracked: Tracked, environment: dict[str, str], tmp_path: Path, key: dict[str, str]
) -> None:
    environment |= key
    assert _trackers(TrainingSettings(wandb=True), tmp_path) == ["wandb"]
    assert environment["WANDB_MODE"] == "offline"


def test_each_training_of_a_process_is_a_run_of_its_own(tracked: Tracked, tmp_path: Path) -> None:
    runs = [train_tracked(tmp_path, seed=seed, wandb=True) for seed in (0, 1)]
    assert [begun["name"] for begun in tracked.begun] == [run.folder.name for run in runs]
    assert [begun["WANDB_DIR"] for begun in tracked.begun] == [str(run.folder) for run in runs]
    assert tracked.ended == [0, 0]


def test_a_run_that_diverges_ends_as_failed(tracked: Tracked, tmp_path: Path) -> None:
    with pytest.raises(ScanLMError, match="diverged"):
        train_tracked(tmp_path, lr=1e30, steps=20, wandb=True)
    assert tracked.ended == [1]


def test_a_wandb_run_of_the_caller_is_left_open(tracked: Tracked, tmp_path: Path) -> None:
    sys.modules["wandb"].init(name="mine")  # type: ignore[attr-defined]
    train_tracked(tmp_path, wandb=True)
    assert (len(tracked.begun), tracked.ended) == (1, [])


def test_wandb_with_a_key_is_as_the_user_wants(
    tracked: Tracked, environment: dict[str, str], tmp_path: Path
) -> None:
    environment |= {"WANDB_API_KEY": "0", "WANDB_PROJECT": "mine", "WANDB_DIR": "elsewhere"}
    _trackers(TrainingSettings(wandb=True), tmp_path)
    assert "WANDB_MODE" not in environment
    assert (environment["WANDB_PROJECT"], environment["WANDB_DIR"]) == ("mine", "elsewhere")


def test_wandb_that_is_switched_off_stays_so(
    tracked: Tracked, environment: dict[str, str], tmp_path: Path
) -> None:
    environment["WANDB_MODE"] = "disabled"
    _trackers(TrainingSettings(wandb=True), tmp_path)
    assert environment["WANDB_MODE"] == "disabled"


def test_tensorboard_alone_leaves_wandb_alone(
    tracked: Tracked, environment: dict[str, str], tmp_path: Path
) -> None:
    assert _trackers(TrainingSettings(tensorboard=True), tmp_path) == ["tensorboard"]
    assert environment["TENSORBOARD_LOGGING_DIR"] == str(tmp_path / "tensorboard")
    assert not [name for name in environment if name.startswith("WANDB_")]


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tracked: Tracked, tmp_path: Path, name: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    message = rf"^{name}=true needs a package: pip install 'scanlm\[tracking\]'$"
    with pytest.raises(ScanLMError, match=message):
        train_tracked(tmp_path, **{name: True})
    assert not list(tmp_path.glob("runs/*/*/checkpoint-*"))


def test_trackers_do_not_make_it_another_run(tracked: Tracked, tmp_path: Path) -> None:
    run = train_tracked(tmp_path, wandb=True)
    assert train_tracked(tmp_path, tensorboard=True).folder == run.folder
    assert tracked.folder == ""
