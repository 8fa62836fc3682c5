"""Weights: from their host, which a server on this machine stands for; from torch's cache; and from files."""

from __future__ import annotations

import hashlib
import http.server
import io
import os
import pickle
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from conftest import Outcome

import main

Run = Callable[..., Outcome]
SMALL = "shufflenet_v2_x0_5"  # the quickest to load
ENTRY = torchvision.models.ResNet50_Weights.IMAGENET1K_V1.value  # where torchvision says what is to be had where
NOT_WEIGHTS = b"<html>Sign in to this network</html>"


def publish(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """Let ResNet50's default weights be at `url`, for the default run and for `--model resnet50`."""
    monkeypatch.setattr(ENTRY, "url", url)
    monkeypatch.setattr(main, "WEIGHTS_URL", url)


class Host(http.server.ThreadingHTTPServer):
    """Answers with the `files` that it has, by name."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.requested: list[str] = []
        self.broken_off = self.stalled = ""  # the file after whose first half it closes the connection, or waits
        self.closing = threading.Event()
        self.silent = socket.create_server(("127.0.0.1", 0))  # takes connections, and nobody ever answers

    def url(self, name: str, port: int | None = None) -> str:
        return f"http://127.0.0.1:{port or self.server_port}/{name}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Host

    def do_GET(self) -> None:
        name = self.path.strip("/")
        self.server.requested.append(name)
        if name not in self.server.files:
            self.send_error(404)
            return
        content = self.server.files[name]
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if name not in (self.server.broken_off, self.server.stalled):
            self.wfile.write(content)
            return
        self.wfile.write(content[: len(content) // 2])
        self.wfile.flush()
        if name == self.server.stalled:
            self.server.closing.wait()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def host() -> Iterator[Host]:
    server = Host()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.closing.set()
    server.shutdown()
    thread.join()
    server.server_close()
    server.silent.close()


@pytest.fixture
def torch_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where torch keeps what it downloads: empty at first."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch"


@pytest.fixture(scope="session")
def resnet50(weights: Callable[..., Path]) -> bytes:
    return weights("resnet50").read_bytes()


def hashed(content: bytes) -> str:
    """The name of weights carries the start of their SHA-256."""
    return f"resnet50-{hashlib.sha256(content).hexdigest()[:8]}.pth"


def files_in(folder: Path) -> list[str]:
    """But for the notes about the fastest form."""
    return [path.name for path in folder.rglob("*") if path.is_file() and path.suffix != ".json"]


def one_line(outcome: Outcome) -> str:
    """The error, all that a run with -q has said."""
    assert outcome.status == 1 and outcome.stdout == ""
    assert outcome.stderr.startswith("error: ") and outcome.stderr.count("\n") == 1
    return outcome.stderr


# ---- The host answers ------------------------------------------------------------------------------------------------


def test_good_file_is_downloaded_once_and_kept_and_needs_no_network_then(host, torch_cache, resnet50, monkeypatch):
    name = hashed(resnet50)
    host.files[name] = resnet50
    publish(monkeypatch, host.url(name))
    monkeypatch.setattr(torchvision.models.ResNet50_Weights.IMAGENET1K_V2.value, "url", host.url(name))
    model = main.load_model(weights="IMAGENET1K_V2")
    assert (model.name, model.dim, model.side) == ("resnet50", 2048, 224)
    assert host.requested == [name] and files_in(torch_cache) == [name]
    host.files.clear()
    assert main.load_model("resnet50", next(torch_cache.rglob(name))).identity == main.load_model().identity
    assert host.requested == [name]


def test_weights_that_are_there_now_are_used_and_both_caches_stay(
    host, torch_cache, resnet50, monkeypatch, collection, run
):
    collection(3)
    name = hashed(resnet50)
    publish(monkeypatch, host.url(name))
    first = run("bulk_images/1.png")
    assert first.status == 0 and "(offline, 3 images)" in first.stdout

    host.files[name] = resnet50
    second = run("bulk_images/1.png")
    assert second.status == 0 and "(resnet50, 3 images)" in second.stdout
    assert "are here now" in second.stderr and "100%" in second.stderr

    third = run("bulk_images/1.png")
    assert third.stdout == second.stdout
    assert "are here now" not in third.stderr and "no image was opened" in third.stderr
    assert sorted(path.name.partition("-")[0] for path in Path("image_index").iterdir()) == ["offline", "resnet50"]


# ---- The host does not -----------------------------------------------------------------------------------------------


NO_WEIGHTS: dict[str, Callable[[Host], str]] = {  # the address of each
    "wrong hash": lambda host: host.url("resnet50-00000000.pth"),
    "not found": lambda host: host.url("resnet50-11111111.pth"),
    "breaks off": lambda host: host.url(host.broken_off),
    "stalls": lambda host: host.url(host.stalled),
    "hangs": lambda host: host.url("resnet50-22222222.pth", host.silent.getsockname()[1]),
    "refuses": lambda host: host.url("resnet50-33333333.pth", 9),
}


@pytest.fixture(params=NO_WEIGHTS)
def no_weights(request, host, torch_cache, monkeypatch) -> Iterator[str]:
    good = hashed(NOT_WEIGHTS)
    host.files = {"resnet50-00000000.pth": NOT_WEIGHTS, good: NOT_WEIGHTS}
    host.broken_off, host.stalled = (good if request.param == kind else "" for kind in ("breaks off", "stalls"))
    url = NO_WEIGHTS[request.param](host)
    publish(monkeypatch, url)
    monkeypatch.setattr(main, "CONNECT_SECONDS", 0.2)
    timeout = socket.getdefaulttimeout()
    yield url
    assert files_in(torch_cache) == []  # nothing half downloaded
    assert socket.getdefaulttimeout() == timeout


def test_default_model_gives_way_to_the_offline_descriptor_with_a_warning(no_weights, collection, run):
    collection(3)
    outcome = run("bulk_images/1.png", "-q")
    assert outcome.status == 0
    assert "(offline, 3 images)" in outcome.stdout
    assert outcome.stderr.count("\n") == 1
    for said in (no_weights, "offline", "--weights FILE", "--model", "copies", "does not recognise"):
        assert said in outcome.stderr


@pytest.mark.parametrize(
    "options", [("--model", "resnet50"), ("--weights", "IMAGENET1K_V1")], ids=["--model", "--weights"]
)
def test_model_asked_for_by_name_is_never_replaced(no_weights, options, collection, run):
    collection(1)
    error = one_line(run("bulk_images/0.png", "-q", *options))
    assert no_weights in error and "--weights FILE" in error
    assert not Path("image_index").exists()


# ---- Files that are no weights, or another model's -------------------------------------------------------------------


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("it ran",)


pickled = partial(pickle.dumps, protocol=2)  # as torch does


def in_archive(content: Any) -> bytes:
    torch.save(content, stream := io.BytesIO())
    return stream.getvalue()


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda good: b"", id="zero bytes"),
        pytest.param(lambda good: NOT_WEIGHTS, id="web page"),
        pytest.param(cut, id="truncated"),
        pytest.param(lambda good: bytes(len(good)), id="zeros"),
        pytest.param(lambda good: pickled(Evil()), id="pickle that runs code"),
        pytest.param(lambda good: pickled({"state_dict": Evil()}), id="pickle that runs code within"),
        pytest.param(lambda good: in_archive({"state_dict": {"fc.weight": Evil()}}), id="archive that runs code"),
        pytest.param(lambda good: pickled([1, 2]), id="not a dictionary"),
        pytest.param(lambda good: pickled({"fc.weight": "text"}), id="not tensors"),
        pytest.param(lambda good: pickled({"state_dict": 5}), id="wrapped number"),
        pytest.param(lambda good: pickled({1: 2}), id="numbers for names"),
    ],
)
def test_file_that_holds_no_weights_is_refused(spoil, weights, collection, run):
    collection(1)
    Path("spoilt.pth").write_bytes(spoil(weights(SMALL).read_bytes()))
    error = one_line(run("bulk_images/0.png", "-q", "--model", SMALL, "--weights", "spoilt.pth"))
    assert "spoilt.pth" in error
    assert not Path("it ran").exists()


def without_a_layer(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in state.items() if not key.startswith("conv5")}


WIDER = {"conv1.0.weight": torch.zeros(48, 3, 3, 3)}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        pytest.param(lambda state: {}, ["conv1.0.weight"], id="empty"),
        pytest.param(lambda state: {"state_dict": {}}, ["conv1.0.weight"], id="empty in a wrapper"),
        pytest.param(without_a_layer, ["conv5.0.weight"], id="a layer missing"),
        pytest.param(lambda state: state | {"extra.weight": torch.zeros(3)}, ["extra.weight"], id="a layer more"),
        pytest.param(lambda state: state | WIDER, ["conv1.0.weight", "48, 3, 3, 3", "24, 3, 3, 3"], id="another shape"),
        pytest.param(lambda state: state | {"conv1.0.weight": "text"}, ["conv1.0.weight"], id="text for a tensor"),
    ],
)
def test_weights_that_do_not_fit_are_refused_with_what_was_expected_and_found(change, said, weights, collection, run):
    collection(1)
    torch.save(change(torch.load(weights(SMALL), weights_only=True)), "other.pth")
    error = one_line(run("bulk_images/0.png", "-q", "--model", SMALL, "--weights", "other.pth"))
    assert all(word in error for word in ["other.pth", *said]) and len(error) < 1000
    assert not Path("image_index").exists()


def test_corrupt_file_in_torchs_cache_is_named_and_not_replaced_in_silence(
    torch_cache, resnet50, monkeypatch, collection, run
):
    collection(1)
    publish(monkeypatch, "http://127.0.0.1:9/resnet50-55555555.pth")
    file = torch_cache / "hub" / "checkpoints" / "resnet50-55555555.pth"
    file.parent.mkdir(parents=True)
    file.write_bytes(cut(resnet50))
    error = one_line(run("bulk_images/0.png", "-q"))
    assert str(file) in error and "delete it" in error


def test_cache_that_cannot_be_written_counts_as_no_weights(host, torch_cache, resnet50, monkeypatch):
    host.files["resnet50.pth"] = resnet50
    publish(monkeypatch, host.url("resnet50.pth"))
    torch_cache.write_text("a file in its place")
    assert main.load_model().name == "offline"


def test_copy_of_torchvisions_file_is_used_as_by_its_name(weights, monkeypatch):
    """Both have the same weights, and so the same cache: the pixels must be the same, too."""
    name, listed = "efficientnet_b1", torchvision.models.EfficientNet_B1_Weights
    for entry in (listed.IMAGENET1K_V1, listed.IMAGENET1K_V2):  # of which only the first is bicubic
        copy = Path(shutil.copy(weights(name), Path(entry.url).name))
        monkeypatch.setattr(main, "downloaded", lambda url, name, copy=copy: copy)
        by_file, by_name = main.load_model(name, copy), main.load_model(name, entry.name)
        assert (by_file.identity, by_file.resample) == (by_name.identity, by_name.resample)
