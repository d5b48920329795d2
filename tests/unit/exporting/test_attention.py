"""Export of attention pooling: the graph and the file answer as the definitions do, at ties and for odd images too."""

import json
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from bagcert.aggregation import POOLED_LIMIT, AttentionPooling
from bagcert.errors import UnsoundError, UsageError
from bagcert.exporting import writer
from bagcert.exporting.attention import AttentionMaskingModule, EvidenceMap, attention_rule, known_quotients
from bagcert.exporting.check import check_rule, made_up
from bagcert.exporting.module import CertifiedModule
from bagcert.exporting.rules import EXACT
from bagcert.exporting.writer import export
from bagcert.grid import RegionGrid
from bagcert.nets.attention_pooling import FIRST_WEIGHT, weight_steps
from bagcert.rules import RULES
from bagcert.threat import PatchThreatModel
from tests import oracle, refused, tiny
from tests.properties.pooling import PoolingCase
from tests.unit.exporting.files import check_any_number_of_images, check_only_images_are_certified, session

pytestmark = pytest.mark.slow

SIDE = (5, 5)


def tied_model(size=SIDE, patch="2"):
    """Classes 0 and 1 always have the same score, and class 2 often has it as well."""
    model = tiny.attention_model(patch=patch, size=size)
    readout = model.scorer.readout
    for layer in (readout.second, readout.skip):
        layer.weight.data[1] = layer.weight.data[0]
    readout.skip.bias.data[:] = 0
    return model


def certified_module(model):
    return CertifiedModule(model.scorer, "double-masking", PatchThreatModel.parse(model.patch, model.image_size))


def random_images(count, size=SIDE, seed=0):
    """uint8 images of few colors, in which pixels and so region scores often agree."""
    random = np.random.default_rng(seed)
    shades = random.choice([0, 64, 128, 255], (count, *size, 3))
    plain = random.integers(0, 256, (count, 1, 1, 3)) + 0 * shades
    return np.where(random.random((count, *size, 1)) < random.random((count, 1, 1, 1)), shades, plain).astype(np.uint8)


def as_input(pixels):
    return (pixels.transpose(0, 3, 1, 2) / 255).astype(np.float32)


# ---------------------------------------------------------------- operations


def test_the_evidence_map_is_the_readouts():
    """At every step of a weight, beside it, at half-integers and for what is not a number."""
    readout = tiny.attention_scorer((1, 4000)).readout
    steps = torch.tensor(weight_steps(), dtype=torch.float32)
    near = torch.cat([steps, steps.nextafter(torch.tensor(9.0)), steps.nextafter(torch.tensor(-9.0))])
    odd = torch.tensor([0.0, -0.0, torch.nan, torch.inf, -torch.inf, 3e38, -3e38, 0.5 / 32, 1.5 / 32, -2.5 / 32, 16.0])
    content = torch.cat([near, odd, torch.linspace(-20, 20, 4000 - len(near) - len(odd))])
    z = content.repeat(1, readout.channels, 1, 1)
    readout.position.data[:] = -math.log(FIRST_WEIGHT)  # logarithms of weights are then what the network gives
    found = EvidenceMap(readout)(z)
    assert torch.equal(found, readout.integers(z).float())
    assert found[:, readout.values :].unique().tolist() == list(range(1, 256))
    for spread in (1.0, 1e7):
        readout.position.data = spread * torch.randn(readout.position.shape, generator=torch.Generator().manual_seed(0))
        assert torch.equal(EvidenceMap(readout)(z), readout.integers(z).float())


@pytest.mark.parametrize("alike", [False, True])
def test_the_rule_is_that_of_the_definitions(alike):
    rng, certified, dissent, complete, cases = np.random.default_rng(0), 0, 0, 0, 0
    while cases < 120:
        case = PoolingCase(rng)
        if len(case.masks) > 25:
            continue
        cases += 1
        if alike:  # two classes always tie
            for name in ("second", "skip", "bias"):
                case.matrices[name][-1] = case.matrices[name][0]
        parts = [torch.as_tensor(case.matrices[n]) for n in ("first", "first_bias", "second", "skip", "bias")]
        score_map = replace(case.score_map, readout=AttentionPooling(*parts, case.heads))
        module = attention_rule("double-masking", score_map.grid, case.threat, score_map.readout)
        label, margin = module(score_map.scores.flatten(2).float())
        pairs = [a | b for n, a in enumerate(case.masks) for b in case.masks[n:]]
        expected = oracle.any_double_masking_prediction(case.score, case.masks, case.masks[0].shape)
        truth = oracle.any_margin(case.score, pairs, expected)
        assert int(label) == expected
        assert int(margin) == truth if truth >= 0 else truth <= int(margin) < 0
        assert int(margin) == int(RULES["double-masking"].certify(score_map, case.threat).margin)
        certified += truth >= 0
        dissent += expected != oracle.any_masked_prediction(case.score, np.zeros(case.masks[0].shape, dtype=bool))
        complete += module.rounds.completes
    assert certified > 20
    assert dissent > 3
    assert complete > 3


def test_known_quotients_are_rounded_to_even():
    readout = tiny.attention_scorer().form.pooling
    sums, quotients = known_quotients(readout)
    values, weights = sums[:, : readout.values], sums[:, readout.values :]
    weights = weights.repeat_interleave(readout.values // readout.heads, 1)
    ties = 2 * values % weights == 0
    assert 100 < int(ties.sum()) < ties.numel()
    for total, weight, found in zip(values.flatten(), weights.flatten(), quotients.flatten(), strict=True):
        assert found == round(int(total) / int(weight))  # Python rounds halves to even, and float64 is exact enough
        assert abs(found) <= POOLED_LIMIT
    assert torch.equal(readout.pooled(sums.float()), quotients.float())


@pytest.mark.parametrize("size", [SIDE, (12, 12)])
def test_a_runtime_that_does_not_count_certifies_nothing(size):
    model = tiny.attention_model(size=size, patch="2" if size == SIDE else "9")
    module = certified_module(model)
    assert module.rule.dtype == (torch.float32 if size == SIDE else torch.float64)
    images = torch.from_numpy(as_input(tiny.pixels(np.arange(3), size, tint=200)))
    assert module(images)[1].any()
    for kind in (torch.float32, torch.bfloat16):
        if kind != module.rule.dtype:
            less = certified_module(model)
            less.large, less.ones = less.large.to(kind), less.ones.to(kind)
            assert not module_certifies(less, images)


def module_certifies(module, images):
    _, certified, margin, *_ = module(images)
    assert certified.any() or margin.unique().tolist() == [-EXACT]
    return bool(certified.any())


def test_runtime_that_divides_by_multiplying(monkeypatch):
    model = tiny.attention_model(size=SIDE)
    module = certified_module(model)
    images = torch.from_numpy(as_input(tiny.pixels(np.arange(3), SIDE, tint=200)))
    assert module_certifies(module, images)

    def pooled(self, sums):
        total = sums[..., : self.values].unflatten(-1, (self.heads, -1))
        weight = sums[..., self.values :, None].clamp(min=1)
        return (total * (1 / weight)).round().clamp(-POOLED_LIMIT, POOLED_LIMIT).flatten(-2)

    monkeypatch.setattr(AttentionPooling, "pooled", pooled)
    assert not module_certifies(module, images)


def test_made_up_scores_try_every_branch():
    for patch, size in (("1", (4, 4)), ("2", SIDE)):
        scorer, threat = tiny.attention_scorer(size), PatchThreatModel.parse(patch, size)
        module = CertifiedModule(scorer, "double-masking", threat)
        z = made_up(module, scorer)
        label, certified, _, scores = module.decide(z)
        plain = scorer.form.score_map(scores, scorer.grid()).predict()
        assert 10 < int(certified.sum()) < len(z) - 10
        assert int((label != plain).sum()) > 2
        assert len(label.unique()) == 3


def test_a_rule_that_is_a_little_wrong_is_noticed():
    scorer, threat = tied_model().scorer, PatchThreatModel.parse("2", SIDE)
    module = CertifiedModule(scorer, "double-masking", threat)
    good = lambda z: [part.numpy() for part in module.decide(torch.from_numpy(z))]  # noqa: E731
    assert check_rule(good, module, scorer, threat) == len(made_up(module, scorer)) > 50

    def last(z):
        label, *others = good(z)
        return [np.where(label == 0, 1, label), *others]  # the other of two equal classes

    def lenient(z):
        label, _, margin, scores = good(z)
        return [label, margin + (label > 0) >= 0, margin + (label > 0), scores]

    def moved(z):
        label, certified, margin, scores = good(z)
        scores = scores.copy()
        scores[-1, 0, 0, 0] += 1
        return [label, certified, margin, scores]

    smaller = CertifiedModule(scorer, "double-masking", PatchThreatModel.parse("1x2", SIDE))
    for wrong in (last, lenient, moved, lambda z: [part.numpy() for part in smaller.decide(torch.from_numpy(z))]):
        refused(UnsoundError, None, check_rule, wrong, module, scorer, threat)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("vote", "the rule vote cannot be exported for a model that pools regions by attention, since it needs class"),
        ("detection", "the rule detection cannot be exported for a model that pools regions by attention; double-"),
        ("votes", "unknown rule 'votes'"),
    ],
)
def test_rules_without_a_place_in_a_graph(rule, message):
    refused(UsageError, message, CertifiedModule, tiny.attention_scorer(), rule, PatchThreatModel.parse("2", (8, 8)))


def test_what_does_not_fit_is_refused_in_a_sentence():
    readout = tiny.attention_scorer().form.pooling
    grid, threat = RegionGrid.from_axis(3, 1, -1, (32, 32)), PatchThreatModel.parse("5", (32, 32))
    with pytest.raises(UsageError, match=r"with 676 masks, 1,024 regions, .* takes 1,788 MiB per image"):
        attention_rule("double-masking", grid, threat, readout)
    small = RegionGrid.from_axis(3, 1, -1, (9, 9))
    with pytest.raises(UsageError, match="unions of 2 windows, too many for a graph"):
        attention_rule("double-masking", small, PatchThreatModel.parse("2*1", (9, 9)), readout)


def test_a_tolerance_is_never_ignored():
    with pytest.raises(UnsoundError, match="locality is exact"):
        CertifiedModule(tiny.attention_scorer(), "double-masking", PatchThreatModel.parse("2", (8, 8)), 1e-9)


# ---------------------------------------------------------------- files


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Some models, their files, graphs, and what was found: writing one takes seconds."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    folder, real = tmp_path_factory.mktemp("export"), writer.to_onnx
    models = {
        "plain": tiny.attention_model(size=SIDE),
        "tied": tied_model(),
        "two patches": tiny.attention_model(size=(4, 4), patch="2*1"),
        "large": tiny.attention_model(size=(12, 12), patch="9"),  # more than 128 regions: float64
        "covered": tiny.attention_model(size=(4, 4), patch="2x4"),  # two masks leave nothing
    }
    found = {}
    for name, model in models.items():
        graphs = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(writer, "to_onnx", lambda *given, kept=graphs: kept.append(real(*given)) or kept[-1])
            path = folder / f"{name}.onnx"
            found[name] = (model, path, export(model, path), graphs[-1])
    return found


@pytest.mark.parametrize("name", ["plain", "tied", "two patches", "large", "covered"])
def test_the_file_answers_as_torch_does(files, name):
    model, path, found, _ = files[name]
    pixels = random_images(300, model.image_size)
    expected = model.certify(pixels)
    label, certified, margin, scores = session(path).run(None, {"images": as_input(pixels)})
    assert np.array_equal(scores, model.score_map(pixels).scores.numpy())
    assert np.array_equal(label, expected.prediction.numpy())
    assert np.array_equal(certified, expected.certified.numpy())
    assert np.array_equal(margin, expected.margin.numpy())
    assert found.check.same_verdicts == found.check.images
    assert len(np.unique(label)) > 1
    if name == "covered":
        assert not certified.any()
    else:
        assert 20 < certified.sum() < 300
    if name == "tied":
        assert 1 not in label


def test_the_file_answers_as_the_definitions_do(files):
    model, path, *_ = files["tied"]
    pixels, readout, threat = random_images(12, seed=3), model.scorer.form.pooling, PatchThreatModel.parse("2", SIDE)
    masks = oracle.mask_set(np.eye(5, dtype=bool), np.eye(5, dtype=bool), threat.shapes, threat.allowed)
    pairs = [a | b for n, a in enumerate(masks) for b in masks[n:]]
    answers = session(path).run(None, {"images": as_input(pixels)})
    for label, certified, margin, scores in zip(*answers, strict=True):
        score = partial(tiny.readout_scores, readout, scores)
        expected = oracle.any_double_masking_prediction(score, masks, SIDE)
        truth = oracle.any_margin(score, pairs, expected)
        assert (label, certified) == (expected, truth >= 0)
        assert margin == truth or (truth <= margin < 0)
    assert 0 < answers[1].sum() < 12


def test_any_number_of_images(files):
    check_any_number_of_images(session(files["plain"][1]), as_input(random_images(7, seed=1)))


def test_a_file_certifies_no_image_that_is_none(files):
    image = as_input(tiny.pixels(np.array([1]), SIDE, tint=200))
    check_only_images_are_certified(session(files["plain"][1]), image)


def test_the_file_says_what_it_is(files):
    onnx = pytest.importorskip("onnx")
    _, path, found, _ = files["plain"]
    model = onnx.load(str(path))
    onnx.checker.check_model(model, full_check=True)
    assert {opset.domain for opset in model.opset_import} == {""}
    about = {entry.key: entry.value for entry in model.metadata_props}
    assert about == found.metadata
    assert json.loads(about["readout"]) == {"classes": 3, "values": 6, "heads": 2}
    assert json.loads(about["score_range"]) == [-130305, 130305]
    assert (about["rule"], about["locality"]) == ("double-masking", "exact")


@pytest.mark.parametrize(
    ("kind", "wrong"), [("Round", "Floor"), ("Div", "Mul"), ("ReduceMin", "ReduceMax"), ("Gemm", None)]
)
def test_a_graph_that_differs_leaves_no_file(files, monkeypatch, tmp_path, kind, wrong):
    model, _, _, graph = files["plain"]
    last = [node.name for node in graph.graph.node if node.op_type == "ReduceMin"][-1]
    for number, node in enumerate(graph.graph.node):
        # Dividing by a standard deviation of 1, and the smallest of conditions that are all true, change nothing.
        if node.op_type != kind or "module.net.0.std" in node.input or node.name == last:
            continue
        broken = type(graph)()
        broken.CopyFrom(graph)
        if wrong is not None:
            broken.graph.node[number].op_type = wrong
        else:  # another readout
            (weights,) = [t for t in broken.graph.initializer if t.name == node.input[1]]
            weights.raw_data = (np.frombuffer(weights.raw_data, np.float32) * np.float32(0.5)).tobytes()
        monkeypatch.setattr(writer, "to_onnx", lambda *given, broken=broken: broken)
        refused(UnsoundError, None, export, model, tmp_path / "m.onnx")
        assert list(tmp_path.iterdir()) == []


def test_a_rule_module_holds_each_pair_once():
    inside = np.eye(4, dtype=bool)
    module = AttentionMaskingModule(inside, tiny.attention_scorer().form.pooling)
    assert len(module.first) == 4 * 5 // 2
    grid = module.pairs.view(4, 4)
    assert torch.equal(grid, grid.T)
    assert {tuple(sorted((int(module.first[k]), int(module.second[k])))) for k in grid.flatten()} == {
        (a, b) for a in range(4) for b in range(a, 4)
    }
