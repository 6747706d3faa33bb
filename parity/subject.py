"""A sampler or a scheduler on the model with a known exact solution: its evaluations, and where it ended."""

from __future__ import annotations

import functools
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

Shape = tuple[int, int, int]  # images, rows and columns of patches
State = tuple[float, torch.Tensor, torch.Tensor, float]  # t, x, the prediction of x0, and the timestep


@dataclass
class Run:
    """One run. States are x = (1 - t) x0 + t noise of shape (images, patches, d), t = sigma / (1 + sigma)."""

    begin: torch.Tensor  # x at the first level, `first`
    first: float
    asked: list[State]  # each evaluation of the network
    end: torch.Tensor  # x at the last level, `last`
    last: float
    written: list[str]  # what the sampler was given and wrote on


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
        self.side, self.family, self.flux, self.stock = side, family, family is FLUX, side.is_scheduler
        self.schedule = schedule or (None if self.flux else "karras")
        self.parameters = inspect.signature(side.target).parameters
        self.options = Namespace(seed=0, steps=10, guidance=1.0, parameterization=parameterization)
        self.ve = not self.stock and self.session().uses_ve(side, Ours(self.levels(10), torch.empty(0)))
        self.options.parameterization = "ve" if self.ve else "flow"

    @functools.cached_property
    def stochastic(self) -> bool:
        """Whether equal patches end differently."""
        x = start(float(self.ts(10)[0]), 1, 1).expand(1, 4, -1).clone()
        end = self.run(10, x=x, shape=(1, 2, 2)).end
        return (end - end[:, :1]).abs().max().item() > 1e-6

    @property
    def quiet(self) -> dict[str, Any]:
        """The option with which a stochastic one is deterministic, if it has one."""
        return {"eta": 0.0} if self.stochastic and "eta" in self.parameters else {}

    @functools.cached_property
    def own_steps(self) -> bool:
        """Whether it takes as many steps as it likes."""
        few, many = (len(self.run(steps).asked) for steps in (10, 40))
        return many < 2 * few

    @functools.cache  # noqa: B019
    def session(self, shape: Shape = (1, 8, 8), dtype: torch.dtype = torch.float64) -> Session:
        """The pipelines for these pictures."""
        images, rows, columns = shape
        pipe = (flux_pipeline if self.flux else sdxl_pipeline)(KNOWN, dtype)
        nothing = torch.zeros(images, 1, 1, dtype=dtype)
        prompt = {"prompt_embeds": nothing, "pooled_prompt_embeds": nothing[:, 0]}
        found = Session(self.family, self.options, pipe, prompt, (16 * columns, 16 * rows))
        if self.stock and not self.flux and hasattr(scheduler := found.scheduler(self.side), "alphas_cumprod"):
            pipe.register_modules(scheduler=scheduler)
            pipe.unet.answering(KNOWN, scheduler)  # it was trained with these betas
        return found

    def scheduler(self, steps: int) -> Any:
        """A fresh one with its timesteps set."""
        return prepared(self.session().scheduler(self.side), steps, self.session().tokens)

    def t(self, level: Any) -> Any:
        """Of a level: sigma, on FLUX t itself."""
        return level if self.flux else level / (1 + level)

    @functools.cache  # noqa: B019
    def ts(self, steps: int) -> torch.Tensor:
        """The levels of the steps and their end, in t."""
        listed = levels_of(self.scheduler(steps), self.session().level_of)[1] if self.stock else self.levels(steps)
        return self.t(torch.as_tensor(listed, dtype=torch.float64))

    def levels(self, steps: int) -> torch.Tensor:
        """For a function, and for k-diffusion's beside a scheduler: in sigma, on FLUX in t, falling to zero."""
        if not self.stock:
            return self.session().named_levels(self.schedule, steps)
        ts = self.ts(steps).unique().flip(0)  # sorted: a wrong scheduler's may not fall
        ts = torch.cat([ts[ts > 0], ts.new_zeros(1)])
        return ts if self.flux else ts / (1 - ts)

    def shaped(self, x: torch.Tensor, shape: Shape) -> torch.Tensor:
        """States as the pipeline's latents."""
        return x if self.flux else unpatched(x, torch.Size([shape[0], 4, 2 * shape[1], 2 * shape[2]]))

    def state(self, x: torch.Tensor, level: float) -> torch.Tensor:
        """Latents at a level as a state."""
        x = patched(x.double(), KNOWN) if x.ndim == 4 else x.double()  # ComfyUI's functions see FLUX's unpacked, too
        return x if self.flux else x / (1 + level)

    def run(
        self,
        steps: int,
        *,
        x: torch.Tensor | None = None,
        shape: Shape = (1, 8, 8),
        seed: int = 0,
        dtype: torch.dtype = torch.float64,
        levels: torch.Tensor | None = None,
        instead: Any = None,
        **options: Any,
    ) -> Run:
        """From x at the first level, true by default, with these options, over `levels` or those of so many steps.

        Image i has a generator of its own, of seed + i. `instead` is a scheduler or function to run in place of it.
        """
        self.options.steps, session = steps, self.session(shape, dtype)
        side = replace(self.side, options={**self.side.options, **options})
        generators = [torch.Generator().manual_seed(seed + i) for i in range(shape[0])]
        generator = generators if len(generators) > 1 else generators[0]
        levels = self.levels(steps) if levels is None else levels
        ts = self.ts(steps) if self.stock else self.t(levels)
        first, last = float(ts[0]), float(ts[-1])
        begin = start(first, shape[0], shape[1] * shape[2]) if x is None else x
        latents = self.shaped(begin if self.flux else begin / (1 - first), shape).to(dtype)
        if self.stock:  # the pipeline takes latents of variance 1
            session.noise = latents if self.flux else latents / math.hypot(1, first / (1 - first))
            found = session.follow_scheduler(side, instead, generator)
        else:
            side = replace(side, target=instead or side.target)
            found = session.follow_sampler(side, Ours(levels, latents), generator=generator)
        asked = [
            (self.t(one.level), self.state(one.x, one.level), self.state(one.denoised, 0.0), one.timestep)
            for one in found.evaluations
        ]
        if self.stock or self.ve:  # the pipeline begins near that
            first, begin, *_ = asked[0]
        return Run(begin, first, asked, self.state(found.final, found.levels[-1]), last, found.written)

    def run_part(self, shape: Shape, steps: int, named: bool) -> Run:
        """The stock pipelines' loop over the second half of the steps from a true state, `named` by its index."""
        scheduler, generator, session = self.scheduler(steps), torch.Generator().manual_seed(2), self.session(shape)
        skipped = steps // 2 * getattr(scheduler, "order", 1)
        timesteps = scheduler.timesteps[skipped:]
        if named and hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(skipped)
        x0 = start(0.0, shape[0], shape[1] * shape[2], seed=1)
        noise = torch.randn(x0.shape, generator=generator, dtype=torch.float64)
        x = mixed(scheduler, self.shaped(x0, shape), self.shaped(noise, shape), timesteps[:1])
        extra = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
        for t in timesteps:
            at = t.double().reshape(1).expand(shape[0])
            given = (x, at / 1000) if self.flux else (scheduler.scale_model_input(x, t), at)
            x = scheduler.step(session.network(*given)[0], t, x, return_dict=False, **extra)[0].double()
        first, last = self.t(session.level_of(float(timesteps[0]))), self.ts(steps)[-1].item()
        return Run((1 - first) * x0 + first * noise, first, [], self.state(x, last / (1 - last)), last, [])


def mixed(scheduler: Any, x0: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """x0 with noise at a timestep, by `scale_noise` or `add_noise`."""
    if hasattr(scheduler, "scale_noise"):
        return scheduler.scale_noise(x0, timestep, noise)
    return scheduler.add_noise(x0, noise, timestep)
