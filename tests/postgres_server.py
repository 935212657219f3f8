"""A real PostgreSQL of the tests' own, from Debian's package: a folder under /tmp, a free port, passwords required."""

import os
import pwd
import secrets
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

USER = "gr"


def programs() -> Path | None:
    """Return the folder of PostgreSQL's programs, None where it is not installed or nobody here may run it."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not found or (os.getuid() == 0 and (not shutil.which("runuser") or _owner() is None)):
        return None
    return found[-1].parent


def _owner() -> "pwd.struct_passwd | None":
    try:
        return pwd.getpwnam("postgres")
    except KeyError:
        return None


class PostgresServer:
    """A server that starts empty; `password` is secret enough to be searched for in whatever must not hold it."""

    def __init__(self) -> None:
        self.programs = programs()
        self.password = secrets.token_hex(12)
        self.folder = Path(tempfile.mkdtemp(prefix="gr-postgres-", dir="/tmp"))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        (self.folder / "password").write_text(self.password)
        if os.getuid() == 0:
            owner = _owner()
            for path in (self.folder, self.folder / "password"):
                os.chown(path, owner.pw_uid, owner.pw_gid)
        self._do("initdb", "-D", "data", "-U", USER, "--auth=scram-sha-256", "--pwfile=password", "--no-sync")
        self.start()

    def start(self) -> None:
        options = f"-k {self.folder} -p {self.port} -c listen_addresses=127.0.0.1 -c fsync=off"
        self._do("pg_ctl", "start", "-w", "-D", "data", "-l", "log", "-o", options)

    def stop(self) -> None:
        """Stop at once, as when the machine goes away: sessions are broken off."""
        self._do("pg_ctl", "stop", "-w", "-m", "immediate", "-D", "data")

    def database(self, name: str, *, over: str = "tcp") -> str:
        """Return the address of a new, empty database; over: `tcp` or `socket`."""
        self._do("createdb", "-h", str(self.folder), "-p", str(self.port), "-U", USER, name)
        return self.address(name, over=over)

    def address(self, name: str, *, over: str = "tcp", password: str | None = None) -> str:
        secret = self.password if password is None else password
        if over == "socket":
            return f"postgresql://{USER}:{secret}@/{name}?host={self.folder}&port={self.port}"
        return f"postgresql://{USER}:{secret}@127.0.0.1:{self.port}/{name}"

    def close(self) -> None:
        """Stop and delete everything."""
        subprocess.run(self._command("pg_ctl", "stop", "-m", "immediate", "-D", "data"), cwd=self.folder, check=False)
        shutil.rmtree(self.folder)

    def _command(self, program: str, *arguments: str) -> list[str]:
        # PostgreSQL refuses to run as root.
        as_owner = ["runuser", "-u", "postgres", "--"] if os.getuid() == 0 else []
        return [*as_owner, str(self.programs / program), *arguments]

    def _do(self, program: str, *arguments: str) -> None:
        # Into a file: a server that is started inherits the output, and a pipe would never end.
        with tempfile.TemporaryFile("w+") as output:
            done = subprocess.run(
                self._command(program, *arguments),
                cwd=self.folder,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | {"PGPASSWORD": self.password, "LC_ALL": "C"},
                timeout=60,
                check=False,
            )
            output.seek(0)
            text = output.read()
        assert done.returncode == 0, text
