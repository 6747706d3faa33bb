"""Following a sampler: what it gave to the network and what became of the latents, in one coordinate system.

Both sides are in the same coordinates, whatever they keep themselves: `sigma` and x = x0 + sigma noise on SDXL,
t and x = (1 - t) x0 + t noise on FLUX. Nothing is patched: the network is watched by hooks that are taken off again,
the stock pipeline by its `callback_on_step_end`.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import inspect
import math
import time
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor

from comfy_ksampler import comfy_sampler, levels
from gallery.models import device_of, encode, load, reason, size_of
from gallery.options import FLUX, Family
from gallery.refused import Refused
from parity.result import Evaluation, Ours, Record, Trajectory
from parity.schedulers import levels_of, prepared
from parity.sides import Side


class Session:
    """One model, prompt and initial noise, on which any number of sides run."""

    def __init__(
        self,
        family: Family,
        module: ModuleType,
        options: argparse.Namespace,
        pipe: Any,
        prompt: dict[str, Any],
        size: tuple[int, int],
    ):
        """`prompt` are the pipeline's arguments for it, `size` is width and height in pixels."""
        self.family, self.module, self.options, self.pipe, self.prompt = family, module, options, pipe, prompt
        self.flux = family.name == "flux"
        self.level_name = "t" if self.flux else "sigma"
        self.width, self.height = size
        self.stock_class = type(pipe).__bases__[0]
        self.network = pipe.transformer if self.flux else pipe.unet
        self.guidance = options.guidance
        self.guided = not self.flux and self.guidance > 1 and self.network.config.time_cond_proj_dim is None
        self.dtype = torch.promote_types(self.network.dtype, torch.float32)
        device = self.device = self.pipe._execution_device
        self.generator = torch.Generator("cpu").manual_seed(options.seed)
        channels, scale = self.network.config.in_channels, self.pipe.vae_scale_factor
        embeds = self.prompt["prompt_embeds"]
        self.tokens = None
        if self.flux:
            draw = self.pipe.prepare_latents
            noise, _ = draw(1, channels // 4, self.height, self.width, embeds.dtype, device, self.generator)
            self.tokens = noise.shape[1]
        else:
            shape = (1, channels, self.height // scale, self.width // scale)
            noise = randn_tensor(shape, self.generator, device, embeds.dtype)
        self.noise = noise  # as the stock pipeline draws it; the same generator goes on with the step noise
        self.drawn = self.generator.get_state()
        self._evaluations, self._seconds = 0, 0.0

    @classmethod
    def load(cls, family: Family, module: ModuleType, options: argparse.Namespace) -> Session:
        """With the model, prompt and size of the command line."""
        pipe = load(family, module, options.model, device_of(options), options)
        pipe.set_progress_bar_config(disable=True)
        width, height = size_of(family, pipe, options)
        try:
            pipe.check_inputs(options.prompt, None, height, width, *(() if family is FLUX else (None,)))
            length = _enough_tokens(pipe, options.prompt) if family is FLUX and options.model == "demo" else None
            prompt = encode(family, pipe, options.prompt, options, length)
        except Exception as error:
            raise Refused(reason(error)) from error
        return cls(family, module, options, pipe, prompt, (width, height))

    # --- noise levels and timesteps ---

    def trained(self) -> torch.Tensor:
        """The level of each trained timestep, rising, float64."""
        if self.flux:
            return torch.arange(1, 1001, dtype=torch.float64) / 1000
        # zero terminal SNR has no finite last sigma: as in the pipeline and EulerDiscreteScheduler, 4096
        alphas_cumprod = self.pipe.scheduler.alphas_cumprod.cpu().double().clamp(min=2**-24)
        return ((1 - alphas_cumprod) / alphas_cumprod).sqrt()

    def level_of(self, timestep: float) -> float:
        """The level of a timestep, interpolated in log sigma as k-diffusion does."""
        if self.flux:
            return timestep / 1000
        logs = self.trained().log()
        low = min(max(int(timestep), 0), len(logs) - 2)
        return torch.lerp(logs[low], logs[low + 1], timestep - low).exp().item()

    def timestep_of(self, level: float) -> float:
        """The timestep of a level: the inverse of `level_of`, k-diffusion's."""
        if self.flux:
            return level * 1000
        schedule = self.module.external.DiscreteSchedule(self.trained(), quantize=False)
        return schedule.sigma_to_t(torch.tensor([level], dtype=torch.float64)).item()

    def named_levels(self, schedule: str | None, steps: int) -> torch.Tensor:
        """The levels of k-diffusion or of ComfyUI of this name; None: the pipeline's own."""
        try:
            if schedule is not None and schedule not in self.module.SCHEDULES:
                return levels(self.pipe, schedule, steps, width=self.width, height=self.height).double()
            tokens = (self.tokens,) if self.flux else ()
            return self.pipe.noise_levels(*tokens, steps, schedule=schedule)
        except ValueError as error:
            raise Refused(str(error).replace("`schedule`", "--schedule")) from None

    # --- watching the network ---

    def affordable(self, seconds: float) -> float:
        """How many evaluations of the network take that many CPU seconds, by those made so far."""
        return seconds * self._evaluations / self._seconds if self._seconds else math.inf

    @contextlib.contextmanager
    def watched(self, after: Callable[[torch.Tensor, float, torch.Tensor], Any], timesteps: Any = None) -> Iterator:
        """Calls `after(input, timestep, prediction)` for each evaluation, with guidance applied.

        `timesteps`, where not None, replace what the network is given.
        """
        count = 0

        def before(_, args, kwargs):
            nonlocal count
            given = kwargs["timestep"] if "timestep" in kwargs else args[1]
            if timesteps is not None and count < len(timesteps) and timesteps[count] is not None:
                dtype = given.dtype if given.is_floating_point() else self.dtype
                value = torch.full_like(given, timesteps[count] / (1000 if self.flux else 1), dtype=dtype)
                if "timestep" in kwargs:
                    kwargs = {**kwargs, "timestep": value}
                else:
                    args = (args[0], value, *args[2:])
            count += 1
            return args, kwargs

        def hook(_, args, kwargs, output):
            self._evaluations += 1
            x = kwargs["hidden_states"] if self.flux else args[0]
            t = kwargs["timestep"] if "timestep" in kwargs else args[1]
            timestep = float(t.flatten()[0]) * (1000 if self.flux else 1)
            x, prediction = x.to(self.dtype), output[0].to(self.dtype)
            if self.guided:
                x = x.chunk(2)[1]
                unconditional, conditional = prediction.chunk(2)
                prediction = unconditional + self.guidance * (conditional - unconditional)
            after(x, timestep, prediction)

        handles = [
            self.network.register_forward_pre_hook(before, with_kwargs=True),
            self.network.register_forward_hook(hook, with_kwargs=True),
        ]
        started = time.process_time()
        try:
            yield
        finally:
            self._seconds += time.process_time() - started
            for handle in handles:
                handle.remove()

    def _call(self, pipe: Any, side: Side, steps: int, **arguments: Any) -> Any:
        size = {"width": self.width, "height": self.height}
        arguments = {**self.prompt, **size, "guidance_scale": self.guidance, "output_type": "latent", **arguments}
        try:
            return pipe(num_inference_steps=steps, **arguments).images
        except (Refused, KeyboardInterrupt):
            raise
        except Exception as error:
            raise Refused(side.failure(error)) from error

    def picture(self, latents: torch.Tensor) -> Any:
        """A PIL image of latents at level 0, decoded by the pipeline."""

        def given(model, x, sigmas, extra_args=None, callback=None, disable=None):
            return latents.to(x)

        return self._call(
            self.pipe, Side("the picture", given, {}), 1, sampler=given, latents=self.noise.clone(), output_type="pil"
        )[0]

    # --- the stock pipeline ---

    def scheduler(self, side: Side, **changes: Any) -> Any:
        """A fresh scheduler of this class, configured as a diffusers user would: from the model's own."""
        options = {**side.options, **changes}
        parameters = inspect.signature(side.target.__init__).parameters
        if "noise_sampler_seed" in parameters:
            options.setdefault("noise_sampler_seed", self.options.seed)  # its own Brownian tree, made to be known
        try:
            return side.target.from_config(self.pipe.scheduler.config, **options)
        except Exception as error:
            raise Refused(side.failure(error)) from error

    def follow_scheduler(self, side: Side, **changes: Any) -> Trajectory:
        """One run of the stock pipeline with this scheduler."""
        steps = self.options.steps
        scheduler = self.scheduler(side, **changes)
        fresh = prepared(scheduler, steps, self.tokens)
        listed, step_levels, starts = levels_of(fresh, self.level_of)
        # add_watermarker is SDXL's alone
        extra = {} if self.flux else {"add_watermarker": False}
        pipe = self.stock_class(**{**self.pipe.components, "scheduler": scheduler}, **extra)
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator("cpu")
        generator.set_state(self.drawn)
        seen, after, noise, states = [], [], {}, []

        def record(x: torch.Tensor, timestep: float, prediction: torch.Tensor) -> None:
            seen.append((x, timestep, prediction))
            states.append(generator.get_state())

        def step_end(_, i, t, tensors):
            after.append(tensors["latents"].to(self.dtype))
            if not states[-1].equal(generator.get_state()):
                draws = _draws(states[-1], generator.get_state(), tensors["latents"], self.device)
                noise[len(seen) - 1] = [draw.to(self.dtype) for draw in draws]
            return {}

        with self.watched(record):
            self._call(
                pipe, side, steps, latents=self.noise.clone(), generator=generator, callback_on_step_end=step_end
            )
        if len(seen) != len(listed):
            raise Refused(
                f"{side.text}: the network was called {len(seen)} times, not {len(listed)} as its timesteps say"
            )
        notes = []
        if getattr(fresh, "sigmas", None) is not None and not torch.equal(fresh.sigmas, scheduler.sigmas.cpu()):
            changed = [i for i, (a, b) in enumerate(zip(fresh.sigmas, scheduler.sigmas)) if a != b]
            notes.append(f"the scheduler changed its own sigmas while it ran, at {changed}")
        # Schedulers that keep alpha x hand their latents to the network as they are, x / sqrt(sigma^2 + 1)
        ratios = [x.norm() / latents.norm() for latents, (x, *_) in zip(after, seen[1:])]
        keeps_alpha_x = not self.flux and all(abs(ratio - 1) < 1e-6 for ratio in ratios)
        evaluations = []
        for level, (x, timestep, prediction) in zip(listed, seen):
            scale = 1.0 if self.flux else math.sqrt(level**2 + 1)
            evaluations.append(Evaluation(level, timestep, x * scale, self._denoised(x, level, prediction)))
        scale = math.sqrt(step_levels[-1] ** 2 + 1) if keeps_alpha_x else 1.0
        shorter = (torch.bfloat16, torch.float16, torch.float32)
        shorter = [dtype for dtype in shorter if dtype.itemsize < self.network.dtype.itemsize]
        rounded = dict[int, str]()
        for i, latents in enumerate(after):
            fits = [str(dtype)[6:] for dtype in shorter if latents.equal(latents.to(dtype).to(latents.dtype))]
            rounded |= {i: fits[0]} if fits else {}
        return Trajectory(
            step_levels, evaluations, starts, after[-1] * scale, noise, fresh, notes, rounded, keeps_alpha_x
        )

    def _denoised(self, x: torch.Tensor, level: float, prediction: torch.Tensor) -> torch.Tensor:
        """x0 from the network's input and prediction, at the level that its sampler says."""
        if self.flux:
            return x - level * prediction
        scale = math.sqrt(level**2 + 1)
        if self.pipe.scheduler.config.get("prediction_type") == "v_prediction":
            return x / scale - prediction * level / scale
        return x * scale - prediction * level

    # --- this project's pipeline ---

    def uses_ve(self, side: Side, ours: Ours) -> bool:
        """Whether FLUX's sampler sees sigma = t / (1 - t)."""
        if not self.flux or ours.flow:
            return False
        choice = self.options.parameterization
        if choice == "auto" and side.comfy:
            choice = "flow"  # ComfyUI's samplers know flows themselves
        return self.module.uses_ve(choice, self.module.find_sampler(side.target, side.options), ours.levels)

    def sampler_sigmas(self, levels: torch.Tensor, ve: bool) -> torch.Tensor:
        """What the sampler sees for these levels. Only t = 1 itself has no finite sigma, and gets the pipeline's."""
        if not ve:
            return levels
        return self.module.ve_sigmas(levels.clone()) if levels[0] == 1 else levels / (1 - levels)

    def follow_sampler(self, side: Side, ours: Ours, tick: Callable[[], Any] = lambda: None) -> Trajectory:
        """One run of this project's pipeline with this sampler. `tick()` is called for each evaluation."""
        ve = self.uses_ve(side, ours)
        timesteps, record = [], Record()

        def run(model, x, sigmas, extra_args=None, callback=None, disable=None):
            return self._sample(side, ours, model, ve, record, callback, generator)

        arguments = {"parameterization": "ve" if ve else "flow"} if self.flux else {"quantize_timesteps": ours.quantize}
        generator = torch.Generator("cpu")
        generator.set_state(self.drawn)

        def note(x: torch.Tensor, timestep: float, prediction: torch.Tensor) -> None:
            timesteps.append(timestep)
            tick()

        with self.watched(note, ours.timesteps):
            # `run` takes its own levels and not those of the call
            self._call(self.pipe, side, self.options.steps, sampler=run, generator=generator, **arguments)
        return record.trajectory(ours.levels, timesteps, ve)

    def replay(self, side: Side, ours: Ours, denoised: list[torch.Tensor]) -> Trajectory:
        """Our sampler on predictions that were made before, without the network."""
        ve, record = self.uses_ve(side, ours), Record()

        def model(x: torch.Tensor, sigma: torch.Tensor, with_uncond: bool = False) -> torch.Tensor:
            given = denoised[min(len(record.calls), len(denoised) - 1)]
            return torch.stack([given, given]) if with_uncond else given

        def run(model, x, sigmas, extra_args=None, callback=None, disable=None):
            return self._sample(side, ours, model, ve, record, callback, None)

        sigmas = self.sampler_sigmas(ours.levels, ve).to(self.dtype)
        self.module.run_sampler(self.module.find_sampler(run), model, ours.start, sigmas)
        return record.trajectory(ours.levels, [math.nan] * len(record.calls), ve)

    def _sample(
        self, side: Side, ours: Ours, model: Callable, ve: bool, record: Record, callback: Any, generator: Any
    ) -> torch.Tensor:
        """Calls the sampler over our levels and notes what it asks of the model."""
        sigmas = self.sampler_sigmas(ours.levels, ve).to(self.dtype)
        x = ours.start.to(self.dtype)
        if ve:  # at t = 1 the noise alone, as in the pipeline
            x = x * (sigmas[0] if ours.levels[0] == 1 else 1 + sigmas[0]).item()

        def recorded(x: torch.Tensor, sigma: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            predicted = model(x, sigma, **kwargs)
            denoised = predicted[0] if kwargs.get("with_uncond") else predicted
            kept = (x.clone(), denoised.clone()) if ours.keep else (x.new_empty(0), x.new_empty(0))
            record.calls.append((kept[0], sigma.flatten()[0].item(), kept[1]))
            record.draws = 0
            return predicted

        silent = side.eta == 0  # some samplers draw all the same, and add it zero times

        def noise_sampler(sigma, sigma_next) -> torch.Tensor:
            if silent:
                return torch.zeros_like(x)
            i = len(record.calls) - 1
            draws = ours.noise.get(i) if ours.noise else None
            if ours.noise_sampler is not None:
                draw = ours.noise_sampler(sigma, sigma_next)
            elif draws:
                draw = draws[min(record.draws, len(draws) - 1)]
            else:  # the other side drew nothing here
                draw = randn_tensor(x.shape, torch.Generator("cpu").manual_seed(i), x.device, x.dtype)
                record.unmatched.append(i)
            record.draws += 1
            if ours.keep:
                record.noise.setdefault(i, []).append(draw)
            return draw

        def called_back(info: dict[str, Any]) -> None:
            record.starts.append(len(record.calls) - 1)
            if callback is not None:
                callback(info)

        sampler = side.target
        if side.file is not None and not ve:  # one's own may ask a model what ComfyUI's do
            sampler = comfy_sampler(sampler, self.pipe, self.width, self.height)
        drawing = "noise_sampler" in inspect.signature(sampler).parameters
        given = {**side.options, **({"noise_sampler": noise_sampler} if drawing else {})}
        sampler = self.module.find_sampler(functools.partial(sampler, **given))
        given = {"callback": called_back}
        final = self.module.call_sampler(sampler, recorded, x, sigmas, generator, lambda: None, **given)
        if not isinstance(final, torch.Tensor) or final.shape != x.shape:
            returned = (
                f"one of shape {tuple(final.shape)}" if isinstance(final, torch.Tensor) else f"{type(final).__name__}"
            )
            raise Refused(f"{side.text} has to return a tensor of shape {tuple(x.shape)}, but returned {returned}")
        if not record.calls:
            raise Refused(f"{side.text} never calls the model")
        record.final = final
        return record.final


def _enough_tokens(pipe: Any, prompt: str) -> int:
    """How many tokens the prompt needs. FLUX pads to 512, which is most of an evaluation's cost on the demo model."""
    needed = len(pipe.tokenizer_2(prompt).input_ids)
    return next((length for length in (64, 128, 256) if length >= needed), 512)


def _draws(before: torch.Tensor, after: torch.Tensor, like: torch.Tensor, device: torch.device) -> list[torch.Tensor]:
    """What was drawn between two states of the generator, in the dtype that leads from one to the other."""
    for dtype in dict.fromkeys((like.dtype, torch.float32, torch.float64, torch.float16, torch.bfloat16)):
        generator = torch.Generator("cpu")
        generator.set_state(before)
        draws = []
        for _ in range(4):
            draws.append(randn_tensor(like.shape, generator, device, dtype))
            if generator.get_state().equal(after):
                return draws
    return []
