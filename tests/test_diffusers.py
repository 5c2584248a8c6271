"""diffusers' `UNet2DModel` and schedulers: live networks and what the library saves of them, against `load`."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_score_sde import worst

from scoresde import VESDE, DiscreteVPSDE, RectifiedFlow, WrappedNet, load
from scoresde.interop import load_diffusers
from scoresde.interop.diffusers.schedules import betas_of

diffusers = pytest.importorskip("diffusers")

PLAIN = dict(down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"))
PLAIN |= dict(sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4)
DDPM = PLAIN | dict(
    freq_shift=1, flip_sin_to_cos=False, downsample_padding=0, attention_head_dim=None, norm_eps=1e-6, norm_num_groups=8
)
KINDS = {
    "ddpm": DDPM,
    "defaults": PLAIN | dict(block_out_channels=(16, 32)),
    "heads": PLAIN
    | dict(
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16, 16),
        attention_head_dim=4,
        downsample_padding=0,
        add_attention=False,
        time_embedding_dim=24,
    ),
    "wide": PLAIN | dict(sample_size=(8, 16), in_channels=1, out_channels=1, center_input_sample=True, dropout=0.2),
    "adm": PLAIN
    | dict(
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        downsample_type="resnet",
        upsample_type="resnet",
        resnet_time_scale_shift="scale_shift",
        attn_norm_num_groups=4,
        num_class_embeds=5,
    ),
    "resnet": PLAIN
    | dict(
        down_block_types=("ResnetDownsampleBlock2D", "DownBlock2D"),
        up_block_types=("ResnetUpsampleBlock2D", "UpBlock2D"),
        num_class_embeds=3,
    ),
    "unsized": PLAIN | dict(sample_size=None),
    "variance": DDPM | dict(out_channels=6),
}
SKIP = dict(
    sample_size=16,
    center_input_sample=True,
    time_embedding_type="fourier",
    down_block_types=("SkipDownBlock2D", "AttnSkipDownBlock2D", "SkipDownBlock2D"),
    up_block_types=("SkipUpBlock2D", "AttnSkipUpBlock2D", "SkipUpBlock2D"),
    block_out_channels=(32, 32, 64),
    layers_per_block=1,
    downsample_padding=1,
    attention_head_dim=None,
    norm_num_groups=None,
    norm_eps=1e-6,
    mid_block_scale_factor=2**0.5,
    freq_shift=0,
    flip_sin_to_cos=True,
)


def unet(options, seed=0):
    """A live network all of whose parameters are random."""
    net = diffusers.UNet2DModel(**options).eval()
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if not p.requires_grad:
                continue
            draw = torch.randn(p.shape, generator=g)
            norm = "norm" in name and p.dim() == 1 and name.endswith("weight")
            p.copy_(1 + 0.1 * draw if norm else draw * (0.1 if p.dim() == 1 else (p.shape[0] / p.numel()) ** 0.5))
    return net


def save(net, folder, scheduler=None, *, safe=True, place="unet"):
    """A pipeline's folder: the network in `unet/`, the scheduler's options in `scheduler/`."""
    net.save_pretrained(folder / place, safe_serialization=safe)
    (scheduler or diffusers.DDPMScheduler()).save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "DDPMPipeline"}))
    return folder


def images(net, batch=2, seed=1):
    size = net.config.sample_size or 8
    size = (size, size) if isinstance(size, int) else size
    return torch.randn(batch, net.config.in_channels, *size, generator=torch.Generator().manual_seed(seed))


STEPS = torch.tensor([10, 900])


def noise_at_steps(model, x, cond=None):
    with torch.no_grad():
        return model.noise(x, STEPS.double() / 999, cond)


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs(kind, safe, tmp_path):
    """The noise predicted at two steps of the schedule is what the live network returns there; classes are not optional."""
    net = unet(KINDS[kind])
    model = load(save(net, tmp_path, safe=safe))
    assert not model.training
    x, classes = images(net), torch.tensor([0, 2])
    cond = classes if net.config.num_class_embeds else None
    with torch.no_grad():
        expected = net(x, STEPS, **({} if cond is None else dict(class_labels=cond))).sample[:, : x.shape[1]]
    assert worst(noise_at_steps(model, x, cond), expected) < 1e-5
    if cond is not None:
        with pytest.raises(ValueError, match="needs class labels"):
            noise_at_steps(model, x)
    assert model.event_shape == (None if kind == "unsized" else tuple(x.shape[1:]))
    assert model.value_range == ((0.0, 1.0) if kind == "wide" else (-1.0, 1.0))


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_ncsnpp(safe, tmp_path):
    """With Fourier features and skip blocks, called with sigma, the live network returns the score."""
    net = unet(SKIP)
    model = load(save(net, tmp_path, diffusers.ScoreSdeVeScheduler(sigma_max=348.0), safe=safe))
    assert model.sde == VESDE(0.01, 348.0)
    sigma = torch.tensor([0.3, 40.0])
    x = images(net) * sigma[:, None, None, None]
    t = model.sde.time(-2 * sigma.double().log())
    with torch.no_grad():
        expected = net(x, sigma).sample
        assert worst(model.score(x, t), expected) < 1e-5
        assert worst(model.denoise(x, t), x + sigma[:, None, None, None] ** 2 * expected) < 1e-5
    wrapped = WrappedNet.diffusers(net, diffusers.ScoreSdeVeScheduler(sigma_max=348.0))
    with torch.no_grad():
        assert worst(wrapped.score(x, t), expected) < 1e-5
        assert worst(wrapped.denoise(x, t), model.denoise(x, t)) < 1e-5


def old_names(state):
    """The names that attention had in 2022."""
    pairs = (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn"))
    renamed = {}
    for name, value in state.items():
        for new, old in pairs:
            name = name.replace(f".{new}.", f".{old}.")
        renamed[name] = value
    assert any("proj_attn" in name for name in renamed)
    return renamed


def test_the_flat_layout_of_2022(tmp_path):
    """All in one folder, the scheduler's options beside the network's, attention under its old names, a `.bin` file."""
    net = unet(DDPM)
    model = load(save(net, tmp_path / "new"))
    old = tmp_path / "old"
    net.save_pretrained(old)
    state = old_names(load_file(old / "diffusion_pytorch_model.safetensors"))
    (old / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(state, old / "diffusion_pytorch_model.bin")
    (old / "scheduler_config.json").write_text((tmp_path / "new/scheduler/scheduler_config.json").read_text())
    x = images(net)
    with torch.no_grad():
        expected = net(x, STEPS).sample
    for path in (old, tmp_path / "new" / "unet"):
        assert torch.equal(noise_at_steps(load(path), x), noise_at_steps(model, x))
    assert worst(noise_at_steps(load(old), x), expected) < 1e-5
    net.save_pretrained(tmp_path / "file")  # of which the network's own file is given
    file = tmp_path / "file" / "diffusion_pytorch_model.safetensors"
    assert torch.equal(noise_at_steps(load(file, config={"beta_schedule": "linear"}), x), noise_at_steps(model, x))


# -- schedules -------------------------------------------------------------------------------------------------------

SCHEDULES = {
    "linear": dict(),
    "scaled_linear": dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
    "cosine": dict(beta_schedule="squaredcos_cap_v2", num_train_timesteps=50),
    "sigmoid": dict(beta_schedule="sigmoid"),
    "trained": dict(trained_betas=[0.01, 0.02, 0.3, 0.5]),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_betas(name):
    """The products of 1 - beta are the scheduler's, to its float32 precision; ours are float64."""
    scheduler = diffusers.DDPMScheduler(**SCHEDULES[name])
    betas = betas_of(scheduler.config)
    assert betas.dtype == np.float64
    bar = np.cumprod(1 - betas)
    np.testing.assert_allclose(bar, scheduler.alphas_cumprod.double().numpy(), rtol=5e-4, atol=1e-7)
    np.testing.assert_allclose(betas, scheduler.betas.double().numpy(), rtol=2e-5, atol=1e-7)


def test_betas_that_are_refused():
    """An unknown schedule asks for the numbers; one that ends without signal is refused."""
    with pytest.raises(ValueError, match=r"beta_schedule 'exp' is not known; give trained_betas"):
        betas_of({"beta_schedule": "exp"})
    with pytest.raises(ValueError, match="rescale_betas_zero_snr=True ends without signal"):
        betas_of({"rescale_betas_zero_snr": True})


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_predictions(prediction, tmp_path):
    """The denoiser is the x_0 that the scheduler itself computes from the network's output, at each kind of prediction."""
    scheduler = diffusers.DDPMScheduler(prediction_type=prediction, clip_sample=False)
    net = unet(DDPM)
    model = load(save(net, tmp_path, scheduler))
    live = WrappedNet.diffusers(net, scheduler)
    assert isinstance(model.sde, DiscreteVPSDE)
    for step in (10, 500, 900):
        x = images(net, seed=step)
        with torch.no_grad():
            out = net(x, step).sample
            expected = scheduler.step(out, step, x).pred_original_sample
            assert worst(model.denoise(x, step / 999), expected) < 2e-5
            assert worst(live.denoise(x, step / 999), model.denoise(x, step / 999)) < 1e-5


def test_flow_matching(tmp_path):
    """The network of a flow-matching scheduler is the velocity of the straight path, at labels of 1000 t."""
    net = unet(DDPM)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    model = load(save(net, tmp_path, scheduler))
    assert model.sde == RectifiedFlow()
    x, t = images(net), torch.tensor([0.25, 0.9])
    with torch.no_grad():
        expected = net(x, 1000 * t).sample
        assert worst(model.velocity(x, t), expected) < 1e-5
        assert worst(model.denoise(x, t), x - t[:, None, None, None] * expected) < 1e-5


@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler", "PNDMScheduler"])
def test_other_schedulers(name, tmp_path):
    """Samplers of another name for the same schedule give the same model."""
    net = unet(DDPM)
    a, b = (load(save(net, tmp_path / n, getattr(diffusers, n)())) for n in ("DDPMScheduler", name))
    assert a.sde == b.sde
    assert torch.equal(noise_at_steps(a, images(net)), noise_at_steps(b, images(net)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prediction_type": "flow"}, "prediction_type 'flow' is not known; known are epsilon"),
        ({"_class_name": "EDMEulerScheduler"}, "schedule of EDMEulerScheduler is not known; wrap the network by"),
        ({"_class_name": "ScoreSdeVpScheduler"}, "schedule of ScoreSdeVpScheduler is not known"),
        ({"_class_name": "ScoreSdeVeScheduler"}, "lacks 'sigma_min'"),
    ],
)
def test_schedulers_that_are_refused(options, message, tmp_path):
    """By name, with what to do instead."""
    with pytest.raises(ValueError, match=message):
        load(save(unet(DDPM), tmp_path), config=options)


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        dict(act_fn="gelu"),
        dict(time_embedding_type="learned"),
        dict(mid_block_type="UNetMidBlock2DCrossAttn"),
        dict(resnet_time_scale_shift="spatial"),
        dict(class_embed_type="timestep"),
        dict(upsample_type="resnet"),
        dict(out_channels=4),
        dict(mid_block_scale_factor=2.0),
        dict(add_attention="yes"),
        dict(attn_norm_num_groups=2),
    ],
    ids=lambda c: next(iter(c)),
)
def test_options_that_are_not_supported(change, tmp_path):
    """Each is named with its value."""
    save(unet(DDPM), tmp_path)
    file = tmp_path / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    ((name, value),) = change.items()
    with pytest.raises(ValueError, match=f"UNet2DModel with {name}={value!r} is not supported"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(down_block_types=["DownBlock2D", "KDownBlock2D"]), "blocks KDownBlock2D are not supported; known are"),
        (dict(up_block_types=["UpBlock2D", "UpBlock2D"]), "must mirror each other"),
        (
            dict(down_block_types=["ResnetDownsampleBlock2D", "AttnDownBlock2D"]),
            "change the resolution in different ways",
        ),
        (dict(downsample_type="resnet", upsample_type="resnet"), "change the resolution in different ways"),
        (dict(layers_per_block=2), r"do not fit the network .*missing: down_blocks\.0\.resnets\.1"),
        (dict(block_out_channels=[8, 8]), "of another shape"),
        (dict(num_class_embeds=4), r"missing: class_embedding\.weight"),
        (dict(_class_name="UNet2DConditionModel"), r"holds a UNet2DConditionModel; supported are UNet2DModel"),
    ],
    ids=["block", "mirror", "resampling", "up and down", "depth", "width", "classes", "class"],
)
def test_options_that_do_not_fit(change, message, tmp_path):
    """Blocks are checked against each other, and everything against the weights."""
    save(unet(DDPM), tmp_path)
    file = tmp_path / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_damaged_and_missing_files(tmp_path):
    """A truncated file, no weights, no scheduler, no options, code in a `.bin`: each error names what it is about."""
    net = unet(DDPM)
    for safe in (True, False):
        folder = save(net, tmp_path / str(safe), safe=safe) / "unet"
        file = next(p for p in folder.iterdir() if p.suffix != ".json")
        whole = file.read_bytes()
        for keep in (0, 0.5, 0.999):
            file.write_bytes(whole[: int(keep * len(whole))])
            with pytest.raises(ValueError, match=rf"{file.name} is not a readable .*truncated or damaged"):
                load(tmp_path / str(safe))
    torch.save({"a": np.random.default_rng(0)}, file)
    with pytest.raises(ValueError, match=r"\.bin holds more than tensors and was refused"):
        load(tmp_path / "False")
    torch.save([torch.zeros(1)], file)
    with pytest.raises(ValueError, match=r"\.bin is no state dict"):
        load(tmp_path / "False")
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"has a config\.json but none of diffusion_pytorch_model"):
        load(tmp_path / "False")
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="holds no diffusers model"):
        load(tmp_path / "False")
    net.save_pretrained(tmp_path / "alone")
    with pytest.raises(ValueError, match=r"no scheduler_config\.json; give config=.*beta_start"):
        load_diffusers(tmp_path / "alone")


# -- what the library's training script writes ------------------------------------------------------------------------

EMA = dict(
    decay=0.9999,
    inv_gamma=1.0,
    min_decay=0.0,
    optimization_step=7,
    power=0.75,
    update_after_step=0,
    use_ema_warmup=True,
)


def same_weights(a, b):
    return all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def training_output(folder):
    """Two checkpoints with a network, its average and the script's other files, as the script leaves them; the averages."""
    averages = []
    for step in (500, 1000):
        place = folder / f"checkpoint-{step}"
        unet(DDPM, seed=step).save_pretrained(place / "unet")
        averages.append(unet(DDPM, seed=step + 1))
        averages[-1].save_pretrained(place / "unet_ema")
        config = json.loads((place / "unet_ema" / "config.json").read_text())
        (place / "unet_ema" / "config.json").write_text(json.dumps(config | EMA))
        torch.save({"step": 3}, place / "scheduler.bin")
        (place / "random_states_0.pkl").write_bytes(b"\x80\x04}.")
    return averages


def test_folders_of_the_training_script(tmp_path):
    """The newest checkpoint's average, of the run or of one checkpoint; once it is finished, the pipeline."""
    averages = training_output(tmp_path)
    schedule = {"beta_schedule": "linear"}
    for path, average in ((tmp_path, averages[1]), (tmp_path / "checkpoint-500", averages[0])):
        model = load(path, config=schedule)
        x = images(average)
        with torch.no_grad():
            assert worst(noise_at_steps(model, x), average(x, STEPS).sample) < 1e-5
        with pytest.raises(ValueError, match=r"no scheduler_config\.json"):
            load(path)
    raw = load(tmp_path / "checkpoint-500" / "unet", config=schedule)
    assert not same_weights(raw.net, load(tmp_path / "checkpoint-500", config=schedule).net)
    final = unet(DDPM, seed=77)
    save(final, tmp_path)
    x = images(final)
    with torch.no_grad():
        assert worst(noise_at_steps(load(tmp_path), x), final(x, STEPS).sample) < 1e-5
    load(tmp_path / "checkpoint-1000")  # whose schedule is in the run's folder by now


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_half_precision_files(safe, tmp_path):
    """Files of the fp16 variant load as float32; where there is one in full precision, it is taken."""
    net = unet(DDPM)
    folder = save(net.half(), tmp_path, safe=safe)
    for file in (folder / "unet").glob("diffusion_pytorch_model.*"):
        file.rename(file.with_name(file.name.replace("model.", "model.fp16.")))
    model = load(folder)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    net = net.float()
    x = images(net)
    with torch.no_grad():
        assert worst(noise_at_steps(model, x), net(x, STEPS).sample) < 1e-5
    full = unet(DDPM, seed=5)
    full.save_pretrained(folder / "unet", safe_serialization=safe)
    (half,) = (folder / "unet").glob("*.fp16.*")
    assert same_weights(load(half).net, model.net)  # the file itself, where it is asked for
    with torch.no_grad():
        assert worst(noise_at_steps(load(folder), x), full(x, STEPS).sample) < 1e-5


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_weights_in_several_files(safe, tmp_path):
    """With an index; a part that is missing, or a place outside the folder, is named."""
    net = unet(DDPM)
    net.save_pretrained(tmp_path / "unet", max_shard_size="40KB", safe_serialization=safe)
    diffusers.DDPMScheduler().save_pretrained(tmp_path / "scheduler")
    kind = "safetensors" if safe else "bin"
    index = tmp_path / "unet" / f"diffusion_pytorch_model.{kind}.index.json"
    parts = sorted((tmp_path / "unet").glob(f"*.{kind}"))
    assert index.is_file()
    assert len(parts) > 2
    x = images(net)
    with torch.no_grad():
        assert worst(noise_at_steps(load(tmp_path), x), net(x, STEPS).sample) < 1e-5
    assert same_weights(load(parts[1]).net, load(tmp_path).net)
    content = json.loads(index.read_text())
    for place in ("../secret.safetensors", "/etc/passwd", 3):
        bad = content["weight_map"] | {"conv_in.weight": place}
        index.write_text(json.dumps(content | {"weight_map": bad}))
        with pytest.raises(ValueError, match=r"index\.json is no index of weights"):
            load(tmp_path)
    index.write_text(json.dumps(content | {"weight_map": content["weight_map"] | {"more": parts[0].name}}))
    with pytest.raises(ValueError, match="names tensors that are not in its files: more"):
        load(tmp_path)
    index.write_text(json.dumps(content))
    parts[0].unlink()
    with pytest.raises(FileNotFoundError, match=parts[0].name):
        load(tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        dict(num_train_timesteps=10**8),
        dict(num_train_timesteps=1e300),
        dict(num_train_timesteps="x"),
        dict(beta_end="x"),
    ],
    ids=str,
)
def test_schedules_of_absurd_size(options, tmp_path):
    """Refused before a table is made, naming the file."""
    folder = save(unet(DDPM), tmp_path)
    with pytest.raises(ValueError, match=r"unet/diffusion_pytorch_model"):
        load(folder, config={"beta_schedule": "linear"} | options)


@pytest.mark.parametrize(
    "options",
    [
        dict(layers_per_block=10**6),
        dict(block_out_channels=(20_000, 40_000)),
        dict(num_class_embeds=10**10),
        dict(in_channels=10**7, out_channels=10**7),
        dict(norm_num_groups=0),
        dict(attention_head_dim=[]),
        dict(block_out_channels=None),
        dict(sample_size=-8),
    ],
    ids=range(8),
)
def test_networks_of_absurd_size(options, tmp_path):
    """Options that ask for more than the file holds are refused before memory is taken, naming the file."""
    resource = pytest.importorskip("resource")
    folder = save(unet(DDPM), tmp_path)
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps(config | options))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"unet/diffusion_pytorch_model"):
        load(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB
