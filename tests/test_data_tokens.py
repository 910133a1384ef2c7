import os
import subprocess
import sys

import numpy as np
import pytest
import random_model
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from jaxft.data.tokens import Tokenizer
from jaxft.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    random_model.write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def both(folder):
    return Tokenizer(folder), CLIPTokenizer.from_pretrained(folder)


TEXTS = st.text(max_size=120) | st.text("abc the,.!'s\n", max_size=400)


@given(text=TEXTS)
@settings(max_examples=150, deadline=None)
def test_one_row_is_what_the_pipeline_feeds(both, text):
    ours, theirs = both
    ids = theirs(text, padding="max_length", max_length=77, truncation=True).input_ids
    np.testing.assert_array_equal(ours.encode(text), [ids])
    assert ours.fits(text) == (len(theirs(text).input_ids) <= 77)


@given(text=TEXTS, repeats=st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_rows_are_hcp_diffusions(both, text, repeats):
    """Its formula: 77·r positions as one, of which 1 … 75·r are cut in r parts."""
    ours, theirs = both
    length = 77 * repeats
    ids = theirs(text, padding="max_length", max_length=length, truncation=True).input_ids
    parts = np.reshape(ids[1 : 75 * repeats + 1], (repeats, 75))
    start, end = [theirs.bos_token_id], [theirs.eos_token_id]
    np.testing.assert_array_equal(
        ours.encode(text, repeats), [[*start, *part, *end] for part in parts]
    )


def test_padding_follows_the_model(tmp_path):
    """SD 2.x pads with `!`, and its older folders say so in special_tokens_map.json alone."""
    random_model.write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "special_tokens_map.json").write_text('{"pad_token": "!"}')
    theirs = CLIPTokenizer.from_pretrained(tmp_path)
    ids = theirs("a cat", padding="max_length", max_length=77, truncation=True).input_ids
    assert ids[-1] == 0
    np.testing.assert_array_equal(Tokenizer(tmp_path).encode("a cat"), [ids])


def test_vocabulary_size(folder, tmp_path):
    assert Tokenizer(folder).vocab_size == random_model.write_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_a_missing_or_damaged_file_is_named(tmp_path, name):
    random_model.write_tokenizer(tmp_path)
    (tmp_path / name).write_text("{")
    with pytest.raises(UserError, match=tmp_path.name):
        Tokenizer(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(UserError, match=name):
        Tokenizer(tmp_path)


def test_it_needs_neither_torch_nor_network(folder):
    code = f"""if True:
        import pathlib, sys
        def no_network(event, _):
            assert event not in ("socket.connect", "socket.getaddrinfo")
        sys.addaudithook(no_network)
        from jaxft.data.tokens import Tokenizer
        Tokenizer(pathlib.Path({str(folder)!r})).encode("a cat")
        assert "torch" not in sys.modules
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
