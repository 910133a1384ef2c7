"""What a run leaves behind: its numbers, part files, the finished model."""

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from jaxft import controls, low_rank, params, selection, tensor_file, words
from jaxft import mesh as meshes
from jaxft.compiled import Metrics
from jaxft.config import Config
from jaxft.data.records import Record
from jaxft.diffusion import losses
from jaxft.errors import UserError
from jaxft.formats import controlnet, diffusers_folder, embeddings, hcp, lora, modelspec, webui
from jaxft.formats.diffusers_folder import Component, Model
from jaxft.log import RunLog
from jaxft.low_rank import Lora
from jaxft.plan import Plan
from jaxft.shapes import NEGATIVE

Trained = Mapping[str, Mapping[str, Any]]
"""What was trained, on the host: network -> weights, `lora_<network>` -> factors."""

Kinds = dict[str, dict[str, Any]]
"""What a part file holds: kind (`base`, `lora`) -> name -> array."""

IN_FLIGHT = 2
"""Steps whose numbers are not waited for."""

MAX_SKIPPED = 3
"""Updates in a row without a finite gradient that end a run."""


class Numbers:
    """The numbers of steps, fetched when later steps are under way, checked and logged."""

    def __init__(self, plan: Plan, log: RunLog):
        self._plan, self._log = plan, log
        self._every = {*log_steps(plan.config).values()}
        self._ranges = losses.range_names(len(plan.noising.alphas_cumprod))
        self._skipped = 0
        self._pending: deque[tuple[int, Metrics]] = deque()

    def add(self, step: int, metrics: Metrics) -> None:
        """Takes the numbers of a step; those of earlier steps are dealt with.

        Raises:
            UserError: too many updates in a row had no finite gradient.
        """
        self._pending.append((step, metrics))
        while len(self._pending) > IN_FLIGHT:
            self._settle(*self._pending.popleft())

    def flush(self) -> None:
        """Deals with all numbers."""
        while self._pending:
            self._settle(*self._pending.popleft())

    def _settle(self, step: int, on_device: Metrics) -> None:
        metrics = meshes.fetch(on_device)
        grad_norm = float(metrics.grad_norm)
        self._skipped = 0 if math.isfinite(grad_norm) else self._skipped + 1
        if self._skipped:
            self._log.message(f"step {step}: the gradient is not finite; the update is left out")
        if self._skipped >= MAX_SKIPPED:
            raise UserError(
                f"step {step}: {self._skipped} updates in a row without a finite gradient; lower "
                "the rates, or compute in float32 (mixed_precision=no), and resume"
            )
        plan, names = self._plan, [dataset.name for dataset in self._plan.datasets]
        by_range = [dict(zip(self._ranges, own.T, strict=True)) for own in metrics.by_range]
        told = {} if self._skipped else dict(zip(names, by_range, strict=True))
        self._log.count(plan.images_per_step, told)
        if all(step % every for every in self._every) and step not in (1, plan.total_steps):
            return
        means = metrics.losses.mean(axis=1).tolist()
        memory = meshes.most_held(plan.mesh)
        self._log.record(
            step,
            epoch=int(plan.epoch(step - 1)),
            total=float(np.dot(means, [dataset.loss_weight for dataset in plan.datasets])),
            loss=dict(zip(names, means, strict=True)),
            lr={name: float(rate(step - 1)) for name, rate in plan.rates.items()},
            grad_norm=grad_norm,
            grad_norms={name: float(norm) for name, norm in metrics.grad_norms.items()},
            update_ratios={name: float(ratio) for name, ratio in metrics.update_ratios.items()},
            **({} if memory is None else {"memory_gib": memory}),
        )


def log_steps(config: Config) -> dict[str, int]:
    """Of each log, updates between two of its records."""
    own = config.logger.log_step.items()
    return {name: config.train.log_step if count is None else count for name, count in own}


def parts_of(plan: Plan, trained: Trained, average: Trained) -> dict[str, Kinds]:
    """File (`unet`, `text_encoder`) -> what HCP-Diffusion has in it; `average` may be empty."""
    kinds = {}
    for ending, weights in {"": trained, "_ema": average}.items():
        if weights:
            own = {network: weights[network] for network in weights if network in plan.model.parts}
            factors = selection.lora(plan.selection, weights)
            kinds |= {f"base{ending}": own, f"lora{ending}": lora.hcp_names(factors)}
    files: dict[str, Kinds] = {}
    for kind, networks in kinds.items():
        for file, named in hcp.by_file(networks, plan.model.family.is_xl).items():
            files.setdefault(file, {})[kind] = named
    return files


Learned = dict[str, tuple[np.ndarray, Sequence[int]]]
"""Word -> its rows, and the widths of the model's text encoders."""


def words_of(plan: Plan, trained: Trained) -> Learned:
    """The words that were trained."""
    widths = embeddings.widths(plan.model.configs)
    return {word: (rows, widths) for word, rows in trained.get(words.PART, {}).items()}


class Parts:
    """Part files and words of a run, `unet-<step>.safetensors`, written in the background."""

    def __init__(self, folder: Path, dtype: str, texts: Mapping[str, str]):
        """`texts`: of the training, for the headers; the same for a resumed run, as the weights."""
        self._folder, self._dtype, self._texts = folder, dtype, texts
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="parts")
        self._writing: Future[None] | None = None

    def write(self, step: int, files: Mapping[str, Kinds], learned: Learned) -> None:
        """Starts to write `<file or word>-<step>.safetensors`; waits for those before."""
        self._wait()

        def run() -> None:
            texts = {**self._texts, "ss_steps": str(step)}
            for name, kinds in files.items():
                hcp.write(self._folder / f"{name}-{step}.safetensors", kinds, self._dtype, texts)
            for word, (rows, widths) in learned.items():
                file = self._folder / f"{word}-{step}.safetensors"
                embeddings.write(file, rows, widths, self._dtype, texts)

        self._writing = self._thread.submit(run)

    def close(self) -> None:
        """Returns when the last file is written."""
        self._wait()
        self._thread.shutdown()

    def _wait(self) -> None:
        writing, self._writing = self._writing, None
        try:
            if writing is not None:
                writing.result()
        except OSError as error:
            raise UserError(f"{self._folder}: the weights were not written: {error}") from error


def merged(plan: Plan, trained: Trained) -> Model:
    """The finished model: the base with what was trained, a ControlNet among its networks."""
    factors = selection.lora(plan.selection, trained)
    parts = {}
    for network, component in plan.model.parts.items():
        if network in trained or network in factors:
            weights = {**component.params, **trained.get(network, {})}
            weights = low_rank.merge(weights, factors.get(network, {}))
            parts[network] = component._replace(params=weights)
    return plan.model.replace(**parts)


def export(plan: Plan, trained: Trained, average: Trained, folder: Path) -> Iterator[Path]:
    """Writes the finished model to `folder/export`, in the formats that the configuration names,
    and the LoRA, if one was trained; of the weights or of their average, as it says."""
    config = plan.config.export
    target = folder / "export" / folder.name
    chosen = {
        "trained": {"": trained},
        "average": {"": average},
        "both": {"": trained, "-ema": average},
    }
    for ending, weights in chosen[config.weights if config else "trained"].items():
        yield from _export_words(plan, weights, target.parent, ending)
        if config:
            yield from _export(plan, weights, target.with_name(f"{target.name}{ending}"))


def _export(plan: Plan, trained: Trained, target: Path) -> Iterator[Path]:
    formats = plan.config.export
    factors = selection.lora(plan.selection, trained)
    sides: dict[str, Lora] = {}
    for network, layers in factors.items():
        base = network.removeprefix(NEGATIVE)
        sides.setdefault("" if base == network else "-neg", {})[base] = layers
    for ending, own in sides.items() if formats.get("lora") else ():
        file = target.with_name(f"{target.name}-lora{ending}.safetensors")
        lora.write_kohya(file, own, plan.model.configs, formats["lora"], described(plan))
        yield file
    if selection.has_branches(plan.selection):
        return  # no model has weights for negative prompts alone
    model = merged(plan, trained)
    if own := model.parts.pop(controls.PART, None):
        yield from _export_controlnet(plan, own, target.with_name(f"{target.name}-controlnet"))
    if trained.keys() <= {words.PART, controls.PART}:
        return  # the model is as it was
    if formats.get("webui"):
        file = target.with_name(f"{target.name}.safetensors")
        webui.write(file, model, formats["webui"], described(plan))
        yield file
    if formats.get("diffusers"):
        diffusers_folder.write(target, model, formats["diffusers"])
        yield target


def _export_controlnet(plan: Plan, component: Component, target: Path) -> Iterator[Path]:
    """Writes a ControlNet as webuis read it, and as a folder; of XL they read diffusers' names."""
    formats = plan.config.export
    if dtype := formats.get("webui"):
        file = target.with_name(f"{target.name}.safetensors")
        if plan.model.family.is_xl:
            tensor_file.write(file, component.params, described(plan), params.DTYPES[dtype])
        else:
            controlnet.write_file(file, component, dtype, described(plan))
        yield file
    if formats.get("diffusers"):
        controlnet.write_folder(target, component, formats["diffusers"])
        yield target


def _export_words(plan: Plan, trained: Trained, folder: Path, ending: str) -> Iterator[Path]:
    """Writes the words to `folder`, and to `emb_dir` if they are to be there."""
    where, options = {}, plan.config.tokenizer_pt
    if dtype := (plan.config.export or {}).get("words"):
        where[folder] = dtype
    if options.replace:
        where[Path(options.emb_dir).expanduser()] = "fp32"
    for place, dtype in where.items():
        for word, (rows, widths) in words_of(plan, trained).items():
            header = modelspec.header(plan.model.configs, word, "textual-inversion")
            file = place / f"{word}{ending}.safetensors"
            embeddings.write(file, rows, widths, dtype, header | described(plan))
            yield file


def lasting(plan: Plan) -> dict[str, str]:
    """Of `described`, what is the same whenever and wherever the run is repeated."""
    passing = ("modelspec.date", "ss_output_name")
    return {key: text for key, text in described(plan).items() if key not in passing}


def described(plan: Plan) -> dict[str, str]:
    """What the header of a trained file says of its training."""
    config, train = plan.config, plan.config.train
    recipes = {id(record.recipe): record.recipe for record in _records(plan)}
    called = {
        word
        for recipe in recipes.values()
        for name, word in recipe.word_names.items()
        if word and name.startswith("pt")
    }
    rates = {group.network: group.lr for group in reversed(plan.selection.groups)}
    settings = {
        "output_name": Path(config.exp_dir).name,
        **{f"{network}_lr": rate for network, rate in rates.items()},
        "optimizer": train.optimizer["_target_"],
        "lr_scheduler": train.scheduler.name,
        "lr_warmup_steps": train.scheduler.num_warmup_steps,
        "steps": plan.total_steps,
        "epoch": math.ceil(plan.epoch(plan.total_steps)),
        "num_train_images": sum(len(dataset.records) for dataset in plan.datasets),
        "total_batch_size": plan.images_per_step,
        "gradient_accumulation_steps": plan.accumulation,
        "max_grad_norm": train.max_grad_norm,
        "mixed_precision": config.mixed_precision,
        "clip_skip": config.model.clip_skip,
        "seed": config.seed,
    }
    return modelspec.training(
        base=config.model.pretrained_model_name_or_path,
        captions=(text for record in _records(plan) for text in record.captions),
        words=sorted(called | plan.words.groups.keys()),
        settings=settings,
    )


def _records(plan: Plan) -> Iterator[Record]:
    return (record for dataset in plan.datasets for record in dataset.records)
