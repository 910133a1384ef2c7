"""The shipped examples of training, with nothing changed but paths, are planned."""

import functools
import itertools

import pytest
import torch

from jaxft import config as configs
from jaxft import plan
from jaxft.data import source
from jaxft.formats import single_file
from tests.data_fixtures import photo_folder

EXAMPLES = sorted((configs.shipped_folder() / "train/examples").glob("*.yaml"))
FILES = [path.stem for path in EXAMPLES if path.stem != "demo"]  # which has tests of its own


@pytest.fixture(scope="module")
def planned(folders, tmp_path_factory):
    """The plan of an example of that name, each made once."""
    photos, made = photo_folder(tmp_path_factory.mktemp("photos")), {}
    seen = photo_folder(tmp_path_factory.mktemp("seen"), captions=False)

    def of(name: str) -> plan.Plan:
        if name not in made:
            file = f"configs/train/examples/{name}.yaml"
            model = folders("sdxl")[1] if "sdxl" in name else "builtin:demo"
            paths = [f"model.pretrained_model_name_or_path={model}"]
            for dataset, options in configs.load(file)[0].data.items():
                source_of = f"data.{dataset}.source.data_source1"
                paths.append(f"{source_of}.img_root={photos}")
                if options.source.data_source1.cond_dir:
                    paths.append(f"{source_of}.cond_dir={seen}")
            made[name] = plan.prepare(*configs.load(file, paths))
        return made[name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(single_file, "open_model", functools.cache(single_file.open_model))
        yield of  # each model is read once


@pytest.mark.parametrize("name", FILES)
def test_an_example_is_planned(planned, name):
    """Each of its groups trains something, and its captions come into the prompts."""
    made = planned(name)
    text = plan.describe(made)
    parts = ("unet", "text_encoder", "controlnet", "lora_unet", "lora_text_encoder")
    wanted = {f"{part}.{group}" for part in parts for group in made.config[part]}
    wanted |= {f"tokenizer_pt.train.{word}" for word in made.config.tokenizer_pt.train}
    used = {label for labels in made.selection.labels.values() for label in labels.values()}
    assert used == wanted
    assert all(group in text for group in wanted)
    for dataset in made.datasets:
        if made.config.data[dataset.name].source.data_source1.caption_file:
            for record in dataset.records:
                (caption,) = record.captions
                assert caption in source.prompt(record, 0), record.path


def test_the_name_of_a_character_stands_before_its_tags(planned):
    made = planned("lora_anime_character")
    name = made.config.data.dataset1.source.data_source1.word_names.pt1
    (record, *_) = made.datasets[0].records
    record = record._replace(captions=("one, two, three",))
    drawn = {source.prompt(record, pick) for pick in range(60)}
    tags = itertools.permutations(["one", "two", "three"])
    assert drawn == {", ".join([name, *order]) for order in tags}


def test_a_lora_of_xl_is_beside_the_layers_of_both_encoders_that_are_used(folders, planned):
    """The states are those before the last layer; the pooled state is behind the second's last."""
    pipeline, _ = folders("sdxl")
    adapters = planned("lora_sdxl").selection.adapters
    for name, unused in (("text_encoder", "encoder.layers.2."), ("text_encoder_2", "none")):
        linear = {
            module[module.index("encoder.layers.") :]
            for module, layer in getattr(pipeline, name).named_modules()
            if isinstance(layer, torch.nn.Linear) and "encoder.layers." in module
        }
        ours = {module.removeprefix("text_model.") for module in adapters[name]}
        assert ours == {module for module in linear if not module.startswith(unused)}
