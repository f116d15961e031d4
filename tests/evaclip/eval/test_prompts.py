import subprocess
import sys
from pathlib import Path

import pytest

from evaclip.errors import UserError
from evaclip.eval.prompts import imagenet_classnames, imagenet_templates, load_classnames, load_templates, prompts


def test_imagenet_has_its_names_and_templates() -> None:
    names, templates = imagenet_classnames(), imagenet_templates()
    assert len(names) == 1000
    assert (names[0], names[-1]) == ("tench", "toilet paper")
    assert len(templates) == 80
    assert all(template.count("{}") == 1 for template in templates)
    assert "a bad photo of a {}." in templates


def test_imagenet_data_does_not_import_open_clip() -> None:
    code = (
        "import sys; from evaclip.eval.prompts import imagenet_templates; imagenet_templates();"
        "sys.exit('open_clip' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_names_come_from_lines_or_json(tmp_path: Path) -> None:
    lines = tmp_path / "names.txt"
    lines.write_text("keycap: #\ncafé \n#\n\n", encoding="utf-8")
    assert load_classnames(lines) == ("keycap: #", "café", "#")
    marked = tmp_path / "marked.txt"
    marked.write_text("cat\ndog\n", encoding="utf-8-sig")
    assert load_classnames(marked) == ("cat", "dog")
    listed = tmp_path / "names.json"
    listed.write_text('["a", "b c"]')
    assert load_classnames(listed) == ("a", "b c")
    assert load_classnames("imagenet") == imagenet_classnames()


def test_templates_come_from_a_file_or_are_one_themselves(tmp_path: Path) -> None:
    file = tmp_path / "templates.txt"
    file.write_text("a photo of {}\n{}, drawn\n")
    assert load_templates(file) == ("a photo of {}", "{}, drawn")
    assert load_templates("a sketch of {}") == ("a sketch of {}",)
    assert prompts("{x}", load_templates(file)) == ["a photo of {x}", "{x}, drawn"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "cat\n\ndog\n", "a.txt, line 2: empty"),
        ("a.txt", "", "holds no class names"),
        ("a.json", '["cat", 3]', "a.json, entry 2: expected a text, got 3"),
        ("a.json", '{"cat": 1}', "expected a JSON list of texts, got dict"),
        ("a.json", '["cat",\n', "a.json, line 2: not valid JSON"),
    ],
)
def test_a_wrong_list_of_names_is_told_with_its_line(tmp_path: Path, name: str, content: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        load_classnames(path)


def test_a_template_without_placeholder_is_told_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "templates.txt"
    path.write_text("a photo of {}\na photo of {c}\n")
    with pytest.raises(UserError, match=r"line 2: template 'a photo of \{c\}' lacks the placeholder \{\}"):
        load_templates(path)


def test_a_missing_or_binary_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file or directory; give a file"):
        load_classnames(tmp_path / "none.txt")
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        load_templates(binary)
