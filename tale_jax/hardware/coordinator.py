"""JAX's coordination service, in a process of its own beside process 0 of a run.

Processes meet at it, and tell one another by it whether they are still there. In process 0, where JAX would start it,
it would end with that process: then JAX aborts all others at once, and none of them can say why. Here it outlives
process 0 by a minute, in which they do.

    coordinator = Coordinator("node1:8476", 4)     # it listens when this returns
    coordinator.shutdown()                         # when all have left
"""

import signal
import sys
import threading
from typing import Any

OUTLIVES_SECONDS = 60.0
START_SECONDS = 40.0


class Coordinator:
    """The service at an address, for so many processes; it ends a minute after this process, whatever that one does.

    Raises ValueError, in one line, when it cannot listen there.
    """

    def __init__(self, address: str, num_processes: int):
        from tale_jax.utils.subprocesses import Companion

        self._companion = Companion("tale_jax.hardware.coordinator", address, str(num_processes))
        answer = self._companion.read_line(START_SECONDS)
        if answer != "ready":
            self._companion.close()
            port = address.rpartition(":")[2]
            raise ValueError(
                f"coordinator_address={address} must have a port that is free on this machine, where process 0 runs "
                f"({answer or 'no answer'}); give another one in place of {port}"
            )

    def shutdown(self) -> None:
        """Ends the service; the other processes must have left it."""
        self._companion.write_line("end")
        self._companion.close()


def _library() -> Any:
    """The part of jaxlib that has the service: importing jax would take longer."""
    try:
        from jaxlib import _jax as library  # pyright: ignore[reportAttributeAccessIssue]
    except ImportError:  # before jaxlib 0.6
        from jaxlib import xla_extension as library  # pyright: ignore[reportAttributeAccessIssue]
    return library


def _serve(address: str, num_processes: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):  # meant for those who train
        signal.signal(number, signal.SIG_IGN)
    try:
        service = _library().get_distributed_runtime_service(f"[::]:{address.rpartition(':')[2]}", num_processes)
    except Exception as error:  # whatever jaxlib raises
        print(" ".join(str(error).split())[:200], flush=True)
        return
    print("ready", flush=True)
    if sys.stdin.readline().strip() == "end":
        service.shutdown()
    else:
        threading.Event().wait(OUTLIVES_SECONDS)


if __name__ == "__main__":
    _serve(sys.argv[1], int(sys.argv[2]))
