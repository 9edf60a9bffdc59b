"""Where the time of one start of a run goes: phase by phase, and the rest."""

import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

OF_STEP = {"seconds_generate": "sampling", "seconds_score": "scoring", "seconds_update": "updating"}
PHASES = (*OF_STEP.values(), "evaluating", "saving")


class PhaseTimes:
    """Seconds spent in each phase since this was made; phases do not overlap."""

    def __init__(self) -> None:
        """Start the clock."""
        self.started = time.perf_counter()
        self.seconds = dict.fromkeys(PHASES, 0.0)

    def add_step(self, row: dict[str, float]) -> None:
        """Add what a step measured itself: the columns seconds_* of its row of metrics.csv."""
        for column, phase in OF_STEP.items():
            self.seconds[phase] += row[column]

    @contextmanager
    def measured(self, phase: str) -> Iterator[None]:
        """Count the time within as that of a phase."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] += time.perf_counter() - begun

    def line(self, first_step: int) -> str:
        """How long it took and the share of each phase; first_step says where a resumed run went on."""
        total = time.perf_counter() - self.started
        seconds = self.seconds | {"the rest": total - sum(self.seconds.values())}
        # running sums are rounded, and not shares: so the shares add up to 100
        ends = [round(100 * end / total) for end in itertools.accumulate(seconds.values())]
        shares = [end - begin for begin, end in itertools.pairwise([0, *ends])]
        since = "training" if first_step == 1 else f"training from step {first_step} on"
        phases = ", ".join(f"{phase} {share} %" for phase, share in zip(seconds, shares, strict=True))
        return f"{since} took {timedelta(seconds=round(total))}: {phases}"
