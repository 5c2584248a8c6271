"""What our networks cost: beside diffusers' with the same weights, compiled, by attention path, and as published.

    python benchmarks/networks.py [--quick] [--width 64] [--batches 8 32] [--threads 1] [--repeats 7] [--out FILE]

Equal networks: diffusers builds one, our loader reads its weights from a folder, and outputs must agree to 1e-4 before
anything is timed. `ddpm` has the layout of google/ddpm-cifar10-32, `ncsnpp` that of google/ncsnpp-*, both at `--width`; `dit` is
a DiT-S/2 of four blocks, always given no class. `forward` is without gradients in evaluation mode, `train` a forward pass, mean
square error, backward pass and step of AdamW. The other parts: our networks as they are against `torch.compile`d (the time of the
first call apart); the two ways to attend; the published networks of CIFAR-10, one image, in either memory layout.

The two sides of a row take turns, the first to go alternating, so that a machine that slows down slows both. A row ends after
`--repeats` turns of both or after `--seconds`, but not before three. The ratio is that of the times of a turn, its median with
quartiles over the turns; below one, the side named first is the faster. On a CPU times are CPU time with one thread, which a busy
machine disturbs least, and wall time with more; and there channels last are for the first batch only. With CUDA there are rows
in bfloat16 autocast with channels last too, compiled and not, and the peak of memory beyond what is held between runs.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import importlib.metadata
import json
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scoresde.interop.diffusers import load_diffusers
from scoresde.nets import UNet
from scoresde.nets.blocks import attend
from scoresde.store import write_json

SIZE = 32
PEERS = ("ddpm", "ncsnpp", "dit")
TOLERANCE = 1e-4
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
SHAPES = {  # (B, heads, n, d) of the attention in these networks
    "UNet 16x16, 1 head": (8, 1, 256, 256),
    "UNet 32x32, 4 heads": (8, 4, 1024, 64),
    "DiT-S/2 32x32": (8, 6, 256, 64),
}
PRESETS: dict[str, dict[str, Any]] = {
    "DDPM++ cont.": {},
    "NCSN++ cont.": dict(resample="fir", progressive_input="residual", embedding="fourier"),
}


@dataclass
class Side:
    """A network of one library as a function of (x, label), with ours' output."""

    net: nn.Module
    call: Callable[[nn.Module, Tensor, Tensor], Tensor]

    def __call__(self, x: Tensor, label: Tensor) -> Tensor:
        return self.call(self.net, x, label)

    def placed(self, device: torch.device, layout: torch.memory_format, compiled: bool = False) -> Side:
        """A copy that shares nothing with this one."""
        net = copy.deepcopy(self.net).to(device=device, memory_format=layout)
        return Side(torch.compile(net) if compiled else net, self.call)


# -- equal networks --------------------------------------------------------------------------------------------------


def _ours(net: nn.Module, x: Tensor, label: Tensor) -> Tensor:
    return net(x, label)


def _theirs(net: nn.Module, x: Tensor, label: Tensor) -> Tensor:
    return net(x, label, return_dict=False)[0]


def _theirs_by_sigma(net: nn.Module, x: Tensor, label: Tensor) -> Tensor:
    """Told sigma, of which it takes the logarithm and by which it divides; ours does neither."""
    sigma = label.exp()
    return net(x, sigma, return_dict=False)[0] * sigma[:, None, None, None]


def _theirs_without_class(net: nn.Module, x: Tensor, label: Tensor) -> Tensor:
    """Given the class that stands for none: which examples lose theirs in training is then the same."""
    return net(x, label, class_labels=torch.full_like(label, net.config.num_embeds_ada_norm).long(), return_dict=False)[
        0
    ]


def pair(name: str, width: int) -> tuple[Side, Side]:
    """Our network and diffusers', with the same weights; outputs are checked to be equal."""
    import diffusers

    torch.manual_seed(0)
    call, schedule = _theirs, dict(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", num_train_timesteps=1000)
    if name == "ddpm":
        peer = diffusers.UNet2DModel(
            sample_size=SIZE,
            block_out_channels=[width, 2 * width, 2 * width, 2 * width],
            down_block_types=["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
            up_block_types=["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
            attention_head_dim=None,
            downsample_padding=0,
            flip_sin_to_cos=False,
            freq_shift=1,
            norm_eps=1e-6,
        )
    elif name == "ncsnpp":
        call, schedule = _theirs_by_sigma, dict(sigma_min=0.01, sigma_max=50.0)
        peer = diffusers.UNet2DModel(
            sample_size=SIZE,
            block_out_channels=[width, 2 * width, 2 * width, 2 * width],
            down_block_types=["SkipDownBlock2D", "AttnSkipDownBlock2D", "SkipDownBlock2D", "SkipDownBlock2D"],
            up_block_types=["SkipUpBlock2D", "SkipUpBlock2D", "AttnSkipUpBlock2D", "SkipUpBlock2D"],
            attention_head_dim=None,
            mid_block_scale_factor=2**0.5,
            norm_eps=1e-6,
            norm_num_groups=None,
            time_embedding_type="fourier",
            freq_shift=0,
        )
    else:
        call = _theirs_without_class
        peer = diffusers.DiTTransformer2DModel(
            num_attention_heads=6, attention_head_dim=64, in_channels=3, num_layers=4, sample_size=SIZE, patch_size=2
        )
        for block in peer.transformer_blocks:  # equal, as in published files
            block.norm1.emb.load_state_dict(peer.transformer_blocks[0].norm1.emb.state_dict())
    with tempfile.TemporaryDirectory() as folder:
        peer.save_pretrained(folder)
        net = load_diffusers(folder, schedule).net
    ours, theirs = Side(net.eval(), _ours), Side(peer.eval(), call)
    x, label = example(2, "cpu", torch.contiguous_format, name)
    with torch.no_grad():
        expected = theirs(x, label)
        error = float((ours(x, label) - expected).abs().max() / expected.abs().max())
    if not error < TOLERANCE:
        raise AssertionError(f"{name}: outputs differ by {error:.1e} of the largest; they should be equal.")
    print(f"{name}: {parameters(net):.1f} M parameters, outputs agree to {error:.0e}", file=sys.stderr, flush=True)
    return ours, theirs


def parameters(net: nn.Module) -> float:
    """Number of parameters in millions."""
    return sum(p.numel() for p in net.parameters()) / 1e6


def example(batch: int, device: Any, layout: torch.memory_format, name: str) -> tuple[Tensor, Tensor]:
    """Noise, and labels such as the network knows."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 3, SIZE, SIZE, generator=generator).to(device, memory_format=layout)
    label = torch.rand(batch, generator=generator).to(device)
    return x, label.log() if name == "ncsnpp" else (999 * label).round()


# -- measurement -----------------------------------------------------------------------------------------------------

Work = Callable[[], Any]


def forward(side: Side, x: Tensor, label: Tensor, bfloat16: bool = False) -> Work:
    """One evaluation without gradients."""
    side.net.eval()

    def work() -> None:
        with torch.no_grad(), torch.autocast(x.device.type, torch.bfloat16, enabled=bfloat16):
            side(x, label)

    return work


def train(side: Side, x: Tensor, label: Tensor, bfloat16: bool = False) -> Work:
    """One step of training, towards x."""
    side.net.train()
    optimizer = torch.optim.AdamW(side.net.parameters(), lr=1e-5)

    def work() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bfloat16):
            loss = F.mse_loss(side(x, label).float(), x)
        loss.backward()
        optimizer.step()

    return work


TASKS = {"forward": forward, "train": train}


def timed(work: Work, device: torch.device) -> float:
    """Milliseconds: of CPU time with one thread, of wall time with more, on a GPU between events."""
    if device.type == "cpu":
        clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        begun = clock()
        work()
        return 1e3 * (clock() - begun)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end)


def peak(work: Work, device: torch.device) -> float | None:
    """MiB that one run allocates at most beyond what is held already, on a GPU."""
    if device.type == "cpu":
        return None
    held = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    work()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - held) / 2**20


@dataclass
class Bench:
    """How rows are measured, and those that have been."""

    repeats: int
    seconds: float
    device: torch.device
    rows: list[dict[str, Any]]

    def compare(self, part: str, what: dict[str, Any], first: tuple[str, Work], second: tuple[str, Work]) -> None:
        """One row, printed as soon as it is known. Both run before, and the first call's time is kept."""
        names, works = zip(first, second, strict=True)
        started = []
        for work in works:
            clock = time.perf_counter()
            timed(work, self.device)
            started.append(1e3 * (time.perf_counter() - clock))  # of wall time: compilers have processes of their own
        memory = [peak(work, self.device) for work in works]
        slow = max(started) > 500 and "compiled" not in names
        again = started if slow else [timed(work, self.device) for work in works]
        calls = [max(1, int(20 / v)) for v in again]  # 20 ms a turn or more
        times: list[tuple[float, float]] = []
        clock = time.perf_counter()
        while len(times) < self.repeats and (len(times) < 3 or time.perf_counter() - clock < self.seconds):
            turn = [0.0, 0.0]
            for i in (0, 1) if len(times) % 2 == 0 else (1, 0):
                turn[i] = sum(timed(works[i], self.device) for _ in range(calls[i])) / calls[i]
            times.append((turn[0], turn[1]))
        both = torch.tensor(times, dtype=torch.float64)
        low, ratio, high = (both[:, 0] / both[:, 1]).quantile(torch.tensor([0.25, 0.5, 0.75]).double()).tolist()
        middle = both.quantile(0.5, 0).tolist()
        row = {
            "part": part,
            **what,
            "sides": list(names),
            "milliseconds": [round(v, 3) for v in middle],
            "ratio": round(ratio, 4),
            "quartiles": [round(low, 4), round(high, 4)],
            "turns": len(times),
            "first_call_seconds": [round(v / 1e3, 2) for v in started],
        }
        if self.device.type != "cpu":
            row["peak_mib"] = memory
        self.rows.append(row)
        label = ", ".join(str(v) for v in what.values())
        sides = f"{names[0]} / {names[1]}"
        note = f"  first call {started[0] / 1e3:.0f} s" if names[0] == "compiled" else ""
        if self.device.type != "cpu":
            note += f"  {memory[0]:.0f} / {memory[1]:.0f} MiB"
        print(
            f"{label:42s} {sides:24s} {middle[0]:9.2f} {middle[1]:9.2f} {ratio:7.3f}  {low:.3f}-{high:.3f}{note}",
            flush=True,
        )


def heading(text: str) -> None:
    print(f"\n{text:67s} {'ms':>9s} {'ms':>9s} {'ratio':>7s}  quartiles", flush=True)


def equal(bench: Bench, name: str, sides: tuple[Side, Side], batches: list[int], layouts: list[str]) -> None:
    """Ours beside diffusers', as both are."""
    for layout in layouts if name != "dit" else layouts[:1]:  # which has one convolution
        placed = [side.placed(bench.device, LAYOUTS[layout]) for side in sides]
        for batch in batches if layout == layouts[0] or bench.device.type != "cpu" else batches[:1]:
            inputs = example(batch, bench.device, LAYOUTS[layout], name)
            for task, make in TASKS.items():
                what = dict(network=name, task=task, batch=batch, layout=layout)
                ours, theirs = (make(side, *inputs) for side in placed)
                bench.compare("equal", what, ("ours", ours), ("diffusers", theirs))


def compiled(bench: Bench, name: str, side: Side, batch: int, tasks: list[str]) -> None:
    """Ours through `torch.compile` beside ours as it is."""
    for task in tasks:
        torch.compiler.reset()
        inputs = example(batch, bench.device, torch.contiguous_format, name)
        works = [
            TASKS[task](side.placed(bench.device, torch.contiguous_format, compiled=c), *inputs) for c in (True, False)
        ]
        what = dict(network=name, task=task, batch=batch)
        bench.compare("compiled", what, ("compiled", works[0]), ("eager", works[1]))


def attention(bench: Bench) -> None:
    """`attend` as it is in training and without gradients (fused) beside the one that can be differentiated twice."""
    for name, shape in SHAPES.items():
        q, k, v = (torch.randn(shape, device=bench.device) for _ in range(3))
        leaf = q.clone().requires_grad_()

        def ahead(training: bool, q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Work:
            return lambda: attend(q, k, v, training)

        def back(training: bool, q: Tensor = leaf, k: Tensor = k, v: Tensor = v) -> Work:
            return lambda: torch.autograd.grad(attend(q, k, v, training).sum(), q)

        for task, make in (("forward", ahead), ("forward and back", back)):
            bench.compare(
                "attention", dict(network=name, task=task), ("fused", make(True)), ("written out", make(False))
            )


def presets(bench: Bench) -> None:
    """The published networks of CIFAR-10 at full width, one image."""
    for name, options in PRESETS.items():
        torch.manual_seed(0)
        side = Side(UNet(3, 3, (SIZE, SIZE), width=128, **options).eval(), _ours)
        kind = "ncsnpp" if options else "ddpm"
        works = []
        for layout in LAYOUTS.values():
            works.append(forward(side.placed(bench.device, layout), *example(1, bench.device, layout, kind)))
        what = dict(network=name, parameters=f"{parameters(side.net):.0f} M", batch=1)
        bench.compare("presets", what, ("channels_last", works[1]), ("contiguous", works[0]))


def half(bench: Bench, name: str, sides: tuple[Side, Side], batches: list[int]) -> None:
    """bfloat16 autocast with channels last, on a GPU: ours beside theirs, and compiled beside both compiled and not."""

    def build(side: Side, batch: int, task: str, compile_: bool) -> Work:
        inputs = example(batch, bench.device, torch.channels_last, name)
        return TASKS[task](side.placed(bench.device, torch.channels_last, compile_), *inputs, bfloat16=True)

    for batch in batches:
        for task in TASKS:
            torch.compiler.reset()
            what = dict(network=name, task=task, batch=batch)
            ours, theirs, fast, their_fast = (build(side, batch, task, c) for c in (False, True) for side in sides)
            bench.compare("bfloat16", what, ("ours", ours), ("diffusers", theirs))
            bench.compare("bfloat16", what, ("compiled", fast), ("eager", ours))
            bench.compare("bfloat16", what, ("compiled", fast), ("diffusers compiled", their_fast))


def networks(names: list[str], width: int) -> Iterator[tuple[str, tuple[Side, Side]]]:
    """The pairs, one after the other; none, and a word about it, without diffusers."""
    try:
        importlib.metadata.version("diffusers")
    except importlib.metadata.PackageNotFoundError:
        print("diffusers is not installed: no equal networks.")
        return
    for name in names:
        yield name, pair(name, width)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="batch 2, width 32, three turns, compile forward only")
    parser.add_argument("--width", type=int, default=64, help="of the U-Nets")
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7, help="turns of a row")
    parser.add_argument("--seconds", type=float, default=10.0, help="after which a row ends, once it has three turns")
    parser.add_argument("--networks", nargs="+", default=list(PEERS), choices=PEERS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", nargs="*", default=["ddpm", "dit"], choices=PEERS, help="these too; none: skip it")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "networks.json")
    args = parser.parse_args()
    if args.quick:
        args.width, args.batches, args.repeats, args.seconds = 32, [2], 3, 1.0
    warnings.filterwarnings("ignore")
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    torch.set_num_threads(args.threads)
    torch.compiler.config.force_disable_caches = True  # the first call's time shall not depend on earlier runs
    device = torch.device(args.device)
    bench = Bench(args.repeats, args.seconds, device, [])
    begun = time.perf_counter()
    pairs = dict(networks(args.networks, args.width))

    heading("equal networks, float32")
    for name, sides in pairs.items():
        equal(bench, name, sides, args.batches, list(LAYOUTS))
    heading("two ways to attend")
    attention(bench)
    heading("published networks, one image, float32")
    presets(bench)
    heading("ours compiled, float32")
    for name in args.compile:
        if name in pairs:
            compiled(bench, name, pairs[name][0], args.batches[0], ["forward"] if args.quick else list(TASKS))
    notes = []
    if device.type == "cuda":
        heading("bfloat16 autocast, channels last")
        for name, sides in pairs.items():
            half(bench, name, sides, args.batches)
    else:
        notes.append("no CUDA device: the rows in bfloat16 and peak memory were left out")
        print(f"\n{notes[-1]}")

    libraries = ["torch", *(["diffusers"] if pairs else [])]
    write_json(
        args.out,
        {
            "command": " ".join(["python", "benchmarks/networks.py", *sys.argv[1:]]),
            "date": datetime.date.today().isoformat(),
            "device": "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device),
            "threads": torch.get_num_threads(),
            "versions": {name: importlib.metadata.version(name) for name in libraries},
            "options": json.loads(json.dumps({k: v for k, v in vars(args).items() if k != "out"}, default=str)),
            "minutes": round((time.perf_counter() - begun) / 60, 1),
            "notes": notes,
            "rows": bench.rows,
        },
    )
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
