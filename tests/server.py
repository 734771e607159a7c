"""A server of files that can behave badly."""

from __future__ import annotations

import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Server:
    """Files of a folder over HTTP.

    Attributes:
        url: Of the folder.
        ranges: Whether parts of files are given.
        vague: Whether answers do not say how long they are.
        drops: By file name, after how many bytes of each answer the connection is cut.
        failing: By file name, how many requests are answered with 503 before the first good one; -1 for all.
        silent: Names of files that are never answered for.
        stalls: By file name, after how many bytes of each answer nothing more comes.
        asked: Requests (GET) by file name.
        sent: Bytes of content by file name.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.ranges, self.vague = folder, True, False
        self.drops: dict[str, int] = {}
        self.stalls: dict[str, int] = {}
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
                if head or not server.vague:
                    self.send_header("Content-Length", str(len(content)))
                else:
                    self.send_header("Connection", "close")
                self.send_header("ETag", f'"{path.stat().st_mtime_ns}"')
                self.end_headers()
                if head:
                    return
                some = content[: server.stalls.get(name, server.drops.get(name))]
                self.wfile.write(some)
                server.sent[name] += len(some)
                self.close_connection = self.close_connection or server.vague
                if len(some) < len(content):
                    self.wfile.flush()
                    if name in server.stalls:
                        server.over.wait()
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
