"""A web server on the loopback address that gives files as a publisher does: with an ETag, and in parts on request."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import md5
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class FileServer:
    """What it gives, and what was asked of it.

    `stop_after` closes the connection after so many bytes of the next answers, one number for each.
    """

    files: dict[str, bytes]
    url: str = ""
    has_ranges: bool = True
    stop_after: list[int] = field(default_factory=list)
    requests: list[tuple[str, str | None]] = field(default_factory=list)


@contextmanager
def serve_files(files: dict[str, bytes]) -> Iterator[FileServer]:
    """Serve `files`, by path, until the block ends."""
    server = FileServer(files)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            wanted = self.headers.get("Range")
            server.requests.append((self.path, wanted))
            content = server.files.get(self.path)
            if content is None:
                self.send_error(404)
                return
            tag = f'"{md5(content).hexdigest()}"'
            start = 0
            found = re.fullmatch(r"bytes=(\d+)-", wanted or "")
            if found and server.has_ranges and self.headers.get("If-Range", tag) == tag:
                start = int(found[1])
            if start and start >= len(content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.send_header("ETag", tag)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            stop = server.stop_after.pop(0) if server.stop_after else None
            self.wfile.write(content[start:][:stop])
            if stop is not None:
                self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

    listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listener.serve_forever, daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{listener.server_address[1]}"
    try:
        yield server
    finally:
        listener.shutdown()
        listener.server_close()
        thread.join()
