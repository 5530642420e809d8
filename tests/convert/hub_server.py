"""A server that speaks as much of the Hugging Face Hub as a client needs to make, fill and read a repository."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Hub:
    """What is on the server: the files of each repository and branch, and the requests that came with their tokens."""

    address: str = ""
    files: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    tokens: set[str | None] = field(default_factory=set)


@contextmanager
def serving() -> Iterator[Hub]:
    """Run a server on a free port while the block runs."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, data: Any, status: int = 200, **headers: str) -> None:
        body = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.hub.tokens.add(self.headers.get("Authorization"))
        if self.path == "/api/repos/create":
            given = json.loads(body)
            name = f"{given['organization']}/{given['name']}"
            self.hub.private.setdefault(name, given.get("private") or given.get("visibility") == "private")
            self.hub.files.setdefault((name, "main"), {})
            return self._answer({"url": f"{self.hub.address}/{name}", "name": name, "id": name})
        if self.path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        if found := re.fullmatch("/api/models/(.+)/branch/(.+)", self.path):
            self.hub.files.setdefault((found[1], found[2]), dict(self.hub.files[found[1], "main"]))
            return self._answer({})
        if found := re.fullmatch("/api/models/(.+)/preupload/([^?]+).*", self.path):
            asked = json.loads(body)["files"]
            return self._answer(
                {"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in asked]}
            )
        if found := re.fullmatch("/api/models/(.+)/commit/([^?]+).*", self.path):
            files = self.hub.files[found[1], found[2]]
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "deletedFile":
                    del files[line["value"]["path"]]
            commit = {"commitOid": _commit(files), "success": True}
            return self._answer(commit | {"commitUrl": f"{self.hub.address}/{found[1]}/commit/{_commit(files)}"})
        return self._answer({"error": f"unknown request {self.path}"}, 404)

    def do_GET(self) -> None:
        self.hub.tokens.add(self.headers.get("Authorization"))
        if found := re.fullmatch("/api/models/(.+?)/tree/([^?]+).*", self.path):
            files = self.hub.files.get((found[1], found[2]), {})
            rows = [{"type": "file", "path": name, "size": len(data), "oid": ""} for name, data in files.items()]
            return self._answer(rows)
        if found := re.fullmatch("/api/models/(.+?)(?:/revision/([^?]+))?(?:[?].*)?", self.path):
            files = self.hub.files.get((found[1], found[2] or "main"))
            if files is not None:
                siblings = [{"rfilename": name} for name in files]
                return self._answer({"id": found[1], "sha": _commit(files), "siblings": siblings, "tags": []})
        if found := re.fullmatch("/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path):
            known = [
                files
                for (name, branch), files in self.hub.files.items()
                if name == found[1] and found[2] in (branch, _commit(files))
            ]
            if known and found[3] in known[0]:
                data = known[0][found[3]]
                tag = f'"{hashlib.sha1(data).hexdigest()}"'
                return self._answer(data, ETag=tag, X_Repo_Commit=_commit(known[0]))
            error = "EntryNotFound" if known else "RevisionNotFound" if found[1] in self.hub.private else "RepoNotFound"
            return self._answer({"error": error}, 404, X_Error_Code=error)
        return self._answer({"error": "unknown"}, 404, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET  # noqa: N815


def _commit(files: dict[str, bytes]) -> str:
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
