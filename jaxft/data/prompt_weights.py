"""Prompts with weighted words, as HCP-Diffusion writes them: `a {cat:1.3} in a {hat}`."""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from jaxft.data.tokens import ROW, Tokenizer
from jaxft.errors import UserError

DEFAULT_WEIGHT = 1.1
"""Of text in braces without a number."""


class WeightedText(NamedTuple):
    """A prompt without its braces."""

    text: str
    weights: list[float]
    """One for each character of the text; 1 outside braces."""


def parse(prompt: str) -> WeightedText:
    """Takes `{text:1.2}` and `{text}` (1.1) apart; weights of nested braces are multiplied.

    Raises:
        UserError: a brace without its partner, or something after a `:` that is no number.
    """
    text: list[str] = []
    weights: list[float] = []
    opened: list[int] = []
    for character in prompt:
        if character == "{":
            opened.append(len(text))
        elif character == "}" and opened:
            start = opened.pop()
            content, colon, number = "".join(text[start:]).rpartition(":")
            if colon:
                del text[start + len(content) :], weights[start + len(content) :]
            factor = _number(number, prompt) if colon else DEFAULT_WEIGHT
            weights[start:] = [weight * factor for weight in weights[start:]]
        elif character == "}":
            raise UserError(f"prompt: }} without {{ before it in {prompt!r}")
        else:
            text.append(character)
            weights.append(1.0)
    if opened:
        raise UserError(f"prompt: {{ without }} after it in {prompt!r}")
    return WeightedText("".join(text), weights)


def _number(text: str, prompt: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UserError(
            f"prompt: after ':' in braces comes a number, as in {{cat:1.2}}, not {text!r}, "
            f"in {prompt!r}"
        )
    return number


class WeightedTokenizer(Tokenizer):
    """A tokenizer that understands weights."""

    def encode_weighted(
        self, prompt: WeightedText, repeats: int = 1
    ) -> tuple[Int[np.ndarray, "repeats 77"], Float[np.ndarray, " s"]]:
        """Ids of the text, and the weights of its s = 75·repeats + 2 joined text states.

        A token has the weight of its first character, an added word in all of its rows; start, end
        and padding have 1.
        """
        capacity = (ROW - 2) * repeats
        weights = np.ones(capacity + 2, np.float32)
        for position, (_, start) in enumerate(self._tokens(prompt.text)[:capacity]):
            weights[1 + position] = prompt.weights[start]
        return self.encode(prompt.text, repeats), weights
