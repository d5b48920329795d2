"""Backends: the same scores from another runtime, measured for locality like torch's own."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from bagcert.data import load_dataset
from bagcert.defenses.bagcert import load
from bagcert.errors import UnsoundError, UsageError
from bagcert.io import optional
from bagcert.locality.cache import report_key
from bagcert.nets import runtimes
from bagcert.nets.runtimes import RUNNERS, Runner, fastest_backend, get_runner, installed_backends, onnx_graph
from tests import refused, tiny


@pytest.fixture(scope="module")
def images():
    return load_dataset("digits", "test", 100).array()


@pytest.fixture(scope="module")
def torch_model():
    return load("digits", device="cpu")


@pytest.fixture(params=list(RUNNERS))
def name(request):
    for library in RUNNERS[request.param].libraries:
        pytest.importorskip(library)
    return request.param


def test_the_same_answers(name, images, torch_model):
    model = load("digits", backend=name)
    assert (model.backend, model.locality.backend) == (name, name)
    assert model.locality.consequence in ("exact", "guarded")
    here, there = model.score_map(images), torch_model.score_map(images)
    moved = (here.scores.long() - there.scores.long()).abs()
    assert int(moved.max()) <= 1
    assert float((moved > 0).double().mean()) < 0.01
    mine, theirs = model.certify(images), torch_model.certify(images)
    assert torch.equal(mine.prediction, theirs.prediction)
    assert int((mine.certified != theirs.certified).sum()) <= 1
    assert 10 < int(mine.certified.sum()) < 100
    # One image alone, in another memory layout, is the same image.
    alone = model.scorer.real_scores(np.asfortranarray(images[:1]))
    assert torch.equal(model.scorer.integers(alone), here.scores[:1])


def test_as_many_threads_as_torch(name, torch_model):
    found = get_runner(name, torch_model.scorer)
    batch = torch.rand(3, 3, 8, 8)
    before, first = torch.get_num_threads(), found(batch)
    try:
        torch.set_num_threads(before + 1)
        second = found(batch)
    finally:
        torch.set_num_threads(before)
    assert [key[-1] for key in found._sessions] == [before, before + 1]
    assert torch.allclose(first, second, atol=1e-4)
    assert set(found.versions()) == set(RUNNERS[name].libraries)


def test_the_weights_are_copied(name):
    model = tiny.color_model()
    found, batch = get_runner(name, model.scorer), torch.rand(2, 3, 8, 8)
    model.scorer.net[0].weight.data.zero_()
    assert torch.equal(found(batch), batch)


def test_reports_of_backends_are_kept_apart(torch_model):
    keys = {report_key(torch_model)}
    for kind in ("one", "two"):
        model = load("digits", device="cpu", checked=False)
        model.scorer.runner = type("Fake", (Fake,), {"name": kind})(model.scorer)
        keys.add(report_key(model))
    assert len(keys) == 3


class Fake(Runner):
    """Torch, and a little of the whole image everywhere."""

    name, libraries, extra = "fake", (), "fake"
    leak = 0.5

    def start(self, image, threads):
        def scores(batch):
            z = self.net(torch.from_numpy(batch).nan_to_num())
            return (z + self.leak * torch.from_numpy(batch).nan_to_num().mean((1, 2, 3), keepdim=True)).detach().numpy()

        return scores


def test_locality_is_measured_where_it_is_computed():
    model = tiny.color_model(size=(6, 6))
    model.scorer.runner = Fake(model.scorer)
    refused(UnsoundError, "scores outside a patch's reach moved", model.check_locality)
    model.scorer.runner.leak = 0.0
    assert model.check_locality().locality.backend == "fake"


def test_graph_written_once(monkeypatch, tmp_path, torch_model):
    pytest.importorskip("onnxscript")
    net, written = runtimes.inference_copy(torch_model.scorer), []
    monkeypatch.setattr(onnx_graph, "_GRAPHS", {})
    real = onnx_graph.to_onnx
    small = real(runtimes.inference_copy(tiny.color_model().scorer), (3, 8, 8), ["z"])
    monkeypatch.setattr(onnx_graph, "to_onnx", lambda *given: written.append(given) or small)
    first = onnx_graph.graph_of(net, (3, 8, 8), tmp_path)
    assert onnx_graph.graph_of(net, (3, 8, 8), tmp_path) == first
    assert len(written) == 1
    onnx_graph._GRAPHS.clear()  # as another process
    assert onnx_graph.graph_of(net, (3, 8, 8), tmp_path) == first
    assert len(written) == 1
    (path,) = tmp_path.iterdir()
    for damaged in (path.read_bytes()[:-1], b"", path.read_bytes().replace(b"images", b"imagez")):
        path.write_bytes(damaged)
        onnx_graph._GRAPHS.clear()
        assert onnx_graph.graph_of(net, (3, 8, 8), tmp_path) == first
    assert len(written) == 4
    onnx_graph.graph_of(net, (3, 9, 8), tmp_path)
    net[0].mean += 1
    onnx_graph.graph_of(net, (3, 8, 8), tmp_path)
    assert len(written) == 6
    blocked = tmp_path / "file"
    blocked.touch()
    onnx_graph._GRAPHS.clear()
    assert onnx_graph.graph_of(net, (3, 8, 8), blocked) == first  # no place to keep it is no error


def test_layers_of_the_users_own_are_not_kept():
    class Own(torch.nn.Conv2d):
        pass

    assert onnx_graph.network_key(torch.nn.Sequential(Own(3, 3, 1))) is None
    assert onnx_graph.network_key(torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1))) is not None


def test_a_missing_library_names_its_extra(monkeypatch):
    monkeypatch.setattr(optional, "find_spec", lambda name: None if name == "onnxruntime" else object())
    with pytest.raises(UsageError, match=r'needs onnxruntime, which is .*: pip install "bagcert\[onnx\]"'):
        load("digits", backend="onnxruntime")


DROPPED_BY_ANOTHER_THREAD = """
import os, signal, sys, threading
import numpy as np
from bagcert.defenses.bagcert import load

models = [load("digits", backend=sys.argv[1], checked=False)]
models[0].score_map(np.zeros((1, 8, 8, 3), dtype=np.uint8))
thread = threading.Thread(target=models.clear)
thread.start()
thread.join()
heard = []
signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
os.kill(os.getpid(), signal.SIGUSR1)
print(len(heard))
"""


def test_signals_after_a_thread_dropped_the_model(name):
    command = [sys.executable, "-X", "faulthandler", "-c", DROPPED_BY_ANOTHER_THREAD, name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr


def test_backends_refused():
    refused(UsageError, "unknown backend 'onnxruntme'; did you mean onnxruntime", load, "digits", backend="onnxruntme")
    with pytest.raises(UsageError, match=r"^unknown backend 'openvino'; choose from torch, onnxruntime$"):
        load("digits", backend="openvino")
    scorer = tiny.color_model().scorer
    assert get_runner("torch", scorer) is None
    refused(UsageError, "runs on the CPU, got the device meta", get_runner, "onnxruntime", scorer.to("meta"))
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    refused(UsageError, "computes in float32", load, "digits", dtype="bfloat16", backend="onnxruntime")


def test_the_fastest_of_what_is_there(monkeypatch):
    assert installed_backends()[0] == "torch"
    for there, chosen in ((["torch"], "torch"), (["torch", "onnxruntime"], "onnxruntime")):
        monkeypatch.setattr(runtimes, "installed_backends", lambda there=there: there)
        assert fastest_backend("cpu") == chosen
    assert fastest_backend("cuda") == fastest_backend("cpu", "bfloat16") == "torch"
    monkeypatch.setattr(runtimes, "installed_backends", lambda: ["torch"])
    assert load("digits", checked=False, device="cpu", backend="auto").backend == "torch"
