"""Locality: what leaks is found, what does not is left alone, and what leaks a little is guarded against."""

import json
import math
import os
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from bagcert import locality
from bagcert.certificate import Certificate
from bagcert.data.preprocess import Preprocessing
from bagcert.defenses import bagcert as defenses
from bagcert.defenses.bagcert import BagCert, load
from bagcert.errors import UnsoundError, UsageError
from bagcert.grid import RegionGrid
from bagcert.locality import LocalityReport, Probe, cached_report, measure
from bagcert.locality import cache as cache_module
from bagcert.locality.activation_bound import activation_bound
from bagcert.locality.measurement import run_probes
from bagcert.locality.probes import Change, saturated_images
from bagcert.locality.target import Backend, torch_backend
from bagcert.nets import get_architecture
from bagcert.nets.receptive_field.derive import derive_grid
from bagcert.nets.region_scorer import RegionScorer
from bagcert.rules import RULES
from bagcert.scores import ScoreMap, binarize, quantize, slack_of
from bagcert.threat import PatchThreatModel
from tests import oracle, refused, tiny

SIZE = (8, 8)


class SqueezeExcite(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(x.mean((2, 3), keepdim=True))


class Leak(nn.Module):
    """Adds `strength` times something global that hides NaN, as a comparison does."""

    def __init__(self, strength, pattern=None):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.strength, self.pattern = nn.Conv2d(3, 3, 3, padding=1), strength, pattern

    def forward(self, x):
        seen = x.nan_to_num() if self.pattern is None else x.nan_to_num() * self.pattern
        return self.body(x) + self.strength * seen.sum((1, 2, 3), keepdim=True)


def body():
    torch.manual_seed(0)
    return nn.Conv2d(3, 3, 3, padding=1)


def constant_layer(weight, bias=0.0):
    layer = nn.Conv2d(3, 3, 1)
    nn.init.constant_(layer.weight, weight)
    nn.init.constant_(layer.bias, bias)
    return layer


def scorer_of(net, **kwargs):
    return RegionScorer(net, tiny.COLORS, SIZE, scale=1000.0, **kwargs)


def backend_of(scores, grid=None, **kwargs):
    """Whatever computes scores, by default of single pixels."""
    grid = grid or RegionGrid(np.eye(8), np.eye(8))
    return Backend(scores, lambda z: quantize(z, 1000.0), grid, 3, **kwargs)


def patterned_leak():
    """Leaks a sum over the image in which neighbors have other signs."""
    random = torch.Generator().manual_seed(5)
    pattern = torch.randint(0, 2, (1, 3, *SIZE), generator=random).float() * 2 - 1
    scorer = scorer_of(Leak(1e-3, pattern))
    return scorer, derive_grid(scorer.net.body, SIZE)


def leaking_model(strength, rule="vote"):
    """A deployed model that claims the geometry of its convolution and leaks besides."""
    scorer = scorer_of(Leak(strength))
    scorer._grids[SIZE, None] = derive_grid(scorer.net.body, SIZE)
    return BagCert(scorer, rule, patch="2")


GLOBAL = {
    "GroupNorm": lambda: nn.GroupNorm(1, 3),
    "InstanceNorm": lambda: nn.InstanceNorm2d(3),
    "squeeze-excite": SqueezeExcite,
    "global pooling": lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Upsample(SIZE)),
    "batch norm of the batch": lambda: nn.BatchNorm2d(3, track_running_stats=False),
}


def test_local_net_exact():
    before = torch.get_num_threads()
    model = tiny.color_model(patch="3")
    report = measure(model)
    assert torch.get_num_threads() == before
    assert (report.consequence, report.footprint, report.leak_z, report.leak_levels) == ("exact", "equal", 0.0, 0)
    assert report.patches == ((3, 3),)
    assert report.tolerance() == 0
    assert all(probe.scores > 0 for probe in report.probes)
    names = " ".join(probe.name for probe in report.probes)
    for what in ("random", "extreme", "NaN", "adversarial", "neighbors", "batch of 7", "threads"):
        assert what in names
    document = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert document["consequence"] == "exact"


def test_declared_reach_wider_is_inside():
    scorer = scorer_of(nn.Conv2d(3, 3, 1))
    assert measure(scorer, "2", derive_grid(body(), SIZE)).footprint == "inside"


@pytest.mark.parametrize("kind", GLOBAL)
def test_layers_that_see_everything_refused(kind):
    scorer = scorer_of(nn.Sequential(body(), GLOBAL[kind]()))
    report = measure(scorer)
    assert report.consequence == "refused"
    assert "not local" in report.reason
    refused(UnsoundError, "not local", locality.require_local, report)
    for thorough in (True, False):  # with a declared geometry the layers are not asked
        report = measure(scorer, "2", derive_grid(body(), SIZE), thorough=thorough)
        assert report.consequence == "refused"
        assert report.nan_spreads
        assert report.leak_z > 1e-4 * report.largest_score
        assert report.leak_levels > 0
    assert json.dumps(report.to_dict(), allow_nan=False)


def test_batch_norm_in_train_mode_leaks():
    net = nn.Sequential(body(), nn.BatchNorm2d(3)).train()
    grid = derive_grid(net, SIZE)

    def scores(images):
        with torch.no_grad():
            return net.train()(images)

    probes, largest = run_probes(backend_of(scores, grid), ((2, 2),), None, thorough=False)
    beside = next(probe for probe in probes if probe.name.startswith("other neighbors"))
    assert beside.largest_z > 1e-4 * largest


@pytest.mark.parametrize(("strength", "consequence"), [(0.0, "exact"), (2e-7, "guarded"), (1e-2, "refused")])
def test_leak_consequence_by_size(strength, consequence):
    model = leaking_model(strength)
    for thorough in (True, False):
        report = measure(model, thorough=thorough)
        assert report.consequence == consequence
        assert (report.leak_z > 0) == (strength > 0)
    if strength:
        # A patch of 2x2 px changes the sum over the image by at most 12.
        assert report.leak_z <= 12 * strength * 1.5


def test_adversary_finds_more_than_chance():
    report = measure(patterned_leak()[0], "5", patterned_leak()[1])
    largest = {name: 0.0 for name in ("random", "extreme", "adversarial")}
    for probe in report.probes:
        name = probe.name.split(",")[0]
        if name in largest:
            largest[name] = max(largest[name], probe.largest_z)
    assert largest["adversarial"] > 1.4 * max(largest["random"], largest["extreme"])


def test_adversary_without_gradients_searches():
    scorer, grid = patterned_leak()
    backend = replace(torch_backend(scorer, grid), gradient=None)
    probes, _ = run_probes(backend, ((5, 5),), None, thorough=True)
    found = {probe.name: probe.largest_z for probe in probes}
    assert found["adversarial, batch of 16"] > found["random, batch of 64"]


def test_drift_no_leak():
    """Kernels of their own for small batches and for more threads."""
    used = [1]

    @contextmanager
    def threads(count):
        used.append(count)
        yield
        used.pop()

    def scores(images):
        return 2 * images + 1e-6 * (len(images) < 8) + 1e-5 * used[-1]

    probes, largest = run_probes(backend_of(scores, threads=threads), ((2, 2),), None, thorough=True)
    report = replace(measure(scorer_of(body()), thorough=False), probes=probes, largest_score=largest)
    assert report.leak_z == 0
    assert 1e-6 < report.drift_z < 1e-3
    assert (report.consequence, report.across_configurations) == ("exact", "guarded")
    assert report.tolerance() == 0 < report.tolerance(portable=True)
    drifted = {probe.name for probe in probes if probe.largest_z > 0}
    assert "batch of 7 instead of 64" in drifted
    assert "batch of 8 instead of 64" not in drifted
    assert any("threads" in name for name in drifted)


def test_drift_of_saturated_images_found():
    """As much as of rows of 0 or 1; noise has none of these."""

    def scores(images):
        saturated = ((images == 0) | (images == 1)).all(1, keepdim=True)
        return images + 1e-5 * saturated * (len(images) < 64)

    probes, _ = run_probes(backend_of(scores), ((2, 2),), None, thorough=True)
    found = {probe.name: probe for probe in probes if probe.kind == "drift"}
    for size in (1, 2, 7, 8, 16, 33):
        probe = found[f"batch of {size} instead of 64"]
        assert probe.largest_z == pytest.approx(1e-5, rel=0.05)
        assert probe.trials >= 28


def test_saturated_images():
    images = saturated_images((9, 14), 3, 50, torch.Generator().manual_seed(0))
    assert images.shape == (50, 3, 9, 14)
    assert ((images[::5] > 0) & (images[::5] < 1)).all()
    for number, side in enumerate((1, 2, 4, 8), 1):
        part = images[number::5]
        assert part.unique().tolist() == [0, 1]
        assert all(torch.equal(part[..., 0, 0], part[..., k, k]) for k in range(side))
        assert not torch.equal(part[..., 0, 0], part[..., side, side])


def test_guard_wider_if_portable():
    report = measure(tiny.color_model(), thorough=False)
    leak = Probe("random, batch of 1", "leak", 1, 1, 1e-6, 1)
    drift = Probe("batch of 1 instead of 64", "drift", 1, 1, 1e-5, 1)
    assert replace(report, probes=(leak, drift)).tolerance() == 4e-6
    assert replace(report, probes=(leak, drift)).tolerance(portable=True) == 8e-5
    assert replace(report, probes=(leak,)).tolerance(portable=True) == 4e-6


def test_patch_too_large_refused():
    refused(UsageError, "does not fit", measure, tiny.color_model(), "9")


class PerRegion(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3, 3)

    def forward(self, x):
        return self.linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@pytest.mark.filterwarnings("ignore")
def test_dynamic_quantization_refused(monkeypatch):
    scorer = scorer_of(PerRegion())
    scorer._grids[SIZE, None] = RegionGrid(np.eye(8), np.eye(8))
    assert measure(scorer, "2").consequence == "exact"
    scorer.net = torch.ao.quantization.quantize_dynamic(scorer.net, {nn.Linear}, dtype=torch.qint8)
    report = measure(scorer, "2", thorough=False)
    assert report.consequence == "refused"
    assert "net.linear" in report.reason
    monkeypatch.setattr("bagcert.locality.measurement.dynamic_quantization", lambda scorer: "")
    report = measure(scorer, "2", thorough=False)
    assert report.consequence == "refused"
    assert report.leak_z > 1e-4 * report.largest_score


@pytest.mark.parametrize("name", ["resnet-rf5", "resnet-rf6s2", "bagnet9", "pyramid-rf5s3", "pyramid-rf8s4"])
def test_bound_holds(name):
    torch.manual_seed(0)
    net = get_architecture(name).build(3, 8, 4, True)
    for part in net.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.weight)
            nn.init.normal_(part.bias)
            part.running_mean.normal_()
            part.running_var.uniform_(0.1, 2)
    scorer = RegionScorer(net, tiny.COLORS, (40, 40), mean=(0.2, 0.5, 0.9), std=(0.5, 0.1, 0.3)).eval()
    bound, seen = activation_bound(scorer), []
    for part in net.modules():
        part.register_forward_hook(lambda part, given, out: seen.append(float(out.abs().max())))
    for images in (torch.rand(4, 3, 40, 40), torch.randint(0, 2, (4, 3, 40, 40)).float()):
        scorer.real_scores(images)
    assert 0 < max(seen) <= bound < math.inf


def test_bound_attained():
    layer = constant_layer(2.0, 1.0)
    assert activation_bound(scorer_of(nn.Sequential(layer))) == 7.0


def test_bound_covers_the_normalized_image():
    layer = constant_layer(1e-9)
    scorer = scorer_of(nn.Sequential(layer), mean=(0.0, -1e4, 0.5), std=(1.0, 1e-4, 1.0))
    assert activation_bound(scorer) >= float(scorer.normalize(torch.ones(1, 3, *SIZE)).abs().max()) > 9e7


def test_bound_ignores_signs():
    def bound(sign):
        layer = nn.Conv2d(3, 3, 1, bias=False)
        nn.init.constant_(layer.weight, sign * 2.0)
        net = nn.Sequential(layer, nn.BatchNorm2d(3)).eval()
        for tensor in (net[1].weight.data, net[1].bias.data, net[1].running_mean):
            tensor.fill_(sign * 3.0)
        scorer = scorer_of(net, mean=(sign * 0.7,) * 3)
        scorer.normalize.std.fill_(sign * 0.25)  # from a folder that nobody checked
        return activation_bound(scorer)

    # |x - mean| / std <= 6.8, three times 2 of it 40.8, and (40.8 + 3) * 3 + 3.
    assert bound(-1) == pytest.approx(134.4, rel=1e-4)
    assert bound(1) == pytest.approx(62.4, rel=1e-4)  # likewise from |x - mean| / std <= 2.8


def test_bound_of_weights_infinite_in_bfloat16():
    first, second = constant_layer(1e-12), constant_layer(3.4e38)
    assert second.weight.bfloat16().isinf().all()
    assert activation_bound(scorer_of(nn.Sequential(first, second))) > 1e38


def test_scores_nan_before_and_after_have_moved():
    change = Change()
    backend = torch_backend(scorer_of(body()))
    z = torch.zeros(1, 3, *SIZE)
    change.compare(backend, z, z.clone())
    assert change.largest_z == 0
    z[0, 0, 0, 0] = torch.nan
    change.compare(backend, z, z.clone())
    assert change.largest_z == math.inf


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.float16])
def test_scores_of_other_types_measured(dtype):
    """An exported file returns integers."""
    backend = Backend(lambda x: (100 * x).to(dtype), torch.Tensor.long, RegionGrid(np.eye(8), np.eye(8)), 3)
    probes, largest = run_probes(backend, ((2, 2),), None, thorough=False)
    assert {probe.largest_z for probe in probes if probe.kind == "leak"} == {0.0}
    assert 90 < largest <= 100


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_scores_not_finite_refused(value):
    """Whatever computes them; a cell that no patch reaches is enough."""

    def scores(images):
        z = images.clone()
        z[:, 0, 0, 0] = value
        return z

    probes, largest = run_probes(backend_of(scores), ((2, 2),), None, thorough=False)
    report = replace(measure(scorer_of(body()), thorough=False), probes=probes, largest_score=largest)
    assert report.consequence == report.across_configurations == "refused"
    assert "NaN or infinite" in report.reason
    assert json.dumps(report.to_dict(), allow_nan=False)


def test_bound_infinite():
    net = nn.Sequential(body(), nn.BatchNorm2d(3)).eval()
    net[1].running_var.fill_(-1.0)  # which has no root
    assert activation_bound(scorer_of(net)) == math.inf
    assert activation_bound(scorer_of(nn.Sequential(body(), nn.Softmax(1)))) == math.inf  # an unknown layer


@pytest.mark.parametrize(("bound", "consequence"), [(None, "refused"), (1e31, "refused"), (1e9, "exact")])
def test_bound_helps_where_nan_spreads(bound, consequence):
    report = replace(measure(tiny.color_model(), thorough=False), footprint="larger", activation_bound=bound)
    assert report.consequence == consequence
    probes = (*report.probes, Probe("NaN, batch of 1", "NaN", 1, 1, math.inf, 5))
    report = replace(report, footprint="unmeasured", probes=probes)
    assert report.consequence == consequence
    assert json.dumps(report.to_dict(), allow_nan=False)


def test_bound_missing_for_a_geometry_too_small():
    scorer = scorer_of(nn.Sequential(body()))
    report = measure(scorer, "2", derive_grid(nn.Conv2d(3, 3, 1), SIZE))
    assert (report.footprint, report.activation_bound, report.consequence) == ("larger", None, "refused")


@pytest.mark.parametrize("head", [binarize, lambda z: quantize(z, 13.7)])
def test_slack_bounds_every_move(head):
    random = torch.Generator().manual_seed(0)
    z = torch.randn(50, 3, 4, 4, generator=random) * 10 ** torch.randint(-6, 4, (50, 1, 1, 1), generator=random)
    for tolerance in (1e-7, 1e-3, 0.3, 100.0):
        slack = slack_of(z, tolerance, head, 4094).long()
        for direction in (-1, 1):
            for share in (0.3, 0.999999):
                moved = (z.double() + direction * share * tolerance).float()
                assert bool(((head(moved).long() - head(z).long()).abs() <= slack).all())
        assert bool((slack <= 4094).all())


def test_slack_only_near_a_boundary():
    z = torch.tensor([[[[0.0, 0.05, 0.3, -0.05, -0.3]]]])
    assert slack_of(z, 0.1, binarize, 1).flatten().tolist() == [1, 1, 0, 1, 0]
    z = torch.tensor([[[[0.149, 0.12, 5.0, float("inf"), float("nan")]]]])
    assert slack_of(z, 0.002, lambda z: quantize(z, 10.0), 4094).flatten().tolist() == [1, 0, 0, 4094, 4094]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3, 4)])
def test_guarded_certificate_survives_moves_within_slack(rule, low, high):
    random = np.random.default_rng(1)
    grid = RegionGrid.from_axis(2, 1, 0, (5, 5))
    threat = PatchThreatModel.parse("1", (5, 5))
    masks = oracle.mask_set(grid.rows_seen, grid.cols_seen, threat.shapes)
    answers = {
        "double-masking": lambda scores: oracle.double_masking_prediction(scores, masks),
        "robust-masking": lambda scores: oracle.robust_masking_prediction(scores, masks),
    }
    answer = answers.get(rule, oracle.plain_prediction)
    scores = random.integers(low, high + 1, (12, 3, 4, 4))
    scores[random.random(scores.shape) < 0.6] = low
    scores[np.arange(12), random.integers(0, 3, 12)] = np.where(random.random((12, 4, 4)) < 0.93, high, low)
    slack = (random.random(scores.shape) < 0.15).astype(int) * random.integers(1, 3, scores.shape)
    maps = ScoreMap(torch.as_tensor(scores), low, high, grid, torch.as_tensor(slack))
    guarded = RULES[rule].certify(maps, threat)
    plain = RULES[rule].certify(replace(maps, slack=None), threat)
    assert (guarded.locality, plain.locality) == ("measured", "exact")
    assert torch.equal(guarded.prediction, plain.prediction)
    assert bool((guarded.margin <= plain.margin).all())
    assert torch.equal(guarded.certified, guarded.margin >= 0)
    assert bool(plain.certified.any())
    assert bool((guarded.margin < plain.margin).any())
    for image in guarded.certified.nonzero()[:, 0].tolist():
        label = int(guarded.prediction[image])
        for reach in masks:
            for rival in range(3):
                for sign in (None, 1):
                    moved = scores[image].copy()
                    step = np.sign(random.integers(-1, 2, moved.shape)) if sign is None else np.ones_like(moved)
                    if sign == 1:
                        step[label] = -1
                    moved = np.clip(moved + step * slack[image], low, high)
                    moved[:, reach] = low
                    moved[rival, reach] = high
                    alarmed = rule == "detection" and oracle.alert(moved, masks)
                    assert answer(moved) == label or alarmed


def test_vote_margin_lowered_by_slack():
    grid = RegionGrid.from_axis(1, 1, 0, (3, 3))
    scores = torch.full((1, 2, 3, 3), 0)
    scores[0, 1] = 5
    slack = torch.ones_like(scores)
    threat = PatchThreatModel.parse("1", (3, 3))
    plain = RULES["vote"].certify(ScoreMap(scores, -10, 10, grid), threat)
    guarded = RULES["vote"].certify(ScoreMap(scores, -10, 10, grid, slack), threat)
    assert int(plain.margin) == 8 * 5 - 20 - 1
    assert int(guarded.margin) == 8 * (5 - 2) - 20 - 1
    wide = ScoreMap(scores, 0, 5, grid, slack * 100)  # nothing leaves the range
    assert int(RULES["vote"].certify(wide, threat).margin) < 0
    assert RULES["vote"].certify(wide, threat).prediction.tolist() == [1]


def test_slack_follows_scores():
    grid = RegionGrid.from_axis(1, 1, 0, (2, 3))
    slack = torch.arange(12).reshape(2, 1, 2, 3).repeat(1, 2, 1, 1)
    maps = ScoreMap(torch.zeros(2, 2, 2, 3, dtype=torch.int64), 0, 1, grid, slack)
    assert torch.equal(maps[1:].slack, slack[1:])
    assert torch.equal(maps.transposed().slack, slack.transpose(2, 3))
    assert maps.worst_case(torch.zeros(2, dtype=torch.int64)).slack is None
    refused(UsageError, "slack must be at least 0, found -11", ScoreMap, maps.scores, 0, 1, grid, -slack)


def test_slack_of_photos():
    model, pixels = tiny.color_model(), tiny.pixels(np.array([0, 1]))
    model.scorer.tolerance = 1e-3
    for orientation in (1, 6):
        geometry = Preprocessing(SIZE).geometry((16, 24), orientation)
        found = geometry.score_map(model.score_map(pixels))
        assert found.slack is not None
        assert found.slack.shape == found.scores.shape
        assert RULES["vote"].certify(found, PatchThreatModel.parse("1", (16, 24))).locality == "measured"


def test_leaking_model_guarded():
    model, images = leaking_model(2e-7), tiny.pixels(np.arange(6) % 3)
    before = model.certify(images, "1")
    assert before.locality == "unchecked"
    assert model.check_locality() is model
    assert 0 < model.scorer.tolerance == model.locality.tolerance()
    after: Certificate = model.certify(images, "1")
    assert after.locality == "measured"
    assert bool((after.margin <= before.margin).all())
    assert torch.equal(after.prediction, before.prediction)


def test_leaking_model_refused():
    refused(UnsoundError, r"Leak is not local on cpu in float32: .*moved by", leaking_model(1e-2).check_locality)


def test_load_checks_locality(monkeypatch):
    fine = load("digits", device="cpu")
    assert fine.locality.consequence == "exact"
    assert fine.scorer.tolerance == 0
    leak = Probe("random, batch of 1", "leak", 1, 1, 1e-6 * fine.locality.largest_score, 1)
    drift = Probe("batch of 1 instead of 64", "drift", 1, 1, 1e-5 * fine.locality.largest_score, 1)
    report = replace(fine.locality, probes=(leak, drift))
    monkeypatch.setattr(defenses, "cached_report", lambda model, thorough=False: report)
    assert load("digits", device="cpu").scorer.tolerance == 4 * leak.largest_z
    assert load("digits", device="cpu", portable=True).scorer.tolerance == 8 * drift.largest_z
    assert load("digits", device="cpu", checked=False).scorer.tolerance == 0
    report = replace(report, probes=(replace(leak, largest_z=math.inf),))
    refused(UnsoundError, "digits is not local", load, "digits", device="cpu")
    report = replace(report, probes=(replace(drift, largest_z=1e3),))
    load("digits", device="cpu")
    refused(UnsoundError, "from one batch size", load, "digits", device="cpu", portable=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shipped_models_deployable(dtype):
    for name in defenses.shipped_models():
        assert load(name, device="cpu", dtype=dtype).locality.consequence in ("exact", "guarded")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("BAGCERT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def measured(monkeypatch):
    """How often something was measured."""
    count = []

    def counted(*args, **kwargs):
        count.append(kwargs)
        return measure(*args, **kwargs)

    monkeypatch.setattr(cache_module, "measure", counted)
    return count


def test_cache_measures_once(folder, measured):
    model = tiny.color_model()
    first = cached_report(model)
    assert cached_report(tiny.color_model()) == first
    assert len(measured) == 1
    assert len(list(folder.rglob("*.json"))) == 1


def test_cache_of_a_thorough_report(folder, measured):
    cached_report(tiny.color_model())
    assert cached_report(tiny.color_model(), thorough=True).thorough
    assert cached_report(tiny.color_model()).thorough
    assert len(measured) == 2


def test_cache_keeps_infinities(folder, measured):
    model = tiny.color_model()
    probe = Probe("NaN, batch of 1", "NaN", 1, 1, math.inf, 3)
    report = replace(measure(model), probes=(probe,), activation_bound=5.0)
    cache_module.keep(model, report)
    assert cached_report(model) == report
    assert not measured


def test_cache_key(monkeypatch):
    keys = {cache_module.report_key(tiny.color_model())}

    def another():
        before = len(keys)
        keys.add(cache_module.report_key(model))
        assert len(keys) == before + 1

    model = tiny.color_model()
    with torch.no_grad():
        model.scorer.net[0].weight[0, 0, 0, 0] = 1.0000001
    another()
    model = tiny.color_model(patch="3")
    another()
    model = tiny.color_model()
    model.scorer.autocast_dtype = torch.bfloat16
    another()
    model = tiny.color_model()
    model.scorer.net[0].padding = (1, 1)
    model.scorer._grids.clear()
    another()
    model = tiny.color_model()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    another()
    monkeypatch.setattr(cache_module.metadata, "version", lambda name: "9.9")
    another()


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: b"",
        lambda text: text[: len(text) // 2],
        lambda text: b"\xff\xfe" + text,
        lambda text: text.replace(b"0.0", b"0.5", 1),
        lambda text: b"0" * 64 + text[64:],
        lambda text: b"[" * 100_000,
        lambda text: text + b" " * 2**19,
        lambda text: signed(b'{"key": 3}'),
        lambda text: signed(b"[]"),
        lambda text: signed(text.split(b"\n")[1].replace(b'"key": "', b'"key": "0')),
        lambda text: signed(text.split(b"\n")[1].replace(b'"leak"', b'"none"')),
        lambda text: signed(text.split(b"\n")[1].replace(b'"largest_z": 0.0', b'"largest_z": -1.0')),
        lambda text: signed(text.split(b"\n")[1].replace(b'"largest_z": 0.0', b'"largest_z": NaN')),
        lambda text: signed(text.split(b"\n")[1].replace(b'"largest_z": 0.0', b'"largest_z": Infinity')),
    ],
)
def test_cache_entry_damaged(folder, measured, damage):
    expected = cached_report(tiny.color_model())
    (path,) = folder.rglob("*.json")
    path.write_bytes(damage(path.read_bytes()))
    assert cached_report(tiny.color_model()) == expected
    assert len(measured) == 2
    assert cached_report(tiny.color_model()) == expected  # and put right
    assert len(measured) == 2


@pytest.mark.parametrize("obstacle", ["file", "folder", "null"])
def test_cache_unusable(folder, measured, obstacle, monkeypatch):
    if obstacle == "file":
        folder.write_text("in the way")
    elif obstacle == "folder":
        (folder / "locality" / f"{cache_module.report_key(tiny.color_model())}.json").mkdir(parents=True)
    else:
        monkeypatch.setenv("BAGCERT_CACHE", "/dev/null/nowhere")
    for _ in range(2):
        assert cached_report(tiny.color_model()).consequence == "exact"
    assert len(measured) == 2


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_cache_entry_that_is_a_pipe(folder, measured):
    path = folder / "locality" / f"{cache_module.report_key(tiny.color_model())}.json"
    path.parent.mkdir(parents=True)
    os.mkfifo(path)
    assert cached_report(tiny.color_model()).consequence == "exact"


def test_cache_keeps_no_refusals(folder, measured):
    for _ in range(2):
        assert cached_report(leaking_model(1e-2)).consequence == "refused"
    assert len(measured) == 2
    assert not list(folder.rglob("*.json"))


def test_cache_keeps_no_unknown_layers(folder, measured):
    for strength in (0.0, 2e-7):
        assert (cached_report(leaking_model(strength)).leak_z > 0) == (strength > 0)
    assert len(measured) == 2
    assert not list(folder.rglob("*.json"))


def test_cache_folder(monkeypatch, tmp_path):
    for name in ("BAGCERT_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cache_module.sys, "platform", "linux")
    monkeypatch.setattr(cache_module.Path, "home", lambda: tmp_path)
    assert cache_module.cache_folder() == tmp_path / ".cache" / "bagcert"
    monkeypatch.setattr(cache_module.sys, "platform", "darwin")
    assert cache_module.cache_folder() == tmp_path / "Library" / "Caches" / "bagcert"
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert cache_module.cache_folder() == tmp_path / "local" / "bagcert"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_module.cache_folder() == tmp_path / "xdg" / "bagcert"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("BAGCERT_CACHE", str(tmp_path / "own"))
    assert cache_module.cache_folder() == tmp_path / "own"

    def homeless():
        raise RuntimeError("no home")

    for name in ("BAGCERT_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cache_module.Path, "home", homeless)
    assert cache_module.cache_folder() is None
    assert isinstance(cached_report(tiny.color_model()), LocalityReport)


def signed(body):
    return cache_module._digest(body).encode() + b"\n" + body + b"\n"
