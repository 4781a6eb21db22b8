"""Two processes: the same training as one, a rank that is killed, and going on after it."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from scanlm.errors import ScanLMError
from scanlm.records import Run, read_metrics
from scanlm.settings import TrainingSettings, resolve_settings
from scanlm.trainer import saved_steps
from scanlm.training import _lost_rank, train

SETTINGS = {
    "tokenizer": "bytes",
    "seq_len": 12,
    "batch_size": 8,
    "steps": 10,
    "warmup_steps": 1,
    "eval_every": 5,
    "log_every": 1,
    "save_every": 4,
    "eval_tokens": 64,
    "config.n_embd": 16,
    "config.n_head": 2,
    "config.chunk_size": 4,
    "config.t2_layers": 2,
}
# rank 1 dies before its seventh step where it is told to
CHILD = """
import os, signal, sys
from scanlm.cli import app
from scanlm.trainer import ExactTrainer
if os.environ["RANK"] == "1" and os.environ.get("DIES"):
    loss = ExactTrainer.compute_loss
    def dies(self, *args, **kwargs):
        if self.state.global_step == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss(self, *args, **kwargs)
    ExactTrainer.compute_loss = dies
app(sys.argv[1:])
"""
TORCHRUN = [
    *[sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    words = ["the", "scan", "folds", "chunks", "of", "the", "text", "into", "states"]
    generator = np.random.default_rng(0)
    for split, number in (("train", 400), ("validation", 40)):
        (folder / f"{split}.txt").write_text(" ".join(generator.choice(words, number)))
    return folder


@pytest.fixture(scope="module")
def one_process(text: Path) -> Path:
    values = {**SETTINGS, "corpus": str(text), "root": str(text / "one"), "cache_dir": str(text)}
    return train(resolve_settings("scanlm_tiny", None, values)).folder


def command(text: Path, root: Path, **changes: object) -> list[str]:
    child = text / "child.py"
    child.write_text(CHILD)
    values = {**SETTINGS, "root": str(root), "cache_dir": str(text), **changes}
    words = [str(child), "train", "scanlm_tiny", "--corpus", str(text)]
    return words + [word for n, v in values.items() for word in ("--set", f"{n}={v}")]


def usual() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def launch(
    text: Path, root: Path, environment: dict[str, str], **changes: object
) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*TORCHRUN, *command(text, root, **changes)],
        env=usual() | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def launch_one_that_dies(
    text: Path, root: Path, environment: dict[str, str], **changes: object
) -> tuple[int, int, str]:
    """Exit codes of the ranks and what the first says, without a launcher that would kill it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "DIES": "1"}
    group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen(
            [sys.executable, *command(text, root, **changes)],
            env=usual() | environment | group | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE if rank == "0" else subprocess.DEVNULL,
            text=True,
        )
        for rank in ("0", "1")
    ]
    try:
        said = ranks[0].communicate(timeout=300)[1]
        return ranks[0].returncode, ranks[1].wait(timeout=60), said
    finally:
        for process in ranks:
            process.kill()


def curve(folder: Path) -> np.ndarray:
    metrics = read_metrics(folder)
    rows = metrics[metrics["name"].isin(["loss", "grad_norm"])]
    return rows.sort_values(["name", "split", "step"], kind="stable")["value"].to_numpy()


@pytest.mark.parametrize(
    ("environment", "changes"),
    # the variable is what `accelerate launch --use_fsdp` sets
    [({}, {}), ({"ACCELERATE_USE_FSDP": "true"}, {"gradient_accumulation": 2})],
    ids=["ddp", "fsdp"],
)
def test_two_ranks_are_one_and_go_on_after_a_death(
    text: Path, one_process: Path, tmp_path: Path, environment: dict, changes: dict
) -> None:
    first, second, said = launch_one_that_dies(text, tmp_path, environment, **changes)
    assert (first, second) == (1, -signal.SIGKILL)
    assert "rank 0: another rank of this job has ended" in said
    assert "the same command goes on from the last checkpoint" in said
    (folder,) = (tmp_path / text.name).glob("*")
    assert saved_steps(folder) == [4]
    assert Run.open(folder).status == "interrupted"
    assert Run.open(folder).info["parameters"]["fsdp"] is bool(environment)
    again = launch(text, tmp_path, environment, **changes)
    assert again.returncode == 0, again.stderr
    assert "continuing from step 4" in again.stdout
    assert Run.open(folder).finished
    # a step's loss and gradient are those of one process only if it read the same blocks
    np.testing.assert_allclose(curve(folder), curve(one_process), rtol=2e-4)
    ours, expected = (
        load_file(f / "checkpoint-10/model.safetensors") for f in (folder, one_process)
    )
    assert ours.keys() == expected.keys()
    for name, weight in ours.items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=2e-4)


def test_mistakes(text: Path, tmp_path: Path) -> None:
    values = {**SETTINGS, "corpus": str(text), "root": str(tmp_path), "cache_dir": str(text)}
    with pytest.raises(ScanLMError, match="fsdp=true shares the model out over several ranks"):
        train(resolve_settings("scanlm_tiny", None, {**values, "fsdp": True}))
    for name in ("compile", "carry_state"):
        with pytest.raises(ScanLMError, match=f"fsdp=true and {name}=true"):
            TrainingSettings(fsdp=True, **{name: True})


def test_only_a_lost_rank_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    broken_pipe = RuntimeError("write failed: Broken pipe")
    assert not _lost_rank(broken_pipe)  # there is no other rank that could have been lost
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert _lost_rank(broken_pipe)
    closed = "[gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:1"
    assert _lost_rank(RuntimeError(closed))
    assert _lost_rank(torch.distributed.DistBackendError("NCCL error: remote process exited"))
    assert not _lost_rank(RuntimeError("shapes do not fit"))
    assert not _lost_rank(KeyboardInterrupt())
