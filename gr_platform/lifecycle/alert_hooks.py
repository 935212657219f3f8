"""What an operator has called when something is wrong: a command (GR_ALERT_COMMAND), an address (GR_ALERT_URL).

Invariant: each ends within its limit, and what it did wrong is a sentence without the address, its answer or an
exception's text: any of them may hold a secret.
"""

import json
import logging
import os
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

from gr_platform import settings

COMMAND_S = 10.0
CONNECT_S, ANSWER_S, POST_S = 3.0, 10.0, 20.0
_PAUSES_S = (0.5, 1.0)


def run(alert: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Call what is set and yield (hook, what went wrong) of each that failed.

    The command gets the subject as the first line of its input and the alert as JSON in the second; the address gets
    the JSON.
    """
    if (command := settings.alert_command()) and (problem := run_command(command, alert)):
        yield "command", problem
    if (url := settings.alert_url()) and (problem := post(url, alert)):
        yield "url", problem


def run_command(command: str, alert: Mapping[str, Any]) -> str:
    """Run a command line without a shell; return what went wrong, '' if it ended with status 0 in time."""
    try:
        arguments = shlex.split(command)
    except ValueError:
        return "GR_ALERT_COMMAND has a quote that is not closed"
    text = f"{alert['subject']}\n{json.dumps(alert, ensure_ascii=False)}\n"
    null = subprocess.DEVNULL
    try:
        # In a session of its own, so that what it starts can be ended with it.
        child = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=null, stderr=null, start_new_session=True)
    except (OSError, ValueError, IndexError):
        return "the command cannot be started; is it there, and executable?"
    try:
        child.communicate(text.encode(), timeout=COMMAND_S)
    except subprocess.TimeoutExpired:
        return f"the command took longer than {COMMAND_S:.0f} s and was ended"
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    return f"the command ended with status {child.returncode}" if child.returncode else ""


def post(url: str, alert: Mapping[str, Any]) -> str:
    """Send JSON to an address; return what went wrong, '' if the answer was a success in time."""
    outcome: list[str] = []
    # The library's limits are for each read, so a server that sends byte by byte would hold the caller for ever.
    worker = threading.Thread(target=lambda: outcome.append(_post(url, alert)), name="gr-alert", daemon=True)
    worker.start()
    worker.join(POST_S)
    return outcome[0] if outcome else f"gave no whole answer in {POST_S:.0f} s"


def _post(url: str, alert: Mapping[str, Any]) -> str:
    import requests

    if not url.startswith(("https://", "http://")):
        return "GR_ALERT_URL must begin with https:// or http://"
    # At its most talkative it logs the path, which is the secret of most such addresses.
    logging.getLogger("urllib3.connectionpool").setLevel(logging.INFO)
    for pause_s in (*_PAUSES_S, None):
        try:
            answer = requests.post(url, json=alert, timeout=(CONNECT_S, ANSWER_S), allow_redirects=False, stream=True)
        except requests.ConnectionError as error:
            if pause_s is None:
                return f"could not be reached in {len(_PAUSES_S) + 1} tries ({type(error).__name__})"
            time.sleep(pause_s)
            continue
        except (requests.RequestException, ValueError) as error:
            return f"was not told ({type(error).__name__})"
        answer.close()
        return "" if 200 <= answer.status_code < 300 else f"answered with status {answer.status_code}"
    raise AssertionError("the last try returns")
