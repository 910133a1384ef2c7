"""Prompts follow from captions, a recipe and a number; what is kept, moved and left out."""

import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxft.data import prompts
from jaxft.data import text_transforms as transforms
from jaxft.data.batches import BatchPlan
from jaxft.data.buckets import fixed_bucket
from jaxft.errors import UserError

TAGS = ["1girl", "red hair", "(blue sky, clouds:1.2)", "{cat:1.3}", ":)", "a (b), c:(", "x_y"]
WORDS = {"pt1": "sks", "class": "dog"}
LINES = ("{pt1}, {caption}", "a photo of {pt1} {class}, {caption}", "{caption}")
PLAN = BatchPlan(fixed_bucket([(64, 64)] * 100), 4, seed=7, name="d")
PICKS = [PLAN.pick(epoch, image) for epoch in range(20) for image in range(100)]

plain_tag = st.text("abc ()[]{}:1.|\\", min_size=1, max_size=8).map(str.strip).filter(bool)
picks = st.integers(0, 2**64 - 1)


def make(caption: str, *steps: transforms.Step, pick: int = 0, lines=("{caption}",)) -> str:
    return prompts.make([caption], prompts.recipe(lines, WORDS, steps), pick)


def frequency(wanted: str, caption: str, *steps: transforms.Step, lines=("{caption}",)) -> float:
    return sum(make(caption, *steps, pick=p, lines=lines) == wanted for p in PICKS) / len(PICKS)


# ------------------------------------------------------------------------------------------- tags


def test_a_tag_ends_at_a_comma_outside_brackets():
    assert transforms.tags_of(", ".join(TAGS)) == [*TAGS[:5], "a (b)", "c:(", "x_y"]
    assert transforms.tags_of(r" a\(b, c\) ,, (d, [e, f]), ") == [r"a\(b", r"c\)", "(d, [e, f])"]
    assert transforms.tags_of("") == []


@given(st.lists(plain_tag, max_size=6), picks)
@settings(deadline=None)
def test_a_shuffle_is_a_permutation(tags, pick):
    caption = ",".join(tags)
    before = transforms.tags_of(caption)
    after = make(caption, transforms.tag_shuffle(), pick=pick)
    assert Counter(after.split(", ")) == Counter(", ".join(before).split(", "))
    assert len(after) == len(", ".join(before))


def test_every_order_comes_equally_often():
    counts = Counter(make("a, b, c", transforms.tag_shuffle(), pick=pick) for pick in PICKS)
    assert len(counts) == 6
    assert all(abs(n / len(PICKS) - 1 / 6) < 0.04 for n in counts.values())  # 4.8 sigma


@given(st.integers(0, 4), picks)
@settings(deadline=None)
def test_kept_tags_stay_where_they_are(keep_first, pick):
    steps = (transforms.tag_shuffle(keep_first=keep_first),)
    steps += (transforms.tag_dropout(0.5, keep_first=keep_first, keep=["RED hair "]),)
    tags = make("a, b, red hair, c, d", *steps, pick=pick).split(", ")
    assert tags[:keep_first] == ["a", "b", "red hair", "c"][:keep_first]
    assert tags.count("red hair") == 1


@given(picks)
@settings(deadline=None)
def test_a_separator_keeps_what_is_before_it_and_behind_the_second(pick):
    keep = {"keep_separator": "|||"}
    steps = (transforms.tag_shuffle(keep_first=1, **keep), transforms.tag_dropout(0.9, **keep))
    tags = make("a, b ||| c, d, e ||| f, g", *steps, pick=pick).split(", ")
    assert tags[:2] == ["a", "b"]
    assert tags[-2:] == ["f", "g"]
    assert set(tags[2:-2]) <= {"c", "d", "e"}
    assert make("a, b, c", steps[0], pick=pick).startswith("a, ")


def test_a_separator_is_no_part_of_the_prompt():
    step = transforms.tag_shuffle(keep_separator="|||")
    assert make("a|||b", step, lines=LINES[:1]) == "sks, a, b"
    assert make("|||a", step) == make("a|||", step) == "a"
    assert make("a|||b", transforms.tag_shuffle()) == "a|||b"  # nobody said that it is one


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
def test_a_tag_is_dropped_as_often_as_asked(p):
    kept = Counter(
        tag
        for pick in PICKS
        for tag in transforms.tags_of(make("a, b, c", transforms.tag_dropout(p), pick=pick))
    )
    assert all(abs(kept[tag] / len(PICKS) - (1 - p)) < 0.05 for tag in "abc")  # 4.5 sigma
    together = sum(
        make("a, b, c", transforms.tag_dropout(p), pick=pick) in ("a", "a, c") for pick in PICKS
    )
    assert abs(together / len(PICKS) - p * (1 - p)) < 0.05  # each tag by itself


def test_where_tag_erase_stands_decides_what_it_erases():
    erase, fill, line = transforms.tag_erase(0.25), transforms.TemplateFill(), LINES[:1]
    assert abs(frequency("sks", "cap", erase, lines=line) - 0.25) < 0.05
    assert abs(frequency("sks", "cap", erase, fill, lines=line) - 0.25) < 0.05
    assert abs(frequency("", "cap", fill, erase, lines=line) - 0.25) < 0.05
    assert frequency("sks, cap", "cap", transforms.tag_erase(0), lines=line) == 1


def test_caption_dropout_empties_the_prompt_wherever_it_stands():
    drop, others = (
        transforms.caption_dropout(0.25),
        (transforms.prefix("p"), transforms.suffix("s")),
    )
    for steps in ((drop, *others), (*others, drop)):
        assert abs(frequency("", "cap", *steps, lines=LINES[:1]) - 0.25) < 0.05


# ---------------------------------------------------------------------- wildcards, prefix, suffix


def test_wildcards():
    counts = Counter(make("a {red|blue|} cat", transforms.wildcards(), pick=p) for p in PICKS)
    assert set(counts) == {"a red cat", "a blue cat", "a  cat"}
    assert all(abs(n / len(PICKS) - 1 / 3) < 0.05 for n in counts.values())
    nested = {make("{a|b{c|d}|{cat:1.3}}", transforms.wildcards(), pick=p) for p in PICKS}
    assert nested == {"a", "bc", "bd", "{cat:1.3}"}
    assert make("{a|b}") == "{a|b}"  # off unless asked for


@given(st.text("ab{}|:1.2 ,()", max_size=30), picks)
@settings(deadline=None)
def test_wildcards_change_braces_with_a_bar_alone(text, pick):
    after = make(text, transforms.wildcards(), pick=pick)
    if not re.search(r"\{[^{}]*\|", text) and "|" not in text:
        assert after == make(text)
    assert len(after) <= len(text)


def test_prefix_and_suffix():
    steps = (transforms.prefix("anime,"), transforms.suffix(", best"))
    assert make("a cat", *steps) == "anime, a cat, best"
    assert make("a cat", transforms.suffix("at night")) == "a cat at night"
    assert make("a cat", *steps, lines=LINES[:1]) == "sks, anime, a cat, best"
    assert make("a cat", transforms.TemplateFill(), *steps, lines=LINES[:1]) == (
        "anime, sks, a cat, best"
    )
    assert make("", transforms.suffix(", best")) == "best"


# ---------------------------------------------------------------------------------- whole recipes

RECIPES = {
    "nothing": (),
    "shuffle": (transforms.tag_shuffle(keep_first=1),),
    "all": (
        transforms.wildcards(),
        transforms.tag_shuffle(keep_separator="|||"),
        transforms.tag_dropout(0.3),
        transforms.prefix("very,"),
        transforms.TemplateFill({"pt1": "other"}),
        transforms.tag_erase(0.1),
        transforms.suffix(", end"),
        transforms.caption_dropout(0.1),
    ),
}


@pytest.mark.parametrize("steps", RECIPES.values(), ids=RECIPES)
def test_a_prompt_follows_from_the_number_alone(steps):
    captions = [", ".join(TAGS), "a {small|big} cat|||on, a, mat"]
    one, other = (prompts.recipe(LINES, WORDS, steps) for _ in range(2))
    forward = [prompts.make(captions, one, pick) for pick in PICKS[:300]]
    backward = [prompts.make(captions, other, pick) for pick in reversed(PICKS[:300])]
    assert forward == backward[::-1]
    assert len(set(forward)) > 3


def test_another_seed_dataset_epoch_or_image_is_another_draw():
    plans = [BatchPlan(fixed_bucket([(8, 8)] * 9), 2, seed=s, name=n) for s in (0, 1) for n in "ab"]
    drawn = {plan.pick(epoch, image) for plan in plans for epoch in range(9) for image in range(9)}
    assert len(drawn) == 4 * 81


def test_a_transform_more_does_not_change_what_the_others_draw():
    shuffle = transforms.tag_shuffle()
    for pick in PICKS[:50]:
        assert make("a, b, c, d", shuffle, pick=pick) == (
            make("a, b, c, d", shuffle, transforms.tag_erase(0), pick=pick)
        )


def test_the_lines_of_the_template_are_counted_by_the_number():
    """Also where there are transforms: previews ask for 0, 1, 2 …"""
    for steps in ((), (transforms.prefix("x"),)):
        found = [make("c", *steps, pick=pick, lines=("1", "2", "3")) for pick in range(4)]
        assert found == ["1", "2", "3", "1"]


def test_one_of_several_captions_is_drawn():
    how = prompts.recipe(["{caption}"], {})
    counts = Counter(prompts.make(["a", "b"], how, pick) for pick in PICKS)
    assert abs(counts["a"] / len(PICKS) - 0.5) < 0.05


@pytest.mark.parametrize("steps", RECIPES.values(), ids=RECIPES)
@given(
    caption=st.lists(st.sampled_from(["a", " b c", "{d|e f}", "|||", "(g, h:1)", "", ":("])),
    line=st.sampled_from([*LINES, "x {caption} {caption}"]),
)
@settings(max_examples=30, deadline=None)
def test_no_prompt_is_longer_than_the_longest(steps, caption, line):
    how = prompts.recipe(("a line", line, "{caption}"), WORDS, steps)
    captions = [",".join(caption), "x"]
    longest = prompts.longest(captions, prompts.with_longest_templates(how, len), len)
    made = [prompts.make(captions, how, pick) for pick in PICKS[:100]]
    assert max(map(len, made)) <= len(longest)


@given(st.permutations(TAGS[:5]), picks)
@settings(deadline=None)
def test_weighted_text_comes_through_everything(tags, pick):
    steps = (transforms.wildcards(), transforms.tag_shuffle(), transforms.tag_dropout(0))
    prompt = make(", ".join(tags), *steps, pick=pick, lines=LINES[:1])
    assert "(blue sky, clouds:1.2)" in prompt
    assert "{cat:1.3}" in prompt


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: transforms.tag_dropout(1.5), "p: 1.5"),
        (lambda: transforms.tag_erase(-0.1), "p: -0.1"),
        (lambda: transforms.caption_dropout(2), "p: 2"),
        (lambda: transforms.tag_shuffle(keep_first=-1), "keep_first"),
        (lambda: transforms.tag_shuffle(keep_separator=", "), "keep_separator"),
        (lambda: transforms.tag_shuffle(keep_separator=""), "keep_separator"),
        (lambda: prompts.recipe([], {}, [transforms.TemplateFill()] * 2), "TemplateFill"),
        (
            lambda: prompts.recipe([], {}, [transforms.TemplateFill({"a": ["b", "c", "d"]})]),
            "word_names",
        ),
    ],
)
def test_options_that_make_no_sense_are_named(build, says):
    with pytest.raises(UserError, match=re.escape(says)):
        build()
