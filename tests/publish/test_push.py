"""Uploading, against a hub of our own on this machine."""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from saved_folders import run_folder

from torchmae.config.export import ExportOptions
from torchmae.errors import CheckpointError, ConfigError
from torchmae.publish.hub import push

huggingface_hub = pytest.importorskip("huggingface_hub")


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's API as an upload of small files takes; what it was given is in `server.seen`."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.seen.append((self.path, self.headers.get("Authorization"), body))  # type: ignore[attr-defined]
        if self.headers.get("Authorization") != "Bearer hf_right":
            self.answer(401, {"error": "Invalid username or password."})
        elif self.path == "/api/repos/create":
            self.answer(200, {"url": f"{self.address()}/me/model"})
        elif "/preupload/" in self.path:
            files = [
                {"path": item["path"], "uploadMode": "regular", "shouldIgnore": False}
                for item in json.loads(body)["files"]
            ]
            self.answer(200, {"files": files})
        elif "/commit/" in self.path:
            self.answer(200, {"commitUrl": f"{self.address()}/me/model/commit/abc", "commitOid": "abc"})
        else:
            self.answer(200, {})

    def do_GET(self) -> None:
        self.answer(200, {"id": "me/model", "sha": "abc", "siblings": []})

    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def answer(self, status: int, values: dict[str, Any]) -> None:
        content = json.dumps(values).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.seen = []  # type: ignore[attr-defined]
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    original = huggingface_hub.HfApi
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: original(endpoint=address))
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_model_and_its_card_are_one_commit(hub: Any, tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    address = push(run, "me/model", ExportOptions(data_licence="CC0"), private=True)
    assert address.endswith("/me/model/commit/abc")
    created = json.loads(next(body for path, _, body in hub.seen if path == "/api/repos/create"))
    assert created["name"] == "model" and (created.get("private") or created.get("visibility") == "private")
    commits = [body for path, _, body in hub.seen if "/commit/" in path]
    assert len(commits) == 1
    lines = [json.loads(line) for line in commits[0].splitlines()]
    files = {
        item["value"]["path"]: base64.b64decode(item["value"]["content"]) for item in lines if item["key"] == "file"
    }
    assert set(files) == {"README.md", "model.json", "model.safetensors"}
    assert files["model.safetensors"] == (run / "model.safetensors").read_bytes()
    assert b"Licence of the training data: CC0." in files["README.md"]
    assert (
        next(item["value"] for item in lines if item["key"] == "header")["summary"]
        == "torchmae export --to safetensors"
    )


def test_a_refused_upload_is_one_line(hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(CheckpointError) as caught:
        push(run_folder(tmp_path / "run"), "me/model", ExportOptions())
    assert str(caught.value).startswith("cannot push to me/model: ")
    assert str(caught.value).endswith("; log in with `hf auth login` or set HF_TOKEN, then try again")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("repo", ["model", "me/model/more", "me/", "../x/y", "me/mo del"])
def test_a_name_that_is_none(hub: Any, tmp_path: Path, repo: str) -> None:
    with pytest.raises(ConfigError, match="give user/name"):
        push(tmp_path, repo, ExportOptions())
    assert hub.seen == []


def test_the_library_is_optional(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match=r"huggingface_hub is not installed.*; pip install 'torchmae\[hub\]'"):
        push(tmp_path, "me/model", ExportOptions())
