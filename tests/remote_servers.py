"""Servers on loopback that tests read from: a web server that fails on command, and S3 (moto)."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import struct
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from seer import remote

Fault = Callable[[str, int], str | None]
"""Path and number of the request for it, from 0, to what goes wrong: see `WebServer`."""


class WebServer:
    """Serves a folder, with ranges, and does wrong what `fault` says.

    A fault is a status ("503"), "stall" (sends half of the body, then nothing), "cut" (half of the body, then a reset),
    "flip" (a byte of the body is another one), "whole" (ranges are not looked at), "slow" (a quarter of a second before
    the body).

    Attributes:
        url: of the folder.
        requests: path of each GET so far.
        starts: first byte that each GET asked for.
        headers: of the last GET.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.fault = folder, lambda path, number: None
        self.requests: list[str] = []
        self.starts: list[int] = []
        self.headers: dict[str, str] = {}
        self._over = threading.Event()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_HEAD(self) -> None:
                owner._answer(self, None)

            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                number = owner.requests.count(path)
                owner.requests.append(path)
                owner.starts.append(int((re.findall(r"bytes=(\d+)", self.headers.get("Range", "")) or [0])[0]))
                owner.headers = dict(self.headers)
                owner._answer(self, owner.fault(path, number))

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            block_on_close = False

            def handle_error(self, *_: object) -> None:
                pass  # a client that was killed

        self._server = Server(("127.0.0.1", 0), Handler)
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def _answer(self, handler: BaseHTTPRequestHandler, fault: str | None) -> None:
        file = self.folder / handler.path.partition("?")[0].lstrip("/")
        if (fault or "").isdigit() or not file.is_file():
            handler.send_response(int(fault or 404))
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        whole = file.read_bytes()
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", handler.headers.get("Range", "")) if fault != "whole" else None
        body = whole
        if wanted:
            first, last = int(wanted[1]), int(wanted[2])
            if first >= len(whole):
                handler.send_response(416)
                handler.send_header("Content-Length", "0")
                handler.end_headers()
                return
            body = whole[first : last + 1]
        handler.send_response(206 if wanted else 200)
        handler.send_header("Content-Length", str(len(body)))
        if wanted:
            handler.send_header("Content-Range", f"bytes {first}-{first + len(body) - 1}/{len(whole)}")
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
