"""A sampler or a scheduler on the model with a known exact solution: its evaluations, and where it ended."""

from __future__ import annotations

import functools
import importlib
import inspect
import math
from argparse import Namespace
from dataclasses import dataclass, replace
from typing import Any

import torch

from gallery.options import FLUX, Family
from parity.exact import KNOWN, flux_pipeline, patched, sdxl_pipeline, unpatched
from parity.follow import Session
from parity.result import Ours
from parity.sides import Side, levels_of, prepared

State = tuple[float, torch.Tensor, float]  # t, x = (1 - t) x0 + t noise of (images, patches, d), and the timestep


@dataclass
class Run:
    """One run. States are x = (1 - t) x0 + t noise of shape (images, patches, d), t = sigma / (1 + sigma)."""

    begin: torch.Tensor  # x at the first level, `first`
    first: float
    asked: list[State]  # each evaluation of the network
    end: torch.Tensor  # x at the last level, `last`
    last: float
    written: list[str]  # what a scheduler was given and wrote on


def start(t: float, images: int, patches: int, seed: int = 0) -> torch.Tensor:
    """True x at the level t."""
    x0 = KNOWN.sample(images * patches, generator := torch.Generator().manual_seed(seed))
    noise = torch.randn(x0.shape, generator=generator, dtype=torch.float64)
    return ((1 - t) * x0 + t * noise).view(images, patches, -1)


class Subject:
    """What is judged: a function in this project's pipeline, or a scheduler in the stock pipeline.

    The levels of a function are those of `schedule`; None: Karras', on FLUX the pipeline's own.
    """

    def __init__(self, side: Side, family: Family, schedule: str | None = None, parameterization: str = "auto"):
        self.side, self.family, self.flux = side, family, family is FLUX
        self.stock = side.is_scheduler  # in the stock pipeline
        self.schedule = schedule or (None if self.flux else "karras")
        self.parameters = inspect.signature(side.target).parameters
        self.options = Namespace(seed=0, steps=10, guidance=1.0, parameterization=parameterization)
        if not self.stock:
            ve = self.session().uses_ve(side, Ours(self.levels(10), torch.empty(0)))
            self.options.parameterization = "ve" if ve else "flow"

    @functools.cached_property
    def stochastic(self) -> bool:
        """Whether equal patches end differently, or the same latents with another generator."""
        x = start(float(self.ts(10)[0]), 1, 1).expand(1, 4, -1).clone()
        one, other = (self.run(10, x=x, shape=(1, 2, 2), seed=seed).end for seed in (0, 1))
        return max((one - one[:, :1]).abs().max().item(), (one - other).abs().max().item()) > 1e-6

    @property
    def quiet(self) -> dict[str, Any]:
        """The option with which a stochastic one is deterministic, if it has one."""
        return {"eta": 0.0} if self.stochastic and "eta" in self.parameters else {}

    @functools.cached_property
    def own_steps(self) -> bool:
        """Whether a deterministic one places its steps by itself."""
        if self.stochastic and not self.quiet:
            return False
        few, many = (len(self.run(steps, **self.quiet).asked) for steps in (10, 40))
        return "rtol" in self.parameters or many < 2 * few

    @functools.cache  # noqa: B019
    def session(self, shape: tuple[int, int, int] = (1, 8, 8), dtype: torch.dtype = torch.float64) -> Session:
        """The pipelines for so many images with so many rows and columns of patches."""
        images, rows, columns = shape
        pipe = (flux_pipeline if self.flux else sdxl_pipeline)(KNOWN, dtype)
        nothing = torch.zeros(images, 1, 1, dtype=dtype)
        prompt = {"prompt_embeds": nothing, "pooled_prompt_embeds": nothing[:, 0]}
        found = Session(self.family, self.options, pipe, prompt, (16 * columns, 16 * rows))
        if self.stock and not self.flux and hasattr(scheduler := found.scheduler(self.side), "alphas_cumprod"):
            pipe.register_modules(scheduler=scheduler)
            pipe.unet.answering(KNOWN, scheduler)  # it was trained with these betas
        return found

    @functools.cache  # noqa: B019
    def listed(self, steps: int) -> tuple[Any, torch.Tensor]:
        """A scheduler with its timesteps set, and the levels of its steps and their end, in t."""
        session = self.session()
        fresh = prepared(session.scheduler(self.side), steps, session.tokens)
        return fresh, self.t(torch.tensor(levels_of(fresh, session.level_of)[1], dtype=torch.float64))

    def t(self, level: Any) -> Any:
        """Of a level: sigma, on FLUX t itself."""
        return level if self.flux else level / (1 + level)

    def ts(self, steps: int) -> torch.Tensor:
        """The levels of a run, in t."""
        return self.listed(steps)[1] if self.stock else self.t(self.levels(steps))

    def levels(self, steps: int) -> torch.Tensor:
        """For a function, and for k-diffusion's beside a scheduler: in sigma, on FLUX in t, falling to zero."""
        if not self.stock:
            return self.session().named_levels(self.schedule, steps)
        ts = self.ts(steps).unique().flip(0)  # sorted: a wrong scheduler's may not fall
        ts = torch.cat([ts[ts > 0], ts.new_zeros(1)])
        return ts if self.flux else ts / (1 - ts)

    def near(self, timestep: float) -> tuple[float, float]:
        """The sigmas of one timestep less and one more."""
        low, high = (self.t(self.session().level_of(min(max(timestep + one, 0.0), 1000.0))) for one in (-1, 1))
        return low / (1 - low) * (1 - 1e-3), high / max(1 - high, 1e-12) * (1 + 1e-3)

    def shaped(self, x: torch.Tensor, shape: tuple[int, int, int]) -> torch.Tensor:
        """States as the pipeline's latents."""
        return x if self.flux else unpatched(x, torch.Size([shape[0], 4, 2 * shape[1], 2 * shape[2]]))

    def state(self, x: torch.Tensor, level: float) -> torch.Tensor:
        """The pipeline's latents at a level as a state."""
        return x.double() if self.flux else patched(x.double() / (1 + level), KNOWN)

    def run(
        self,
        steps: int,
        *,
        x: torch.Tensor | None = None,
        shape: tuple[int, int, int] = (1, 8, 8),
        seed: int | list[int] = 0,
        dtype: torch.dtype = torch.float64,
        levels: torch.Tensor | None = None,
        scheduler: Any = None,
        function: Any = None,
        **options: Any,
    ) -> Run:
        """From x at the first level, true by default, with these options, by this scheduler or function or the side's.

        With a list of seeds each image has its own generator.
        """
        target, self.options.steps = function or self.side.target, max(steps, 1)
        session = self.session(shape, dtype)
        side = replace(self.side, target=target, options={**self.side.options, **options})
        generators = [torch.Generator().manual_seed(one) for one in (seed if isinstance(seed, list) else [seed])]
        generator = generators if isinstance(seed, list) else generators[0]
        levels = self.levels(steps) if levels is None and not self.stock else levels
        ts = self.ts(steps) if levels is None else self.t(levels)
        first, last = float(ts[0]), float(ts[-1])
        begin = x = start(first, shape[0], shape[1] * shape[2]) if x is None else x
        sigma = first / max(1 - first, 1e-12)
        latents = self.shaped(x if self.flux else x * (1 + sigma), shape).to(dtype)
        if levels is None:
            if not self.flux:
                # the pipeline multiplies by one of the first two, or by 1 for a scheduler that keeps alpha x
                factor = float(session.scheduler(side).init_noise_sigma)
                usual = [sigma, math.hypot(sigma, 1)] if factor != 1 else [math.hypot(sigma, 1)]
                latents = latents / min(usual, key=lambda one: abs(one - factor))
            session.noise = latents
            found = session.follow_scheduler(side, scheduler, generator)
        else:
            found = session.follow_sampler(side, Ours(levels, latents), generator=generator)
            if first == 1 and self.options.parameterization == "ve":  # the pipeline begins at a finite sigma
                sigma = session.sampler_sigmas(levels, True)[0].item()
                first = sigma / (1 + sigma)
                begin = x * first
        asked = [(self.t(e.level), self.state(e.x, e.level), e.timestep) for e in found.evaluations]
        if self.stock:
            first, begin, _ = asked[0]
            if not 0.95 < (ratio := float(begin.norm() / x.norm())) < 1.05:
                found.written.append(f"the first latents, {ratio:.3g} times as large as its first level asks")
        return Run(begin, first, asked, self.state(found.final, found.levels[-1]), last, found.written)

    def run_part(self, shape: tuple[int, int, int], skipped: int, steps: int, named: bool) -> Run:
        """The stock pipelines' loop from a true state after `skipped` of the steps, `named` by `set_begin_index`."""
        session = self.session(shape)
        scheduler = prepared(session.scheduler(self.side), steps, session.tokens)
        timesteps = scheduler.timesteps[skipped * getattr(scheduler, "order", 1) :]
        if named and hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(len(scheduler.timesteps) - len(timesteps))
        x0 = self.shaped(start(0.0, shape[0], shape[1] * shape[2], seed=1), shape)
        noise = torch.randn(x0.shape, generator=(generator := torch.Generator().manual_seed(2)), dtype=torch.float64)
        x = mixed(scheduler, x0, noise, timesteps[:1])
        extra = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
        asked = list[State]()
        for t in timesteps:
            level, given = session.level_of(float(t)), x if self.flux else scheduler.scale_model_input(x, t)
            unscaled = given if self.flux else given * math.hypot(level, 1)
            asked.append((self.t(level), self.state(unscaled, level), float(t)))
            at = t.double().reshape(1).expand(shape[0])
            model = session.network
            output = model(hidden_states=x, timestep=at / 1000) if self.flux else model(given, at)
            x = scheduler.step(output[0], t, x, return_dict=False, **extra)[0].double()
        first, begin, _ = asked[0]
        last, alpha_x = self.ts(steps)[-1].item(), not self.flux and float(scheduler.init_noise_sigma) == 1
        sigma = last / (1 - last)
        return Run(begin, first, asked, self.state(x * (math.hypot(1, sigma) if alpha_x else 1.0), sigma), last, [])


def mixed(scheduler: Any, x0: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """x0 with noise at a timestep, by `scale_noise` or `add_noise`."""
    if hasattr(scheduler, "scale_noise"):
        return scheduler.scale_noise(x0, timestep, noise)
    return scheduler.add_noise(x0, noise, timestep)


@functools.cache
def reference(name: str, family: Family) -> Subject:
    """A sampler of k-diffusion."""
    return Subject(Side(name, importlib.import_module(family.module).find_sampler(name).function, {}), family)
