"""Weights: from their host, which a server on this machine stands for; from torch's cache; and from files."""

import hashlib
import io
import os
import pickle
import shutil
import socket
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from conftest import Outcome
from test_queries import Reply, reply, servers

import main

SMALL = "shufflenet_v2_x0_5"  # the quickest to load
ENTRY = torchvision.models.ResNet50_Weights.IMAGENET1K_V1.value  # where torchvision says what is to be had where
TORCH = Path("torch")  # where torch keeps what it downloads: empty at first
NOT_WEIGHTS = b"<html>Sign in to this network</html>"
HALF = reply(NOT_WEIGHTS)[:-20]


site = pytest.fixture(servers)


@pytest.fixture
def publish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """publish(url): ResNet50's default weights are there, for the default run and for `--model resnet50`."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / TORCH))

    def make(url: str) -> None:
        monkeypatch.setattr(ENTRY, "url", url)
        monkeypatch.setattr(main, "WEIGHTS_URL", url)

    return make


@pytest.fixture(scope="session")
def resnet50(weights: Callable[..., Path]) -> bytes:
    return weights("resnet50").read_bytes()


def hashed(content: bytes) -> str:
    """The name of weights carries the start of their SHA-256."""
    return f"resnet50-{hashlib.sha256(content).hexdigest()[:8]}.pth"


def downloads() -> list[str]:
    """What torch's cache holds, but for the notes about the fastest form."""
    return [path.name for path in TORCH.rglob("*") if path.is_file() and path.suffix != ".json"]


def one_line(outcome: Outcome) -> str:
    """The error, all that a run with -q has said. Nothing was written."""
    assert outcome.status == 1 and outcome.stdout == "" and not Path("image_index").exists()
    assert outcome.stderr.startswith("error: ") and outcome.stderr.count("\n") == 1
    return outcome.stderr


def test_good_file_is_downloaded_once_and_kept_and_needs_no_network_then(site, publish, resnet50, monkeypatch):
    asked, name = list[socket.socket](), hashed(resnet50)
    url = site(lambda connection: (asked.append(connection), connection.sendall(reply(resnet50)))) + f"/{name}"
    publish(url)
    monkeypatch.setattr(torchvision.models.ResNet50_Weights.IMAGENET1K_V2.value, "url", url)
    model = main.load_model(weights="IMAGENET1K_V2")
    assert (model.name, model.dim, model.side) == ("resnet50", 2048, 224) and downloads() == [name]
    assert main.load_model("resnet50", next(TORCH.rglob(name))).identity == main.load_model().identity
    assert len(asked) == 1


def test_weights_that_are_there_now_are_used_and_both_caches_stay(site, publish, resnet50, collection, run):
    collection(3)
    replies = [reply(status="404 Not Found")]
    publish(site(lambda connection: connection.sendall(replies[-1])) + f"/{hashed(resnet50)}")
    first = run("bulk_images/1.png")
    assert first.status == 0 and "(offline, 3 images)" in first.stdout

    replies.append(reply(resnet50))
    second = run("bulk_images/1.png")
    assert second.status == 0 and "(resnet50, 3 images)" in second.stdout
    assert "are here now" in second.stderr and "100%" in second.stderr

    third = run("bulk_images/1.png")
    assert third.stdout == second.stdout
    assert "are here now" not in third.stderr and "no image was opened" in third.stderr
    assert sorted(path.name.partition("-")[0] for path in Path("image_index").iterdir()) == ["offline", "resnet50"]


NO_WEIGHTS: dict[
    str, tuple[str, Reply | None]
] = {  # the name of the file, and what its host says; None: it is not there
    "wrong hash": ("resnet50-00000000.pth", reply(NOT_WEIGHTS)),
    "not found": ("resnet50-11111111.pth", reply(status="404 Not Found")),
    "breaks off": (hashed(NOT_WEIGHTS), HALF),
    "stalls": (hashed(NOT_WEIGHTS), lambda connection: (connection.sendall(HALF), connection.recv(1))),
    "hangs": ("resnet50-22222222.pth", lambda connection: connection.recv(1)),
    "refuses": ("resnet50-33333333.pth", None),
}


@pytest.fixture(params=NO_WEIGHTS)
def no_weights(request, site, publish, monkeypatch) -> Iterator[str]:
    """The address of weights that cannot be had."""
    name, answer = NO_WEIGHTS[request.param]
    publish(url := f"{site(answer) if answer else 'http://127.0.0.1:9'}/{name}")
    monkeypatch.setattr(main, "CONNECT_SECONDS", 0.2)
    timeout = socket.getdefaulttimeout()
    yield url
    assert downloads() == []  # nothing half downloaded
    assert socket.getdefaulttimeout() == timeout


def test_default_model_gives_way_to_the_offline_descriptor_with_a_warning(no_weights, collection, run):
    collection(3)
    outcome = run("bulk_images/1.png", "-q")
    assert outcome.status == 0
    assert "(offline, 3 images)" in outcome.stdout
    assert outcome.stderr.count("\n") == 1
    for said in (no_weights, "offline", "--weights FILE", "--model", "copies", "does not recognise"):
        assert said in outcome.stderr


@pytest.mark.parametrize("options", ["--model resnet50", "--weights IMAGENET1K_V1"])
def test_model_asked_for_by_name_is_never_replaced(no_weights, options, collection, run):
    collection(1)
    error = one_line(run("bulk_images/0.png", "-q", *options.split()))
    assert no_weights in error and "--weights FILE" in error


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("it ran",)


pickled = partial(pickle.dumps, protocol=2)  # as torch does


def in_archive(content: Any) -> bytes:
    torch.save(content, stream := io.BytesIO())
    return stream.getvalue()


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def changed(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[bytes], bytes]:
    return lambda good: in_archive(change(torch.load(io.BytesIO(good), weights_only=True)))


def without_a_layer(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in state.items() if not key.startswith("conv5")}


FIRST = "conv1.0.weight"
WIDER = {FIRST: torch.zeros(48, 3, 3, 3)}
SPOILT: dict[str, tuple[Callable[[bytes], bytes], list[str]]] = {  # what becomes of good weights, and what is said then
    "zero bytes": (lambda good: b"", []),
    "web page": (lambda good: NOT_WEIGHTS, []),
    "truncated": (cut, []),
    "zeros": (lambda good: bytes(len(good)), []),
    "pickle that runs code": (lambda good: pickled(Evil()), []),
    "pickle that runs code within": (lambda good: pickled({"state_dict": Evil()}), []),
    "archive that runs code": (lambda good: in_archive({"state_dict": {"fc.weight": Evil()}}), []),
    "not a dictionary": (lambda good: pickled([1, 2]), []),
    "not tensors": (lambda good: pickled({"fc.weight": "text"}), []),
    "wrapped number": (lambda good: pickled({"state_dict": 5}), []),
    "numbers for names": (lambda good: pickled({1: 2}), []),
    "empty": (lambda good: in_archive({}), [FIRST]),
    "empty in a wrapper": (lambda good: in_archive({"state_dict": {}}), [FIRST]),
    "a layer missing": (changed(without_a_layer), ["conv5.0.weight"]),
    "a layer more": (changed(lambda state: state | {"extra.weight": torch.zeros(3)}), ["extra.weight"]),
    "another shape": (changed(lambda state: state | WIDER), [FIRST, "48, 3, 3, 3", "24, 3, 3, 3"]),
    "text for a tensor": (changed(lambda state: state | {FIRST: "text"}), [FIRST]),
}


@pytest.mark.parametrize("kind", SPOILT)
def test_file_of_no_weights_or_other_ones_is_refused_with_what_was_expected_and_found(kind, weights, collection, run):
    collection(1)
    spoil, said = SPOILT[kind]
    Path("spoilt.pth").write_bytes(spoil(weights(SMALL).read_bytes()))
    error = one_line(run("bulk_images/0.png", "-q", "--model", SMALL, "--weights", "spoilt.pth"))
    assert all(word in error for word in ["spoilt.pth", *said]) and len(error) < 1000
    assert not Path("it ran").exists()


def test_corrupt_file_in_torchs_cache_is_named_and_not_replaced_in_silence(publish, resnet50, collection, run):
    collection(1)
    publish("http://127.0.0.1:9/resnet50-55555555.pth")
    file = TORCH / "hub" / "checkpoints" / "resnet50-55555555.pth"
    file.parent.mkdir(parents=True)
    file.write_bytes(cut(resnet50))
    error = one_line(run("bulk_images/0.png", "-q"))
    assert str(file.absolute()) in error and "delete it" in error


def test_cache_that_cannot_be_written_counts_as_no_weights(site, publish, resnet50):
    publish(site(reply(resnet50)) + "/resnet50.pth")
    TORCH.write_text("a file in its place")
    assert main.load_model().name == "offline"


def test_copy_of_torchvisions_file_is_used_as_by_its_name(weights, monkeypatch):
    """Both have the same weights, and so the same cache: the pixels must be the same, too."""
    name, listed = "efficientnet_b1", torchvision.models.EfficientNet_B1_Weights
    for entry in (listed.IMAGENET1K_V1, listed.IMAGENET1K_V2):  # of which only the first is bicubic
        copy = Path(shutil.copy(weights(name), Path(entry.url).name))
        monkeypatch.setattr(main, "downloaded", lambda url, name, copy=copy: copy)
        by_file, by_name = main.load_model(name, copy), main.load_model(name, entry.name)
        assert (by_file.identity, by_file.resample) == (by_name.identity, by_name.resample)
