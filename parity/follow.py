"""Following a sampler: what it gave to the network and what became of the latents, in one coordinate system.

Both sides are in the same coordinates, whatever they keep themselves: `sigma` and x = x0 + sigma noise on SDXL,
t and x = (1 - t) x0 + t noise on FLUX. Nothing is patched: hooks watch the network, and are removed again.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor

from comfy_ksampler import comfy_sampler, levels
from gallery.models import device_of, encode, load, reason, size_of
from gallery.options import FLUX, Family
from gallery.refused import Refused, refusing
from parity.result import Evaluation, Ours, Trajectory
from parity.sides import Side, levels_of, prepared


class Session:
    """One model, prompt and initial noise, on which any number of sides run."""

    def __init__(self, family: Family, options: argparse.Namespace, pipe: Any, prompt: dict, size: tuple):
        """`prompt` are the pipeline's arguments for it, `size` is width and height in pixels."""
        self.family, self.options, self.pipe, self.prompt = family, options, pipe, prompt
        self.module = importlib.import_module(family.module)
        self.flux, (self.width, self.height) = family is FLUX, size
        self.level_name = "t" if self.flux else "sigma"
        self.stock_class = type(pipe).__bases__[0]
        self.network = pipe.transformer if self.flux else pipe.unet
        self.guidance = options.guidance
        self.guided = not self.flux and self.guidance > 1 and self.network.config.time_cond_proj_dim is None
        self.dtype = torch.promote_types(self.network.dtype, torch.float32)
        self.device = pipe._execution_device
        self.generator = torch.Generator("cpu").manual_seed(options.seed)
        channels, scale = self.network.config.in_channels, pipe.vae_scale_factor
        dtype = prompt["prompt_embeds"].dtype
        # as the stock pipeline draws it; the same generator continues with the step noise
        if self.flux:
            sizes = (1, channels // 4, self.height, self.width)
            self.noise, _ = pipe.prepare_latents(*sizes, dtype, self.device, self.generator)
        else:
            shape = (1, channels, self.height // scale, self.width // scale)
            self.noise = randn_tensor(shape, self.generator, self.device, dtype)
        self.tokens = self.noise.shape[1] if self.flux else None

    @classmethod
    def load(cls, family: Family, options: argparse.Namespace) -> Session:
        """With the model, prompt and size of the command line."""
        if options.guidance is None:
            options = argparse.Namespace(**{**vars(options), "guidance": FLUX.guidance if family is FLUX else 1.0})
        pipe = load(family, importlib.import_module(family.module), options.model, device_of(options), options)
        pipe.set_progress_bar_config(disable=True)
        width, height = size_of(family, pipe, options)
        with refusing(Exception, text=reason):
            pipe.check_inputs(options.prompt, None, height, width, *(() if family is FLUX else (None,)))
            length = None
            if family is FLUX and options.model == "demo":
                # FLUX pads to 512 tokens, which is most of an evaluation's cost on the demo model
                needed = len(pipe.tokenizer_2(options.prompt).input_ids)
                length = next((enough for enough in (64, 128, 256) if enough >= needed), 512)
            prompt = encode(family, pipe, options.prompt, options, length)
        return cls(family, options, pipe, prompt, (width, height))

    def trained(self) -> Any:
        """SDXL's trained levels in float64, as k-diffusion's table of sigmas and timesteps."""
        # zero terminal SNR has no finite last sigma: as in the pipeline and EulerDiscreteScheduler, 4096
        alphas_cumprod = self.pipe.scheduler.alphas_cumprod.cpu().double().clamp(min=2**-24)
        return self.module.external.DiscreteSchedule(((1 - alphas_cumprod) / alphas_cumprod).sqrt(), quantize=False)

    def level_of(self, timestep: float) -> float:
        """The level of a timestep, interpolated in log sigma as k-diffusion does."""
        if self.flux:
            return timestep / 1000
        logs = self.trained().log_sigmas
        low = min(max(int(timestep), 0), len(logs) - 2)  # beyond the last trained one the line goes on
        return torch.lerp(logs[low], logs[low + 1], timestep - low).exp().item()

    def timestep_of(self, level: float) -> float:
        """The timestep of a level: the inverse of `level_of`, k-diffusion's."""
        if self.flux:
            return level * 1000
        return self.trained().sigma_to_t(torch.tensor([level], dtype=torch.float64)).item()

    def named_levels(self, schedule: str | None, steps: int) -> torch.Tensor:
        """The levels of k-diffusion or of ComfyUI of this name; None: the pipeline's own."""
        with refusing(ValueError, text=lambda error: str(error).replace("`schedule`", "--schedule")):
            if schedule is not None and schedule not in self.module.SCHEDULES:
                return levels(self.pipe, schedule, steps, width=self.width, height=self.height).double()
            tokens = (self.tokens,) if self.flux else ()
            return self.pipe.noise_levels(*tokens, steps, schedule=schedule)

    @contextlib.contextmanager
    def watched(self, after: Callable[[torch.Tensor, float, torch.Tensor], Any], timesteps: Any = None) -> Iterator:
        """Calls `after(input, timestep, prediction)` for each evaluation, with guidance applied.

        `timesteps` that are not None replace what the network is given.
        """
        replacing, thousand = iter(timesteps or ()), 1000 if self.flux else 1

        def before(_, args, kwargs):
            if (wanted := next(replacing, None)) is None:
                return None
            given = kwargs["timestep"] if self.flux else args[1]
            dtype = given.dtype if given.is_floating_point() else self.dtype
            value = torch.full_like(given, wanted / thousand, dtype=dtype)
            return (args, {**kwargs, "timestep": value}) if self.flux else ((args[0], value, *args[2:]), kwargs)

        def hook(_, args, kwargs, output):
            x, t = (kwargs["hidden_states"], kwargs["timestep"]) if self.flux else args[:2]
            x, prediction = x.to(self.dtype), output[0].to(self.dtype)
            if self.guided:
                x = x.chunk(2)[1]
                unconditional, conditional = prediction.chunk(2)
                prediction = unconditional + self.guidance * (conditional - unconditional)
            after(x, float(t.flatten()[0]) * thousand, prediction)

        hooks = [
            self.network.register_forward_pre_hook(before, with_kwargs=True),
            self.network.register_forward_hook(hook, with_kwargs=True),
        ]
        try:
            yield
        finally:
            for handle in hooks:
                handle.remove()

    def _call(self, pipe: Any, side: Side, **arguments: Any) -> Any:
        settings = {"width": self.width, "height": self.height, "guidance_scale": self.guidance}
        settings |= {"num_inference_steps": self.options.steps, "output_type": "latent"}
        with refusing(Exception, text=side.failure):
            return pipe(**{**self.prompt, **settings, **arguments}).images

    def picture(self, latents: torch.Tensor) -> Any:
        """A PIL image of latents at level 0, decoded by the pipeline."""

        def given(model, x, sigmas, extra_args=None, callback=None, disable=None):
            return latents.to(x)

        arguments = {"sampler": given, "latents": self.noise.clone(), "num_inference_steps": 1, "output_type": "pil"}
        return self._call(self.pipe, Side("the picture", given, {}), **arguments)[0]

    def scheduler(self, side: Side, **changes: Any) -> Any:
        """A fresh scheduler of this class, configured as a diffusers user would: from the model's own."""
        with refusing(Exception, text=side.failure):
            return side.target.from_config(self.pipe.scheduler.config, **{**side.options, **changes})

    def follow_scheduler(self, side: Side, scheduler: Any = None, generator: Any = None, **changes: Any) -> Trajectory:
        """One run of the stock pipeline with this scheduler, or with that fresh one.

        Step noise is noted where it comes from the session's generator, which is the default.
        """
        scheduler = scheduler or self.scheduler(side, **changes)
        fresh = prepared(scheduler, self.options.steps, self.tokens)
        listed, step_levels, starts = levels_of(fresh, self.level_of)
        extra = {} if self.flux else {"add_watermarker": False}
        pipe = self.stock_class(**{**self.pipe.components, "scheduler": scheduler}, **extra)
        pipe.set_progress_bar_config(disable=True)
        before, generator = None if generator else self.generator, generator or self.generator.clone_state()
        seen, after, noise = list[Any](), list[torch.Tensor](), dict[int, list[torch.Tensor]]()

        def step_end(_, i, t, tensors):
            nonlocal before
            after.append(tensors["latents"].to(self.dtype))
            if before and not before.get_state().equal(generator.get_state()):
                noise[len(seen) - 1] = _draws(before, generator, tensors["latents"], self)
                before = generator.clone_state()
            return {}

        latents = self.noise.clone()
        with self.watched(lambda *evaluation: seen.append(evaluation)):
            self._call(pipe, side, latents=latents, generator=generator, callback_on_step_end=step_end)
        if len(seen) != len(listed):
            counts = f"the network was called {len(seen)} times, not {len(listed)} as its timesteps say"
            raise Refused(f"{side.text}: {counts}")
        written = [] if latents.equal(self.noise) else ["latents"]
        if getattr(fresh, "sigmas", None) is not None and not fresh.sigmas.equal(scheduler.sigmas.cpu()):
            written.append("its own sigmas")
        # schedulers that keep alpha x hand their latents to the network as they are, x / sqrt(sigma^2 + 1)
        ratios = [x.norm() / latents.norm() for latents, (x, *_) in zip(after, seen[1:])]
        keeps_alpha_x = not self.flux and all(abs(ratio - 1) < 1e-6 for ratio in ratios)
        evaluations = [
            Evaluation(level, timestep, x * self._unscaled(level), self._denoised(x, level, given))
            for level, (x, timestep, given) in zip(listed, seen)
        ]
        final = after[-1] * (self._unscaled(step_levels[-1]) if keeps_alpha_x else 1.0)
        return Trajectory(step_levels, evaluations, starts, final, noise, fresh, keeps_alpha_x, written)

    def _unscaled(self, level: float) -> float:
        """The latents in our coordinates over the network's input."""
        return 1.0 if self.flux else math.hypot(level, 1)

    def _denoised(self, x: torch.Tensor, level: float, prediction: torch.Tensor) -> torch.Tensor:
        """x0 from the network's input and prediction, at the level that its sampler says."""
        scale = self._unscaled(level)
        if not self.flux and self.pipe.scheduler.config.get("prediction_type") == "v_prediction":
            return x / scale - prediction * level / scale
        return x * scale - prediction * level

    def uses_ve(self, side: Side, ours: Ours) -> bool:
        """Whether FLUX's sampler sees sigma = t / (1 - t)."""
        if not self.flux or ours.flow:
            return False
        choice = self.options.parameterization
        if choice == "auto" and getattr(side.target, "__module__", "").startswith("comfy."):
            choice = "flow"  # ComfyUI's samplers know flows themselves
        return self.module.uses_ve(choice, self.module.find_sampler(side.target, side.options), ours.levels)

    def sampler_sigmas(self, levels: torch.Tensor, ve: bool) -> torch.Tensor:
        """What the sampler sees for these levels. Only t = 1 itself has no finite sigma; it gets the pipeline's."""
        if not ve:
            return levels
        return self.module.ve_sigmas(levels.clone()) if levels[0] == 1 else levels / (1 - levels)

    def follow_sampler(
        self, side: Side, ours: Ours, tick: Callable = lambda: None, denoised: Any = None, generator: Any = None
    ) -> Trajectory:
        """One run of this project's pipeline with this sampler, which calls `tick` for each evaluation.

        With `denoised`, predictions that were made before, the sampler gets these, and no network runs.
        """
        ve, found = self.uses_ve(side, ours), Trajectory(ours.levels.tolist(), [], [], ours.start)
        timesteps, generator = list[float](), generator or self.generator.clone_state()

        def run(model, x, sigmas, extra_args=None, callback=None, disable=None):
            return self._sample(side, ours, model, ve, found, callback, generator)

        def predict(x: torch.Tensor, sigma: torch.Tensor, with_uncond: bool = False) -> torch.Tensor:
            given = denoised[min(len(found.evaluations), len(denoised) - 1)]
            return torch.stack([given, given]) if with_uncond else given

        def note(x: torch.Tensor, timestep: float, prediction: torch.Tensor) -> None:
            timesteps.append(timestep)
            tick()

        if denoised is not None:
            sigmas = self.sampler_sigmas(ours.levels, ve).to(self.dtype)
            self.module.run_sampler(self.module.find_sampler(run), predict, ours.start, sigmas)
        else:
            way = {"parameterization": "ve" if ve else "flow"} if self.flux else {"quantize_timesteps": ours.quantize}
            with self.watched(note, ours.timesteps):  # `run` takes its own levels and not the call's
                self._call(self.pipe, side, sampler=run, latents=ours.start, generator=generator, **way)
        for evaluation, timestep in zip(found.evaluations, timesteps):
            evaluation.timestep = timestep
        # a sampler that calls back once per step steps over the levels; another may have placed its own
        if len(found.starts) != len(found.levels) - 1:
            found.starts = list(range(len(found.evaluations)))
            at = [evaluation.level for evaluation in found.evaluations] + found.levels[-1:]
            if len(at) != len(found.levels) or any(abs(x - y) > 1e-4 * y for x, y in zip(at, found.levels)):
                found.levels = at
        return found

    def _sample(
        self, side: Side, ours: Ours, model: Callable, ve: bool, found: Trajectory, callback: Any, generator: Any
    ) -> torch.Tensor:
        """Calls the sampler over our levels, and notes in `found` what it does."""
        sigmas = self.sampler_sigmas(ours.levels, ve).to(self.dtype, copy=True)  # the sampler may write on both
        x = ours.start.to(self.dtype, copy=True)
        if ve:  # at t = 1 the noise alone, as in the pipeline
            x = x * (sigmas[0] if ours.levels[0] == 1 else 1 + sigmas[0]).item()

        def recorded(x: torch.Tensor, sigma: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            predicted, level = model(x, sigma, **kwargs), sigma.flatten()[0].item()
            denoised, scale = predicted[0] if kwargs.get("with_uncond") else predicted, 1 + level if ve else 1.0
            kept = (x / scale, denoised.clone()) if ours.keep else [x.new_empty(0)] * 2
            found.evaluations.append(Evaluation(level / scale, math.nan, *kept))
            return predicted

        def noise_sampler(sigma, sigma_next) -> torch.Tensor:
            if side.eta == 0:  # some samplers draw all the same, and add it zero times
                return torch.zeros_like(x)
            i = len(found.evaluations) - 1
            drawn, given = found.noise.setdefault(i, []), (ours.noise or {}).get(i)
            if ours.noise_sampler is not None:
                drawn.append(ours.noise_sampler(sigma, sigma_next))
            elif given:
                drawn.append(given[min(len(drawn), len(given) - 1)])
            else:  # the other side drew nothing here
                drawn.append(randn_tensor(x.shape, torch.Generator("cpu").manual_seed(i), x.device, x.dtype))
            return drawn[-1]

        def called_back(info: dict[str, Any]) -> None:
            found.starts.append(len(found.evaluations) - 1)
            if callback is not None:
                callback(info)

        sampler, options = side.target, dict(side.options)
        parameters = inspect.signature(sampler).parameters
        if not ve and side.is_for_comfyui and {"extra_args", "callback", "disable"} <= {*parameters}:
            with contextlib.suppress(ImportError):  # without ComfyUI it runs as it is
                sampler = comfy_sampler(sampler, self.pipe, self.width, self.height)
        if "noise_sampler" in parameters and (ours.noise, ours.noise_sampler) != (None, None):
            options["noise_sampler"] = noise_sampler
        bound, given = self.module.find_sampler(functools.partial(sampler, **options)), {"callback": called_back}
        end = self.module.call_sampler(bound, recorded, x, sigmas, generator, **given)
        if not isinstance(end, torch.Tensor) or end.shape != x.shape:
            returned = f"one of shape {tuple(end.shape)}" if torch.is_tensor(end) else type(end).__name__
            raise Refused(f"{side.text} has to return a tensor of shape {tuple(x.shape)}, but returned {returned}")
        if not found.evaluations:
            raise Refused(f"{side.text} never calls the model")
        found.final = end * (1 - ours.levels[-1].item()) if ve else end
        return end


def _draws(before: torch.Generator, after: torch.Generator, like: torch.Tensor, session: Session) -> list[torch.Tensor]:
    """What was drawn between two states of the generator, in the dtype that leads from one to the other."""
    for dtype in dict.fromkeys((like.dtype, torch.float32, torch.float64, torch.float16, torch.bfloat16)):
        generator, draws = before.clone_state(), list[torch.Tensor]()
        for _ in range(4):
            draws.append(randn_tensor(like.shape, generator, session.device, dtype).to(session.dtype))
            if generator.get_state().equal(after.get_state()):
                return draws
    return []
