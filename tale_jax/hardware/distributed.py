"""Several processes that train one run together: which of them writes, and how they agree.

All processes run the same program, each on its own devices, after `jax.distributed.initialize`. They must take every
branch alike, so what one of them finds out alone (a measurement, a file, a signal) is agreed on here. Messages go by
JAX's coordination service, not by the devices: it waits for hours, where a first collective gives up after 30 s. With
one process nothing is sent.
"""

import itertools
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax._src import distributed  # the client of the coordination service has no public name

from tale_jax.utils.settings import format_value, mistake

TIMEOUT = 24 * 3600 * 1000  # ms; a process that died is noticed within a minute or two, and ends the others

_numbers = itertools.count()  # of messages, the same on every process


def is_main_process() -> bool:
    """Whether this process writes what a run has once: config, metrics, log, samples."""
    return jax.process_index() == 0


def from_main_process(action: Callable[[], Any]) -> Any:
    """What `action`, called on the main process alone, returns there; on every process.

    The result must be of JSON's types. A ValueError or OSError that it raises is raised on every process.
    """
    if jax.process_count() == 1:
        return action()
    client, key = _client(), _next_key()
    if is_main_process():
        try:
            result = action()
        except (ValueError, OSError) as error:
            client.key_value_set(key, json.dumps({"error": " ".join(str(error).split())}))
            raise
        client.key_value_set(key, json.dumps({"result": result}))
        return result
    message = json.loads(client.blocking_key_value_get(key, TIMEOUT))
    if "error" in message:
        raise ValueError(message["error"])
    return message["result"]


def any_process(flag: bool) -> bool:
    """Whether `flag` is set on any process. Waits for all of them."""
    if jax.process_count() == 1:
        return flag
    client, key = _client(), _next_key()
    client.key_value_set(f"{key}/{jax.process_index()}", str(int(flag)))
    client.wait_at_barrier(key, TIMEOUT)
    return any(value == "1" for _, value in client.key_value_dir_get(key))


def check_alike(settings: Mapping[str, Any]) -> None:
    """Raises ValueError, in one line and on every process, where one of them was started with other settings.

    `settings`: name → value of JSON's types, as this process was given them. Waits for all processes.
    """
    if jax.process_count() == 1:
        return
    client, key = _client(), _next_key()
    client.key_value_set(f"{key}/{jax.process_index()}", json.dumps(dict(settings)))
    client.wait_at_barrier(key, TIMEOUT)
    found = {int(name.rpartition("/")[2]): json.loads(text) for name, text in client.key_value_dir_get(key)}
    for index, theirs in sorted(found.items()):
        for name, value in theirs.items():
            if value != (first := found[0].get(name)):
                rule = f"be {format_value(first)} on process {index}, too, as on process 0"
                raise mistake(name, value, rule, "start all processes with the same flags and as many devices")


def wait_for_processes() -> None:
    """Returns when every process has called it."""
    any_process(False)


def _client() -> Any:
    return distributed.global_state.client


def _next_key() -> str:
    return f"tale_jax/{next(_numbers)}"
