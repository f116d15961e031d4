"""Every kind of model in the table that `tools/dropin_releases.py` writes, and the table."""

import json
import runpy
import sys
from importlib import metadata
from pathlib import Path

import pytest
import timm

from evakernels.dropin import __main__ as add_forms

TOOLS = Path(__file__).parents[3] / "tools"
models = runpy.run_path(str(TOOLS / "dropin_models.py"))
sys.path.insert(0, str(TOOLS))
import dropin_releases  # noqa: E402

# Those whose parts are in no other; --all in the tool's table has every model.
QUICK = ("timm: vit_pe_core_base_patch16_224", "transformers: Pixtral vision", "torchvision: VisionTransformer")
KINDS = [(library, name) for library in ("timm", "transformers", "torchvision") for name in models["models"](library)]


@pytest.mark.parametrize(
    ("library", "name"),
    [
        pytest.param(*kind, id=": ".join(kind), marks=() if ": ".join(kind) in QUICK else pytest.mark.exhaustive)
        for kind in KINDS
    ],
)
def test_each_kind_of_model_is_replaced_and_equal(library, name):
    found = models["compare"](models["models"](library)[name])
    blocks = found["blocks"]
    assert found["headline"].startswith(f"{blocks} of {blocks} blocks, ")
    assert blocks >= 2
    assert max(found["forward"], found["gradients"]) <= 1e-5


ROW = {"headline": "2 of 2 blocks", "replaced": {"Block": 2}, "left": {"GELU: slow": 2}, "forward": 1e-7}
EQUAL, OFF = {"model": "a", "gradients": 2e-7} | ROW, {"model": "b", "gradients": 1e-3} | ROW
UNKNOWN = EQUAL | {"model": "d", "headline": "0 of 2 blocks: timm 9 is unknown; and so on"}
ERROR = {"model": "c", "error": "ImportError: no | here"}


def test_a_release_that_is_not_equal_or_unknown_or_fails_is_told():
    line = dropin_releases.release_line("timm 9", [EQUAL], [EQUAL])
    assert line == "| timm 9 | 1 of 1 | 2 of 2 | 1e-07 | 2e-07 | 2 of 2 |  |"
    line = dropin_releases.release_line("timm 9", [EQUAL, OFF, ERROR, UNKNOWN], [EQUAL, OFF, ERROR])
    assert line.startswith("| timm 9 | 2 of 4 | 4 of 6 | 1e-07 | 1e-03 | 4 of 4 |")
    known = r"c: ImportError: no \| here; b: differs; d: 0 of 2 blocks: timm 9 is unknown; and so on; "
    assert line.endswith(f"| {known}b, tried: differs; c, tried: ImportError: no \\| here |")


def test_a_model_says_what_is_left_and_why():
    line = dropin_releases.model_line("timm", EQUAL, UNKNOWN)
    assert line == "| timm: a | 2 of 2 blocks | 2 Block | 1e-07 | 2e-07 | 0 of 2 blocks | 2 GELU: slow |"


@pytest.mark.exhaustive
def test_with_no_form_known_all_that_is_replaced_was_tried():
    for row in dropin_releases.both("torchvision", None)[1]:
        assert row["headline"].startswith("2 of 2 blocks, ")
        assert row["headline"].endswith(f" {sum(row['replaced'].values())} by behaviour")


def test_the_page_in_the_documentation_has_every_kind():
    page = (TOOLS.parent / "docs" / "dropin-releases.md").read_text()
    assert not [f"{library}: {name}" for library, name in KINDS if f"| {library}: {name} |" not in page]
    assert all(f"| {library} " in page for library in dropin_releases.PACKAGES)
    assert ": differs" not in page


def test_the_forms_of_a_folder_are_added_and_a_folder_without_any_is_refused(tmp_path, monkeypatch, capsys):
    written = tmp_path / "forms.json"
    written.write_bytes(add_forms.FORMS.read_bytes())
    monkeypatch.setattr(add_forms, "FORMS", written)
    add_forms.main([str(Path(timm.__file__).parents[1])])
    assert metadata.version("timm") in json.loads(written.read_text())["timm.layers.mlp.SwiGLU.forward"].popitem()[1]
    written.write_text("{}")
    for arguments in ([], ["--forms"], [str(tmp_path)]):
        with pytest.raises(SystemExit, match="2"):
            add_forms.main(arguments)
    assert f"no release of timm, open_clip or transformers is in {tmp_path}" in capsys.readouterr().err
    assert written.read_text() == "{}"


def test_torchs_own_modules_are_known_in_each_release_that_is_supported():
    forms = json.loads(add_forms.FORMS.read_text()).items()
    for name, known in [form for form in forms if form[0].startswith("torch.")]:
        releases = {version.rpartition(".")[0] for versions in known.values() for version in versions.split()}
        assert releases >= {"2.11", "2.12", "2.13", "2.14", "2.15"}, name
