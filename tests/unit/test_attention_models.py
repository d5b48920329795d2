"""Models that pool regions by attention, everywhere outside their rules: it works, or one sentence says why not."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from bagcert.aggregation import PRODUCT_LIMIT
from bagcert.bulk.files import certify_photo
from bagcert.data.photo import read_image
from bagcert.data.preprocess import Preprocessing
from bagcert.defenses.bagcert import BagCert, load
from bagcert.defenses.clipped_bagnet import ClippedBagNet
from bagcert.defenses.failsafe import FailSafe
from bagcert.defenses.patchguard import PatchGuard
from bagcert.defenses.patchguard_pp import PatchGuardPlusPlus
from bagcert.errors import UnreadableError, UnsoundError, UsageError
from bagcert.evaluation.evaluate import evaluate
from bagcert.evaluation.gallery import make_gallery, votes
from bagcert.evaluation.journal import run_identity
from bagcert.hub.card import model_card
from bagcert.hub.info import describe
from bagcert.locality import measure, require_local
from bagcert.nets.classifier import MeanScores, in_sequence
from bagcert.nets.cost import multiply_adds
from bagcert.nets.region_scorer import RegionScorer
from bagcert.nets.runtimes import get_runner
from bagcert.nets.saved_model import CONFIG, WEIGHTS, read_config, read_model, weights_sha256, write_model
from bagcert.proofs.file import RecordFile
from bagcert.rules import RULES
from bagcert.rules.largest import covered_px, largest_certifiable_px, largest_certified_px
from bagcert.scores import ScoreMap
from bagcert.threat import PatchThreatModel
from bagcert.training.loop import train
from tests import refused, tiny

SIZES = {"values": 8, "attention_heads": 2, "hidden": 6}
IMAGES = tiny.pixels(np.arange(12) % 3, tint=60)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("BAGCERT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A trained model."""
    return train(tiny.attention_recipe(), tmp_path_factory.mktemp("runs") / "run", tiny.image_set(), device="cpu")


def written(folder, **changes):
    """A folder with fresh weights, whose config is then changed by hand."""
    torch.manual_seed(0)
    config = tiny.attention_config()
    write_model(folder, config.build(), config)
    facts = {**json.loads((folder / CONFIG).read_text()), **changes}
    (folder / CONFIG).write_text(json.dumps({name: value for name, value in facts.items() if value != "absent"}))
    return folder


def test_load_is_equal_bit_for_bit(folder):
    model = load(folder, "cpu")
    read, config = read_model(folder)
    assert config.readout == SIZES
    assert torch.equal(model.scorer.form.pooling.first, read.form.pooling.first)
    assert torch.equal(model.predict(IMAGES), BagCert(read, patch="2").predict(IMAGES))


@pytest.mark.parametrize("name", list(SIZES))
@pytest.mark.parametrize("value", ["absent", None, 0, -1, 1025, 2.5, "eight", [8]])
def test_config_odd_size_refused(tmp_path, name, value):
    refused(UnreadableError, "is not a model config", read_config, written(tmp_path, **{name: value}))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"values": 9}, "a multiple of attention_heads"),
        ({"mean": [0.0] * 6, "std": [1.0] * 6}, "cannot be used with ablated images"),
        *(
            (
                {**dict.fromkeys(SIZES, "absent"), name: SIZES[name], "head": "fixed-point"},
                "belong to the attention-pooling head, not to fixed-point",
            )
            for name in SIZES
        ),
    ],
)
def test_config_refused(tmp_path, changes, reason):
    refused(UnreadableError, reason, read_config, written(tmp_path, **changes))


def test_rule_that_needs_sums_refused(tmp_path):
    with pytest.raises(UnreadableError, match=r"cannot be deployed: the rule vote needs .*: use double-masking"):
        load(written(tmp_path, rule="vote"), "cpu")


@pytest.mark.parametrize(("name", "layer"), [("first", "hidden"), ("second", "output"), ("skip", "output")])
@pytest.mark.parametrize("value", [1e3, -1e9, 3e38])
def test_weights_that_could_round_refused(tmp_path, name, layer, value):
    config = tiny.attention_config()
    scorer = config.build()
    getattr(scorer.readout, name).weight.data[0] = value
    write_model(tmp_path, scorer, config)
    refused(UnreadableError, f"cannot be certified: the {layer} layer .* exact below 2", read_model, tmp_path)


def test_position_of_another_map_refused(tmp_path):
    refused(UnreadableError, r"'readout.position' .* has shape", read_model, written(tmp_path, image_size=[12, 12]))


def test_images_too_small_for_the_network_refused(tmp_path):
    config = tiny.attention_config(padded=False, image_size=[2, 8])
    refused(UsageError, "too small", config.build)


def test_readout_for_this_head_and_no_other():
    refused(UsageError, "needs a readout", RegionScorer, nn.Conv2d(3, 8, 1), tiny.COLORS, (8, 8), "attention-pooling")
    with pytest.raises(UsageError, match="no other head takes one"):
        RegionScorer(nn.Conv2d(3, 8, 1), tiny.COLORS, (8, 8), readout=tiny.attention_scorer().readout)


def test_images_of_another_size_refused(folder):
    with pytest.raises(UsageError, match="for maps of 4x4 regions, got 6x5; resize the images"):
        load(folder, "cpu").certify(np.zeros((1, 12, 10, 3), dtype=np.uint8))


def test_photo_certified_in_its_own_pixels(folder, tmp_path):
    """However it is stored: once upright, once turned with a note in EXIF that says so."""
    model, upright = load(folder, "cpu"), tiny.pixels(np.array([1]), (30, 21), tint=150)[0]
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    Image.fromarray(upright).save(tmp_path / "upright.png")
    Image.fromarray(np.rot90(upright)).save(tmp_path / "turned.png", exif=exif)
    found = [
        certify_photo(model, read_image(tmp_path / name), Preprocessing(model.image_size), ["1", "3"])
        for name in ("upright.png", "turned.png")
    ]
    assert [one.size_px for one in found] == [[30, 21], [21, 30]]
    assert found[0].largest_certifiable_px == found[1].largest_certifiable_px > 0
    for here, there in zip(found[0].results, found[1].results, strict=True):
        assert (here.prediction, here.certified, here.patch) == (there.prediction, there.certified, there.patch)
    assert found[0].results[0].certified


def test_evaluation_and_its_gallery(folder):
    model = load(folder, "cpu")
    rules = ("double-masking", "detection")
    found = evaluate(model, tiny.image_set(20), patches=["1", "2"], rules=rules, gallery=True)
    assert len(found.info.results) == 4
    assert {row.rule for row in found.info.results} == {"double-masking", "detection"}
    assert found.gallery is not None
    assert len(found.gallery.pictures) == 20
    with pytest.raises(UsageError, match="the rule levine-feizi needs"):
        evaluate(model, tiny.image_set(4), patches=["1"], rules=["levine-feizi"])


def test_fail_safe(folder):
    verdicts = FailSafe(load(folder, "cpu"), "1")(IMAGES)
    certified = load(folder, "cpu").certify(IMAGES, 1).certified
    assert [verdict.certified for verdict in verdicts] == certified.tolist()


def plain_scores(score_map, image, kept):
    """Class scores of the readout from the regions in `kept`, in plain integers."""
    return tiny.readout_scores(score_map.readout, score_map.scores[image].numpy(), ~kept)


def small_map() -> ScoreMap:
    return tiny.attention_model().score_map(IMAGES[:3])


def test_class_scores_are_those_of_plain_integers():
    score_map = small_map()
    everything = np.ones((8, 8), dtype=bool)
    expected = [plain_scores(score_map, image, everything) for image in range(3)]
    assert score_map.class_scores.tolist() == expected
    assert score_map.predict().tolist() == [row.index(max(row)) for row in expected]
    assert score_map.classes == 3


def test_region_scores_are_those_of_one_region_alone():
    score_map = small_map()
    for row, col in ((0, 0), (3, 5), (7, 7)):
        alone = np.zeros((8, 8), dtype=bool)
        alone[row, col] = True
        for image in range(3):
            expected = plain_scores(score_map, image, alone)
            assert score_map.region_scores[image, :, row, col].tolist() == expected


@pytest.mark.parametrize("ask", [lambda m: m.class_sums, lambda m: m.levels()], ids=["class_sums", "levels"])
def test_sums_refused(ask):
    refused(UsageError, "needs class scores that are sums over regions", ask, small_map())


def test_part_of_a_batch_and_a_turned_map_keep_the_readout():
    score_map = small_map()
    threat = PatchThreatModel.parse("2x3", (8, 8))
    turned = PatchThreatModel.parse("3x2", (8, 8))
    whole = RULES["double-masking"].certify(score_map, threat)
    part = RULES["double-masking"].certify(score_map[1:], threat)
    other = RULES["double-masking"].certify(score_map.transposed(), turned)
    assert torch.equal(part.margin, whole.margin[1:])
    assert torch.equal(other.prediction, whole.prediction)
    assert torch.equal(other.certified, whole.certified)


def test_without_slack_the_worst_case_is_the_map():
    score_map = small_map()
    assert score_map.worst_case(score_map.predict()) is score_map


def test_sums_stay_a_map_of_class_scores():
    score_map = tiny.color_model().score_map(IMAGES[:3])
    assert torch.equal(score_map.class_scores, score_map.class_sums)
    assert score_map.region_scores is score_map.scores


def test_map_with_slack_or_of_other_channels_refused():
    score_map = small_map()
    refused(UsageError, "locality is exact", replace, score_map, slack=torch.zeros_like(score_map.scores))
    with pytest.raises(UsageError, match="pools 8 channels, the map has 3"):
        ScoreMap(score_map.scores[:, :3], -PRODUCT_LIMIT, PRODUCT_LIMIT, score_map.grid, readout=score_map.readout)


def test_largest_tries_every_side():
    score_map = tiny.attention_model().score_map(tiny.pixels(np.arange(12) % 3, tint=40))
    label = RULES["double-masking"].predict(score_map, PatchThreatModel.parse(1, (8, 8)))
    expected = torch.zeros(len(score_map), dtype=torch.int64)
    for side in range(1, 9):
        found = RULES["double-masking"].certify(score_map, PatchThreatModel.parse(side, (8, 8)))
        expected[found.certified & (found.prediction == label)] = side
    assert torch.equal(largest_certifiable_px(score_map, label), expected)
    assert len(expected.unique()) > 2


def test_largest_is_what_the_masks_cover(folder):
    score_map = load(folder, "cpu").score_map(IMAGES)
    threat = PatchThreatModel.parse("2", (8, 8))
    for rule in ("double-masking", "detection"):
        certified = RULES[rule].certify(score_map, threat).certified
        expected = certified * covered_px(score_map.grid, threat)
        assert torch.equal(largest_certified_px(score_map, rule, threat=threat), expected)
    refused(UsageError, "the rule vote needs", largest_certified_px, score_map, "vote")


def test_gallery_votes_are_what_each_region_says_alone():
    score_map = tiny.attention_model().score_map(IMAGES[:1])
    found = votes(score_map, 2, 0)
    assert (found.dtype, found.shape) == (np.int16, (2, 8, 8))
    alone = np.zeros((8, 8), dtype=bool)
    alone[4, 1] = True
    scores = plain_scores(score_map, 0, alone)
    assert found[:, 4, 1].tolist() == [scores[2] // 128, scores[0] // 128]


def test_gallery_runner_up_is_that_of_the_readout():
    model = tiny.attention_model()
    records = evaluate(model, tiny.image_set(6), patches=["2"]).records
    gallery = make_gallery(model, tiny.image_set(6), records)
    score_map = model.score_map(tiny.image_set(6).array())
    for picture in gallery.pictures:
        scores = score_map.class_scores[picture.index].clone()
        scores[picture.prediction] = scores.min() - 1
        assert picture.runner_up == int(scores.argmax())


def leaking(strength, after):
    """A model that claims to see single pixels, and to which all pixels leak: before the batch, or by its size."""
    scorer = tiny.attention_scorer()
    grid, body = scorer.grid(), scorer.net

    class Leak(nn.Module):
        def forward(self, x):
            moved = x.nan_to_num().mean() if after == "leak" else float(len(x) % 2)
            return body(x) + strength * moved

    scorer.net = Leak()
    scorer._grids[(8, 8), None] = grid
    return BagCert(scorer, patch="2")


def test_locality_is_exact():
    model = tiny.attention_model().check_locality(portable=True)
    assert model.locality.consequence == model.locality.across_configurations == "exact"
    assert not model.locality.guardable


def test_locality_levels_are_those_of_its_head():
    report = measure(leaking(1.0, "leak"), "2", thorough=False)
    assert report.leak_levels > 50  # far more than the change of z


def test_locality_leak_refused():
    model = leaking(1e-5, "leak")
    report = measure(model, "2", thorough=False)
    assert replace(report, guardable=True).consequence == "guarded"
    assert report.consequence == "refused"
    for check in (lambda: require_local(report), model.check_locality):
        refused(UnsoundError, "attention pooling needs scores that do not move at all", check)


def test_locality_drift_refused_where_portable():
    model = leaking(1e-5, "drift")
    report = measure(model, "2")
    assert report.consequence == "exact"
    assert replace(report, guardable=True).across_configurations == "guarded"
    require_local(report)
    refused(UnsoundError, r"attention pooling needs .*; load it without portable", require_local, report, portable=True)
    assert model.check_locality().scorer.tolerance == 0


def test_locality_tolerance_is_never_ignored():
    model = tiny.attention_model()
    model.scorer.tolerance = 1e-9
    refused(UnsoundError, "locality is exact", model.certify, IMAGES)


REFUSED = "needs class scores that are sums over regions; this model pools regions by attention"


@pytest.mark.parametrize(
    ("deploy", "name"),
    [
        (PatchGuard, "PatchGuard"),
        (PatchGuardPlusPlus, r"PatchGuard\+\+"),
        (ClippedBagNet, "Clipped BagNet"),
        (MeanScores, "a mean of region scores"),
        (in_sequence, "a mean of region scores"),
    ],
)
def test_other_defenses_refused(deploy, name):
    refused(UsageError, f"{name} {REFUSED}", deploy, tiny.attention_scorer())


def test_records_by_a_rule_that_needs_sums_refused(tmp_path):
    path = tmp_path / "records.jsonl"
    with pytest.raises(UsageError, match=f"the rule vote {REFUSED}: use double-masking or detection"):
        RecordFile(path, tiny.attention_model(), ("vote",), (), {"dtype": "float32"})
    assert not path.exists()


def test_cost_without_building_the_network(folder):
    scorer, config = read_model(folder)
    scorer.to("meta")
    counted = multiply_adds(config.build, scorer.channels, scorer.image_size)
    assert counted == multiply_adds(lambda: scorer, scorer.channels, scorer.image_size) > 0


def test_info_and_card_name_the_readout(folder):
    found = describe(str(folder))
    assert {name: found[name] for name in SIZES} == SIZES
    assert found["parameters"] == sum(p.numel() for p in read_model(folder)[0].parameters())
    card = model_card(read_config(folder), weights_sha256(folder), None, "someone/model")
    assert "2 attention heads pool 8 values of every region, and a readout with 6 hidden units" in card
    plain = read_config(folder).model_copy(update=dict.fromkeys(SIZES))
    assert "attention" not in model_card(plain, "", None, "a/b")


def test_other_readout_is_another_evaluation():
    model, other = tiny.attention_model(), tiny.attention_model()
    assert run_identity(model, tiny.image_set(3), None) == run_identity(other, tiny.image_set(3), None)
    other.scorer.readout.second.weight.data[0, 0] += 0.5
    assert run_identity(model, tiny.image_set(3), None) != run_identity(other, tiny.image_set(3), None)


def test_onnxruntime_gives_the_same_verdicts(folder):
    model = load(folder, "cpu")
    expected = model.certify(IMAGES)
    model.scorer.runner = get_runner("onnxruntime", model.scorer)
    z = model.scorer.real_scores(IMAGES)
    assert z.shape[1] == SIZES["values"] + SIZES["attention_heads"]
    found = model.certify(IMAGES)
    assert torch.equal(found.prediction, expected.prediction)
    assert torch.equal(found.certified, expected.certified)


def test_training_changes_weights_and_validates(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["clean_accuracy"] > 0.5
    assert (folder / WEIGHTS).exists()


def test_training_from_a_model_of_other_classes(folder, tmp_path):
    names = ("crimson", "lime", "navy")
    images = replace(tiny.image_set(), class_names=names)
    torch.manual_seed(1)
    again = train(tiny.attention_recipe(train__epochs=1), tmp_path / "run", images, init=folder, device="cpu")
    assert read_config(again).class_names == list(names)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model__values": 9}, "a multiple of attention_heads"),
        ({"augment__ablation": "column"}, "cannot be used with ablated images"),
        ({"loss__name": "margin"}, "is trained with loss.name=double-masking, got margin"),
        ({"defense__rule": "vote"}, "the rule vote needs .*: use double-masking or detection"),
    ],
)
def test_training_recipe_refused(tmp_path, changes, reason):
    with pytest.raises(UsageError, match=reason):
        train(tiny.attention_recipe(**changes), tmp_path / "run", tiny.image_set(), device="cpu")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
