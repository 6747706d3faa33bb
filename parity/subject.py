"""A sampler or a scheduler on the model whose answer is known: what it was shown, and where it ended."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch

from comfy_ksampler import comfy_sampler
from gallery.options import FLUX, Family
from gallery.refused import Refused
from parity.exact import KNOWN, call, flux_pipeline, patched, sdxl_pipeline, unpatched, watched
from parity.schedulers import levels_of, prepared
from parity.sides import Side


@dataclass
class Run:
    """One run. States are x = (1 - t) x0 + t noise of shape (images, patches, d), t = sigma / (1 + sigma).

    Args:
        begin: x at the first level, `first`; `end` is x at the last one, `last`.
        asked: t, x and the timestep of each evaluation of the network.
        model: x, sigma and denoised of each, as the sampler sees them, where it was observed.
        callbacks: what the sampler called back with, and after how many evaluations.
        written: which of its arguments it wrote on.
    """

    begin: torch.Tensor
    first: float
    asked: list[tuple[float, torch.Tensor, float]] = field(default_factory=list)
    end: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    last: float = 0.0
    model: list[tuple[torch.Tensor, float, torch.Tensor]] = field(default_factory=list)
    callbacks: list[tuple[dict[str, Any], int]] = field(default_factory=list)
    written: list[str] = field(default_factory=list)


def start(t: float, images: int, patches: int, seed: int = 0) -> torch.Tensor:
    """True x at the level t."""
    x0 = KNOWN.sample(images * patches, generator := torch.Generator().manual_seed(seed))
    noise = torch.randn(x0.shape, generator=generator, dtype=torch.float64)
    return ((1 - t) * x0 + t * noise).view(images, patches, -1)


class Subject:
    """What is judged, in the pipeline of its kind."""

    def __init__(self, side: Side, family: Family, module: ModuleType):
        self.side, self.family, self.module, self.flux = side, family, module, family is FLUX
        self.pipe: Any = functools.cache(functools.partial(flux_pipeline if self.flux else sdxl_pipeline, KNOWN))
        self.parameters = inspect.signature(side.target).parameters

    def takes(self, option: str) -> bool:
        return option in self.parameters

    def ts(self, steps: int) -> torch.Tensor:
        """The levels of a run, in t."""
        raise NotImplementedError

    def levels(self, steps: int) -> torch.Tensor:
        """Those for a sampler of k-diffusion beside it, in sigma, on FLUX in t: falling to zero."""
        ts = self.ts(steps).unique().flip(0)  # sorted: a wrong scheduler's may not fall
        ts = torch.cat([ts[ts > 0], ts.new_zeros(1)])
        return ts if self.flux else ts / (1 - ts)

    def run(self, steps: int, **settings: Any) -> Run:
        raise NotImplementedError

    def network(self, dtype: torch.dtype = torch.float64) -> Any:
        return self.pipe(dtype).transformer if self.flux else self.pipe(dtype).unet

    def _call(self, pipe: Any, run: Run, shape: tuple[int, int, int], latents: Any, seed: Any, **given: Any) -> Any:
        """The latents that the pipeline ends with; `run` gets what the network was asked."""
        images, rows, columns = shape
        seeds = [torch.Generator().manual_seed(s) for s in (seed if isinstance(seed, list) else [seed])]
        generator, before, network = seeds if isinstance(seed, list) else seeds[0], latents.clone(), pipe.components
        network = network["transformer" if self.flux else "unet"]
        try:
            with watched(network) as run.asked:
                end = call(pipe, rows, columns, images=images, latents=latents, generator=generator, **given)
        except Exception as error:
            raise Refused(self.side.failure(error)) from error
        run.written += [] if latents.equal(before) else ["latents"]
        return end.double()

    def _shaped(self, x: torch.Tensor, shape: tuple[int, int, int]) -> torch.Tensor:
        """As the pipeline's latents."""
        return x if self.flux else unpatched(x, torch.Size([shape[0], 4, 2 * shape[1], 2 * shape[2]]))


class Function(Subject):
    """A sampler with k-diffusion's signature, in this project's pipeline."""

    def __init__(
        self,
        side: Side,
        family: Family,
        module: ModuleType,
        schedule: str | None = None,
        parameterization: str = "auto",
    ):
        super().__init__(side, family, module)
        self.schedule = schedule or (None if self.flux else "karras")
        bound: Any = None if side.comfy else module.find_sampler(side.target, side.options)
        if parameterization == "auto" and self.flux:
            parameterization = "ve" if bound and module.uses_ve("auto", bound, self.levels(10)) else "flow"
        self.parameterization = parameterization

    def levels(self, steps: int) -> torch.Tensor:
        """In sigma, on FLUX in t; falling to zero."""
        return self.pipe(torch.float64).noise_levels(*((1,) if self.flux else ()), steps, schedule=self.schedule)

    def ts(self, steps: int) -> torch.Tensor:
        levels = self.levels(steps)
        return levels if self.flux else levels / (1 + levels)

    def sigmas(self, levels: torch.Tensor) -> torch.Tensor:
        """What the sampler sees for these levels."""
        if not self.flux or self.parameterization == "flow":
            return levels
        return self.module.ve_sigmas(levels.clone()) if levels[0] == 1 else levels / (1 - levels)

    def run(
        self,
        steps: int,
        *,
        x: torch.Tensor | None = None,
        shape: tuple[int, int, int] = (1, 8, 8),
        seed: int | list[int] = 0,
        dtype: torch.dtype = torch.float64,
        levels: torch.Tensor | None = None,
        observe: bool = False,
        **options: Any,
    ) -> Run:
        """From x at the first level, true by default; of `shape` images with so many rows and columns of patches."""
        images, rows, columns = shape
        levels = self.levels(steps) if levels is None else levels
        ts, pipe = levels if self.flux else levels / (1 + levels), self.pipe(dtype)
        x = start(float(ts[0]), images, rows * columns) if x is None else x
        run, target, arguments = Run(x, float(ts[0]), last=float(ts[-1])), self.side.target, dict[str, Any]()
        if self.flux:
            arguments["parameterization"] = self.parameterization
            if self.parameterization == "ve" and ts[0] == 1:  # the pipeline begins at a finite sigma
                sigma = float(self.sigmas(levels)[0])
                run.begin, run.first = x * (sigma / (1 + sigma)), sigma / (1 + sigma)
        target = observed(target, run) if observe else target
        if (
            self.side.file
            and self.parameterization != "ve"
            and {"extra_args", "callback", "disable"} <= {*self.parameters}
        ):
            target = comfy_sampler(target, pipe, 16 * columns, 16 * rows)  # it may ask a model what ComfyUI's do
        latents = self._shaped(x if self.flux else x * (1 + float(levels[0])), shape).to(dtype)
        arguments |= {"sampler": target, "sampler_kwargs": {**self.side.options, **options}, "schedule": levels}
        end = self._call(pipe, run, shape, latents, seed, **arguments)
        run.end = end / (1.0 if self.flux else 1 + float(levels[-1]))
        return run


@functools.cache
def reference(name: str, family: Family, module: ModuleType) -> Function:
    """A sampler of k-diffusion."""
    return Function(Side(name, module.find_sampler(name).function, {}), family, module)


def observed(function: Callable, run: Run) -> Callable:
    """The function, with notes in `run` of what it asks, what it writes on and what it calls back with."""

    @functools.wraps(function)
    def sampler(model: Any, x: torch.Tensor, *levels: Any, **options: Any) -> torch.Tensor:
        given = [value for value in (x, *levels, *options.values()) if isinstance(value, torch.Tensor)]
        before = [value.clone() for value in given]

        def recorded(x: torch.Tensor, sigma: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            asked = x.clone()
            denoised = model(x, sigma, **kwargs)
            run.model.append((asked, float(sigma.flatten()[0]), denoised.clone()))
            return denoised

        def callback(info: dict[str, Any]) -> None:
            kept = {name: value.clone() if torch.is_tensor(value) else value for name, value in info.items()}
            run.callbacks.append((kept, len(run.model)))
            inform(info)

        vars(recorded).update(getattr(model, "__dict__", {}))  # what ComfyUI's functions look up
        inform: Any = options.get("callback")
        if inform:
            options["callback"] = callback
        end = function(recorded, x, *levels, **options)
        names = ["latents", "levels", *["another argument"] * len(given)]
        run.written += [name for name, value, old in zip(names, given, before) if not value.equal(old)]
        return end

    return sampler


class Stock(Subject):
    """A scheduler in the stock pipeline."""

    def scheduler(self) -> Any:
        """A fresh one, configured as a user of diffusers would: from the model's own."""
        try:
            return self.side.target.from_config(self.pipe(torch.float64).scheduler.config, **self.side.options)
        except Exception as error:
            raise Refused(self.side.failure(error)) from error

    @functools.cache  # noqa: B019
    def listed(self, steps: int) -> tuple[Any, list[float], list[float]]:
        """A scheduler with its timesteps set, and its levels in t: of the evaluations, and of the steps and the end."""
        fresh = prepared(self.scheduler(), steps, 256 if self.flux else None)
        levels, ends, _ = levels_of(fresh, self._level)
        return fresh, *([one if self.flux else one / (1 + one) for one in some] for some in (levels, ends))

    def _level(self, timestep: float) -> float:
        return timestep / 1000 if self.flux else self.network().sigma(torch.tensor([timestep])).item()

    def ts(self, steps: int) -> torch.Tensor:
        return torch.tensor(self.listed(steps)[2], dtype=torch.float64)

    def near(self, timestep: float) -> tuple[float, float]:
        """The sigmas of one timestep less and one more."""
        levels = [self._level(min(max(timestep + one, 0.0), 1000.0)) for one in (-1, 1)]
        low, high = (level / max(1 - level, 1e-12) if self.flux else level for level in levels)
        return low * (1 - 1e-3), high * (1 + 1e-3)

    def run(
        self,
        steps: int,
        *,
        x: torch.Tensor | None = None,
        shape: tuple[int, int, int] = (1, 8, 8),
        seed: int | list[int] = 0,
        dtype: torch.dtype = torch.float64,
        scheduler: Any = None,
        observe: bool = False,
        begin: float | None = None,
        named: bool = True,
        **options: Any,
    ) -> Run:
        """As a function's. With `begin`, a share of the steps, the run begins there: by `set_begin_index` or not."""
        fresh, ts, ends = self.listed(steps)
        scheduler, network, (images, rows, columns) = scheduler or self.scheduler(), self.network(dtype), shape
        first, init = ts[0], 1.0 if self.flux else float(fresh.init_noise_sigma)
        if not self.flux and hasattr(scheduler, "alphas_cumprod"):
            network.answering(KNOWN, scheduler)  # it was trained with these betas
        x = start(first, images, rows * columns) if x is None else x
        run, latents = Run(x, first, last=ends[-1]), x
        sigma, last = (t / max(1 - t, 1e-12) for t in (first, run.last))
        if not self.flux:  # unit noise: the pipeline multiplies by one of these, or keeps alpha x
            usual = [math.hypot(1, sigma)] if init == 1 else [sigma, math.hypot(1, sigma)]
            latents = x * ((1 + sigma) / min(usual, key=lambda scale: abs(scale - init) if init != 1 else 0))
        latents = self._shaped(latents, shape).to(dtype)
        if begin is None:
            extra = {} if self.flux else {"add_watermarker": False}
            parts = {**self.pipe(dtype).components, "scheduler": scheduler, **extra}
            pipe = type(self.pipe(dtype)).__bases__[0](**parts)
            pipe.set_progress_bar_config(disable=True)
            end = self._call(pipe, run, shape, latents, seed, num_inference_steps=steps)
        else:
            end = self._part(scheduler, run, shape, int(steps * begin), steps, named)
        if begin is None and len(run.asked) == len(ts):  # by the levels that it lists: it may round its timesteps
            run.asked = [(level, self._seen(x, t, level), timestep) for level, (t, x, timestep) in zip(ts, run.asked)]
        run.first, run.begin = run.asked[0][:2]
        if begin is None and not 0.95 < run.begin.norm() / x.norm() < 1.05:
            run.written.append(
                f"the first latents, {run.begin.norm() / x.norm():.3g} times as large as its first level asks"
            )
        if observe and getattr(scheduler, "sigmas", None) is not None:
            run.written += [] if scheduler.sigmas.cpu().equal(fresh.sigmas.cpu()) else ["its own sigmas"]
        run.end = end / (1.0 if self.flux else (1 + last) / (math.hypot(1, last) if init == 1 else 1.0))
        run.end = patched(run.end, KNOWN) if run.end.ndim == 4 else run.end
        return run

    def _seen(self, x: torch.Tensor, t: float, level: float) -> torch.Tensor:
        """A state that was taken for one of t, as one of `level`: what the network gets stays as it is."""
        if self.flux:
            return x
        (one, other), norm = ((side / (1 - side)) for side in (t, level)), math.hypot
        return x * (norm(other, 1) / (1 + other) * (1 + one) / norm(one, 1))

    def _part(
        self, scheduler: Any, run: Run, shape: tuple[int, int, int], skipped: int, steps: int, named: bool
    ) -> Any:
        """The pipelines' own loop, from a true state after `skipped` steps."""
        network = self.network()
        scheduler = prepared(scheduler, steps, 256 if self.flux else None)
        timesteps = scheduler.timesteps[skipped * getattr(scheduler, "order", 1) :]
        if named and hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(len(scheduler.timesteps) - len(timesteps))
        count = shape[1] * shape[2]
        x0 = self._shaped(start(0.0, shape[0], count, seed=1), shape)
        noise = torch.randn(x0.shape, generator=(generator := torch.Generator().manual_seed(2)), dtype=torch.float64)
        mixed = scheduler.scale_noise if hasattr(scheduler, "scale_noise") else scheduler.add_noise
        x = mixed(x0, *((timesteps[:1], noise) if hasattr(scheduler, "scale_noise") else (noise, timesteps[:1])))
        takes = inspect.signature(scheduler.step).parameters
        extra = {"generator": generator} if "generator" in takes else {}
        with torch.no_grad(), watched(network) as run.asked:
            for t in timesteps:
                at = t.double().reshape(1).expand(shape[0])
                if self.flux:
                    output = network(hidden_states=x, timestep=at / 1000)[0]
                else:
                    output = network(scheduler.scale_model_input(x, t), at)[0]
                x = scheduler.step(output, t, x, return_dict=False, **extra)[0].double()
        return x
