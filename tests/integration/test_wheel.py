"""The wheel, outside the checkout: code, weights, recipes and type marker are all in it and work."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built wheel, unpacked as an installer would."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("*.whl")
    site = folder / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return site


def run(site, *words):
    """Python that sees the unpacked wheel first, far from the checkout."""
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r}); sys.argv[0] = 'bagcert'; from bagcert.cli import main; main()"
    )
    return subprocess.run([sys.executable, "-c", code, *words], cwd=site, capture_output=True, text=True, check=False)


def test_wheel_holds_data_files(site):
    package = site / "bagcert"
    assert (package / "py.typed").exists()
    assert {path.name for path in (ROOT / "src" / "bagcert" / "training" / "recipes").glob("*.toml")} == {
        path.name for path in (package / "training" / "recipes").glob("*.toml")
    }
    for weights in (ROOT / "src" / "bagcert" / "weights").glob("*/model.safetensors"):
        shipped = package / "weights" / weights.parent.name / "model.safetensors"
        assert shipped.read_bytes() == weights.read_bytes()
        assert shipped.stat().st_size <= 8_000_000
    for name in ("digits.npz", "digits.LICENSE.txt"):
        assert (package / "data" / name).read_bytes() == (ROOT / "src" / "bagcert" / "data" / name).read_bytes()
    assert not (site / "tests").exists()


def test_wheel_works_outside_the_checkout(site):
    done = run(site, "evaluate", "digits", "--data", "digits", "--patch", "2", "--limit", "50", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["images"] == 50
    where = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys; sys.path.insert(0, {str(site)!r}); import bagcert; print(bagcert.__file__)",
        ],
        cwd=site,
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(where.stdout.strip()).is_relative_to(site)
