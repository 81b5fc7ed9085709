"""What strangers and large bodies may cost a running server: memory and disk, seen from outside."""

import base64
import contextlib
import os
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from support.server import Server, eventually

MIB = 1 << 20
VACE = "community/wan-2-2/vace-fun"


@pytest.fixture
def server(make_server) -> Server:
    return make_server(arguments=("--workers", "0"), access_log="false").start()


def connect(server: Server) -> socket.socket:
    url = urlsplit(server.url)
    connection = socket.create_connection((url.hostname, url.port))
    connection.settimeout(60)
    return connection


def peak(server: Server) -> int:
    """The most memory that the gateway ever had, in bytes."""
    status = Path(f"/proc/{server.one('gateway').pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def test_a_header_without_end(server: Server) -> None:
    before = peak(server)
    with connect(server) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: a\r\nX-A: ")
        with contextlib.suppress(OSError):  # closed while we write, or afterwards
            for _ in range(200 * 16):
                connection.sendall(b"a" * 65536)
            while connection.recv(65536):
                pass
    assert peak(server) - before < 16 * MIB
    assert 200 == server.call("GET", "/").status_code


def test_many_large_bodies_at_once(server: Server) -> None:
    content = os.urandom(30 * MIB)
    text = base64.b64encode(content).decode()
    body = f'{{"56_text": "x", "118_image": "data:image/png;base64,{text}"}}'.encode()
    before = peak(server)
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda _: server.call("POST", f"/v1/models/{VACE}", content=body), range(6)))
    assert [200] * 6 == [answer.status_code for answer in answers], answers[0].text
    assert peak(server) - before < 300 * MIB
    kept = [
        path.stat().st_size for path in (server.data_dir / "files" / "uploads").rglob("*") if path.is_file()
    ]
    assert [len(content)] * 6 == kept


def test_forms_are_spooled_in_the_data_directory(make_server, tmp_path, monkeypatch) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setenv("TMPDIR", str(elsewhere))
    server = make_server(arguments=("--workers", "0"), access_log="false").start()
    gateway = server.one("gateway").pid
    head = (
        f"POST /v1/files HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {server.key}\r\n"
        "Content-Type: multipart/form-data; boundary=b\r\nContent-Length: 9000000\r\n\r\n"
        '--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    )
    with connect(server) as connection:
        connection.sendall(head.encode() + b"a" * 4 * MIB)

        def open_files() -> list[str]:
            links = []
            for link in Path(f"/proc/{gateway}/fd").iterdir():
                with suppress(FileNotFoundError):  # closed since it was listed
                    links.append(str(link.readlink()))
            return [
                link for link in links if link.startswith((str(elsewhere), str(server.data_dir / "scratch")))
            ]

        eventually(lambda: any("/up-" in link for link in open_files()), 20, "the form's file is open")
        eventually(lambda: sum(p.stat().st_size for p in scratch(server)) >= 3 * MIB, 20, "it is written")
        assert [] == [link for link in open_files() if link.startswith(str(elsewhere))]
    eventually(lambda: not scratch(server), 20, "nothing is left of it")


def scratch(server: Server) -> list[Path]:
    return list((server.data_dir / "scratch").rglob("up-*"))


def test_an_upload_of_the_largest_size(server: Server) -> None:
    """Refused for what it is, not for its size; in little memory both bare and as a form."""
    blob = os.urandom(99_000_000)
    before = peak(server)
    for given in ({"content": blob}, {"files": {"file": ("a.mp4", blob, "video/mp4")}}):
        answer: httpx.Response = server.call("POST", "/v1/files", **given)
        assert (422, "input_not_media") == (answer.status_code, answer.json()["detail"][0]["type"])
    assert peak(server) - before < 64 * MIB
    assert [] == scratch(server)
