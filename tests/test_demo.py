"""The demo: its model and class set, its configurations, the commands it names, its sheet."""

import re
import shlex
from pathlib import Path

import demo
import demo_subject as subject
import demo_world as world
import evaluate_demo
import make_demo_class_set as class_set
import numpy as np
import pytest
import yaml

from jaxft import config as configuration
from jaxft import convert, planning
from jaxft.builtin import names
from jaxft.data import source
from jaxft.formats import diffusers_folder
from tests.conftest import ROOT
from tests.test_formats import same_bits
from tests.test_sample import HEIGHT, WIDTH, generate, theirs

MODEL = names.resolve("builtin:demo")

COMMAND = re.compile(
    r"^ *(?:jaxft|python) ((?:train|plan|sample|convert|scripts/\S+) (?:.*\\\n)*.*)", re.MULTILINE
)
TEXTS = {
    "demo.py": demo.SUMMARY.format(sheet="", model="demo/run/export/run"),
    "demo.md": (ROOT / "docs" / "demo.md").read_text("utf-8"),
}
SCHEMAS = {"train": "train", "plan": "train", "sample": "infer"}


# --------------------------------------------------------------------- what comes with the package


def test_all_that_is_builtin_is_there_and_small():
    for name in names.FOLDERS:
        assert names.resolve(f"builtin:{name}").is_dir(), name
    files = [path for path in MODEL.parent.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 16e6


def test_the_card_names_the_licence():
    _, head, _ = (MODEL / "README.md").read_text("utf-8").split("---\n", 2)
    assert yaml.safe_load(head)["license"] == "apache-2.0"


def test_diffusers_paints_the_same_pictures(offline, tmp_path):
    import torch
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import (
        StableDiffusionPipeline,
    )

    pipeline = StableDiffusionPipeline.from_pretrained(
        MODEL, dtype=torch.float32, safety_checker=None
    )
    noise = np.random.default_rng(0).normal(size=(2, 4, HEIGHT // 8, WIDTH // 8))
    noise = noise.astype(np.float32)
    np.save(tmp_path / "noise.npy", noise)
    prompt = "a small red star on a blue background"
    expected = theirs(pipeline, pipeline.scheduler, noise, prompt, 5.0)
    given = ["infer_args.latents=noise.npy", "infer_args.guidance_scale=5", f"prompt={prompt}"]
    found = generate(Path("builtin:demo"), tmp_path / "pictures", *given, config="demo")
    assert expected.std() > 5  # a picture, not one colour
    assert np.abs(np.stack(found) - expected).max() <= 2


def test_to_a_webui_file_and_back_changes_no_bit(offline, tmp_path):
    file, folder = tmp_path / "demo.safetensors", tmp_path / "again"
    to_file = ["to-webui", "--model_path", "builtin:demo", "--save_path", str(file)]
    back = ["from-webui", "--model_path", str(file), "--save_path", str(folder)]
    assert convert.main(to_file) == 0
    assert convert.main([*back, "--config", "builtin:demo"]) == 0
    before, after = (diffusers_folder.read(name) for name in ("builtin:demo", str(folder)))
    assert after.configs == before.configs
    for part, component in before.parts.items():
        assert same_bits(after.parts[part].params, component.params)


def test_converting_programs_take_builtin_names(offline, capsys):
    assert convert.main(["inspect", "builtin:demo"]) == 0
    assert "v_prediction" in capsys.readouterr().out


# ---------------------------------------------------------------------------------- the class set


def test_the_class_set_asks_for_the_class_and_for_what_training_showed():
    wanted = class_set.captions(0)
    assert wanted == class_set.captions(0) != class_set.captions(1)
    assert len(wanted) == class_set.NUM_PICTURES
    of_class = [text for text in wanted if text.startswith(f"a {world.CLASS} on ")]
    assert len(of_class) * 8 == len(wanted)
    assert {word for text in wanted for word in text.split()} <= set(world.words())


def test_the_class_set_is_what_the_script_asks_for(offline):
    records = source.index("builtin:demo/class", caption_file="builtin:demo/class").records
    assert {record.size for record in records} == {class_set.SIZE}
    assert [text for record in records for text in record.captions] == class_set.captions(0)


# ------------------------------------------------------------------------------- its configurations


def test_the_training_is_of_subject_and_class_and_the_class_can_be_left_out(offline):
    config, notices = configuration.load(demo.TRAINING)
    roots = {name: dataset.source.pictures.img_root for name, dataset in config.data.items()}
    assert roots == {"subject": "builtin:demo/subject", "class": "builtin:demo/class"}
    assert (config.data["class"].teacher, config.data.subject.teacher) == (True, False)
    assert not notices
    alone, _ = configuration.load(demo.TRAINING, ["data.class=---"])
    assert set(alone.data) == {"subject"}


def test_the_plan_trains_the_whole_unet_in_the_sizes_of_the_pictures(offline, capsys):
    assert planning.main(["--config", demo.TRAINING]) == 0
    text = capsys.readouterr().out
    assert "(100.0 %)" in text
    assert all(f"{width} × {height}: " in text for width, height in world.SIZES)
    assert f"a {subject.NAME} on" in text
    assert "v_prediction" in text


def test_the_sheet_asks_for_the_subject_as_no_picture_shows_it_and_for_the_world():
    config, _ = configuration.load(demo.SHEET, schema="infer")
    prompts, seeds = list(dict.fromkeys(config.prompt)), sorted(set(config.seed))
    pairs = [(prompt, seed) for prompt in prompts for seed in seeds]
    assert list(zip(config.prompt, config.seed, strict=True)) == pairs
    of_subject, *others = prompts
    folder = names.resolve("builtin:demo/subject")
    captions = {path.read_text("utf-8").strip() for path in folder.glob("*.txt")}
    assert subject.NAME in of_subject
    assert of_subject not in captions
    assert len(others) == 3
    assert all(set(prompt.split()) <= set(world.words()) for prompt in others)


@pytest.mark.parametrize("text", TEXTS)
def test_commands_that_are_named_are_right(text):
    steps = configuration.load(demo.TRAINING)[0].train.train_steps
    commands = COMMAND.findall(TEXTS[text])
    assert len(commands) >= 4
    for command in commands:
        program, *arguments = shlex.split(command.replace("\\\n", " "))
        assert set(re.findall(r"unet-(\d+)", command)) <= {str(steps)}
        if program in SCHEMAS:
            assert arguments.pop(0) == "--config"
            file, *overrides = arguments
            configuration.load(file, overrides, SCHEMAS[program])
        elif program == "scripts/evaluate_demo.py":
            evaluate_demo.make_config(evaluate_demo.read_arguments(arguments))
        else:
            assert (ROOT / program).is_file() or program == "convert"


# --------------------------------------------------------------------------------------- the sheet


def test_every_picture_is_on_the_sheet_in_its_place(rng):
    prompts = ["a red star", "a blue ring on a white background"]
    colours = rng.choice(200, (2, 6, 3), replace=True).astype(np.uint8) + np.uint8([[[1, 2, 4]]])
    pictures = np.tile(colours[:, :, None, None], (1, 1, 64, 48, 1))
    sheet = demo.contact_sheet(prompts, {"before": pictures[0], "after": pictures[1]})
    places = {}
    for block in range(2):
        for number, colour in enumerate(colours[block]):
            y, x = np.nonzero((sheet == colour).all(-1))
            assert len(x) == 64 * 48 == (np.ptp(x) + 1) * (np.ptp(y) + 1)
            places[block, number] = int(x.min()), int(y.min())
    assert len(set(places.values())) == 12
    for (block, number), (x, y) in places.items():
        assert y == places[1 - block, number][1]
        assert (number < 3) == (y == places[0, 0][1])
        assert block == 0 or x > max(places[0, other][0] for other in range(6))
        assert number % 3 == 0 or x > places[block, number - 1][0]
    for row in range(2):  # a prompt is written above its row
        y = places[0, 3 * row][1]
        assert (sheet[y - demo.LINE : y] < 128).any()
