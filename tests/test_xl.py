"""Stable Diffusion XL is trained with what diffusers' training script gives it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import yaml

from jaxft import params, step, tensor_file, train
from jaxft.diffusion import schedule
from jaxft.formats import diffusers_folder
from tests.data_fixtures import photo_folder


@pytest.mark.parametrize(("clip_skip", "final_norm"), [(0, True), (1, False), (2, False)])
def test_clip_skip_counts_layers_as_in_hcp_diffusion(folders, rng, clip_skip, final_norm):
    """Its `hidden_states[-clip_skip - 1]`, of which XL's own is 1: so say HCP-Diffusion's files."""
    pipeline, folder = folders("sdxl")
    model = diffusers_folder.read(str(folder))
    skip, norm = model.family.text_layer(clip_skip, final_norm)
    ours, theirs = [], []
    for name in model.family.text_encoders:
        part, network = model.parts[name], model.family.networks[name]
        graphdef, _ = params.abstract(lambda n=network, c=part.config: n(c))
        ids = rng.integers(1, 90, (1, 77))
        weights = jax.tree.map(jnp.asarray, part.params)
        ours.append(params.bind(graphdef, weights)(jnp.asarray(ids), skip, norm)[0])
        with torch.no_grad():
            found = getattr(pipeline, name)(torch.tensor(ids), output_hidden_states=True)
        theirs.append(found.hidden_states[-max(clip_skip, 1) - 1].numpy())
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)  # float32, three layers


def test_the_loss_is_that_of_diffusers_networks(folders, rng):
    pipeline, folder = folders("sdxl")
    model = diffusers_folder.read(str(folder))
    skip, norm = model.family.text_layer(0, True)
    networks, weights = {}, {}
    for name in ("unet", "text_encoder", "text_encoder_2"):
        config, network = model.parts[name].config, model.family.networks[name]
        networks[name] = params.abstract(lambda n=network, c=config: n(c))[0]
        weights[name] = jax.tree.map(jnp.asarray, model.parts[name].params)
    objective = step.Objective(
        networks, schedule.from_config(model.scheduler), 0.13025, jnp.float32, skip, norm
    )
    size = len(model.parts["text_encoder"].params["text_model.embeddings.token_embedding.weight"])
    ids = rng.integers(1, size - 2, (2, 2, 1, 77)).astype(np.int32)
    ids[..., -1] = size - 1
    batch = {
        "input_ids": ids[0],
        "input_ids_2": ids[1],
        "weight": np.ones(2, np.float32),
        "moments": rng.standard_normal((2, 4, 6, 8)).astype(np.float32),
        "time_ids": rng.uniform(0, 99, (2, 6)).astype(np.float32),
    }
    key = jax.random.key(3)
    trainable = {"unet": weights.pop("unet")}
    ours = jax.jit(lambda t, f, b: step.loss(objective, t, f, b, key))(trainable, weights, batch)

    def tensor(x):
        return torch.tensor(np.asarray(x).transpose(0, 3, 1, 2).copy())

    draws = step.draw(key, (2, 4, 6, 4), 1000)
    mean, log_variance = tensor(batch["moments"]).chunk(2, dim=1)
    latents = (mean + torch.exp(0.5 * log_variance) * tensor(draws.latent_noise)) * 0.13025
    noise, times = tensor(draws.noise.asked), torch.tensor(np.asarray(draws.timesteps)).long()
    noisy = pipeline.scheduler.add_noise(latents, noise, times)
    with torch.no_grad():
        encoded = [
            encoder(torch.tensor(part[:, 0]).long(), output_hidden_states=True)
            for encoder, part in zip(
                (pipeline.text_encoder, pipeline.text_encoder_2), ids, strict=True
            )
        ]
        states = torch.cat([found.hidden_states[-2] for found in encoded], dim=-1)
        added = {"text_embeds": encoded[1].text_embeds, "time_ids": torch.tensor(batch["time_ids"])}
        predicted = pipeline.unet(noisy, times, states, added_cond_kwargs=added).sample
    theirs = torch.nn.functional.mse_loss(predicted, noise).item()
    np.testing.assert_allclose(float(ours), theirs, rtol=1e-5)


@pytest.mark.parametrize("cached", [True, False])
def test_a_run_trains_the_layers_it_names(folders, tmp_path, cached):
    _, folder = folders("sdxl")
    tree = {
        "_base_": ["configs/train/examples/fine-tuning.yaml"],
        "exp_dir": str(tmp_path / "run"),
        "mixed_precision": "no",
        "unet": [{"lr": 1e-3, "layers": [r"re:.*\.to_k$"]}],
        "train": {"train_steps": 2, "save_step": 2, "scheduler": {"num_warmup_steps": 0}},
        "model": {"pretrained_model_name_or_path": str(folder), "gradient_checkpointing": False},
        "data": {
            "dataset1": {
                "batch_size": 1,
                "cache_latents": cached,
                "source": {"data_source1": {"img_root": str(photo_folder(tmp_path / "p", 2))}},
                "bucket": {"target_area": 64 * 64, "step_size": 32, "num_bucket": 1},
            }
        },
    }
    file = tmp_path / "xl.yaml"
    file.write_text(yaml.safe_dump(tree))
    assert train.main(["--config", str(file)]) == 0
    (part,) = (tmp_path / "run" / "ckpts").glob("unet-2.safetensors")
    assert all(".to_k." in key for key in tensor_file.read(part))
    (export,) = (tmp_path / "run" / "export").glob("*.safetensors")
    header = tensor_file.read_header(export)
    assert "conditioner.embedders.1.model.text_projection" in header.tensors
    assert header.metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base"
