"""`previewer` -> what is painted while training: read and checked before the first step."""

from pathlib import Path
from typing import Any, NamedTuple

from jaxft import config as configs
from jaxft import pictures, sample, sampling, words
from jaxft.config import Config
from jaxft.errors import UserError
from jaxft.formats.diffusers_folder import Model
from jaxft.sampling import Request, Work
from jaxft.words import Words


class Preview(NamedTuple):
    """Images to paint of weights in training."""

    config: Config
    """Of sampling; the model and how its text is read are those of the training."""
    model: Model
    """With the VAE and the sampler that paint them."""
    requests: list[Request]
    work: Work
    every: int
    """Updates between two."""
    weights: str
    """`trained`, `average` or `both`."""


def read(config: Config, model: Model, vocabulary: Words) -> Preview | None:
    """What a configuration of training wants to be painted; None: nothing.

    Raises:
        UserError: a file is missing or not usable, a prompt, the sampler or the size is wrong, or
            something is asked for that has no effect here.
    """
    options = config.previewer
    if options is None or options.infer_cfg is None:
        if options is not None and options.prompt_file is not None:
            raise UserError(
                "previewer.prompt_file: has no effect without previewer.infer_cfg; give one, such "
                "as configs/infer/preview.yaml"
            )
        return None
    if options.weights != "trained" and config.model.ema is None:
        raise UserError(
            f"previewer.weights: {options.weights}: no average is kept; set model.ema, or trained"
        )
    where = f"previewer.infer_cfg: {options.infer_cfg}"
    given = [
        f"pretrained_model={model.folder}",
        f"clip_skip={config.model.clip_skip}",
        f"clip_final_norm={str(config.model.clip_final_norm).lower()}",
    ]
    try:
        infer, _ = configs.load(options.infer_cfg, given, "infer")
        _check(infer)
        requests = _requests(infer, options.prompt_file, config.seed)
        model = sample.replace_components(model, infer.new_components)
        tokenizers = sample.make_tokenizers(model)
        words.teach(tokenizers, model, vocabulary.rows)
        work = sampling.prepare(requests, model, infer, tokenizers)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return Preview(infer, model, requests, work, options.every, options.weights)


def _check(infer: Config) -> None:
    """Raises UserError for what has no effect on images of weights in training."""
    if any(name != "load_ema" for name in infer.merge) or infer.merge.load_ema:
        raise UserError("merge: nothing is merged into weights that are trained; leave it out")
    if infer.emb_dir:
        raise UserError("emb_dir: prompts may say the words of tokenizer_pt; leave it out")
    if infer.controlnet:
        raise UserError("controlnet: it is the one that is trained, if there is one; leave it out")


def _requests(infer: Config, prompt_file: str | None, seed: int) -> list[Request]:
    """What to paint; seeds follow from that of the run where there are none."""
    first: Any = seed % 2**30 if infer.seed is None else infer.seed
    if prompt_file is None:
        return sample.make_requests(infer, first)
    try:
        lines = Path(prompt_file).expanduser().read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"previewer.prompt_file: {prompt_file}: {error}") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"previewer.prompt_file: {prompt_file}: there are no prompts in it")
    files = pictures.keys(infer)
    one = [infer.neg_prompt, *(file for file in files.values() if file)]
    if not isinstance(first, int) or not all(isinstance(value, str) for value in one):
        raise UserError(
            "previewer.prompt_file: give one seed, one neg_prompt and one picture of a kind in "
            "infer_cfg, not lists"
        )
    return [Request(text, infer.neg_prompt, first + n, files) for n, text in enumerate(prompts)]


def told(preview: Preview | None) -> list[str]:
    """The images as lines of the plan."""
    if preview is None:
        return []
    size = preview.config.infer_args
    which = {"trained": "weights", "average": "average", "both": "weights and their average"}
    return [
        f"{len(preview.requests)} images, {size.width} × {size.height}, of the "
        f"{which[preview.weights]}: before step 1, every {preview.every} updates and at the end",
        f"e.g. {preview.requests[0].prompt!r}",
    ]
