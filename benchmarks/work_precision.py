"""Plots every sampler's error against its evaluations of the network, and prints FLUX's table.

    uv run benchmarks/work_precision.py                        # all four models
    uv run benchmarks/work_precision.py --model closed-form    # a mixture with a known exact solution, a few minutes

Deterministic samplers: the distance from the converged sample of the same noise, ||x - ref|| / ||ref||. Where there are
many samples, the median: a few that end in another mode would dominate a mean.
Stochastic samplers: the sliced Wasserstein distance between their samples and true ones (closed form) or converged ones
(demo models, over 2x2 patches of latents). Measurements are kept in work_precision.json in `--output` and are not
repeated, even with other versions of the dependencies. Delete that file to measure again.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from models import CLASSES, PROMPT, ROOT, function, positive, stochastic
from tqdm.auto import tqdm

sys.path.append(str(ROOT / "tests"))

from closed_form import PassesVelocity, evaluations, solve_ode  # noqa: E402

from gallery.pictures import write_whole  # noqa: E402
from parity.exact import KNOWN, flux_pipeline, patched, sdxl_pipeline, sliced_wasserstein  # noqa: E402
from sdxl_comfy_pipeline import sampler_names  # noqa: E402

MODELS = {"closed-form": ("closed-form SDXL", "closed-form FLUX"), "sdxl": ("demo SDXL",), "flux": ("demo FLUX",)}
STEPS = {1: (4, 6, 10, 16, 25, 40, 64, 100, 200), 2: (2, 3, 5, 8, 13, 20, 32, 50, 100)}  # by evaluations per step
IMAGES = 16
RTOL = (0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.003)


def takes(sampler: str, option: str) -> bool:
    return option in inspect.signature(function(sampler)).parameters


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class ClosedForm:
    """4,000 samples of the mixture in one picture, the true ones, and the ODE solved to ten digits."""

    def __init__(self, name: str, **network: Any):
        self.known, self.sdxl, self.key = KNOWN, "SDXL" in name, name
        self.pipe = (sdxl_pipeline if self.sdxl else flux_pipeline)(self.known, torch.float32, **network)

    def draw(self, sampler: str, steps: int, seed: int = 0, **options: Any) -> tuple[int, torch.Tensor]:
        """The number of evaluations, and samples of shape (4000, 16)."""
        options |= {"schedule": "karras"} if self.sdxl else {}
        seen, samples = evaluations(
            self.pipe, 50, 80, sampler=sampler, num_inference_steps=steps, generator=seeded(seed), **options
        )
        self.begun = seen[0]
        return len(seen), samples[0]

    @functools.cached_property
    def true(self) -> list[torch.Tensor]:
        return [self.known.sample(4000, seeded(seed)) for seed in (1, 2)]

    def distance(self, samples: torch.Tensor) -> float:
        return sliced_wasserstein(samples, self.true[0])

    def floor(self) -> float:
        """Of two sets of true samples, the mean over ten pairs."""
        pairs = [[self.known.sample(4000, seeded(2 * i + j)) for j in (3, 4)] for i in range(10)]
        return sum(sliced_wasserstein(*pair) for pair in pairs) / len(pairs)

    def error(self, samples: torch.Tensor) -> float:
        """Of the first 200 samples, from the ODE's solution at sigma = 1e-4."""
        away = samples[:200].double() - self.reference
        return (away.norm(dim=1) / self.reference.norm(dim=1)).median().item()

    @functools.cached_property
    def reference(self) -> torch.Tensor:
        if self.sdxl:
            self.draw("euler", 2)
            sigma, y = self.begun
            return solve_ode(self.known, y[0, :200], sigma, 1e-4)
        # FLUX begins at t = 1, where there is no y: from x = noise a step of Euler's, exact there, to sigma = 1e4
        t = 1 - 1e-4
        _, noise = evaluations(
            self.pipe, 50, 80, sampler=lambda model, x, sigmas: x, generator=seeded(0), num_inference_steps=2
        )
        x = (1 - t) * self.known.mean + t * noise[0, :200].double()
        return solve_ode(self.known, x / (1 - t), t / (1 - t), 1e-4)


class Demo:
    """Latents of a demo model, `images` of them, and a converged run of Heun's method over its own kind of levels."""

    def __init__(self, name: str, images: int):
        self.sdxl, self.images = "SDXL" in name, images
        self.key = name if images == IMAGES else f"{name}, {images} images"
        model = "sdxl" if self.sdxl else "flux"
        self.pipe = CLASSES[model][0].from_pretrained(ROOT / "demo" / model)
        self.pipe.set_progress_bar_config(disable=True)
        self.network = self.pipe.unet if self.sdxl else self.pipe.transformer
        self.options = {"schedule": "karras", "guidance_scale": 1.0} if self.sdxl else {"max_sequence_length": 64}

    def draw(self, sampler: str, steps: int, seed: int = 0, **options: Any) -> tuple[int, torch.Tensor]:
        """The number of evaluations, and latents of shape (patches, d): of one image where there is no noise."""
        images = self.images if stochastic(sampler) or options.pop("set", False) else 1
        counted: list[int] = []
        hook = self.network.register_forward_pre_hook(lambda *_: counted.append(1))
        try:
            latents = self.pipe(
                [PROMPT] * images,
                sampler=sampler,
                num_inference_steps=steps,
                generator=[seeded(seed + i) for i in range(images)],
                output_type="latent",
                **self.options,
                **options,
            ).images
        finally:
            hook.remove()
        latents = patched(latents, KNOWN) if latents.ndim == 4 else latents
        return len(counted), latents.flatten(0, 1)

    @functools.cached_property
    def converged(self) -> list[torch.Tensor]:
        return [self.draw("heun", 60, seed=1000 * (i + 1), set=True)[1] for i in range(2)]

    def distance(self, samples: torch.Tensor) -> float:
        return sliced_wasserstein(samples, self.converged[0])

    def floor(self) -> float:
        return sliced_wasserstein(*self.converged)

    @functools.cached_property
    def reference(self) -> torch.Tensor:
        return self.draw("heun", 400)[1].double()

    def error(self, samples: torch.Tensor) -> float:
        return ((samples.double() - self.reference).norm() / self.reference.norm()).item()


class Results:
    """Measurements in a JSON file, written after each one, so that an interrupted run can continue."""

    def __init__(self, path: Path):
        self.path = path
        self.found = json.loads(path.read_text()) if path.exists() else {}

    def get(self, key: str, measure: Callable[[], Any]) -> Any:
        if key not in self.found:
            self.found[key] = measure()
            text = json.dumps(self.found, indent=0, sort_keys=True) + "\n"
            write_whole(self.path, lambda temporary: temporary.write_text(text))
        return self.found[key]


def runs(sampler: str) -> list[dict[str, Any]]:
    """The calls that make 4 to 200 evaluations."""
    if takes(sampler, "rtol"):
        return [{"steps": 100, "sampler_kwargs": {"rtol": rtol, "atol": 0.15 * rtol}} for rtol in RTOL]
    twice = sampler in ("heun", "dpm_2", "dpm_2_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde")
    return [{"steps": steps} for steps in STEPS[2 if twice else 1]]


def measure(name: str, model: Any, results: Results) -> dict[str, list[tuple[int, float]]]:
    """(evaluations, error or distance) of every sampler."""
    jobs = [(sampler, run) for sampler in sampler_names() for run in runs(sampler)]
    curves: dict[str, list[tuple[int, float]]] = {}
    for sampler, run in tqdm(jobs, desc=name):

        def one(sampler: str = sampler, run: dict[str, Any] = run) -> tuple[int, float]:
            count, samples = model.draw(sampler, **run)
            return count, (model.distance if stochastic(sampler) else model.error)(samples)

        point = results.get(f"{model.key if stochastic(sampler) else name}/{sampler}/{json.dumps(run)}", one)
        curves.setdefault(sampler, []).append(tuple(point))
    return curves


def flux_table(results: Results) -> None:
    """The table of docs/choosing-a-sampler.md: FLUX's distances at 20 and 50 steps, in both parameterizations."""
    model, wrong = ClosedForm("closed-form FLUX"), ClosedForm("closed-form FLUX", network=PassesVelocity)
    columns = {"velocity": (wrong, "flow"), "flow": (model, "flow"), "ve": (model, "ve"), "auto": (model, "auto")}

    def distance(sampler: str, column: str, steps: int) -> float | None:
        drawing, parameterization = columns[column]
        if column == "velocity" and takes(sampler, "rtol"):
            return None  # its error control might never end
        return drawing.distance(drawing.draw(sampler, steps, parameterization=parameterization)[1])

    print(f"\nFLUX, closed form: distance at 20 and 50 steps (two sets of true samples: {model.floor():.3f})\n")
    print('| sampler | velocity as `denoised`, 20 / 50 steps | flow | ve | `"auto"` |\n|---|---|---|---|---|')
    worst = 0.0
    for sampler in sampler_names():
        pairs: dict[str, list[float | None]] = {}
        for column in columns:
            keys = {
                f"flux table/{sampler}/{column}/{n}": functools.partial(distance, sampler, column, n) for n in (20, 50)
            }
            pairs[column] = [results.get(key, measuring) for key, measuring in keys.items()]
        worst = max(worst, pairs["auto"][0])
        chosen = "flow" if pairs["auto"] == pairs["flow"] else "ve"
        cells = ["not run" if None in pairs["velocity"] else "{:.2g} / {:.2g}".format(*pairs["velocity"])]
        cells += ["{:.3f} / {:.3f}".format(*pairs[column]) for column in ("flow", "ve")]
        print(f"| {sampler} | {' | '.join(cells)} | {chosen} |")
    print(f"\nworst at 20 steps in auto: {worst:.3f}")


def draw(curves: dict[str, dict[str, list[tuple[int, float]]]], floors: dict[str, float], path: Path) -> None:
    """One row per model: deterministic samplers on the left, stochastic ones on the right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, rows = pyplot.subplots(len(curves), 2, figsize=(13, 5.2 * len(curves)), squeeze=False)
    markers = "os^vD*PX"
    for (name, samplers), axes in zip(curves.items(), rows):
        for axis, noisy in zip(axes, (False, True)):
            chosen = [sampler for sampler in samplers if stochastic(sampler) == noisy]
            for i, sampler in enumerate(chosen):
                points = sorted(samplers[sampler])
                axis.loglog(*zip(*points), marker=markers[i], markersize=5, linewidth=1.4, label=sampler)
            if noisy:
                label = f"two {'true' if 'closed' in name else 'converged'} sets"
                axis.axhline(floors[name], color="grey", linestyle="--", label=label)
            axis.set_title(f"{name}, samplers with{'' if noisy else 'out'} noise")
            axis.set_xlabel("evaluations of the network")
            axis.set_ylabel("distance of the samples" if noisy else "error of the sample")
            axis.set_xticks(STEPS[1], [str(count) for count in STEPS[1]])
            axis.minorticks_off()
            axis.grid(alpha=0.3, which="both")
            axis.legend(fontsize=9)
    figure.tight_layout()
    write_whole(path, lambda temporary: figure.savefig(temporary, dpi=80, format="png"))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[*MODELS, "all"], default="all")
    parser.add_argument("--images", type=positive, default=IMAGES, help="of a demo model, for stochastic samplers")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks", help="folder (default: benchmarks)")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    results = Results(options.output / "work_precision.json")
    for group in MODELS if options.model == "all" else (options.model,):
        curves, floors = {}, {}
        for name in MODELS[group]:
            model = ClosedForm(name) if group == "closed-form" else Demo(name, options.images)
            curves[name] = measure(name, model, results)
            floors[name] = results.get(f"{model.key}/floor", model.floor)
        draw(curves, floors, options.output / f"work_precision_{group}.png")
        if group == "closed-form":
            flux_table(results)


if __name__ == "__main__":
    main()
