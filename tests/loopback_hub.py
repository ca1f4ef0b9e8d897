"""A Hugging Face Hub on 127.0.0.1 that speaks as much of its HTTP protocol as pushing and loading models needs.

Repositories with branches and pull requests, LFS uploads, tokens, private repositories and injected failures, in the
memory of one process. Clients must set `client_environment` before they import huggingface_hub, which reads it then.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

# Long enough to look like real ones.
TOKEN, OTHER_TOKEN, READ_TOKEN = "hf_" + "userUSER" * 4, "hf_" + "otherOTH" * 4, "hf_" + "readREAD" * 4
USERS = {TOKEN: "user", OTHER_TOKEN: "other", READ_TOKEN: "user"}


@dataclass
class Commit:
    sha: str
    title: str
    files: dict[str, bytes]


@dataclass
class Repo:
    private: bool
    branches: dict[str, list[Commit]] = field(default_factory=lambda: {"main": []})

    def find(self, revision: str) -> Commit | None:
        if revision in self.branches:
            return self.branches[revision][-1]
        return next((c for commits in self.branches.values() for c in commits if c.sha == revision), None)

    def commit(self, branch: str, files: dict[str, bytes], title: str) -> Commit:
        key = repr(sorted((name, _git_oid(data)) for name, data in files.items())) + title + branch
        new = Commit(hashlib.sha1(f"{key}{len(self.branches[branch])}".encode()).hexdigest(), title, files)
        self.branches[branch] = [*self.branches[branch], new]
        return new


@dataclass
class Failure:
    """What happens to the next `times` requests of a method whose path matches: a status, or a cut connection, before
    the request does anything or, if only the answer is `lost`, after."""

    method: str
    path: str
    status: int | None = None
    times: int = 1
    lost: bool = False


class LoopbackHub:
    """The server. `with LoopbackHub() as hub: ...`

    Attributes:
        repos (`dict[str, Repo]`): Repositories by name.
        failures (`list[Failure]`): Failures to come. Clients add theirs with `POST /_fail`, and end them with
            `DELETE /_fail`.
        requests (`list[tuple[str, str]]`): Method and path of each request so far.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.failures: list[Failure] = []
        self.requests: list[tuple[str, str]] = []
        self.lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> "LoopbackHub":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.server.shutdown()
        self.server.server_close()

    def client_environment(self, home: Any, token: str | None = TOKEN) -> dict[str, str]:
        """What a client needs in its environment; the caller removes HF_HUB_OFFLINE."""
        found = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        return found | ({"HF_TOKEN": token} if token is not None else {})


def _git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _is_lfs(path: str) -> bool:
    return path.endswith((".safetensors", ".bin", ".onnx", ".png"))


class _Refusal(Exception):
    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        self.status, self.code, self.message = status, code, message or code or "refused"


class _Cut(Exception):
    pass


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LoopbackHub
    lost = False

    def log_message(self, *_: Any) -> None:
        pass

    def handle_any(self) -> None:
        url = urlsplit(self.path)
        body = self._body()
        with self.hub.lock:
            self.hub.requests.append((self.command, url.path))
            try:
                self._fail_if_asked(url.path)
                self._route([unquote(part) for part in url.path.split("/")[1:]], parse_qs(url.query), body)
            except _Refusal as refusal:
                headers = {"X-Error-Code": refusal.code, "X-Error-Message": refusal.message}
                self._send({"error": refusal.message}, refusal.status, headers)
            except _Cut:
                self.close_connection = True
                self.connection.shutdown(2)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(
        self, data: Any = b"", status: int = 200, headers: dict[str, str] | None = None, kind: str = "application/json"
    ) -> None:
        if self.lost:
            raise _Cut
        data = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _fail_if_asked(self, path: str) -> None:
        for failure in self.hub.failures:
            if failure.times and failure.method == self.command and re.search(failure.path, path):
                failure.times -= 1
                if failure.lost:
                    self.lost = True
                elif failure.status is None:
                    raise _Cut
                else:
                    raise _Refusal(failure.status, message="injected")

    # Who asks, and what for

    def _user(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in USERS:
            raise _Refusal(401, message="Invalid credentials in Authorization header")
        return USERS.get(token)

    def _writer(self, owner: str, proposes: bool = False) -> None:
        if self._user() is None:
            raise _Refusal(401, message="Log in first")
        if (self._user() != owner and not proposes) or self.headers["Authorization"].endswith(READ_TOKEN):
            raise _Refusal(403, message=f"You don't have the rights to write to {owner}")

    def _repo(self, name: str, write: bool = False, proposes: bool = False) -> Repo:
        """`proposes`: to write to a pull request, which anybody may open."""
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and self._user() != name.partition("/")[0]):
            raise _Refusal(404 if self._user() else 401, "RepoNotFound", "Repository not found")
        if write or proposes:
            self._writer(name.partition("/")[0], proposes)
        return repo

    def _commit(self, name: str, revision: str, write: bool = False, proposes: bool = False) -> Commit:
        commit = self._repo(name, write, proposes).find(revision)
        if commit is None:
            raise _Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def _route(self, path: list[str], query: dict[str, list[str]], body: bytes) -> None:
        match (self.command, *path):
            case ("POST", "_fail"):
                self.hub.failures.append(Failure(**json.loads(body)))
                self._send()
            case ("DELETE", "_fail"):
                self.hub.failures.clear()
                self._send()
            case ("POST", "api", "repos", "create"):
                self._create(json.loads(body))
            case ("POST", "api", "validate-yaml"):
                self._validate(json.loads(body)["content"])
            case (_, "api", "models", owner, name, *rest):
                self._model(f"{owner}/{name}", rest, query, body)
            case ("POST", owner, name, "info", "lfs", "objects", "batch"):
                self._repo(f"{owner}/{name.removesuffix('.git')}", proposes=True)  # it is not told what for
                self._send({"transfer": "basic", "objects": [self._transfer(o) for o in json.loads(body)["objects"]]})
            case ("PUT", "_lfs", oid):
                if hashlib.sha256(body).hexdigest() != oid:
                    raise _Refusal(400, message="the content has another hash")
                self.hub.lfs[oid] = body
                self._send()
            case ("POST", "_lfs_verify"):
                self._send({})
            case ("GET" | "HEAD", owner, name, "resolve", revision, *file):
                self._file(self._commit(f"{owner}/{name}", revision), "/".join(file))
            case _:
                raise _Refusal(404, "EntryNotFound")

    # Answers

    def _create(self, wanted: dict[str, Any]) -> None:
        owner = wanted.get("organization") or self._user()
        if self._user() is None:
            raise _Refusal(401, message="Invalid username or password")
        self._writer(owner)
        name = f"{owner}/{wanted['name']}"
        if name in self.hub.repos:
            return self._send({"url": f"{self.hub.url}/{name}", "error": "You already created this model repo"}, 409)
        repo = self.hub.repos[name] = Repo(wanted.get("visibility") == "private")
        repo.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        return self._send({"url": f"{self.hub.url}/{name}", "name": name, "id": name})

    def _validate(self, card: str) -> None:
        license = re.search(r"^license: (.*)$", card, re.MULTILINE)
        if license and license[1] not in ("mit", "apache-2.0", "other"):
            error = {"message": '"license" must be one of [apache-2.0, mit, other]'}
            return self._send({"errors": [error], "warnings": []}, 400)
        return self._send({"errors": [], "warnings": []})

    def _model(self, name: str, rest: list[str], query: dict[str, list[str]], body: bytes) -> None:
        match (self.command, *rest):
            case ("POST", "preupload", revision):
                files = self._commit(name, revision, write=True, proposes="create_pr" in query).files
                self._send(
                    {
                        "files": [
                            {
                                "path": file["path"],
                                "uploadMode": "lfs" if _is_lfs(file["path"]) else "regular",
                                "shouldIgnore": False,
                                "oid": self._oid(file["path"], files),
                            }
                            for file in json.loads(body)["files"]
                        ]
                    }
                )
            case ("POST", "commit", revision):
                self._take_commit(name, revision, "create_pr" in query, body.splitlines())
            case ("POST", "branch", branch):
                commit, branches = self._commit(name, "main", write=True), self._repo(name).branches
                if branch in branches:
                    raise _Refusal(409, message="Reference already exists")
                branches[branch] = [commit]
                self._send({})
            case ("GET", "tree", revision, *_):
                files = self._commit(name, revision).files
                self._send([{"type": "file", "path": k, "size": len(v), "oid": _git_oid(v)} for k, v in files.items()])
            case ("GET",) | ("GET", "revision", _):
                repo, commit = self._repo(name), self._commit(name, rest[1] if rest else "main")
                siblings = [{"rfilename": file} for file in commit.files]
                facts = {"id": name, "modelId": name, "sha": commit.sha, "private": repo.private, "siblings": siblings}
                self._send({"_id": "0", "tags": [], "downloads": 0, "likes": 0, **facts})
            case _:
                raise _Refusal(404, "EntryNotFound")

    def _oid(self, path: str, files: dict[str, bytes]) -> str | None:
        if path not in files:
            return None
        return hashlib.sha256(files[path]).hexdigest() if _is_lfs(path) else _git_oid(files[path])

    def _take_commit(self, name: str, revision: str, create_pr: bool, lines: list[bytes]) -> None:
        files, title = dict(self._commit(name, revision, write=True, proposes=create_pr).files), ""
        repo = self._repo(name)
        for item in map(json.loads, filter(bytes.strip, lines)):
            value = item["value"]
            if item["key"] == "header":
                title = value["summary"]
            elif item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.hub.lfs:
                    raise _Refusal(400, message="an LFS object is missing")
                files[value["path"]] = self.hub.lfs[value["oid"]]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
        url = None
        if create_pr:
            number = sum(branch.startswith("refs/pr/") for branch in repo.branches) + 1
            revision, url = f"refs/pr/{number}", f"{self.hub.url}/{name}/discussions/{number}"
            repo.branches[revision] = []
        sha = repo.commit(revision, files, title).sha
        self._send(
            {
                "success": True,
                "commitOid": sha,
                "commitUrl": f"{self.hub.url}/{name}/commit/{sha}",
                "pullRequestUrl": url,
            }
        )

    def _transfer(self, wanted: dict[str, Any]) -> dict[str, Any]:
        answer = {"oid": wanted["oid"], "size": wanted["size"]}
        if wanted["oid"] not in self.hub.lfs:
            where = {"upload": f"_lfs/{wanted['oid']}", "verify": "_lfs_verify"}
            answer["actions"] = {key: {"href": f"{self.hub.url}/{path}", "header": {}} for key, path in where.items()}
        return answer

    def _file(self, commit: Commit, name: str) -> None:
        if name not in commit.files:
            raise _Refusal(404, "EntryNotFound", "Entry not found")
        headers = {
            "X-Repo-Commit": commit.sha,
            "ETag": f'"{self._oid(name, commit.files)}"',
            "Accept-Ranges": "bytes",
        }
        self._send(commit.files[name], 200, headers, "application/octet-stream")
