"""Files behind http(s)://, s3:// and gs://: what is there, and their bytes, whole or in part (free of torch).

The clients (`seer.remote_clients`) are imported when the first address is opened. They get time-outs and no retries of
their own: all trying again happens here, in one way for all of them. Credentials come from the environment (AWS_*,
GOOGLE_APPLICATION_CREDENTIALS, ~/.netrc), and no message shows those that an address holds (`seer.errors.shown`).
"""

from __future__ import annotations

import os
import posixpath
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from seer.errors import UserError
from seer.remote_clients import new_client

T = TypeVar("T")

SCHEMES = ("http", "https", "s3", "gs")
OPENING_SECONDS = 30.0  # of patience with lists and indexes before a run begins: a misspelt host is told soon
PATIENCE = 300.0  # with all else, unless it is told otherwise
PART = 1 << 24  # bytes of one request: enough to outweigh its latency, little to do again

_CONNECT_SECONDS, _READ_SECONDS = 10, 20  # of each connection, and of each wait for further bytes
_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.2, 15.0
_TRANSIENT = (408, 425, 429)  # of the 4xx
# Clients raise these of their own before they ask the server.
_WITHOUT_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "DefaultCredentialsError")
# Statuses that gcsfs tells by the beginning of its words, or by the name of an exception, alone.
_WORDS_OF_GCSFS = {"Forbidden: ": 403, "Bad Request: ": 400}
_NAMES_OF_GCSFS = {"ProxyError": 502, "NonRetryableError": 401}
_NETWORK = ("aiohttp", "botocore", "aiobotocore", "gcsfs", "google", "requests", "urllib3", "fsspec")

_clients: dict[tuple[int, str], Any] = {}
_making = threading.Lock()


class Refused(UserError):
    """The server's answer is no.

    Attributes:
        status: of HTTP; 0: it was not asked, for want of credentials.
    """

    status = 0


class Reading(NamedTuple):
    """How remote shards are read.

    Attributes:
        cache_dir: folder of shards that were fetched; None: `$XDG_CACHE_HOME/seer/shards` or `~/.cache/seer/shards`.
        cache_bytes: of all files in it, at most; 0: nothing is kept, every image is a request.
        patience: seconds without a byte after which reading is given up.
    """

    cache_dir: str | None = None
    cache_bytes: int = 50 * 10**9
    patience: float = PATIENCE

    @property
    def cache_folder(self) -> Path:
        """The folder."""
        if self.cache_dir is not None:
            return Path(self.cache_dir).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "seer" / "shards"


BY_DEFAULT = Reading()


def is_remote(location: str) -> bool:
    """Whether a path or pattern is an address of `SCHEMES`."""
    return location.partition("://")[0] in SCHEMES and "://" in location


def refuse_other_schemes(location: str) -> None:
    """Refuses pipe: and addresses that no client here reads.

    Raises:
        UserError: it names the scheme, never what follows it.
    """
    scheme = re.match(r"(pipe|file|[A-Za-z][A-Za-z0-9+.-]*(?=://)):", location)
    if scheme and scheme.group(1) not in SCHEMES:
        remedy = "copy or mount the shards, or give an address of one of these"
        raise UserError(f"{scheme.group(1)}: cannot be read", f"shards are files or {', '.join(SCHEMES)}", remedy)


def without_query(url: str) -> tuple[str, str]:
    """An address without its query, and the query with its mark; in buckets a ? is part of a name."""
    if url.startswith("http"):
        address, mark, query = url.partition("?")
        return address, mark + query
    return url, ""


def file_name(location: str) -> str:
    """The last part of a path, or of an address's path."""
    return posixpath.basename(without_query(location)[0])


def beside(url: str, name: str) -> str:
    """The address of another file in the same folder; a query (of a signature for the folder) stays."""
    address, query = without_query(url)
    return posixpath.join(posixpath.dirname(address), name) + query


def found(pattern: str, *, patience: float = OPENING_SECONDS) -> list[str]:
    """Addresses that a pattern with * ? [...] means, sorted. Braces are not looked at.

    Raises:
        UserError: http has no lists; the bucket cannot be read.
    """
    if pattern.startswith("http"):
        rule = "a web server has no list of its files"
        raise UserError(f"{pattern} has a *", rule, "name every shard with braces: train-{000..127}.tar")
    client = _client(pattern)
    scheme = pattern.partition("://")[0]
    matches = _persistently(lambda: client.glob(pattern), pattern, patience)
    return sorted(f"{scheme}://{str(match).removeprefix(f'{scheme}://')}" for match in matches)


def size(url: str, *, patience: float = OPENING_SECONDS) -> int:
    """Bytes of a file.

    Raises:
        UserError: it is not there, is refused, cannot be reached, or the server does not tell.
    """
    client = _client(url)
    bytes_ = _persistently(lambda: client.size(url), url, patience)
    if bytes_ is None:
        raise UserError(f"{url} has no size", "the server does not tell Content-Length", "use another server")
    return int(bytes_)


def read_bytes(url: str, *, most: int, patience: float = OPENING_SECONDS) -> bytes:
    """A small file as a whole; of one that is larger than it may be, no more is held than that.

    Args:
        most: bytes.

    Raises:
        Refused: it is not there or may not be read.
        UserError: it cannot be reached, or has more bytes.
    """
    client = _client(url)
    read = _of_web_server if url.startswith("http") else _of_bucket
    data = _persistently(lambda: read(client, url, most + 1, _limit(patience)), url, patience)
    if len(data) > most:
        raise UserError(f"{url} has over {most:,} bytes", "lists and indexes of shards have fewer", "check the address")
    return data


def _of_web_server(client: Any, url: str, most: int, timeout: float) -> bytes:
    """The first bytes of a file: whatever it was asked for, a server may send without end."""
    data = bytearray()
    # Without a block size it is a stream; a size, which plays no part then, spares the question for it.
    with client.open(url, block_size=0, size=1, timeout=timeout) as stream:
        while len(data) < most and (piece := stream.read(most - len(data))):
            data += piece
    return bytes(data)


def _of_bucket(client: Any, url: str, most: int, timeout: float) -> bytes:
    try:
        return bytes(client.cat_file(url, start=0, end=most, timeout=timeout))
    except Exception as error:
        if _status(error) == 416:  # there is no first byte
            return b""
        raise


def read_range(url: str, offset: int, length: int, *, size: int, patience: float) -> bytes:
    """Some bytes of a file whose size is known.

    Raises:
        UserError: as `pieces`, or a server that answers no ranges.
    """
    client = _client(url)

    def read() -> bytes:
        data = bytes(client.cat_file(url, start=offset, end=offset + length, timeout=_limit(patience)))
        if len(data) == size != length:
            remedy = "give the shards room in data.cache_gb: whole files can be read from there"
            raise UserError(f"{url} was sent whole where a part was asked for", "its server has no ranges", remedy)
        if len(data) != length:
            raise _other_size(client, url, size)
        return data

    return _persistently(read, url, patience) if length else b""


def pieces(url: str, *, size: int, patience: float) -> Iterator[bytes]:
    """A whole file, in parts of up to `PART` bytes; each is tried again by itself.

    Args:
        size: bytes that the file has.
        patience: seconds without a further part after which it is given up.

    Raises:
        UserError: it is not there, is refused, has another size, or could not be read for so long.
    """
    client = _client(url)
    start = 0

    def read() -> bytes:
        end = min(start + PART, size)
        # One byte beyond the end would tell that the file has grown.
        data = bytes(client.cat_file(url, start=start, end=end + (end == size), timeout=_limit(patience)))
        whole = start == 0 and len(data) == size  # from a server that knows no ranges
        if len(data) != end - start and not whole:
            raise _other_size(client, url, size)
        return data

    while start < size:
        data = _persistently(read, url, patience)
        start += len(data)
        yield data


class _CutShort(OSError):
    """Fewer bytes than the file has."""


def _other_size(client: Any, url: str, size: int) -> Exception:
    if client.size(url) == size:
        return _CutShort()
    return UserError(
        f"{url} has another size than its index says",
        "the index is stale: the tar was changed or cut short after it was indexed",
        f"copy it again, or if the change was meant, run: seer shards index '{url}'",
    )


def _limit(patience: float) -> float:
    # Of one request, whatever its client thinks; a server that trickles is given up too.
    return max(patience, 2 * _READ_SECONDS)


def _persistently(action: Callable[[], T], url: str, patience: float) -> T:
    """Does it, again and again while the failure is one that passes, with growing pauses."""
    began, pause = time.monotonic(), _PAUSE_SECONDS
    end = began + patience
    chance = random.SystemRandom()  # ranks that failed together should not come back together
    while True:
        try:
            return action()
        except UserError:
            raise
        except Exception as error:
            status = _status(error)
            if not _passes(error, status):
                raise _refusal(url, error, status) from None
            reason = f"the server answers {status}" if status else _words(error)
        wait = pause * chance.uniform(0.5, 1.5)
        if time.monotonic() + wait > end:
            raise UserError(
                f"{url} cannot be read ({reason})",
                f"it was tried again for {time.monotonic() - began:.1f} s",
                f"check the network and the server{_endpoint(url)}, then give the same command again",
            )
        time.sleep(wait)
        pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)


def _endpoint(url: str) -> str:
    """Which server a bucket is asked from, where the environment says so."""
    names = {"s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"), "gs": ("STORAGE_EMULATOR_HOST",)}
    for name in names.get(url.partition("://")[0], ()):
        if server := os.environ.get(name):
            return f" ({name}={server})"
    return ""


def _status(error: BaseException) -> int:
    """The HTTP status behind an exception of any client, 0 where there is none."""
    if getattr(error.__cause__, "retryable", False):
        return 503  # of the server of Google's tokens; gcsfs says 401 whatever it said
    if type(error).__name__ in _NAMES_OF_GCSFS:
        return _NAMES_OF_GCSFS[type(error).__name__]
    for words, meant in _WORDS_OF_GCSFS.items():
        if str(error).startswith(words):
            return meant
    seen: BaseException | None = error
    while seen is not None:
        response = getattr(seen, "response", None)
        answer = response.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(response, dict) else None
        # Others than gcsfs have codes of another meaning.
        code = getattr(seen, "code", None) if type(seen).__module__.startswith("gcsfs") else None
        for status in (getattr(seen, "status", None), answer, code):
            if isinstance(status, int) and 100 <= status < 600:
                return status
        seen = seen.__cause__
    if isinstance(error, FileNotFoundError):
        return 404
    return 403 if isinstance(error, PermissionError) else 0


def _passes(error: Exception, status: int) -> bool:
    if status:
        return status >= 500 or status in _TRANSIENT
    if type(error).__name__ in _WITHOUT_CREDENTIALS:
        return False
    return isinstance(error, OSError | TimeoutError) or type(error).__module__.partition(".")[0] in _NETWORK


def _words(error: Exception) -> str:
    # Never its own words: they hold the address with all that is secret in it.
    name = type(error).__name__
    if isinstance(error, _CutShort) or name in ("ClientPayloadError", "ServerDisconnectedError"):
        return "the connection was cut"
    if isinstance(error, TimeoutError) or "Timeout" in name:
        return "it does not answer in time"
    return "it cannot be reached" if "Connect" in name else f"the connection failed: {name}"


def _refusal(url: str, error: Exception, status: int) -> UserError:
    where = url
    if status == 404:
        refused = Refused(
            f"{where} does not exist",
            "the server answers 404",
            "check the address; if the shards were renamed or removed, what lists them is stale",
        )
    elif status == 416:
        refused = Refused(
            f"{where} is shorter than its index says",
            "the index is stale: the tar was changed or cut short after it was indexed",
            f"copy it again, or if the change was meant, run: seer shards index '{where}'",
        )
    elif status in (401, 403) and _is_anonymous(url):
        refused = Refused(
            f"{where} is refused",
            f"the server answers {status} to a request without credentials; buckets do so for what is missing too",
            "check the address, set GOOGLE_APPLICATION_CREDENTIALS, or run: gcloud auth application-default login",
        )
    elif status in (401, 403):
        remedy = (
            "check the address and the credentials in the environment (AWS_*, GOOGLE_APPLICATION_CREDENTIALS, .netrc)"
        )
        refused = Refused(
            f"{where} is refused", f"the server answers {status}; buckets do so for what is missing too", remedy
        )
    elif type(error).__name__ == "DefaultCredentialsError":
        refused = Refused(
            f"{where} needs credentials",
            "the file that GOOGLE_APPLICATION_CREDENTIALS names is not there, or holds none",
            "mend the variable, or for a public bucket set FSSPEC_GS_TOKEN=anon",
        )
    elif type(error).__name__ in _WITHOUT_CREDENTIALS:
        remedy = "set them, or FSSPEC_S3_ANON=true for a public bucket on S3"
        refused = Refused(f"{where} needs credentials", "there are none in the environment", remedy)
    else:
        reason = f"the server answers {status}" if status else type(error).__name__
        refused = Refused(f"{where} cannot be read", reason, "check the address and the server")
    refused.status = status
    return refused


def _client(url: str) -> Any:
    """The file system of an address's scheme; one a process, which threads share."""
    scheme = url.partition("://")[0]
    with _making:
        mine = (os.getpid(), scheme)
        if mine not in _clients:
            try:
                _clients[mine] = new_client(scheme, _CONNECT_SECONDS, _READ_SECONDS)
            except UserError:
                raise
            except Exception as error:  # of what the environment says
                raise _refusal(url, error, _status(error)) from None
        return _clients[mine]


def _is_anonymous(url: str) -> bool:
    """Whether Google's client has found no credentials."""
    client = _clients.get((os.getpid(), "gs")) if url.startswith("gs:") else None
    return client is not None and client.credentials.credentials is None
