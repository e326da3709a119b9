"""Where the extra time of 11 groups goes: a training step of Conditional DETR with 11 groups and with one, by operator.

    OMP_NUM_THREADS=1 python benchmarks step_profile

Times are those that ``torch.profiler`` gives to each operator itself, in one step after a first one that warms up.
Before that, page faults of a step are counted, with freed memory given back to the system, and kept.
"""

import resource
from collections.abc import Mapping

from torch.profiler import ProfilerActivity, profile

from groupdetr_fast.training.host_memory import keep_freed_memory
from harness.cases import DETECTION, Detection
from harness.documents import table
from harness.results import OURS

from . import bench_conditional_detr

__all__ = ["extra_times", "share_of_products"]

SHOWN = 15
# Parts of the names of operators whose operations flops.py counts: products of matrices, convolutions, attention.
PRODUCTS = ("mm", "convolution", "conv2d", "dot_product")


def extra_times(case: Detection, base: Detection) -> dict[str, float]:
    """Seconds that a step of ``case`` takes more than one of ``base``, by operator, most first."""
    of_case, of_base = _times(case), _times(base)
    extra = {name: of_case.get(name, 0.0) - of_base.get(name, 0.0) for name in of_case.keys() | of_base.keys()}
    return dict(sorted(extra.items(), key=lambda item: -item[1]))


def share_of_products(extra: Mapping[str, float]) -> float:
    """The part of the extra time that is spent on what the count of operations counts."""
    products = sum(seconds for name, seconds in extra.items() if any(part in name for part in PRODUCTS))
    return products / sum(extra.values())


def _times(case: Detection) -> dict[str, float]:
    step = bench_conditional_detr.prepare(case)[0][OURS]
    step()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        step()
    return {event.key: event.self_cpu_time_total / 1e6 for event in profiled.key_averages()}


def page_faults(case: Detection) -> int:
    """Pages that the system maps into this process during a step, after one that warms up."""
    step = bench_conditional_detr.prepare(case)[0][OURS]
    step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def main() -> None:
    cases = DETECTION[0], DETECTION[-1]
    given_back = [page_faults(case) for case in cases]
    if not keep_freed_memory():
        print("the C library does not keep freed memory here\n")
    kept = [page_faults(case) for case in cases]
    rows = [["given back", *map(str, given_back)], ["kept", *map(str, kept)]]
    print(table(["freed memory", *(f"page faults, {case}" for case in cases)], rows) + "\n")
    extra = extra_times(DETECTION[-1], DETECTION[0])
    rows = [[name, f"{seconds:.2f}"] for name, seconds in list(extra.items())[:SHOWN]]
    print(table(["operator", "extra time, s"], [*rows, ["all", f"{sum(extra.values()):.2f}"]]))
    print(f"\nproducts of matrices, convolutions and attention: {100 * share_of_products(extra):.0f} % of it")
