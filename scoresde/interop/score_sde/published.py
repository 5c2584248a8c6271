"""The published configurations of score_sde_pytorch by the name of their file, as far as they decide the model. Layer 4."""

from __future__ import annotations

from typing import Any

from scoresde.interop.score_sde.ncsn import PUBLISHED_NCSN


def _published() -> dict[str, dict[str, Any]]:
    def options(sde: str, continuous: bool, size: int, centred: bool, **model: Any) -> dict[str, Any]:
        base = dict(sigma_min=0.01, sigma_max=50, num_scales=1000, beta_min=0.1, beta_max=20.0, nf=128)
        return {
            "training": {"sde": sde, "continuous": continuous},
            "data": {"image_size": size, "centered": centred, "num_channels": 3},
            "model": base | {"scale_by_sigma": sde == "vesde", "attn_resolutions": (16,)} | model,
        }

    ddpm = dict(name="ddpm", ch_mult=(1, 2, 2, 2), num_res_blocks=2, dropout=0.1)
    plus = dict(name="ncsnpp", skip_rescale=True, resblock_type="biggan", progressive="none", progressive_combine="sum")
    plus |= dict(fir_kernel=(1, 3, 3, 1), fourier_scale=16)
    cifar = plus | dict(ch_mult=(1, 2, 2, 2), num_res_blocks=4, dropout=0.1)
    ncsnpp = cifar | dict(fir=True, progressive_input="residual", embedding_type="positional")
    ddpmpp = cifar | dict(fir=False, progressive_input="none", embedding_type="positional")
    fourier, deep = dict(embedding_type="fourier"), dict(num_res_blocks=8)
    found = {}
    for family, sde in (("vp", "vpsde"), ("subvp", "subvpsde")):
        for name, net in (("ncsnpp", ncsnpp), ("ddpmpp", ddpmpp)):
            found[f"{family}/cifar10_{name}_continuous"] = options(sde, True, 32, True, **net)
            found[f"{family}/cifar10_{name}_deep_continuous"] = options(sde, True, 32, True, **net | deep)
    found["subvp/cifar10_ddpm_continuous"] = options("subvpsde", True, 32, True, **ddpm)
    found["vp/ddpm/cifar10_continuous"] = options("vpsde", True, 32, True, **ddpm)
    found["vp/ddpm/cifar10"] = options("vpsde", False, 32, True, **ddpm)
    found["vp/cifar10_ncsnpp"] = options("vpsde", False, 32, True, **ncsnpp)
    found["vp/cifar10_ddpmpp"] = options("vpsde", False, 32, True, **ddpmpp)
    wide = ddpm | dict(ch_mult=(1, 1, 2, 2, 4, 4), dropout=0.0)
    for name in ("bedroom", "celebahq", "church"):
        found[f"vp/ddpm/{name}"] = options("vpsde", False, 256, True, **wide)
    found["ve/cifar10_ncsnpp_continuous"] = options("vesde", True, 32, False, **ncsnpp | fourier)
    found["ve/cifar10_ncsnpp_deep_continuous"] = options("vesde", True, 32, False, **ncsnpp | fourier | deep)
    found["ve/cifar10_ncsnpp"] = options("vesde", False, 32, False, **ncsnpp)
    found["ve/cifar10_ddpm"] = options("vesde", False, 32, False, **ddpm)
    skips = plus | fourier | dict(fir=True, progressive="output_skip", progressive_input="input_skip", num_scales=2000)
    large = skips | dict(ch_mult=(1, 1, 2, 2, 2, 2, 2), num_res_blocks=2)
    for name, top in (("bedroom", 378), ("church", 380), ("celebahq_256", 348), ("ffhq_256", 348)):
        found[f"ve/{name}_ncsnpp_continuous"] = options("vesde", True, 256, False, **large | dict(sigma_max=top))
    huge = skips | dict(ch_mult=(1, 2, 4, 8, 16, 32, 32, 32), num_res_blocks=1, nf=16, sigma_max=1348)
    for name in ("celebahq", "ffhq"):
        found[f"ve/{name}_ncsnpp_continuous"] = options("vesde", True, 1024, False, **huge)
    return found


PUBLISHED = _published() | PUBLISHED_NCSN
