"""A hub of weights on the loopback interface, as its real client meets it: set HF_ENDPOINT to its address.

It answers what `huggingface_hub` asks when a snapshot is downloaded, in the way of the real one: a model's commit
and files, its tree in pages, small files by a redirect on the hub itself, large ones (safetensors) by a redirect to
another host with a signed address that takes no credentials, ranges, and errors with `X-Error-Code`. Gated, private
and unknown repositories answer as theirs do.

It can also misbehave: see :class:`Faults`. The client reads its environment when it is imported, so whatever asks
this hub runs in a process of its own, with :meth:`Hub.environ`.
"""

import contextlib
import hashlib
import json
import os
import re
import secrets
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qs, quote, unquote, urlsplit

LARGE: Final = (".safetensors", ".model")
"""Endings of what lies in the other host's storage."""
PAGE: Final = 20
"""Entries of a tree in one answer; the real hub gives 1000."""
_CHUNK: Final = 16 * 1024


@dataclass
class Repository:
    """What one repository holds, by commit; ``branches`` name commits."""

    gated: bool = False
    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, files: Mapping[str, bytes], branch: str = "main") -> str:
        """Put ``files`` at the head of ``branch``; the new commit."""
        digest = hashlib.sha1(usedforsecurity=False)
        for name, content in sorted(files.items()):
            digest.update(name.encode() + b"\0" + hashlib.sha1(content, usedforsecurity=False).digest())
        self.commits[digest.hexdigest()] = dict(files)
        self.branches[branch] = digest.hexdigest()
        return digest.hexdigest()


@dataclass
class Faults:
    """What goes wrong, by the name of a file in any repository."""

    cut: dict[str, list[int]] = field(default_factory=dict)
    """For each of the next answers: the bytes after which the connection is dropped."""
    refuse: dict[str, int] = field(default_factory=dict)
    """The status of every answer of the storage, from now on."""
    hold: dict[str, threading.Event] = field(default_factory=dict)
    """Half of the file is sent at once, the rest when the event is set."""
    sizes: dict[str, int] = field(default_factory=dict)
    """Bytes that the listing claims, where they are not the file's own."""


@dataclass(frozen=True)
class Asked:
    method: str
    path: str
    range: str | None
    authorization: str | None


class Hub:
    """The server, while it is open: its repositories, who may see which, its faults, and what it was asked."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.faults = Faults()
        self.asked: list[Asked] = []
        self.granted: dict[str, set[str]] = {}
        """By token: the repositories that are gated or private and that it may read."""
        self.signature = secrets.token_hex(8)
        self.url = ""
        self.storage_url = ""

    def add(self, name: str, files: Mapping[str, bytes] | Path, **options: bool) -> Repository:
        """A repository with one commit: the files given, or those of a folder."""
        if isinstance(files, Path):
            paths = [path for path in files.rglob("*") if path.is_file()]
            files = {path.relative_to(files).as_posix(): path.read_bytes() for path in paths}
        self.repositories[name] = Repository(**options)
        self.repositories[name].commit(files)
        return self.repositories[name]

    def environ(self, home: Path, **more: str) -> dict[str, str]:
        """What makes the client ask this hub, and keep what it downloads below ``home``."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_ETAG_TIMEOUT": "5",
            "HF_HUB_DOWNLOAD_TIMEOUT": "5",
            "NO_PROXY": "127.0.0.1",
            **more,
        }

    def downloads(self, name: str) -> list[Asked]:
        """The times that the content of a file was asked for."""
        return [one for one in self.asked if one.method == "GET" and one.path.endswith(f"/{quote(name)}")]


@contextlib.contextmanager
def serve_hub() -> Iterator[Hub]:
    """Serve until the block ends. The storage is another port, and so another origin."""
    hub = Hub()
    servers = [_serve(hub, _HubHandler), _serve(hub, _StorageHandler)]
    hub.url, hub.storage_url = (f"http://127.0.0.1:{server.server_port}" for server in servers)
    try:
        yield hub
    finally:
        for event in hub.faults.hold.values():
            event.set()
        for server in servers:
            server.shutdown()
            server.server_close()


def _serve(hub: Hub, kind: "type[_Handler]") -> ThreadingHTTPServer:
    server = ThreadingHTTPServer(("127.0.0.1", 0), type(kind.__name__, (kind,), {"hub": hub}))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    return server


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._take()

    def do_HEAD(self) -> None:
        self._take()

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self) -> None:
        raise NotImplementedError

    def _take(self) -> None:
        parts = urlsplit(self.path)
        asked = Asked(self.command, parts.path, self.headers["Range"], self.headers["Authorization"])
        self.hub.asked.append(asked)
        self.route = unquote(parts.path)
        self.query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.answer()

    def send(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in ({"Content_Length": str(len(body))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str, message: str) -> None:
        body = json.dumps({"error": message}).encode()
        headers = {"X_Error_Message": message, "Content_Type": "application/json"}
        self.send(status, body, **headers, **({"X_Error_Code": code} if code else {}))

    def send_file(self, name: str, content: bytes, **headers: str) -> None:
        """The content, or the range that was asked for, with the faults that were ordered."""
        first = 0
        if wanted := re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or ""):
            first = int(wanted[1])
            if first >= len(content):
                self.send(416, Content_Range=f"bytes */{len(content)}")
                return
            headers["Content_Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
        body = content[first:]
        self.send_response(206 if first else 200)
        for key, value in ({"Content_Length": str(len(body)), "Accept_Ranges": "bytes"} | headers).items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command == "HEAD":
            return
        cuts = self.hub.faults.cut.get(name)
        held = self.hub.faults.hold.get(name)
        if cuts:
            self._write(body[: cuts.pop(0)])
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        elif held:
            self._write(body[: len(body) // 2])
            held.wait(60)
            self._write(body[len(body) // 2 :])
        else:
            self._write(body)

    def _write(self, body: bytes) -> None:
        for start in range(0, len(body), _CHUNK):
            self.wfile.write(body[start : start + _CHUNK])
        self.wfile.flush()


class _HubHandler(_Handler):
    def answer(self) -> None:
        routes: dict[str, Callable[..., None]] = {
            r"/api/models/([^/]+/[^/]+)": self._info,
            r"/api/models/([^/]+/[^/]+)/revision/(.+)": self._info,
            r"/api/models/([^/]+/[^/]+)/tree/([^/]+)": self._tree,
            r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)": self._resolve,
            r"/api/resolve-cache/models/([^/]+/[^/]+)/([^/]+)/(.+)": self._cached,
        }
        for pattern, route in routes.items():
            if found := re.fullmatch(pattern, self.route):
                route(*found.groups())
                return
        self.refuse(404, "", "Sorry, we can't find the page you are looking for.")

    def _info(self, name: str, revision: str = "main") -> None:
        if files := self._files(name, revision):
            repository = self.hub.repositories[name]
            siblings = [{"rfilename": one["path"]} | self._sizes(one) for one in self._entries(files[1])]
            described = {
                "id": name,
                "modelId": name,
                "sha": files[0],
                "private": repository.private,
                "gated": "auto" if repository.gated else False,
                "disabled": False,
                "tags": ["diffusers"],
                "siblings": siblings,
            }
            self.send(200, json.dumps(described).encode(), Content_Type="application/json")

    def _sizes(self, entry: Mapping[str, Any]) -> dict[str, Any]:
        if not self.query.get("blobs"):
            return {}
        found: dict[str, Any] = {"size": entry["size"], "blobId": entry["oid"]}
        if lfs := entry.get("lfs"):
            found["lfs"] = {"sha256": lfs["oid"], "size": lfs["size"], "pointerSize": lfs["pointerSize"]}
        return found

    def _tree(self, name: str, revision: str) -> None:
        if files := self._files(name, revision):
            entries = self._entries(files[1])
            start = int(self.query.get("cursor", "0"))
            headers = {"Content_Type": "application/json"}
            if start + PAGE < len(entries):
                url = f"{self.hub.url}{self.path.partition('?')[0]}?recursive=True&cursor={start + PAGE}"
                headers["Link"] = f'<{url}>; rel="next"'
            self.send(200, json.dumps(entries[start : start + PAGE]).encode(), **headers)

    def _entries(self, files: Mapping[str, bytes]) -> list[dict[str, Any]]:
        found = []
        for path, content in sorted(files.items()):
            size = self.hub.faults.sizes.get(path, len(content))
            entry = {"type": "file", "path": path, "size": size, "oid": blob_id(content)}
            if path.endswith(LARGE):
                entry["lfs"] = {"oid": sha256(content), "size": size, "pointerSize": 135}
            found.append(entry)
        return found

    def _resolve(self, name: str, revision: str, path: str) -> None:
        if not (files := self._files(name, revision)):
            return
        if self.hub.repositories[name].gated and not self._granted(name):
            known = self._token() is not None
            text = (
                "you are not in the authorized list"
                if known
                else "You must have access to it and be authenticated to access it. Please log in."
            )
            self.refuse(403 if known else 401, "GatedRepo", f"Access to model {name} is restricted. {text}")
        elif path not in files[1]:
            self.refuse(404, "EntryNotFound", "Entry not found")
        elif path.endswith(LARGE):
            content = files[1][path]
            where = f"{self.hub.storage_url}/{name}/{files[0]}/{quote(path)}?Signature={self.hub.signature}"
            self.send(
                302,
                Location=where,
                X_Repo_Commit=files[0],
                X_Linked_Etag=f'"{sha256(content)}"',
                X_Linked_Size=str(len(content)),
            )
        else:
            where = f"/api/resolve-cache/models/{name}/{files[0]}/{quote(path)}"
            self.send(307, Location=where, X_Repo_Commit=files[0])

    def _cached(self, name: str, commit: str, path: str) -> None:
        content = self.hub.repositories[name].commits[commit][path]
        self.send_file(path, content, X_Repo_Commit=commit, ETag=f'"{blob_id(content)}"')

    def _files(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Commit and files, if the caller may see them; else it has been answered."""
        repository = self.hub.repositories.get(name)
        if self._token() is not None and self._token() not in self.hub.granted:
            self.refuse(401, "", "Invalid credentials in Authorization header")
        elif repository is None or (repository.private and not self._granted(name)):
            status = 401 if self._token() is None else 404
            self.refuse(status, "RepoNotFound", "Repository not found")
        else:
            commit = repository.branches.get(revision, revision)
            if commit in repository.commits:
                return commit, repository.commits[commit]
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return None

    def _token(self) -> str | None:
        value = self.headers["Authorization"]
        return value.removeprefix("Bearer ") if value else None

    def _granted(self, name: str) -> bool:
        return name in self.hub.granted.get(self._token() or "", ())


class _StorageHandler(_Handler):
    def answer(self) -> None:
        _, owner, name, commit, path = self.route.split("/", 4)
        if self.headers["Authorization"] or self.query.get("Signature") != self.hub.signature:
            self.send(400, b"Only one auth mechanism allowed")
        elif status := self.hub.faults.refuse.get(path):
            self.send(status, b"SlowDown")
        else:
            content = self.hub.repositories[f"{owner}/{name}"].commits[commit][path]
            self.send_file(path, content, ETag=f'"{hashlib.md5(content).hexdigest()}"')


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def blob_id(content: bytes) -> str:
    """The name that Git gives a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


# -- what lies on it -------------------------------------------------------------------------------------
def safetensors(size: int, seed: int = 0) -> bytes:
    """A file of the format, whole, with one tensor of ``size`` bytes."""
    header = json.dumps({"weight": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    pattern = bytes((seed + place) % 251 for place in range(251))
    return len(header).to_bytes(8, "little") + header + (pattern * (size // 251 + 1))[:size]


def pipeline(size: int = 4000) -> dict[str, bytes]:
    """The files of a Wan repository, in the hub's layout, each file of weights with ``size`` bytes of tensors; with
    what such repositories have besides and no pipeline is loaded from.
    """
    parts = {
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "transformer_2": ["diffusers", "WanTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
        "image_encoder": [None, None],
        "image_processor": [None, None],
    }
    index = {"_class_name": "WanPipeline", "boundary_ratio": 0.875, "expand_timesteps": False, **parts}
    files = {
        "model_index.json": json.dumps(index, indent=2).encode(),
        "scheduler/scheduler_config.json": b'{"_class_name": "UniPCMultistepScheduler"}',
        "tokenizer/tokenizer_config.json": b'{"model_max_length": 512}',
        "tokenizer/tokenizer.json": b'{"version": "1.0"}',
        "tokenizer/spiece.model": bytes(range(256)),
        "text_encoder/config.json": b'{"model_type": "umt5"}',
        "text_encoder/model.safetensors": safetensors(size, 1),
        "vae/config.json": b'{"_class_name": "AutoencoderKLWan"}',
        "vae/diffusion_pytorch_model.safetensors": safetensors(size, 2),
    }
    for seed, part in ((3, "transformer"), (5, "transformer_2")):
        shards = [f"diffusion_pytorch_model-{number:05}-of-00002.safetensors" for number in (1, 2)]
        files[f"{part}/config.json"] = b'{"_class_name": "WanTransformer3DModel"}'
        files |= {f"{part}/{name}": safetensors(size, seed + place) for place, name in enumerate(shards)}
        weight_map = {f"blocks.{place}.weight": name for place, name in enumerate(shards)}
        index_file = {"metadata": {"total_size": 2 * size}, "weight_map": weight_map}
        files[f"{part}/diffusion_pytorch_model.safetensors.index.json"] = json.dumps(index_file).encode()
    return files | dict.fromkeys(UNUSED, b"x" * size)


UNUSED: Final = (
    "README.md",
    "assets/comp_effic.png",
    "examples/i2v_input.JPG",
    "vae/diffusion_pytorch_model.fp16.safetensors",
    "vae/diffusion_pytorch_model.bin",
    "text_encoder/pytorch_model.bin",
    "text_encoder/onnx/model.onnx",
    "image_encoder/model.safetensors",
)
"""Files of :func:`pipeline` that nothing is loaded from."""
USED: Final = sorted(set(pipeline()) - set(UNUSED))
"""Those that it is loaded from."""


# -- who asks it -----------------------------------------------------------------------------------------
REPOSITORY, MODEL = "studio/Wan-Diffusers", "me/mine"
MANIFEST: Final = """
name = "Mine"
output = "video"
required = ["prompt"]
[[inputs]]
name = "prompt"
title = "Prompt"
type = "string"
role = "prompt"
default = "a cat"
[engines.wan]
weights = "{weights}"
"""


class Site:
    """A models folder with one model, a data directory and a cache, for processes that ask a hub."""

    def __init__(self, root: Path, hub: Hub) -> None:
        self.hub = hub
        self.home, self.data, self.models = root / "home", root / "data", root / "models"
        self.manifest(MANIFEST.format(weights=REPOSITORY))

    def manifest(self, text: str, model: str = MODEL) -> None:
        folder = self.models / model
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "model.toml").write_text(text)

    def environ(self, **more: str) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "RUSHES_"))}
        settings = {"RUSHES_MODELS_DIR": str(self.models), "RUSHES_DATA_DIR": str(self.data)}
        paths = {"PYTHONPATH": str(Path(__file__).parents[1])}
        return {**kept, **paths, **self.hub.environ(self.home), **settings, **more}

    def python(self, *arguments: str, **more: str) -> "subprocess.Popen[str]":
        """A Python with this environment, in a folder without a settings file."""
        return subprocess.Popen(
            [sys.executable, *arguments],
            env=self.environ(**more),
            cwd=self.models,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def files(self, repository: str = REPOSITORY) -> dict[str, Path]:
        """What lies in the snapshots of the cache, by name."""
        root = self.home / "hub" / f"models--{repository.replace('/', '--')}" / "snapshots"
        paths = [path for path in root.rglob("*") if path.is_file()]
        return {path.relative_to(root).as_posix().partition("/")[2]: path for path in paths}

    def blobs(self) -> Path:
        return self.home / "hub" / f"models--{REPOSITORY.replace('/', '--')}" / "blobs"
