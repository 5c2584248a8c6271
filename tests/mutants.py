"""Plausible mistakes, one at a time, and the tests that have to notice: `make mutants`.

Every mutant replaces one piece of text, which must occur exactly once, in a copy of the package, and runs the tests named with it
there; the working tree is not touched. A mutant that no test notices survives. Before the first one all named tests have to pass
on the copy as it is. Exit code 1 for a survivor, a text that is not found once, or tests that fail without a mutant.

    python tests/mutants.py [WORD ...]      only mutants whose file, text or tests hold one of the words
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"
import pytest
import scipy.stats  # noqa: F401
import torch  # noqa: F401  for the children

sys.dont_write_bytecode = True  # two mutants of one second and one length would share a compiled file
ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 240  # seconds for each test named, after which a mutant that hangs counts as noticed


class Mutant(NamedTuple):
    """`old` becomes `new` in scoresde/`file`; `tests`, test ids below tests/, with spaces between."""

    file: str
    old: str
    new: str
    tests: str


def of(file: str, tests: str, *pairs: tuple[str, str]) -> list[Mutant]:
    """Mutants of one file that the same tests notice."""
    return [Mutant(file, old, new, tests) for old, new in pairs]


ELBO = "test_elbo.py::test_the_exact_bound_of_a_gaussian_with_a_large_prior_term"
SPREAD = "test_elbo.py::test_standard_errors_are_calibrated"
CONTROL = "test_elbo.py::test_the_control_variates_are_unbiased_and_help"
TERMS = "test_ddpm_bound.py::test_every_term_of_a_gaussian"
INTEGERS = "test_ddpm_bound.py::test_the_decoder_of_integers"
CURVE = "test_decoupled.py::test_any_curve_gives_the_value"
LEARNED = "test_dequantization.py::test_points_lie_in_their_intervals_and_have_the_stated_density"

MUTANTS = [
    # the continuous bound: every term, the control variates, the standard error
    *of(
        "likelihood/variational.py",
        ELBO,
        ("+ decoder + prior_kl(sde, x, sde.t_max))", "+ decoder)"),
        ("+ decoder + prior_kl(sde, x, sde.t_max))", "+ decoder + 10 * prior_kl(sde, x, sde.t_max))"),
        ("(total(ratio, weights) + decoder", "(total(ratio, weights) - decoder"),
        ("0.5 * d * width", "d * width"),
        ("2 * math.pi * math.e) - high", "2 * math.pi * math.e) + high"),
        ("(signal * sum_event", "(2 * signal * sum_event"),
        ("(noise - 1 - math.log(noise))", "(noise - 1 + math.log(noise))"),
        ("(float(v) / sde.prior_std) ** 2", "(float(v) / sde.prior_std)"),
        ("width * (j // together + u)", "width * (j + u)"),
    ),
    *of(
        "likelihood/variational.py",
        CONTROL,
        ("- factor[:, None] * excess", "+ factor[:, None] * excess"),
        ("- factor[:, None] * excess", ""),
        ("control_factor(0.5 * (after + before),", "control_factor(mean,"),
        ("reshape(parts, together, n) / d", "reshape(parts, together, n)"),
    ),
    *of(
        "likelihood/variational.py",
        "test_elbo.py::test_the_place_within_a_stratum_is_controlled",
        ("- 0.5 * (after - before)[:, None] * place", "+ 0.5 * (after - before)[:, None] * place"),
        ("- 0.5 * (after - before)[:, None] * place", ""),
    ),
    *of(
        "likelihood/variational.py",
        SPREAD,
        ("/ (k * (k - 1))", "/ (k * k)"),
        ("(weights.square()[:, None] * variance_of_mean", "(weights[:, None] * variance_of_mean"),
        ("variance_of_total(ratio, weights).sqrt()", "variance_of_total(ratio, weights)"),
    ),
    *of(
        "likelihood/variational.py",
        "test_elbo.py::test_standard_errors_of_small_batches_are_calibrated",
        ("math.comb(2 * order, order)", "2**order"),
    ),
    *of(
        "likelihood/variational.py",
        "test_elbo.py::test_nan_from_the_network_is_named",
        ("    if bool(bad.any()):\n        draw", "    if False:\n        draw"),
    ),
    # the bound of finitely many steps
    *of(
        "likelihood/ddpm.py",
        TERMS,
        ("torch.expm1(lam.diff())", "torch.exp(lam.diff())"),
        ("0.5 * d * rho * torch.expm1", "d * rho * torch.expm1"),
        ("(0.5 * rho * lam.exp().diff())", "(rho * lam.exp().diff())"),
        ("(rho - 1 - rho.log())", "(rho - 1 + rho.log())"),
        ("(sde.sigma(times[1:]) / sde.sigma(times[:-1])).square()", "(sde.sigma(times[1:]) / sde.sigma(times[:-1]))"),
        ("+ math.log(r))", "- math.log(r))"),
        ("0.5 * (error - d * gaussian_error", "(error - d * gaussian_error"),
        ("prior_kl(model.sde, x, float(times[0]))", "prior_kl(model.sde, x, float(times[1]))"),
        ("-(prior + diffusion + reconstruction)", "-(diffusion + reconstruction)"),
    ),
    *of(
        "likelihood/ddpm.py",
        "test_ddpm_bound.py::test_subsampled_steps_are_unbiased",
        ("share = (last - first) / weight", "share = 1 / weight"),
        ("0.5 * (first + last - 1)) / (last", "0.5 * (first + last)) / (last"),
        ("i = i + (noising", "i = i + 0 * (noising"),
    ),
    *of(
        "likelihood/ddpm.py",
        INTEGERS,
        ("torch.where(k == 0, -torch.inf, low + width * k)", "low + width * k"),
        ("flip = a + b > 0", "flip = a > 1e30"),
        ("(edges[1] - denoised) / r))", "(edges[1] - denoised) / r**2))"),
    ),
    # log densities: signs, Jacobians, history
    *of(
        "likelihood/density.py",
        "test_likelihood.py::test_exact_trace_at_a_tight_tolerance",
        ("terminal_log_prob(found.latent) + found.change", "terminal_log_prob(found.latent) - found.change"),
    ),
    *of(
        "likelihood/density.py",
        "test_likelihood.py::test_probes_are_independent_of_the_noise_of_samples",
        ("PROBES = 1  #", "PROBES = 0  #"),
    ),
    *of(
        "likelihood/decoupled/quadrature.py",
        CURVE,
        ("self.d * math.log(large / small)", "self.d * math.log(small / large)"),
        ("-(state + f / math.tan(angle))", "(state + f / math.tan(angle))"),
        ("(f - slope).double()", "(f + slope).double()"),
        ("self.u = x / small", "self.u = x / large"),
    ),
    *of(
        "likelihood/decoupled/quadrature.py",
        "test_likelihood.py::test_a_network_ends_with_the_prior",
        ("field.p[j] * self.d", "field.p[j]"),
    ),
    *of(
        "likelihood/decoupled/quadrature.py",
        "test_plan.py::test_what_a_survey_sees_is_what_rules_do",
        ("np.arange(points) + 0.5", "np.arange(points) + 1.0"),
    ),
    *of(
        "likelihood/decoupled/quadrature.py",
        "test_decoupled.py::test_rule_error_follows_the_error",
        ("tail * (tail / top).sqrt() / 8", "tail / 8"),
    ),
    *of(
        "likelihood/decoupled/trajectory.py",
        "test_decoupled.py::test_stretch test_decoupled.py::test_grids",
        ("return 0.5 * (1 + x * x)", "return (1 + x * x)"),
        ("half * w / warp.slope(theta)", "w / warp.slope(theta)"),
    ),
    *of(
        "likelihood/decoupled/trajectory.py",
        "test_decoupled.py::test_order_of_the_trajectory",
        ("np.arange(implicit - order + 1, implicit + 1)", "np.arange(implicit - order, implicit)"),
        ("order = min(i, ORDER)", "order = min(i, 2)"),
        ("_adams(order, 1)", "_adams(order, 0)"),
    ),
    *of(
        "likelihood/decoupled/refinement.py",
        "test_decoupled.py::test_reported_errors_are_those_observed",
        ("estimates.std(1) / math.sqrt(k)", "estimates.std(1)"),
    ),
    *of(
        "likelihood/decoupled/refinement.py",
        "test_decoupled.py::test_density_at_the_default_tolerance",
        ("NATS_PER_TOLERANCE = 10.0", "NATS_PER_TOLERANCE = 1e4"),
    ),
    # traces
    *of(
        "likelihood/divergence.py",
        "test_divergence.py::test_exact test_divergence.py::test_unbiased_with_calibrated_errors",
        ("flatten(1)[:, i].double())", "flatten(1)[:, 0].double())"),
        ("torch.float32) < 0.5, -1.0", "torch.float32) < 0.4, -1.0"),
        ("inside[:, None] + outside", "outside"),
        ("- (flat[:, third:] @ basis.mT) @ basis", ""),
        ("(self.replicates, self.rows)).mean(2)", "(self.replicates, self.rows)).sum(2)"),
    ),
    *of(
        "likelihood/divergence.py",
        "test_divergence.py::test_hadamard_rows",
        ("for shift in (32, 16, 8, 4, 2, 1)", "for shift in (32, 16, 8, 4, 2)"),
    ),
    # integers: dequantization, units, Jacobian
    *of(
        "likelihood/dequantization.py",
        LEARNED,
        ("-(math.prod(data.shape[1:]) * math.log(self.width))", "(math.prod(data.shape[1:]) * math.log(self.width))"),
        ("-sum_event(0.5 * z.square() + constant)", "-sum_event(0.5 * z.square() - constant)"),
        ("_log_rho(y) - log_scale", "_log_rho(y) + log_scale"),
        ("- log_scale - math.log(self.width)", "- log_scale"),
        ("erfinv((2 * u - 1) * mass)", "erfinv(2 * u - 1)"),
    ),
    *of(
        "likelihood/dequantization.py",
        "test_dequantization.py::test_densities_add_over_entries_and_follow_the_scale",
        ("* self.scale * self.std * mass)", "* self.std * mass)"),
    ),
    *of(
        "likelihood/dequantization.py",
        "test_dequantization.py::test_importance_weighting_tightens_monotonically",
        (" - math.log(log_weights.shape[0])", ""),
    ),
    *of(
        "likelihood/dequantization.py",
        "test_likelihood.py::test_quantize_inverts_dequantize",
        ("torch.floor((x - low)", "torch.round((x - low)"),
        ("(k.to(u.dtype) + u) / levels", "(k.to(u.dtype) + u) / (levels - 1)"),
    ),
    *of(
        "likelihood/bits.py",
        "test_likelihood.py::test_bits_per_dim_by_the_formula",
        ("transpose(0, 1)) / (d * math.log(2)))", "transpose(0, 1)) / d)"),
        ("value - torch.cat([q for _, q in drawn])", "value + torch.cat([q for _, q in drawn])"),
        ("values.std() / math.sqrt(n)", "values.std()"),
        ("[derive(s, 1) for s in seeds]", "[derive(s, 2) for s in seeds]"),
    ),
    *of(
        "likelihood/bits.py",
        "test_likelihood.py::test_bits_from_nats_by_hand",
        ("(log_prob + d * math.log(", "(log_prob - d * math.log("),
        ("(d * math.log(2))\n\n\ndef bits_per_dim", "d\n\n\ndef bits_per_dim"),
    ),
    *of(
        "likelihood/bits.py",
        "test_dequantization.py::test_the_error_over_draws_is_calibrated",
        ("(per_draw.var(1).sum() / draws).sqrt() / n", "per_draw.var(1).sum().sqrt() / n"),
    ),
    # schedules
    *of(
        "sde/processes.py",
        "test_sde.py::test_published_closed_forms test_sde.py::test_overrides_agree_with_automatic_differentiation "
        "test_sde.py::test_edm_cosine_and_rectified_flow_closed_forms",
        ("0.5 * t * (self.beta_max", "t * (self.beta_max"),
        ("torch.expm1(-2 * self._integral(as_tensor(t)))", "torch.expm1(-self._integral(as_tensor(t)))"),
        ("self.sigma(t) * math.sqrt(2 * self._log_ratio)", "self.sigma(t) * math.sqrt(self._log_ratio)"),
        ("* (high - low)) ** (self.rho - 1)", "* (high - low)) ** self.rho"),
        ("torch.sqrt(2 * speed * torch.tan(theta))", "torch.sqrt(speed * torch.tan(theta))"),
        ("math.atan(math.exp(-0.5 * self.log_snr_max))", "math.atan(math.exp(-self.log_snr_max))"),
        ("return self._beta(as_tensor(t)) * self.alpha(t) ** 2", "return self._beta(as_tensor(t)) * self.alpha(t)"),
    ),
    *of(
        "sde/processes.py",
        "test_sde.py::test_time_inverts_log_snr",
        ("return -b - 2 * safe_log(", "return -b - safe_log("),
        ("self.beta_min**2 + 2 * (self.beta_max", "self.beta_min**2 + 4 * (self.beta_max"),
    ),
    *of(
        "sde/base.py",
        "test_sde.py::test_prior",
        ("0.5 * math.log(2 * math.pi) + math.log(std)", "0.5 * math.log(2 * math.pi) - math.log(std)"),
        ("return self.prior_std * RandomSource", "return RandomSource"),
    ),
    *of(
        "sde/base.py",
        "test_sde.py::test_user_defined_process",
        ("(2 * sigma * (self.sigma_dot(t)", "(sigma * (self.sigma_dot(t)"),
    ),
    # losses
    *of(
        "losses.py",
        "test_losses.py::test_weightings_by_their_definitions",
        ("(sde.diffusion(t) / sde.sigma(t)) ** 2\n    snr", "(sde.diffusion(t) / sde.sigma(t))\n    snr"),
        ('1 + 1 / (snr * checks.positive(sigma_data, "sigma_data") ** 2)', "1 + 1 / (snr * sigma_data)"),
        ("(MIN_SNR_GAMMA / snr).clamp_max(1.0)", "(MIN_SNR_GAMMA / snr).clamp_min(1.0)"),
        ("MIN_SNR_GAMMA = 5.0", "MIN_SNR_GAMMA = 4.0"),
    ),
    *of(
        "losses.py",
        "test_losses.py::test_log_normal_law",
        ("LOG_NORMAL = (-1.2, 1.2)", "LOG_NORMAL = (-1.2, 1.0)"),
        ("LOG_NORMAL = (-1.2, 1.2)", "LOG_NORMAL = (1.2, 1.2)"),
        ("sde.time(-2 * log_s)", "sde.time(-log_s)"),
    ),
    *of(
        "losses.py",
        "test_losses.py::test_importance_ratio_integrates_any_function",
        ("(high - low) / (speed * (last - first))", "(high - low) / speed"),
        ("speed = (sde.diffusion(t) / sde.sigma(t)) ** 2", "speed = sde.diffusion(t) / sde.sigma(t)"),
    ),
    *of(
        "losses.py",
        "test_losses.py::test_sliced_loss_equals_its_formula",
        ("+ 0.5 * projected**2", "+ projected**2"),
    ),
    # the probability flow and time grids
    *of(
        "flow.py",
        "test_samplers.py::test_flow_against_an_independent_solve",
        ("cosine * noise - sine_over_c * denoised", "cosine * noise + sine_over_c * denoised"),
    ),
    *of(
        "grids.py",
        "test_grids.py::test_karras_is_equation_5",
        ("lambda r: r ** (1 / rho)", "lambda r: r**rho"),
    ),
    *of(
        "numerics.py",
        "test_lagrange.py::test_integrals_of_polynomials test_lagrange.py::test_one_at_their_own_knot",
        ("factors = (at - knot) / gaps", "factors = (at + knot) / gaps"),
        ("gaps = knots - knot", "gaps = knot - knots"),
    ),
    # training
    *of(
        "train/loop.py",
        "test_train.py::test_the_average_warms_up",
        ("(1 + step) / (10 + step)", "1.0"),
        ("(1 + step) / (10 + step)", "(1 + step) / (100 + step)"),
        ("rate = 1 - min(decay", "rate = min(decay"),
    ),
    # samplers
    *of(
        "samplers/linear.py",
        "test_samplers.py::test_euler_is_equation_6",
        ("0.5 * (1 + self.eta**2) * g2", "(1 + self.eta**2) * g2"),
        ("self.eta * (g2 * h).sqrt()", "self.eta * g2 * h"),
    ),
    *of(
        "samplers/linear.py",
        "test_samplers.py::test_ancestral_is_ddpm_for_vp test_samplers.py::test_ve_formulas",
        ("sde.sigma(s) ** 2 / sde.sigma(t) ** 2", "sde.sigma(s) / sde.sigma(t)"),
        ("return a * shrink, sde.alpha(s) * v", "return a * shrink, sde.alpha(t) * v"),
        ("return 2 - a - pull, pull * sde.alpha(t), v.sqrt()", "return 2 - a - pull, pull * sde.alpha(t), v"),
    ),
    *of(
        "samplers/linear.py",
        "test_samplers.py::test_ddim_is_euler_in_the_straight_coordinates test_samplers.py::test_ddim_of_eta_one_is_ancestral",
        ("(sigma_s**2 - noise**2).clamp_min(0)", "(sigma_s**2 + noise**2).clamp_min(0)"),
        ("sde.alpha(s) - sde.alpha(t) * keep, noise", "sde.alpha(s) + sde.alpha(t) * keep, noise"),
    ),
    *of(
        "samplers/base.py",
        "test_samplers.py::test_transition_composes",
        ("(a * sde.sigma(s)) ** 2", "a * sde.sigma(s) ** 2"),
    ),
    *of(
        "samplers/heun.py",
        "test_samplers.py::test_order_of_convergence test_stochastic.py::test_edm_is_algorithm_2",
        ("half = 0.5 * gain", "half = gain"),
        ("min(self.s_churn / (self.churn_steps or steps), math.sqrt(2) - 1)", "min(self.s_churn, math.sqrt(2) - 1)"),
        ("self.s_noise * (sde.sigma(up)", "self.s_noise**2 * (sde.sigma(up)"),
    ),
    *of(
        "samplers/heun.py",
        "test_stochastic.py::test_data_in_one_point_is_exact test_stochastic.py::test_weak_order",
        ("(lift * sde.sigma(t)) ** 2", "lift * sde.sigma(t) ** 2"),
    ),
    *of(
        "samplers/corrector.py",
        "test_samplers.py::test_langevin_stationary_variance",
        ("alpha=2 * self.snr * sigma)", "alpha=self.snr * sigma)"),
        ("pull.mul_(2 * self.snr**2)", "pull.mul_(self.snr**2)"),
    ),
    *of(
        "samplers/multistep.py",
        "test_orders.py::test_order",
        ("predictions.insert(0, combine(", "predictions.insert(1, combine("),
        ("x.add_(predictions[j], alpha=w)", "x.add_(predictions[j - 1], alpha=w)"),
        ('cast("Tensor", history.base), row', '1.01 * cast("Tensor", history.base), row'),
        ("return 2 if step == 1 and self.order >= 3 else 0", "return 0"),
    ),
    *of(
        "samplers/multistep.py",
        "test_invariance.py::test_the_mean_of_the_data[adams-angle-VP-unknown]",
        ("shift = s.alpha - keep * t.alpha + sum(", "shift = s.alpha - keep * t.alpha - sum("),
        ("corrector_shift = t.alpha - before + sum(", "corrector_shift = t.alpha - sum("),
    ),
    *of(
        "samplers/few_step.py",
        "test_invariance.py::test_the_mean_of_the_data[auto-VP-unknown]",
        ("shift[first:] += weights @ angle.mean_part(at)", "shift[first:] -= weights @ angle.mean_part(at)"),
    ),
    *of(
        "grids.py",
        "test_grids.py::test_the_spread_of_data",
        ("sigma_data * math.sqrt(math.prod(event_shape))", "sigma_data * math.prod(event_shape)"),
    ),
    *of(
        "samplers/exponential.py",
        "test_orders.py::test_order test_stochastic.py::test_sde_dpm_solver_2m test_stochastic.py::test_er_sde",
        ("s.sigma / s.alpha - t.sigma / t.alpha", "s.sigma - t.sigma"),
        ("noise = np.sqrt(-np.expm1(2 * excess))", "noise = np.sqrt(-np.expm1(excess))"),
        ("0.3 * power / (1 + 10", "power / (1 + 10"),
    ),
    *of(
        "samplers/singlestep.py",
        "test_orders.py::test_order",
        ("((0,), (0, 1), (0, 2))", "((0,), (0, 1), (0, 1))"),
        ("((0.5,), ((0,), (1,)))", "((0.5,), ((0,), (0,)))"),
    ),
]


def run(folder: Path, tests: list[str]) -> tuple[bool, str]:
    """Whether these tests pass in a copy, and the first that fails (or what pytest says instead).

    In a child of this process, which has torch in memory already: its import takes longer than most tests.
    """
    report, begun = folder / "report.txt", time.monotonic()
    child = os.fork()
    if child == 0:
        code = 70
        try:
            with report.open("w") as out:
                os.dup2(out.fileno(), 1)
                os.dup2(out.fileno(), 2)
            os.chdir(folder)
            sys.path[0] = str(folder)
            code = int(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "--tb=no", *tests]))
            sys.stdout.flush()
        finally:
            os._exit(code)
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() - begun > PATIENCE * len(tests):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return False, f"no end within {PATIENCE * len(tests)} s"
        time.sleep(0.05)
    lines = report.read_text().strip().splitlines()
    failed = [line.split()[1] for line in lines if line.startswith(("FAILED", "ERROR")) and len(line.split()) > 1]
    return ended[1] == 0, (failed or lines[-1:] or [f"exit status {ended[1]}"])[0]


def copied(folder: Path) -> None:
    """The package, its tests and their settings, in `folder`."""
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("scoresde", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("setup.cfg", "pyproject.toml"):
        shutil.copy(ROOT / name, folder / name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="only mutants whose file, text or tests hold one of these")
    words = parser.parse_args().words
    chosen = [m for m in MUTANTS if not words or any(w in part for w in words for part in m)]
    if not chosen:
        print(f"no mutant holds {' or '.join(words)}")
        return 1
    begun, survived = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copied(folder)
        where = {m: [f"tests/{test}" for test in m.tests.split()] for m in chosen}
        passes, said = run(folder, sorted({test for tests in where.values() for test in tests}))
        print(f"without a mutant: {'all pass' if passes else said}", flush=True)
        if not passes:
            return 1
        for mutant in chosen:
            path = folder / "scoresde" / mutant.file
            text = path.read_text()
            shown = f"{mutant.file}: {' '.join(mutant.old.split())!r} -> {' '.join(mutant.new.split())!r}"
            if text.count(mutant.old) != 1:
                print(f"not found once ({text.count(mutant.old)} times)  {shown}", flush=True)
                survived += 1
                continue
            path.write_text(text.replace(mutant.old, mutant.new))
            passes, said = run(folder, where[mutant])
            path.write_text(text)
            survived += passes
            print(f"{'SURVIVED' if passes else 'killed'}  {shown}{'' if passes else '  by ' + said}", flush=True)
    print(f"{len(chosen) - survived} of {len(chosen)} killed in {time.monotonic() - begun:.0f} s")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
