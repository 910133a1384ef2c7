"""The program `jaxft.convert`: diffusers sees the same model before and after."""

import builtins
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxft import params
from jaxft.convert import TOLERANCE, main
from jaxft.errors import UserError
from jaxft.formats import diffusers_folder

SCRIPT = Path(__file__).parent.parent / "scripts" / "convert_to_webui.py"


def same(a: Path, b: Path) -> bool:
    """Same weights, bit for bit, and same metadata (safetensors writes it in any order)."""
    ours, theirs = params.load(a), params.load(b)
    return (
        params.read_metadata(a) == params.read_metadata(b)
        and ours.keys() == theirs.keys()
        and all(
            ours[k].dtype == theirs[k].dtype and ours[k].tobytes() == theirs[k].tobytes()
            for k in ours
        )
    )


def test_there_and_back_and_verified(tiny_model, tmp_path, capsys):
    file, folder = tmp_path / "m.safetensors", tmp_path / "back"
    assert main(["to-webui", "--model_path", str(tiny_model), "--save_path", str(file)]) == 0
    back = ["from-webui", "--model_path", str(file), "--save_path", str(folder)]
    assert main([*back, "--config", str(tiny_model)]) == 0
    again = tmp_path / "again" / "m.safetensors"
    assert main(["to-webui", "--model_path", str(folder), "--save_path", str(again)]) == 0
    assert same(again, file)

    capsys.readouterr()
    for other in (file, folder):  # torch's threads sum in any order: float32's rounding
        assert main(["verify", str(tiny_model), str(other), "--tolerance", "1e-5"]) == 0
    printed = capsys.readouterr().out
    for name in ("unet", "vae encode", "vae decode", "text_encoder"):
        assert f"\n{name} " in printed


def test_half_is_the_same_within_the_tolerance_and_no_closer(tiny_model, tmp_path):
    file = tmp_path / "half"
    flags = ["--half", "--use_safetensors"]
    main(["to-webui", "--model_path", str(tiny_model), "--save_path", str(file), *flags])
    file = tmp_path / "half.safetensors"  # the suffix is added
    assert {array.dtype for array in params.load(file).values()} == {np.dtype(np.float16)}
    assert main(["verify", str(tiny_model), str(file)]) == 0
    assert main(["verify", str(file), str(tiny_model), "--tolerance", "1e-8"]) == 1


def test_verify_finds_one_wrong_tensor_in_each_network(tiny_model, tmp_path, capsys):
    model = diffusers_folder.read(str(tiny_model))
    wrong = {
        "unet": ["mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0.weight"],
        "vae": ["encoder.mid_block.attentions.0.to_out.0.weight", "decoder.conv_out.bias"],
        "text_encoder": ["text_model.encoder.layers.1.mlp.fc1.weight"],
    }
    for part, names in wrong.items():
        component = getattr(model, part)
        stored = component.params | {name: -2 * component.params[name] for name in names}
        model = model._replace(**{part: component._replace(params=stored)})
    diffusers_folder.write(tmp_path / "wrong", model)
    capsys.readouterr()
    assert main(["verify", str(tiny_model), str(tmp_path / "wrong")]) == 1
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:-1]]
    assert len(rows) == 4
    assert all(float(share) > TOLERANCE for *_, share in rows)


def test_verify_without_torch_says_what_to_install(tiny_model, monkeypatch):
    real = builtins.__import__

    def without_torch(name, *args, **kwargs):
        if name == "torch":
            raise ImportError("No module named 'torch'", name="torch")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_torch)
    with pytest.raises(UserError, match="pip install torch"):
        main(["verify", str(tiny_model), str(tiny_model)])


def test_script_is_the_same_program(tiny_model, tmp_path, monkeypatch):
    flags = ["--model_path", str(tiny_model), "--half", "--save_path"]
    main(["to-webui", *flags, str(tmp_path / "a" / "m.safetensors")])
    script_file = tmp_path / "b" / "m.safetensors"
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *flags, str(script_file)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert not end.value.code
    assert same(script_file, tmp_path / "a" / "m.safetensors")


def test_users_mistake_is_one_message_and_exit_code_2(tmp_path, monkeypatch, capsys):
    missing = tmp_path / "none"
    flags = ["--model_path", str(missing), "--save_path", str(tmp_path / "m.safetensors")]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *flags])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert end.value.code == 2
    printed = capsys.readouterr().err
    assert str(missing) in printed
    assert "Traceback" not in printed


def test_pickle_is_neither_written_nor_read(tiny_model, tmp_path):
    pickled = str(tmp_path / "m.ckpt")
    with pytest.raises(UserError, match="safetensors"):
        main(["to-webui", "--model_path", str(tiny_model), "--save_path", pickled])
    (tmp_path / "m.ckpt").touch()
    with pytest.raises(UserError, match="safetensors"):
        main(
            ["from-webui", "--model_path", pickled, "--save_path", str(tmp_path / "x"),
             "--config", str(tiny_model)]
        )  # fmt: skip


def test_from_webui_refuses_before_it_reads(tiny_model, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "photo.png").touch()
    flags = ["--model_path", str(tmp_path / "none.safetensors"), "--config", str(tiny_model)]
    with pytest.raises(UserError, match="no model"):
        main(["from-webui", *flags, "--save_path", str(tmp_path / "full")])
    with pytest.raises(UserError, match=r"none\.safetensors"):
        main(["from-webui", *flags, "--save_path", str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()


def test_from_webui_needs_a_tokenizer(tiny_model, tmp_path):
    configs = shutil.copytree(tiny_model, tmp_path / "configs")
    shutil.rmtree(configs / "tokenizer")
    flags = ["--model_path", "m.safetensors", "--config", str(configs)]
    with pytest.raises(UserError, match="tokenizer"):
        main(["from-webui", *flags, "--save_path", str(tmp_path / "new")])
