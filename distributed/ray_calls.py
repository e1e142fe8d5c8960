"""What the Ray backend remembers of its actors, of calls under way, and of batches that wait for the learner."""

import time
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

import ray

RETRY_SECONDS = 1.0
"""How long an actor that could not be reached is left alone."""


@dataclass(eq=False)
class Slot:
    """A place for an actor, and how often it was filled."""

    role: str
    index: int
    handle: Any
    incarnation: int
    restarts: int = 0
    num_calls: int = 0
    """Calls under way."""
    heard: float = 0.0
    """When a call ended last."""
    silent_since: float | None = None
    """When it could not be reached for the first time; None while it answers."""
    retry_at: float = 0.0
    """When it may be called again."""

    @property
    def source(self) -> str:
        """Unique name of the present actor, under which its batches are deduplicated."""
        return f"{self.role}-{self.index}.{self.incarnation}"

    def leave_alone(self) -> float:
        """After it could not be reached; returns for how many seconds it has been so."""
        now = time.monotonic()
        self.silent_since = self.silent_since or now
        self.retry_at = now + RETRY_SECONDS
        return now - self.silent_since


@dataclass(eq=False)
class Pending:
    """A call under way."""

    kind: str
    slot: Slot
    handle: Any
    batch: Any = None
    """rollout, add: reference of the trajectories."""
    count: int = 0
    """add: their number."""
    fresh: list["FreshBatch"] = field(default_factory=list)
    """update: what it trains on."""
    weights: Any = None
    """update: reference of the new weights."""
    source: str = ""
    number: int = 0
    since: float = field(default_factory=time.monotonic)
    """When it was made."""


@dataclass
class FreshBatch:
    """Trajectories that wait for the learner."""

    reference: Any
    count: int
    version: int
    """Policy version that drew them."""


class Calls:
    """The calls under way, by the reference of their answer."""

    def __init__(self, timeout_seconds: float):
        self._timeout = timeout_seconds
        self._calls: dict[Any, Pending] = {}
        self._kinds: Counter[str] = Counter()

    def add(self, reference: Any, call: Pending) -> None:
        """Remember a call that was just made."""
        self._calls[reference] = call
        self._kinds[call.kind] += 1
        call.slot.num_calls += 1

    def pop(self, reference: Any) -> Pending:
        """Forget a call that ended."""
        call = self._calls.pop(reference)
        self._kinds[call.kind] -= 1
        call.slot.num_calls -= 1
        call.slot.heard = time.monotonic()
        return call

    def __len__(self) -> int:
        return len(self._calls)

    def __contains__(self, reference: Any) -> bool:
        return reference in self._calls

    def count(self, kind: str) -> int:
        """Calls of that kind under way."""
        return self._kinds[kind]

    def take(self, kinds: Collection[str] = (), slots: Iterable[Slot] | None = None) -> list[Pending]:
        """Forget and return all calls of these kinds, or to these slots."""
        places = {id(slot) for slot in slots or ()}
        chosen = [r for r, call in self._calls.items() if call.kind in kinds or id(call.slot) in places]
        return [self.pop(reference) for reference in chosen]

    def ended(self, seconds: float) -> list[Any]:
        """References of the calls that ended; if there are none yet, waits so long for one."""
        asked = list(self._calls)
        if not asked:  # every actor is left alone for now
            time.sleep(seconds)
            return []
        ready, _ = ray.wait(asked, num_returns=1, timeout=seconds, fetch_local=False)
        if ready and len(asked) > 1:  # all that are there: with thousands of actors a look at each call is not free
            ready, _ = ray.wait(asked, num_returns=len(asked), timeout=0, fetch_local=False)
        return ready

    def overdue(self) -> list[Any]:
        """References of the calls to actors that have not ended any call for too long, and of those that others overtook."""
        now = time.monotonic()
        return [
            reference
            for reference, call in self._calls.items()
            if now - max(call.since, call.slot.heard) > self._timeout
            or now - call.since > self._timeout * (call.slot.num_calls + 1)
        ]
