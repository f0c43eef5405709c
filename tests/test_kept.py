from pathlib import Path

import pytest

from saerl_fast.records.kept import Kept, drop


def test_what_does_not_have_its_content_is_not_used(tmp_path: Path, caplog) -> None:
    kept = Kept(tmp_path, "sae", "one")
    for stem in ("state-1", "state-2", "other-1"):
        kept.put(stem, lambda path, stem=stem: path.write_text(stem))
    one, two = kept.files("state-*")
    assert one.read_text() == "state-1" and two.name.startswith("state-2-") and two.suffix == ".safetensors"
    one.write_text("state-?")
    two.unlink()
    two.mkdir()
    assert kept.files("state-*") == [] and caplog.text.count("is made again") == 2
    assert [path.name[:7] for path in kept.folder.iterdir()] == ["other-1"]
    kept.clear()
    assert list(tmp_path.iterdir()) == []


def test_another_mark_and_a_file_in_its_place_give_way(tmp_path: Path) -> None:
    Kept(tmp_path, "sae", "one").put("a", lambda path: path.write_text("a"))
    (tmp_path / "sae.partial-two").write_text("a file")
    (tmp_path / "features.partial-one").mkdir()
    Kept(tmp_path, "sae", "two").put("b", lambda path: path.write_text("b"))
    assert {path.name for path in tmp_path.iterdir()} == {"sae.partial-two", "features.partial-one"}
    drop(tmp_path, "sae")
    assert [path.name for path in tmp_path.iterdir()] == ["features.partial-one"]


@pytest.mark.parametrize("name", ["sae", "features"])
def test_nothing_kept_is_no_fault(tmp_path: Path, name: str) -> None:
    kept = Kept(tmp_path / "new", name, "m")
    assert kept.files("*") == []
    kept.clear()
    drop(tmp_path / "new", name)
