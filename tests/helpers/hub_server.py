"""A local server that speaks as much of the Hugging Face hub's API as uploads and downloads of a model need."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import unquote, urlsplit

from huggingface_hub import constants, file_download

TOKEN = "hf_valid"


@dataclass(frozen=True)
class Commit:
    """A commit: the files of a branch after it."""

    sha: str
    message: str
    files: dict[str, bytes]


@dataclass
class Repository:
    """A model's repository."""

    private: bool
    branches: dict[str, list[Commit]] = field(default_factory=dict)

    def commit(self, branch: str, message: str, files: dict[str, bytes]) -> Commit:
        """Add a commit to a branch."""
        commits = self.branches.setdefault(branch, [])
        text = f"{branch} {len(commits)} {message} {sorted(files)}"
        commits.append(Commit(hashlib.sha1(text.encode()).hexdigest(), message, files))
        return commits[-1]

    def at(self, revision: str) -> Commit | None:
        """Return the commit that a branch or a hash names."""
        if revision in self.branches:
            return self.branches[revision][-1]
        return next((c for commits in self.branches.values() for c in commits if c.sha == revision), None)


@dataclass
class Hub:
    """The state of the server, and every request that it got."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    """{SHA-256: content} of large files, which are sent before the commit that names them."""
    requests: list[str] = field(default_factory=list)
    broken: tuple[str, ...] = ()
    """Parts of requests, `METHOD PATH`, that the server refuses with status 403."""

    def make(self, name: str, *, private: bool) -> Repository:
        """Create a repository with its first commit, as the hub does."""
        self.repositories[name] = Repository(private)
        self.repositories[name].commit("main", "initial commit", {".gitattributes": b""})
        return self.repositories[name]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        """Print nothing."""

    def _send(self, status: int, body: Any = None, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps({} if body is None else body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        if any(part in self.hub.requests[-1] for part in self.hub.broken):
            return self._send(403, {"error": "broken"}, X_Error_Message="You may not write here")
        if path.startswith("/lfs/"):  # signed by its URL, as storage is
            if hashlib.sha256(body).hexdigest() != path.removeprefix("/lfs/"):
                return self._send(400)
            self.hub.large[path.removeprefix("/lfs/")] = body
            return self._send(200)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._send(401, {"error": "Invalid username or password."})
        words = path.strip("/").split("/")
        if path == "/api/whoami-v2":
            return self._send(200, {"name": "my-lab", "type": "user"})
        if path == "/api/validate-yaml":
            return self._send(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            wanted = json.loads(body)
            private = wanted.get("private") or wanted.get("visibility") == "private"
            name = f"{wanted['organization']}/{wanted['name']}"
            self.hub.make(name, private=bool(private))
            return self._send(200, {"url": f"{self.hub.url}/{name}", "id": name})
        name = "/".join(words[2:4] if words[0] == "api" else words[:2]).removesuffix(".git")
        repository = self.hub.repositories.get(name)
        if repository is None:
            return self._send(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        if words[0] == "api":
            return self._model(name, repository, words[4:], body)
        if words[2] == "resolve":
            return self._file(repository, words[3], "/".join(words[4:]))
        objects = [
            {"oid": one["oid"], "size": one["size"]}
            | (
                {}
                if one["oid"] in self.hub.large
                else {"actions": {"upload": {"href": f"{self.hub.url}/lfs/{one['oid']}"}}}
            )
            for one in json.loads(body)["objects"]
        ]
        return self._send(200, {"transfer": "basic", "objects": objects})

    def _model(self, name: str, repository: Repository, words: list[str], body: bytes) -> None:
        what, revision = words if words else ("revision", "main")
        if what == "branch":
            repository.branches[revision] = [repository.branches["main"][-1]]
            return self._send(200)
        commit = repository.at(revision)
        if commit is None:
            return self._send(404, {"error": "Revision not found"}, X_Error_Code="RevisionNotFound")
        if what == "revision":
            files = [{"rfilename": file} for file in commit.files]
            return self._send(
                200, {"id": name, "sha": commit.sha, "private": repository.private, "siblings": files, "tags": []}
            )
        if what == "tree":
            return self._send(
                200,
                [
                    {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for path, data in commit.files.items()
                ],
            )
        if what == "preupload":
            return self._send(
                200,
                {
                    "files": [
                        {
                            "path": file["path"],
                            "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                            "shouldIgnore": False,
                            "oid": _oid(file["path"], commit.files.get(file["path"])),
                        }
                        for file in json.loads(body)["files"]
                    ]
                },
            )
        assert what == "commit"
        header, *changes = (json.loads(line) for line in body.splitlines())
        if header["value"]["parentCommit"] != commit.sha:
            return self._send(412, {"error": "A commit has happened since"})
        files = dict(commit.files)
        for change in changes:
            value = change["value"]
            if change["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif change["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            else:
                assert change["key"] == "deletedFile"
                del files[value["path"]]
        made = repository.commit(revision, header["value"]["summary"], files)
        return self._send(200, {"commitUrl": f"{self.hub.url}/{name}/commit/{made.sha}", "commitOid": made.sha})

    def _file(self, repository: Repository, revision: str, path: str) -> None:
        commit = repository.at(revision)
        if commit is None or path not in commit.files:
            return self._send(404, X_Error_Code="EntryNotFound")
        data = commit.files[path]
        return self._send(200, data, ETag=f'"{hashlib.sha256(data).hexdigest()}"', X_Repo_Commit=commit.sha)

    do_GET = do_HEAD = do_POST = do_PUT = _answer


def _oid(path: str, data: bytes | None) -> str | None:
    """Return the id under which the hub knows a file: SHA-256 of a large one, git's id of any other."""
    if data is None:
        return None
    if path.endswith(".safetensors"):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


@contextmanager
def serve(folder: Path) -> Iterator[Hub]:
    """Run the server, and point huggingface_hub to it, with a valid token and a cache in `folder`."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    settings = {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_OFFLINE": False,
        "HF_HUB_CACHE": str(folder / "cache"),
        "HF_TOKEN_PATH": str(folder / "token"),
    }
    try:
        with ExitStack() as patched:  # not every version has every constant; file_download copies one
            patched.enter_context(mock.patch.multiple(constants, create=True, **settings))
            name = "HUGGINGFACE_CO_URL_TEMPLATE"
            patched.enter_context(mock.patch.object(file_download, name, settings[name], create=True))
            patched.enter_context(mock.patch.dict("os.environ", HF_TOKEN=TOKEN))
            yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
