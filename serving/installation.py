"""Where the model server's binary and its Python are, and a private backend folder that joins the two.

Invariant: nothing is written into the installed wheel; the private folder holds links alone and is removed at the stop.
"""

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from gr_platform import settings
from gr_platform.errors import UserError

_ASK = """
import json, sys, sysconfig
print(json.dumps([sysconfig.get_config_var("LIBDIR"), sysconfig.get_path("purelib"), "%d.%d" % sys.version_info[:2]]))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Installation:
    """The serving environment: its `bin` folder, libpython's folder, and the tritonserver tree of the wheel."""

    bin: Path
    library: Path
    tree: Path
    python_version: str

    @property
    def binary(self) -> Path:
        """The tritonserver executable."""
        return self.tree / "bin" / "tritonserver"

    def environment(self) -> dict[str, str]:
        """Return the environment of the server: models import from the venv first on PATH, whatever ours is."""
        inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
        libraries = filter(None, (str(self.library), os.environ.get("LD_LIBRARY_PATH")))
        return inherited | {
            "PATH": f"{self.bin}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
            "LD_LIBRARY_PATH": os.pathsep.join(libraries),
            # numpy would search the catalogue on every core, waiting in a loop for those that other models use.
            "OPENBLAS_NUM_THREADS": str(settings.num_threads()),
        }

    def link_backends(self, folder: Path) -> None:
        """Fill `folder` with the Python backend and the stub of the venv's Python version."""
        backend = folder / "python"
        backend.mkdir(parents=True)
        stub = self.tree / "python_backend_stubs" / self.python_version / "triton_python_backend_stub"
        for source in [*(self.tree / "backends" / "python").iterdir(), stub]:
            (backend / source.name).symlink_to(source)


def find_installation(python: Path) -> Installation:
    """Return the installation of the serving environment's Python. Raises UserError if it is missing or incomplete."""
    # The folder goes first: make setup takes one that is there for whole.
    advice = f"remove the folder {python.parent.parent.name} and run make setup"
    if not python.exists():
        raise UserError(f"the model server's environment {python.parent.parent.name} is missing; run make setup")
    try:
        answer = subprocess.run([python, "-c", _ASK], capture_output=True, text=True, check=True, timeout=30)
        library, packages, version = json.loads(answer.stdout)
    except (OSError, subprocess.SubprocessError, json.JSONDecodeError):
        raise UserError(f"the model server's Python does not run; {advice}") from None
    tree = Path(packages) / "pytriton" / "tritonserver"
    if not (tree / "bin" / "tritonserver").is_file():
        raise UserError(f"the nvidia-pytriton wheel with the tritonserver binary is not installed; {advice}")
    if not (tree / "python_backend_stubs" / version).is_dir():
        raise UserError(f"the tritonserver wheel has no Python {version} stub; use Python 3.11 or 3.12 and {advice}")
    return Installation(bin=python.parent, library=Path(library), tree=tree, python_version=version)
