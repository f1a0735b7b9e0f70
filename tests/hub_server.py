"""A Hugging Face Hub on localhost, for tests: the standard library only, run as its own process.

`python tests/hub_server.py` prints {"endpoint": ..., "storage": ...} and serves until its stdin closes. Git storage and
LFS storage are two origins, as on the real Hub. `POST /_control {"fail": [{"match": "/commit/", "action": "500"}]}`
makes the next matching request fail (actions: "500", "429", "412"; "drop", no answer and no look at the body; "half",
an answer that breaks off in the middle; "times" and "method" optional); `GET /_log` lists the requests so far with the
range that each asked for and whether it carried a token.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKENS = {
    "hf_write": {"name": "me", "role": "write"},
    "hf_read": {"name": "me", "role": "read"},
    "hf_other": {"name": "other", "role": "write"},
}
LFS_SUFFIXES = (".safetensors", ".bin", ".onnx", ".parquet", ".png")


@dataclass
class File:
    content: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        """Git's name of the blob; for an LFS file that of its pointer."""
        body = self.pointer if self.lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def pointer(self) -> bytes:
        text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n"
        return text.encode()

    def entry(self, path: str) -> dict:
        entry = {"type": "file", "path": path, "oid": self.oid, "size": len(self.content)}
        if self.lfs:
            entry["lfs"] = {"oid": self.sha256, "size": len(self.content), "pointerSize": len(self.pointer)}
        return entry


@dataclass
class Commit:
    sha: str
    title: str
    files: dict[str, File]
    parent: Commit | None = None

    def entries(self) -> dict[str, dict]:
        """Files and the folders that hold them, by path."""
        folders = {str(folder): None for path in self.files for folder in PurePosixPath(path).parents[:-1]}
        listed = {path: {"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in folders}
        return listed | {path: file.entry(path) for path, file in self.files.items()}


@dataclass
class Repo:
    kind: str
    id: str
    private: bool
    branches: dict[str, Commit] = field(default_factory=dict)
    tags: dict[str, Commit] = field(default_factory=dict)
    pulls: dict[str, Commit] = field(default_factory=dict)

    def at(self, revision: str) -> Commit | None:
        for refs in (self.branches, self.tags, self.pulls):
            if revision in refs:
                return refs[revision]
        for head in (*self.branches.values(), *self.tags.values(), *self.pulls.values()):
            commit: Commit | None = head
            while commit:
                if commit.sha == revision:
                    return commit
                commit = commit.parent
        return None


class Failure(Exception):
    def __init__(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **headers}


class Hub:
    """Everything that is stored, behind one lock."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.repos: dict[tuple[str, str], Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.log: list[dict] = []
        self.failures: list[dict] = []
        self.collections: dict[str, dict] = {}
        self.endpoint = self.storage = ""
        self.count = 0

    def commit(self, title: str, files: dict[str, File], parent: Commit | None) -> Commit:
        self.count += 1
        return Commit(hashlib.sha1(f"{self.count}{title}".encode()).hexdigest(), title, files, parent)

    def injected(self, method: str, path: str) -> str | None:
        with self.lock:
            for failure in self.failures:
                if re.search(failure["match"], path) and failure.get("method", method) == method:
                    failure["times"] = failure.get("times", 1) - 1
                    if failure["times"] <= 0:
                        self.failures.remove(failure)
                    return failure["action"]
        return None


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    hub: Hub

    def log_message(self, *args: object) -> None:
        pass

    def handle_one_request(self) -> None:
        with contextlib.suppress(ConnectionError):
            super().handle_one_request()

    def _handle(self) -> None:
        parts = urlsplit(self.path)
        self.query = parse_qs(parts.query, keep_blank_values=True)
        self.hub.log.append({
            "origin": type(self).__name__, "method": self.command, "path": parts.path,
            "range": self.headers.get("range"), "token": "authorization" in self.headers,
        })  # fmt: skip
        action = self.hub.injected(self.command, parts.path)
        self.breaks_off = action == "half"
        if action == "drop":
            self.close_connection = True
            return
        self.body = self._read_body()
        try:
            if action and not self.breaks_off:
                raise Failure(int(action), f"injected {action}", **({"Retry-After": "1"} if action == "429" else {}))
            with self.hub.lock:
                self.route([unquote(part) for part in parts.path.strip("/").split("/")])
        except Failure as failure:
            self.answer({"error": failure.message}, failure.status, **failure.headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle

    def _read_body(self) -> bytes:
        if self.headers.get("transfer-encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("content-length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def answer(self, content: object, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if self.breaks_off else body)
            self.close_connection |= self.breaks_off

    def answer_file(self, content: bytes, **headers: str) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("range", ""))
        headers["Accept-Ranges"] = "bytes"
        if not wanted:
            return self.answer(content, **headers)
        first, last = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
        if first > last:
            raise Failure(416, "range outside the file", **{"Content-Range": f"bytes */{len(content)}"})
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        self.answer(content[first : last + 1], 206, **headers)


class Storage(Handler):
    """Where LFS files lie; knows no tokens, and refuses to see one."""

    def route(self, path: list[str]) -> None:
        if "authorization" in self.headers:
            raise Failure(400, "a token reached the storage")
        if self.command == "PUT":
            if hashlib.sha256(self.body).hexdigest() != path[-1]:
                raise Failure(400, "content does not match its hash")
            self.hub.blobs[path[-1]] = self.body
            self.answer({})
        else:
            self.answer_file(self.hub.blobs[path[-1]], ETag=f'"{path[-1]}"')


class Api(Handler):
    """The Hub itself."""

    def route(self, path: list[str]) -> None:
        match path:
            case ["_control"]:
                self.hub.failures = self.json()["fail"]
                self.answer({})
            case ["_log"]:
                self.answer(self.hub.log)
            case ["api", "whoami-v2"]:
                user = self.user(required=True)
                auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": user["role"]}}
                self.answer({"type": "user", "name": user["name"], "orgs": [], "auth": auth})
            case ["api", "validate-yaml"]:
                self.validate_yaml()
            case ["api", "repos", "create"]:
                self.create()
            case ["api", "repos", "delete"]:
                body = self.json()
                repo = self.repo(body.get("type", "model") + "s", self.full_name(body), write=True)
                del self.hub.repos[repo.kind, repo.id]
                self.answer({})
            case ["api", "collections", *rest]:
                self.collection("/".join(rest[:2]))
            case ["api", ("models" | "datasets") as kind, owner, name, *rest]:
                self.api(kind, f"{owner}/{name}", rest)
            case ["datasets", owner, name, *rest]:
                self.git("datasets", f"{owner}/{name}", rest)
            case [owner, name, *rest]:
                self.git("models", f"{owner}/{name}", rest)
            case _:
                raise Failure(404, "no such page")

    def json(self) -> dict:
        return json.loads(self.body or b"{}")

    def user(self, required: bool = False) -> dict | None:
        header = self.headers.get("authorization")
        if header is None:
            if required:
                raise Failure(401, "Invalid username or password.")
            return None
        user = TOKENS.get(header.removeprefix("Bearer "))
        if user is None:
            raise Failure(401, "Invalid credentials in Authorization header")
        return user

    def full_name(self, body: dict) -> str:
        return f"{body.get('organization') or self.user(required=True)['name']}/{body['name']}"

    def repo(self, kind: str, name: str, write: bool = False) -> Repo:
        user = self.user(required=write)
        found = self.hub.repos.get((kind, name))
        owner = name.partition("/")[0]
        if found is None or (found.private and (user or {}).get("name") != owner):
            raise Failure(404 if user else 401, "Repository not found", "RepoNotFound")
        if write:
            self.may_write(user, owner)
        return found

    def may_write(self, user: dict, owner: str) -> None:
        if user["name"] != owner or user["role"] != "write":
            raise Failure(403, "you don't have the rights to write here with this token")

    def at(self, repo: Repo, revision: str) -> Commit:
        commit = repo.at(revision)
        if commit is None:
            raise Failure(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def create(self) -> None:
        body, name = self.json(), self.full_name(self.json())
        self.may_write(self.user(required=True), name.partition("/")[0])
        kind = (body.get("type") or "model") + "s"
        url = {"url": f"{self.hub.endpoint}/{'' if kind == 'models' else kind + '/'}{name}"}
        if (kind, name) in self.hub.repos:
            return self.answer({"error": "You already created this repo", **url}, 409)
        repo = Repo(kind, name, private=body.get("private") or body.get("visibility") == "private")
        repo.branches["main"] = self.hub.commit("initial commit", {".gitattributes": File(b"", lfs=False)}, None)
        self.hub.repos[kind, name] = repo
        self.answer(url)

    def collection(self, slug: str) -> None:
        """Makes one, shows one, or adds to one."""
        body, known = self.json(), self.hub.collections
        if not slug:
            self.may_write(self.user(required=True), body["namespace"])
            slug = f"{body['namespace']}/{body['title']}-0123"
            if slug in known:
                return self.answer({"error": "exists", "slug": slug}, 409)
            known[slug] = {
                "slug": slug, "title": body["title"], "owner": {"name": body["namespace"]}, "items": [], "position": 0,
                "lastUpdated": "2026-01-01T00:00:00.000Z", "private": body["private"], "theme": "blue", "upvotes": 0,
            }  # fmt: skip
        elif self.command == "POST":
            self.may_write(self.user(required=True), slug.partition("/")[0])
            if any(item["id"] == body["item"]["id"] for item in known[slug]["items"]):
                return self.answer({"error": "exists"}, 409)
            known[slug]["items"].append({"_id": "0", "position": 0, **body["item"]})
        self.answer(known[slug])

    def validate_yaml(self) -> None:
        found = re.match(r"---\n(.*?)\n---", self.json()["content"], re.DOTALL)
        errors = []
        try:
            card = yaml.safe_load(found[1]) if found else {}
            for model in card.get("model-index", []):
                if not model.get("name") or not all(r.get("task") and r.get("dataset") for r in model["results"]):
                    errors.append({"message": '"model-index" is incomplete'})
            if not isinstance(card.get("license", ""), str):
                errors.append({"message": '"license" must be a string'})
        except yaml.YAMLError:
            errors.append({"message": "the metadata is not YAML"})
        self.answer({"errors": errors, "warnings": []}, 400 if errors else 200)

    def api(self, kind: str, name: str, rest: list[str]) -> None:
        write = self.command in ("POST", "PUT", "DELETE") and rest[:1] != ["paths-info"]
        # Anybody may open a pull request on a public repository, as on the Hub.
        pull = rest[:1] in (["commit"], ["preupload"]) and "create_pr" in self.query
        repo = self.repo(kind, name, write=write and not pull)
        if pull and self.user(required=True)["role"] != "write":
            raise Failure(403, "this token may only read")
        match rest:
            case [] | ["revision", _]:
                self.info(repo, self.at(repo, rest[1] if rest else "main"))
            case ["tree", revision, *folder]:
                prefix = "".join(f"{part}/" for part in folder)
                entries = self.at(repo, revision).entries()
                inside = [path for path in entries if path.startswith(prefix)]
                if folder and not inside:
                    raise Failure(404, f"no such folder: {prefix}", "EntryNotFound")
                if self.query.get("recursive", ["false"])[0].lower() != "true":
                    inside = [path for path in inside if "/" not in path.removeprefix(prefix)]
                self.answer([entries[path] for path in inside])
            case ["paths-info", revision]:
                form = parse_qs(self.body.decode())
                wanted = form.get("paths") or self.json().get("paths", [])
                entries = self.at(repo, revision).entries()
                self.answer([entries[path] for path in wanted if path in entries])
            case ["refs"]:
                refs = {
                    group: [{"name": n, "ref": f"{prefix}{n}", "targetCommit": c.sha} for n, c in table.items()]
                    for group, prefix, table in (
                        ("branches", "refs/heads/", repo.branches),
                        ("tags", "refs/tags/", repo.tags),
                        ("pullRequests", "", repo.pulls),
                    )
                }
                self.answer({**refs, "converts": []})
            case ["commits", revision]:
                self.commits(self.at(repo, revision))
            case [("branch" | "tag") as what, ref]:
                body = self.json()
                table, ref, start = (
                    (repo.branches, ref, body.get("startingPoint", "main"))
                    if what == "branch"
                    else (repo.tags, body["tag"], ref)
                )
                if ref in table:
                    raise Failure(409, f"Reference already exists: {ref}")
                table[ref] = self.at(repo, start)
                self.answer({})
            case ["settings"]:
                repo.private = self.json().get("visibility", "") == "private" or bool(self.json().get("private"))
                self.answer({})
            case ["preupload", revision]:
                files = [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular",
                        "shouldIgnore": False,
                        "oid": None,
                    }
                    for file in self.json()["files"]
                ]
                self.at(repo, revision)
                self.answer({"files": files, "commitOid": None})
            case ["commit", revision]:
                self.commit(repo, revision)
            case _:
                raise Failure(404, f"no such page: {rest}")

    def info(self, repo: Repo, commit: Commit) -> None:
        readme = commit.files.get("README.md")
        found = re.match(rb"---\n(.*?)\n---", readme.content if readme else b"", re.DOTALL)
        card = yaml.safe_load(found[1]) if found else {}
        siblings = [{"rfilename": path, "size": len(file.content)} for path, file in commit.files.items()]
        self.answer({"_id": repo.id, "id": repo.id, "modelId": repo.id, "sha": commit.sha, "private": repo.private,
                     "author": repo.id.partition("/")[0], "siblings": siblings, "cardData": card, "gated": False,
                     "disabled": False, "tags": card.get("tags", []), "downloads": 0, "likes": 0,
                     "pipeline_tag": card.get("pipeline_tag"), "library_name": card.get("library_name"),
                     "createdAt": "2026-01-01T00:00:00.000Z", "lastModified": "2026-01-01T00:00:00.000Z"})  # fmt: skip

    def commits(self, commit: Commit | None) -> None:
        found = []
        while commit:
            found.append({"id": commit.sha, "title": commit.title, "message": "", "authors": [{"user": "me"}],
                          "date": "2026-01-01T00:00:00.000Z"})  # fmt: skip
            commit = commit.parent
        self.answer(found)

    def commit(self, repo: Repo, revision: str) -> None:
        lines = [json.loads(line) for line in self.body.splitlines() if line.strip()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        head = self.at(repo, revision)
        if header.get("parentCommit") not in (None, head.sha):
            raise Failure(412, "A commit has happened since. Please refresh and try again.")
        files = dict(head.files)
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), lfs=False)
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.blobs:
                    raise Failure(400, f"the content of {value['path']} was never uploaded")
                files[value["path"]] = File(self.hub.blobs[value["oid"]], lfs=True)
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            elif line["key"] == "deletedFolder":
                files = {path: file for path, file in files.items() if not path.startswith(value["path"])}
        commit = self.hub.commit(header["summary"], files, head)
        url = f"{self.hub.endpoint}/{repo.id}"
        answer = {"success": True, "commitOid": commit.sha, "commitUrl": f"{url}/commit/{commit.sha}", "hookOutput": ""}
        if "create_pr" in self.query:
            number = len(repo.pulls) + 1
            repo.pulls[f"refs/pr/{number}"] = commit
            answer["pullRequestUrl"] = f"{url}/discussions/{number}"
        elif revision in repo.pulls:
            repo.pulls[revision] = commit
        elif revision in repo.branches:
            repo.branches[revision] = commit
        else:
            raise Failure(400, f"{revision} is no branch")
        self.answer(answer)

    def git(self, kind: str, name: str, rest: list[str]) -> None:
        match rest:
            case ["info", "lfs", "objects", "batch"]:
                self.repo(kind, name.removesuffix(".git"))
                self.user(required=True)
                objects = []
                for wanted in self.json()["objects"]:
                    href = f"{self.hub.storage}/{wanted['oid']}"
                    verify = f"{self.hub.endpoint}/{name}/info/lfs/verify"
                    actions = {"upload": {"href": href}, "verify": {"href": verify}}
                    stored = wanted["oid"] in self.hub.blobs
                    objects.append({**wanted, **({} if stored else {"actions": actions})})
                self.answer({"transfer": "basic", "objects": objects})
            case ["info", "lfs", "verify"]:
                if self.json()["oid"] not in self.hub.blobs:
                    raise Failure(404, "never uploaded")
                self.answer({})
            case ["resolve", *path]:
                self.resolve(self.repo(kind, name), path)
            case _:
                raise Failure(404, f"no such page: {rest}")

    def resolve(self, repo: Repo, path: list[str]) -> None:
        size = 3 if path[:2] == ["refs", "pr"] else 1
        revision, name = "/".join(path[:size]), "/".join(path[size:])
        commit = self.at(repo, revision)
        headers = {"X-Repo-Commit": commit.sha}
        file = commit.files.get(name)
        if file is None:
            raise Failure(404, "Entry not found", "EntryNotFound", **headers)
        if not file.lfs:
            return self.answer_file(file.content, ETag=f'"{file.oid}"', **headers)
        headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(len(file.content))}
        self.answer(b"", 302, Location=f"{self.hub.storage}/{file.sha256}", **headers)


def main() -> None:
    hub = Hub()
    servers = []
    for handler in (Api, Storage):
        server = ThreadingHTTPServer(("127.0.0.1", 0), type(handler.__name__, (handler,), {"hub": hub}))
        server.daemon_threads = True
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
    # Two names of the same machine are two origins.
    hub.endpoint = f"http://127.0.0.1:{servers[0].server_port}"
    hub.storage = f"http://localhost:{servers[1].server_port}"
    print(json.dumps({"endpoint": hub.endpoint, "storage": hub.storage}), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
