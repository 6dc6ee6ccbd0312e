"""Servers on loopback that tests read from: a web server that fails on command, S3 (moto), Google's (an emulator)."""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import os
import re
import socket
import struct
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, quote, urlsplit

from seer import remote

DATA = bytes(range(256)) * 400  # 102,400 bytes

Fault = Callable[[str, int], str | None]
"""Path and number of the request for it, from 0, to what goes wrong: see `WebServer`."""


def whole(url: str, *, size: int = len(DATA), patience: float = 20.0) -> bytes:
    """A remote file, `DATA` unless its size is given, as the cache reads it."""
    return b"".join(remote.pieces(url, size=size, patience=patience))


class Answer(NamedTuple):
    """Status of HTTP, headers besides Content-Length, body."""

    status: int
    headers: dict[str, str]
    body: bytes


class FailingServer:
    """Answers as `answer` says, and does wrong what `fault` says.

    A fault is a status ("503", with Google's JSON), "stall" (sends half of the body, then nothing), "cut" (half of the
    body, then a reset), "flip" (a byte of the body is another one), "whole" (ranges are not looked at), "slow" (a
    quarter of a second before the body).

    Args:
        answer: to a path with its query, and a Range header or nothing.
        port: 0: any.

    Attributes:
        url: of the server.
        requests: path of each GET and POST so far.
        starts: first byte that each of them asked for.
        headers: of the last one.
    """

    def __init__(self, answer: Callable[[str, str], Answer], port: int = 0) -> None:
        self.fault: Fault = lambda path, number: None
        self.requests: list[str] = []
        self.starts: list[int] = []
        self.headers = Message()
        self._content, self._over = answer, threading.Event()
        self._connections: list[socket.socket] = []
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # a body would wait for 40 ms after its headers

            def log_message(self, *_: object) -> None:
                pass

            def setup(self) -> None:
                super().setup()
                owner._connections.append(self.connection)

            def do_HEAD(self) -> None:
                owner._answer(self, None)

            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                number = owner.requests.count(path)
                owner.requests.append(path)
                owner.starts.append(int((re.findall(r"bytes=(\d+)", self.headers.get("Range", "")) or [0])[0]))
                owner.headers = self.headers
                owner._answer(self, owner.fault(path, number))

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                self.do_GET()

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            block_on_close = False

            def handle_error(self, *_: object) -> None:
                pass  # a client that was killed

        self._server = Server(("127.0.0.1", port), Handler)
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def _answer(self, handler: BaseHTTPRequestHandler, fault: str | None) -> None:
        if (fault or "").isdigit():
            told = {"error": {"code": int(fault or 0), "message": "as the test wants it", "errors": []}}
            status, headers, body = int(fault or 0), {"Content-Type": "application/json"}, json.dumps(told).encode()
        else:
            wanted = "" if fault == "whole" else handler.headers.get("Range", "")
            status, headers, body = self._content(handler.path, wanted)
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        if handler.command == "HEAD":
            return
        if fault == "slow":
            time.sleep(0.25)
        if fault == "flip":
            middle = len(body) // 2
            body = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
        if fault in ("stall", "cut"):
            handler.wfile.write(body[: len(body) // 2])
            if fault == "stall":
                self._over.wait(60)
            # A reset, not an end: the client may be waiting.
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            handler.close_connection = True
            return
        handler.wfile.write(body)

    def close(self) -> None:
        self._over.set()
        self._server.shutdown()
        self._server.server_close()
        for connection in self._connections:
            with contextlib.suppress(OSError):  # closed before
                connection.shutdown(socket.SHUT_RDWR)


class WebServer(FailingServer):
    """Serves a folder, with ranges.

    Attributes:
        folder: that is served.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        super().__init__(self._file)

    def _file(self, path: str, wanted: str) -> Answer:
        file = self.folder / path.partition("?")[0].lstrip("/")
        if not file.is_file():
            return Answer(404, {}, b"")
        whole = file.read_bytes()
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", wanted)
        if span is None:
            return Answer(200, {}, whole)
        first, last = int(span[1]), int(span[2])
        if first >= len(whole):
            return Answer(416, {}, b"")
        body = whole[first : last + 1]
        return Answer(206, {"Content-Range": f"bytes {first}-{first + len(body) - 1}/{len(whole)}"}, body)


@contextlib.contextmanager
def web_server(folder: Path) -> Iterator[WebServer]:
    server = WebServer(folder)
    try:
        yield server
    finally:
        server.close()


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """An S3 server; its address, which is also set in the environment with keys that it accepts."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it tells every request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    os.environ |= {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "CANARYKEY",
        "AWS_SECRET_ACCESS_KEY": "CANARYSECRET",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    urllib.request.urlopen(urllib.request.Request(f"{endpoint}/moto-api/reset", method="POST")).close()
    remote._clients.clear()  # one of another server
    try:
        yield endpoint
    finally:
        server.stop()
        remote._clients.clear()


class GoogleServer(FailingServer):
    """Google Cloud Storage: an emulator behind a server that fails on command and adds what the emulator leaves out:
    lists in pages, 416 beyond the end, tokens for whoever asks.

    Args:
        emulator: its port.
        port: 0: any.
    """

    PAGE, TOKEN = 2, "CANARYTOKEN"

    def __init__(self, emulator: int, port: int = 0) -> None:
        self.emulator = emulator
        super().__init__(self._emulated, port)

    def _emulated(self, path: str, wanted: str) -> Answer:
        if path == "/token":
            return Answer(200, {}, json.dumps({"access_token": self.TOKEN, "expires_in": 3600}).encode())
        status, headers, body = self.ask("GET", path, headers={"Range": wanted} if wanted else {})
        if status == 206 and not body:
            return Answer(416, {}, b"Request range not satisfiable")
        if status == 200 and urlsplit(path).path.endswith("/o"):
            listed = json.loads(body)
            start = int(parse_qs(urlsplit(path).query).get("pageToken", ["0"])[0])
            items = listed["items"]
            listed["items"] = items[start : start + self.PAGE]
            if start + self.PAGE < len(items):
                listed["nextPageToken"] = str(start + self.PAGE)
            body = json.dumps(listed).encode()
        return Answer(status, headers, body)

    def ask(self, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None) -> Answer:
        """What the emulator says."""
        connection = http.client.HTTPConnection("127.0.0.1", self.emulator, timeout=30)
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            kept = {name: value for name, value in response.getheaders() if name in ("Content-Range", "Content-Type")}
            return Answer(response.status, kept, response.read())
        finally:
            connection.close()

    def put(self, address: str, data: bytes) -> None:
        """Writes gs://BUCKET/NAME; the bucket is made if need be."""
        bucket, _, name = address.removeprefix("gs://").partition("/")
        new = json.dumps({"name": bucket}).encode()
        self.ask("POST", "/storage/v1/b", new, {"Content-Type": "application/json"})
        path = f"/upload/storage/v1/b/{bucket}/o?uploadType=media&name={quote(name, safe='')}"
        assert self.ask("POST", path, data, {"Content-Type": "application/x-tar"}).status == 200


@contextlib.contextmanager
def google_server() -> Iterator[GoogleServer]:
    """Google Cloud Storage without credentials; the environment says where it is, and that nobody has to be asked."""
    import fsspec.config
    from gcp_storage_emulator.server import create_server

    emulator = create_server("127.0.0.1", 0, in_memory=True)
    emulator.start()
    server = GoogleServer(emulator._api._httpd.server_port)
    os.environ |= {"STORAGE_EMULATOR_HOST": server.url, "FSSPEC_GS_TOKEN": "anon"}
    before = fsspec.config.conf.pop("gs", {})
    fsspec.config.conf["gs"] = {**before, "token": "anon"}  # what fsspec makes of the variable when it is imported
    remote._clients.clear()
    try:
        yield server
    finally:
        for name in ("STORAGE_EMULATOR_HOST", "FSSPEC_GS_TOKEN"):
            os.environ.pop(name, None)
        fsspec.config.conf["gs"] = before
        server.close()
        emulator.stop()
        remote._clients.clear()
