"""Peak of the memory that torch holds on the CPU."""

from torch.profiler import ProfilerActivity, profile


def peak_bytes(function):
    """Largest number of bytes that torch's CPU allocator gave out during ``function()``, beyond those before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert events, "the profiler recorded no memory"
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
