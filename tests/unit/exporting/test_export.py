"""Export: the graph says what the definitions say, and a file that would not is never written."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from bagcert.errors import UnsoundError, UsageError
from bagcert.exporting import writer
from bagcert.exporting.check import check_rule, made_up
from bagcert.exporting.image_range import WRONG, out_of_range
from bagcert.exporting.module import CertifiedModule
from bagcert.exporting.rules import EXACT, lowest_largest, rule_module
from bagcert.exporting.writer import export
from bagcert.grid import RegionGrid
from bagcert.locality import Probe
from bagcert.rules import RULES
from bagcert.scores import ScoreMap, slack_of
from bagcert.threat import PatchThreatModel
from tests import oracle, refused, tiny
from tests.properties import cases
from tests.unit.exporting.files import check_any_number_of_images, check_only_images_are_certified, session

RULE_NAMES = ("vote", "double-masking")
THREATS = {"vote": "2*1", "double-masking": "2+1x3"}  # two patches; two shapes
SIDE = (4, 4)


def expected(rule, scores, grid, threat, low, high):
    """(label, margin) of one map by the definitions in plain loops."""
    geometry = (grid.rows_seen, grid.cols_seen, threat.shapes, threat.allowed, grid.masks_per_axis)
    if rule == "vote":
        return oracle.vote(scores, oracle.mask_set(*geometry), low, high, threat.patches)
    return oracle.double_masking(scores, oracle.unions(oracle.mask_set(*geometry), threat.patches))


def as_images(scores):
    """Images which `tiny.color_model` turns into these scores, each from 0 to 2047."""
    return (scores / 2047).astype(np.float32)


# ---------------------------------------------------------------- the rules as tensor operations


@pytest.mark.parametrize("rule", RULE_NAMES)
def test_the_rules_are_those_of_the_definitions(rule):
    certified = complete = several = restricted = 0
    for seed in range(250):
        case = cases.build(cases.from_generator(np.random.default_rng(seed)), most_masks=25)
        low, high = case.score_map.low, case.score_map.high
        module = rule_module(rule, case.score_map.grid, case.threat, case.score_map.classes, high - low)
        levels = torch.as_tensor(case.scores - low).float().flatten(2)
        label, margin = module(levels)
        grid = case.score_map.grid
        for image, scores in enumerate(case.scores):
            truth = expected(rule, scores, grid, case.threat, low, high)
            assert (int(label[image]), int(margin[image])) == truth, (seed, image)
            certified += truth[1] >= 0
        complete += rule == "double-masking" and module.rounds.completes
        several += case.threat.patches > 1
        restricted += case.threat.allowed is not None
    assert certified > 20  # the cases try something
    assert several > 20
    assert restricted > 20
    assert rule == "vote" or complete > 5


def test_the_lowest_of_equals_wins():
    values = torch.tensor([[1.0, 3.0, 3.0], [0.0, 0.0, 0.0], [-5.0, -7.0, -5.0]])
    assert lowest_largest(values).tolist() == [1, 0, 0]


def test_what_does_not_fit_is_refused_in_a_sentence():
    grid = RegionGrid.from_axis(9, 1, -4, (32, 32))
    threat = PatchThreatModel.parse("5", (32, 32))
    with pytest.raises(UsageError, match="400 windows, 1,024 regions and 100 classes takes 156 MiB per image"):
        rule_module("double-masking", grid, threat, 100, 1)
    wide = RegionGrid.from_axis(1, 1, 0, (64, 64))
    for rule, reach in (("vote", "50,307,073"), ("double-masking", "33,538,049")):
        with pytest.raises(UsageError, match=f"can reach {reach} here"):
            rule_module(rule, wide, PatchThreatModel.parse("60", (64, 64)), 2, 4094)
    with pytest.raises(UsageError, match="unions of 2 windows, too many for a graph"):
        rule_module("double-masking", grid, PatchThreatModel.parse("2*5", (32, 32)), 2, 1)
    with pytest.raises(UsageError, match="625 windows takes 61 MiB"):
        rule_module("vote", RegionGrid.from_axis(1, 1, 0, (160, 160)), PatchThreatModel.parse("136", (160, 160)), 2, 1)


@pytest.mark.parametrize("rule", ["detection", "levine-feizi"])
def test_rules_without_a_place_in_a_graph(rule):
    with pytest.raises(UsageError, match=f"the rule {rule} cannot be exported; vote and double-masking can"):
        CertifiedModule(tiny.color_model().scorer, rule, PatchThreatModel.parse("2", (8, 8)))


# ---------------------------------------------------------------- head, guard, counting


@pytest.mark.parametrize("head", ["binary", "fixed-point"])
def test_the_head_is_the_models(head):
    scorer = tiny.color_model().scorer
    scorer.head = head
    module = CertifiedModule(scorer, "vote", PatchThreatModel.parse("2", (8, 8)))
    odd = [0.0, -0.0, 1e-45, torch.nan, torch.inf, -torch.inf, 3e38, -3e38, 0.5 / 2047, 1.5 / 2047, 2.5 / 2047]
    z = torch.cat([torch.tensor(odd), torch.linspace(-1.1, 1.1, 4999)])[None, None, None]
    assert torch.equal(module.head(z).int(), scorer.integers(z).int())


@pytest.mark.parametrize("head", ["binary", "fixed-point"])
@pytest.mark.parametrize("rule", RULE_NAMES)
def test_the_guard_counts_what_the_tolerance_allows(head, rule):
    """Never less than the package's guard for the same tolerance, nor more than that for one a little larger."""
    scorer = tiny.color_model(size=SIDE).scorer
    scorer.head, scorer.scale = head, 40.0
    tolerance, threat = 0.004, PatchThreatModel.parse("1", SIDE)
    module = CertifiedModule(scorer, rule, threat, tolerance)
    plain = CertifiedModule(scorer, rule, threat)
    random = torch.Generator().manual_seed(0)
    z = torch.rand(300, 3, *SIDE, generator=random) - 0.5
    z[:, 0] += torch.linspace(0, 1, 300)[:, None, None]
    z[::7, 0, 0, 0] = torch.nan
    z[1::7, 0, 0, 0] = torch.inf
    z[2::7, 1, 0, 0] = -torch.inf
    label, certified, margin, scores = module.decide(z)
    found = []
    for share in (1.0, 1.02):
        slack = slack_of(z, tolerance * share, scorer.integers, module.high - module.low)
        guarded = ScoreMap(scores, module.low, module.high, scorer.grid(), slack)
        found.append(RULES[rule].certify(guarded, threat))
    assert torch.equal(label, found[0].prediction)
    assert bool((margin <= found[0].margin).all())
    assert bool((margin >= found[1].margin).all())
    without = plain.decide(z)
    assert bool((margin <= without[2]).all())
    assert bool((margin < without[2]).any())
    if (rule, head) != ("vote", "fixed-point"):  # which certifies next to nothing anyway
        assert 0 < int(certified.sum()) < int(without[1].sum())


def test_a_runtime_that_does_not_count_certifies_nothing():
    module = CertifiedModule(tiny.color_model(size=SIDE).scorer, "double-masking", PatchThreatModel.parse("1", SIDE))
    images = torch.zeros(2, 3, *SIDE)
    images[:, 1] = 0.5
    label, certified, margin, *_ = module(images)
    assert (label.tolist(), certified.tolist()) == ([1, 1], [True, True])
    with torch.autocast("cpu", torch.bfloat16):
        _, certified, margin, *_ = module(images)
    assert certified.tolist() == [False, False]
    assert margin.tolist() == [-EXACT, -EXACT]


def test_a_rule_that_is_a_little_wrong_is_noticed():
    """Every mistake in turn: ties, the tie rule in the margin, one window less, a score beside its place."""
    scorer = tiny.color_model(size=SIDE).scorer
    threat = PatchThreatModel.parse("2", SIDE)
    for rule in RULE_NAMES:
        module = CertifiedModule(scorer, rule, threat)
        good = lambda z, m=module: [part.numpy() for part in m.decide(torch.from_numpy(z))]  # noqa: E731
        assert check_rule(good, module, scorer, threat) == len(made_up(module, scorer)) > 50

        def backwards(z, good=good):
            _, certified, margin, scores = good(z)
            last = 2 - np.argmax(scores.sum((2, 3))[:, ::-1], 1)
            return [last, certified, margin, scores]

        def lenient(z, good=good):
            label, _, margin, scores = good(z)
            return [label, margin + (label > 0) >= 0, margin + (label > 0), scores]

        def rounded(z, good=good):
            label, certified, margin, _ = good(z)
            return [label, certified, margin, np.trunc(z * 2047.0).clip(-2047, 2047).astype(np.int32)]

        smaller = CertifiedModule(scorer, rule, PatchThreatModel.parse("1x2", SIDE))
        other = lambda z, m=smaller: [part.numpy() for part in m.decide(torch.from_numpy(z))]  # noqa: E731
        for wrong in (backwards, lenient, rounded, other):
            with pytest.raises(UnsoundError), np.errstate(all="ignore"):
                check_rule(wrong, module, scorer, threat)


# ---------------------------------------------------------------- files


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A file per rule, and the graphs they were made from: writing one takes seconds."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    folder, graphs, real = tmp_path_factory.mktemp("export"), {}, writer.to_onnx
    found = {}
    for rule in RULE_NAMES:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(writer, "to_onnx", lambda *given, r=rule: graphs.setdefault(r, real(*given)))
            path = folder / f"{rule}.onnx"
            found[rule] = export(tiny.color_model(size=SIDE), path, patch=THREATS[rule], rule=rule)
    return folder, graphs, found


@pytest.mark.parametrize("rule", RULE_NAMES)
def test_file_answers_as_the_definitions(files, rule):
    random = np.random.default_rng(0)
    scores = random.integers(0, (2, 4, 30, 2048), (12, 3, *SIDE, 4)).transpose(4, 0, 1, 2, 3).reshape(-1, 3, *SIDE)
    leader = random.integers(0, 3, len(scores))
    lead = scores[np.arange(len(scores)), leader]
    lift = scores.max((1, 2, 3)) * (np.arange(len(scores)) % 2)
    scores[np.arange(len(scores)), leader] = np.minimum(2047, lead + lift[:, None, None])
    scores[::6, 1] = scores[::6, 2]  # two classes alike
    scores[1::6, :2] = scores[1::6, 2:]  # all of them
    scores[2::6, :2], scores[2::6, 2] = 0, 2047  # nothing could be clearer
    label, certified, margin, seen = session(files[0] / f"{rule}.onnx").run(None, {"images": as_images(scores)})
    assert np.array_equal(seen, scores)
    grid = RegionGrid(*(np.eye(4, dtype=bool) for _ in range(2)))
    threat = PatchThreatModel.parse(THREATS[rule], SIDE)
    truth = [expected(rule, one, grid, threat, -2047, 2047) for one in scores]
    assert label.tolist() == [one[0] for one in truth]
    assert margin.tolist() == [one[1] for one in truth]
    assert certified.tolist() == [one[1] >= 0 for one in truth]
    assert 5 <= certified.sum() < len(scores)


def test_any_number_of_images(files):
    images = as_images(np.random.default_rng(1).integers(0, 2048, (9, 3, *SIDE)))
    check_any_number_of_images(session(files[0] / "double-masking.onnx"), images)


def changed(graph, change):
    """A copy of a graph with some nodes changed."""
    copy = type(graph)()
    copy.CopyFrom(graph)
    change(copy.graph.node)
    return copy


def check_no_file(monkeypatch, folder, graph, rule, message, model=None):
    """An export that is given this graph is refused, and leaves nothing."""
    monkeypatch.setattr(writer, "to_onnx", lambda *given: graph)
    with pytest.raises(UnsoundError, match=message):
        export(model or tiny.color_model(size=SIDE), folder / "m.onnx", patch=THREATS[rule], rule=rule)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("rule", RULE_NAMES)
def test_a_file_certifies_no_image_that_is_none(files, rule):
    """NaN, infinities, what was not divided by 255 or was normalized before, in one pixel or in all."""
    scores = np.zeros((1, 3, *SIDE))
    scores[:, 1] = 2047
    run = session(files[0] / f"{rule}.onnx")
    image = as_images(scores)
    assert run.run(None, {"images": np.clip(image * 1.0000005, -1e-7, None)})[1].tolist() == [True]  # by rounding
    assert set(check_only_images_are_certified(run, image)) == {1}


def test_graph_without_the_check_of_its_images_refused(files, monkeypatch, tmp_path):
    def refuse_all(nodes):
        (node,) = [node for node in nodes if node.op_type == "GreaterOrEqual" and "images" in node.input]
        node.op_type = "Less"  # true of no image

    graph = changed(files[1]["vote"], refuse_all)
    check_no_file(monkeypatch, tmp_path, graph, "vote", "is not the package's")
    monkeypatch.setattr("bagcert.exporting.check.out_of_range", lambda images: images)  # as if the file took them
    check_no_file(monkeypatch, tmp_path, files[1]["vote"], "vote", "certifies an image with the value nan")


def test_images_out_of_range_not_certified():
    module = CertifiedModule(tiny.color_model(size=SIDE).scorer, "double-masking", PatchThreatModel.parse("1", SIDE))
    images = torch.zeros(1, 3, *SIDE)
    images[:, 1] = 0.5
    assert module(images)[1].tolist() == [True]
    _, certified, margin, _, _, in_range = module(out_of_range(images))
    assert len(margin) == 2 * len(WRONG)
    assert not certified.any()
    assert not in_range.any()
    assert margin.unique().tolist() == [-EXACT]


@pytest.mark.parametrize("rule", RULE_NAMES)
def test_the_file_says_what_it_is(files, rule):
    onnx = pytest.importorskip("onnx")
    path = files[0] / f"{rule}.onnx"
    model = onnx.load(str(path))
    onnx.checker.check_model(model, full_check=True)
    assert {opset.domain for opset in model.opset_import} == {""}
    assert {node.domain for node in model.graph.node} == {""}
    names = [(value.name, value.type.tensor_type.elem_type) for value in model.graph.output]
    kinds = onnx.TensorProto
    expected = [("label", kinds.INT64), ("certified", kinds.BOOL), ("margin", kinds.INT64), ("scores", kinds.INT32)]
    assert names == expected
    about = {entry.key: entry.value for entry in model.metadata_props}
    assert (about["rule"], about["patch"], about["locality"]) == (rule, THREATS[rule], "exact")
    assert json.loads(about["class_names"]) == list(tiny.COLORS)
    assert json.loads(about["image_size"]) == [4, 4]
    assert len(json.loads(about["geometry"])["rows"]) == 4
    assert {"weights_sha256", "bagcert_version", "threat", "score_range", "quantization"} <= about.keys()
    assert b"site-packages" not in path.read_bytes()
    assert b".py" not in path.read_bytes()


def test_what_was_compared(files):
    for found in files[2].values():
        assert found.check.maps > 50
        assert found.check.same_verdicts == found.check.images == writer.RANDOM_IMAGES
        assert found.check.scores_moved == 0
        assert json.loads(json.dumps(found.to_dict()))["locality"] == "exact"


@pytest.mark.parametrize(
    ("rule", "kind", "wrong"),
    [("vote", "Less", "Greater"), ("double-masking", "ReduceMin", "ReduceMax"), ("vote", "Round", "Floor")],
)
def test_graph_that_differs_refused(files, monkeypatch, tmp_path, rule, kind, wrong):
    def alter(nodes):
        [node for node in nodes if node.op_type == kind][-1].op_type = wrong

    check_no_file(monkeypatch, tmp_path, changed(files[1][rule], alter), rule, None)


def test_other_scores_than_torchs_refused(files, monkeypatch, tmp_path):
    model = tiny.color_model(size=SIDE)
    model.scorer.net[0].weight.data *= 0.9
    check_no_file(monkeypatch, tmp_path, files[1]["vote"], "vote", "other scores than torch", model)


def test_a_leak_that_a_guard_makes_good_is_in_the_graph(files, monkeypatch, tmp_path):
    real, calls = writer.to_onnx, []
    measured = writer.measure_onnx

    def once(*given):
        calls.append(given)
        return files[1]["vote"] if len(calls) == 1 else real(*given)

    leak = Probe("random, batch of 7", "leak", 1, 1, 2e-5, 1)
    monkeypatch.setattr(writer, "to_onnx", once)
    monkeypatch.setattr(writer, "measure_onnx", lambda *given: replace(measured(*given), probes=(leak,)))
    path = tmp_path / "m.onnx"
    found = export(tiny.color_model(size=SIDE), path, patch="1", rule="vote")
    assert (found.locality, found.leak_z, found.metadata["locality"]) == ("guarded", 2e-5, "measured")
    assert float(found.metadata["tolerance_z"]) == pytest.approx(8e-5)
    assert found.check.maps > 50
    # A score that could be another integer counts for the attacker, one that could not does not.
    scores = np.zeros((2, 3, *SIDE))
    scores[:, 0] = 2000
    scores[1] += 0.45
    margin = session(path).run(None, {"images": as_images(scores)})[2]
    assert margin[0] == 16 * 2000 - (2000 + 4094)
    assert margin[1] == margin[0] - 15 * 2  # two scores that may be one off in each region that no patch reaches


def test_leak_too_large_refused(files, monkeypatch, tmp_path):
    measured = writer.measure_onnx
    leak = Probe("random, batch of 7", "leak", 1, 1, 0.1, 200)
    monkeypatch.setattr(writer, "measure_onnx", lambda *given: replace(measured(*given), probes=(leak,)))
    check_no_file(monkeypatch, tmp_path, files[1]["vote"], "vote", "not local: scores outside")


def test_only_float32_on_the_cpu(tmp_path):
    model = tiny.color_model()
    model.scorer.autocast_dtype = torch.bfloat16
    refused(UsageError, "from the CPU in float32", export, model, tmp_path / "m.onnx")
