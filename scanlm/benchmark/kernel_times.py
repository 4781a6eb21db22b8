"""Where the time of a step goes: its kernels, by what they are for or by name."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

# what a kernel (or, on a CPU, an operation) is for, by its name; the first that fits
KINDS: dict[str, str] = {
    "attention": r"window_(forward|backward)_kernel|flash|fmha|sdpa|attention|chunk_gla|delta_rule",
    "loss": r"cross_entropy|logsumexp|nll_loss",
    "products": r"nvjet|gemm|gemv|cutlass|cublas|splitk|wgmma|aten::(add)?mm$|aten::bmm",
    "optimiser": r"multi_tensor|adam",
    "GELU": r"gelu|silu|swiglu",
    "norms": r"layer_norm|layernorm|rms_norm|GammaBeta",
    "embeddings": r"embedding|gather|scatter|index|compute_grad_weight|segment",
    "copies": r"copy|Memcpy|Memset|Cat|aten::cat|fill|zero_",
}
OTHER = "other"


def kind_of(name: str) -> str:
    """Which of ``KINDS`` a kernel is, else ``OTHER``."""
    found = (kind for kind, words in KINDS.items() if re.search(words, name, re.IGNORECASE))
    return next(found, OTHER)


def short_name(name: str) -> str:
    """A kernel's name without its return type, template arguments and parameters."""
    name = name.removeprefix("void ").replace("(anonymous namespace)::", "")
    return re.split(r"[<(]", name)[0]


def kernel_milliseconds(
    step: Callable[[], Any],
    count: int,
    device: torch.device,
    group: Callable[[str], str] = kind_of,
) -> dict[str, float]:
    """Milliseconds of a step by kind of kernel, largest first.

    Each kernel counts from its start to its end. Kernels that run side by side, as with
    programmatic dependent launch, where one starts early and waits, add up to more than the step.

    Args:
        step: warmed up; queues its work.
        count: steps to average over.
        device: a GPU, whose kernels are counted; or a CPU, whose operations are (each without
            those that it calls).
        group: of a kernel's name, what it is counted as.
    """
    cuda = device.type == "cuda"
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler reports its own start
    activities = [ProfilerActivity.CUDA] if cuda else [ProfilerActivity.CPU]
    with profile(activities=activities) as recorded:
        for _ in range(count):
            step()
        if cuda:
            torch.cuda.synchronize(device)
    times: dict[str, float] = {}
    for event in recorded.key_averages():
        if cuda and event.device_type.name != "CUDA":
            continue
        if cuda and event.key.startswith("Optimizer."):  # a range around kernels
            continue
        spent = event.self_device_time_total if cuda else event.self_cpu_time_total
        kind = group(event.key)
        times[kind] = times.get(kind, 0.0) + spent / 1e3 / count
    return dict(sorted(times.items(), key=lambda item: -item[1]))
