"""The deployed defense: loading, and predictions that are those of the certificates."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import bagcert
from bagcert.defenses.bagcert import BagCert, load, model_folder, shipped_models
from bagcert.defenses.patchguard import PatchGuard
from bagcert.errors import UnreadableError, UsageError
from bagcert.nets.region_scorer import RegionScorer
from bagcert.nets.saved_model import CONFIG, WEIGHTS, ModelConfig, weights_sha256, write_model
from bagcert.rules import RULES
from bagcert.threat import PatchThreatModel
from tests import refused

SIZE = (12, 10)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with scores that differ from class to class."""
    torch.manual_seed(0)
    config = ModelConfig(
        name="tiny",
        architecture="resnet-rf5",
        width=8,
        depth=2,
        head="fixed-point",
        scale=400.0,
        mean=[0.5, 0.5, 0.5],
        std=[0.3, 0.3, 0.3],
        class_names=["cat", "dog", "frog"],
        image_size=SIZE,
        rule="double-masking",
        patch="2",
    )
    scorer = config.build()
    torch.nn.init.zeros_(scorer.net[-1].bias)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    write_model(folder, scorer, config)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return load(folder, device="cpu")


@pytest.fixture(scope="module")
def images():
    """Smooth and noisy ones, so that some are certified and some are not."""
    random = np.random.default_rng(0)
    tints = random.random((12, 3, 1, 1)).astype(np.float32)
    noise = random.random((12, 3, *SIZE)).astype(np.float32)
    strength = np.linspace(0, 1, 12, dtype=np.float32).reshape(12, 1, 1, 1)
    return np.clip(tints * (1 - strength) + noise * strength, 0, 1)


def test_load_a_folder(folder, images):
    for name in (folder, str(folder)):
        model = load(name, device="cpu")
        assert (model.name, model.rule, model.patch) == ("tiny", "double-masking", "2")
        assert model.class_names == ("cat", "dog", "frog")
        assert model.image_size == SIZE
        assert model.weights_sha256 == weights_sha256(folder)
        assert not any(module.training for module in model.scorer.modules())
        assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in model.scorer.modules())
        assert len(model.predict(images)) == len(images)


def test_load_of_the_package():
    assert bagcert.load is load


def test_load_bfloat16(folder, images):
    score_map = load(folder, device="cpu", dtype="bfloat16").score_map(images)
    assert score_map.scores.dtype == torch.int16


@pytest.mark.parametrize("dtype", ["float16", "int8", "", torch.float16, torch.int8, "torch.bfloat16x"])
def test_load_other_dtypes_refused(folder, dtype):
    refused(UsageError, "a dtype must be one of float32, bfloat16", load, folder, device="cpu", dtype=dtype)


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta", ""])
def test_load_other_devices_refused(folder, device):
    refused(UsageError, "device", load, folder, device=device)


@pytest.mark.parametrize("name", ["defualt", "Default"])
def test_load_unknown_name_answered_with_the_nearest(name):
    refused(UsageError, rf"unknown model '{name}'.* did you mean default\?", load, name)


@pytest.mark.parametrize(
    "name", ["zzzzz", "a/b/c", "./nowhere", "/nowhere/at/all", "~/nowhere", "", "x" * 5000, "a\0b"]
)
def test_load_unknown_refused(name):
    refused(UsageError, "unknown model", load, name)


def test_load_what_holds_no_model_refused(folder, tmp_path):
    refused(UsageError, f"is a file; give the model folder with {WEIGHTS} and {CONFIG}", load, folder / WEIGHTS)
    refused(UnreadableError, f"has no readable {CONFIG}", load, tmp_path, device="cpu")


def test_load_hub_out_of_reach(monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # read once, at import
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UnreadableError, match="'nobody/nothing' is not a local folder, and it cannot be downloaded"
    ) as caught:
        load("nobody/nothing")
    assert len(str(caught.value).splitlines()) == 1
    assert caught.value.__suppress_context__


@pytest.mark.parametrize("error", [OSError(), ValueError("first line\nsecond"), RuntimeError("from a library")])
def test_load_hub_errors(monkeypatch, error):
    import huggingface_hub

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    refused(UnreadableError, None, load, "nobody/nothing")


def test_load_from_the_hub(monkeypatch, folder):
    import huggingface_hub

    asked = {}

    def download(name, allow_patterns):
        asked.update(name=name, allow_patterns=allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert load("somebody/tiny", device="cpu").name == "tiny"
    assert asked == {"name": "somebody/tiny", "allow_patterns": [WEIGHTS, CONFIG]}


def test_load_shipped_models():
    for name, path in shipped_models().items():
        assert model_folder(name) == path
        assert ModelConfig.model_validate_json((path / CONFIG).read_text()).name == name


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("patch", [None, 1, 3, "2x3"])
def test_predictions_are_those_of_the_certificate(model, images, rule, patch):
    certificate = model.certify(images, patch, rule=rule)
    assert torch.equal(model.predict(images, patch, rule=rule), certificate.prediction)
    assert certificate.rule == rule
    assert certificate.certified.tolist() == (certificate.margin >= 0).tolist()


def test_defaults(model, images):
    default, spelled_out = model.certify(images), model.certify(images, "2x2", rule="double-masking")
    assert default.rule == "double-masking"
    assert default.threat == PatchThreatModel.parse(2, SIZE)
    assert torch.equal(default.margin, spelled_out.margin)
    assert len(default) == len(images)
    assert 0 < model.certify(images, 1).certified.sum() < len(images)


@pytest.mark.parametrize(
    ("patch", "shapes"),
    [
        (3, ((3, 3),)),
        ("3", ((3, 3),)),
        ("2x4", ((2, 4),)),
        ((2, 4), ((2, 4),)),
        ("2%", ((2, 2),)),
        ("1x3+2x2", ((1, 3), (2, 2))),
        ("area:4", ((1, 4), (2, 2), (4, 1))),
        (PatchThreatModel(SIZE, ((2, 4),)), ((2, 4),)),
    ],
)
def test_patch_notations(model, images, patch, shapes):
    certificate = model.certify(images, patch)
    assert certificate.threat.shapes == shapes
    sizes = {tuple(place[2:]) for place in certificate.worst_placement.reshape(-1, 4).tolist()}
    assert sizes <= set(shapes)


def test_two_patches_are_harder_than_one(model, images):
    one, two = model.certify(images, "1", rule="vote"), model.certify(images, "2*1", rule="vote")
    assert (two.margin <= one.margin).all()
    assert two.threat.patches == 2


@pytest.mark.parametrize("patch", ["five", "0", 0, 13, "13x2", "", "2x", -1])
def test_bad_patches_refused(model, images, patch):
    refused(UsageError, r"a patch .*(is written|at least|does not fit)", model.certify, images, patch)


def test_unknown_rules_refused(model, images):
    refused(UsageError, "did you mean double-masking", model.predict, images, rule="double_masking")
    refused(UsageError, "unknown rule 'guess'", BagCert, model.scorer, rule="guess")


def test_images_and_threats_of_another_size(model, images):
    with pytest.raises(UsageError, match="threat model is for 32x32 px images, the image has 12x10 px"):
        model.certify(images, PatchThreatModel.parse(2, (32, 32)))
    certificate = model.certify(np.zeros((2, 9, 16, 3), dtype=np.uint8), 3)
    assert certificate.threat.image_size == (9, 16)
    refused(UsageError, r"must lie in \[0, 1\]", model.certify, np.full((1, 3, *SIZE), 255.0))


def test_score_map_tells_what_patches_touch(model, images):
    score_map = model.score_map(images)
    assert score_map.scores.shape == (len(images), 3, *score_map.grid.map_size)
    assert (score_map.low, score_map.high) == (-2047, 2047)
    assert score_map.grid.touched_rows(2).shape == (11, 12)
    assert score_map.grid.touched_cols("2x4").shape == (7, 10)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rule": "votes"}, "did you mean vote"),
        ({"patch": "11"}, "not fit"),
        ({"patch": "13"}, "not fit"),
        ({"patch": "five"}, "a patch is"),
        *(({"patch": patch}, "") for patch in ("9" * 400 + "%", "9" * 900, "1000000000000*1")),
    ],
)
def test_folder_that_cannot_be_deployed_refused(folder, tmp_path, changes, message):
    shutil.copytree(folder, tmp_path / "odd")
    facts = {**json.loads((folder / CONFIG).read_text()), **changes}
    (tmp_path / "odd" / CONFIG).write_text(json.dumps(facts))
    with pytest.raises(UnreadableError, match=rf"config\.json cannot be deployed: .*{message}") as error:
        load(tmp_path / "odd", device="cpu")
    assert len(str(error.value)) < 400


@pytest.fixture
def allowed():
    mask = np.zeros(SIZE, dtype=bool)
    mask[:4, :5] = True
    return mask


@pytest.mark.parametrize("rule", RULES)
def test_placements_worst_is_allowed(model, images, allowed, rule):
    certificate = model.certify(images, 2, rule=rule, placements=allowed)
    for top, left, height, width in certificate.worst_placement.reshape(-1, 4).tolist():
        assert allowed[top : top + height, left : left + width].all()
    assert torch.equal(model.predict(images, 2, rule=rule, placements=allowed), certificate.prediction)


def test_placements_fewer_are_easier(model, images, allowed):
    everywhere = model.certify(images, 2, rule="vote")
    somewhere = model.certify(images, 2, rule="vote", placements=allowed)
    assert (somewhere.margin >= everywhere.margin).all()
    assert (somewhere.margin > everywhere.margin).any()


def test_placements_as_a_mask_image(model, images, allowed, tmp_path):
    path = tmp_path / "mask.png"
    Image.fromarray(allowed.astype(np.uint8) * 255).save(path)
    expected = model.certify(images, 2, placements=allowed)
    for given in (path, str(path)):
        found = model.certify(images, 2, placements=given)
        assert found.threat == expected.threat
        assert torch.equal(found.margin, expected.margin)


def test_placements_bad_masks_refused(model, images, allowed, tmp_path):
    refused(UsageError, "must be 12x10 px", model.certify, images, 2, placements=allowed.T)
    with pytest.raises(UsageError, match="fits into the mask of allowed placements"):
        model.certify(images, 5, placements=np.zeros_like(allowed))
    with pytest.raises(UnreadableError, match=r"the mask image .* does not exist"):
        model.certify(images, 2, placements=tmp_path / "none.png")


def test_placements_beside_a_threat_model_refused(model, images, allowed):
    threat = PatchThreatModel.parse(2, SIZE)
    refused(UsageError, "cannot be combined with a PatchThreatModel", model.certify, images, threat, placements=allowed)
    within = PatchThreatModel.parse(2, SIZE, allowed)
    assert torch.equal(model.certify(images, within).margin, model.certify(images, 2, placements=allowed).margin)


def test_own_network_deployed(images):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 2, 1))
    own = BagCert(RegionScorer.from_module(net, ["no", "yes"], SIZE, "binary"), "vote", patch="2")
    certificate = own.certify(images)
    assert own.name == "Sequential"
    assert own.config is None
    assert certificate.prediction.max() <= 1


def test_locality_is_unchecked_until_it_is_measured(folder, images):
    model = load(folder, device="cpu", checked=False)
    around = PatchGuard(model.scorer, patch=2)
    assert model.certify(images).locality == around.certify(images).locality == "unchecked"
    model.check_locality()
    expected = "exact" if model.scorer.tolerance == 0 else "measured"
    assert model.certify(images).locality == around.certify(images).locality == expected


@pytest.mark.parametrize("most", [1, 5])
def test_masks_per_axis_of_a_deployed_model(folder, images, tmp_path, most):
    model = load(folder, device="cpu", masks_per_axis=most)
    (block,) = model.scorer.grid().windows(PatchThreatModel.parse(2, SIZE))
    assert block.keep.shape == (most, most)
    found, whole = model.certify(images), load(folder, device="cpu").certify(images)
    assert found.certified.sum() <= whole.certified.sum()
    assert bool(found.certified.any()) == (most > 1)
    assert not torch.equal(found.margin, whole.margin)
    again = load(model.save(tmp_path / "merged"), device="cpu")
    assert again.masks_per_axis == most
    assert torch.equal(again.certify(images).margin, found.margin)
    again.masks_per_axis = None
    assert torch.equal(again.certify(images).margin, whole.margin)
    with pytest.raises(UsageError, match="at least 1, got 0"):
        again.masks_per_axis = 0
