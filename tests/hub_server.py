"""A small Hub on 127.0.0.1 for huggingface_hub's real client: repositories, commits, tags, LFS, ranges, tokens, faults.

Only what the client calls is there. Files are kept in memory, or on the disk where a test places them (`place`).
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_a_token_of_the_tests"
LFS_FROM = 10_000  # bytes; smaller files are committed as they are


@dataclass
class Blob:
    content: bytes | Path
    lfs: bool

    @property
    def size(self) -> int:
        return self.content.stat().st_size if isinstance(self.content, Path) else len(self.content)

    def read(self, begin: int, end: int) -> bytes:
        if isinstance(self.content, Path):
            with open(self.content, "rb") as file:
                file.seek(begin)
                return file.read(end - begin)
        return self.content[begin:end]

    @cached_property
    def etag(self) -> str:
        if isinstance(self.content, Path):
            with open(self.content, "rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        if self.lfs:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass
class Repo:
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, files: dict[str, Blob], branch: str = "main", message: str = "") -> str:
        oid = hashlib.sha1(f"{len(self.commits)} {branch} {message}".encode()).hexdigest()
        self.commits[oid] = files
        self.refs[branch] = oid
        self.messages.append(message)
        return oid

    def resolve(self, revision: str) -> str | None:
        return self.refs.get(revision) or self.tags.get(revision) or (revision if revision in self.commits else None)


@dataclass
class Fault:
    """What goes wrong for requests "METHOD path range" that match: `status`, or the connection drops after bytes."""

    match: str
    times: int = 1
    status: int | None = None
    drop_after: int | None = None
    corrupt: bool = False


class HubServer(ThreadingHTTPServer):
    """Bound to a free port when made; serves once `start` is called."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.reset()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def reset(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, Blob] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.sent: Counter[str] = Counter()  # bytes of files, by path
        self.left_out: set[str] = set()  # "METHOD header" that a mirror does not send
        self.ranges = True  # whether it gives parts of files
        self.lock = threading.Lock()

    def start(self) -> None:
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, request, client_address):
        pass  # dropped connections

    def place(self, repo_id: str, files: dict[str, bytes | Path], **options) -> Repo:
        """Puts files into a repository, as one commit."""
        repo = self.repos.setdefault(repo_id, Repo(**options))
        held = dict(repo.commits[repo.refs["main"]]) if repo.refs else {}
        for name, content in files.items():
            blob = Blob(content, lfs=isinstance(content, Path) or len(content) >= LFS_FROM)
            held[name] = blob
        repo.commit(held, message="placed")
        return repo

    def count(self, pattern: str) -> int:
        return sum(bool(re.search(pattern, request)) for request in self.requests)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body go separately
    server: HubServer

    def log_message(self, *args):
        pass

    def send_header(self, keyword: str, value: str) -> None:
        if f"{self.command} {keyword}" not in self.server.left_out:
            super().send_header(keyword, value)

    def _serve(self) -> None:
        parts = urlsplit(self.path)
        path, self.query = unquote(parts.path), parse_qs(parts.query)
        length = int(self.headers.get("Content-Length") or 0)
        told = f"{self.command} {path} {self.headers.get('Range') or ''}"
        with self.server.lock:
            self.server.requests.append(told)
            fault = next((f for f in self.server.faults if f.times and re.search(f.match, told)), None)
            if fault:
                fault.times -= 1
        self.fault = fault
        if fault and fault.drop_after is not None and self.command in ("PUT", "POST"):
            self.rfile.read(min(length, fault.drop_after))
            self.close_connection = True
            self.connection.close()
            return
        self.body = self._read_body(length)
        if fault and fault.status:
            return self._json({"error": "out of order"}, fault.status)
        for pattern, method, action in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method.split("|"):
                return getattr(self, action)(**match.groupdict())
        return self._json({"error": f"no route for {self.command} {path}"}, 404)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _read_body(self, length: int) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(length)
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _json(self, value: object, status: int = 200, **headers: str) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _may(self, write: bool = False) -> bool:
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if write and not known:
            self._json({"error": "Invalid credentials"}, 401)
        return known or not write

    def _repo(self, repo_id: str, write: bool = False) -> Repo | None:
        repo = self.server.repos.get(repo_id)
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repo is None or (repo.private and not known):
            self._json({"error": "Repository not found"}, 404 if known else 401, X_Error_Code="RepoNotFound")
            return None
        return repo if self._may(write) else None

    def _files(self, repo: Repo, revision: str) -> tuple[str, dict[str, Blob]] | None:
        oid = repo.resolve(revision)
        if oid is None:
            self._json({"error": "Revision not found"}, 404, X_Error_Code="RevisionNotFound")
            return None
        return oid, repo.commits[oid]

    # --- reading ---

    def info(self, repo_id: str, revision: str = "main") -> None:
        if (repo := self._repo(repo_id)) and (found := self._files(repo, revision)):
            oid, files = found
            self._json(
                {
                    "id": repo_id,
                    "modelId": repo_id,
                    "sha": oid,
                    "private": repo.private,
                    "gated": repo.gated,
                    "tags": [],
                    "siblings": [{"rfilename": name} for name in files],
                }
            )

    def tree(self, repo_id: str, revision: str, path: str = "") -> None:
        if (repo := self._repo(repo_id)) and (found := self._files(repo, revision)):
            entries = []
            for name, blob in found[1].items():
                entry = {"type": "file", "path": name, "size": blob.size, "oid": "0" * 40}
                if blob.lfs:
                    entry["lfs"] = {"oid": blob.etag, "size": blob.size, "pointerSize": 134}
                entries.append(entry)
            self._json(entries)

    def refs(self, repo_id: str) -> None:
        if repo := self._repo(repo_id):
            kinds = {"branches": ("heads", repo.refs), "tags": ("tags", repo.tags)}
            answer = {
                kind: [{"name": n, "ref": f"refs/{where}/{n}", "targetCommit": oid} for n, oid in held.items()]
                for kind, (where, held) in kinds.items()
            }
            self._json({**answer, "converts": []})

    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        repo = self._repo(repo_id)
        if repo is None:
            return None
        if repo.gated and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._json({"error": "gated"}, 403, X_Error_Code="GatedRepo")
        found = self._files(repo, revision)
        if found is None:
            return None
        oid, files = found
        if path not in files:
            return self._json({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=oid)
        blob = files[path]
        begin, end = 0, blob.size
        asked = self.server.ranges and re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked:
            begin, end = int(asked[1]), min(int(asked[2]) + 1 if asked[2] else end, end)
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{blob.size}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("X-Repo-Commit", oid)
        self.send_header("ETag", f'"{blob.etag}"')
        if blob.lfs:
            self.send_header("X-Linked-Etag", f'"{blob.etag}"')
            self.send_header("X-Linked-Size", str(blob.size))
        self.send_header("Content-Length", str(end - begin))
        self.end_headers()
        if self.command == "HEAD":
            return None
        fault = self.fault
        stop = end if not fault or fault.drop_after is None else min(end, begin + fault.drop_after)
        for at in range(begin, stop, 1 << 20):
            block = blob.read(at, min(at + (1 << 20), stop))
            if fault and fault.corrupt:
                block = bytes(byte ^ 255 for byte in block)
            self.wfile.write(block)
            self.server.sent[path] += len(block)
        if stop < end:
            self.close_connection = True
            self.connection.close()

    # --- writing ---

    def create(self) -> None:
        if not self._may(write=True):
            return None
        asked = json.loads(self.body)
        repo_id = f"{asked.get('organization') or 'me'}/{asked['name']}"
        answer = {"url": f"{self.server.url}/{repo_id}", "name": repo_id, "id": "1"}
        if repo_id in self.server.repos:
            return self._json({**answer, "error": "You already created this model repo"}, 409)
        private = bool(asked.get("private")) or asked.get("visibility") == "private"
        self.server.repos[repo_id] = Repo(private=private)
        self.server.repos[repo_id].commit({}, message="initial commit")
        return self._json(answer)

    def validate(self) -> None:
        self._json({"errors": [], "warnings": []})

    def whoami(self) -> None:
        if self._may(write=True):
            self._json({"name": "me", "type": "user", "auth": {"accessToken": {"role": "write"}}})

    def preupload(self, repo_id: str, revision: str) -> None:
        if repo := self._repo(repo_id, write=True):
            held = repo.commits[repo.resolve(revision)]
            self._json(
                {
                    "files": [
                        {
                            "path": file["path"],
                            "uploadMode": "lfs" if file["size"] >= LFS_FROM else "regular",
                            "shouldIgnore": False,
                            "oid": held[file["path"]].etag if file["path"] in held else None,
                        }
                        for file in json.loads(self.body)["files"]
                    ]
                }
            )

    def batch(self, repo_id: str) -> None:
        if self._repo(repo_id, write=True):
            objects = []
            for wanted in json.loads(self.body)["objects"]:
                answer = {"oid": wanted["oid"], "size": wanted["size"]}
                if wanted["oid"] not in self.server.lfs:
                    answer["actions"] = {
                        "upload": {"href": f"{self.server.url}/lfs/{wanted['oid']}"},
                        "verify": {"href": f"{self.server.url}/lfs/{wanted['oid']}/verify"},
                    }
                objects.append(answer)
            self._json({"transfer": "basic", "objects": objects})

    def put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self._json({"error": "wrong content"}, 400)
        self.server.lfs[oid] = Blob(self.body, lfs=True)
        return self._json({})

    def verify(self, oid: str) -> None:
        self._json({}, 200 if oid in self.server.lfs else 404)

    def commit(self, repo_id: str, revision: str) -> None:
        repo = self._repo(repo_id, write=True)
        if repo is None:
            return None
        files, message = dict(repo.commits[repo.resolve(revision)]), ""
        for line in self.body.splitlines():
            entry = json.loads(line)
            kind, value = entry["key"], entry["value"]
            if kind == "header":
                message = value["summary"]
            elif kind == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), lfs=False)
            elif kind == "lfsFile":
                if value["oid"] not in self.server.lfs:
                    return self._json({"error": f"{value['path']} was not uploaded"}, 400)
                files[value["path"]] = self.server.lfs[value["oid"]]
            elif kind == "deletedFile":
                files.pop(value["path"])
        oid = repo.commit(files, revision, message)
        return self._json({"commitOid": oid, "commitUrl": f"{self.server.url}/{repo_id}/commit/{oid}", "success": True})

    def tag(self, repo_id: str, revision: str) -> None:
        if repo := self._repo(repo_id, write=True):
            name = json.loads(self.body)["tag"]
            if name in repo.tags:
                return self._json({"error": "exists"}, 409)
            repo.tags[name] = repo.resolve(revision)
            return self._json({})
        return None

    def branch(self, repo_id: str, name: str) -> None:
        if repo := self._repo(repo_id, write=True):
            if name in repo.refs:
                return self._json({"error": "exists"}, 409)
            repo.refs[name] = repo.refs["main"]
            return self._json({})
        return None


_ID = r"(?P<repo_id>[^/]+/[^/]+)"
_REVISION = r"(?P<revision>refs/pr/\d+|[^/]+)"
ROUTES = [
    (r"/api/repos/create", "POST", "create"),
    (r"/api/validate-yaml", "POST", "validate"),
    (r"/api/whoami-v2", "GET", "whoami"),
    (rf"/api/models/{_ID}/preupload/{_REVISION}", "POST", "preupload"),
    (rf"/api/models/{_ID}/commit/{_REVISION}", "POST", "commit"),
    (rf"/api/models/{_ID}/tag/{_REVISION}", "POST", "tag"),
    (rf"/api/models/{_ID}/branch/(?P<name>.+)", "POST", "branch"),
    (rf"/api/models/{_ID}/refs", "GET", "refs"),
    (rf"/api/models/{_ID}/revision/{_REVISION}", "GET", "info"),
    (rf"/api/models/{_ID}/tree/{_REVISION}(/(?P<path>.+))?", "GET", "tree"),
    (r"/api/models/(?P<repo_id>[^/]+(/[^/]+)?)", "GET", "info"),
    (rf"/{_ID}\.git/info/lfs/objects/batch", "POST", "batch"),
    (r"/lfs/(?P<oid>[0-9a-f]{64})", "PUT", "put"),
    (r"/lfs/(?P<oid>[0-9a-f]{64})/verify", "POST", "verify"),
    (rf"/{_ID}/resolve/{_REVISION}/(?P<path>.+)", "GET|HEAD", "resolve"),
]
