"""One file over HTTP, as surely as a network allows: asked again, gone on with where it broke off, never glued.

Invariant: what stands at the path is always the first bytes of one version of the file on the server. A request for
the rest names that version (If-Range); where the answer is not the rest of it, the download starts over.
"""

import json
import logging
import re
import shutil
import time
from dataclasses import asdict, dataclass
from http import HTTPStatus
from pathlib import Path
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter
from tqdm import tqdm
from urllib3.exceptions import HTTPError
from urllib3.util.retry import Retry

from gr_platform import storage
from gr_platform.errors import UserError

log = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 18
# To connect, and between two pieces of an answer.
TIMEOUT_S = (10.0, 60.0)
ASKED_AGAIN = 3
BACKOFF_S = 0.5
# Times in a row that an answer may break off without a byte more than the longest before it.
MAX_BROKEN_OFF = 5
# What a download leaves free for everything else on the disk.
SPARE_BYTES = 64 << 20
_ANSWERS = (HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT, HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE)


class Unavailable(Exception):
    """The network or the server does not give the file; the text says why, what came is kept."""


class Refused(Exception):
    """What came is not the file that was asked for; the text says why."""


class _BrokenOff(Exception):
    """The answer ended early, or was not what the rest was asked for: ask again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Version:
    """What the server said of the file when its download began. validator: strong ETag or date, "" if it gave none."""

    validator: str
    total_bytes: int | None


def download(url: str, path: Path, *, limit_bytes: int, unpacked_bytes: int = 0) -> None:
    """Bring the file at `url` to `path` whole, going on with what an earlier call left there.

    unpacked_bytes: what is to be written beside it afterwards, so that the disk is known to hold both.
    Raises Unavailable (the network), Refused (larger than the limit), UserError (the disk is too small).
    """
    longest, failures = _size(path), 0
    with _session() as session:
        while True:
            try:
                return _receive(session, url, path, limit_bytes=limit_bytes, unpacked_bytes=unpacked_bytes)
            except _BrokenOff as error:
                have = _size(path)
                failures = failures + 1 if have <= longest else 1
                longest = max(longest, have)
                log.info("event=broken_off file=%s have_bytes=%d failures=%d", path.name, have, failures)
                if failures == MAX_BROKEN_OFF:
                    raise Unavailable(
                        f"the connection to {_host(url)} breaks off after {have / 1e6:,.1f} MB, which are kept"
                    ) from error
                time.sleep(BACKOFF_S * 2 ** (failures - 1))


def text(url: str, *, limit_bytes: int = 1000) -> str:
    """Return the first bytes of a small text file. Raises Unavailable."""
    with _session() as session, _ask(session, url, {}) as response:
        try:
            return next(response.iter_content(limit_bytes), b"").decode(errors="replace")
        except requests.RequestException as error:
            raise Unavailable(f"the connection to {_host(url)} breaks off") from error


def _receive(session: requests.Session, url: str, path: Path, *, limit_bytes: int, unpacked_bytes: int) -> None:
    begun, have = _begun(path), _size(path)
    if begun.total_bytes == have > 0:
        return
    if not begun.validator:
        have = 0
    headers = {"Range": f"bytes={have}-", "If-Range": begun.validator} if have else {}
    with _ask(session, url, headers) as response:
        if response.status_code == HTTPStatus.OK:
            have, begun = 0, _Version(validator=_validator(response), total_bytes=_length(response))
        elif not _is_the_rest(response, begun, have):
            _state(path).unlink(missing_ok=True)
            raise _BrokenOff("the answer is not the rest of the file")
        if (begun.total_bytes or 0) > limit_bytes:
            raise Refused(f"it has {begun.total_bytes:,} bytes, more than the {limit_bytes:,} that are plausible")
        _check_room(path, max(0, (begun.total_bytes or limit_bytes) - have) + unpacked_bytes)
        if not have:
            # Emptied before its new version is written down: the other order could glue two versions.
            path.write_bytes(b"")
            storage.write_text(_state(path), json.dumps(asdict(begun)))
        have = _append(response, path, have, begun.total_bytes, limit_bytes)
    if begun.total_bytes not in (None, have):
        raise _BrokenOff("the answer ended early")


def _append(response: requests.Response, path: Path, have: int, total: int | None, limit_bytes: int) -> int:
    """Write the answer's body behind the first `have` bytes and return how many the file has then."""
    bar = tqdm(total=total, initial=have, desc=path.name, unit="B", unit_scale=True, disable=None, leave=False)
    with path.open("ab", buffering=0) as stream, bar:
        try:
            # Whatever has arrived, at once: waiting for whole chunks loses the last one of an answer that breaks off.
            while chunk := response.raw.read1(CHUNK_BYTES):
                have += len(chunk)
                if have > limit_bytes:
                    raise Refused(f"it has more than the {limit_bytes:,} bytes that are plausible")
                stream.write(chunk)
                bar.update(len(chunk))
        except HTTPError as error:
            raise _BrokenOff(type(error).__name__) from error
    return have


def _ask(session: requests.Session, url: str, headers: dict[str, str]) -> requests.Response:
    try:
        response = session.get(url, headers=headers, stream=True, timeout=TIMEOUT_S)
    except requests.RequestException as error:
        log.info("event=unreachable host=%s reason=%s", _host(url), type(error).__name__)
        raise Unavailable(f"{_host(url)} cannot be reached (no network, or a proxy or firewall is between)") from error
    reason = ""
    if response.status_code not in _ANSWERS:
        reason = f"{_host(url)} answers {response.status_code} {response.reason}".rstrip()
    elif response.headers.get("Content-Type", "").startswith("text/html"):
        reason = f"{_host(url)} answers with a web page instead of the file (a proxy or a login)"
    elif url.startswith("https:") and not response.url.startswith("https:"):
        reason = f"{_host(url)} sends on to an address without encryption"
    if reason:
        response.close()
        raise Unavailable(reason)
    return response


def _session() -> requests.Session:
    session = requests.Session()
    again = Retry(
        total=ASKED_AGAIN, status_forcelist=(429, 500, 502, 503, 504), backoff_factor=BACKOFF_S, raise_on_status=False
    )
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(max_retries=again))
    # Compressed on the way, lengths and ranges would count other bytes than those of the file.
    session.headers.update({"Accept-Encoding": "identity", "User-Agent": "gr-platform"})
    return session


def _is_the_rest(response: requests.Response, begun: _Version, have: int) -> bool:
    """Return whether an answer to a Range request goes on exactly behind the first `have` bytes of that version."""
    found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
    return (
        response.status_code == HTTPStatus.PARTIAL_CONTENT
        and found is not None
        and int(found[1]) == have
        and found[2] in ("*", str(begun.total_bytes))
        and _validator(response) in ("", begun.validator)
    )


def _validator(response: requests.Response) -> str:
    etag = response.headers.get("ETag", "")
    return etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified", "")


def _length(response: requests.Response) -> int | None:
    value = response.headers.get("Content-Length", "")
    return int(value) if value.isdecimal() else None


def _begun(path: Path) -> _Version:
    """Return what is known of a download that was begun; a version without validator if nothing is."""
    try:
        return _Version(**storage.read_object(_state(path)))
    except (FileNotFoundError, ValueError, TypeError):
        return _Version(validator="", total_bytes=None)


def _state(path: Path) -> Path:
    return path.with_name(f"{path.name}.begun")


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _check_room(path: Path, needed_bytes: int) -> None:
    free_bytes = shutil.disk_usage(path.parent).free
    if free_bytes < needed_bytes + SPARE_BYTES:
        raise UserError(
            f"{path.name} needs {(needed_bytes + SPARE_BYTES) / 1e6:,.0f} MB more on the disk, "
            f"{free_bytes / 1e6:,.0f} MB are free; free some space or give another folder with --out"
        )


def _host(url: str) -> str:
    return urlsplit(url).hostname or url
