"""A small local server that speaks enough of the Hugging Face hub's protocol to test real downloads offline.

It takes uploads and answers the model info, revision and tree calls of the API and ``resolve`` (HEAD and GET, with
ranges), with the headers that ``huggingface_hub`` reads: ETag, X-Repo-Commit, X-Error-Code, X-Error-Message. Point
``HF_ENDPOINT`` at ``HubServer.url``.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

TOKEN = "hf_the_token_that_opens_gated_models"


@dataclass
class Repository:
    """Commits in order, each a map of file names to bytes; the last one is ``main``. ``gated`` asks for the token."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False

    def commit(self, files: Mapping[str, bytes], tag: str | None = None) -> str:
        digest = hashlib.sha1(str(len(self.commits)).encode())
        for name in sorted(files):
            digest.update(name.encode() + files[name])
        sha = digest.hexdigest()
        self.commits[sha] = dict(files)
        if tag:
            self.tags[tag] = sha
        return sha

    def commit_directory(self, directory: Path, tag: str | None = None, **more: bytes) -> str:
        files = {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}
        return self.commit(files | more, tag)

    def find(self, revision: str) -> str | None:
        if revision == "main":
            return list(self.commits)[-1]
        sha = self.tags.get(revision, revision)
        return sha if sha in self.commits else None


class HubServer:
    """The server in a thread; ``requests`` lists what was asked: (method, path)."""

    def __init__(self, repositories: Mapping[str, Repository]) -> None:
        self.repositories = dict(repositories)
        self.requests: list[tuple[str, str]] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            # HTTP/1.0, the default here, closes every connection: after stop() nobody is answered any more.

            def do_HEAD(self) -> None:
                self._answer()

            def do_GET(self) -> None:
                self._answer()

            def do_POST(self) -> None:
                path = unquote(urlsplit(self.path).path).strip("/")
                hub.requests.append((self.command, path))
                sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                token = self.headers.get("Authorization", "").removeprefix("Bearer ")
                status, headers, body = hub.receive(path, token, sent)
                self.send_response(status)
                for key, value in headers.items():
                    self.send_header(key, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                pass

            def _answer(self) -> None:
                path = unquote(urlsplit(self.path).path).strip("/")
                hub.requests.append((self.command, path))
                token = self.headers.get("Authorization", "").removeprefix("Bearer ")
                status, headers, body = hub.respond(path, token)
                start, wanted = 0, self.headers.get("Range", "")
                if status == 200 and wanted.startswith("bytes="):
                    first, _, last = wanted.removeprefix("bytes=").partition("-")
                    start, end = int(first or 0), min(int(last or len(body) - 1), len(body) - 1)
                    headers["Content-Range"] = f"bytes {start}-{end}/{len(body)}"
                    status, body = 206, body[start : end + 1]
                self.send_response(status)
                for key, value in headers.items():
                    self.send_header(key, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)
                if path == "stop":
                    threading.Thread(target=hub.stop).start()

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def respond(self, path: str, token: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body for a path such as ``ORG/NAME/resolve/main/config.json``."""
        if path == "stop":
            return 200, {}, b""
        if path == "api/whoami-v2":
            return _json({"name": "someone"}) if token == TOKEN else _error(401, "", "Invalid credentials")
        api = path.startswith("api/models/")
        parts = path.removeprefix("api/models/").split("/")
        name, rest = "/".join(parts[:2]), parts[2:]
        repository = self.repositories.get(name)
        if repository is None:
            # The hub does not tell a stranger whether a model exists.
            if not token:
                return _error(401, "RepoNotFound", "Invalid username or password.")
            return _error(404, "RepoNotFound", "Repository not found")
        if token and token != TOKEN:
            return _error(401, "", "Invalid credentials in Authorization header")
        revision = rest[1] if len(rest) > 1 else "main"
        sha = repository.find(revision)
        if sha is None:
            return _error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = repository.commits[sha]
        if api and rest[:1] == ["tree"]:
            entries = [{"type": "file", "path": n, "size": len(b), "oid": _etag(b)} for n, b in files.items()]
            return _json(entries)
        if api:
            siblings = [{"rfilename": n} for n in files]
            return _json(
                {
                    "id": name,
                    "modelId": name,
                    "sha": sha,
                    "siblings": siblings,
                    "private": repository.private,
                    "gated": "manual" if repository.gated else False,
                    "tags": [],
                    "downloads": 0,
                }
            )
        if rest[:1] != ["resolve"]:
            return _error(404, "", f"unknown path {path}")
        if repository.gated and token != TOKEN:
            message = f"Access to model {name} is restricted. You must have access to it and be authenticated."
            return _error(403 if token else 401, "GatedRepo", message)
        filename = "/".join(rest[2:])
        if filename not in files:
            status, headers, body = _error(404, "EntryNotFound", f"{filename} does not exist")
            return status, headers | {"X-Repo-Commit": sha}, body
        body = files[filename]
        return 200, {"ETag": f'"{_etag(body)}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}, body

    def receive(self, path: str, token: str, sent: bytes) -> tuple[int, dict[str, str], bytes]:
        """Uploads: new repositories, the question how to send files (as they are), commits."""
        if path == "api/validate-yaml":
            return _json({"errors": [], "warnings": []})
        if token != TOKEN:
            return _error(401, "", "Invalid credentials in Authorization header")
        if path == "api/repos/create":
            asked = json.loads(sent)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            if name in self.repositories:
                return 409, {}, json.dumps({"error": "You already created it", "url": f"{self.url}/{name}"}).encode()
            self.repositories[name] = Repository(private=asked.get("visibility") == "private" or asked.get("private"))
            return _json({"url": f"{self.url}/{name}", "name": name})
        name, verb = "/".join(path.split("/")[2:4]), path.split("/")[4]
        if name not in self.repositories:
            return _error(404, "RepoNotFound", "Repository not found")
        if verb == "preupload":
            how = {"uploadMode": "regular", "shouldIgnore": False}
            return _json({"files": [{"path": f["path"], **how} for f in json.loads(sent)["files"]]})
        lines = [json.loads(line) for line in sent.decode().splitlines()]
        added = {x["value"]["path"]: base64.b64decode(x["value"]["content"]) for x in lines if x["key"] == "file"}
        sha = self.repositories[name].commit(added)
        return _json({"success": True, "commitOid": sha, "commitUrl": f"{self.url}/{name}/commit/{sha}"})


def _etag(body: bytes) -> str:
    return hashlib.sha1(body).hexdigest()


def _json(value: object) -> tuple[int, dict[str, str], bytes]:
    return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


def _error(status: int, code: str, message: str) -> tuple[int, dict[str, str], bytes]:
    headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
    return status, headers, json.dumps({"error": message}).encode()
