"""Section Model: from pictures to features; and weights from their host, from torch's cache and from files."""

import dataclasses
import hashlib
import io
import itertools
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from benchmark import drawn
from conftest import MAIN, draw, one_line
from evaluate import EDITS, opened
from PIL import Image, ImageDraw
from test_queries import reply, servers

import main

SMALL = "shufflenet_v2_x0_5"  # the quickest to load
ENTRY = torchvision.models.ResNet50_Weights.IMAGENET1K_V1.value  # where torchvision says what is to be had where
TORCH = Path("torch")  # where torch keeps what it downloads: empty at first
NOT_WEIGHTS = b"<html>Sign in to this network</html>"
HALF = reply(NOT_WEIGHTS)[:-20]
site = pytest.fixture(servers)


@pytest.fixture(scope="module")
def small(weights: Any) -> main.Model:
    return main.load_model(SMALL, weights(SMALL))


@pytest.fixture(autouse=True)
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The forms of a network take the same time here, or what a test says."""
    monkeypatch.setattr(main.timeit, "repeat", lambda form, **_: [0])


@pytest.fixture
def only_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """No other form is tried."""
    monkeypatch.setattr(main, "fastest_form", lambda plain, sample, note: (plain, plain(sample).shape[1]))


@pytest.fixture(scope="module")
def offline() -> main.Model:
    return main.load_model("offline")


@pytest.fixture(params=["offline", "small"])
def model(request: pytest.FixtureRequest) -> main.Model:
    return request.getfixturevalue(request.param)


def pixels(model: main.Model) -> torch.Tensor:
    """Of two pictures."""
    return torch.stack([main.get_transform(model.side, model.resample)(draw(seed)) for seed in (1, 2)])


def recompressed(image: Image.Image, quality: int) -> Image.Image:
    image.save(stream := io.BytesIO(), "JPEG", quality=quality)
    return Image.open(stream)


def afresh(expression: str, **environment: str) -> str:
    """What a process of its own prints of main.py."""
    command = [sys.executable, "-c", f"import main; print({expression})"]
    environment = {**os.environ, "PYTHONPATH": str(MAIN.parent), **environment}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def checked(model: main.Model, batch: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    """The features of the batch are these numbers, at length 1."""
    expected = torch.nn.functional.normalize(expected).numpy()
    assert np.abs(main.extract_features_batch(batch, model) - expected).max() < tolerance


@pytest.mark.parametrize("resample", ["bilinear", "bicubic"])
@pytest.mark.parametrize("side", [1, 64, 299])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK", "I;16"])
def test_transform_makes_a_square_of_bytes(picture, mode, side, resample):
    image = Image.new(mode, (50, 30)) if mode == "I;16" else picture(1).convert(mode)
    shown = main.get_transform(side, resample)(image)
    assert shown.shape == (3, side, side) and shown.dtype == torch.uint8
    assert main.get_transform()(image).shape == (3, 224, 224)  # of ResNet50


@pytest.mark.parametrize("size", [(300, 100), (100, 300), (100, 100)], ids=["wide", "tall", "square"])
@pytest.mark.parametrize("edge", ["left", "top", "right", "bottom"])
def test_whole_picture_counts_to_its_edges(edge, size):
    """What stands at an edge alone is seen, and at this edge: nothing is cropped, nothing is turned."""
    width, height = size
    box = {"left": (0, 0, 5, height), "top": (0, 0, width, 5), "right": (width - 6, 0, width, height)}
    image = Image.new("RGB", size, "white")
    ImageDraw.Draw(image).rectangle(box.get(edge, (0, height - 6, width, height)), fill="black")
    seen = (main.get_transform(50)(image)[0] < 128).numpy()
    ends = {"left": seen[:, 0], "top": seen[0], "right": seen[:, -1], "bottom": seen[-1]}
    assert ends[edge].all() and not seen.all()
    assert not seen[5:-5, 5:-5].any()


def stripes(side: int, period: float) -> Image.Image:
    y, x = np.mgrid[:side, :side]
    light = 127 + 120 * np.sign(np.sin((0.8 * x + 0.6 * y) * 2 * np.pi / period))
    return Image.fromarray(np.repeat(light[:, :, None], 3, 2).astype(np.uint8))


@pytest.mark.parametrize(("size", "side"), [*itertools.product([504, 1000, 1800], [96, 224]), (2400, 96)])
def test_scaled_decoding_gives_the_pixels_of_full_decoding(size, side, offline):
    """Within 1 of 255 in the mean of a picture with the statistics of photographs, 1.5 of thin stripes. (A side that
    the scale does not divide is stretched by less than a third of a pixel: that is left out here.)"""
    pictures = [(drawn(1, size, size * 2 // 3 & ~7), 1.0)]
    pictures += [(stripes(size, period), 1.5) for period in (2.1, 5, 9, 17)]
    for image, bound in pictures:
        loaded = recompressed(image, 90).copy()
        scaled, whole = (main.get_transform(side)(it) for it in (recompressed(image, 90), loaded))
        assert (scaled.float() - whole.float()).abs().mean() < bound
        if side == offline.side and bound == 1:
            first, second = main.extract_features_batch(torch.stack([scaled, whole]), offline)
            assert first @ second > 0.995


def test_features_have_length_one_and_do_not_depend_on_the_rest_of_the_batch(model):
    plain = [Image.new("RGB", (40, 30), colour) for colour in ("white", "black", "grey", "red")]
    images = [*(draw(seed) for seed in range(9)), *plain, Image.new("L", (1, 1))]
    together = main.extract_features_batch(images, model)
    assert together.shape == (14, model.dim) and together.dtype == np.float32
    assert np.linalg.norm(together, axis=1) == pytest.approx(1, abs=1e-5)
    alone = np.concatenate([main.extract_features_batch([image], model) for image in images])
    assert np.abs(together - alone).max() <= (0 if model.name == "offline" else 0.0005)
    assert np.triu(together[:9] @ together[:9].T, 1).max() < 0.99999
    again = main.load_model("offline") if model.name == "offline" else model
    assert (main.extract_features_batch(images, again) == together).all()


@pytest.mark.parametrize("content", [None, b"", b"a text"], ids=["missing", "empty", "text"])
def test_path_that_is_no_image_raises_oserror(offline, content):
    if content is not None:
        Path("a.jpg").write_bytes(content)
    with pytest.raises(OSError):
        main.extract_features_batch(["a.jpg"], offline)


def test_pixels_pictures_and_paths_give_the_same_features(model, tmp_path):
    images, paths = [draw(1), draw(2)], [tmp_path / "1.png", tmp_path / "2.png"]
    for image, path in zip(images, paths):
        image.save(path)
    features = main.extract_features_batch(pixels(model), model)
    for same in (images, paths, [str(path) for path in paths]):
        assert (main.extract_features_batch(same, model) == features).all()


def test_path_of_a_heic_image_is_read_in_a_fresh_process():
    """Pillow reads HEIC only once it has been told how."""
    pytest.importorskip("pillow_heif").register_heif_opener()
    draw(1).save("a.heic")
    printed = afresh("main.extract_features_batch(['a.heic'], main.load_model('offline')).shape")
    assert printed.startswith("(1, ")


EDITED = {
    "half size": lambda image: image.resize((image.width // 2, image.height // 2)),
    "double size": lambda image: image.resize((2 * image.width, 2 * image.height)),
    "squeezed": lambda image: image.resize((300, 100)),
    "JPEG": lambda image: recompressed(image, 30),
    "grey": lambda image: image.convert("L"),
    "paler": lambda image: image.point(lambda value: value * 0.7 + 30),
    "CMYK": lambda image: image.convert("CMYK"),
}


@pytest.mark.parametrize("edit", EDITED)
def test_offline_tells_an_edited_copy_from_all_other_pictures(offline, edit):
    images = [draw(seed, (160, 120)) for seed in range(20)]
    pictures = main.extract_features_batch(images, offline)
    edited = main.extract_features_batch([EDITED[edit](image) for image in images], offline)
    assert ((edited @ pictures.T).argmax(axis=1) == np.arange(20)).all()


@pytest.fixture
def only_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor without bf16."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)


def of_one_number(name: str, **options: int) -> dict[str, torch.Tensor]:
    """Weights in the shapes of this network, in a file of a few kilobytes."""
    with torch.device("cpu" if name.startswith("regnet") else "meta"):  # RegNet computes its widths with tensors
        state = torchvision.models.get_model(name, weights=None, **options).state_dict()
    for key, value in state.items():
        state[key] = torch.full((), 0.01).to(value.dtype).expand(value.shape)
    return state


FAMILIES = {
    "alexnet": 4096, "convnext_tiny": 768, "efficientnet_b0": 1280, "maxvit_t": 512, "mobilenet_v2": 1280,
    "regnet_x_400mf": 400, "shufflenet_v2_x0_5": 1024, "swin_t": 768, "vit_b_32": 768,
}  # fmt: skip


@pytest.mark.parametrize(("name", "dim"), FAMILIES.items())
def test_only_the_classifier_is_removed(name, dim, only_plain):
    """So many numbers enter the classifier of families that the next test leaves out, or to the slow suite."""
    torch.save(of_one_number(name), "weights.pth")
    assert main.load_model(name, "weights.pth").dim == dim


def cached(name: str, entry: str) -> Path:
    """Where torch keeps these weights once they are downloaded."""
    url = torchvision.models.get_model_weights(name)[entry].url
    path = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def as_published(name: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of DenseNet are older than the names of its layers; torchvision translates them."""
    if not name.startswith("densenet"):
        return state
    old = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    return {re.sub(r"(denselayer\d+\.(?:norm|conv))", r"\1.", key): value for key, value in old.items()}


@pytest.mark.parametrize(
    ("name", "classifier", "dim"),
    [
        ("resnet18", "fc", 512), ("mobilenet_v3_small", "classifier.3", 1024), ("squeezenet1_1", "classifier.1", 512),
        ("googlenet", "fc", 1024), ("mnasnet0_5", "classifier.1", 1280), ("densenet121", "classifier", 1024),
        pytest.param("vit_b_32", "heads.head", 768, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_features_are_what_enters_the_classifier_of_torchvision(name, classifier, dim, weights, tmp_path, monkeypatch):
    """Downloaded, in the fastest form that this processor has, and from a file, in fp32."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    file = cached(name, "IMAGENET1K_V1")
    torch.save(as_published(name, torch.load(weights(name), weights_only=True)), file)
    network = torchvision.models.get_model(name, weights="IMAGENET1K_V1").eval()
    entered: list[torch.Tensor] = []
    network.get_submodule(classifier).register_forward_hook(lambda layer, inputs, output: entered.append(inputs[0]))
    fast = main.load_model(name, device="cpu")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    exact = main.load_model(name, file, device="cpu")
    batch = pixels(exact)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.inference_mode():
        network((batch / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1))
    expected = entered[0].mean((2, 3)) if entered[0].ndim == 4 else entered[0]  # global average pooled
    checked(exact, batch, expected)
    assert (main.extract_features_batch(batch, fast) * main.extract_features_batch(batch, exact)).sum(1).min() >= 0.995
    assert (fast.identity, exact.precision, exact.dim) == (exact.identity, "fp32", dim)


def test_weights_for_another_side_are_used_at_that_side(tmp_path, only_plain, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    torch.save(of_one_number("vit_b_16", image_size=384), cached("vit_b_16", "IMAGENET1K_SWAG_E2E_V1"))
    model = main.load_model("vit_b_16", "IMAGENET1K_SWAG_E2E_V1")
    assert (model.side, model.dim) == (384, 768)


AS_SAVED: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "plain": lambda state: state,
    "wrapped": lambda state: {"epoch": 90, "state_dict": state},
    "parallel": lambda state: {f"module.{key}": value for key, value in state.items()},
    "wrapped parallel": lambda state: {"state_dict": AS_SAVED["parallel"](state)},
    "no classifier": lambda state: {key: value for key, value in state.items() if not key.startswith("fc.")},
    "other classes": lambda state: state | {"fc.weight": torch.ones(7, 1024), "fc.bias": torch.ones(7)},
}


@pytest.mark.parametrize("form", AS_SAVED)
def test_same_weights_are_the_same_model_however_saved(form, small, weights):
    torch.save(AS_SAVED[form](torch.load(weights(SMALL), weights_only=True)), "other name.pt")
    assert main.load_model(SMALL, "other name.pt").identity == small.identity


def test_other_weights_even_by_one_number_are_another_model(small, weights):
    state = torch.load(weights(SMALL), weights_only=True)
    state["conv5.1.running_mean"][-1] += 1
    torch.save(state, "weights.pth")
    assert main.load_model(SMALL, "weights.pth").identity != small.identity


def test_identity_is_a_plain_file_name_with_name_and_dimension(model):
    assert model.name in ("offline", SMALL) and Path(model.identity).name == model.identity
    assert model.identity.startswith(f"{model.name}-") and model.identity.endswith(f"-{model.dim}")


def has_kernels(form: Any) -> bool:
    return any("one_kernel" in str(node.target) for node in form.keywords["network"].graph.nodes)


def test_convolutions_take_batch_norm_sum_and_relu_into_one_kernel(weights, only_fp32, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(main.timeit, "repeat", lambda form, **_: [not has_kernels(form)])
    graph = main.load_model("resnet18", weights("resnet18")).network.keywords["network"].graph
    kernels = [node for node in graph.nodes if "one_kernel" in str(node.target)]
    assert len(kernels) == 20 and sum(len(node.args) == 2 for node in kernels) == 8  # all convolutions, all sums
    assert not [node for node in graph.nodes if any(name in str(node.target) for name in ("relu", "add", "bn"))]


@pytest.mark.parametrize("with_kernels", [True, False])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_form_that_takes_least_time_here_is_taken(precision, with_kernels, weights, tmp_path, monkeypatch):
    if precision == "bf16" and not torch.cpu._is_avx512_bf16_supported():
        pytest.skip("this processor has no bf16")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    fastest = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision], with_kernels
    monkeypatch.setattr(main.timeit, "repeat", lambda it, **_: [(it.keywords["dtype"], has_kernels(it)) != fastest])
    for model in (main.load_model(SMALL, weights(SMALL), "cpu") for _ in range(2)):  # tried, and remembered
        assert (model.precision, has_kernels(model.network)) == (precision, with_kernels)


def test_bf16_is_not_taken_where_it_would_be_emulated(weights):
    """Emulated, it takes four times as long as fp32."""
    emulated = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    assert afresh(f"main.load_model({SMALL!r}, {str(weights(SMALL))!r}).precision", **emulated) == "fp32\n"


def gone(*_: Any) -> None:
    raise AttributeError("module 'torch' has no attribute of this name")


@pytest.mark.parametrize("name", ["cpu._is_avx512_bf16_supported", "ops.mkldnn._reorder_convolution_weight"])
def test_where_torch_has_lost_a_private_part_a_slower_form_is_used_and_that_is_said(name, weights, monkeypatch, caplog):
    monkeypatch.setattr(f"torch.{name}", gone)
    monkeypatch.delattr(torch.hub, "HASH_REGEX")
    with pytest.raises(ConnectionError):
        main.downloaded("http://127.0.0.1:9/network-0123abcd.pth", "network")
    model = main.load_model(SMALL, weights(SMALL), "cpu")
    assert model.precision == "fp32" and not has_kernels(model.network)
    assert caplog.text.count("has no attribute of this name): networks run in a slower form") == 1


class Branching(torch.nn.Module):
    """It looks at its pixels, and so cannot be traced."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3)) if x.mean() > 0 else x.amax((2, 3))


class Fragile(torch.nn.Module):
    """In low precision nothing is left of its features."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x + 4096).mean((2, 3)) - 4096


@pytest.mark.parametrize("network", [Branching(), Fragile()], ids=["cannot be traced", "needs fp32"])
def test_network_that_cannot_be_made_fast_stays_as_it_is(network):
    model = main.assemble_model("mine", network, (8, [0.5, 0.4, 0.3], [0.2, 0.2, 0.2], "bilinear"), "cpu")
    batch = torch.stack([torch.full((3, 8, 8), 40 * i, dtype=torch.uint8) for i in range(1, 5)])
    centre = torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)
    expected = torch.cat([network(x) for x in ((batch / 255 - centre) / 0.2).split(4)])
    checked(model, batch, expected, 1e-2)


@pytest.mark.parametrize("spoil", ["", "{}", "[1, 2]", '["0.0", "cpu", "AVX2", "fp32", "fp32", 7]'], ids=repr)
def test_fastest_form_is_remembered_and_a_note_that_does_not_hold_is_made_again(spoil, weights, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    first, batch = main.load_model(SMALL, weights(SMALL), "cpu"), torch.randint(0, 256, (3, 3, 224, 224)).byte()
    (note,) = tmp_path.rglob("*.json")
    chosen = first.network.keywords["dtype"], has_kernels(first.network)
    monkeypatch.setattr(main.timeit, "repeat", lambda it, **_: [(it.keywords["dtype"], has_kernels(it)) != chosen])
    written = note.read_text()
    tried, forward = list[torch.dtype](), main.forward
    monkeypatch.setattr(main, "forward", lambda pixels, **of: [tried.append(of["dtype"]), forward(pixels, **of)][1])
    for text in (written, spoil):
        note.write_text(text)
        again = main.load_model(SMALL, weights(SMALL), "cpu")
        assert (again.identity, again.precision, again.dim) == (first.identity, first.precision, first.dim)
        assert bool(tried) == (text != written) and note.read_text() == written
        assert (main.launch(batch, again, 3)[0] == main.launch(batch, first, 3)[0]).all()
        tried.clear()


def test_a_note_on_a_form_that_cannot_be_made_any_more_is_deleted_and_that_is_said(weights, tmp_path, monkeypatch):
    """The network is used up by then: the next run measures again."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    first = main.load_model(SMALL, weights(SMALL), "cpu")
    (note,) = tmp_path.rglob("*.json")

    def fused(*_: object) -> None:
        raise RuntimeError("no such operator")

    with monkeypatch.context() as patch, pytest.raises(main.DeepVisionError, match=r"json names .* run the command"):
        patch.setattr(main, "fused", fused)
        main.load_model(SMALL, weights(SMALL), "cpu")
    assert not note.exists()
    assert main.load_model(SMALL, weights(SMALL), "cpu").identity == first.identity and note.exists()


def test_batch_is_halved_where_memory_is_short_and_that_is_said(offline, collection, caplog):
    def narrow(pixels: torch.Tensor) -> torch.Tensor:
        if len(pixels) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return offline.network(pixels)

    collection(30)
    short, work = dataclasses.replace(offline, network=narrow), main.Work(batch_size=8)
    engines = [main.initialize_reverse_image_search(index_dir=m.precision + str(m is short), model=m, work=work)
               for m in (short, offline)]  # fmt: skip
    (ours,), (theirs,) = ([xb for _, xb in engine.store.blocks()] for engine in engines)
    assert ours.shape == (30, offline.dim) and ours == pytest.approx(theirs, abs=2e-3)
    assert re.findall(r"reduced to (\d) images", caplog.text) == ["4", "2"]  # and the next batches begin with 2


def test_memory_too_short_for_one_image_is_an_error(offline):
    def none(pixels: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(main.DeepVisionError, match="--device cpu"):
        main.extract_features_batch([draw(1)], dataclasses.replace(offline, network=none))


def test_the_offline_descriptor_does_not_look_for_a_gpu(monkeypatch):
    """That would take some of its memory."""
    monkeypatch.setattr(main, "choose_device", None)
    assert main.load_model("offline").device == main.load_model("offline", device="cpu").device == "cpu"


def test_gpu_that_cannot_be_used_is_said_with_the_reason_and_none_is_not(tmp_path, monkeypatch, caplog):
    if torch.cuda.is_available() or os.path.exists("/dev/nvidia0"):
        pytest.skip("there is a GPU")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main.choose_device("auto") == "cpu" and not caplog.text
    (tmp_path / "nvidia-smi").touch(0o755)
    assert main.choose_device("auto") == "cpu"
    assert re.search(r"there is a GPU, but torch \S+ cannot use it \(\w+", caplog.text)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_timm_model_from_a_file(name, tmp_path, only_fp32):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    network = timm.create_model(name, pretrained=False).eval()
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    model = main.load_model(f"timm:{name}", tmp_path / "weights.pth", device="cpu")
    assert (model.name, model.dim) == (f"timm:{name}", network.num_features)
    assert Path(model.identity).name == model.identity
    recipe = timm.data.resolve_model_data_config(network)
    assert model.side == recipe["input_size"][1]
    mean, std = (torch.tensor(recipe[key]).view(3, 1, 1) for key in ("mean", "std"))
    batch = pixels(model)
    with torch.inference_mode():
        pooled = network.forward_head(network.forward_features((batch / 255 - mean) / std), pre_logits=True)
    checked(model, batch, pooled)


def test_timm_model_without_a_classifier_from_a_file(tmp_path, monkeypatch):
    timm = pytest.importorskip("timm")
    network = timm.create_model("test_vit", pretrained=False, num_classes=0)
    network.pretrained_cfg = {key: value for key, value in network.pretrained_cfg.items() if key != "classifier"}
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: network)
    assert main.load_model("timm:headless", tmp_path / "weights.pth", device="cpu").dim == network.num_features


def test_layers_of_timm_are_folded_and_fused_and_give_the_same_features(trained, only_fp32, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(main.timeit, "repeat", lambda form, **_: [not has_kernels(form)])
    model, plain = main.load_model(*trained, "cpu"), list[Any]()
    network = model.network.keywords["network"]
    assert sum("one_kernel" in str(node.target) for node in network.graph.nodes) == 49  # all convolutions
    kinds = {type(network.get_submodule(node.target)) for node in network.graph.nodes if node.op == "call_module"}
    assert not kinds & {torch.nn.Conv2d, torch.nn.BatchNorm2d, torch.nn.ReLU6}
    monkeypatch.setattr(main, "fastest_form", lambda it, sample, note: (plain.append(it) or it, 1280))
    slow = main.load_model(*trained, "cpu")
    images = [draw(seed, (300, 200)) for seed in range(4)]
    same = main.extract_features_batch(images, model) * main.extract_features_batch(images, slow)
    assert same.sum(1).min() > 0.99999 and type(plain[0].keywords["network"]).__name__ == "EfficientNet"


@pytest.mark.parametrize("side", [8, 9])
def test_padding_that_depends_on_the_side_is_right_for_each_side(side):
    """Folded where the stride divides the side; else the network stays as it is."""
    layers = pytest.importorskip("timm.layers")
    torch.manual_seed(1)
    parts = layers.Conv2dSame(3, 16, 3, stride=2, bias=False), layers.BatchNormAct2d(16, act_layer=torch.nn.SiLU)
    network = torch.nn.Sequential(*parts, torch.nn.Flatten()).eval()
    model = main.assemble_model("mine", network, (side, [0.5] * 3, [0.2] * 3, "bilinear"), "cpu")
    batch = torch.randint(0, 256, (4, 3, side, side)).byte()
    with torch.inference_mode():
        expected = network((batch / 255 - 0.5) / 0.2)
    checked(model, batch, expected, 1e-2)
    assert (type(model.network.keywords["network"]) is torch.nn.Sequential) == (side == 9)


WITHIN = {"screenshot", "screen", "inset 60 %", "inset 40 %", "collage"}  # mostly other things: left to the points


def test_trained_network_finds_the_picture_that_was_edited(trained):
    """By its features alone. Measured: 0.98. Of an untrained one: 0.72."""
    model = main.load_model(*trained)
    pictures = [opened(path) for path in sorted((MAIN.parent / "bulk_images" / "samples").iterdir())]
    edited = [edit(picture) for name, edit in EDITS.items() if name not in WITHIN for picture in pictures[::7]]
    asked, known = (main.extract_features_batch(images, model) for images in (edited, pictures))
    first = (asked @ known.T).argmax(1).reshape(-1, len(pictures[::7]))
    assert (first == np.arange(0, len(pictures), 7)).mean() >= 0.95


# ---- Weights ---------------------------------------------------------------------------------------------------------


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


NO_WEIGHTS = {  # the name of the file, and what its host says; None: there is no host
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
    assert outcome.status == 0 and "(offline, 3 images)" in outcome.stdout and outcome.stderr.count("\n") == 1
    for said in (no_weights, "offline", "--weights FILE", "--model", "copies", "does not recognise"):
        assert said in outcome.stderr


@pytest.mark.parametrize("options", ["--model resnet50", "--weights IMAGENET1K_V1"])
def test_model_asked_for_by_name_is_never_replaced(no_weights, options, collection, run):
    collection(1)
    one_line(run("bulk_images/0.png", "-q", *options.split()), no_weights, "--weights FILE")
    assert not Path("image_index").exists()


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("it ran",)


pickled = partial(pickle.dumps, protocol=2)  # as torch does


def in_archive(content: Any) -> bytes:
    torch.save(content, stream := io.BytesIO())
    return stream.getvalue()


def changed(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[bytes], bytes]:
    return lambda good: in_archive(change(torch.load(io.BytesIO(good), weights_only=True)))


FIRST = "conv1.0.weight"
WIDER = {FIRST: torch.zeros(48, 3, 3, 3)}
SPOILT = {  # what becomes of good weights, and what is said then
    "zero bytes": (lambda good: b"", []),
    "web page": (lambda good: NOT_WEIGHTS, []),
    "truncated": (lambda good: good[: len(good) // 2], []),
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
    "a layer missing": (changed(lambda state: {k: state[k] for k in state if "conv5" not in k}), ["conv5.0.weight"]),
    "a layer more": (changed(lambda state: state | {"extra.weight": torch.zeros(3)}), ["extra.weight"]),
    "another shape": (changed(lambda state: state | WIDER), [FIRST, "48, 3, 3, 3", "24, 3, 3, 3"]),
    "text for a tensor": (changed(lambda state: state | {FIRST: "text"}), [FIRST]),
}


@pytest.mark.parametrize("kind", SPOILT)
def test_file_of_no_weights_or_other_ones_is_refused_with_what_was_expected_and_found(kind, weights, collection, run):
    collection(1)
    spoil, said = SPOILT[kind]
    Path("spoilt.pth").write_bytes(spoil(weights(SMALL).read_bytes()))
    outcome = run("bulk_images/0.png", "-q", "--model", SMALL, "--weights", "spoilt.pth")
    one_line(outcome, "spoilt.pth", *said)
    assert len(outcome.stderr) < 1000 and not Path("it ran").exists() and not Path("image_index").exists()


def renamed(state: dict[str, Any]) -> dict[str, Any]:
    """As another library might have called them."""
    return {f"net.{key.replace('branch', 'path')}": value for key, value in state.items()}


def with_one_name(state: dict[str, Any]) -> dict[str, Any]:
    return {FIRST if key == f"net.{FIRST}" else key: value for key, value in renamed(state).items()}


OTHER_NAMES: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], bool]] = {  # and whether they are taken
    "the same order": (renamed, True),
    "no classifier": (lambda state: dict(list(renamed(state).items())[:-2]), True),
    "another order": (lambda state: dict(reversed(renamed(state).items())), False),
    "sorted": (lambda state: dict(sorted(renamed(state).items())), False),
    "another kind": (lambda state: {re.sub("bias$", "shift", key): it for key, it in renamed(state).items()}, False),
    "another shape": (lambda state: renamed(state | WIDER), False),
    "a layer missing": (lambda state: renamed({k: state[k] for k in state if "conv5" not in k}), False),
    "two layers more": (lambda state: renamed(state) | {"more.weight": torch.zeros(3)}, False),
    "one name that fits": (with_one_name, False),
    "texts": (lambda state: dict.fromkeys(renamed(state), "text"), False),
}


@pytest.mark.parametrize("kind", OTHER_NAMES)
def test_tensors_of_other_names_are_taken_in_their_order_if_all_else_fits(kind, weights, small, caplog):
    change, taken = OTHER_NAMES[kind]
    torch.save(change(torch.load(weights(SMALL), weights_only=True)), "weights.pth")
    caplog.set_level("INFO", main.log.name)  # an earlier run may have been told to be quiet
    if taken:
        assert main.load_model(SMALL, "weights.pth").identity == small.identity
    else:
        with pytest.raises(main.DeepVisionError, match=r"conv1\.\d\.weight"):
            main.load_model(SMALL, "weights.pth")
    assert ("taken in their order" in caplog.text) == taken


def test_weights_of_torchvision_fit_the_same_network_of_timm(weights, only_plain):
    """All their names differ, and the order is right."""
    pytest.importorskip("timm")
    file = weights("mobilenet_v2")
    network = torchvision.models.mobilenet_v2(weights=None).eval()
    network.load_state_dict(torch.load(file, weights_only=True))
    model = main.load_model("timm:mobilenetv2_100", file, device="cpu")
    mean, std = (model.network.keywords[key] for key in ("mean", "std"))
    with torch.inference_mode():
        entered = network.features((pixels(model) / 255 - mean) / std).mean((2, 3))
    checked(model, pixels(model), entered)


def test_corrupt_file_in_torchs_cache_is_named_and_not_replaced_in_silence(publish, resnet50, collection, run):
    collection(1)
    publish("http://127.0.0.1:9/resnet50-55555555.pth")
    file = cached("resnet50", "IMAGENET1K_V1")
    file.write_bytes(resnet50[: len(resnet50) // 2])
    one_line(run("bulk_images/0.png", "-q"), str(file.absolute()), "delete it")


def test_cache_that_cannot_be_written_counts_as_no_weights(site, publish, resnet50):
    publish(site(reply(resnet50)) + "/resnet50.pth")
    TORCH.write_text("a file in its place")
    assert main.load_model().name == "offline"


def test_copy_of_torchvisions_file_is_used_as_by_its_name(weights, only_plain, monkeypatch):
    """Both have the same weights, and so the same cache: the pixels must be the same, too."""
    name, listed = "efficientnet_b1", torchvision.models.EfficientNet_B1_Weights
    for entry in (listed.IMAGENET1K_V1, listed.IMAGENET1K_V2):  # of which only the first is bicubic
        copy = Path(shutil.copy(weights(name), Path(entry.url).name))
        monkeypatch.setattr(main, "downloaded", lambda url, name, copy=copy: copy)
        by_file, by_name = main.load_model(name, copy), main.load_model(name, entry.name)
        assert (by_file.identity, by_file.resample) == (by_name.identity, by_name.resample)
