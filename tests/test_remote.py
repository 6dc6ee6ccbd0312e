"""Addresses: what is read from real servers that fail, and what is never shown."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from base64 import b64encode
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from remote_servers import DATA, WebServer, s3_server, web_server, whole

from seer import remote
from seer.errors import UserError, shown

SECRET = "CANARY"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[WebServer]:
    (tmp_path / "a.tar").write_bytes(DATA)
    with web_server(tmp_path) as found:
        yield found


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_PAUSE_SECONDS", 0.02)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("fault", ["500", "503", "429", "cut"])
def test_failures_that_pass_are_tried_again(server: WebServer, fault: str) -> None:
    server.fault = lambda path, number: fault if number in (0, 2, 4) else None
    assert whole(f"{server.url}/a.tar") == DATA
    assert len(server.requests) == 4 + 3  # what had come was not asked for again


@pytest.mark.parametrize(("fault", "words"), [("404", "does not exist"), ("403", "is refused"), ("410", "answers 410")])
def test_refusals_are_told_at_once(server: WebServer, fault: str, words: str) -> None:
    server.fault = lambda path, number: fault
    with pytest.raises(UserError, match=f"a.tar.* {words}"):
        whole(f"{server.url}/a.tar")
    assert len(server.requests) == 1


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("size", [1000, 30_000, len(DATA) - 1, len(DATA) + 1, 120_000, 300_000])
def test_another_size_is_told_at_once(server: WebServer, size: int) -> None:
    with pytest.raises(UserError, match=r"a\.tar.*the index is stale.*seer shards index"):
        whole(f"{server.url}/a.tar", size=size)
    assert len(server.requests) <= 5


def test_patience_ends_with_the_address(server: WebServer) -> None:
    server.fault = lambda path, number: "503"
    start = time.monotonic()
    with pytest.raises(UserError, match=r"a\.tar cannot be read \(the server answers 503\): .* for 0\.\d+ s; .* again"):
        remote.read_range(f"{server.url}/a.tar", 5, 10, size=len(DATA), patience=0.5)
    assert time.monotonic() - start < 10
    assert len(server.requests) > 1


def test_a_silent_server_is_given_up(server: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_READ_SECONDS", 0.3)
    monkeypatch.setattr(remote, "_clients", {})
    server.fault = lambda path, number: "stall" if number < 2 else None
    assert remote.read_range(f"{server.url}/a.tar", 5, 1000, size=len(DATA), patience=20.0) == DATA[5:1005]
    server.fault = lambda path, number: "stall"
    with pytest.raises(UserError, match="does not answer in time"):
        whole(f"{server.url}/a.tar", patience=0.5)


def test_a_server_that_knows_no_ranges_is_read_as_a_whole(server: WebServer) -> None:
    server.fault = lambda path, number: "whole"
    assert whole(f"{server.url}/a.tar") == DATA
    with pytest.raises(UserError, match=r"no ranges; .*data\.cache_gb"):
        remote.read_range(f"{server.url}/a.tar", 5, 10, size=len(DATA), patience=5.0)


def test_small_files(server: WebServer) -> None:
    assert remote.read_bytes(f"{server.url}/a.tar", most=10**9) == DATA
    assert remote.size(f"{server.url}/a.tar") == len(DATA)
    assert remote.read_bytes(f"{server.url}/a.tar", most=10**9) == DATA
    with pytest.raises(remote.Refused, match="does not exist") as told:
        remote.read_bytes(f"{server.url}/manifest.json", most=10**9)
    assert told.value.status == 404
    server.fault = lambda path, number: "503"
    with pytest.raises(UserError, match="503") as told:  # a file is not missing because a server is down
        remote.read_bytes(f"{server.url}/manifest.json", most=10**9, patience=0.3)
    assert not isinstance(told.value, remote.Refused)


def test_s3() -> None:
    with s3_server() as endpoint:
        import boto3

        bucket = boto3.resource("s3", endpoint_url=endpoint).create_bucket(Bucket="shards")
        for name in ("b-1.tar", "b-0.tar", "b-0.tar.seer.npz", "deeper/b-2.tar"):
            bucket.put_object(Key=f"web/{name}", Body=DATA)
        assert remote.found("s3://shards/web/*.tar") == ["s3://shards/web/b-0.tar", "s3://shards/web/b-1.tar"]
        assert remote.found("s3://shards/web/b-?.tar") == ["s3://shards/web/b-0.tar", "s3://shards/web/b-1.tar"]
        assert remote.found("s3://shards/none/*.tar") == []
        url = "s3://shards/web/b-0.tar"
        assert remote.size(url) == len(DATA)
        assert whole(url) == remote.read_bytes(url, most=10**9) == DATA
        assert remote.read_range(url, 5, 10, size=len(DATA), patience=5.0) == DATA[5:15]
        for size in (len(DATA) - 1, len(DATA) + 1):
            with pytest.raises(UserError, match="index is stale"):
                whole(url, size=size)
        with pytest.raises(UserError, match=r"s3://shards/web/no\.tar does not exist"):
            remote.read_bytes("s3://shards/web/no.tar", most=10**9)
    with pytest.raises(UserError, match=r"s3://shards/web/b-0.tar cannot be read \(it cannot be reached"):
        remote.read_bytes(url, most=10**9, patience=0.5)


def test_a_web_server_lists_nothing() -> None:
    with pytest.raises(UserError, match="braces"):
        remote.found("https://host/train-*.tar")


@pytest.mark.parametrize("location", ["pipe:cat x.tar", "ftp://host/x.tar", "file:///x.tar", "gopher://a:CANARY@b"])
def test_other_schemes_are_refused(location: str) -> None:
    with pytest.raises(UserError, match="http, https, s3, gs") as told:
        remote.refuse_other_schemes(location)
    assert SECRET not in str(told.value)
    assert not remote.is_remote(location)


@pytest.mark.parametrize("location", ["x.tar", "/a/b:c.tar", "a:b/x.tar", "s3://b/x.tar", "https://h/x.tar"])
def test_files_and_addresses_are_accepted(location: str) -> None:
    remote.refuse_other_schemes(location)
    assert remote.is_remote(location) == ("://" in location)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://h/x.tar", "https://h/x.tar"),
        ("https://u:CANARY@h:80/x@y.tar", "https://h:80/x@y.tar"),
        ("https://u:CAN@ARY@h/x.tar", "https://h/x.tar"),
        ("https://h/x.tar?sig=CANARY&at=a@b/c", "https://h/x.tar?(redacted)"),
        ("https://h?CANARY", "https://h?(redacted)"),
        ("web 0.8 https://u:CANARY@h/{a,b}.tar?CANARY", "web 0.8 https://h/{a,b}.tar?(redacted)"),
        ("s3://key:CANARY@b/x-?.tar", "s3://b/x-?.tar"),
        ("s3://b/x.tar?X-Amz-Signature=CANARY", "s3://b/x.tar?(redacted)"),
        ("/folder/what?.tar", "/folder/what?.tar"),
    ],
)
def test_shown(text: str, expected: str) -> None:
    assert shown(text) == shown(expected) == expected


def test_no_message_shows_a_secret(server: WebServer) -> None:
    url = f"{server.url}/a.tar?signature={SECRET}".replace("://", f"://user:{SECRET}@")
    for fault in ("503", "404", "403", "410", "cut", "whole"):
        server.fault = lambda path, number, fault=fault: fault
        with pytest.raises(UserError) as told:
            remote.read_range(url, 5, 10, size=len(DATA), patience=0.3)
        assert "a.tar" in str(told.value)
        assert SECRET not in str(told.value) + repr(told.value)
        assert told.value.__suppress_context__ or told.value.__context__ is None
    server.fault = lambda path, number: None
    assert remote.read_bytes(url, most=10**9) == DATA
    assert server.headers["Authorization"].startswith("Basic ")


def test_netrc(server: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "netrc").write_text(f"machine 127.0.0.1 login user password {SECRET}\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert remote.read_bytes(f"{server.url}/a.tar", most=10**9) == DATA
    assert server.headers["Authorization"] == "Basic " + b64encode(f"user:{SECRET}".encode()).decode()


def test_names() -> None:
    url = "https://h/dir/x.tar?sig=a/b"
    assert remote.file_name(url) == "x.tar"
    assert remote.beside(url, "x.tar.seer.npz") == "https://h/dir/x.tar.seer.npz?sig=a/b"
    assert remote.beside("s3://b/dir/x.tar", "manifest.json") == "s3://b/dir/manifest.json"


def test_missing_packages_are_named() -> None:
    code = (
        "import sys; sys.modules['fsspec'] = None\n"
        "from seer import remote\n"
        "try: remote.read_bytes('s3://b/x', most=9)\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=os.getcwd(), check=True)
    assert done.stdout.startswith("UserError s3://")
    assert "pip install 'seer[remote]'" in done.stdout


def test_clients_are_imported_when_they_are_needed() -> None:
    code = "import sys; from seer import remote; assert not {'fsspec', 'aiohttp', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=os.getcwd())


def test_a_list_without_end_is_given_up(tmp_path: Path) -> None:
    sent = 0

    class Endless(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            nonlocal sent
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):
                while sent < 2**30:
                    sent += self.wfile.write(bytes(2**16))

    with ThreadingHTTPServer(("127.0.0.1", 0), Endless) as endless:
        threading.Thread(target=endless.serve_forever, args=(0.02,), daemon=True).start()
        with pytest.raises(UserError, match=r"manifest.json has over 1,000,000 bytes"):
            remote.read_bytes(f"http://127.0.0.1:{endless.server_port}/manifest.json", most=10**6)
        endless.shutdown()
    assert sent < 2**26
