"""A hub on this machine: repositories are directories, served as the Hugging Face hub serves them, ranges included."""

from __future__ import annotations

import contextlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Hub:
    """Serves the directories below `root` as org/name. `sent` are the bytes of each file that were asked for."""

    def __init__(self, root: Path) -> None:
        self.root, self.sent, self.ranges, self.lists = root, dict[str, int](), True, True
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def _handler(hub) -> type[BaseHTTPRequestHandler]:  # noqa: N805
        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def do_GET(self) -> None:
                if not hub.lists and self.path.startswith("/api"):
                    self.answer(503, b"", {})
                elif found := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)", self.path):
                    files = [str(p.relative_to(hub.root / found[1])) for p in (hub.root / found[1]).rglob("*.*")]
                    body = {"id": found[1], "siblings": [{"rfilename": name} for name in sorted(files)]}
                    self.answer(200, json.dumps(body).encode(), {"Content-Type": "application/json"})
                elif found := re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/main/(.+)", self.path):
                    self.file(found[2], (hub.root / found[1] / found[2]).read_bytes())
                else:
                    self.answer(404, b"", {})

            def file(self, name: str, data: bytes) -> None:
                asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
                if asked is None or not hub.ranges:
                    part, status, headers = data, 200, dict[str, str]()
                else:
                    if not data:
                        return self.answer(416, b"", {"Content-Range": "bytes */0"})
                    start, stop = int(asked[1]), min(int(asked[2]) + 1, len(data))
                    part, status = data[start:stop], 206
                    headers = {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}
                hub.sent[name] = hub.sent.get(name, 0) + len(part)
                self.answer(status, part, headers)

            def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
                with contextlib.suppress(ConnectionError):  # whoever asked has read enough
                    self.send_response(status)
                    for name, value in {**headers, "Content-Length": str(len(body))}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(body)

        return Handler


@contextlib.contextmanager
def serving(root: Path) -> Iterator[Hub]:
    hub = Hub(root)
    thread = threading.Thread(target=hub.server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.server.shutdown()
        hub.server.server_close()
