"""A started model server as a value that any process can pick up from `serving/server.json`.

Invariant: a handle acts on its own instance only: its pid with its start time, and what carries its random name. An
external server belongs to somebody else: nothing here starts, stops or kills a process of it.
"""

import json
import re
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil
import tritonclient.grpc as grpcclient

from gr_platform import processes
from gr_platform.errors import UserError

LOG = "logs/tritonserver.log"
_SHARED_MEMORY = Path("/dev/shm")
_BACKENDS = "backends-"
_STUB = "triton_python_backend_stub"
_SWEEPS = 5
# gRPC by itself waits for up to two minutes before it looks again for a server that was gone.
_RECONNECT_MS = {"initial": 100, "min": 100, "max": 1000}


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerHandle:
    """A model server: where it listens and what identifies it. `admin_key` opens model control; keep it private.

    owner_pid, owner_create_time: the program that started it and stops it when it ends itself; of an external server,
    which has no pid here, the program that watches it.
    """

    home: Path
    pid: int
    create_time: float
    instance: str
    grpc_address: str
    http_address: str
    metrics_address: str
    admin_key: str
    owner_pid: int
    owner_create_time: float
    external: bool = False

    @property
    def orphaned(self) -> bool:
        """Whether the program that started the server is gone, so that nobody watches it or will stop it."""
        return processes.find(self.owner_pid, self.owner_create_time) is None

    @property
    def backend_folder(self) -> Path:
        """The private folder of links to the server's backends."""
        return self.home / "serving" / f"{_BACKENDS}{self.instance}"

    @property
    def admin_headers(self) -> dict[str, str]:
        """The gRPC headers that restricted calls need."""
        return {"triton-grpc-protocol-admin-key": self.admin_key} if self.admin_key else {}

    @property
    def alive(self) -> bool:
        """Whether this very process still runs; of an external server, whether somebody here still watches it."""
        return not self.orphaned if self.external else processes.find(self.pid, self.create_time) is not None

    def with_process(self, pid: int) -> "ServerHandle":
        """Return the handle with a process just started."""
        return replace(self, pid=pid, create_time=psutil.Process(pid).create_time())

    def to_json(self) -> str:
        """Return the text of server.json."""
        fields = asdict(self)
        del fields["home"]
        return json.dumps(fields, indent=1) + "\n"

    def is_ready(self, models: tuple[str, ...] = ()) -> bool:
        """Return whether the server answers and has these models ready."""
        try:
            with grpcclient.InferenceServerClient(self.grpc_address) as client:
                return client.is_server_ready(client_timeout=2) and all(
                    client.is_model_ready(model, client_timeout=2) for model in models
                )
        except grpcclient.InferenceServerException:
            return False

    def connect(self) -> grpcclient.InferenceServerClient:
        """Return a new connection to the server's gRPC port, which finds a restarted server again within a second."""
        arguments = [(f"grpc.{name}_reconnect_backoff_ms", ms) for name, ms in _RECONNECT_MS.items()]
        return grpcclient.InferenceServerClient(self.grpc_address, channel_args=arguments)

    def stubs(self, model: str) -> set[psutil.Process]:
        """Return the processes that run a model's Python code here, those of a load that is under way among them."""
        return {
            process
            for process in _carrying(self.instance)
            if _STUB in process.info["cmdline"][0] and f"/{model}/" in process.info["cmdline"][1]
        }

    def stop(self, grace_s: float = 20.0) -> None:
        """Stop the server: SIGTERM, after `grace_s` SIGKILL, then remove what it left. Does nothing if it is gone.

        An external server runs on; its record goes.
        """
        if not self.external and (process := processes.find(self.pid, self.create_time)) is not None:
            processes.stop([process], grace_s=grace_s)
        remove_leftovers(self.home, self)


def record_path(home: Path) -> Path:
    """Return where the running server of a state folder is written down."""
    return home / "serving" / "server.json"


def read_record(home: Path) -> ServerHandle | None:
    """Return the server written down, running or not; None if there is none."""
    try:
        return ServerHandle(home=home, **json.loads(record_path(home).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        raise UserError("$GR_HOME/serving/server.json is damaged; delete it") from None


def attach(home: Path) -> ServerHandle | None:
    """Return the running server of a state folder, or None."""
    handle = read_record(home)
    return handle if handle is not None and handle.alive else None


def remove_leftovers(home: Path, handle: ServerHandle) -> None:
    """End the stubs of a stopped server and remove its shared memory, its backend folder and its record."""
    if not handle.external:
        _remove_instance(home, handle.instance)
    recorded = read_record(home)
    if recorded is not None and recorded.instance == handle.instance:
        record_path(home).unlink(missing_ok=True)


def sweep(home: Path) -> list[str]:
    """End and remove every model server that a killed program left in a state folder; return their instance names.

    Nothing else may start or stop a server here meanwhile. The backend folder is made before the process, so a server
    that was killed, or whose starter was, before any record named it is found as well.
    """
    recorded = read_record(home)
    found = [folder.name.removeprefix(_BACKENDS) for folder in (home / "serving").glob(f"{_BACKENDS}*")]
    for instance in found:
        _remove_instance(home, instance)
    if recorded is not None:
        remove_leftovers(home, recorded)
    return found


def _remove_instance(home: Path, instance: str) -> None:
    # A server that is killed may have started a process more since it was looked at; that one starts no others.
    for _ in range(_SWEEPS):
        if not (left := _carrying(instance)):
            break
        processes.kill(left)
    for file in _SHARED_MEMORY.glob(f"{instance}*"):
        file.unlink(missing_ok=True)
    shutil.rmtree(home / "serving" / f"{_BACKENDS}{instance}", ignore_errors=True)


def _carrying(instance: str) -> list[psutil.Process]:
    """Return the processes, the server and its stubs, that have the instance's random name in their arguments."""
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if any(instance in argument for argument in process.info["cmdline"] or ())
    ]


def last_useful_line(text: str) -> str | None:
    """Return why a model or the server failed, out of its log or error text, without paths; None if it does not say."""
    patterns = (
        r"failed to load '\w+' version \d+: \w+: (?:\w*(?:Error|Exception): )?([^\n\"]+)",
        r"UNAVAILABLE(?: state)?: \w+: (?:\w*(?:Error|Exception): )?([^\n\"]+)",
        r"\nerror: creating server: [\w ]+ - ([^\n]+)",
        r"\nE\d{4} [^\]]*\] \"?([^\n\"]+)",
    )
    # The log writes a message's line ends as two characters.
    text = "\n" + text.replace("\\n", "\n")
    for pattern in patterns:
        if found := re.findall(pattern, text):
            return re.sub(r"(?<!\w)/\S*/", "", found[-1]).strip().rstrip(".;")
    return None
