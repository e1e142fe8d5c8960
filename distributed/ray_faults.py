"""Telling dead processes and nodes, which are replaced, from faults that end a run."""

from ray.exceptions import (
    ActorUnavailableError,
    GetTimeoutError,
    ObjectLostError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)

from distributed.backend import RunFailed

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
    """Whether the process died because its node did, or cannot be reached, as when the node is about to be found dead."""
    unreachable = isinstance(error, ActorUnavailableError) or isinstance(cause(error), ActorUnavailableError)
    return unreachable or "node has died" in str(error) or "node was terminated" in str(error)


def last_line(error: Exception) -> str:
    """The line of a traceback that names the exception."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
