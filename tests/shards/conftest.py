"""A server of files that can behave badly, and shards made without tlkit."""

from __future__ import annotations

import io
import json
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image


class Server:
    """Files of a folder over HTTP.

    Attributes:
        url: Of the folder.
        ranges: Whether parts of files are given.
        drops: By file name, after how many bytes of each answer the connection is cut.
        failing: By file name, how many requests are answered with 503 before the first good one; -1 for all.
        silent: Names of files that are never answered for.
        asked: Requests (GET) by file name.
        sent: Bytes of content by file name.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.ranges = folder, True
        self.drops: dict[str, int] = {}
        self.failing: dict[str, int] = {}
        self.silent: set[str] = set()
        self.asked: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        self.over = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                self.answer(head=True)

            def do_GET(self) -> None:
                self.answer(head=False)

            def log_message(self, *_: object) -> None:
                pass

            def answer(self, head: bool) -> None:
                name = self.path.lstrip("/")
                path = server.folder / name
                if not head:
                    server.asked[name] += 1
                if name in server.silent:
                    server.over.wait()
                    self.close_connection = True
                    return
                if not head and server.failing.get(name):
                    server.failing[name] -= 1
                    self.refuse(503)
                    return
                if not path.is_file():
                    self.refuse(404)
                    return
                content, first = path.read_bytes(), 0
                size = len(content)
                asked = self.headers.get("Range")
                if asked and server.ranges:
                    begin, _, end = asked.removeprefix("bytes=").partition("-")
                    first = int(begin)
                    content = content[first : int(end) + 1 if end else None]
                    self.send_response(206)
                    self.send_header("Content-Range", f"bytes {first}-{first + len(content) - 1}/{size}")
                else:
                    self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.send_header("ETag", f'"{path.stat().st_mtime_ns}"')
                self.end_headers()
                if head:
                    return
                some = content[: server.drops.get(name)]
                self.wfile.write(some)
                server.sent[name] += len(some)
                if len(some) < len(content):
                    self.wfile.flush()
                    self.close_connection = True

            def refuse(self, status: int) -> None:
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()

        self.httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.httpd.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.httpd.server_address[1]}"
        threading.Thread(target=self.httpd.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self) -> None:
        """Answer nobody any more."""
        self.over.set()
        self.httpd.shutdown()
        self.httpd.server_close()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Server]:
    """A server of ``tmp_path / "served"``."""
    (tmp_path / "served").mkdir()
    server = Server(tmp_path / "served")
    yield server
    server.close()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Half a second without an answer is too long; and nothing is there from another test."""
    monkeypatch.setenv("TLKIT_TIMEOUT", "0.5s")
    monkeypatch.setenv("TLKIT_TRIES", "3")
    monkeypatch.setenv("TLKIT_CACHE", str(tmp_path / "cache"))
    slept = time.sleep
    monkeypatch.setattr("tlkit.shards.remote.time.sleep", lambda seconds: slept(seconds / 50))


def png(colour: int = 128, side: int = 8) -> bytes:
    """A small picture."""
    file = io.BytesIO()
    Image.fromarray(np.full((side, side, 3), colour, np.uint8)).save(file, "PNG")
    return file.getvalue()


Files = Sequence[tuple[str, bytes]]


def write_tar(path: Path, files: Files, form: int = tarfile.PAX_FORMAT) -> Path:
    """A tar file of some files, as another program would write it."""
    with tarfile.open(path, "w", format=form) as archive:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def sample(key: str, label: object = None, said: dict[str, Any] | None = None, colour: int = 128) -> Files:
    """An image with what stands beside it."""
    files = [(f"{key}.png", png(colour))]
    files += [(f"{key}.cls", str(label).encode())] if label is not None else []
    return files + ([(f"{key}.json", json.dumps(said).encode())] if said is not None else [])


@pytest.fixture
def make_tar() -> Callable[..., Path]:
    """``make_tar(path, files)``."""
    return write_tar
