"""A real HTTP server on loopback that speaks the Hugging Face hub's protocol, as far as models need it.

Repositories have commits (whole trees), branches and large files by their SHA-256; no xet.  It can misbehave.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NoReturn
from urllib.parse import unquote, urlsplit

import pytest

TOKEN = "hf_a_token_that_no_file_may_hold"
OWNER = "me"
LARGE = (".safetensors", ".bin", ".pth", ".pt", ".onnx")
"""Endings of what goes by its SHA-256."""

Tree = dict[str, bytes]


@dataclass
class Repository:
    """Models' files by commit."""

    commits: dict[str, Tree] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    private: bool = False

    def commit(self, branch: str, tree: Tree) -> str:
        """A new commit at the end of a branch; returns its id."""
        text = json.dumps([branch, len(self.commits), sorted(tree)])
        name = hashlib.sha1(text.encode()).hexdigest()
        self.commits[name], self.branches[branch] = tree, name
        return name

    def commit_of(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.branches.get(revision)


class HubServer(ThreadingHTTPServer):
    """`repositories` by USER/NAME.  `faults[NAME]` is what happens to every request for a file of that name: an HTTP
    status, or "short" (half of the bytes, as if these were all), "cut" (the connection ends there), "wrong" (a flipped
    bit), "other commit", "elsewhere" (at another host, as large files are).  `moved` are repositories with a new name.
    `down` is the status of all answers.  `asked` counts requests by method and path.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.faults: dict[str, int | str] = {}
        self.down: int | None = None
        self.gated: set[str] = set()
        self.moved: dict[str, str] = {}
        self.asked: Counter[str] = Counter()
        self.bad_card: str | None = None

    def add(self, repo: str, files: Tree, branch: str = "main") -> str:
        """Commit files on top of those of a branch; returns the commit's id."""
        repository = self.repositories.setdefault(repo, Repository())
        before = repository.commits.get(repository.branches.get(branch, ""), {})
        return repository.commit(branch, {**before, **files})

    def files(self, repo: str, branch: str = "main") -> Tree:
        repository = self.repositories[repo]
        return repository.commits[repository.branches[branch]]

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that go away are part of the tests."""


@contextlib.contextmanager
def serve_hub() -> Iterator[HubServer]:
    server = HubServer()
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def use_hub(monkeypatch: pytest.MonkeyPatch, server: HubServer, cache: str, token: str | None = TOKEN) -> None:
    """Have this process, its forks and programs that it starts take a server for the hub, with a cache of their own."""
    from huggingface_hub import constants

    environment = {"HF_ENDPOINT": server.url, "HF_HOME": cache, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    values: dict[str, Any] = {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": f"{cache}/hub", "HF_TOKEN_PATH": f"{cache}/token", 
        "HF_HUB_DISABLE_XET": True, "HF_HUB_OFFLINE": False,
    }  # fmt: skip
    for name, value in values.items():
        monkeypatch.setattr(constants, name, value)


class _Answered(Exception):
    """An error was sent."""


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    do_GET = do_POST = do_PUT = do_HEAD

    def _answer(self) -> None:
        path = urlsplit(self.path).path
        self.server.asked[f"{self.command} {path}"] += 1
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        routes = (
            (r"/api/whoami-v2", self._whoami),
            (r"/api/validate-yaml", self._validate),
            (r"/api/repos/create", self._create),
            (r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", self._info),
            (r"/api/models/([^/]+/[^/]+)/branch/(.+)", self._branch),
            (r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", self._preupload),
            (r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", self._commit),
            (r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self._batch),
            (r"/upload/([0-9a-f]{64})", self._upload),
            (r"/elsewhere/([^/]+/[^/]+)/([^/]+)/(.+)", self._elsewhere),
            (r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self._resolve),
        )
        with contextlib.suppress(_Answered):
            if self.server.down is not None:
                self._refuse(self.server.down, text="out of order")
            for old, new in self.server.moved.items():
                if f"{old}/" in f"{path}/":
                    self._redirect(self.path.replace(old, new, 1))
                    return
            for pattern, handle in routes:
                if match := re.fullmatch(pattern, path):
                    handle(*(None if each is None else unquote(each) for each in match.groups()))
                    return
            self._refuse(404, text="no such page")

    @property
    def _known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _json(self, status: int, content: Any, **headers: str) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _refuse(self, status: int, code: str = "", text: str = "no", **headers: str) -> NoReturn:
        self._json(status, {"error": text}, X_Error_Code=code, X_Error_Message=text, **headers)
        raise _Answered

    def _readable(self, repo: str) -> Repository:
        repository = self.server.repositories.get(repo)
        if repository is None or (repository.private and not self._known):
            self._refuse(401 if not self._known else 404, "RepoNotFound", "Repository not found")
        if repo in self.server.gated:
            self._refuse(403, "GatedRepo", "Access to this model is restricted")
        return repository

    def _writable(self, repo: str) -> Repository:
        self._check_writes(repo)
        return self._readable(repo)

    def _check_writes(self, repo: str) -> None:
        if not self._known:
            self._refuse(401, "", "Invalid username or password.")
        if repo.partition("/")[0] != OWNER:
            self._refuse(403, "", "You don't have the rights to write here")

    def _whoami(self) -> None:
        if self._known:
            self._json(200, {"name": OWNER, "type": "user", "orgs": []})
        else:
            self._json(401, {"error": "Invalid username or password."})

    def _validate(self) -> None:
        if self.server.bad_card is None:
            self._json(200, {"errors": [], "warnings": []})
        else:
            self._json(400, {"errors": [{"message": self.server.bad_card}], "warnings": []})

    def _create(self) -> None:
        wanted = json.loads(self.body)
        repo = f"{wanted['organization'] or OWNER}/{wanted['name']}"
        self._check_writes(repo)
        url = {"url": f"{self.server.url}/{repo}"}
        if repo in self.server.repositories:
            self._json(409, {"error": "You already created this model repo", **url})
            return
        private = wanted.get("private") or wanted.get("visibility") == "private"
        self.server.repositories[repo] = Repository(private=bool(private))
        self.server.add(repo, {".gitattributes": b""})
        self._json(200, url)

    def _info(self, repo: str, revision: str | None) -> None:
        repository = self._readable(repo)
        commit = repository.commit_of(revision or "main")
        if commit is None:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        siblings = [{"rfilename": name} for name in sorted(repository.commits[commit])]
        self._json(
            200, {"id": repo, "modelId": repo, "sha": commit, "siblings": siblings, "private": repository.private}
        )

    def _branch(self, repo: str, branch: str) -> None:
        repository = self._writable(repo)
        if branch in repository.branches:
            self._refuse(409, text="Reference already exists")
        repository.branches[branch] = repository.branches["main"]
        self._json(200, {})

    def _preupload(self, repo: str, revision: str) -> None:
        repository = self._writable(repo)
        if repository.commit_of(revision) is None:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        names = [each["path"] for each in json.loads(self.body)["files"]]
        modes = {name: "lfs" if name.endswith(LARGE) else "regular" for name in names}
        files = [{"path": name, "uploadMode": mode, "shouldIgnore": False} for name, mode in modes.items()]
        self._json(200, {"files": files})

    def _batch(self, repo: str) -> None:
        self._writable(repo)
        objects = [
            {"oid": each["oid"], "size": each["size"]}
            | (
                {}
                if each["oid"] in self.server.large
                else {"actions": {"upload": {"href": f"{self.server.url}/upload/{each['oid']}"}}}
            )
            for each in json.loads(self.body)["objects"]
        ]
        self._json(200, {"transfer": "basic", "objects": objects})

    def _upload(self, oid: str) -> None:
        fault = self.server.faults.get("upload")
        if isinstance(fault, int):
            self._refuse(fault)
        if hashlib.sha256(self.body).hexdigest() != oid:
            self._refuse(400, text="other bytes than announced")
        self.server.large[oid] = self.body
        self._json(200, {})

    def _commit(self, repo: str, revision: str) -> None:
        repository = self._writable(repo)
        tree = dict(repository.commits[repository.branches[revision]])
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                tree[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                tree[value["path"]] = self.server.large[value["oid"]]
        commit = repository.commit(revision, tree)
        url = f"{self.server.url}/{repo}/commit/{commit}"
        self._json(200, {"success": True, "commitUrl": url, "commitOid": commit})

    def _resolve(self, repo: str, revision: str, name: str) -> None:
        repository = self._readable(repo)
        commit, fault = repository.commit_of(revision), self.server.faults.get(name)
        if commit is None:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if name not in repository.commits[commit]:
            self._refuse(404, "EntryNotFound", "Entry not found", X_Repo_Commit=commit)
        if isinstance(fault, int):
            self._refuse(fault)
        data = repository.commits[commit][name]
        if fault == "elsewhere":  # where the whole is, and what it is, is said by the hub; what comes is another's
            self.send_response(302)
            elsewhere = self.server.url.replace("127.0.0.1", "localhost")
            for key, value in (
                ("Location", f"{elsewhere}/elsewhere/{repo}/{commit}/{name}"), ("X-Repo-Commit", commit),
                ("X-Linked-ETag", f'"{hashlib.sha256(data).hexdigest()}"'), ("X-Linked-Size", str(len(data))),
                ("Content-Length", "0"),
            ):  # fmt: skip
                self.send_header(key, value)
            self.end_headers()
            return
        digest = hashlib.sha256(data) if name.endswith(LARGE) else hashlib.sha1(b"blob %d\0" % len(data) + data)
        start = int((re.findall(r"bytes=(\d+)-", self.headers.get("Range") or "") or ["0"])[0])
        sent = data[start:]
        if fault == "wrong":
            sent = bytes([data[start] ^ 1]) + sent[1:]
        if fault == "short" and self.command != "HEAD":
            sent = sent[: len(sent) // 2]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("X-Repo-Commit", commit if fault != "other commit" else "0" * 40)
        self.send_header("ETag", f'"{digest.hexdigest()}"')
        self.send_header("Content-Length", str(len(sent)))
        self.end_headers()
        if fault == "cut":
            sent, self.close_connection = sent[: len(sent) // 2], True
        if self.command != "HEAD":
            self.wfile.write(sent)

    def _elsewhere(self, repo: str, commit: str, name: str) -> None:
        assert "Authorization" not in self.headers, "a token is for the hub alone"
        data = self.server.repositories[repo].commits[commit][name]
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _redirect(self, path: str) -> None:
        self.send_response(307)
        self.send_header("Location", path)
        self.send_header("Content-Length", "0")
        self.end_headers()
