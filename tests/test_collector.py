"""While steps run, the collector looks for new garbage alone."""

import gc
import weakref

import pytest

from jaxft import collector


class Node:
    """Something that can be part of a cycle."""

    def __init__(self) -> None:
        self.itself = self


def test_new_garbage_is_found_and_what_was_there_is_not_searched():
    old = Node()
    seen = weakref.ref(old)
    with collector.spared():
        assert gc.get_freeze_count() > 10_000  # the interpreter's and its libraries'
        del old
        new = weakref.ref(Node())
        gc.collect()
        assert new() is None
        assert seen() is not None
    gc.collect()
    assert seen() is None


def test_all_is_searched_again_after_an_error():
    with pytest.raises(KeyboardInterrupt), collector.spared():
        raise KeyboardInterrupt
    assert gc.get_freeze_count() == 0
