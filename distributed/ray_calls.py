"""What the Ray backend remembers of its actors, of calls under way, and of batches that wait for the learner."""

from dataclasses import dataclass
from typing import Any


@dataclass
class Slot:
    """A place for an actor, and how often it was filled."""

    role: str
    index: int
    handle: Any
    incarnation: int
    restarts: int = 0

    @property
    def source(self) -> str:
        """Unique name of the present actor, under which its batches are deduplicated."""
        return f"{self.role}-{self.index}.{self.incarnation}"


@dataclass
class Pending:
    """A call under way."""

    kind: str
    slot: Slot
    handle: Any
    deadline: float
    batch: Any = None
    """Reference of the trajectories concerned."""
    count: int = 0
    """Their number, once known."""
    version: int = 0
    """Policy version that drew them."""
    weights: Any = None
    """update: reference of the new weights."""
    source: str = ""
    number: int = 0


@dataclass
class FreshBatch:
    """Trajectories that wait for the learner."""

    reference: Any
    count: int
    version: int
