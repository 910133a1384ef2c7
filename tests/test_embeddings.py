"""Embeddings of words: diffusers loads what is written, and sees the same prompts and images."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image

from jaxft import params, sample, tensor_file
from jaxft.convert import main
from jaxft.data.prompt_weights import WeightedTokenizer, parse
from jaxft.diffusion.conditioning import TOKEN_TABLE, add_rows, encode_text
from jaxft.errors import UserError
from jaxft.formats import diffusers_folder, embeddings
from jaxft.models.clip import CLIPTextModel

ROWS = {"pt-cat1": 3, "bad-art2": 1}
PROMPT, NEGATIVE = "a photo of pt-cat1, the pt-cat1 on the bad-art2", "bad-art2 pt-cat1"


def write_words(folder: Path, model: diffusers_folder.Model) -> Path:
    """Two words of random rows, as large as the model's own tokens."""
    rng = np.random.default_rng(7)
    widths = embeddings.widths(model.configs)
    for word, count in ROWS.items():
        rows = 0.3 * rng.standard_normal((count, sum(widths)), np.float32)
        embeddings.write(folder / f"{word}.safetensors", rows, widths)
    return folder


def bound(model: diffusers_folder.Model) -> list[Any]:
    """The model's text encoders with their weights."""
    networks = model.family.networks
    return [
        params.bind(
            params.abstract(lambda p=part: networks[p](model.parts[p].config))[0],
            jax.tree.map(jnp.asarray, model.parts[part].params),
        )
        for part in model.family.text_encoders
    ]


def with_words(folder: Path, words: Path) -> tuple[diffusers_folder.Model, list[WeightedTokenizer]]:
    model = diffusers_folder.read(str(folder))
    tokenizers = sample.make_tokenizers(model)
    return sample.add_words(model, tokenizers, words), tokenizers


# ------------------------------------------------------------------------------- as diffusers does


def load_in_diffusers(pipeline: Any, folder: Path, words: Path) -> Any:
    """Another pipeline of the folder, with the words loaded; XL's pairs encoder by encoder."""
    opened = type(pipeline).from_pretrained(folder, local_files_only=True)
    for word in ROWS:
        file = words / f"{word}.safetensors"
        if not hasattr(opened, "text_encoder_2"):
            opened.load_textual_inversion(str(file), token=word)
            continue
        tensors = {key: torch.tensor(array) for key, array in tensor_file.read(file).items()}
        for key, end in (("clip_l", ""), ("clip_g", "_2")):
            opened.load_textual_inversion(
                tensors[key],
                token=word,
                text_encoder=getattr(opened, f"text_encoder{end}"),
                tokenizer=getattr(opened, f"tokenizer{end}"),
            )
    return opened


@pytest.mark.parametrize("kind", ["tiny", "sd2", "sdxl"])
def test_text_states_are_diffusers(kind, folders, tiny_pipeline, tiny_model, tmp_path):
    pipeline, folder = (tiny_pipeline, tiny_model) if kind == "tiny" else folders(kind)
    words = write_words(tmp_path, diffusers_folder.read(str(folder)))
    opened = load_in_diffusers(pipeline, folder, words)
    model, tokenizers = with_words(folder, words)
    clip_skip, final_norm = model.family.text_layer(0, True)
    with torch.no_grad():
        theirs = opened.encode_prompt(
            prompt=PROMPT,
            negative_prompt=NEGATIVE,
            device="cpu",
            num_images_per_prompt=1,
            do_classifier_free_guidance=True,
        )
    for side, text in enumerate((PROMPT, NEGATIVE)):
        ids = [jnp.asarray(tokenizer.encode(text)[None]) for tokenizer in tokenizers]
        ours, pooled = encode_text(bound(model), ids, clip_skip=clip_skip, final_norm=final_norm)
        np.testing.assert_allclose(ours, theirs[side].numpy(), atol=2e-5)  # float32's sums
        if kind == "sdxl":
            np.testing.assert_allclose(pooled, theirs[side + 2].numpy(), atol=2e-5)


def test_images_are_diffusers(tiny_pipeline, tiny_model, tmp_path):
    words = write_words(tmp_path / "embs", diffusers_folder.read(str(tiny_model)))
    noise = np.random.default_rng(0).normal(size=(1, 4, 6, 8)).astype(np.float32)
    np.save(tmp_path / "noise.npy", noise)
    size = {"width": 64, "height": 48, "num_inference_steps": 3, "guidance_scale": 4.0}
    options = {
        "pretrained_model": tiny_model,
        "emb_dir": words,
        "save.out_dir": tmp_path / "out",
        "prompt": PROMPT,
        "neg_prompt": NEGATIVE,
        "dtype": "fp32",
        "bs": 1,
        "seed": 0,
        "infer_args.latents": tmp_path / "noise.npy",
    } | {f"infer_args.{key}": value for key, value in size.items()}
    assignments = [f"{key}={value}" for key, value in options.items()]
    assert sample.main(["--config", "configs/infer/text2img.yaml", *assignments]) == 0
    (file,) = (tmp_path / "out").glob("*.png")
    found = np.asarray(Image.open(file)).astype(int)

    opened = load_in_diffusers(tiny_pipeline, tiny_model, words)
    opened.set_progress_bar_config(disable=True)
    latents = torch.from_numpy(noise)
    (image,) = opened(PROMPT, negative_prompt=NEGATIVE, latents=latents, **size).images
    assert np.abs(found - np.asarray(image).astype(int)).max() <= 2


# ------------------------------------------------------------------------------------- in prompts


@pytest.fixture(scope="module")
def taught(tiny_model):
    """A tokenizer that knows `x9` as ids 1000 … 1003, and one without."""
    tokenizer = WeightedTokenizer(tiny_model / "tokenizer")
    tokenizer.add_words({"x9": 4}, first=1000)
    return tokenizer, WeightedTokenizer(tiny_model / "tokenizer")


def test_a_word_takes_as_many_places_as_it_has_rows_across_rows_of_77(taught):
    knows, plain = taught
    before, after = "the " * 73, "of " * 50
    ids = knows.encode(f"{before}x9 {after}", 2)[:, 1:-1].ravel().tolist()
    single = {word: plain.encode(word)[0, 1] for word in ("the", "of")}
    content = [single["the"]] * 73 + [*range(1000, 1004)] + [single["of"]] * 50
    assert ids[: len(content)] == content
    assert knows.fits("the " * 71 + "x9")
    assert not knows.fits("the " * 72 + "x9")


def test_a_weight_lands_on_all_rows_of_a_word_and_on_nothing_after_it(taught):
    knows, _ = taught
    ids, weights = knows.encode_weighted(parse("the {x9:1.3} of {the:0.5}"))
    heavy = np.flatnonzero(weights == np.float32(1.3))
    assert ids[0, heavy].tolist() == [*range(1000, 1004)]
    assert weights[heavy[-1] + 1 : heavy[-1] + 4].tolist() == [1.0, 0.5, 1.0]


def test_of_words_that_begin_alike_the_longer_one_is_found(tiny_model):
    tokenizer = WeightedTokenizer(tiny_model / "tokenizer")
    tokenizer.add_words({"x9": 1, "x9-100": 2}, first=1000)
    assert tokenizer.encode("X9-100 x9")[0, 1:4].tolist() == [1001, 1002, 1000]


def test_the_pooled_state_is_that_of_the_end_and_not_of_a_word(tiny_model):
    """Configurations of 2022 name 2 as the end token: the highest id is meant, of the old ones."""
    component = diffusers_folder.read(str(tiny_model)).parts["text_encoder"]
    size = component.config["vocab_size"]
    rows = np.ones((1, 32), np.float32)
    weights = add_rows(jax.tree.map(jnp.asarray, component.params), rows)
    ids = jnp.full((1, 77), size - 1).at[0, :3].set(jnp.array([size - 2, 5, size]))
    pooled = []
    for end in (2, size - 1):
        config = component.config | {"eos_token_id": end}
        graphdef, _ = params.abstract(lambda c=config: CLIPTextModel(c))
        pooled.append(np.asarray(params.bind(graphdef, weights)(ids)[1]))
    np.testing.assert_array_equal(*pooled)


def test_a_gradient_reaches_the_rows_of_the_words_that_are_said(tiny_model):
    component = diffusers_folder.read(str(tiny_model)).parts["text_encoder"]
    graphdef, _ = params.abstract(lambda: CLIPTextModel(component.config))
    weights = jax.tree.map(jnp.asarray, component.params)
    first = len(weights[TOKEN_TABLE])
    ids = jnp.full((1, 1, 77), 3).at[0, 0, 4].set(first + 1)

    @jax.jit
    def energy(rows):
        states, _ = encode_text([params.bind(graphdef, add_rows(weights, rows))], [ids])
        return jnp.sum(states[:, :, 0])

    gradient = np.asarray(jax.grad(energy)(jnp.ones((3, 32))))
    assert np.flatnonzero(np.abs(gradient).sum(axis=1)).tolist() == [1]


# ------------------------------------------------------------------------------------------- files


def convert(source: Path, target: Path) -> dict[str, np.ndarray]:
    assert main(["embedding", str(source), "--save_path", str(target)]) == 0
    return tensor_file.read(target)


@pytest.mark.parametrize(
    ("name", "width", "content"),
    [
        # AUTOMATIC1111's webui; HCP-Diffusion's word of Stable Diffusion XL; diffusers' script
        ("a.pt", 1024, lambda v: {"string_to_token": {"*": 265}, "string_to_param": {"*": v},
                                  "name": "a", "step": 9, "sd_checkpoint": None}),
        ("b-100.pt", 2048, lambda v: {"string_to_param": {"*": v}, "name": "b"}),
        ("learned_embeds.bin", 768, lambda v: {"<cat-toy>": v[0]}),
    ],
)  # fmt: skip
def test_pickles_are_converted(tmp_path, rng, name, width, content):
    rows = rng.standard_normal((2, width), np.float32)
    torch.save(content(torch.from_numpy(rows)), tmp_path / name)
    found = convert(tmp_path / name, tmp_path / "word.safetensors")
    if width == 2048:
        assert found.keys() == {"clip_l", "clip_g"}
        assert found["clip_l"].shape == (2, 768)
        np.testing.assert_array_equal(np.hstack([found["clip_l"], found["clip_g"]]), rows)
    else:
        assert found.keys() == {"emb_params"}
        np.testing.assert_array_equal(found["emb_params"], rows if name == "a.pt" else rows[:1])


@pytest.mark.parametrize(
    "shapes",
    [
        {"emb_params": (2, 768)},
        {"emp_params": (1024,)},
        {"<cat-toy>": (1, 768)},
        {"clip_g": (3, 1280), "clip_l": (3, 768)},
    ],
)
def test_files_of_other_programs_are_converted_and_inspected(tmp_path, rng, shapes, capsys):
    stored = {key: rng.standard_normal(shape).astype(np.float16) for key, shape in shapes.items()}
    extra = {f"{key}_out": array for key, array in stored.items()}  # as OneTrainer has them
    tensor_file.write(tmp_path / "a.safetensors", stored | extra)
    found = convert(tmp_path / "a.safetensors", tmp_path / "word.safetensors")
    assert capsys.readouterr().out.count("left out") == len(shapes)
    assert found.keys() == ({"emb_params"} if len(shapes) == 1 else shapes.keys())
    for key, array in stored.items():
        mine = found["emb_params" if len(shapes) == 1 else key]
        np.testing.assert_array_equal(mine, np.atleast_2d(array))
    main(["inspect", str(tmp_path / "word.safetensors")])
    told = capsys.readouterr().out
    rows = len(next(iter(found.values())))
    family = {768: "1.x", 1024: "2.x", 2048: "XL"}[sum(v.shape[-1] for v in found.values())]
    assert "the word 'word'" in told
    assert f"{rows} row" in told
    assert f"for Stable Diffusion {family}" in told


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        ({"emb_params": (2, 40)}, "40 wide, of no model"),
        ({"emb_params": (2, 2048)}, "2048 wide, of Stable Diffusion XL; .* is 32 wide"),
        ({"clip_l": (2, 16), "clip_g": (3, 16)}, "clip_g \\(3, 16\\)"),
        ({"emb_params": (2, 32), "emb_params_out": (2, 32)}, "OneTrainer.*convert embedding"),
        ({"emb_params_out": (2, 32)}, "OneTrainer"),
        ({"a": (2, 32), "b": (2, 32)}, "no embedding of a word.*a, b"),
        ({"emb_params": (0, 32)}, "not made of numbers"),
        ({"emb_params": (2, 32, 1)}, "no rows"),
        ({}, "it is empty"),
    ],
)
def test_files_that_do_not_fit_are_named(tmp_path, shapes, said):
    file = tmp_path / "x9.safetensors"
    tensor_file.write(file, {key: np.zeros(shape, np.float32) for key, shape in shapes.items()})
    with pytest.raises(UserError, match=said) as error:
        embeddings.read_folder(tmp_path, (32,))
    assert str(file) in str(error.value)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([], "no embeddings in it"),
        (["the.safetensors"], "'the' is in the model's vocabulary already"),
        (["x9.safetensors", "X9.safetensors"], "are one to the tokenizer"),
        (["x9.pt"], "jaxft convert embedding .*x9.pt --save_path .*x9.safetensors"),
    ],
)
def test_folders_that_cannot_be_used_are_named(tiny_model, tmp_path, names, said):
    for name in names:
        rows = {"emb_params": np.zeros((1, 32), np.float32)}
        tensor_file.write(tmp_path / name, rows)
    with pytest.raises(UserError, match=said):
        with_words(tiny_model, tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        with_words(tiny_model, tmp_path / "none")


def test_pickles_beside_their_conversions_are_passed_over(tiny_model, tmp_path):
    words = write_words(tmp_path, diffusers_folder.read(str(tiny_model)))
    (words / "pt-cat1.pt").touch()
    model, _ = with_words(tiny_model, words)
    component = model.parts["text_encoder"]
    added = len(component.params[TOKEN_TABLE]) - component.config["vocab_size"]
    assert added == sum(ROWS.values())


def test_only_safetensors_is_written_and_of_known_models(tmp_path):
    tensor_file.write(tmp_path / "a.safetensors", {"x": np.zeros((1, 40), np.float32)})
    for target, said in (("b.pt", "only safetensors"), ("b.safetensors", "768 .Stable Diff")):
        with pytest.raises(UserError, match=said):
            convert(tmp_path / "a.safetensors", tmp_path / target)
