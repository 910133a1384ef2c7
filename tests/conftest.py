"""What the tests share: a tiny model written by PyTorch's diffusers, and a compile cache."""

import gc
import os
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).parent.parent


def xla_flags(devices: int) -> str:
    """XLA's flags for processes of tests: so many CPU devices, and code that is made in a sixth of
    the time, by runs too short to be worth a better one."""
    flags = [
        f"force_host_platform_device_count={devices}",
        "backend_optimization_level=0",
        "cpu_use_fusion_emitters=false",
        "cpu_parallel_codegen_split_count=1",
    ]
    return " ".join(f"--xla_{flag}" for flag in flags)


os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", xla_flags(devices=4))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads for tiny layers only wait for each other
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import pytest  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

import tests.typecheck  # noqa: E402, F401
from tests.weights import randomise  # noqa: E402

CHECKED = ["jaxft.models", "jaxft.prediction", "jaxft.step"]
install_import_hook(CHECKED, "tests.typecheck.check")  # shapes and types, at every call

warnings.filterwarnings("ignore", module="diffusers|transformers|torch|beartype")


def pytest_collection_finish():
    """What is imported stays: Python's collector need not look through it again and again."""
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory: pytest.TempPathFactory):
    """diffusers' StableDiffusionPipeline: SD 1.5's topology, tiny widths, random weights."""
    import random_model
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    size = random_model.write_tokenizer(folder)
    text = CLIPTextConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        vocab_size=size,
        bos_token_id=size - 2,
        eos_token_id=size - 1,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 32, 64, 64),
        norm_num_groups=16,
        cross_attention_dim=32,
        attention_head_dim=4,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 16, 16, 16),
        layers_per_block=2,
        norm_num_groups=8,
        sample_size=64,
    )
    return StableDiffusionPipeline(
        unet=randomise(unet, 1),
        vae=randomise(vae, 2),
        text_encoder=randomise(CLIPTextModel(text), 3),
        tokenizer=CLIPTokenizer.from_pretrained(folder),
        scheduler=DDIMScheduler(**random_model.SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.fixture(scope="session")
def tiny_model(tiny_pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that diffusers writes for `tiny_pipeline`. Not to be written to."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def seeded():
    """PyTorch's layers begin with the same weights in every run, whichever tests ran before."""
    import torch

    torch.manual_seed(0)


@pytest.fixture
def rng():
    """numpy's generator with a fixed seed."""
    import numpy as np

    return np.random.default_rng(0)


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """No network, and another working directory."""

    import socket

    def refuse(*_):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def nano_model(tiny_pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model like `tiny_model` whose UNet has two levels, so that a gradient compiles in a fifth
    of the time. Not to be written to."""
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=16,
        attention_head_dim=2,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=64,
    )
    text = tiny_pipeline.text_encoder.config.to_dict()
    text |= {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2}
    folder = tmp_path_factory.mktemp("model") / "nano"
    StableDiffusionPipeline(
        unet=randomise(unet, 4),
        vae=randomise(vae, 5),
        text_encoder=randomise(CLIPTextModel(CLIPTextConfig(**text)), 6),
        tokenizer=tiny_pipeline.tokenizer,
        scheduler=tiny_pipeline.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Family -> the pipeline, and the folder that diffusers wrote for it; each made once. Not to
    be written to."""
    from tests.pipelines import make_pipeline

    made = {}

    def make(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp("families")
            pipeline = make_pipeline(kind, folder / "tokenizer")
            pipeline.save_pretrained(folder / "model")
            made[kind] = pipeline, folder / "model"
        return made[kind]

    return make


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a file below the working directory, which is a fresh folder."""
    monkeypatch.chdir(tmp_path)

    def to(name: str, text: str) -> str:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return name

    return to
