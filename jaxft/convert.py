"""`python -m jaxft.convert`: files of models, LoRAs and words from one form into another.

to-webui      --model_path DIR|FILE --save_path FILE [--half]
to-diffusers  --model_path FILE|DIR --save_path DIR [--config DIR]   (from-webui: the same)
controlnet    --model_path DIR|FILE --save_path FILE|DIR [--half]
lora          --lora_path FILE [FILE] --model DIR --to kohya|peft|hcp --save_path PATH
embedding     FILE --save_path FILE
create-embedding  MODEL WORD ROWS [--init_text TEXT] [--root DIR] [--replace]
merge         --model_path DIR|FILE --save_path DIR [--part FILE[=ALPHA]] [--lora FILE[=ALPHA]]
extract-lora  --base DIR --tuned DIR --rank N --save_path FILE
inspect PATH  what a file or folder is
verify A B    do diffusers' own loaders see the same model in both?
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from jaxft import inspection, low_rank, merging, params, pickled, tensor_file, verify, words
from jaxft.builtin.names import resolve
from jaxft.cli import run
from jaxft.errors import UserError
from jaxft.formats import (
    controlnet,
    diffusers_folder,
    embeddings,
    flax_folder,
    layout,
    lora,
    modelspec,
    single_file,
    webui,
)
from jaxft.formats.diffusers_folder import Model
from jaxft.merging import Addition

PICKLED = (".ckpt", ".pt", ".pth", ".bin")
LORA_FORMS = ("kohya", "peft", "hcp")


def main(argv: Sequence[str] | None = None) -> int:
    """The program; returns its exit code. Raises UserError for the user's mistakes."""
    args = _parser().parse_args(argv)
    return args.run(args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("jaxft convert", description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("to-webui", help="diffusers folder -> one safetensors file")
    add_to_webui_arguments(command)
    command.set_defaults(run=to_webui)

    for name, what in (
        ("to-diffusers", "anything -> diffusers folder"),
        ("from-webui", "the same"),
    ):
        command = commands.add_parser(name, help=what)
        command.add_argument(
            "--model_path",
            required=True,
            type=Path,
            help="webui file, .ckpt, folder with .bin weights, or folder of the Flax models",
        )
        command.add_argument("--save_path", required=True, type=Path, help="folder to write")
        command.add_argument(
            "--config",
            help="diffusers folder (or hub model) of the same architecture, where it is not a "
            "published one: its configurations and tokenizer are taken",
        )
        command.set_defaults(run=to_diffusers)

    command = commands.add_parser("controlnet", help="ControlNet: folder -> file, file -> folder")
    command.add_argument("--model_path", required=True, type=Path, help="diffusers folder or file")
    command.add_argument("--save_path", required=True, type=Path, help="file or folder to write")
    command.add_argument("--half", action="store_true", help="store half-precision weights")
    command.set_defaults(run=convert_controlnet)

    _add_lora_commands(commands)
    command = commands.add_parser("inspect", help="what a file or folder is")
    command.add_argument("path", type=resolve, help="a file, a folder, or builtin:demo")
    command.set_defaults(run=inspect)

    command = commands.add_parser("verify", help="compare two models in diffusers (needs torch)")
    command.add_argument("a", type=resolve, metavar="A", help="diffusers folder or webui file")
    command.add_argument("b", type=resolve, metavar="B", help="diffusers folder or webui file")
    command.add_argument(
        "--tolerance",
        type=float,
        default=verify.TOLERANCE,
        help="largest difference allowed, as a share of the output's largest value (%(default)s)",
    )
    command.set_defaults(run=lambda args: verify.verify(args.a, args.b, args.tolerance))
    return parser


def _add_lora_commands(commands: Any) -> None:
    command = commands.add_parser("lora", help="a LoRA -> another form, rank and alpha kept")
    command.add_argument("--lora_path", required=True, nargs="+", type=Path, help="file or files")
    command.add_argument("--model", required=True, help="diffusers folder of its base model")
    command.add_argument("--to", required=True, choices=LORA_FORMS, help="form to write")
    command.add_argument(
        "--save_path", required=True, type=Path, help="file (hcp: folder of one file a network)"
    )
    command.add_argument("--dtype", choices=params.DTYPES, help="precision (as it is)")
    command.set_defaults(run=convert_lora)

    command = commands.add_parser("merge", help="a model with parts and LoRAs merged in")
    command.add_argument(
        "--model_path", required=True, help="diffusers folder, webui file, hub model"
    )
    command.add_argument("--save_path", required=True, type=Path, help="folder to write")
    for kind, what in (("part", "unet-N or text_encoder-N .safetensors"), ("lora", "LoRA file")):
        command.add_argument(
            f"--{kind}", action="append", default=[], metavar="FILE[=ALPHA]", help=what
        )
    command.add_argument("--base_model_alpha", type=float, default=0.0, help="W's share in parts")
    command.add_argument("--layers", nargs="+", default="all", help="patterns of layers (all)")
    command.add_argument("--ema", action="store_true", help="moving averages of HCP-Diffusion")
    command.add_argument("--dtype", choices=params.DTYPES, help="precision (as it is)")
    command.set_defaults(run=merge)

    command = commands.add_parser("embedding", help="the embedding of a word -> safetensors")
    command.add_argument("embedding", type=Path, metavar="FILE", help=".pt, .bin or .safetensors")
    command.add_argument("--save_path", required=True, type=Path, help="WORD.safetensors")
    command.add_argument("--dtype", choices=params.DTYPES, help="precision (float32)")
    command.set_defaults(run=convert_embedding)

    command = commands.add_parser("create-embedding", help="a new word, to be trained")
    command.add_argument("model", help="diffusers folder, webui file, hub model")
    command.add_argument("word", help="what prompts will say")
    command.add_argument("n_word", type=int, metavar="ROWS", help="places that it takes")
    command.add_argument(
        "--init_text", help="words to begin as, and *[0.017,3]: three rows of random numbers (all)"
    )
    command.add_argument("--root", type=Path, default=Path("embs"), help="folder (%(default)s)")
    command.add_argument("--replace", action="store_true", help="write over a word of this name")
    command.add_argument("--seed", type=int, default=0, help="of random numbers (%(default)s)")
    command.set_defaults(run=create_embedding)

    command = commands.add_parser("extract-lora", help="the difference of two models as a LoRA")
    command.add_argument("--base", required=True, help="diffusers folder, before training")
    command.add_argument("--tuned", required=True, help="diffusers folder, after it")
    command.add_argument("--rank", type=int, default=16, help="of each layer (%(default)s)")
    command.add_argument("--save_path", required=True, type=Path, help="file, kohya's form")
    command.add_argument("--dtype", choices=params.DTYPES, default="fp16", help="(%(default)s)")
    command.set_defaults(run=extract_lora)


def add_to_webui_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `to-webui`, those of HCP-Diffusion's `diffusers2sd`."""
    parser.add_argument(
        "--model_path", required=True, help="diffusers folder, webui file, hub model"
    )
    parser.add_argument("--save_path", required=True, type=Path, help="file to write")
    parser.add_argument("--half", action="store_true", help="store half-precision weights")
    parser.add_argument(
        "--use_safetensors", action="store_true", help="always so; accepted for old scripts"
    )


def to_webui(args: argparse.Namespace) -> int:
    """Writes a diffusers folder as one file; weights keep their dtype unless `--half`."""
    path: Path = args.save_path
    if path.suffix in PICKLED:
        raise UserError(f"--save_path {path}: only safetensors is written; name it .safetensors")
    if path.suffix != ".safetensors":
        path = path.with_name(path.name + ".safetensors")
    if path.is_dir():
        raise UserError(f"--save_path {path}: a folder of this name is in the way")
    model = _model(args.model_path)
    webui.write(path, model, "fp16" if args.half else None)
    print(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)")
    return 0


def to_diffusers(args: argparse.Namespace) -> int:
    """Writes whatever holds a model as a diffusers folder; weights keep their dtype."""
    diffusers_folder.check_replaceable(args.save_path)
    source: Path = args.model_path
    if source.is_dir():
        model = flax_folder.read(source) if flax_folder.is_one(source) else _with_pickles(source)
    else:
        model, told = single_file.read(source, args.config, _tensors)
        print("\n".join(told))
    diffusers_folder.write(args.save_path, model, dtype=None)
    print(f"wrote {args.save_path} ({model.family.title})")
    return 0


def _model(name: str) -> Model:
    """A model wherever it is; what is told of how it was read is printed."""
    model, told = single_file.open_model(name)
    print("\n".join(told), end="\n" if told else "")
    return model


def _tensors(path: Path) -> dict[str, Any]:
    return pickled.read(path) if path.suffix in PICKLED else tensor_file.read(path)


def _with_pickles(folder: Path) -> Model:
    """The model in a diffusers folder, pickled weights (.bin) among its files or not."""
    configs = diffusers_folder.read_configs(folder)
    parts = {}
    for part in configs.parts:
        file = folder / part / f"{layout.PICKLES[part]}.bin"
        stored = pickled.read(file) if file.is_file() else None
        parts[part] = diffusers_folder.read_part(folder, part, configs, stored)
    tokenizers = layout.find_tokenizers(folder)
    return Model(configs.family, parts, configs.scheduler, tokenizers, folder)


def convert_controlnet(args: argparse.Namespace) -> int:
    """Writes a ControlNet's folder as one file, or its file as a folder."""
    source: Path = args.model_path
    dtype = "fp16" if args.half else None
    if source.is_dir():
        controlnet.write_file(args.save_path, controlnet.read_folder(source), dtype)
    else:
        component = controlnet.from_file(source, _tensors(source))
        controlnet.write_folder(args.save_path, component, dtype)
    print(f"wrote {args.save_path}")
    return 0


def convert_lora(args: argparse.Namespace) -> int:
    """Writes LoRA files, one for each network or one for all, in another form."""
    configs = diffusers_folder.read_configs(layout.locate(args.model))
    joined: low_rank.Lora = {}
    texts: dict[str, str] = {}
    for path in args.lora_path:
        for part, layers in lora.read(path, configs).items():
            if part in joined:
                raise UserError(f"--lora_path: {path} has layers of {part}, as a file before it")
            joined[part] = layers
        texts |= modelspec.carried(tensor_file.read_header(path).metadata)
    path: Path = args.save_path
    if args.to == "hcp":
        lora.write_hcp(path, joined, args.dtype)
    elif args.to == "peft":
        lora.write_peft(path, joined, args.dtype, texts)
    else:
        lora.write_kohya(path, joined, configs, args.dtype, texts)
    counts = ", ".join(f"{len(layers)} layers of {part}" for part, layers in joined.items())
    print(f"wrote {path} ({counts})")
    return 0


def convert_embedding(args: argparse.Namespace) -> int:
    """Writes an embedding in the form that webuis, diffusers and `emb_dir` read."""
    source, path = args.embedding, args.save_path
    if path.suffix != ".safetensors":
        raise UserError(f"--save_path {path}: only safetensors is written, which webuis read too")
    stored = _tensors(source)
    outputs = [key for key in stored if key.endswith(embeddings.OUTPUT)]
    rows = embeddings.from_tensors({k: stored[k] for k in stored if k not in outputs}, str(source))
    kind = embeddings.kind(rows.shape[1], str(source))
    for key in outputs:
        print(f"left out {key}: OneTrainer alone adds it to the text encoder's output")
    embeddings.write(path, rows, kind.widths, args.dtype)
    print(f"wrote {path} ({embeddings.describe(*rows.shape)})")
    return 0


def create_embedding(args: argparse.Namespace) -> int:
    """Writes a new word, as HCP-Diffusion's `create_embedding`."""
    path = args.root / f"{args.word}.safetensors"
    if path.exists() and not args.replace:
        raise UserError(f"{path} exists; --replace writes over it")
    if args.n_word < 1:
        raise UserError(f"ROWS: {args.n_word} must be at least 1")
    model = _model(args.model)
    text = f"*[0.017, {args.n_word}]" if args.init_text is None else args.init_text
    rows = words.create(model, args.word, text, args.n_word, seed=args.seed)
    tokenizers = [words.Tokenizer(folder) for folder in model.tokenizers.values()]
    words.teach(tokenizers, model, {args.word: rows})  # whether the word is free
    embeddings.write(path, rows, embeddings.widths(model.configs))
    print(f"wrote {path} ({embeddings.describe(*rows.shape)})")
    return 0


def merge(args: argparse.Namespace) -> int:
    """Writes a model with W ← base_model_alpha · W + Σ alpha · V for parts, then LoRAs added."""
    diffusers_folder.check_replaceable(args.save_path)
    parts, loras = (
        [_with_alpha(text)._replace(layers=args.layers) for text in texts]
        for texts in (args.part, args.lora)
    )
    model = _model(args.model_path)
    model = merging.merge_parts(
        model, parts, base_model_alpha=args.base_model_alpha, average=args.ema
    )
    model = merging.merge_loras(model, loras, average=args.ema)
    diffusers_folder.write(args.save_path, model, args.dtype)
    print(f"wrote {args.save_path}")
    return 0


def _with_alpha(text: str) -> Addition:
    """FILE or FILE=ALPHA."""
    path, _, alpha = text.rpartition("=")
    if not path:
        return Addition(text)
    try:
        return Addition(path, float(alpha))
    except ValueError:
        raise UserError(f"{text}: after '=' comes a number, as in FILE=0.7") from None


def extract_lora(args: argparse.Namespace) -> int:
    """Writes what training changed in UNet and text encoders, layer by layer, as a LoRA."""
    if args.rank < 1:
        raise UserError(f"--rank: {args.rank} must be at least 1")
    base, tuned = map(_model, (args.base, args.tuned))
    if base.family != tuned.family:
        raise UserError(
            f"{args.base} is a {base.family.title}, {args.tuned} a {tuned.family.title}"
        )
    found: low_rank.Lora = {}
    for part, layers in lora.modules(base.configs).items():
        before, after = (model.parts[part].params for model in (base, tuned))
        params.check(after, before, args.tuned)
        for module in tqdm(layers, f"{part}: singular values", unit="layer"):
            pair = after[f"{module}.weight"], before[f"{module}.weight"]
            if np.any(np.asarray(pair[0]) != np.asarray(pair[1])):
                found.setdefault(part, {})[module] = low_rank.extract(*pair, args.rank)
    if not found:
        raise UserError(f"{args.tuned}: has the same layers as {args.base}")
    lora.write_kohya(args.save_path, found, base.configs, args.dtype)
    counts = ", ".join(f"{len(layers)} layers of {part}" for part, layers in found.items())
    print(f"wrote {args.save_path} ({counts}, rank {args.rank})")
    return 0


def inspect(args: argparse.Namespace) -> int:
    """Prints what a file or folder is."""
    print("\n".join(inspection.lines(args.path)))
    return 0


if __name__ == "__main__":
    run(main)
