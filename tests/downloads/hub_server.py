"""A stand-in for the Hugging Face hub on localhost, with what snapshot_download and load_dataset ask for."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class StandInHub:
    """A local server that answers like the hub."""

    # "models/<id>" or "datasets/<id>" -> file contents by name
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)  # repositories that need the token "good"
    cut: dict[str, int] = field(default_factory=dict)  # file name -> how many times its connection breaks halfway
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)  # method, path, Range header of each
    status: int | None = None  # the answer to every request, if set
    url: str = ""

    def fetched(self) -> list[str]:
        """Names of the files whose content was asked for."""
        return [path.rsplit("/", 1)[-1] for method, path, _ in self.requests if method == "GET" and "/resolve/" in path]

    def start(self) -> ThreadingHTTPServer:
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return server


class _Handler(BaseHTTPRequestHandler):
    hub: StandInHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_args) -> None:
        """Keep the test output clean."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path, self.headers.get("Range")))
        if self.hub.status is not None:
            self._error(self.hub.status, "", "out of order")
            return
        api = re.fullmatch(r"/api/(models|datasets)/(.+?)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?", path)
        resolve = re.fullmatch(r"/(datasets/)?(.+?)/resolve/([^/]+)/(.+)", path)
        if api:
            kind, repository, what, revision, _ = api.groups()
            self._api(f"{kind}/{repository}", what, revision, body)
        elif resolve:
            kind, repository, revision, name = resolve.groups()
            self._file(f"{kind[:-1] if kind else 'models'}/{repository}", revision, name)
        else:
            self._error(404, "", "no such page")

    def _known(self, key: str, revision: str | None) -> bool:
        if key not in self.hub.repositories:
            self._error(401, "RepoNotFound", "Repository not found")
        elif revision not in (None, "main", COMMIT):
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        else:
            return True
        return False

    def _api(self, key: str, what: str | None, revision: str | None, body: bytes) -> None:
        if not self._known(key, revision):
            return
        files = self.hub.repositories[key]
        entries = [
            {"type": "file", "path": name, "oid": _etag(content), "size": len(content)}
            for name, content in files.items()
        ]
        if what == "tree":
            self._json(entries)
        elif what == "paths-info":
            asked = re.findall(r"paths=([^&]*)", unquote(body.decode())) or json.loads(body or b"{}").get("paths", [])
            self._json([entry for entry in entries if entry["path"] in asked])
        else:
            siblings = [{"rfilename": e["path"], "size": e["size"], "blobId": e["oid"]} for e in entries]
            gated = "manual" if key in self.hub.gated else False
            self._json({"id": key.split("/", 1)[1], "sha": COMMIT, "siblings": siblings, "tags": [], "gated": gated})

    def _file(self, key: str, revision: str, name: str) -> None:
        if not self._known(key, revision):
            return
        if key in self.hub.gated and self.headers.get("Authorization") != "Bearer good":
            self._error(401, "GatedRepo", "Access to this repository is restricted")
            return
        content = self.hub.repositories[key].get(name)
        if content is None:
            self._error(404, "EntryNotFound", "Entry not found")
            return
        first = int(re.match(r"bytes=(\d+)-", self.headers.get("Range") or "bytes=0-").group(1))
        self.send_response(206 if first else 200)
        self.send_header("ETag", f'"{_etag(content)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content) - first))
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.hub.cut.get(name, 0) > 0:
            self.hub.cut[name] -= 1
            self.wfile.write(content[first : first + (len(content) - first) // 2])
            self.wfile.flush()
            self.close_connection = True
            return
        self.wfile.write(content[first:])

    def _json(self, value: object) -> None:
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _error(self, status: int, code: str, message: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", "0")
        self.end_headers()


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
