"""What a run does when something goes wrong: spikes, ranks that stall, starts after a failure.

The `faults` section of a run's page; docs/faults.md tells what happens when.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Faults:
    """What counts as a fault and what follows."""

    spike_z: float = 0.0
    """A step whose loss or gradient norm lies so many robust deviations (1.4826 x the median
    deviation) above the median of the steps before it is a spike; 8 is a good value, 0 looks for
    none (损失尖峰)."""
    window_steps: int = 128
    """Steps that the median is taken over; judging begins with a quarter of them."""
    do: Literal["report", "rewind"] = "rewind"
    """report: a spike's samples are written to RUN/faults and the run goes on; rewind: the run also
    goes back to its newest checkpoint and passes over exactly those samples, which is recorded. A
    loss that is not finite is passed over likewise, where spike_z is above 0."""
    most_rewinds: int = 8
    """After so many the run ends: it is the settings, not the data."""
    stall_s: float = 1800.0
    """A rank that finishes no step for so long has stalled: every rank writes its stack to RUN/logs
    and the job ends; 0 waits for ever. Saving, validating and starting count as steps (超时)."""
    restarts: int = 0
    """How often `launch train` starts the job again after a rank died or stalled, on several
    machines the Slurm file; a job that ended with a sentence for the user is not started again
    (自动重启次数)."""

    def problems(self) -> list[str]:
        """Numbers outside their range."""
        found = [
            f"{name}: is {getattr(self, name)}, must not be negative"
            for name in ("spike_z", "most_rewinds", "stall_s", "restarts")
            if getattr(self, name) < 0
        ]
        if self.window_steps < 8:
            found.append(f"window_steps: is {self.window_steps}, must be at least 8")
        return found
