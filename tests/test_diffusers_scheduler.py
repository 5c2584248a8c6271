"""Our samplers in diffusers' pipelines: the same numbers as `sample` gives on the same network."""

from types import SimpleNamespace

import pytest
import torch

from scoresde import METHODS, WrappedNet, sample

diffusers = pytest.importorskip("diffusers")

DETERMINISTIC = [
    "flow-euler",
    "ddim",
    "dpm++2m",
    "dpm++3m",
    "unipc2",
    "unipc3",
    "deis",
    "ipndm",
    "lms",
    "adams-noise",
    "adams-angle",
]
SHAPE = (2, 3, 8, 8)


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    net = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(32,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        layers_per_block=1,
    ).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return net


def scheduler(method, original=None):
    from scoresde.interop.diffusers.scheduler import SamplerScheduler

    return SamplerScheduler.of(original or diffusers.DDPMScheduler(), method, event_shape=SHAPE[1:])


def drive(net, steps, x, seed=None):
    """What a pipeline does."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for t in steps.timesteps:
            x = steps.step(net(x, t).sample, t, x, generator=generator).prev_sample
    return x


@pytest.mark.parametrize("method", DETERMINISTIC)
def test_equals_sample_on_the_same_network(unet, method):
    """A pipeline's loop ends where `sample` does, from the same noise."""
    original = diffusers.DDPMScheduler()
    model = WrappedNet.diffusers(unet, original, sigma_data=0.5)
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    ours = scheduler(method, original)
    ours.set_timesteps(6)
    expected = sample(model, SHAPE, method=method, steps=6, x_init=x)
    torch.testing.assert_close(
        drive(unet, ours, x.clone()), expected, rtol=2e-5, atol=2e-5 * float(expected.abs().max())
    )


def test_variance_exploding(unet):
    """For the VE scheduler timesteps are sigmas, the network's output is the score, and noise starts at sigma_max."""
    original = diffusers.ScoreSdeVeScheduler(sigma_min=0.01, sigma_max=50.0)
    ours = scheduler("ddim", original)
    ours.set_timesteps(5)
    assert float(ours.timesteps[0]) == pytest.approx(50.0)
    assert ours.init_noise_sigma == pytest.approx(50.0)

    class Score(torch.nn.Module):
        """The score of N(0, 0.5^2) noised by sigma, for which DDIM's exact flow is known."""

        def forward(self, x, sigma):
            return SimpleNamespace(sample=-x / (0.25 + sigma**2))

    x = 50.0 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    ours.set_timesteps(400)
    end = drive(Score(), ours, x.clone())
    torch.testing.assert_close(end, x * 0.5 / (0.25 + 2500) ** 0.5, rtol=0.03, atol=0.02)


def test_stochastic_methods_follow_the_generator(unet):
    """The same generator seed gives the same sample, another seed another."""
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    ends = []
    for seed in (3, 3, 4):
        ours = scheduler("ancestral")
        ours.set_timesteps(4)
        ends.append(drive(unet, ours, x.clone(), seed))
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


def test_in_a_pipeline(unet, tmp_path):
    """DDPMPipeline runs on it, and images have the right shape."""
    pipeline = diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler())
    pipeline.scheduler = scheduler("dpm++2m", pipeline.scheduler)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(batch_size=2, num_inference_steps=3, output_type="np").images
    assert images.shape == (2, 8, 8, 3)


def test_add_noise_is_the_original_schedulers():
    """x_t at whole steps equals DDPMScheduler's."""
    original = diffusers.DDPMScheduler()
    x, eps = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    steps = torch.tensor([10, 900])
    torch.testing.assert_close(
        scheduler("ddim").add_noise(x, eps, steps), original.add_noise(x, eps, steps), rtol=1e-5, atol=1e-5
    )


def test_refusals(unet):
    """Methods with more evaluations a step, a step before the timesteps, and one too many."""
    for method in ("pc", "heun", "dpm2", "dpm3", "dpm++2s", "ode", "auto", "langevin", "edm", "rk45"):
        assert method in METHODS
        with pytest.raises(ValueError, match="once"):
            scheduler(method)
    x = torch.zeros(SHAPE)
    ours = scheduler("ddim")
    with pytest.raises(ValueError, match="set_timesteps"):
        ours.step(x, 0, x)
    ours.set_timesteps(1)
    drive(unet, ours, x)
    with pytest.raises(ValueError, match="done"):
        ours.step(x, 0, x)
    with pytest.raises(ValueError, match="no-such-method"):
        scheduler("no-such-method")


def test_starting_in_the_middle(unet):
    """A first step at a later timestep uses that one's coefficients, as image-to-image needs; going back is refused."""
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    ours, whole = scheduler("ddim"), scheduler("ddim")
    ours.set_timesteps(5)
    whole.set_timesteps(5)
    out = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))
    for t in whole.timesteps[:2]:
        whole.step(out, t, x)
    expected = whole.step(out, whole.timesteps[2], x).prev_sample
    assert torch.equal(ours.step(out, ours.timesteps[2], x).prev_sample, expected)
    with pytest.raises(ValueError, match="not one of those to come"):
        ours.step(out, ours.timesteps[0], x)


SCHEDULES = {
    "v": dict(beta_start=0.001, beta_end=0.03, beta_schedule="scaled_linear", prediction_type="v_prediction"),
    "short": dict(num_train_timesteps=300, trained_betas=[1e-4 * (i + 1) for i in range(300)], clip_sample=False),
    "cosine": dict(beta_schedule="squaredcos_cap_v2", prediction_type="sample", variance_type="fixed_large"),
    "defaults": {},
}


def process(ours):
    return ours.model.sde, ours.model.parameterization, ours.model.label


@pytest.mark.parametrize("saved", [True, False], ids=["through files", "live"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_there_and_back(name, saved, tmp_path):
    """DDPM, ours, DPM-Solver, ours, DDPM, by `from_config`: everywhere the schedule of the training."""
    from scoresde.interop.diffusers.scheduler import SamplerScheduler

    def kept(scheduler, folder):
        if not saved:
            return scheduler
        scheduler.save_pretrained(tmp_path / folder)
        return type(scheduler).from_pretrained(tmp_path / folder)

    ddpm = kept(diffusers.DDPMScheduler(**SCHEDULES[name]), "a")
    expected = process(SamplerScheduler.of(ddpm))
    assert (expected[0].steps, expected[1]) == (
        SCHEDULES[name].get("num_train_timesteps", 1000),
        {"v": "v_prediction", "cosine": "denoise"}.get(name, "noise"),
    )
    ours = kept(SamplerScheduler.from_config(ddpm.config, method="ddim", sigma_data=0.7), "b")
    assert process(ours) == expected
    assert (ours.config.method, ours.model.sigma_data) == ("ddim", 0.7)
    dpm = kept(diffusers.DPMSolverMultistepScheduler.from_config(ours.config), "c")
    direct = kept(diffusers.DPMSolverMultistepScheduler.from_config(ddpm.config), "d")
    assert torch.equal(dpm.betas, direct.betas)
    assert torch.equal(dpm.betas, ddpm.betas)
    for key in ("prediction_type", "num_train_timesteps", "trained_betas", "timestep_spacing", "algorithm_type"):
        assert dpm.config[key] == direct.config[key], key
    again = kept(SamplerScheduler.from_config(dpm.config), "e")
    assert process(again) == expected
    back = diffusers.DDPMScheduler.from_config(again.config)
    assert torch.equal(back.betas, ddpm.betas)
    assert back.config.prediction_type == ddpm.config.prediction_type


def test_options_changed_between():
    """A swap with another schedule is followed, not the first one's."""
    from scoresde.interop.diffusers.scheduler import SamplerScheduler

    ours = SamplerScheduler.of(diffusers.DDPMScheduler())
    dpm = diffusers.DPMSolverMultistepScheduler.from_config(ours.config, beta_end=0.01, prediction_type="v_prediction")
    sde, kind, _ = process(SamplerScheduler.from_config(dpm.config))
    assert (sde.betas[-1], kind) == (pytest.approx(0.01), "v_prediction")
    assert process(SamplerScheduler.from_config(ours.config, beta_end=0.03))[0].betas[-1] == pytest.approx(0.03)


def test_other_kinds_there_and_back():
    """Variance exploding and flow matching are told by their options; a kind that is not known is refused."""
    from scoresde.interop.diffusers.scheduler import SamplerScheduler

    ve = SamplerScheduler.from_config(diffusers.ScoreSdeVeScheduler(sigma_max=30.0).config)
    assert (process(ve)[0].sigma_max, process(ve)[1]) == (30.0, "score")
    flow = SamplerScheduler.from_config(diffusers.FlowMatchEulerDiscreteScheduler().config)
    assert process(flow)[1] == "velocity"
    back = diffusers.FlowMatchEulerDiscreteScheduler.from_config(flow.config)
    assert back.config.num_train_timesteps == 1000
    for other in (diffusers.EDMEulerScheduler(), diffusers.IPNDMScheduler()):
        with pytest.raises(ValueError, match=r"SamplerScheduler\.of"):
            SamplerScheduler.from_config(other.config)


def test_a_configuration_of_an_older_version():
    """One that holds the original's options one level down only."""
    from scoresde.interop.diffusers.scheduler import SamplerScheduler

    inner = {"_class_name": "DDPMScheduler", "beta_end": 0.03}
    old = {"_class_name": "SamplerScheduler", "options": inner, "method": "ddim", "sigma_data": 0.5}
    ours = SamplerScheduler.from_config(old)
    assert process(ours)[0].betas[-1] == pytest.approx(0.03)
    assert ours.config.method == "ddim"


def test_the_path_of_the_first_versions():
    """`scoresde.interop.diffusers_scheduler` still has it."""
    from scoresde.interop.diffusers.scheduler import SamplerScheduler
    from scoresde.interop.diffusers_scheduler import SamplerScheduler as Same

    assert Same is SamplerScheduler
