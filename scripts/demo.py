"""From photographs to a picture and a webui file, in minutes, without a GPU or a download.

Makes a tiny model with random weights and a folder of captioned photographs in `demo/`, then runs
the commands that a user would run. The model has learnt nothing, so what it paints is noise.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import random_model
import skimage
import sklearn.datasets
from PIL import Image

FOLDER = Path("demo")
SKIMAGE = Path(skimage.__file__).parent / "data"
SKLEARN = Path(sklearn.datasets.__file__).parent / "images"
PHOTOGRAPHS = {
    SKIMAGE / "astronaut.png": "a portrait of an astronaut in an orange suit",
    SKIMAGE / "chelsea.png": "a close-up of a ginger cat",
    SKIMAGE / "coffee.png": "a cup of coffee on a wooden table",
    SKIMAGE / "rocket.jpg": "a rocket on its launch pad at night",
    SKLEARN / "china.jpg": "a chinese temple behind trees",
    SKLEARN / "flower.jpg": "a red dahlia on a dark background",
}


def write_photographs(folder: Path) -> None:
    """Captioned photographs, each whole and as an upright cut."""
    folder.mkdir(parents=True)
    for path, caption in PHOTOGRAPHS.items():
        with Image.open(path) as image:
            photo = image.convert("RGB")
        width, height = photo.size
        left = (width - 2 * height // 3) // 2
        cut = photo.crop((left, 0, left + 2 * height // 3, height))
        for name, picture in ((path.stem, photo), (f"{path.stem}_upright", cut)):
            picture.thumbnail((256, 256))
            picture.save(folder / f"{name}.png")
            (folder / f"{name}.txt").write_text(f"{caption}\n")


def run(*command: str) -> None:
    """Shows a command and runs it."""
    print("\n$ python", *command, flush=True)
    subprocess.run([sys.executable, *command], check=True)


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    random_model.write(FOLDER / "model")
    write_photographs(FOLDER / "photos")
    run("-m", "jaxft.train", "--config", "configs/train/examples/demo.yaml")
    run(
        *("-m", "jaxft.sample", "--config", "configs/infer/t2i_part.yaml"),
        *("pretrained_model=demo/model", "part_path=demo/run/ckpts/unet-60.safetensors"),
        *("prompt=a cup of coffee on a wooden table", "seed=0", "bs=2", "dtype=fp32"),
        *("infer_args.width=128", "infer_args.height=128", "infer_args.num_inference_steps=20"),
        "save.out_dir=demo/pictures",
    )
    picture = sorted((FOLDER / "pictures").glob("*.png"))[0]
    print(f"\npicture    {picture}\nwebui file {FOLDER / 'run' / 'export' / 'run.safetensors'}")


if __name__ == "__main__":
    main()
