"""What a careful user would trip over when bringing a checkpoint: schedules, labels, types, names and damaged weights."""

import math
import zipfile
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from scoresde import (
    EDMSDE,
    VPSDE,
    ClassifierFreeGuidance,
    DiscreteVPSDE,
    NoiseLabel,
    ScoreNet,
    WrappedNet,
    load,
    save_pretrained,
)
from scoresde.interop.diffusers.schedules import process_of_scheduler
from scoresde.interop.edm.checkpoint import _named
from scoresde.interop.files import Weights, fitting, read_config, read_torch
from scoresde.nets import MLP, UNet

SMALL = dict(width=8, multipliers=(1, 2), blocks=1, attention=())


def process(**options):
    return process_of_scheduler(options, False, "somewhere")


def test_a_scheduler_of_ours_keeps_the_schedule_of_the_original():
    """Its saved configuration holds the original's options one level down."""
    inner = {"_class_name": "DDPMScheduler", "beta_end": 0.03}
    sde, _, label = process(_class_name="SamplerScheduler", options=inner, method="ddim")
    assert sde.betas[-1] == pytest.approx(0.03)
    assert label == NoiseLabel("time", 999.0)


@pytest.mark.parametrize(
    "options",
    [
        {"_class_name": "CogVideoXDDIMScheduler"},
        {"_class_name": "IPNDMScheduler"},
        {"_class_name": "EDMEulerScheduler"},
        {"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"},
        {"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True},
        {},
        {"beta_strat": 0.5},
        {"model": {"name": "ddpm"}},
    ],
    ids=str,
)
def test_schedules_that_are_not_understood_are_refused(options):
    """No unknown scheduler, and no configuration without a known option, becomes DDPM's by default."""
    with pytest.raises(ValueError, match=r"not known|not supported|must hold options"):
        process(**options)


def test_flow_matching_schedulers():
    """Both are rectified flow with labels up to the number of steps."""
    for name in ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"):
        sde, kind, label = process(_class_name=name, num_train_timesteps=1000, shift=3.0)
        assert (type(sde).__name__, kind, label) == ("RectifiedFlow", "velocity", NoiseLabel("time", 1000.0))


class OneHot(nn.Module):
    """D(x, sigma, class_labels) as EDM's networks take it: rows of label_dim numbers, however they come."""

    label_dim, sigma_min, sigma_max = 4, 0.0, math.inf

    def forward(self, x, sigma, class_labels=None):
        rows = torch.zeros(1, 4) if class_labels is None else class_labels.to(x.dtype).reshape(-1, 4)
        return x * 0 + (rows @ torch.arange(1.0, 5.0))[:, None]


def test_integer_labels_reach_edm_networks_as_rows():
    """The same as one-hot rows, also where there are as many examples as classes; the label beyond is no class."""
    model, x = WrappedNet.edm(OneHot()), torch.zeros(4, 2)
    labels = torch.tensor([3, 0, 1, 4])
    got = model.denoise(x, 0.5, labels)
    assert got[:, 0].tolist() == [4.0, 1.0, 2.0, 0.0]
    rows = torch.eye(5, 4)[labels]
    assert torch.equal(model.denoise(x, 0.5, rows), got)
    assert model.denoise(x, 0.5)[:, 0].tolist() == [0.0] * 4


def test_names_of_edm():
    """Known words only; of their snapshots' names those that say something."""
    assert _named("edm-imagenet-64x64-cond-adm") == {"precond": "edm", "model_type": "DhariwalUNet"}
    assert _named("EDM-NCSN++") == _named("edm_ncsnpp")
    for name in ("vp/cifar10_ddpmpp_continuous", "edmm", "ncsn", ""):
        with pytest.raises(ValueError, match="no configuration of EDM"):
            _named(name)


def test_a_scalar_in_the_other_byte_order(tmp_path):
    """What a machine of the other byte order has written is read in that order; float64 itself stays native."""
    np = pytest.importorskip("numpy")
    torch.save({"lr": np.float64(2e-4)}, tmp_path / "lr.pt")
    with zipfile.ZipFile(tmp_path / "lr.pt") as old, zipfile.ZipFile(tmp_path / "other.pt", "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith("data.pkl"):
                assert content.count(b"X\x01\x00\x00\x00<") == 1
                content = content.replace(b"X\x01\x00\x00\x00<", b"X\x01\x00\x00\x00>")
            new.writestr(name, content)
    assert read_torch(tmp_path / "other.pt")["lr"] == np.float64(2e-4).byteswap()
    assert read_torch(tmp_path / "lr.pt")["lr"] == 2e-4
    assert np.dtype(np.float64).isnative


def test_safe_globals_of_the_program_stay(tmp_path):
    """Reading a file takes away nothing that the program had allowed, and leaves nothing allowed."""
    torch.save({"w": torch.zeros(2)}, tmp_path / "w.pt")
    before = set(map(str, torch.serialization.get_safe_globals()))
    torch.serialization.add_safe_globals([SimpleNamespace])
    try:
        read_torch(tmp_path / "w.pt")
        assert SimpleNamespace in torch.serialization.get_safe_globals()
    finally:
        torch.serialization.clear_safe_globals()
    read_torch(tmp_path / "w.pt")
    assert not {g for g in map(str, torch.serialization.get_safe_globals()) if "numpy" in g} - before


@pytest.mark.parametrize("dtype", ["float32", "int64", "V100000", "O"])
def test_other_numpy_scalars_are_refused(dtype, tmp_path):
    """float64 scalars are read, others are not."""
    np = pytest.importorskip("numpy")
    torch.save({"lr": np.float64(2e-4)}, tmp_path / "good.pt")
    assert read_torch(tmp_path / "good.pt")["lr"] == 2e-4
    value = np.zeros((), dtype)[()] if dtype != "O" else np.dtype("O")
    torch.save({"lr": np.dtype(dtype) if dtype == "V100000" else value}, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match=r"refused|not a readable"):
        read_torch(tmp_path / "bad.pt")


def test_half_precision_models_come_back_as_they_were(tmp_path):
    """The learned tensors' dtype, although noise frequencies stay float32."""
    model = ScoreNet(UNet(1, 1, (4, 4), **SMALL), VPSDE()).bfloat16()
    save_pretrained(model, tmp_path / "m")
    again = load(tmp_path / "m")
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    assert again.net.embed.frequencies.dtype == torch.float32


def test_only_what_can_be_rebuilt_is_saved(tmp_path):
    """A subclass and a wrapped network are refused, by the name that the user knows."""

    class Own(ScoreNet):
        pass

    for model in (Own(MLP(2), VPSDE()), WrappedNet(MLP(2), VPSDE())):
        with pytest.raises(TypeError, match=type(model).__name__):
            save_pretrained(model, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_the_label_of_no_class_stands_for_every_example():
    """A number or one row is spread over any batch; rows for a batch of another size are refused."""
    torch.manual_seed(0)
    model = ScoreNet(MLP(2, classes=3), VPSDE())
    x, cond = torch.randn(5, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0, 1])
    expected = ClassifierFreeGuidance(model, 2.0).denoise(x, 0.5, cond)
    for without in (torch.tensor(3), torch.tensor([3])):
        torch.testing.assert_close(
            ClassifierFreeGuidance(model, 2.0, unconditional=without).denoise(x, 0.5, cond), expected
        )
    with pytest.raises(ValueError, match="one row"):
        ClassifierFreeGuidance(model, 2.0, unconditional=torch.full((5,), 3)).denoise(x, 0.5, cond)


def test_half_precision_volumes_on_a_cpu():
    """The mean of a volume in bfloat16 goes by a convolution, which the library has."""
    net = UNet(1, 1, (8, 8, 8), **SMALL).bfloat16()
    assert net(torch.zeros(1, 1, 8, 8, 8, dtype=torch.bfloat16), torch.zeros(1)).dtype == torch.bfloat16


def test_mistyped_paths_do_not_go_to_the_hub(monkeypatch, tmp_path):
    """A name with a checkpoint's ending, or below a folder that is here, is a path."""
    import huggingface_hub

    def asked(*args, **options):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(huggingface_hub, "HfApi", asked)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", asked)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for name in ("runs/digitz", "checkpoints/checkpoint_8.pth", "a/b.safetensors"):
        with pytest.raises(FileNotFoundError, match="there is no file or folder"):
            load(name)


def test_weights_that_are_no_numbers():
    """NaN, infinity, integers and things that are no tensors are named."""
    for bad in (torch.tensor([1.0, math.nan]), torch.tensor([math.inf]), torch.tensor([1]), None):
        with pytest.raises(ValueError, match=r"file\.pt: a\.b is no"):
            Weights({"a.b": bad}, "file.pt").check()
    with pytest.raises(ValueError, match=r"file\.pt .*IndexError"), fitting("file.pt"):
        raise IndexError("x")


def test_published_names():
    """The file of a published configuration is known by its name, wherever it lies; a typo gets near names."""
    names = {"vp/one": {"a": 1}, "ve/other": {}}
    assert read_config("/somewhere/configs/vp/one.py", names) == {"a": 1}
    with pytest.raises(ValueError, match=r"known: vp/one\."):
        read_config("vp/onne", names)
    with pytest.raises(ValueError, match="not executed"):
        read_config("mine.py", names)


def test_processes_are_told_from_schedules():
    """Betas given for a process, and cumulative products for betas, are refused; a long process has a short name."""
    betas = torch.linspace(1e-4, 0.02, 1000)
    with pytest.raises(TypeError, match="betas="):
        WrappedNet(MLP(2), betas)
    with pytest.raises(ValueError, match="alphas_cumprod"):
        DiscreteVPSDE(tuple(torch.cumprod(1 - betas, 0).tolist()))
    assert len(repr(DiscreteVPSDE.linear())) < 80
    assert isinstance(WrappedNet.edm(OneHot()).sde, EDMSDE)
