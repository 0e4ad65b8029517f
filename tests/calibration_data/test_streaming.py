"""Streaming from a Hub: a server on this machine that speaks what `datasets` asks for, and a process whose HF_ENDPOINT it is."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest

READ = """
import json, sys
from rotatek_compile.calibration_data.errors import DataError
from rotatek_compile.calibration_data.registry import open_data
found = []
for name, split, count, revision in json.loads(sys.argv[1]):
    try:
        source = open_data(name, split, 0, revision)
        samples = [[s.question, list(s.answers), [list(i.size) for i in s.images]] for s in source.samples(count)]
        found.append([source.repository, source.split, source.revision, samples])
    except DataError as error:
        found.append(str(error))
print(json.dumps(found))
"""
COLUMNS = {"questionId": "i4", "question": "s", "answers": ["s"], "image": "image"}


class Handler(BaseHTTPRequestHandler):
    """Data sets of `server.repositories` {id: {commit: {path: bytes}}}, main at `server.sha`; `server.served` counts bytes per path."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or "{}")
        self.answer(body.get("paths"))

    def do_GET(self):
        self.answer(None)

    def answer(self, paths):
        path = unquote(urlsplit(self.path).path)
        match = re.fullmatch(r"(/api)?/datasets/([^/]+/[^/]+)(?:/(revision|tree|paths-info|resolve)/([^/]+)(?:/(.*))?)?", path)
        self.server.asked.append((self.command, path))
        commits = self.server.repositories.get(match[2]) if match else None
        if commits is None:
            return self.send(401, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        kind, rest = match[3], match[5]
        self.sha = self.server.sha if match[4] in (None, "main") else match[4]
        files = commits.get(self.sha)
        if files is None:
            return self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"})
        if kind in (None, "revision"):
            return self.json({"id": match[2], "sha": self.sha, "siblings": [{"rfilename": name} for name in files], "tags": []})
        if kind == "tree":
            return self.json(level(files, f"{rest}/" if rest else "", "recursive=true" in self.path.lower()))
        if kind == "paths-info":
            known = {item["path"]: item for item in level(files, "", True)}
            return self.json([known[name] for name in paths if name in known])
        if rest not in files:
            return self.send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": self.sha})
        return self.file(rest, files[rest])

    def file(self, name, data):
        headers = {"X-Repo-Commit": self.sha, "ETag": f'"{hashlib.sha1(data).hexdigest()}"', "Accept-Ranges": "bytes"}
        if part := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(part[1]), min(int(part[2] or len(data)), len(data) - 1)
            piece = data[start : end + 1]
            headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
            return self.send(206, self.count(name, piece), headers)
        return self.send(200, self.count(name, data), headers)

    def count(self, name, data):
        if self.command == "GET":
            self.server.served[name] = self.server.served.get(name, 0) + len(data)
        return data

    def json(self, value):
        self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def send(self, status, data, headers):
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def level(files, below, deep):
    """What lies below a folder, as the Hub lists it: folders too, and with `deep` all that is in them."""
    inside = {name: data for name, data in files.items() if name.startswith(below)}
    folders = {below + name[len(below) :].split("/")[0] for name in inside if "/" in name[len(below) :]}
    found = [{"type": "directory", "path": name, "size": 0, "oid": hashlib.sha1(name.encode()).hexdigest()} for name in sorted(folders)]
    return found + [
        {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
        for name, data in inside.items()
        if deep or "/" not in name[len(below) :]
    ]


@pytest.fixture
def hub(hub_cache, hub_commit, tmp_path):
    """`hub(repository, ...)` serves it; `hub.read([name, split, count, revision], ...)` opens data in a process that reads from there."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.repositories, server.sha, server.asked, server.served = {}, hub_commit, [], {}
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def read(*wanted):
        env = {key: value for key, value in os.environ.items() if not key.startswith("HF_")} | {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}", "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1", "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        ended = subprocess.run([sys.executable, "-c", READ, json.dumps(wanted)], env=env, capture_output=True, text=True, timeout=120)
        assert ended.returncode == 0, ended.stderr
        return json.loads(ended.stdout)

    def add(repository, changed=None, under=None, commit=hub_commit):
        folder = hub_cache(repository, changed, commit)
        files = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        server.repositories.setdefault(under or repository, {})[commit] = files
        return files

    add.read, add.server, add.home = read, server, tmp_path / "home"
    yield add
    server.shutdown()
    server.server_close()


def test_what_is_asked_for_is_streamed_and_the_rest_stays_there(hub, hub_commit):
    shards = 4
    rows = [{"questionId": n, "question": f"Who is {n}?", "answers": [f"t{n}"]} for n in range(300)]
    whole = hub("HuggingFaceM4/DocumentVQA", {None: {"train": (COLUMNS, rows)}})
    data = whole.pop("data/train-00000-of-00001.parquet")
    whole |= {f"data/train-{n:05}-of-{shards:05}.parquet": data for n in range(shards)}
    hub("lmms-lab-encoder/ChartQA", under="lmms-lab/ChartQA")
    older = {None: {"test": ({"type": "s", "question": "s", "answer": "s", "image": "image"}, [{"question": "Then?", "answer": "old"}])}}
    hub("lmms-lab-encoder/ChartQA", older, under="lmms-lab/ChartQA", commit="d" * 40)
    few, chart, then, unknown, revision = hub.read(
        ["docvqa", "calibration", 5, None],
        ["chartqa", "evaluation", 9, None],
        ["chartqa", "evaluation", 9, "d" * 40],
        ["someone/nothing", "calibration", 1, None],
        ["docvqa", "calibration", 1, "v9"],
    )
    repository, split, commit, samples = few
    assert (repository, split, commit) == ("HuggingFaceM4/DocumentVQA", "train", hub_commit)
    assert len({question for question, _, _ in samples}) == 5
    for question, answers, sizes in samples:
        number = question.removeprefix("Who is ").partition("?")[0]
        assert (answers, sizes) == ([f"t{number}"], [[48, 32]]) and question.endswith("single word or phrase.")
    served = sum(size for name, size in hub.server.served.items() if name.startswith("data/train"))
    assert len(data) * 0.9 < served < len(data) * 1.8  # one file of four, and 64 KiB of another for its column names
    assert not list((hub.home).rglob("*.parquet"))  # nothing of it is kept on disk
    assert chart[:3] == ["lmms-lab/ChartQA", "test", hub_commit] and [answers for _, answers, _ in chart[3]] in (
        [["40"], ["0.5"]],
        [["0.5"], ["40"]],
    )
    assert then[:3] == ["lmms-lab/ChartQA", "test", "d" * 40] and [answers for _, answers, _ in then[3]] == [["old"]]
    assert unknown.startswith("there is no data set someone/nothing on the Hub (or it is private), and no such path here")
    assert revision == "HuggingFaceM4/DocumentVQA has no revision 'v9'; pass a branch, tag or commit of it"
