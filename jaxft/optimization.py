"""The optimizer that a configuration asks for: `train.optimizer`, `train.scheduler`, and what each
group says of its own."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import optax

from jaxft import compat
from jaxft.config import Config
from jaxft.errors import UserError
from jaxft.formats.diffusers_folder import Model
from jaxft.schema import same_target
from jaxft.selection import Selection
from jaxft.tuning import optimizers, schedules
from jaxft.tuning.groups import Group
from jaxft.words import PART

SCHEDULE_FREE = "AdamWScheduleFree"


class Steering(NamedTuple):
    """How gradients move weights."""

    rates: dict[str, schedules.Rate]
    """Of each group, in updates made."""
    optimizer: optax.GradientTransformation
    notices: list[str]


def from_config(config: Config, selected: Selection, model: Model, total_steps: int) -> Steering:
    """The optimizer of all groups.

    Args:
        config: the whole of it.
        selected: what is trained.
        model: of which.
        total_steps: updates of the run.

    Raises:
        UserError: an unknown name or option, or one that the optimizer does not have.
    """
    train, groups = config.train, selected.groups
    _check_precision(train, selected, model)
    rates, transforms = {}, {}
    for group in groups:
        if config.model.ema is not None and _averages(train, group):
            raise UserError(
                f"model.ema: {group.name} is trained by {SCHEDULE_FREE}, whose weights are an "
                "average already; leave model.ema out"
            )
        rates[group.name] = _rate(train, group, total_steps)
        transforms[group.name] = _transform(train, group, total_steps)
    notices, vectors = [], _groups_of_vectors(selected, model)
    if not train.decay_vectors and all(g.network == PART or g.name not in vectors for g in groups):
        notices.append("train.decay_vectors: false has no effect: no norm and no bias is trained")
    optimizer = optimizers.grouped(selected.labels, transforms, train.max_grad_norm)
    return Steering(rates, optimizer, notices)


def _check_precision(train: Config, selected: Selection, model: Model) -> None:
    if train.weights_dtype != "fp32" and selected.labels.keys().isdisjoint(model.parts):
        raise UserError(
            f"train.weights_dtype: {train.weights_dtype} is of layers that are trained in full, in "
            "unet: and text_encoder:, and there are none; leave it out"
        )


def _end(group: Group) -> str:
    """Of the keys of its optimizer and schedule: words have their own."""
    return "_pt" if group.network == PART else ""


def _rate(train: Config, group: Group, total_steps: int, factor: float = 1.0) -> schedules.Rate:
    options = train[f"scheduler{_end(group)}"]
    return schedules.schedule(
        options.name,
        group.lr * factor,
        options.num_warmup_steps,
        options.num_training_steps or total_steps,
        **options.scheduler_kwargs.to_dict(),
    )


def _transform(train: Config, group: Group, total_steps: int) -> optax.GradientTransformation:
    """A group's optimizer; of a LoRA's `up` and of norms and biases another, where they differ."""
    rate = _rate(train, group, total_steps)
    variants = {"": _build(train, group, rate)}
    if not train.decay_vectors and group.network != PART:
        variants["vector"] = _build(train, group, rate, weight_decay=0.0)
    if group.up_ratio != 1:
        variants["up"] = _build(train, group, _rate(train, group, total_steps, group.up_ratio))

    def choose(name: str, weight: Any) -> str:
        if "vector" in variants and optimizers.is_vector(name, weight.ndim):
            return "vector"
        return "up" if "up" in variants and name.endswith(".up") else ""

    return optimizers.split(variants, choose)


def _build(train: Config, group: Group, rate: schedules.Rate, **forced: Any) -> Any:
    where, node = f"train.optimizer{_end(group)}", train[f"optimizer{_end(group)}"].to_dict()
    built = compat.build(node | forced, "optimizer", where, learning_rate=rate)
    if group.optimizer:
        where, node = f"{group.name}.optimizer", _joined(node, group.optimizer) | forced
        return compat.build(node, "optimizer", where, learning_rate=rate)
    return built


def _averages(train: Config, group: Group) -> bool:
    name = _joined(train[f"optimizer{_end(group)}"].to_dict(), group.optimizer)["_target_"]
    return f".{name}".endswith(f".{SCHEDULE_FREE}")


def _joined(node: dict[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer with a group's options; another one has none of the first one's."""
    return node | {**own} if same_target(node, {**own}) else {**own}


def _groups_of_vectors(selected: Selection, model: Model) -> set[str]:
    """Groups that train norms or biases."""
    return {
        group
        for part, labels in selected.labels.items()
        for name, group in labels.items()
        if optimizers.is_vector(name, _ndim(model, part, name))
    }


def _ndim(model: Model, part: str, name: str) -> int:
    return len(model.parts[part].params[name].shape) if part in model.parts else 2


def told(train: Config, groups: Sequence[Group]) -> list[str]:
    """The optimizers as lines of the plan, each with the groups that it moves."""
    lines: dict[str, list[str]] = {}
    for group in groups:
        node = _joined(train[f"optimizer{_end(group)}"].to_dict(), group.optimizer)
        name = node.pop("_target_").rpartition(".")[2]
        options = [f"{key} {value}" for key, value in node.items() if key[0] != "_"]
        lines.setdefault(" ".join([name, *options]), []).append(group.name)
    told = [f"{line}: {', '.join(names)}" for line, names in lines.items()]
    if train.weights_dtype != "fp32":
        told.append(f"weights of layers in {train.weights_dtype}, rounded up or down by chance")
    return told
