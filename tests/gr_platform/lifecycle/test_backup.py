"""What a backup holds comes back, elsewhere too; whatever is wrong with an archive or a disk, nothing is half there."""

import io
import json
import os
import socket
import sqlite3
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from gr_platform import settings, storage
from gr_platform.errors import UserError, sentence_for
from gr_platform.events.landing import active_dataset
from gr_platform.lifecycle import archive, backup, migration
from gr_platform.registry import tracking, versions
from gr_platform.sequences.vocabulary import Vocabulary

DS = "shop"
HISTORIES = f"histories/{DS}.sqlite"
LEFT_OUT = ("logs/gr.log", "services.json", "serving/server.json", ".stages.lock", f"runs/{DS}/.building-x/part")


def _database(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA journal_mode=WAL")
        database.execute("CREATE TABLE moved (one INTEGER, other INTEGER)")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A state folder with a registered model, a server's files and what is not worth keeping. Read it only."""
    home = tmp_path_factory.mktemp("state") / "home"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GR_HOME", str(home))
        for name in ("DAGSTER_HOME", settings.MLFLOW_DB, settings.DAGSTER_DB):
            patch.delenv(name, raising=False)
        for name in (HISTORIES, "mlflow.db", "dagster_home/history/runs.db"):
            _database(home / name)
        for name in (*LEFT_OUT, f"landing/{DS}/dataset.toml", "model_repositories/pair-1/config.pbtxt", "state.json"):
            storage.write_text(home / name, '{"layout": 1}')
        (home / "landing" / DS / "log.parquet").write_bytes(os.urandom(1 << 20))
        (home / "model_repository").symlink_to("model_repositories/pair-1")
        (home / "elsewhere").symlink_to("/etc/passwd")
        (home / "user-hash.key").touch(0o600)
        (home / "served").mkdir(0o700)
        os.utime(home / "served", (1e9, 1e9))
        with socket.socket(socket.AF_UNIX) as listener:
            os.chdir(home)  # such a name may be 100 characters long at most
            listener.bind("a.sock")
        yield home
        os.chdir(settings.PROJECT_ROOT)


@pytest.fixture(params=archive.ENDINGS)
def saved(home: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    path = tmp_path / f"saved{request.param}"
    backup.backup(home, path, progress=False)
    return path


def _contents(folder: Path) -> dict[str, object]:
    """Return name -> what of it a copy must have: kind, mode, time, text; of databases the rows alone."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name, stat = str(path.relative_to(folder)), path.lstat()
        if path.is_symlink():
            found[name] = os.readlink(path)
        elif path.is_dir():
            # Reading a database touches the folder that it lies in.
            found[name] = (stat.st_mode, 0 if any(path.glob("*.sqlite")) or any(path.glob("*.db")) else stat.st_mtime)
        elif path.is_file() and name.endswith((".db", ".sqlite")):
            with closing(sqlite3.connect(path)) as database:
                found[name] = (stat.st_mode, list(database.iterdump()))
        elif path.is_file():
            found[name] = (stat.st_mode, stat.st_mtime, path.read_bytes())
    return found


def _is_kept(name: str) -> bool:
    left = ("logs", "services.json", "serving", "elsewhere", f"runs/{DS}/.building-x")
    return not name.endswith((".lock", "-wal", "-shm")) and not any(
        name == each or name.startswith(f"{each}/") for each in left
    )


def test_what_is_restored_elsewhere_is_what_was_there_and_nothing_else(home: Path, saved: Path, tmp_path: Path) -> None:
    assert saved.stat().st_mode & 0o777 == 0o600
    other = tmp_path / "other"
    done = backup.restore(other, saved, progress=False)
    assert done.header.home == str(home)
    there, expected = _contents(other), _contents(home)
    assert {name for name in there if _is_kept(name)} == {name for name in expected if _is_kept(name)}
    assert {name: there[name] for name in there if _is_kept(name)} == {n: expected[n] for n in expected if _is_kept(n)}
    assert {name for name in there if not _is_kept(name)} == {".restore.lock"}
    assert [path.name for path in saved.parent.iterdir() if path.name.startswith(".gr-")] == []


def test_a_registered_model_is_loaded_from_where_it_was_restored_and_answers_the_same(
    pipeline_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow
    import pandas as pd

    monkeypatch.setenv("GR_HOME", str(pipeline_home))
    saved, other = tmp_path / "saved.tar.zst", tmp_path / "a folder"
    backup.backup(pipeline_home, saved, progress=False)
    assert backup.restore(other, saved, progress=False).relocated >= 7
    with closing(sqlite3.connect(other / "mlflow.db")) as database:
        assert [line for line in database.iterdump() if pipeline_home.as_uri() in line] == []
    items = [
        int(item) for item in Vocabulary.load(next(other.glob("bundles/*/retrieval-*/vocabulary.parquet"))).item_ids[:2]
    ]
    asked = {"history_items": items, "history_actions": [1, 1], "history_times": [10, 20], "request_time": 30}
    answers = []
    for home in (pipeline_home, other):
        client, name = tracking.connect(home), versions.model_name(active_dataset(home), "retrieval")
        assert f"{home.as_uri()}/mlartifacts/" in client.get_model_version_download_uri(name, "1")
        answers.append(mlflow.pyfunc.load_model(f"models:/{name}/1").predict(pd.DataFrame([asked])))
    assert str(answers[0]) == str(answers[1])


@pytest.mark.parametrize("moves", [0, 1, 5])
def test_a_restore_killed_between_its_moves_blocks_every_command_and_is_finished_by_the_next(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moves: int
) -> None:
    saved, other = tmp_path / "saved.tar.zst", tmp_path / "other"
    backup.backup(home, saved, progress=False)
    real, done = os.rename, []

    def until_killed(source: Path, target: Path) -> None:
        if len(done) == moves:
            raise KeyboardInterrupt
        done.append(source)
        real(source, target)

    monkeypatch.setattr(backup.os, "rename", until_killed)
    with pytest.raises(KeyboardInterrupt):
        backup.restore(other, saved, progress=False)
    monkeypatch.undo()
    with pytest.raises(UserError, match="stopped half-way"):
        migration.require_readable(other)
    backup.restore(other, saved, progress=False)
    migration.require_readable(other)
    assert {name for name in _contents(other) if _is_kept(name)} == {name for name in _contents(home) if _is_kept(name)}


def test_a_copy_taken_while_others_write_holds_one_moment(home: Path, tmp_path: Path) -> None:
    stopping, counts = threading.Event(), []

    def write() -> None:
        with closing(sqlite3.connect(home / HISTORIES, timeout=30)) as database:
            while not stopping.is_set():
                number = len(counts)
                database.execute("INSERT INTO moved VALUES (?, NULL)", (number,))
                database.execute("UPDATE moved SET other = one WHERE one = ?", (number,))
                database.commit()
                counts.append(number)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for number in range(5):
            backup.backup(home, tmp_path / f"{number}.tar.gz", progress=False)
    finally:
        stopping.set()
        writer.join()
    seen = []
    for number in range(5):
        backup.restore(tmp_path / str(number), tmp_path / f"{number}.tar.gz", progress=False)
        with closing(sqlite3.connect(tmp_path / str(number) / HISTORIES)) as database:
            assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            torn, rows, last = database.execute(
                "SELECT sum(other IS NULL), count(*), max(one) + 1 FROM moved"
            ).fetchone()
            assert (torn, rows) == (0, last)
            seen.append(rows)
    assert seen == sorted(set(seen))


def _left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock")) if folder.exists() else []


def _refused(saved: Path, home: Path) -> str:
    with pytest.raises(UserError) as refused:
        backup.restore(home, saved, progress=False)
    assert _left(home) == []
    return str(refused.value)


@pytest.mark.parametrize("part", [0.0, 0.01, 0.3, 0.9, 0.999])
def test_an_archive_that_is_cut_off_is_refused_whole(saved: Path, tmp_path: Path, part: float) -> None:
    content = saved.read_bytes()
    saved.write_bytes(content[: int(len(content) * part)])
    assert saved.name in _refused(saved, tmp_path / "other")


@pytest.mark.parametrize("part", [0.001, 0.2, 0.5, 0.8])
def test_an_archive_with_changed_bytes_is_refused_whole(saved: Path, tmp_path: Path, part: float) -> None:
    content = bytearray(saved.read_bytes())
    at = int(len(content) * part)
    content[at : at + 64] = bytes(255 - byte for byte in content[at : at + 64])
    saved.write_bytes(content)
    assert saved.name in _refused(saved, tmp_path / "other")


def _rewritten(saved: Path, change: Callable[[list[tuple[tarfile.TarInfo, bytes]]], None]) -> None:
    """Write an archive anew after changing its members."""
    with tarfile.open(saved) as tar:
        members = [(each, stream.read() if (stream := tar.extractfile(each)) else b"") for each in tar]
    change(members)
    with tarfile.open(saved, "w:gz") as tar:
        for member, content in members:
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def _member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


@pytest.mark.parametrize(
    "members",
    [
        [_member("/tmp/gr-escaped")],
        [_member("../gr-escaped")],
        [_member("runs/../../gr-escaped")],
        [_member("runs/.."), _member("gr-escaped")],
        [_member("away", tarfile.SYMTYPE, "/tmp")],
        [_member("runs/away", tarfile.SYMTYPE, "../../..")],
        [_member("away", tarfile.SYMTYPE, "runs"), _member("away/gr-escaped")],
        [_member("runs/hard", tarfile.LNKTYPE, "/etc/passwd")],
        [_member("device", tarfile.CHRTYPE)],
        [_member("pipe", tarfile.FIFOTYPE)],
        [_member("twice"), _member("twice")],
    ],
    ids=lambda members: members[-1].name + (f"->{members[-1].linkname}" if members[-1].linkname else ""),
)
def test_an_archive_that_leads_out_of_the_folder_writes_nothing(
    home: Path, tmp_path: Path, members: list[tarfile.TarInfo]
) -> None:
    saved = tmp_path / "saved.tar.gz"
    backup.backup(home, saved, progress=False)

    def smuggle(there: list[tuple[tarfile.TarInfo, bytes]]) -> None:
        there[1:1] = [(member, b"") for member in members]
        listed = json.loads(there[-1][1])
        empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
        listed |= {member.name: empty for member in members if member.isreg()}
        there[-1] = (there[-1][0], json.dumps(listed).encode())

    _rewritten(saved, smuggle)
    _refused(saved, tmp_path / "deep" / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "saved.tar.gz"]
    assert not Path("/tmp/gr-escaped").exists()


def test_a_file_that_the_list_does_not_name_or_names_otherwise_is_refused(home: Path, tmp_path: Path) -> None:
    saved = tmp_path / "saved.tar.gz"
    backup.backup(home, saved, progress=False)
    _rewritten(saved, lambda there: there.insert(3, (_member("more"), b"")))
    assert "not those of its list" in _refused(saved, tmp_path / "other")


@pytest.mark.parametrize(("field", "value"), [("format", 2), ("layout", migration.LAYOUT + 1)])
def test_an_archive_of_a_newer_release_is_refused(home: Path, tmp_path: Path, field: str, value: int) -> None:
    saved = tmp_path / "saved.tar.gz"
    backup.backup(home, saved, progress=False)

    def renew(there: list[tuple[tarfile.TarInfo, bytes]]) -> None:
        there[0] = (there[0][0], json.dumps(json.loads(there[0][1]) | {field: value}).encode())

    _rewritten(saved, renew)
    assert "newer release" in _refused(saved, tmp_path / "other")


def test_nothing_is_restored_over_what_is_there(home: Path, saved: Path) -> None:
    before = {name: of for name, of in _contents(home).items() if _is_kept(name)}
    with pytest.raises(UserError, match="not empty"):
        backup.restore(home, saved, progress=False)
    assert {name: of for name, of in _contents(home).items() if _is_kept(name)} == before


@pytest.mark.parametrize(("name", "expected"), [("a.zip", "must end in"), ("there.tar.gz", "there already")])
def test_a_name_that_cannot_be_taken_is_refused(home: Path, tmp_path: Path, name: str, expected: str) -> None:
    (tmp_path / "there.tar.gz").touch()
    with pytest.raises(UserError, match=expected):
        backup.backup(home, tmp_path / name, progress=False)
    with pytest.raises(UserError, match="state folder"):
        backup.backup(home, home / "inside.tar.gz", progress=False)
    assert _left(tmp_path) == ["there.tar.gz"]


def test_a_full_disk_leaves_no_archive_and_is_one_sentence(home: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(small)]
    if os.getuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        for ending in archive.ENDINGS:
            with pytest.raises(UserError, match=f"the disk of saved{ending} is full"):
                backup.backup(home, small / f"saved{ending}", progress=False)
            assert list(small.iterdir()) == []
        backup.backup(home, tmp_path / "saved.tar.zst", progress=False)
        with pytest.raises(OSError, match="No space") as refused:
            backup.restore(small / "home", tmp_path / "saved.tar.zst", progress=False)
        assert "disk of the state folder is full" in str(sentence_for(refused.value))
        assert _left(small / "home") == []
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_killed_backup_leaves_no_archive_and_the_next_one_is_whole(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "import os, pathlib, signal, sys; from gr_platform.lifecycle import archive, backup;"
        "real = archive.Writer.file; names = [];"
        "kill = lambda: os.kill(os.getpid(), signal.SIGKILL);"
        "archive.Writer.file = lambda self, *a: (names.append(a), len(names) > 3 and kill(), "
        "real(self, *a));"
        "backup.backup(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))"
    )
    saved = tmp_path / "saved.tar.zst"
    done = subprocess.run([sys.executable, "-c", code, str(home), str(saved)], check=False, capture_output=True)
    assert done.returncode == -9, done.stderr
    assert [path.name.startswith(".gr-backup-") for path in tmp_path.iterdir()] == [True]
    # What is left is deleted once it is surely nobody's.
    monkeypatch.setattr(storage, "LEFTOVER_AGE_S", -1)
    backup.backup(home, saved, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["saved.tar.zst"]
    backup.restore(tmp_path / "other", saved, progress=False)


def test_a_run_at_work_is_waited_for(home: Path, tmp_path: Path) -> None:
    code = (
        "import pathlib, sys, time; from gr_platform import storage\n"
        "with storage.exclusive(pathlib.Path(sys.argv[1]), 'stages'):\n"
        "    print('holds', flush=True); sys.stdin.read()\n"
        "    (pathlib.Path(sys.argv[1]) / 'made').touch()"
    )
    running = subprocess.Popen(
        [sys.executable, "-c", code, str(home)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert running.stdout.readline() == "holds\n"
    threading.Timer(0.5, running.communicate).start()
    backup.backup(home, tmp_path / "saved.tar.gz", progress=False)
    with tarfile.open(tmp_path / "saved.tar.gz") as tar:
        assert "made" in tar.getnames()
    (home / "made").unlink()


def test_a_damaged_database_is_named_and_no_archive_is_written(home: Path, tmp_path: Path) -> None:
    damaged = home / "histories" / "broken.sqlite"
    damaged.write_bytes(b"SQLite format 3\0" + b"\xff" * 500)
    try:
        with pytest.raises(UserError, match=r"histories/broken\.sqlite cannot be copied"):
            backup.backup(home, tmp_path / "saved.tar.gz", progress=False)
    finally:
        damaged.unlink()
    assert _left(tmp_path) == []
