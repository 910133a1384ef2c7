"""`jaxft init`: every shipped file arrives, works there, and nothing that was there is touched."""

import os
from pathlib import Path

import pytest

from jaxft import config, start
from jaxft.errors import UserError
from tests.conftest import ROOT

SHIPPED = config.shipped_folder()


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_every_file_arrives_where_configurations_look_for_it(tmp_path, monkeypatch, capsys):
    assert start.main([str(tmp_path / "new")]) == 0
    monkeypatch.chdir(tmp_path / "new")
    there = contents(Path("."))
    for name, content in contents(SHIPPED).items():
        assert there.pop(name if name.startswith(start.TEMPLATES) else f"configs/{name}") == content
        found = config.find_shipped(name if name.startswith(start.TEMPLATES) else f"configs/{name}")
        assert not found.is_absolute()  # the copy is read, not jaxft's own
    assert there == {}
    for line in capsys.readouterr().out.splitlines():
        for word in line.split():
            assert not word.startswith("configs/") or Path(word).is_file(), word


def test_what_is_there_stays(tmp_path):
    (tmp_path / "configs/train").mkdir(parents=True)
    mine = {"configs/base.yaml": b"mine", "configs/train/own.yaml": b"own", "notes": b""}
    for name, content in mine.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "configs/train/train_base.yaml").symlink_to("nowhere")
    copied, kept = start.copy(tmp_path)
    assert [str(path.relative_to(tmp_path)) for path in kept] == [
        "configs/base.yaml",
        "configs/train/train_base.yaml",
    ]
    there = contents(tmp_path)
    assert {name: there[name] for name in mine} == mine
    assert os.readlink(tmp_path / "configs/train/train_base.yaml") == "nowhere"
    assert copied == len(contents(SHIPPED)) - 2
    assert start.copy(tmp_path) == (0, kept)
    assert contents(tmp_path) == there


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/configs.*cannot be written"):
        start.copy(tmp_path / "file")


def test_the_wheel_carries_what_is_shipped():
    """hatchling copies `configs` to where `config.shipped_folder` looks first."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["packages"] == ["jaxft"]
    assert wheel["force-include"] == {str(SHIPPED.relative_to(ROOT)): "jaxft/configs"}
    assert Path(config.__file__).parent / "configs" == ROOT / wheel["force-include"]["configs"]
    ignored = (ROOT / ".gitignore").read_text().split()
    assert not {"configs", "configs/", "*.yaml", "*.txt"} & set(ignored)
