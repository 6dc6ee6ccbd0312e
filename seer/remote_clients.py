"""The clients behind `seer.remote`, from fsspec: with time-outs, and without retries of their own (free of torch)."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from types import MethodType
from typing import Any

from seer.errors import UserError

_CONNECTIONS = 64


def new_client(scheme: str, connect_seconds: float, read_seconds: float) -> Any:
    """A file system of fsspec.

    Args:
        scheme: http, https, s3 or gs.
        connect_seconds: time-out of each connection.
        read_seconds: time-out of each wait for further bytes.

    Raises:
        UserError: its packages are not installed.
        Exception: the client's own, where it cannot use what the environment says.
    """
    try:
        import fsspec

        plain = {"use_listings_cache": False, "skip_instance_cache": True}
        if scheme == "s3":
            times = {"connect_timeout": connect_seconds, "read_timeout": read_seconds}
            # By default ten, and the other threads would wait for them.
            config = {**times, "max_pool_connections": _CONNECTIONS, "retries": {"max_attempts": 0}}
            client = fsspec.filesystem("s3", **plain, config_kwargs=config)
            client.retries = 1
            return client
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=connect_seconds, sock_read=read_seconds)
        if scheme == "gs":
            return _google_client({**plain, "requests_timeout": timeout})
        session = {"timeout": timeout, "trust_env": True, "headers": {"Accept-Encoding": "identity"}}
        return fsspec.filesystem(scheme, **plain, client_kwargs=session)
    except ImportError:
        raise UserError(
            f"{scheme}:// needs packages that are not installed",
            "the clients of buckets and web servers are an extra",
            "pip install 'seer[remote]'",
        ) from None


def _google_client(options: Mapping[str, Any]) -> Any:
    # Of the JSON interface alone: what fsspec takes for gs:// asks the bucket's kind over gRPC before every request,
    # for a minute where nobody answers that.
    from fsspec.config import conf
    from gcsfs.core import GCSFileSystem

    for name in ("gcsfs", "google.auth"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # they tell what seer tells, with more
    told = {**conf.get("gs", {}), **conf.get("gcs", {})}
    # Otherwise a file that is not there means: without credentials.
    named = bool(os.environ.get("GOOGLE_APPLICATION_CREDENTIALS")) and "token" not in told
    client = GCSFileSystem(**options, **({"token": "google_default"} if named else {}))
    request = type(client)._request
    client._request = MethodType(getattr(request, "__wrapped__", request), client)  # without half a minute of retries
    return client
