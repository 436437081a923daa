"""A Hugging Face Hub on loopback: the routes that huggingface_hub's client uses, with faults on request.

Files of at least ``LFS_BYTES`` are what the Hub calls LFS: ``resolve`` redirects to another origin, where the token
must not be sent. Tests put repositories into ``Hub.repos`` and faults into ``Hub.fault``.

The client reads its settings when it is imported, so this module, imported first, sets them: its Hub is a port of ours,
on which nothing answers unless a test starts the server (fixture ``hub``). No test reaches the public Hub.
"""

import base64
import dataclasses
import hashlib
import http.server
import json
import os
import re
import socket
import tempfile
import threading
import urllib.parse

TOKEN = "hf_of_the_tests"
LFS_BYTES = 4096

HOME = tempfile.TemporaryDirectory(prefix="pdrop-jax-hub-")
_kept = socket.socket()
_kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
_kept.bind(("127.0.0.1", 0))
PORT = _kept.getsockname()[1]
os.environ |= {
    "HF_ENDPOINT": f"http://127.0.0.1:{PORT}",
    "HF_HOME": f"{HOME.name}/hf",
    "HF_HUB_DISABLE_XET": "1",  # the server stores files as the Hub did before
    "PDROP_CACHE": f"{HOME.name}/pdrop",
}
for _name in ("HF_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE"):
    os.environ.pop(_name, None)


@dataclasses.dataclass
class Repo:
    """Commits by hash, each with its files, and the branches and tags."""

    commits: dict = dataclasses.field(default_factory=dict)
    refs: dict = dataclasses.field(default_factory=dict)
    private: bool = False
    gated: bool = False

    def commit(self, files, ref="main"):
        """Adds files to those of the last commit; None removes one. Returns the hash."""
        before = self.commits.get(self.refs.get(ref), {})
        new = {path: data for path, data in {**before, **files}.items() if data is not None}
        content = json.dumps([self.refs.get(ref), {path: sha256(data) for path, data in new.items()}])
        self.refs[ref] = sha1(content.encode())
        self.commits[self.refs[ref]] = new
        return self.refs[ref]

    def commit_folder(self, folder, **files):
        found = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
        return self.commit({name: path.read_bytes() for name, path in found.items()} | files)

    @property
    def files(self):
        """Those of the main branch."""
        return self.commits[self.refs["main"]]


class Hub:
    """The state of the server.

    Attributes:
      requests: (method, path) of every request, in order.
      fault: called with method and path; gives None, an HTTP status, or "truncate" (the connection breaks in the middle
        of the body), "short" (fewer bytes than announced at first) or "drop" (no answer at all).
    """

    def __init__(self):
        self.repos, self.requests, self.blobs, self.stray_tokens = {}, [], {}, 0
        self.fault = lambda method, path: None
        self.url, self.cdn = f"http://127.0.0.1:{PORT}", f"http://localhost:{PORT}"

    def repo(self, name, **kind):
        return self.repos.setdefault(name, Repo(**kind))

    def downloads(self):
        """Names of the files whose contents were sent."""
        return [path.rpartition("/")[2] for method, path in self.requests if method == "GET" and "/resolve/" in path]


def sha1(data):
    return hashlib.sha1(data).hexdigest()


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def git_oid(data):
    return sha1(f"blob {len(data)}\0".encode() + data)


class Refused(Exception):
    """An answer with an error status and the Hub's error headers."""

    def __init__(self, status, code="", message="", headers=()):
        self.status = status
        self.headers = dict(headers) | ({"X-Error-Code": code} if code else {}) | {"X-Error-Message": message or code}


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_):
        pass

    def do(self):
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        self.broken = self.hub.fault(self.command, path)
        try:
            if self.broken == "drop":
                self.close_connection = True
                return
            if isinstance(self.broken, int):
                raise Refused(self.broken)
            for pattern, method, answer in ROUTES:
                if (found := re.fullmatch(pattern, path)) and self.command in method:
                    answer(self, *found.groups())
                    return
            raise Refused(404)
        except Refused as refused:
            self.answer(json.dumps({"error": refused.headers["X-Error-Message"]}), refused.status, refused.headers)

    do_GET = do_HEAD = do_POST = do_PUT = do

    def answer(self, content, status=200, headers=(), size=None):
        data = content if isinstance(content, bytes) else content.encode()
        short = self.broken in ("short", "truncate") and self.command == "GET"
        sent = data[: len(data) // 2] if short else data
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(size or len(sent if self.broken == "short" else data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(sent)
        if short:
            self.close_connection = True

    def found(self, name, revision="main", contents=False):
        """The repository and the hash of a revision, if the request may see it."""
        repo = self.hub.repos.get(name)
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if self.headers.get("Authorization") and not known:
            raise Refused(401, message="Invalid credentials in Authorization header")
        if repo is None or (repo.private and not known):
            raise Refused(404 if known else 401, "RepoNotFound", "Repository not found")
        if repo.gated and contents:
            raise Refused(403 if known else 401, "GatedRepo", f"Access to model {name} is restricted")
        commit = repo.refs.get(revision, revision)
        if commit not in repo.commits:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repo, commit

    def info(self, name, revision="main"):
        repo, commit = self.found(name, revision)
        files = [{"rfilename": path} for path in sorted(repo.commits[commit])]
        about = {"_id": "0", "id": name, "modelId": name, "private": repo.private, "gated": repo.gated, "tags": []}
        self.answer(json.dumps(about | {"sha": commit, "siblings": files}))

    def tree(self, name, revision):
        repo, commit = self.found(name, revision)
        entries = []
        for path, data in sorted(repo.commits[commit].items()):
            entries.append({"type": "file", "oid": git_oid(data), "size": len(data), "path": path})
            if len(data) >= LFS_BYTES:
                entries[-1]["lfs"] = {"oid": sha256(data), "size": len(data), "pointerSize": 128}
        self.answer(json.dumps(entries))

    def resolve(self, name, revision, path):
        repo, commit = self.found(name, revision, contents=True)
        headers = {"X-Repo-Commit": commit}
        if path not in repo.commits[commit]:
            raise Refused(404, "EntryNotFound", headers=headers)
        data = repo.commits[commit][path]
        if len(data) < LFS_BYTES:
            self.send_file(data, headers | {"ETag": f'"{git_oid(data)}"'})
            return
        headers |= {"X-Linked-Etag": f'"{sha256(data)}"', "X-Linked-Size": str(len(data))}
        headers["Location"] = f"{self.hub.cdn}/cdn/{name}/{commit}/resolve/{urllib.parse.quote(path)}"
        self.answer("", 302, headers)

    def content(self, name, commit, path):
        self.hub.stray_tokens += "Authorization" in self.headers
        self.send_file(self.hub.repos[name].commits[commit][path], {"ETag": '"of the store"'})

    def send_file(self, data, headers):
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if not wanted:
            self.answer(data, headers=headers)
            return
        start = int(wanted[1])
        self.answer(data[start:], 206, {**headers, "Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"})

    def signed_in(self):
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise Refused(401, message="Invalid username or password.")
        return json.loads(self.body) if self.body[:1] == b"{" and b"\n" not in self.body else None

    def create(self):
        asked = self.signed_in()
        name = f"{asked['organization']}/{asked['name']}"
        if asked["organization"] == "others":
            raise Refused(403, message="You don't have the rights to create a model under this namespace")
        if name in self.hub.repos:
            self.answer(json.dumps({"error": "You already created it", "url": f"{self.hub.url}/{name}"}), 409)
            return
        self.hub.repo(name, private=asked.get("visibility") == "private").commit({".gitattributes": b""})
        self.answer(json.dumps({"url": f"{self.hub.url}/{name}"}))

    def validate(self):
        valid = json.loads(self.body)["content"].startswith("---\n")
        self.answer(json.dumps({"errors": [], "warnings": []}), 200 if valid else 400)

    def preupload(self, name, revision):
        asked = self.signed_in()
        self.found(name, revision)
        modes = {file["path"]: "lfs" if file["size"] >= LFS_BYTES else "regular" for file in asked["files"]}
        files = [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]
        self.answer(json.dumps({"files": files}))

    def batch(self, name):
        objects = self.signed_in()["objects"]
        for each in objects:
            each["actions"] = {"upload": {"href": f"{self.hub.url}/store/{each['oid']}"}}
        self.answer(json.dumps({"transfer": "basic", "objects": objects}))

    def store(self, oid):
        if sha256(self.body) != oid:
            raise Refused(400)
        self.hub.blobs[oid] = self.body
        self.answer("")

    def commit(self, name, revision):
        self.signed_in()
        repo, _ = self.found(name, revision)
        files = {}
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                files[value["path"]] = None
        oid = repo.commit(files, revision)
        self.answer(json.dumps({"commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid}))


_NAME = r"([\w.-]+/[\w.-]+)"
ROUTES = [
    (rf"/api/models/{_NAME}", "GET", Handler.info),
    (rf"/api/models/{_NAME}/revision/(.+)", "GET", Handler.info),
    (rf"/api/models/{_NAME}/tree/(.+)", "GET", Handler.tree),
    (rf"/cdn/{_NAME}/(\w+)/resolve/(.+)", "GET HEAD", Handler.content),
    (rf"/{_NAME}/resolve/([^/]+|refs/pr/\d+)/(.+)", "GET HEAD", Handler.resolve),
    (r"/api/repos/create", "POST", Handler.create),
    (r"/api/validate-yaml", "POST", Handler.validate),
    (rf"/api/models/{_NAME}/preupload/(.+)", "POST", Handler.preupload),
    (rf"/{_NAME}.git/info/lfs/objects/batch", "POST", Handler.batch),
    (r"/store/(\w+)", "PUT", Handler.store),
    (rf"/api/models/{_NAME}/commit/(.+)", "POST", Handler.commit),
]


class Server(http.server.ThreadingHTTPServer):
    allow_reuse_port = True


def serve():
    """Starts the server. Returns its state, and the server, which is to be shut down and closed."""
    hub = Hub()
    server = Server(("127.0.0.1", PORT), type("BoundHandler", (Handler,), {"hub": hub}))
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    return hub, server
