"""Telling dead processes and nodes, which are replaced, from faults that end a run."""

import logging

import ray
from ray.exceptions import (
    GetTimeoutError,
    ObjectLostError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)

from distributed.backend import RunFailed
from distributed.ray_calls import Slot

logger = logging.getLogger(__name__)

INFRASTRUCTURE = (RayActorError, ObjectLostError, WorkerCrashedError, GetTimeoutError)
"""What a dead process, node or link looks like; anything else that a task raises is a fault of the program or oracle."""


def cause(error: Exception) -> Exception:
    """What a failed call failed of: its own error, or that of an input that it waited for."""
    return error.cause if isinstance(error, RayTaskError) and isinstance(error.cause, Exception) else error


def raise_if_fault(error: Exception) -> None:
    """RunFailed for whatever a restart cannot mend: an exception raised by our code, a user's oracle, or a constructor."""
    if isinstance(error, RayActorError) and getattr(error, "actor_init_failed", False):
        raise RunFailed(f"an actor could not start: {last_line(error)}") from error
    if not isinstance(cause(error), INFRASTRUCTURE):
        raise RunFailed(last_line(error)) from error


def reason(error: Exception) -> str:
    """The telling line of a Ray error: why the process died, if it says so, or else its first line."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return next((line for line in lines if "exit detail" in line or "is dead because" in line), lines[0])[:300]


def node_died(error: Exception) -> bool:
    """Whether the process died because its node did."""
    return "node has died" in str(error) or "node was terminated" in str(error)


def count_death(slot: Slot, error: Exception, max_restarts: int) -> None:
    """Make room in `slot` for another actor; RunFailed if too many died by themselves, or of what a restart cannot mend."""
    raise_if_fault(error)
    if slot.restarts >= max_restarts:
        raise RunFailed(f"{slot.role} {slot.index} died {slot.restarts + 1} times; last: {reason(error)}")
    ray.kill(slot.handle, no_restart=True)
    slot.restarts += not node_died(error)  # nodes may come and go for days
    slot.incarnation += 1
    slot.silent_since = None
    logger.warning(
        "%s %d died (%s); restart %d of at most %d, incarnation %d",
        slot.role, slot.index, reason(error), slot.restarts, max_restarts, slot.incarnation,
    )  # fmt: skip


def last_line(error: Exception) -> str:
    """The line of a traceback that names the exception."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
