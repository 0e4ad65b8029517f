"""A Hugging Face Hub of its own in a thread: the endpoints that huggingface_hub and transformers call to push and to load models.

It keeps files, branches, pull requests, tokens and rights in memory, sends large files through the LFS protocol and redirects their
downloads, as the Hub does, and notes every request. Xet is not spoken: set HF_HUB_DISABLE_XET.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".png")
WRITE, READ = "hf_" + "w" * 30, "hf_" + "r" * 30


def account(name="ada", role="write", orgs=()):
    """What whoami answers; `orgs` are (name, role) pairs."""
    return {
        "type": "user",
        "name": name,
        "orgs": [{"name": org, "roleInOrg": right} for org, right in orgs],
        "auth": {"type": "access_token", "accessToken": {"displayName": "test", "role": role}},
    }


@dataclass
class Repo:
    """One model repository: commits by id, branches (and refs/pr/N) by name."""

    private: bool = False
    gated: bool = False
    readable_by: tuple = ()
    commits: dict = field(default_factory=dict)
    branches: dict = field(default_factory=dict)
    pull_requests: int = 0

    def commit(self, files, branch="main"):
        """Put a whole tree {path: bytes} on a branch; returns the commit."""
        parent = self.branches.get(branch, "")
        lines = [f"{path} {hashlib.sha256(data).hexdigest()}" for path, data in sorted(files.items())]
        sha = hashlib.sha1("\n".join([parent, str(len(self.commits)), *lines]).encode()).hexdigest()
        self.commits[sha] = dict(files)
        self.branches[branch] = sha
        return sha

    def resolve(self, revision):
        """Commit of a branch, reference or commit; None if there is no such."""
        return self.branches.get(revision) or (revision if revision in self.commits else None)

    def files(self, revision="main"):
        return self.commits[self.resolve(revision)]


class Refused(Exception):
    """An answer other than 200: status, the Hub's code, and its message."""

    def __init__(self, status, code=None, message="refused"):
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


class HubServer:
    """`with HubServer() as hub:` listens on 127.0.0.1; `hub.endpoint` is its HF_ENDPOINT."""

    def __init__(self):
        self.repos, self.tokens, self.blobs, self.requests = {}, {}, {}, []
        self.tokens[WRITE] = account(orgs=(("lab", "write"), ("museum", "read")))
        self.tokens[READ] = account(role="read")
        self.broken = None  # a part of a path whose requests fail, and how: ("/lfs/", 507)

    def __enter__(self):
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join(5)

    def add(self, name, files=None, **rights):
        """A repository as it would be after its first push."""
        repo = self.repos[name] = Repo(**rights)
        repo.commit(files or {".gitattributes": b""})
        return repo

    def called(self, method, part):
        """Requests whose path holds `part`."""
        return [request for request in self.requests if request[0] == method and part in request[1]]


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._serve("GET")

    def do_HEAD(self):
        self._serve("HEAD")

    def do_POST(self):
        self._serve("POST")

    def do_PUT(self):
        self._serve("PUT")

    def _serve(self, method):
        parts = urlsplit(self.path)
        path, self.query = unquote(parts.path), parse_qs(parts.query)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append((method, path, self.query))
        try:
            if self.hub.broken and self.hub.broken[0] in path:
                raise Refused(self.hub.broken[1], message="down for maintenance")
            for pattern, verbs, action in ROUTES:
                if method in verbs and (match := re.fullmatch(pattern, path)):
                    action(self, *match.groups())
                    return
            raise Refused(404, message=f"no such endpoint: {method} {path}")
        except Refused as answer:
            headers = {"X-Error-Message": answer.message} | ({"X-Error-Code": answer.code} if answer.code else {})
            self._send(answer.status, json.dumps({"error": answer.message}).encode(), headers)

    def _send(self, status, data=b"", headers=None, length=None):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _json(self, value, status=200):
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _who(self, needed=True):
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in self.hub.tokens:
            raise Refused(401, message="Invalid credentials in Authorization header")
        if needed and not token:
            raise Refused(401, message="Invalid username or password.")
        return self.hub.tokens.get(token)

    def _may_write(self, name):
        who, owner = self._who(), name.split("/")[0]
        roles = {org["name"]: org["roleInOrg"] for org in who["orgs"]} | {who["name"]: "admin"}
        return who["auth"]["accessToken"]["role"] != "read" and roles.get(owner, "read") != "read"

    def _repo(self, name, write=False):
        repo, who = self.hub.repos.get(name), self._who(needed=False)
        hidden = repo is not None and repo.private and (who is None or not self._may_write(name))
        if repo is None or hidden:
            raise Refused(401 if who is None else 404, "RepoNotFound", "Repository not found")
        if write and not self._may_write(name):
            raise Refused(403, message="You don't have the required permissions to write")
        return repo

    def _tree(self, name, revision):
        repo = self._repo(name)
        sha = repo.resolve(revision)
        if sha is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repo, sha, repo.commits[sha]

    def _refuse_gated(self, repo):
        who = self._who(needed=False)
        if repo.gated and (who is None or who["name"] not in repo.readable_by):
            raise Refused(403 if who else 401, "GatedRepo", "Access to this model is restricted")

    # ---- accounts and repositories

    def whoami(self):
        self._json(self._who())

    def create(self):
        asked = json.loads(self.body)
        who = self._who()
        name = f"{asked.get('organization') or who['name']}/{asked['name']}"
        if not self._may_write(name):
            raise Refused(403, message="You don't have the rights to create a model under this namespace")
        if name in self.hub.repos:
            raise Refused(409, message="You already created this model repo")
        self.hub.add(name, private=bool(asked.get("private")) or asked.get("visibility") == "private")
        self._json({"url": f"{self.hub.endpoint}/{name}", "name": name, "id": "1"})

    def auth_check(self, name, write):
        self._refuse_gated(self._repo(name, write=bool(write)))
        self._json({})

    def branch(self, name, branch):
        repo = self._repo(name, write=True)
        if branch in repo.branches:
            raise Refused(409, message="Reference already exists")
        repo.branches[branch] = repo.branches["main"]
        self._json({})

    def info(self, name, revision=None):
        repo, sha, files = self._tree(name, revision or "main")
        siblings = [{"rfilename": path} | (_blob(path, data) if "blobs" in self.query else {}) for path, data in sorted(files.items())]
        about = {"_id": "1", "id": name, "modelId": name, "sha": sha, "private": repo.private, "gated": "auto" if repo.gated else False}
        self._json(about | {"siblings": siblings, "tags": [], "downloads": 0, "likes": 0, "author": name.split("/")[0]})

    def tree(self, name, revision, below=""):
        repo, _, files = self._tree(name, revision)
        self._refuse_gated(repo)
        chosen = {path: data for path, data in files.items() if path.startswith(below.lstrip("/"))}
        if not chosen:
            raise Refused(404, "EntryNotFound", f"{below} does not exist")
        entries = []
        for path, data in sorted(chosen.items()):
            blob = _blob(path, data)
            lfs = {"lfs": {"oid": blob["lfs"]["sha256"], "size": len(data), "pointerSize": 128}} if "lfs" in blob else {}
            entries.append({"type": "file", "path": path, "size": len(data), "oid": blob["blobId"]} | lfs)
        self._json(entries)

    # ---- uploads

    def validate(self):
        text = json.loads(self.body)["content"]
        good = text.startswith("---\n") and "\n---\n" in text
        self._json({"errors": [] if good else [{"message": "no metadata"}], "warnings": []}, 200 if good else 400)

    def preupload(self, name, revision):
        repo = self._repo(name, write="create_pr" not in self.query)
        sha = repo.resolve(revision)
        if sha is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        answer = []
        for file in json.loads(self.body)["files"]:
            path, old = file["path"], repo.commits[sha].get(file["path"])
            mode = "lfs" if path.endswith(LFS_SUFFIXES) or file["size"] > 10_000_000 else "regular"
            blob = None if old is None else _blob(path, old)
            oid = None if blob is None else blob["lfs"]["sha256"] if mode == "lfs" else blob["blobId"]
            answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._json({"files": answer})

    def lfs_batch(self, name):
        self._repo(name)
        objects = []
        for item in json.loads(self.body)["objects"]:
            place = f"{self.hub.endpoint}/lfs/{item['oid']}"
            actions = {"upload": {"href": place, "header": {}}, "verify": {"href": f"{place}/verify", "header": {}}}
            objects.append(item if item["oid"] in self.hub.blobs else item | {"actions": actions})
        self._json({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refused(400, message="the content is not what its name says")
        self.hub.blobs[oid] = self.body
        self._send(200)

    def lfs_verify(self, oid):
        asked = json.loads(self.body)
        if asked["oid"] not in self.hub.blobs or len(self.hub.blobs[oid]) != asked["size"]:
            raise Refused(404, message="was not uploaded")
        self._json({})

    def commit(self, name, revision):
        as_request = "create_pr" in self.query
        repo = self._repo(name, write=not as_request)
        sha = repo.resolve(revision)
        if sha is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = dict(repo.commits[sha])
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
        answer = {"success": True}
        if as_request:
            repo.pull_requests += 1
            revision = f"refs/pr/{repo.pull_requests}"
            repo.branches[revision] = sha
            answer["pullRequestUrl"] = f"{self.hub.endpoint}/{name}/discussions/{repo.pull_requests}"
        oid = repo.commit(files, revision)
        self._json(answer | {"commitOid": oid, "commitUrl": f"{self.hub.endpoint}/{name}/commit/{oid}"})

    # ---- downloads

    def download(self, name, rest):
        # a revision such as refs/pr/1 has slashes of its own
        repo = self._repo(name)
        revisions = [ref for ref in (*repo.branches, *repo.commits) if rest.startswith(f"{ref}/")]
        if not revisions:
            raise Refused(404, "RevisionNotFound", "Invalid rev id")
        revision = max(revisions, key=len)
        path, sha = rest[len(revision) + 1 :], repo.resolve(revision)
        self._refuse_gated(repo)
        data = repo.commits[sha].get(path)
        if data is None:
            raise Refused(404, "EntryNotFound", f"{path} does not exist")
        blob = _blob(path, data)
        if "lfs" in blob:
            oid = blob["lfs"]["sha256"]
            self.hub.blobs[oid] = data
            headers = {"X-Repo-Commit": sha, "X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(data))}
            # under another host name, as the Hub's storage is: a client sends it no token
            self._send(302, b"", headers | {"Location": f"{self.hub.endpoint.replace('127.0.0.1', 'localhost')}/lfs/{oid}"})
        else:
            self._send(200, data, {"X-Repo-Commit": sha, "ETag": f'"{blob["blobId"]}"'})

    def lfs_get(self, oid):
        if self.headers.get("Authorization"):
            raise Refused(400, message="a token was sent to the storage")
        self._send(200, self.hub.blobs[oid], {"ETag": f'"{oid}"'})


def _blob(path, data):
    """Size and ids of a file as the API gives them."""
    blob = {"size": len(data), "blobId": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()}
    if path.endswith(LFS_SUFFIXES):
        blob["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 128}
    return blob


_NAME = r"([\w.-]+/[\w.-]+)"
ROUTES = [
    (r"/api/whoami-v2", ("GET",), _Handler.whoami),
    (r"/api/repos/create", ("POST",), _Handler.create),
    (r"/api/validate-yaml", ("POST",), _Handler.validate),
    (rf"/api/models/{_NAME}", ("GET",), _Handler.info),
    (rf"/api/models/{_NAME}/revision/(.+)", ("GET",), _Handler.info),
    (rf"/api/models/{_NAME}/auth-check(/write)?", ("GET",), _Handler.auth_check),
    (rf"/api/models/{_NAME}/branch/(.+)", ("POST",), _Handler.branch),
    (rf"/api/models/{_NAME}/tree/([^/]+)(/.*)?", ("GET",), lambda self, n, r, b: self.tree(n, r, b or "")),
    (rf"/api/models/{_NAME}/preupload/(.+)", ("POST",), _Handler.preupload),
    (rf"/api/models/{_NAME}/commit/(.+)", ("POST",), _Handler.commit),
    (rf"/{_NAME}\.git/info/lfs/objects/batch", ("POST",), _Handler.lfs_batch),
    (r"/lfs/([0-9a-f]{64})", ("PUT",), _Handler.lfs_put),
    (r"/lfs/([0-9a-f]{64})", ("GET", "HEAD"), _Handler.lfs_get),
    (r"/lfs/([0-9a-f]{64})/verify", ("POST",), _Handler.lfs_verify),
    (rf"/{_NAME}/resolve/(.+)", ("GET", "HEAD"), _Handler.download),
]
