"""A web server on this machine that serves a folder, and misbehaves as it is told."""

import contextlib
import http.server
import json
import pathlib
import re
import threading
import urllib.parse


class HttpFiles(http.server.ThreadingHTTPServer):
    """Serves the files below a folder, ranges of them too.

    It answers also as Google's object store does: the folder is a bucket of any name (see `as_bucket`).
    """

    daemon_threads = True

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = pathlib.Path(folder)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.requests = []  # paths and ranges, in order
        self.status = 503  # of failures
        self.failures = 0  # requests that are still to fail, -1: all
        self.cut = 0  # answers that are still to end half way, -1: all
        self.ignores_ranges = False
        self.hidden = set()  # paths that are not there
        self.moved = {}  # paths that are somewhere else
        self.lock = threading.Lock()

    def handle_error(self, request, client_address):
        """Clients may hang up."""

    def fails(self, fault):
        """Whether this request is one of those that have the fault."""
        with self.lock:
            left = getattr(self, fault)
            setattr(self, fault, left - (left > 0))
            return left != 0


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        server, url = self.server, urllib.parse.urlsplit(self.path)
        path, asked = urllib.parse.unquote(url.path), self.headers.get("Range")
        with server.lock:
            server.requests.append((path, asked))
        if server.fails("failures"):
            self.answer(server.status)
            return
        if path in server.moved:
            self.answer(302, Location=server.moved[path])
            return
        if re.fullmatch(r"/storage/v1/b/[^/]+/o", path):
            self.answer_list(urllib.parse.parse_qs(url.query))
            return
        path = re.sub(r"^/storage/v1/b/[^/]+/o/", "/", path)
        file = server.folder / path.lstrip("/")
        if path in server.hidden or not file.is_file():
            self.answer(404)
            return
        data = file.read_bytes()
        version = {"x-goog-generation": str(file.stat().st_mtime_ns)}
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", asked or "")
        if match is None or server.ignores_ranges:
            self.answer(200, data, **version)
            return
        start, stop = int(match[1]), min(int(match[2]) + 1, len(data))
        if start >= stop:
            self.answer(416)
            return
        part = {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}
        self.answer(206, data[start:stop], **version, **part)

    def answer(self, status, data=b"", **headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if data and self.server.fails("cut"):
            data, self.close_connection = data[: len(data) // 2], True
        self.wfile.write(data)

    def answer_list(self, query):
        start, end = (query.get(key, [""])[0] for key in ("startOffset", "endOffset"))
        names = sorted(str(f.relative_to(self.server.folder)) for f in self.server.folder.rglob("*") if f.is_file())
        items = [{"name": name} for name in names if name >= start and (not end or name < end)]
        self.answer(200, json.dumps({"items": items}).encode(), **{"Content-Type": "application/json"})


@contextlib.contextmanager
def serving(folder):
    """A server of this folder, while the body runs."""
    with HttpFiles(folder) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def as_bucket(server, monkeypatch):
    """Makes tensorstore ask this server for what is at gs://; returns the URL of its folder."""
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", server.url)
    monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")
    return f"gs://bucket-{server.server_port}"  # tensorstore remembers where it found one
