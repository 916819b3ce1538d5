"""What of a run is looked at more closely: its `monitor` section (docs/monitoring.md)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Monitoring:
    """Looks that cost something, and when they are taken."""

    parts_every_steps: int = 100
    """Steps between the norms of gradients, and of updates beside weights, by part of the model;
    an update that is measured keeps a copy of its fp32 weights meanwhile, so the first one of a
    start and of a stage is measured too; 0: none (分部位范数)."""
    profile_steps: tuple[int, int] | None = None
    """First and last step that torch's profiler records, e.g. [100, 103]: a Chrome trace of each
    rank and a table of operations in RUN/profiles. `echo 100 103 > RUN/profile` asks a run that is
    on its way for the same; null: none (性能剖析)."""

    def problems(self) -> list[str]:
        """Numbers outside their range."""
        found = []
        if self.parts_every_steps < 0:
            found.append(f"parts_every_steps: is {self.parts_every_steps}, must not be negative")
        if (
            self.profile_steps is not None
            and not 0 < self.profile_steps[0] <= self.profile_steps[1]
        ):
            first, last = self.profile_steps
            found.append(
                f"profile_steps: [{first}, {last}] are no steps, must be 1 <= first <= last "
                "(步数范围无效)"
            )
        return found
