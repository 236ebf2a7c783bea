"""How many threads compute, and how they wait for each other."""

import os

from .terminal import note

# Turns that a thread of GNU OpenMP waits in a loop before it sleeps; it takes 300,000 by itself. Where the
# cores are shared, that loop keeps the core from the very thread that is waited for: bench/NOTES.md.
SPIN_COUNT = "1000"


def set_waiting() -> None:
    """To be called before torch is loaded. What the user's environment says of it holds."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)


def set_count(count: int | None) -> None:
    """None leaves torch's own: OMP_NUM_THREADS, or the cores."""
    if count is not None:
        import torch

        torch.set_num_threads(count)


def hint() -> None:
    """After the work, which itself is a load of one a core at most: a note if others want the cores too."""
    import torch

    load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    if load > 1.5 * cores and torch.get_num_threads() > 1:
        note(f"the machine is busy (load average {load:.1f}, {cores} cores): --threads 1 may be faster")
