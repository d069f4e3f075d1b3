"""A real HTTP server for shards that can be told to misbehave; it also speaks the S3 that reading needs."""

from __future__ import annotations

import contextlib
import email.utils
import hashlib
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

Fault = int | str | tuple[int, dict[str, str]]


class ShardServer(ThreadingHTTPServer):
    """Serves a folder; `faults[name]` are what happens to the next GETs of a file, one after the other.

    Faults: an int (that HTTP status), or (status, headers), "cut" (half of the bytes, then the connection ends),
    "unannounced" (half of the bytes, whose number is not said), "page" (a web page, with status 200), "stall" (half,
    then nothing), "slow start" (nothing for 0.6 s, then all), "wrong" (a flipped bit).  A fault "always ..." stays.
    `head_faults[name]` are the same for HEADs, and `listing_faults` for listings.  `absent` is the status of what is
    not there, or "page".
    """

    daemon_threads = True
    request_queue_size = 128  # with 5 a burst of clients waits a second for its connections

    def __init__(self, folder: Path, bytes_per_sec: float | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.bytes_per_sec = folder, bytes_per_sec
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.faults: dict[str, list[Fault]] = defaultdict(list)
        self.head_faults: dict[str, list[Fault]] = defaultdict(list)
        self.listing_faults: list[Fault] = []
        self.absent: Fault = 404
        self.asked_at: list[float] = []
        self.gets: Counter[str] = Counter()
        self.heads: Counter[str] = Counter()
        self.lists = True
        self.stopped = threading.Event()

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that go away are part of the tests."""


@contextlib.contextmanager
def serve(folder: Path, bytes_per_sec: float | None = None) -> Iterator[ShardServer]:
    server = ShardServer(folder, bytes_per_sec)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.stopped.set()
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: ShardServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        address = urlsplit(self.path)
        query = parse_qs(address.query)
        name = unquote(address.path).lstrip("/")
        if "list-type" in query:
            self._list_bucket(name.strip("/"), query.get("prefix", [""])[0])
            return
        path = self.server.folder / name
        self.server.asked_at.append(time.monotonic())
        if path.is_dir():
            fault = self._next(self.server.listing_faults)
            if fault is None:
                self._list_folder(path)
            else:
                self._refuse(fault)
            return
        (self.server.gets if body else self.server.heads)[path.name] += 1
        fault = self._next((self.server.faults if body else self.server.head_faults)[path.name])
        if not path.is_file():
            fault = self.server.absent
        if fault == "page" or isinstance(fault, int | tuple):
            self._refuse(fault)
            return
        data = path.read_bytes()
        if fault == "slow start":
            self.server.stopped.wait(0.6)
        if fault == "wrong":
            data = data[:600] + bytes([data[600] ^ 1]) + data[601:]
        self.send_response(200)
        if fault == "unannounced":
            data, self.close_connection = data[: len(data) // 2], True
            self.send_header("Connection", "close")
        else:
            self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Type", "application/x-tar")
        self.send_header("ETag", f'"{hashlib.md5(data).hexdigest()}"')
        self.send_header("Last-Modified", email.utils.formatdate(path.stat().st_mtime, usegmt=True))
        self.end_headers()
        if not body:
            return
        if fault in ("cut", "stall"):
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            if fault == "stall":
                self.server.stopped.wait(30)
            self.close_connection = True
            return
        for first in range(0, len(data), 8192):
            self.wfile.write(data[first : first + 8192])
            if self.server.bytes_per_sec is not None:
                time.sleep(8192 / self.server.bytes_per_sec)

    def _refuse(self, fault: Fault) -> None:
        if fault == "page":
            self._send(200, b"<!DOCTYPE html>\n<html><body>Please log in</body></html>\n" * 40, "text/html")
        elif isinstance(fault, tuple):
            self._send(fault[0], b"", "text/plain", fault[1])
        else:
            self._send(int(fault), b"", "text/plain")

    def _next(self, waiting: list[Fault]) -> Fault | None:
        if not waiting:
            return None
        first = waiting[0]
        if isinstance(first, str) and first.startswith("always "):
            kind = first.removeprefix("always ")
            return int(kind) if kind.isdigit() else kind
        return waiting.pop(0)

    def _list_folder(self, path: Path) -> None:
        names = sorted(found.name for found in path.iterdir()) if self.server.lists else []
        links = "".join(f'<a href="{name}">{name}</a>\n' for name in names)
        self._send(200, f"<html>{links}</html>".encode(), "text/html")

    def _list_bucket(self, bucket: str, prefix: str) -> None:
        root = self.server.folder / bucket
        keys = sorted(str(found.relative_to(root)) for found in root.rglob("*") if found.is_file())
        rows = "".join(
            f"<Contents><Key>{key}</Key><Size>{(root / key).stat().st_size}</Size><ETag>x</ETag>"
            "<LastModified>2026-01-01T00:00:00.000Z</LastModified><StorageClass>STANDARD</StorageClass></Contents>"
            for key in keys
            if key.startswith(prefix)
        )
        text = (
            '<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
            f"<Name>{bucket}</Name><Prefix>{prefix}</Prefix><IsTruncated>false</IsTruncated>{rows}</ListBucketResult>"
        )
        self._send(200, text.encode(), "application/xml")

    def _send(self, status: int, data: bytes, kind: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Type", kind)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
