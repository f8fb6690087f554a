"""The Hub's client against a server of our own: fetching, the cache, checksums, and one line for each refusal."""

import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from diaphane.weights import hub
from diaphane.weights.catalogue import CATALOGUE, ENTRIES
from diaphane.weights.errors import ChecksumError, DiskFullError, HubError, MissingFileError, OfflineError
from diaphane.weights.load import load
from huggingface_hub.errors import LocalEntryNotFoundError

HERE = Path(__file__).parent
TINY = HERE / "golden" / "tiny-ddpm" / "diffusers"
COMMIT = "0" * 39 + "1"


class Server(BaseHTTPRequestHandler):
    """A Hub with a whole repository, a damaged one, a gated one, a broken one, and one without weights."""

    def reply(self, body: bool):
        _, name, resolve, _, *rest = [*self.path.strip("/").split("/"), "", "", ""]
        rest = list(filter(None, rest))
        file = TINY / "/".join(rest)
        refusals = {"gated": (403, "GatedRepo"), "nothing": (404, "RepoNotFound"), "broken": (500, "")}
        if resolve != "resolve" or name in refusals:
            code, error = refusals.get(name, (404, "RepoNotFound"))
        elif not file.is_file() or name == "empty" or (name == "unset" and file.suffix == ".json"):
            code, error = 404, "EntryNotFound"
        else:
            content = file.read_bytes()
            digest = hashlib.sha256(content).hexdigest()
            sent = content[:-1] + b"\0" if name == "damaged" and file.suffix == ".safetensors" else content
            self.send_response(200)
            for header, value in {
                "X-Repo-Commit": COMMIT, "ETag": f'"{digest}"', "X-Linked-Etag": f'"{digest}"',
                "X-Linked-Size": str(len(content)), "Content-Length": str(len(content)),
            }.items():  # fmt: skip
                self.send_header(header, value)
            self.end_headers()
            self.wfile.write(sent if body else b"")
            return
        self.send_response(code)
        self.send_header("X-Error-Code", error)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_HEAD(self):
        self.reply(body=False)

    def do_GET(self):
        self.reply(body=True)

    def log_message(self, format: str, *args: object):
        pass


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def asked(cache: Path, endpoint: str, *names: str, **env: str) -> list[str]:
    """The lines of a process of its own that loads names."""
    settings = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(cache),
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
        **env,
    }
    command = [sys.executable, str(HERE / "hub_client.py"), *names]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, cwd=cache, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_hub_is_read_and_every_refusal_is_one_line_with_the_cure(tmp_path: Path, endpoint: str):
    names = ["me/whole", "me/unset", "me/damaged", "me/gated", "me/nothing", "me/empty", "me/whole:other.pt"]
    whole, unset, damaged, gated, nothing, empty, other = asked(tmp_path, endpoint, *names)
    assert whole == "loaded ddpm 32 diffusion_pytorch_model.safetensors"
    assert unset == whole  # without its config.json
    assert damaged.startswith("ChecksumError: ")
    assert "delete it and fetch it again" in damaged
    assert gated.startswith("GatedError: me/gated is gated: accept its terms at https://huggingface.co/me/gated")
    assert nothing.startswith("NotOnHubError: there is no me/nothing on the Hub, or it is private")
    assert empty.startswith("NotOnHubError: me/empty has no weight file (diffusion_pytorch_model.safetensors, ")
    assert other.startswith("NotOnHubError: me/whole has no other.pt")
    offline = asked(tmp_path, endpoint, "me/whole", "me/unset", "me/never", HF_HUB_OFFLINE="1")
    assert offline[:2] == [whole, whole]  # from the cache
    assert offline[2].startswith("OfflineError: ")
    assert "unset HF_HUB_OFFLINE" in offline[2]


def raising(error: Exception):
    def download(*args: object, **kwargs: object):
        raise error

    return download


@pytest.mark.parametrize(
    ("error", "kind", "cure"),
    [
        (OSError(28, "No space left on device"), DiskFullError, "free some, or set HF_HOME to another disk"),
        (
            LocalEntryNotFoundError("after its retries"),
            OfflineError,
            "the Hub cannot be reached: connect, unset HF_HUB",
        ),
        (RuntimeError("surprise\nsecond line"), HubError, "RuntimeError: surprise): try again"),
    ],
)
def test_what_else_goes_wrong_is_one_line_too(monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type, cure: str):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", raising(error))
    with pytest.raises(kind) as caught:
        load("me/whole")
    assert cure in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_published_checksum_is_held_against_the_file(tmp_path: Path):
    path = tmp_path / "x"
    path.write_bytes(b"x")
    hub.verify(path, hashlib.sha256(b"x").hexdigest())
    with pytest.raises(ChecksumError, match=r"has sha256 2d711642b726…, not 000000000000…"):
        hub.verify(path, "0" * 64)


def test_every_file_that_comes_from_the_hub_is_compared_with_its_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import huggingface_hub

    for name, good in ((hashlib.sha256(b"x").hexdigest(), True), ("0" * 64, False), ("0" * 40, True)):
        (tmp_path / name).write_bytes(b"x")
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, name=name, **__: str(tmp_path / name))
        if good:
            assert hub.download("me/parts", "unet/x", None) == tmp_path / name
        else:
            with pytest.raises(ChecksumError, match="delete it and fetch it again"):
                hub.download("me/parts", "unet/x", None)


def test_dead_links_and_files_to_be_fetched_by_hand_say_so():
    with pytest.raises(MissingFileError, match=r"is gone from its address: use diffusionclip-celebahq"):
        load("sdedit-celebahq")
    with pytest.raises(
        MissingFileError, match=r"is gone from its address: no copy on the Hub is known, or give the path"
    ):
        load("sdedit-church")
    with pytest.raises(MissingFileError, match=r"is not on the Hub: .*download it from https://github.com/jychoi118"):
        load("p2-ffhq")


LAYOUTS = {
    "ddpm": ("ho", "diffusers"),
    "adm": ("guided", "adm-diffusers"),
    "ddpmpp": ("score-sde",),
    "model": ("ldm", "diffusers"),
    "vae": ("diffusers",),
    "controlnet": ("diffusers",),
    "ip_adapter": ("ip-adapter",),
    "clip_vision": ("transformers",),
}


def test_the_catalogue_is_consistent():
    assert len(CATALOGUE) == len(ENTRIES)
    for entry in ENTRIES:
        assert bool(entry.repo) != bool(entry.url)
        assert entry.mirror is None or entry.mirror in CATALOGUE
        assert entry.status in ("alive", "dead", "unverified")
        assert entry.repo is None or hub.is_repo(entry.repo)
        assert entry.layout in LAYOUTS[entry.family]
        assert (entry.file == "model_index.json") == (entry.variant is not None)
        assert entry.prediction in (None, "eps", "v")


def test_the_parameters_in_the_catalogue_are_those_of_our_networks():
    from diaphane.model import controlnet, unet, vae

    known: dict[str, Any] = {
        "sdxl": unet.SDXL, "sdxl-folder": unet.SDXL, "sdxl-refiner": unet.SDXL_REFINER,
        "sdxl-inpainting": unet.SDXL_INPAINT, "sdxl-vae-fp16-fix": vae.SDXL_VAE_FP16_FIX,
        "sd15": unet.SD15, "sd15-fp16": unet.SD15, "sd21": unet.SD21, "sd21-base": unet.SD21,
    }  # fmt: skip
    sizes = {"": "SDXL_CONTROL", "-mid": "SDXL_CONTROL_MID", "-small": "SDXL_CONTROL_SMALL"}
    for kind in ("canny", "depth"):
        known |= {f"controlnet-{kind}-sdxl{size}": getattr(controlnet, name) for size, name in sizes.items()}
        known[f"controlnet-{kind}-sd15"] = controlnet.SD15_CONTROL
    assert {entry.name for entry in ENTRIES if entry.parameters} == set(known)
    kinds: dict[type, Any] = {unet.UNetConfig: unet.UNet, vae.VAEConfig: vae.VAE}
    counts: dict[Any, int] = {}
    for name, cfg in known.items():
        if cfg not in counts:
            with torch.device("meta"):
                net = kinds.get(type(cfg), controlnet.ControlNet)(cfg)
            counts[cfg] = sum(p.numel() for p in net.parameters())
        assert CATALOGUE[name].parameters == counts[cfg]


@pytest.mark.parametrize("name", ["/etc/passwd", "../x/y", "a/b/c", "a b/c", "./a", "a/", "", "ä/b"])
def test_what_is_no_repository_is_never_asked_for(name: str):
    assert not hub.is_repo(name)
