"""A missing library is one sentence that names what to install; a broken one is not hidden."""

import sys

import pytest

from bagcert.data import load_dataset
from bagcert.errors import UsageError
from bagcert.io.optional import installed, require, require_installed
from tests import refused


def test_a_library_that_is_there_is_imported() -> None:
    assert require("json.decoder", "onnx").JSONDecoder


@pytest.mark.parametrize("name", ["no_such_library", "no_such_library.part", "json.no_such_part"])
def test_a_missing_library_names_the_extra(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        require(name, "onnx", "exporting")
    expected = f'exporting needs {name}, which is not installed here: pip install "bagcert[onnx]" brings it'
    assert str(caught.value) == expected
    assert caught.value.exit_code == 2


def test_several_libraries_named_together(tmp_path, monkeypatch) -> None:
    (tmp_path / "slow_library.py").write_text("raise AssertionError\n")
    monkeypatch.syspath_prepend(tmp_path)
    require_installed(["json", "slow_library"], "onnx")
    assert installed(["json", "slow_library"])
    assert not installed(["json", "no_such"])
    expected = r'needs no_such and nor_this, which are not installed here: pip install "bagcert\[onnx\]" brings them'
    refused(UsageError, expected, require_installed, ["no_such", "json", "nor_this"], "onnx", "exporting")


def test_library_that_lacks_another(tmp_path, monkeypatch) -> None:
    (tmp_path / "broken_library.py").write_text("import no_such_library\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_library"):
        require("broken_library", "onnx")


def test_optional_libraries_asked_for_here(tmp_path, monkeypatch) -> None:
    from bagcert.locality.onnx import OnnxScores
    from bagcert.report.drawing import figure

    for name in ("datasets", "onnxruntime", "matplotlib"):
        monkeypatch.setitem(sys.modules, name, None)
    refused(UsageError, r'needs datasets, .*pip install "bagcert\[hub\]"', load_dataset, "cifar10")
    refused(UsageError, r'needs onnxruntime, .*pip install "bagcert\[onnx\]"', OnnxScores, tmp_path / "model.onnx")
    refused(UsageError, r'drawing needs matplotlib, .*pip install "bagcert\[report\]"', figure, 1.0, 1.0)
