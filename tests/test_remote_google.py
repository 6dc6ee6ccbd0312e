"""gs:// against an emulator of Google's JSON interface: what is there, its bytes, what goes wrong, who asks."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from functools import partial
from pathlib import Path

import pytest
from remote_servers import DATA, GoogleServer, google_server, whole

from seer import remote
from seer.errors import UserError

URL = "gs://shards/web/b-0.tar"
read_bytes = partial(remote.read_bytes, most=10**9)


@pytest.fixture(scope="module")
def emulator() -> Iterator[GoogleServer]:
    with google_server() as found:
        for name in ("b-1.tar", "b-0.tar", "b-0.tar.seer.npz", "deeper/b-2.tar", "b 3+4%.tar"):
            found.put(f"gs://shards/web/{name}", DATA)
        yield found


@pytest.fixture
def server(emulator: GoogleServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[GoogleServer]:
    monkeypatch.setattr(remote, "_PAUSE_SECONDS", 0.02)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", emulator.url)
    monkeypatch.setenv("FSSPEC_GS_TOKEN", "anon")
    emulator.fault = lambda path, number: None
    emulator.requests.clear()
    yield emulator


@pytest.mark.usefixtures("small_parts")
def test_what_is_there_and_its_bytes(server: GoogleServer) -> None:
    listed = ["gs://shards/web/b 3+4%.tar", "gs://shards/web/b-0.tar", "gs://shards/web/b-1.tar"]
    assert remote.found("gs://shards/web/*.tar") == listed  # of two pages
    assert remote.found("gs://shards/web/b-?.tar") == listed[1:]
    assert remote.found("gs://shards/*/b-[01].tar") == listed[1:]
    assert remote.found("gs://shards/none/*.tar") == []
    for url in (URL, listed[0]):
        assert remote.size(url) == len(DATA)
        assert whole(url) == read_bytes(url) == DATA
        assert remote.read_range(url, 5, 10, size=len(DATA), patience=5.0) == DATA[5:15]
        assert remote.read_range(url, len(DATA) - 7, 7, size=len(DATA), patience=5.0) == DATA[-7:]


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("size", [1000, 30_000, len(DATA) - 1, len(DATA) + 1, 120_000, 300_000])
def test_another_size_is_told_at_once(server: GoogleServer, size: int) -> None:
    with pytest.raises(UserError, match=r"b-0\.tar.*the index is stale.*seer shards index"):
        whole(URL, size=size)


def test_what_is_not_there_is_told_at_once(server: GoogleServer) -> None:
    for url in ("gs://shards/web/no.tar", "gs://nobody/web/b-0.tar"):
        for ask in (read_bytes, remote.size, whole):
            with pytest.raises(remote.Refused, match=f"{url} does not exist") as told:
                ask(url)
            assert told.value.status == 404
    with pytest.raises(remote.Refused, match=r"gs://nobody/web/\*\.tar does not exist"):
        remote.found("gs://nobody/web/*.tar")


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("fault", ["500", "502", "503", "429", "cut"])
def test_failures_that_pass_are_tried_again_here_and_by_nobody_else(server: GoogleServer, fault: str) -> None:
    server.fault = lambda path, number: fault if number in (0, 2, 4) else None
    began = time.monotonic()
    assert whole(URL) == DATA
    assert len(server.requests) == 4 + 3
    server.requests.clear()
    assert remote.size(URL) == len(DATA)
    server.requests.clear()
    assert len(remote.found("gs://shards/web/*.tar")) == 3
    assert time.monotonic() - began < 5  # the client has pauses of a second and more


@pytest.mark.parametrize(
    ("fault", "words"),
    [("403", "is refused: the server answers 403"), ("410", "answers 410"), ("400", "answers 400")],
)
def test_refusals_are_told_at_once(server: GoogleServer, fault: str, words: str) -> None:
    server.fault = lambda path, number: fault
    for ask in (read_bytes, remote.size, whole):
        server.requests.clear()
        with pytest.raises(remote.Refused, match=f"b-0.tar.* {words}") as told:
            ask(URL)
        assert told.value.status == int(fault)
        assert len(server.requests) <= 3
    with pytest.raises(remote.Refused, match=rf"\*\.tar.* {words}"):
        remote.found("gs://shards/web/*.tar")


def test_patience_ends_with_the_address(server: GoogleServer) -> None:
    for fault, words in (
        ("503", "the server answers 503"),
        ("502", "the server answers 502"),
        ("cut", "the connection was cut"),
    ):
        server.fault = lambda path, number, fault=fault: fault
        for ask in (read_bytes, remote.size):
            server.requests.clear()
            began = time.monotonic()
            with pytest.raises(UserError, match=rf"b-0\.tar cannot be read \({words}.*for 0\.\d+ s; .* again"):
                ask(URL, patience=0.3)
            assert time.monotonic() - began < 3
            assert len(server.requests) > 1


def test_a_silent_server_is_given_up(server: GoogleServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_READ_SECONDS", 0.3)
    monkeypatch.setattr(remote, "_clients", {})
    server.fault = lambda path, number: "stall" if number < 2 else None
    assert remote.read_range(URL, 5, 1000, size=len(DATA), patience=20.0) == DATA[5:1005]
    server.fault = lambda path, number: "stall"
    with pytest.raises(UserError, match="does not answer in time"):
        whole(URL, patience=0.5)


def test_a_server_that_knows_no_ranges_is_read_as_a_whole(server: GoogleServer) -> None:
    server.fault = lambda path, number: "whole"
    assert whole(URL) == DATA
    with pytest.raises(UserError, match=r"no ranges; .*data\.cache_gb"):
        remote.read_range(URL, 5, 10, size=len(DATA), patience=5.0)


def test_a_server_that_dies_and_comes_back(server: GoogleServer, monkeypatch: pytest.MonkeyPatch) -> None:
    mortal = GoogleServer(server.emulator)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", mortal.url)
    assert read_bytes(URL) == DATA
    mortal.close()
    with pytest.raises(UserError, match=r"b-0.tar cannot be read \(it cannot be reached\)"):
        read_bytes(URL, patience=0.5)
    mortal = GoogleServer(server.emulator, mortal.port)
    assert read_bytes(URL) == DATA
    mortal.close()


@pytest.fixture
def without_token(server: GoogleServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nobody has said who asks, as in a new process."""
    import fsspec.config

    monkeypatch.setattr(remote, "_clients", {})
    monkeypatch.setitem(fsspec.config.conf, "gs", {})
    monkeypatch.delenv("FSSPEC_GS_TOKEN")
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))
    monkeypatch.setenv("NO_GCE_CHECK", "true")


@pytest.mark.usefixtures("without_token")
def test_a_request_without_credentials_that_is_refused(server: GoogleServer, caplog: pytest.LogCaptureFixture) -> None:
    assert read_bytes(URL) == DATA
    assert "Authorization" not in server.headers
    server.fault = lambda path, number: "401"
    words = "is refused: the server answers 401 to a request without credentials.*gcloud auth application-default login"
    for ask in (read_bytes, remote.size, remote.found):
        with pytest.raises(remote.Refused, match=words):
            ask(URL + "*" * (ask is remote.found))
    assert not [one for one in caplog.records if one.name.startswith(("google", "gcsfs"))]


def service_account(folder: Path, server: GoogleServer) -> Path:
    """A key file as Google gives them, whose tokens the server hands out."""
    from cryptography.hazmat.primitives.asymmetric import rsa
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    key = rsa.generate_private_key(65537, 2048)
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption()).decode()
    file = folder / "key.json"
    account = {"type": "service_account", "client_email": "a@b", "private_key_id": "1", "project_id": "p"}
    file.write_text(json.dumps({**account, "private_key": pem, "token_uri": f"{server.url}/token"}))
    return file


@pytest.mark.usefixtures("without_token")
def test_a_service_account(server: GoogleServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(service_account(tmp_path, server)))
    assert read_bytes(URL) == DATA
    assert server.headers["Authorization"] == f"Bearer {server.TOKEN}"
    assert server.requests.count("/token") == 1
    server.fault = lambda path, number: "403"
    with pytest.raises(remote.Refused, match=r"answers 403; buckets do so.*GOOGLE_APPLICATION_CREDENTIALS") as told:
        read_bytes(URL)
    assert server.TOKEN not in repr(told.value)


@pytest.mark.usefixtures("without_token")
@pytest.mark.parametrize(
    ("fault", "words"), [("400", "is refused"), ("503", r"cannot be read \(the server answers 503")]
)
def test_no_token_is_had(
    server: GoogleServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, words: str
) -> None:
    """A key that was withdrawn is told at once; a server of tokens that is down for a moment is waited for."""
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(service_account(tmp_path, server)))
    monkeypatch.setattr("google.oauth2._client._exponential_backoff.ExponentialBackoff", lambda: range(1))
    server.fault = lambda path, number: fault if path == "/token" else None
    with pytest.raises(UserError, match=words):
        read_bytes(URL, patience=0.3)
    assert (server.requests.count("/token") > 1) == (fault == "503")
    server.fault = lambda path, number: None
    assert read_bytes(URL) == DATA


@pytest.mark.usefixtures("without_token")
def test_a_token_that_has_run_out(server: GoogleServer) -> None:
    from google.oauth2.credentials import Credentials

    assert read_bytes(URL) == DATA
    remote._client(URL).credentials.credentials = Credentials(server.TOKEN, expiry=datetime(2020, 1, 1))
    with pytest.raises(remote.Refused, match=r"b-0\.tar is refused.* 401.*credentials in the environment"):
        read_bytes(URL)


@pytest.mark.usefixtures("without_token")
def test_a_key_file_that_is_not_there(server: GoogleServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, content in (("no.json", None), ("empty.json", ""), ("other.json", "{}")):
        if content is not None:
            (tmp_path / name).write_text(content)
        monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / name))
        with pytest.raises(
            remote.Refused, match=r"b-0\.tar needs credentials: the file that GOOGLE_APPL.*FSSPEC_GS_TOKEN"
        ):
            read_bytes(URL)
    assert server.requests == []


def test_a_public_bucket_in_a_process_of_its_own(server: GoogleServer, tmp_path: Path) -> None:
    """FSSPEC_GS_TOKEN=anon asks nobody for credentials and beats a key file."""
    code = f"from seer import remote; print(len(remote.read_bytes({URL!r}, most=10**9)), remote._is_anonymous({URL!r}))"
    environment = {"STORAGE_EMULATOR_HOST": server.url, "FSSPEC_GS_TOKEN": "anon"}
    environment |= {"GOOGLE_APPLICATION_CREDENTIALS": str(tmp_path / "no.json"), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.split() == [str(len(DATA)), "True"], done.stderr
    assert done.stderr == ""
