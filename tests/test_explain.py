"""`jaxft config`: what it prints is the configuration, and each origin holds the value."""

import re
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxft import config, explain
from jaxft.errors import UserError
from tests.test_config_files import HCP_STYLE

SHIPPED = config.shipped_folder()
FILES = [
    str(path.relative_to(SHIPPED))
    for path in sorted(SHIPPED.rglob("*.yaml"))
    if str(path.relative_to(SHIPPED)) not in config.REFERENCES.values()
]
NEEDED = {
    "train": ["model.pretrained_model_name_or_path=m", "exp_dir=run"],
    "infer": ["pretrained_model=m", "part_path=p", "lora_path=l"],
}
FROM_FILE = re.compile(r"# (?:default, )?(\S+\.yaml):(\d+)$")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A working directory in which the shipped configurations are `configs/`."""
    monkeypatch.chdir(tmp_path)
    Path("configs").symlink_to(SHIPPED)
    return tmp_path


def value_lines(text: str) -> list[tuple[str, str, str]]:
    """Key, value and origin of each line of a key; lists have no origin but that of their key."""
    found = []
    for line in text.splitlines():
        if match := re.fullmatch(r" *([^ ]+):( .*)?  # (.+)", line):
            key, value, origin = match.groups(default="")
            found.append((key.strip("'"), value.strip(), f"# {origin}"))
    return found


def line_of(origin: str) -> str:
    """The line that an origin names."""
    match = FROM_FILE.search(origin)
    assert match, origin
    return Path(match[1]).read_text().splitlines()[int(match[2]) - 1]


@pytest.mark.parametrize("path", FILES)
def test_what_is_printed_is_the_configuration_and_origins_hold_its_keys(folder, path):
    schema = "infer" if path.startswith("infer/") else "train"
    assert explain.kind_of(f"configs/{path}") == schema
    text = explain.explain(f"configs/{path}", NEEDED[schema])
    (folder / "cfg.yaml").write_text(text)
    loaded, notices = config.load("cfg.yaml", (), schema)
    assert loaded == config.load(f"configs/{path}", NEEDED[schema], schema)[0]
    assert notices == []
    for key, value, origin in value_lines(text):
        if origin == "# command line":
            assert value in ("m", "run", "p", "l")
            continue
        said = line_of(origin).strip()
        if "${" not in said and said != "controlnet1:":  # which bring in a whole node
            assert said.removeprefix("- ").startswith((f"{key}:", "'*':", '"*":')), (key, said)


@given(st.lists(st.sets(st.sampled_from("abcd")), min_size=1, max_size=4), st.randoms())
@settings(max_examples=15, deadline=None)
def test_the_origin_of_a_value_is_the_line_that_says_it(files, random):
    """Files that say some of four words, each its own text: the line of the origin has the text."""
    with tempfile.TemporaryDirectory() as folder:
        names = [f"{folder}/{number}.yaml" for number in range(len(files))]
        for number, (name, words) in enumerate(zip(names, files, strict=True)):
            bases = random.sample(names[:number], random.randint(0, number))
            said = "".join(f"\n      {word}: said-{number}-{word}" for word in sorted(words))
            text = f"_base_: {bases}\ntrain:\n  loss:\n    weighting_kwargs:{said or ' {}'}\n"
            Path(name).write_text(text if bases else text.partition("\n")[2])
        text = explain.explain(names[-1], NEEDED["train"])
        said = config.load(names[-1], NEEDED["train"])[0].train.loss.weighting_kwargs
        found = {key: origin for key, _, origin in value_lines(text) if key in said}
        assert found.keys() == set(said)
        for key, origin in found.items():
            assert said[key] in line_of(origin)


def test_origins_of_what_is_interpolated_deleted_packed_and_set(folder):
    Path("base.yaml").write_text(HCP_STYLE)
    Path("own.yaml").write_text(
        "_base_: base.yaml\nmine:\n  words: {pt1: a}\ntrain: {workers: ---}\n"
        "data: {dataset1: {source: {data_source1: {word_names: '${mine.words}'}}}}\n"
    )
    packed = HCP_STYLE.splitlines().index("              word_names: ${....word_names}") + 1
    text = explain.explain("own.yaml", ["train.optimizer.weight_decay=0.5"])
    assert text.startswith("# base.yaml: allow_tf32: ignored: ")
    origins = {key: origin for key, _, origin in value_lines(text)}
    words = [origin for key, _, origin in value_lines(text) if key == "pt1"]
    assert words == [f"# base.yaml:{packed}", "# own.yaml:5"]
    assert origins["workers"].startswith("# default, configs/base.yaml:")
    decays = [origin for key, _, origin in value_lines(text) if key == "weight_decay"]
    assert decays.count("# command line") == 1
    line = HCP_STYLE.splitlines().index("mixed_precision: 'fp16'") + 1
    assert origins["mixed_precision"] == f"# base.yaml:{line}"


@pytest.mark.parametrize(
    ("said", "keys"),
    [
        ("plugin_unet:\n  c:\n    _target_: ControlNetPlugin\n    lr: 3e-4", ["lr"]),
        ("data: {d: {source: {s: {img_root: i,\n  cond_root: c}}}}", ["cond_dir"]),
        ("data: {d: {source: {s: {img_root: i, tag_transforms: [\n  {p: 0.3,", ["p"]),
        (
            "data: {d: {source: {s: {img_root: i, tag_transforms: {transforms: [\n  {p: 0.3,",
            ["p", "_target_"],
        ),
        ("model:\n  ema: null\n  ema_unet: 0\n  ema_text_encoder: 0.9", ["decay_max", "power"]),
        ("train: {resume: {ckpt_path: {TE: [],\n  unet: [a]}}}", ["unet"]),
        ("train: {resume: {ckpt_path: {words:\n  {cat: a}}}}", ["cat"]),
        ("train: {}\nlogger: [{_target_: TBLogger, log_step: 7}]", ["tensorboard"]),
    ],
)
def test_the_origin_of_what_has_another_name_in_hcp_diffusion_is_the_line_that_says_it(
    folder, said, keys
):
    """The last line of each text; whatever lies between it and the value in another way."""
    number = len(said.splitlines())
    if "tag_transforms" in said:
        said += " _target_: TagDropout}]" + "}" * (said.count("{") - 1)
    Path("own.yaml").write_text(f"{said}\n")
    text = explain.explain("own.yaml", NEEDED["train"], "train")
    found = [(key, origin) for key, _, origin in value_lines(text)]
    for key in keys:
        assert (key, f"# own.yaml:{number}") in found


def test_an_older_spelling_beside_the_newer_one_is_refused_where_they_differ(folder):
    source = "data: {{d: {{source: {{s: {{img_root: i, cond_dir: c, cond_root: {}}}}}}}}}\n"
    Path("own.yaml").write_text(source.format("other"))
    with pytest.raises(UserError, match=r"own.yaml: data.d.source.s.cond_root: cond_dir, .*keep"):
        config.load("own.yaml", NEEDED["train"])
    for same in ("c", "null"):
        Path("own.yaml").write_text(source.format(same))
        assert config.load("own.yaml", NEEDED["train"])[0].data.d.source.s.cond_dir == "c"


@pytest.mark.parametrize(
    "words",
    [
        "",
        "a: b # c",
        "'",
        '"',
        "two\nlines",
        " # x",
        "long " * 40,
        "\x85a\u2028b",
        "x" * 200,
        "- a",
        "${a}",
        "猫\t",
    ],
)
def test_any_text_comes_back(folder, words):
    tree = {"model": {"pretrained_model_name_or_path": words or "m"}, "exp_dir": words}
    Path("own.yaml").write_text(config.to_yaml(tree))
    Path("again.yaml").write_text(explain.explain("own.yaml"))
    assert config.load("again.yaml")[0] == config.load("own.yaml")[0]


def test_a_file_of_either_kind_must_say_which(folder, capsys):
    Path("own.yaml").write_text("seed: 1\n")
    with pytest.raises(UserError, match="--schema train or infer"):
        explain.main(["own.yaml"])
    assert explain.main(["--schema", "infer", "own.yaml", "pretrained_model=m"]) == 0
    assert "seed: 1" in capsys.readouterr().out
    with pytest.raises(UserError, match="pretrained_model: must be given"):
        explain.main(["--config", "own.yaml", "--schema", "infer"])
    with pytest.raises(UserError, match="name a configuration"):
        explain.main([])
