"""Networks stored as operations: what they compute, and that no stored file is trusted."""

import json
import struct
from functools import cache

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

import bagcert
from bagcert.errors import UnreadableError, UnsoundError, UsageError
from bagcert.nets.graph_network import OPERATIONS, GraphNetwork, NetworkGraph, as_graph, graph_text
from bagcert.nets.receptive_field.derive import derive_grid
from bagcert.nets.receptive_field.operations import HANDLERS
from bagcert.nets.saved_model import CONFIG, GRAPH, WEIGHTS, ModelConfig, read_model, write_model
from tests import refused

SIZE = (14, 12)


class Everything(nn.Module):
    """Shortcuts, in-place and functional calls, channels last, shuffles, slices and padding."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.same = nn.Conv2d(8, 8, 3, padding="same", groups=2)
        self.channels, self.mix = nn.LayerNorm(8), nn.Linear(8, 8)
        self.gain, self.slope = nn.Parameter(torch.rand(8, 1, 1) + 0.5), nn.PReLU()
        self.edge, self.last = nn.ReflectionPad2d(1), nn.Conv2d(8, 4, 1)
        nn.init.normal_(self.norm.running_mean)
        nn.init.uniform_(self.norm.running_var, 0.5, 2)

    def forward(self, x):
        y = F.relu(self.norm(self.first(x)), inplace=True)
        y += self.same(y) * self.gain
        z = self.mix(self.channels(y.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        batch, width, rows, cols = z.shape
        z = z.view(batch, 2, width // 2, rows, cols).transpose(1, 2).reshape(batch, width, rows, cols)
        a, b = torch.cat([z, F.gelu(y)], 1)[:, 2:14].chunk(2, 1)
        z = torch.cat([a * torch.sigmoid(b), F.silu(b)[:, :2]], 1)
        z = F.max_pool2d(self.slope(self.edge(z)), 2)
        return self.last(F.avg_pool2d(F.softplus(z.clamp(-3, 3)) - 2.0, 2, 1) / z.abs().amax((1,), True)[:, :, 1:, 1:])


NETS = {
    "everything": Everything,
    "sequential": lambda: nn.Sequential(nn.Conv2d(3, 6, 4, 2), nn.BatchNorm2d(6), nn.Hardswish(), nn.Conv2d(6, 4, 1)),
    "depthwise": lambda: nn.Sequential(
        nn.Conv2d(3, 6, 5, 3), nn.Conv2d(6, 6, 3, groups=6), nn.GELU(), nn.Conv2d(6, 4, 1)
    ),
    "dropout": lambda: nn.Sequential(nn.Conv2d(3, 6, 2, 2), nn.Dropout(0.5), nn.ELU(), nn.Conv2d(6, 4, 1)),
}


@pytest.mark.parametrize("name", NETS)
def test_operations_are_those_of_the_module(name):
    torch.manual_seed(0)
    net = NETS[name]().eval()
    stored = as_graph(net, (3, *SIZE))
    for count in (1, 2, 5):
        images = torch.randn(count, 3, *SIZE)
        assert torch.allclose(stored(images), net(images), atol=1e-5)
    mine, theirs = derive_grid(stored, SIZE), derive_grid(net, SIZE)
    assert np.array_equal(mine.rows_seen, theirs.rows_seen)
    assert np.array_equal(mine.cols_seen, theirs.cols_seen)


def test_the_module_stays_as_it_was():
    net = NETS["dropout"]().train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    stored = as_graph(net, (3, *SIZE))
    assert net.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    stored.get_parameter("tensors/0/weight").data.zero_()
    assert net[0].weight.any()


def test_operations_followed_by_the_derivation():
    own = {"batch_norm", "layer_norm", "item", "select", "size", "slice", "softmax", "unsqueeze"}  # call those that are
    assert {name for name, function in OPERATIONS.items() if function not in HANDLERS} == own


def test_texts_of_different_graphs_differ():
    texts = {repr(as_graph(nn.Sequential(nn.Conv2d(3, 4, 2), act), (3, *SIZE))) for act in (nn.ReLU(), nn.GELU())}
    assert len(texts) == 2


@pytest.mark.parametrize(
    ("net", "why"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Upsample(scale_factor=2)), "the operation 'upsample"),
        (nn.Conv2d(3, 4, 3).double(), "torch.export failed|torch.float64"),
    ],
)
def test_what_cannot_be_stored_is_refused(net, why):
    refused(UsageError, why, as_graph, net, (3, *SIZE))


def test_control_flow_on_pixels_is_refused():
    class Branches(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else super().forward(-x)

    refused(UsageError, "cannot be saved", as_graph, Branches(3, 4, 3), (3, *SIZE))


def scorer_of(net, classes=4):
    torch.manual_seed(0)
    return bagcert.RegionScorer(net, [f"class {i}" for i in range(classes)], SIZE, scale=100.0)


def config_of(scorer, **changes):
    facts = {
        "name": "own",
        "architecture": GRAPH,
        "head": "fixed-point",
        "scale": scorer.scale,
        "mean": [0.0] * 3,
        "std": [1.0] * 3,
        "class_names": list(scorer.class_names),
        "image_size": SIZE,
        "rule": "double-masking",
        "patch": "2",
    }
    return ModelConfig.model_validate(facts | changes)


@cache
def stored():
    """The export takes a second."""
    torch.manual_seed(0)
    return as_graph(NETS["sequential"](), (3, *SIZE))


def saved(folder, net=None):
    scorer = scorer_of(stored() if net is None else net)
    write_model(folder, scorer, config_of(scorer))
    return scorer


def changed(folder, change):
    """Writes the folder's weights again with another graph."""
    content = (folder / WEIGHTS).read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    graph = json.loads(json.loads(content[8 : 8 + size])["__metadata__"][GRAPH])
    graph = change(graph) or graph
    text = graph if isinstance(graph, str) else json.dumps(graph)
    (folder / WEIGHTS).write_bytes(safetensors.torch.save(safetensors.torch.load(content), {GRAPH: text}))


def test_folder_holds_the_network(tmp_path):
    scorer = saved(tmp_path)
    read, config = read_model(tmp_path)
    images = torch.rand(3, 3, *SIZE)
    assert torch.equal(read.score_map(images).scores, scorer.score_map(images).scores)
    assert config.architecture == GRAPH
    assert {path.name for path in tmp_path.iterdir()} == {WEIGHTS, CONFIG}
    for text in (b"geometry", b"receptive", b"import", b"pickle"):
        assert text not in (tmp_path / CONFIG).read_bytes() + (tmp_path / WEIGHTS).read_bytes()


def test_folder_hash_covers_operations(tmp_path):
    saved(tmp_path)
    before = bagcert.load(tmp_path, checked=False).weights_sha256

    def relu(graph):
        (step,) = (step for step in graph["steps"] if step["operation"] == "hardswish")
        step["operation"] = "relu"

    changed(tmp_path, relu)
    assert bagcert.load(tmp_path, checked=False).weights_sha256 != before


def test_folder_geometry_is_that_of_its_operations(tmp_path):
    """Whatever a folder says, the geometry is that of the operations that run."""
    saved(tmp_path, nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 1)))
    assert read_model(tmp_path)[0].grid().receptive_field == (3, 3)

    def dilate(graph):
        first = graph["steps"][0]
        first["arguments"] = [*first["arguments"][:3], [1, 1], [0, 0], [2, 2]]

    changed(tmp_path, dilate)
    scorer = read_model(tmp_path)[0]
    grid = scorer.grid()
    assert grid.receptive_field == (5, 5)
    assert grid.rows_seen[0].tolist() == [True, False] * 2 + [True] + [False] * 9
    image = torch.rand(1, 3, *SIZE)
    other = image.clone()
    other[:, :, 4] = 0
    moved = (scorer(image) != scorer(other)).any(3).any(1)[0]
    assert not (moved & ~torch.from_numpy(grid.rows_seen[:, 4])).any()


@pytest.mark.parametrize(
    ("steps", "why"),
    [
        (("mean", [{"step": 2}, [2, 3], True]), "every region sees every pixel"),
        (("softmax", [{"step": 2}, 2]), "every region sees every pixel"),
        (("reshape", [{"step": 2}, [-1, 4, 1, 120]]), "merges rows and columns"),
        (("logsumexp", [{"step": 2}, [3], True]), "every region sees every pixel"),
    ],
)
def test_folder_not_local_refused(tmp_path, steps, why):
    saved(tmp_path, nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 1)))

    def add(graph):
        graph["steps"].append({"operation": steps[0], "arguments": steps[1], "options": {}})
        graph["output"] = 3

    changed(tmp_path, add)
    refused(UnreadableError, rf"cannot be certified: .*{why}", read_model, tmp_path)


def test_folder_without_operations_refused(tmp_path):
    saved(tmp_path)
    tensors = safetensors.torch.load((tmp_path / WEIGHTS).read_bytes())
    (tmp_path / WEIGHTS).write_bytes(safetensors.torch.save(tensors))
    refused(UnreadableError, "holds no list of operations", read_model, tmp_path)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"width": 4}, "width does not belong to the architecture graph"),
        ({"depth": 4}, "depth does not belong to the architecture graph"),
        ({"class_names": ["a", "b"]}, "4 output channels where 2 are needed"),
    ],
)
def test_folder_config_refused(tmp_path, changes, why):
    saved(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | changes))
    refused(UnreadableError, why, read_model, tmp_path)


def put(path, value):
    def change(graph):
        at = graph
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = value

    return change


HOSTILE = {
    "not JSON": lambda graph: "{",
    "deep": lambda graph: "[" * 100_000,
    "a list": lambda graph: "[]",
    "code": put(["steps", 0, "operation"], "__import__"),
    "eval": put(["steps", 0, "operation"], "eval"),
    "dotted": put(["steps", 0, "operation"], "torch.load"),
    "allocates": put(["steps", 0], {"operation": "empty", "arguments": [[1 << 40]], "options": {}}),
    "views memory": put(["steps", 0], {"operation": "as_strided", "arguments": [{"step": 0}, [9], [9]], "options": {}}),
    "writes weights": put(["steps", 0, "options"], {"out": {"tensor": "0.weight"}}),
    "later step": put(["steps", 0, "arguments", 0], {"step": 3}),
    "itself": put(["steps", 0, "arguments", 0], {"step": 1}),
    "negative step": put(["steps", 1, "arguments", 0], {"step": -1}),
    "truth as a step": put(["steps", 1, "arguments", 0], {"step": True}),
    "unknown tensor": put(["steps", 0, "arguments", 1], {"tensor": "__class__"}),
    "two references": put(["steps", 0, "arguments", 1], {"tensor": "0.weight", "step": 0}),
    "other key": put(["steps", 0, "arguments", 1], {"code": "print(1)"}),
    "text for a number": put(["steps", 0, "arguments", 3], "many"),
    "nothing for an image": put(["steps", 0, "arguments", 0], None),
    "huge padding": put(["steps", 1], {"operation": "pad", "arguments": [{"step": 1}, [1 << 20] * 4], "options": {}}),
    "overflowing padding": put(
        ["steps", 1], {"operation": "pad", "arguments": [{"step": 1}, [1 << 62] * 4], "options": {}}
    ),
    "no such output": put(["output"], 99),
    "the image as output": put(["output"], 0),
    "huge tensor": put(["parameters", "0.weight"], [1 << 30, 1 << 30]),
    "negative shape": put(["parameters", "0.weight"], [-1, 3, 4, 4]),
    "one more tensor": put(["parameters", "training"], [1]),
    "other format": put(["format"], 2),
    "one more key": put(["geometry"], {"receptive_field": 1}),
    "many steps": lambda graph: graph["steps"].extend([graph["steps"][0]] * 10_000),
    "NaN": put(["steps", 0, "arguments", 3], float("nan")),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_graphs_refused(name, tmp_path):
    saved(tmp_path)
    changed(tmp_path, HOSTILE[name])
    said = refused(UnreadableError, None, read_model, tmp_path)
    assert len(said) < 1000


def test_doubling_results_are_refused_without_memory(tmp_path):
    saved(tmp_path)

    def double(graph):
        for number in range(len(graph["steps"]), len(graph["steps"]) + 40):
            arguments = [[{"step": number}, {"step": number}], 2]
            graph["steps"].append({"operation": "cat", "arguments": arguments, "options": {}})
        graph["output"] = len(graph["steps"])

    changed(tmp_path, double)
    refused(UnreadableError, "is too large", read_model, tmp_path)


def test_broken_tensors_are_refused(tmp_path):
    saved(tmp_path)
    content = (tmp_path / WEIGHTS).read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    metadata = json.loads(content[8 : 8 + size])["__metadata__"]
    for name, change, why in [
        ("net.tensors/1/running_var", lambda t: -t, "negative variance"),
        ("net.tensors/0/weight", lambda t: t * torch.nan, "not finite"),
        ("net.tensors/0/weight", lambda t: t[:1], "has shape"),
        ("net.tensors/0/weight", lambda t: t.double(), "is torch.float64"),
    ]:
        tensors = safetensors.torch.load(content)
        tensors[name] = change(tensors[name]).contiguous()
        (tmp_path / WEIGHTS).write_bytes(safetensors.torch.save(tensors, metadata))
        refused(UnreadableError, why, read_model, tmp_path)


def test_graph_not_local_refused():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AvgPool2d(4))
    graph = json.loads(graph_text(as_graph(net, (3, *SIZE)).graph))
    graph["steps"].append({"operation": "sub", "arguments": [{"step": 2}, {"step": 3}], "options": {}})
    graph["steps"].insert(2, {"operation": "amax", "arguments": [{"step": 2}, [2, 3], True], "options": {}})
    graph["output"] = 4
    stored = GraphNetwork(NetworkGraph.model_validate(graph))
    refused(UnsoundError, None, derive_grid, stored, SIZE)
