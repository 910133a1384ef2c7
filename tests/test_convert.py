"""The program `jaxft.convert`: diffusers sees the same model before and after."""

import builtins
import hashlib
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxft import params, tensor_file
from jaxft.convert import main
from jaxft.errors import UserError
from jaxft.formats import diffusers_folder, webui
from jaxft.verify import TOLERANCE

SCRIPT = Path(__file__).parent.parent / "scripts" / "convert_to_webui.py"


def same(a: Path, b: Path) -> bool:
    """Same weights, bit for bit, and same metadata (safetensors writes it in any order)."""
    ours, theirs = params.load(a), params.load(b)
    return (
        tensor_file.read_header(a).metadata == tensor_file.read_header(b).metadata
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
        component = model.parts[part]
        stored = component.params | {name: -2 * component.params[name] for name in names}
        model = model.replace(**{part: component._replace(params=stored)})
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


def test_pickles_are_not_written_and_damaged_ones_named(tiny_model, tmp_path):
    pickled = str(tmp_path / "m.ckpt")
    with pytest.raises(UserError, match="safetensors"):
        main(["to-webui", "--model_path", str(tiny_model), "--save_path", pickled])
    (tmp_path / "m.ckpt").touch()
    with pytest.raises(UserError, match="not converted"):
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


# ------------------------------------------------------------------------ other ways in and out


def test_inspect_says_what_things_are(tiny_model, tmp_path, capsys):
    file = tmp_path / "m.safetensors"
    main(["to-webui", "--model_path", str(tiny_model), "--save_path", str(file), "--half"])
    capsys.readouterr()
    main(["inspect", str(file)])
    told = capsys.readouterr().out
    assert "Stable Diffusion 1.x in one file" in told
    assert "F16" in told
    assert "modelspec.hash_sha256: 0x" in told
    assert "modelspec.hash_sha256 is that of the weights" in told
    assert f"SHA-256 of the file: {hashlib.sha256(file.read_bytes()).hexdigest()} " in told
    assert [line.split(":")[0] for line in told.splitlines()[2:5]] == [
        "  unet",
        "  vae",
        "  text_encoder",
    ]
    main(["inspect", str(tiny_model)])
    told = capsys.readouterr().out
    assert "Stable Diffusion 1.x as a diffusers folder" in told
    assert "unet/diffusion_pytorch_model.safetensors" in told


def torch_folder(tiny_model, tmp_path) -> Path:
    """The model with pickled weights, as diffusers wrote it in 2022."""
    import torch

    folder = Path(shutil.copytree(tiny_model, tmp_path / "pickled"))
    for part, name in (("unet", "diffusion_pytorch_model"), ("text_encoder", "pytorch_model")):
        (file,) = (folder / part).glob("*.safetensors")
        stored = {k: torch.from_numpy(v.copy()) for k, v in params.load(file).items()}
        torch.save(stored, folder / part / f"{name}.bin")
        file.unlink()
    return folder


def test_pickled_folders_are_converted(tiny_model, tmp_path):
    folder = torch_folder(tiny_model, tmp_path)
    with pytest.raises(UserError, match="to-diffusers"):
        diffusers_folder.read(str(folder))
    paths = ["--model_path", str(folder), "--save_path", str(tmp_path / "safe")]
    assert main(["to-diffusers", *paths]) == 0
    ours, theirs = (diffusers_folder.read(str(p)) for p in (tmp_path / "safe", tiny_model))
    for part, component in theirs.parts.items():
        for name, array in component.params.items():
            assert array.tobytes() == ours.parts[part].params[name].tobytes()


def test_pickled_checkpoints_are_converted(tiny_model, tmp_path):
    import torch

    stored = webui.to_webui(diffusers_folder.read(str(tiny_model)))
    tensors = {key: torch.from_numpy(np.array(array)) for key, array in stored.items()}
    torch.save({"state_dict": tensors, "global_step": 7}, tmp_path / "m.ckpt")
    paths = ["--model_path", str(tmp_path / "m.ckpt"), "--save_path", str(tmp_path / "safe")]
    assert main(["to-diffusers", *paths, "--config", str(tiny_model)]) == 0
    ours, theirs = (diffusers_folder.read(str(p)) for p in (tmp_path / "safe", tiny_model))
    for part, component in theirs.parts.items():
        assert ours.parts[part].params.keys() == component.params.keys()


class Harmful:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_code_in_a_pickle_does_not_run(tiny_model, tmp_path):
    import torch

    torch.save({"state_dict": Harmful(tmp_path / "harm")}, tmp_path / "m.ckpt")
    paths = ["--model_path", str(tmp_path / "m.ckpt"), "--save_path", str(tmp_path / "safe")]
    with pytest.raises(UserError, match="more than tensors"):
        main(["to-diffusers", *paths, "--config", str(tiny_model)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.ckpt"]


def test_a_file_needs_a_folder_of_its_kind(tiny_model, tmp_path):
    file = tmp_path / "m.safetensors"
    main(["to-webui", "--model_path", str(tiny_model), "--save_path", str(file)])
    with pytest.raises(UserError, match=r"Stable Diffusion 1\.x.*--config"):
        main(["to-diffusers", "--model_path", str(file), "--save_path", str(tmp_path / "x")])


def test_what_was_trained_is_extracted_and_merged_back(tiny_model, tmp_path):
    model = diffusers_folder.read(str(tiny_model))
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    rng = np.random.default_rng(0)
    weights = dict(model.parts["unet"].params)
    rows, columns = weights[name].shape
    change = rng.standard_normal((rows, 2)) @ rng.standard_normal((2, columns))
    weights[name] = weights[name] + change.astype(np.float32)
    tuned = model.replace(unet=model.parts["unet"]._replace(params=weights))
    diffusers_folder.write(tmp_path / "tuned", tuned)
    file, merged = tmp_path / "lora.safetensors", tmp_path / "merged"
    paths = ["--base", str(tiny_model), "--tuned", str(tmp_path / "tuned"), "--rank", "2"]
    assert main(["extract-lora", *paths, "--dtype", "fp32", "--save_path", str(file)]) == 0
    for form, target in (("peft", "p.safetensors"), ("kohya", "k.safetensors"), ("hcp", "h")):
        source = ["--lora_path", str(file), "--model", str(tiny_model), "--to", form]
        assert main(["lora", *source, "--save_path", str(tmp_path / target)]) == 0
    for source in ("p.safetensors", "k.safetensors", "h/unet.safetensors"):
        paths = ["--model_path", str(tiny_model), "--lora", f"{tmp_path / source}=1.0"]
        assert main(["merge", *paths, "--save_path", str(merged)]) == 0
        again = diffusers_folder.read(str(merged)).parts["unet"].params
        np.testing.assert_allclose(again[name], weights[name], atol=1e-4)
        unchanged = "conv_in.weight"
        np.testing.assert_array_equal(again[unchanged], weights[unchanged])
