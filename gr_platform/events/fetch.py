"""Public data sets, downloaded where the network allows and by hand where it does not.

Invariant: a data set's folder appears by one rename, after every check; until then everything stands in
`<name>.part` beside it, where the next call goes on.
"""

import hashlib
import logging
import os
import re
import shutil
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import MappingProxyType

from gr_platform import settings, storage
from gr_platform.errors import UserError
from gr_platform.events import transfer

log = logging.getLogger(__name__)

# A file may have grown a little since its size was written down here; it has not doubled.
SLACK = 2
_COPY_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """A wanted file: its name here, about how many bytes it has, and what it is called inside the archive."""

    name: str
    about_bytes: int
    member: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where a data set comes from; the first of `files` is the log to import, and is the download itself if no archive.

    page: where a person gets it. terms: what it may be used for, or the page that says so. url "": only by hand.
    archive_bytes: about the size of the zip, 0 if it is none. sha256: of the download; md5_url: its publisher's file.
    """

    title: str
    page: str
    terms: str
    files: tuple[File, ...]
    url: str = ""
    archive_bytes: int = 0
    sha256: str = ""
    md5_url: str = ""

    @property
    def download_bytes(self) -> int:
        """About how many bytes are downloaded."""
        return self.archive_bytes or self.files[0].about_bytes


_MOVIELENS = "https://files.grouplens.org/datasets/movielens"
_AMAZON = "https://snap.stanford.edu/data/amazon/productGraph/categoryFiles"
_AMAZON_PAGE = "https://cseweb.ucsd.edu/~jmcauley/datasets/amazon/links.html"
_RETAILROCKET_PAGE = "https://www.kaggle.com/datasets/retailrocket/ecommerce-dataset"

SOURCES: Mapping[str, Source] = MappingProxyType(
    {
        "ml-1m": Source(
            title="MovieLens 1M, 1,000,209 ratings",
            page="https://grouplens.org/datasets/movielens/1m/",
            terms=f"research use, no redistribution: {_MOVIELENS}/ml-1m-README.txt",
            url=f"{_MOVIELENS}/ml-1m.zip",
            archive_bytes=5_900_000,
            sha256="a6898adb50b9ca05aa231689da44c217cb524e7ebd39d264c56e2832f2c54e20",
            md5_url=f"{_MOVIELENS}/ml-1m.zip.md5",
            files=(
                File(name="ratings.dat", about_bytes=24_600_000, member="ml-1m/ratings.dat"),
                File(name="movies.dat", about_bytes=170_000, member="ml-1m/movies.dat"),
                File(name="users.dat", about_bytes=134_000, member="ml-1m/users.dat"),
            ),
        ),
        "ml-20m": Source(
            title="MovieLens 20M, 20,000,263 ratings",
            page="https://grouplens.org/datasets/movielens/20m/",
            terms=f"research use, no redistribution: {_MOVIELENS}/ml-20m-README.html",
            url=f"{_MOVIELENS}/ml-20m.zip",
            archive_bytes=199_000_000,
            sha256="96f243c338a8665f6bcc89c53edf6ee39162a846940de6b7c8c48aeada765ff3",
            md5_url=f"{_MOVIELENS}/ml-20m.zip.md5",
            files=(
                File(name="ratings.csv", about_bytes=533_000_000, member="ml-20m/ratings.csv"),
                File(name="movies.csv", about_bytes=1_400_000, member="ml-20m/movies.csv"),
            ),
        ),
        "amazon-books": Source(
            title="Amazon ratings 2014, Books",
            page=_AMAZON_PAGE,
            terms=_AMAZON_PAGE,
            url=f"{_AMAZON}/ratings_Books.csv",
            files=(File(name="ratings_Books.csv", about_bytes=920_000_000),),
        ),
        "amazon-sports": Source(
            title="Amazon ratings 2014, Sports and Outdoors",
            page=_AMAZON_PAGE,
            terms=_AMAZON_PAGE,
            url=f"{_AMAZON}/ratings_Sports_and_Outdoors.csv",
            files=(File(name="ratings_Sports_and_Outdoors.csv", about_bytes=135_000_000),),
        ),
        "retailrocket": Source(
            title="Retailrocket, events of a shop (by hand: the page wants a login)",
            page=_RETAILROCKET_PAGE,
            terms=_RETAILROCKET_PAGE,
            files=(File(name="events.csv", about_bytes=94_000_000, member="events.csv"),),
        ),
    }
)


def source_of(name: str, sources: Mapping[str, Source] = SOURCES) -> Source:
    """Return the source of a data set. Raises UserError naming all of them, with their sizes."""
    if name not in sources:
        known = ", ".join(f"{each} ({shown_bytes(source.download_bytes)})" for each, source in sources.items())
        raise UserError(f"there is no data set {name!r} to fetch; the data sets are {known}")
    return sources[name]


def fetch(name: str, out: Path, *, sources: Mapping[str, Source] = SOURCES) -> Path:
    """Return the log of a public data set in the folder `out/<name>`, downloaded unless it is there.

    Raises UserError if the name is unknown, the disk too small, the download not the published file (it is removed
    then), or the network does not give it (what came is kept; the text says what to do by hand).
    """
    source = source_of(name, sources)
    if source.url or _there(out / name, source):
        with storage.exclusive(out, f"fetch-{name}"):
            if not _there(out / name, source):
                _fetch(name, source, out)
            return out / name / source.files[0].name
    raise UserError(f"{name} cannot be downloaded without a login: {_by_hand(name, source, out)}")


def shown_bytes(num_bytes: int) -> str:
    """Return a size as people read it."""
    return f"{num_bytes / 1e6:,.0f} MB"


def _there(folder: Path, source: Source) -> bool:
    """Return whether a data set is complete. Raises UserError if only something else is in its folder."""
    missing = [file.name for file in source.files if not (folder / file.name).is_file()]
    if missing and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{_shown(folder)} is there but holds no {missing[0]}; put it there, or move the folder away")
    return not missing


def _fetch(name: str, source: Source, out: Path) -> None:
    part = out / f"{name}.part"
    part.mkdir(exist_ok=True)
    downloaded = part / (PurePosixPath(source.url).name if source.archive_bytes else source.files[0].name)
    unpacked_bytes = sum(file.about_bytes for file in source.files) if source.archive_bytes else 0
    try:
        transfer.download(
            source.url, downloaded, limit_bytes=SLACK * source.download_bytes, unpacked_bytes=unpacked_bytes
        )
        _verify(source, downloaded)
        if source.archive_bytes:
            _unpack(downloaded, source.files, part)
    except transfer.Unavailable as error:
        raise UserError(
            f"{name} was not downloaded: {error}; run the same command later, or by hand: {_by_hand(name, source, out)}"
        ) from error
    except transfer.Refused as error:
        shutil.rmtree(part)
        raise UserError(
            f"what came for {name} is refused and removed: {error}; run the same command again, or by hand: "
            f"{_by_hand(name, source, out)}"
        ) from error
    finally:
        if part.is_dir() and not any(part.iterdir()):
            part.rmdir()
    _publish(part, out / name, source.files)


def _verify(source: Source, path: Path) -> None:
    sha256 = storage.file_sha256(path)
    log.info("event=downloaded file=%s size_bytes=%d sha256=%s", path.name, path.stat().st_size, sha256)
    if source.sha256 and sha256 != source.sha256:
        raise transfer.Refused(f"its sha256 is {sha256}, expected {source.sha256}")
    if source.md5_url:
        published = re.search(r"\b[0-9a-f]{32}\b", transfer.text(source.md5_url).lower())
        if published is None:
            raise transfer.Unavailable("the checksum file beside it holds no MD5")
        with path.open("rb") as stream:
            md5 = hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
        if md5 != published[0]:
            raise transfer.Refused(f"its MD5 is {md5}, its publisher says {published[0]}")


def _unpack(archive: Path, files: Sequence[File], folder: Path) -> None:
    """Write the wanted members under our names; reading one to its end also tests its checksum. Raises Refused."""
    try:
        with zipfile.ZipFile(archive) as opened:
            for member in opened.namelist():
                if ".." in PurePosixPath(member).parts or member.startswith("/") or "\\" in member:
                    raise transfer.Refused(f"the archive has a file named {member!r}, which leads out of its folder")
            for file in files:
                if file.member not in opened.namelist():
                    raise transfer.Refused(f"the archive has no {file.member}")
                size = opened.getinfo(file.member).file_size
                if size > SLACK * file.about_bytes:
                    raise transfer.Refused(f"{file.member} has {size:,} bytes unpacked, expected {file.about_bytes:,}")
                with opened.open(file.member) as packed, (folder / file.name).open("wb") as plain:
                    shutil.copyfileobj(packed, plain, _COPY_BYTES)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise transfer.Refused(f"the archive is damaged ({error})") from error


def _publish(part: Path, folder: Path, files: Sequence[File]) -> None:
    wanted = {file.name for file in files}
    for path in part.iterdir():
        if path.name not in wanted:
            path.unlink()
            continue
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
    os.rename(part, folder)


def _by_hand(name: str, source: Source, out: Path) -> str:
    """Return, as a clause, how a person gets the data set with a browser."""
    folder, wanted = out / name, " and ".join(file.name for file in source.files)
    what = f"download the archive, unpack {wanted}" if source.files[0].member else f"download {wanted}"
    command = f"gr import {_shown(folder / source.files[0].name)} --declaration {name}"
    return f"open {source.page}, {what} into {_shown(folder)}, then run: {command}"


def _shown(path: Path) -> str:
    """Return a path as messages show it: relative to GR_HOME where it lies inside, else as the caller gave it."""
    home = settings.home()
    return f"$GR_HOME/{path.relative_to(home)}" if path.is_relative_to(home) else str(path)
