"""An engine that makes nothing, at once: it measures the queue, and nothing else."""

from rushes.catalog.model import Model
from rushes.engines.base import Job, Produced, Report


class NoopEngine:
    """Ends every job in the moment it starts, without an output."""

    name = "noop"
    makes_files = False
    """An engine without this, or with True, must return a file of the kind that the model makes."""

    def warm(self, model: Model) -> None:
        """There is nothing to load."""

    def run(self, job: Job, report: Report) -> list[Produced]:
        """Return no files."""
        return []
