"""Model ids: what is downloaded from a hub (a small one on this machine), what is not, and what works without it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

COMMIT = "0123456789" * 4


class Hub(ThreadingHTTPServer):
    """Serves one model, `owner/model`, from a folder; remembers which files were fetched."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.fetched, self.revisions = folder, [], set[str]()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def names(self) -> list[str]:
        return sorted(p.relative_to(self.folder).as_posix() for p in self.folder.rglob("*") if p.is_file())


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args: Any) -> None: ...

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0].strip("/").split("/")
        headers = {"X-Repo-Commit": COMMIT}
        if path[:4] == ["api", "models", "owner", "model"]:
            self.server.revisions.add(path[5] if len(path) > 5 else "main")
            files = [{"type": "file", "path": n, "rfilename": n, "size": 1, "oid": n} for n in self.server.names()]
            tree = files if path[4:5] == ["tree"] else {"id": "owner/model", "sha": COMMIT, "siblings": files}
            return self.reply(200, json.dumps(tree).encode(), headers)
        name = "/".join(path[4:])
        if path[:3] == ["owner", "model", "resolve"] and name in self.server.names():
            content = (self.server.folder / name).read_bytes()
            if self.command == "GET":
                self.server.fetched.append(name)
            return self.reply(200, content, {**headers, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'})
        return self.reply(
            404, b"{}", {"X-Error-Code": "RepoNotFound" if path[:2] != ["owner", "model"] else "EntryNotFound"}
        )

    def reply(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


@pytest.fixture
def hub(folder: Path, tmp_path: Path) -> Iterator[Hub]:
    target = Path(shutil.copytree(folder, tmp_path / "served"))
    weights = target / "unet/diffusion_pytorch_model"
    save_file({k: v.half() for k, v in load_file(f"{weights}.safetensors").items()}, f"{weights}.fp16.safetensors")
    shutil.copy(f"{weights}.safetensors", f"{weights}.non_ema.safetensors")
    for name in ("unet/diffusion_pytorch_model.bin", "v1-5-pruned.ckpt", "unet/flax_model.msgpack", "picture.png"):
        (target / name).write_bytes(b"not wanted")
    server = Hub(target)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


SCRIPT = """
import sys, warnings, huggingface_hub.constants, sdedit
warnings.simplefilter("always", UserWarning)
warnings.showwarning = lambda message, *rest, **more: print("warned:", message, end=" ")
pipe = sdedit.StableDiffusionImg2ImgPipeline.from_pretrained
for line in sys.stdin:
    try:
        print("loaded", type(eval(line)).__name__, flush=True)
    except Exception as error:
        print(type(error).__name__, str(error).replace(chr(10), " "), flush=True)
"""


class User:
    """A process with a cache of its own and no other host in reach, that loads what it is asked to."""

    def __init__(self, url: str, home: Path) -> None:
        settings = {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "*"}
        others = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGINGFACE_"))}
        self.process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT],
            env={**others, **settings, "HF_HUB_DISABLE_TELEMETRY": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, expression: str) -> str:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(expression + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()

    def __enter__(self) -> User:
        return self

    def __exit__(self, *args: Any) -> None:
        self.process.communicate()


LOADED = "loaded StableDiffusionImg2ImgPipeline"
NAMES = ("text_encoder/model", "unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model")


def weights(fetched: list[str]) -> list[str]:
    return sorted(name for name in fetched if not name.endswith((".json", ".txt")))


def test_only_what_is_needed_is_downloaded_and_once(hub: Hub, tmp_path: Path) -> None:
    with User(hub.url, tmp_path / "home") as user:
        said = user("pipe('owner/model', local_files_only=True)")
        assert said.startswith("FileNotFoundError owner/model") and "turned off" in said
        assert hub.fetched == []
        assert user("pipe('owner/model')") == LOADED
        assert weights(hub.fetched) == [f"{name}.safetensors" for name in NAMES]
        hub.fetched.clear()
        assert user("pipe('owner/model')") == user("pipe('owner/model', local_files_only=True)") == LOADED
        assert hub.fetched == []
        # A variant needs one more file, and the ordinary ones of the parts that have none.
        assert user("pipe('owner/model', variant='fp16', revision='other')") == LOADED
        assert hub.fetched == ["unet/diffusion_pytorch_model.fp16.safetensors"] and "other" in hub.revisions

        hub.shutdown()
        hub.server_close()
        said = user("pipe('owner/model')")
        assert said.startswith("warned: owner/model: taken from the cache") and said.endswith(LOADED)
        assert "could not be had from the hub" in user("pipe('owner/model', force_download=True)")
        assert "could not be had from the hub" in user("pipe('owner/other')")
        user("setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)")  # as the variable of that name does
        assert user("pipe('owner/model')") == LOADED


def test_parts_of_a_model_and_what_the_hub_does_not_have(hub: Hub, tmp_path: Path) -> None:
    def cache(name: str) -> str:
        return f"cache_dir={str(tmp_path / name)!r}"

    blocks = "('CrossAttnDownBlock2D', 'DownBlock2D'), up_block_types=('UpBlock2D', 'CrossAttnUpBlock2D')"
    unet = f"sdedit.UNet2DConditionModel(block_out_channels=(32, 64), down_block_types={blocks})"
    with User(hub.url, tmp_path / "home") as user:
        given = f"unet={unet}, text_encoder=None, tokenizer=None"
        assert user(f"pipe('owner/model', {given}, {cache('a')})") == LOADED
        assert weights(hub.fetched) == ["vae/diffusion_pytorch_model.safetensors"]
        hub.fetched.clear()
        load = f"sdedit.AutoencoderKL.from_pretrained('owner/model', subfolder='vae', {cache('b')})"
        assert user(load) == user(load[:-1] + ", local_files_only=True)") == "loaded AutoencoderKL"
        assert weights(hub.fetched) == ["vae/diffusion_pytorch_model.safetensors"]

        hub.fetched.clear()
        load = f"sdedit.DDIMScheduler.from_pretrained('owner/model', subfolder='scheduler', {cache('d')})"
        assert user(load) == "loaded DDIMScheduler" and weights(hub.fetched) == []

        said = user("pipe('owner/nothing')")
        assert said.startswith("FileNotFoundError owner/nothing is no file or folder here, and could not be had")
        (hub.folder / "vae/diffusion_pytorch_model.safetensors").unlink()
        said = user(f"pipe('owner/model', {cache('c')})")
        assert said.startswith("FileNotFoundError") and "vae has no weights" in said
