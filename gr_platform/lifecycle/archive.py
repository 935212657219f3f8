"""The file that a backup is: a tar with a list of every file's sha256 at its end.

Invariant: an archive is read whole and compared with its list before anything in it counts; nothing in it can name a
place outside the folder that it is unpacked into, whoever made it.
"""

import gzip
import hashlib
import io
import json
import os
import posixpath
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from gr_platform.errors import UserError

ENDINGS = (".tar.zst", ".tar.gz")
FORMAT = 1
# First and last in the tar: what the archive is, and name -> sha256 of every file in it.
HEADER, FILES = "gr-backup.json", "gr-backup-files.json"
_CHUNK = 1 << 20
_MAX_JSON = 1 << 28


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What an archive is. home: the state folder it was made of; layout: of `migration`; num_bytes: of all its files.

    databases: program -> `sqlite` (in the archive) or `postgresql` (not in it). checkpoints: of unfinished trainings.
    """

    home: str
    layout: int
    release: str
    created_at: str
    num_bytes: int
    databases: Mapping[str, str]
    checkpoints: bool


class Writer:
    """Writes an archive into a stream; `close` writes the list that makes it a whole one."""

    def __init__(self, stream: IO[bytes], ending: str, header: Header) -> None:
        self._packed: Any = _packing(stream, ending)
        self._tar = tarfile.TarFile.open(fileobj=self._packed, mode="w|", format=tarfile.PAX_FORMAT)
        self._sha256: dict[str, str] = {}
        fields = {name: getattr(header, name) for name in Header.__slots__}
        self._json(HEADER, {"format": FORMAT} | fields)

    def folder(self, name: str, mode: int, mtime: float) -> None:
        """Add a folder."""
        self._tar.addfile(_entry(name, tarfile.DIRTYPE, mode, mtime))

    def link(self, name: str, target: str, mtime: float) -> None:
        """Add a symbolic link."""
        entry = _entry(name, tarfile.SYMTYPE, 0o777, mtime)
        entry.linkname = target
        self._tar.addfile(entry)

    def file(self, name: str, stream: IO[bytes], stat: os.stat_result) -> None:
        """Add a file as long as `stat` says: what is appended meanwhile stays out. Raises UserError if it shrinks."""
        entry = _entry(name, tarfile.REGTYPE, stat.st_mode & 0o777, stat.st_mtime)
        entry.size = stat.st_size
        hashed = _Hashed(stream)
        try:
            self._tar.addfile(entry, hashed)  # type: ignore[arg-type]
        except OSError as error:
            if error.errno is None:
                raise UserError(f"{name} shrank while it was copied; run the same command again") from None
            raise
        self._sha256[name] = hashed.hexdigest()

    def close(self) -> None:
        """Write the list of files and the end of the archive."""
        self._json(FILES, self._sha256)
        self._tar.close()
        self._packed.close()

    def _json(self, name: str, value: Mapping[str, Any]) -> None:
        text = json.dumps(value, indent=1, sort_keys=True).encode()
        entry = _entry(name, tarfile.REGTYPE, 0o600, 0)
        entry.size = len(text)
        self._tar.addfile(entry, io.BytesIO(text))


class _Hashed:
    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._sha256 = hashlib.sha256()
        self.hexdigest = self._sha256.hexdigest

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        self._sha256.update(data)
        return data


def unpack(path: Path, folder: Path, progress: Any) -> Header:
    """Unpack an archive into an empty folder and return what it is; `progress.update` gets the bytes of each file.

    Raises UserError if it is no archive, a damaged one, or one that names places outside the folder.
    """
    with _reading(path) as tar:
        members = iter(tar)
        header = _header(path, tar, next(members, None))
        progress.reset(header.num_bytes)
        sha256: dict[str, str] = {}
        late: list[tarfile.TarInfo] = []
        listed: dict[str, Any] | None = None
        for member in members:
            if listed is not None:
                raise _foreign(path, member.name)
            if member.name == FILES:
                listed = _read_json(tar, member)
                continue
            place = folder / _confined(path, member.name)
            if member.isfile():
                sha256[member.name] = _write(tar, member, place)
                progress.update(member.size)
            elif member.isdir():
                place.mkdir(parents=True, exist_ok=True)
                late.append(member)
            elif member.issym():
                _confined(path, posixpath.join(posixpath.dirname(member.name), member.linkname), link=member)
                late.append(member)
            else:
                raise _foreign(path, member.name)
        # Without the list the archive ended early.
        if listed is None or listed != sha256:
            raise UserError(f"{path.name} is damaged: its files are not those of its list; take another backup")
        # Links last, so that no file was written through one; then the times that their making changed.
        for member in late:
            if member.issym():
                (folder / member.name).symlink_to(member.linkname)
        for member in reversed(late):
            if member.isdir():
                (folder / member.name).chmod(member.mode & 0o777)
                os.utime(folder / member.name, (member.mtime, member.mtime))
    return header


def _header(path: Path, tar: tarfile.TarFile, member: tarfile.TarInfo | None) -> Header:
    if member is None or member.name != HEADER:
        raise UserError(f"{path.name} was not made by gr backup")
    fields = _read_json(tar, member)
    if fields.pop("format", None) != FORMAT:
        raise UserError(f"{path.name} was made by a newer release; restore it with that one")
    return Header(**fields)


def _read_json(tar: tarfile.TarFile, member: tarfile.TarInfo) -> dict[str, Any]:
    stream = tar.extractfile(member)
    if stream is None or member.size > _MAX_JSON:
        raise ValueError(f"{member.name} is no file")
    fields = json.loads(stream.read())
    if not isinstance(fields, dict):
        raise ValueError(f"{member.name} holds no JSON object")
    return fields


def _write(tar: tarfile.TarFile, member: tarfile.TarInfo, place: Path) -> str:
    """Write a file of the archive and return the sha256 of what was written."""
    stream = tar.extractfile(member)
    if stream is None:
        raise ValueError(f"{member.name} is no file")
    place.parent.mkdir(parents=True, exist_ok=True)
    sha256 = hashlib.sha256()
    # "x": a name that comes twice is no archive of ours.
    with open(os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL, member.mode & 0o777), "wb") as written:
        while data := stream.read(_CHUNK):
            sha256.update(data)
            written.write(data)
    os.utime(place, (member.mtime, member.mtime))
    return sha256.hexdigest()


def _confined(path: Path, name: str, link: tarfile.TarInfo | None = None) -> str:
    """Return a name in the archive. Raises UserError if it, or where a link leads, is not inside."""
    shown = link.name if link is not None else name
    outside = posixpath.normpath(name).startswith(("/", "..")) or "\0" in name
    if outside or (link is None and ".." in name.split("/")) or (link is not None and link.linkname.startswith("/")):
        raise _foreign(path, shown)
    return name


def _foreign(path: Path, name: str) -> UserError:
    return UserError(f"{path.name} holds {name!r}, which leads out of the state folder; it was not made by gr backup")


@contextmanager
def _reading(path: Path) -> Iterator[tarfile.TarFile]:
    """Open an archive to read; raise UserError for whatever is wrong with its bytes."""
    try:
        with path.open("rb") as stream, _unpacking(stream, ending_of(path)) as unpacked:
            with tarfile.open(fileobj=unpacked, mode="r|") as tar:
                yield tar
            # To the last byte: what packed it has a sum of its own there.
            while unpacked.read(_CHUNK):
                pass
    except FileNotFoundError as error:
        if error.filename != str(path):
            raise
        raise UserError(f"there is no file {path.name}; name an archive of gr backup") from None
    except UserError:
        raise
    except (FileExistsError, NotADirectoryError, IsADirectoryError):
        # Of two members with one name, or one that another lies below: no archive of ours has any.
        raise UserError(f"{path.name} was not made by gr backup: two of its files are in each other's way") from None
    except (tarfile.TarError, EOFError, zlib.error, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path.name} is damaged or cut off ({error}); take another backup") from None
    except OSError as error:
        # Those of the system have a number, those of gzip, zstd and tar have none.
        if error.errno is not None:
            raise
        raise UserError(f"{path.name} is damaged or cut off ({error}); take another backup") from None


def ending_of(path: Path) -> str:
    """Return how an archive is packed, by its name. Raises UserError for any other name."""
    for ending in ENDINGS:
        if path.name.endswith(ending):
            return ending
    raise UserError(f"{path.name} must end in {' or '.join(ENDINGS)}")


def _packing(stream: IO[bytes], ending: str) -> Any:
    if ending == ".tar.gz":
        return gzip.GzipFile(fileobj=stream, mode="wb", mtime=0)
    import pyarrow as pa

    return pa.CompressedOutputStream(pa.PythonFile(stream, "w"), "zstd")


def _unpacking(stream: IO[bytes], ending: str) -> Any:
    if ending == ".tar.gz":
        return gzip.GzipFile(fileobj=stream, mode="rb")
    import pyarrow as pa

    return pa.CompressedInputStream(pa.PythonFile(stream, "r"), "zstd")


def _entry(name: str, kind: bytes, mode: int, mtime: float) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type, entry.mode, entry.mtime = kind, mode, mtime
    return entry
