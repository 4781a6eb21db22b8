"""Timing that can be trusted: device events, warm-up, medians; bandwidth of the memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch

Step = Callable[[], object]


def synchronize(device: torch.device) -> None:
    """Wait until the device has done everything that was queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def time_steps(step: Step, count: int, device: torch.device) -> list[float]:
    """Milliseconds of each of ``count`` calls.

    On a GPU an event is recorded after each call and nothing waits before the end: queued steps
    count with their time on the device, steps that the host is too slow to queue with the host's.
    Elsewhere every call is followed by a synchronisation.
    """
    synchronize(device)
    if device.type == "cuda":
        events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        events[0].record()
        for event in events[1:]:
            step()
            event.record()
        synchronize(device)
        return [a.elapsed_time(b) for a, b in pairwise(events)]
    times = []
    for _ in range(count):
        begin = time.perf_counter()
        step()
        synchronize(device)
        times.append(1e3 * (time.perf_counter() - begin))
    return times


def affordable_steps(
    step: Step, count: int, seconds: float, device: torch.device, multiple: int = 1
) -> int:
    """How many steps to time, after a warm-up of four.

    Returns:
        ``count``, or as many as take ``seconds``, but at least eight; a multiple of ``multiple``.
    """
    time_steps(step, 2, device)
    each = max(time_steps(step, 2, device)) / 1e3
    wanted = max(min(count, int(seconds / max(each, 1e-9))), min(8, count))
    return -(-wanted // multiple) * multiple


def time_once(function: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, from an idle device to an idle device."""
    synchronize(device)
    begin = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - begin


def time_prefill(
    function: Callable[[], object], seconds: float, device: torch.device
) -> list[float]:
    """Seconds of up to five calls, as many as take ``seconds``, but at least one."""
    times = [time_once(function, device)]
    more = min(int(seconds / max(times[0], 1e-9)), 5) - 1
    return times + [time_once(function, device) for _ in range(more)]


def summarize(times: Sequence[float]) -> dict[str, float]:
    """Median, mean and 99th percentile of ``ms_per_token``, by metric name."""
    return {
        "ms_per_token": float(np.median(times)),
        "ms_per_token_mean": float(np.mean(times)),
        "ms_per_token_p99": float(np.percentile(times, 99)),
    }


def measure_bandwidth(device: torch.device) -> float:
    """Bytes a second of a large copy, read and written counted: what the memory really gives."""
    size = 2**31 if device.type == "cuda" else 2**27
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = time_steps(lambda: target.copy_(source), 12, device)[2:]
    return 2 * size / (float(np.median(times)) / 1e3)
