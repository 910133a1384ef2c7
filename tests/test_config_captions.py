"""Captions in a configuration: HCP-Diffusion's forms of text_transforms and of caption_file."""

import pytest

from jaxft import config, datasets
from jaxft.data import source, templates
from jaxft.errors import UserError
from tests.data_fixtures import photo_folder

MODEL = "model.pretrained_model_name_or_path=here"
SHIPPED = config.shipped_folder()

SHUFFLE = "_target_: hcpdiff.utils.caption_tools.TagShuffle"
DROPOUT = "_target_: hcpdiff.utils.caption_tools.TagDropout, p: 0.2"
FILL = "_target_: hcpdiff.utils.caption_tools.TemplateFill, word_names: "
COMPOSE = "_target_: torchvision.transforms.Compose, "

FORMS = {
    "composition": (
        f"text_transforms: {{{COMPOSE}transforms: [{{{SHUFFLE}}}, {{{DROPOUT}}}, "
        f"{{{FILL}'${{....word_names}}'}}]}}"
    ),
    "its transforms": (
        f"text_transforms: {{transforms: [{{{SHUFFLE}}}, {{{DROPOUT}}}, "
        f"{{{FILL}'${{....word_names}}'}}]}}"
    ),
    "list": f"text_transforms: [{{{SHUFFLE}}}, {{{DROPOUT}}}, {{{FILL}'${{...word_names}}'}}]",
    "older name": (
        f"tag_transforms: {{{COMPOSE}transforms: [{{{SHUFFLE}}}, {{{DROPOUT}}}, "
        f"{{{FILL}'${{....word_names}}'}}]}}"
    ),
}


@pytest.fixture
def load(tmp_path, monkeypatch):
    """The one source of a configuration with this text in it, and its notices."""
    monkeypatch.chdir(tmp_path)

    def of(text: str, *overrides: str):
        path = tmp_path / "own.yaml"
        path.write_text(
            "data:\n  d:\n    source:\n      s:\n        img_root: imgs\n"
            f"        word_names: {{pt1: sks}}\n        {text}\n"
        )
        loaded, notices = config.load(str(path), [MODEL, *overrides])
        assert notices == []
        (tmp_path / "cfg.yaml").write_text(config.to_yaml(loaded))
        assert config.load(str(tmp_path / "cfg.yaml")) == (loaded, [])
        return loaded.data.d.source.s

    return of


@pytest.mark.parametrize("text", FORMS.values(), ids=FORMS)
def test_every_form_of_text_transforms_is_the_same_list(load, text):
    assert load(text).text_transforms.to_dict() == {
        "0": {"_target_": "hcpdiff.utils.caption_tools.TagShuffle"},
        "1": {"_target_": "hcpdiff.utils.caption_tools.TagDropout", "p": 0.2},
        "2": {
            "_target_": "hcpdiff.utils.caption_tools.TemplateFill",
            "word_names": {"pt1": "sks"},
        },
    }


def test_one_transform_none_and_a_change_from_the_command_line(load):
    one = load(f"text_transforms: {{{SHUFFLE}}}")
    assert [node["_target_"] for node in one.text_transforms.values()] == [SHUFFLE.split()[1]]
    for text in ("text_transforms: null", "text_transforms: []", ""):
        assert load(text).text_transforms.to_dict() == {}
    changed = load(FORMS["list"], "data.d.source.s.text_transforms.1.p=0.5")
    assert changed.text_transforms["1"].p == 0.5


def test_the_order_is_the_lists(load):
    texts = [f"t{number}" for number in range(12)]
    nodes = ", ".join(f"{{_target_: Suffix, text: {text}}}" for text in texts)
    options = datasets._source_options(load(f"text_transforms: [{nodes}]"))
    made = ""
    for transform in options["text_transforms"]:
        made = transform.apply(made, None)
    assert made.split() == texts


@pytest.mark.parametrize("text", FORMS.values(), ids=FORMS)
def test_prompts_come_out(load, tmp_path, text):
    photo_folder(tmp_path / "imgs", 2)
    for name in ("0.txt", "1.txt"):
        (tmp_path / "imgs" / name).write_text("a, b, c, d")
    line = "prompt_template: prompt_tuning_template/caption.txt"
    (tmp_path / "imgs" / "stray.json").write_text("{}")
    loader = "{_target_: hcpdiff.data.caption_loader.TXTCaptionLoader, path: imgs}"
    found = load(f"{text}\n        {line}\n        caption_file: {loader}")
    records, notices = source.index(**datasets._source_options(found))
    assert notices == []
    prompts = [source.prompt(record, pick) for record in records for pick in range(50)]
    assert len(set(prompts)) > 25
    assert all(prompt.startswith("sks") for prompt in prompts)
    assert {tag for prompt in prompts for tag in prompt.split(", ")} == {"sks", "a", "b", "c", "d"}


def test_caption_lines_and_word_names_reach_the_source(load, tmp_path):
    photo_folder(tmp_path / "imgs", 1)
    (tmp_path / "imgs" / "0.txt").write_text("one\ntwo")
    text = "caption_file: imgs\n        prompt_template: null"
    with pytest.raises(UserError, match="caption_lines"):
        source.index(**datasets._source_options(load(text)))
    first = source.index(**datasets._source_options(load(f"{text}\n        caption_lines: first")))
    assert first.records[0].captions == ("one",)
    lists = f"text_transforms: [{{{FILL}{{pt1: [a, b, c]}}}}]"
    with pytest.raises(UserError, match=r"word_names\.pt1"):
        source.index(**datasets._source_options(load(lists)))


NAMES = ["name", "object", "style"]
TEMPLATES = ["caption", "name_2pt_caption", *NAMES, *(f"{name}_caption" for name in NAMES)]


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_shipped_templates_use_the_caption_as_their_name_says(name):
    lines = templates.load_templates(SHIPPED / "prompt_tuning_template" / f"{name}.txt")
    assert all(templates.count(line, "caption") == ("caption" in name) for line in lines)
    words = dict.fromkeys(templates.fields(lines) - {"caption"}, "word")
    filled = [templates.fill(line, words, "CAP") for line in lines]
    assert len(set(filled)) == len(lines)
    assert all(text.endswith(", CAP") for text in filled if "caption" in name)
