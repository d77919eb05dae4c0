"""What the benchmarks share: rounds in which variants take turns, ratios round by round, and peak memory."""

import resource
import statistics
import threading
import time
from collections.abc import Callable, Mapping

import torch

Work = Callable[[], object]


def seconds(variants: Mapping[str, Work], rounds: int, tidy: Work = lambda: None) -> dict[str, list[float]]:
    """Seconds of each variant in each round. They take turns, so that a machine whose speed drifts slows them all.

    Args:
        tidy: What is done before each, and not counted.
    """
    found: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            tidy()
            wait()
            started = time.perf_counter()
            run()
            wait()
            found[name].append(time.perf_counter() - started)
    return found


def ratio(times: list[float], base: list[float]) -> float:
    """Median of the ratios of each round."""
    return round(statistics.median(a / b for a, b in zip(times, base, strict=True)), 3)


def wait() -> None:
    """Until the GPU has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_extra_bytes(run: Work, device: torch.device) -> int:
    """The most memory that a run takes beyond what was held before it: the allocator's count on a GPU, the resident set,
    looked at every millisecond, on a CPU. Also the warm-up."""
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    before, peak, ended = resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.001):
            peak = max(peak, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    run()
    ended.set()
    watcher.join()
    return max(0, peak - before)


def resident() -> int:
    """Bytes of this process that lie in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()
