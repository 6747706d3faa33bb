"""KDiffusionScheduler: the samplers of k-diffusion in every pipeline of diffusers.

    pipe.scheduler = KDiffusionScheduler.from_scheduler(pipe.scheduler, sampler="dpmpp_2m_sde")

This file works alone: it needs torch, diffusers, k-diffusion and greenlet, and can be copied anywhere.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import importlib.util
import inspect
import math
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import diffusers
import torch
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from greenlet import GreenletExit, getcurrent, greenlet


class KDiffusionScheduler(diffusers.SchedulerMixin, diffusers.ConfigMixin):
    """A scheduler that runs a k-diffusion sampler, `sampler(model, x, sigmas)`, inside the loop of a stock pipeline.

    The sampler runs in a greenlet, which pauses at `model(x, sigma)` until `step` brings the prediction. A trial on one
    number finds `timesteps`, one for each evaluation. Where `step` gets no generator, as in FLUX's pipelines, a hash
    seeds the step noise: of the noise that the pipeline added to its picture, else of the first sample.

    Args:
        scheduler: the base: one with betas (epsilon, v_prediction, sample), for flow matching, or EDM. It says what the
            network was trained with, and the scale of latents. Its config is this one's, and what is saved.
        sampler, sampler_kwargs: a sampler of k-diffusion by name, or a callable with its signature; options for it.
        schedule: the levels, falling (sigma; for flow models t). None: the base's, or those that a pipeline passes.
        parameterization: of flow models: sigma is t ("flow") or t / (1 - t) ("ve"); "auto": "ve" for noise, own levels.
        quantize_timesteps: round to the trained timesteps.

    ValueError, TypeError: for what does not fit, dpm_adaptive, and runs that the sampler can't start or go on with.
    """

    def __init__(
        self,
        scheduler: diffusers.SchedulerMixin,
        *,
        sampler: str | Callable = "euler",
        sampler_kwargs: dict[str, Any] | None = None,
        schedule: Sequence[float] | torch.Tensor | None = None,
        parameterization: str = "auto",
        quantize_timesteps: bool = False,
    ):
        base: Any = scheduler.base if type(scheduler) is KDiffusionScheduler else scheduler
        config, kind = base.config, type(base)
        self.base: Any = copy.deepcopy(base)  # with what the config does not know, as `set_shift`
        self.__module__ = kind.__module__  # pipelines save (module, class)
        self.sampler = find_sampler(sampler, sampler_kwargs)
        if isinstance(schedule, str):
            raise ValueError(f"`schedule` has to be levels, as of sampling.get_sigmas_{schedule}, not {schedule!r}")
        self.schedule = None if schedule is None else check_sigmas(schedule, "schedule", at_least=2)
        self.parameterization, self.quantize_timesteps = parameterization, quantize_timesteps
        self._inverted = bool(config.get("invert_sigmas"))  # its t is 1 - t, as Mochi's
        self._prediction, self._kind = config.get("prediction_type", "epsilon"), ""
        self._table: Any = None
        self._trial: Any = [None]  # the sampler, its levels, and the sigmas that it asked for
        self._count, self._shift = config.get("num_train_timesteps", 1000), 1.0
        taken = inspect.signature(getattr(base, "step", lambda: None)).parameters.values()
        needed = [p.name for p in taken if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
        if needed == ["model_output", "timestep", "sample"] and "Inverse" not in kind.__name__:
            if hasattr(base, "precondition_outputs"):
                self._kind = "edm"
            elif config.get("use_flow_sigmas") or ("shift" in config and not hasattr(base, "alphas_cumprod")):
                self._kind, self._prediction = "flow", "flow_prediction"
            elif hasattr(base, "alphas_cumprod"):  # latents of unit variance, or x0 + sigma noise
                self._kind = "vp" if float(base.init_noise_sigma) == 1 else "betas"
                # zero terminal SNR has no finite last sigma: as EulerDiscreteScheduler does, take 4096 for it
                alphas = base.alphas_cumprod.cpu().double().clamp(min=2**-24)
                self._table = external.DiscreteSchedule(((1 - alphas) / alphas).sqrt(), quantize=quantize_timesteps)
        kinds = ("epsilon", "v_prediction", "sample", "original_sample")
        if not self._kind or (self._kind != "flow" and self._prediction not in kinds):
            needs = "betas (epsilon, v_prediction, sample), flow or EDM, and step(model_output, timestep, sample)"
            raise ValueError(f"`scheduler`: needs {needs}, but is {kind.__name__} with {self._prediction!r}")
        for name in filter(config.get, {"clip_sample", "thresholding"} & inspect.signature(kind).parameters.keys()):
            warnings.warn(f"{kind.__name__}'s `{name}` is ignored: x0 is left as it is predicted", stacklevel=3)
        self._plan(check_sigmas([0.8, 0.4, 0.2, 0.1, 0.0]), {})  # some ask for `order` before they set timesteps
        self.timesteps = self.base.timesteps
        self.num_inference_steps: int | None = None

    @classmethod
    def from_scheduler(cls, scheduler: diffusers.SchedulerMixin, **options: Any) -> KDiffusionScheduler:
        """In place of a pipeline's scheduler, which stays as it is. The options are those of the class."""
        return cls(scheduler, **options)

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As any scheduler's, with the options of the class beside those of the base."""
        options = {name: kwargs.pop(name) for name in list(kwargs) if name in inspect.signature(cls).parameters}
        # one of a scheduler made in code names no class: what is in it tells flow from betas
        kinds = {"use_flow_sigmas": "DPMSolverMultistep", "beta_start": "EulerDiscrete", "sigma_data": "EDMEuler"}
        kind = next((kind for key, kind in kinds.items() if config.get(key)), "FlowMatchEulerDiscrete")
        base = getattr(diffusers, config.get("_class_name") or f"{kind}Scheduler")
        base, unused = base.from_config(config, return_unused_kwargs=True, **kwargs)
        return (cls(base, **options), unused) if return_unused_kwargs else cls(base, **options)

    # To pipelines and savers it is the base with another `step`: its class, its config, `set_timesteps`' signature, ...
    __class__ = property(lambda me: type(me.base))  # type: ignore[assignment]
    _internal_dict = property(lambda me: me.base._internal_dict, lambda me, d: vars(me.base).update(_internal_dict=d))
    step_index = property(lambda me: me._step_index, doc="The evaluation that comes next.")
    __repr__: Any = lambda me: f"KDiffusionScheduler(sampler={me.sampler.name!r}, {me.base!r})"  # noqa: E731
    set_timesteps = property(lambda me: functools.wraps(me.base.set_timesteps)(functools.partial(me._set_timesteps)))

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self).get("base"), name)  # none while a copy is made

    def __reduce__(self) -> tuple:
        return object.__new__, (KDiffusionScheduler,), self.__dict__

    def _set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        self.base.set_timesteps(*args, **kwargs)
        kwargs = inspect.signature(self.base.set_timesteps).bind(*args, **kwargs).arguments
        passed = any(kwargs.get(name) is not None for name in ("sigmas", "timesteps"))
        times = self.base.timesteps.cpu().double()[:: getattr(self.base, "order", 1)]  # one a step
        base_sigmas = getattr(self.base, "sigmas", None)
        if hasattr(self.base, "plms_timesteps"):  # PNDM lists one twice, or others between
            times = torch.as_tensor(self.base._timesteps[::-1].copy()).double()
        levels = self._table.t_to_sigma(times) if base_sigmas is None else base_sigmas.cpu().double()
        levels, n = (1 - levels if self._inverted else levels).unique_consecutive(), len(times)
        known = {} if self.quantize_timesteps else dict(zip(levels.tolist(), times.tolist()))
        # where a pipeline passes timesteps, as CogView4's, its network gets t before the shift to the level s
        before = times / self._count if self._kind == "flow" and kwargs.get("timesteps") is not None else times[:0]
        pairs = [(s, t) for s, t in zip(levels.tolist(), before.tolist()) if 0 < s * t < s < 1]
        self._shift = sorted(s * (1 - t) / (t * (1 - s)) for s, t in pairs)[len(pairs) // 2] if pairs else 1.0
        if not passed or len(levels) == n:  # the base's own may list the last level twice, or end above zero
            levels = torch.cat([levels[:n], levels.new_zeros(1)])
        levels = levels if self.schedule is None else self.schedule
        if (steps := len(levels) - 1) != n:
            raise ValueError(f"`schedule` has {steps} steps: pass num_inference_steps={steps}, not {n}")
        self._plan(check_sigmas(levels, f"{type(self.base).__name__}.sigmas"), known, passed)

    def _plan(self, levels: torch.Tensor, known: dict[float, float], given: bool = False) -> None:
        """The evaluations of a run through these levels, whose timesteps are `known` if they are the base's."""
        n = self.num_inference_steps = len(levels) - 1
        ve = uses_ve(self.parameterization, self.sampler, levels) and self._kind == "flow" and bool(levels[0] <= 1)
        sigmas, sampler = ve_sigmas(levels) if ve else levels, self.sampler
        if not (sampler.is_k_diffusions and self._trial[0] is sampler and self._trial[1].equal(sigmas)):
            self._trial = sampler, sigmas, try_out(sampler, sigmas)  # again where a callable may have changed since
        asked = [*self._trial[2], float(sigmas[-1])]  # and where the run ends
        self.order = 1 if given else math.ceil((len(asked) - 1) / n)  # FLUX's pipelines pass levels, and count by one
        self._per_step = 3 if "sigma_min" in sampler.arguments else math.ceil((len(asked) - 1) / n)  # dpm_fast's: 3
        base_levels = torch.tensor(asked, dtype=torch.float64, device="cpu")
        base_levels = base_levels / (1 + base_levels) if ve else base_levels
        base_levels[0] = levels[0] if ve and levels[0] > 0.9999 else base_levels[0]  # t = 1, where sigma is not finite
        times = self._timesteps_at(base_levels)
        for level, time in known.items():
            times[(base_levels - level).abs() <= 1e-9 * level] = time
        times, whole = times.float(), bool((times[:-1] == times[:-1].round()).all())
        like = levels if self.base.timesteps is None else self.base.timesteps  # PNDM's, at first
        self.timesteps = times[:-1].to(like.device, like.dtype if whole else torch.float32)
        self._evaluations = [self._at(*row) for row in zip(asked, base_levels.tolist(), times.tolist())]
        self.sigmas = (1 - base_levels if self._inverted else base_levels).float()
        self._run: Any = None
        self._seeds: Any = None  # of the noise that the pipeline added
        self._step_index: int | None = None
        self.begin_index: int | None = None

    def _timesteps_at(self, levels: torch.Tensor) -> torch.Tensor:
        if self._kind == "flow":
            ts = levels / (1 + (self._shift - 1) * (1 - levels))  # before the pipeline's shift
            times = self._count * (1 - ts if self._inverted else ts)
            return times.round() if self.quantize_timesteps else times
        if self._prediction == "v_prediction" and self.base.config.get("timestep_type") == "continuous":
            return 0.25 * levels.clamp(min=1e-10).log()  # as Stable Video Diffusion's
        return self._table.sigma_to_t(levels) if self._table else self.base.precondition_noise(levels)

    def _at(self, sigma: float, level: float, time: float) -> SimpleNamespace:
        """The base's process at a level: a sample is alpha x0 + noise n, n of unit variance."""
        # the network gets sample / divisor and `time`, and x0 is (skip sample - share prediction) / norm
        base, at = self.base, SimpleNamespace(sigma=sigma, time=time, alpha=1.0, noise=level, divisor=1.0)
        if self._kind == "flow":
            at.alpha = 1 - level if level <= 1 else 1.0
        elif self._kind == "vp":
            at.alpha, at.noise = 1 / math.hypot(1, level), level / math.hypot(1, level)
        elif self._kind == "betas":
            at.divisor = math.hypot(level, 1)
        norm = math.hypot(at.alpha, at.noise)
        shares = {"epsilon": (1.0, at.noise, at.alpha), "v_prediction": (at.alpha / norm, at.noise, norm)}
        shares["flow_prediction"] = 1.0, at.noise, 1.0
        at.skip, at.share, at.norm = shares.get(self._prediction, (0.0, -1.0, 1.0))
        if self._kind == "edm":
            at.divisor, at.skip = 1 / base.precondition_inputs(1.0, level), base.precondition_outputs(1.0, 0.0, level)
            at.share, at.norm = base.precondition_outputs(0.0, -1.0, level), 1.0
        at.scale = at.noise / sigma if sigma else 1.0  # the pipeline's latents are the sampler's state times this
        return at

    @property
    def init_noise_sigma(self) -> float:
        """What the pipeline multiplies unit noise by, for the first sample."""
        unit, first = float(getattr(self.base, "init_noise_sigma", 1.0)), self._evaluations[0]
        if self._kind == "flow" or (unit == 1 and self.schedule is None):
            return unit
        own = self.schedule is None or not self.num_inference_steps  # with churn, the first sigma is above the level
        return unit * first.sigma / float(self._trial[1][0]) if own else first.noise

    def set_begin_index(self, begin_index: int = 0) -> None:
        """The run begins with this one of `timesteps`. ValueError: the sampler can't."""
        self._run_from(begin_index)
        self.begin_index = begin_index

    def _next(self, timestep: Any) -> int:
        """The evaluation that comes next; at first the one named, or that of the timestep. ValueError: it can't."""
        view = self.num_inference_steps and torch.is_tensor(timestep)  # a view of `timesteps` shows its place in it
        view = view and timestep.untyped_storage().data_ptr() == self.timesteps.untyped_storage().data_ptr()
        if self._step_index not in (None, len(self._trial[2])):  # where a run went to its end another one begins
            return timestep.storage_offset() if view else self._step_index  # a loop may step twice from one, or go back
        if (first := timestep.storage_offset() if view else self.begin_index) is None:
            time = float(torch.as_tensor(timestep).max())
            away = [(abs(at.time - time), i % self._per_step > 0) for i, at in enumerate(self._evaluations[:-1])]
            first = away.index(min(away)) if min(away)[0] <= 1e-2 * max(abs(time), 0.1) else 0  # some pass others
        self._run_from(first)
        return first

    def _run_from(self, i: int) -> tuple[int, Sampler, torch.Tensor]:
        """A run from evaluation i on: where its first whole step begins, and the sampler and the levels from there."""
        sampler, levels, asked = self._trial
        # a pipeline that does not count by `order` begins within a step: Euler's method goes to the next one
        first = math.ceil(i / self._per_step) * self._per_step
        rest = levels[first // self._per_step :] if first < len(asked) else levels[:0]
        if "sigma_min" in sampler.arguments and len(rest):
            rest = torch.cat([levels.new_tensor(asked[first : first + 1]), levels[first + 1 :]])
        if sampler.is_k_diffusions and (churn := sampler.arguments.get("s_churn")):  # it is spread over the steps
            churn *= (len(rest) - 1) / (len(levels) - 1)
            sampler = find_sampler(sampler.function, {**sampler.options, "s_churn": churn})
        restarts = i not in (0, self.begin_index) and self._step_index not in (None, len(self._trial[2]))
        if restarts and sampler.function not in (sampling.sample_euler, sampling.sample_euler_ancestral):
            what = "go on with a copy, in another thread, with latents of another shape or twice from a timestep"
            raise ValueError(f"`sampler`: {sampler.name} can't {what}; euler and euler_ancestral can")
        can = i == 0 or (sampler.is_k_diffusions and i < len(asked))
        if not can and not (i == first < len(asked) and try_out(sampler, rest) == asked[i:]):
            what = "start part-way (`strength`, `denoising_start`) here: it is within a step, or its steps vary"
            raise ValueError(f"`sampler`: {sampler.name} can't {what}. Pass `schedule=levels[i:]` and `latents`")
        return first, sampler, rest

    def scale_model_input(self, sample: torch.Tensor, timestep: Any = None) -> torch.Tensor:
        """The network's input."""
        return sample / self._evaluations[self._next(timestep)].divisor

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """alpha x0 + sigma noise at timesteps of the run, one for each image or for all; at others the base's."""
        i = self._next(timesteps)  # to refuse what can't begin there before the network runs
        self._seeds = self._seeds or seeds_of(noise)
        ahead = reversed(self._evaluations[i:] + self._evaluations[:i])  # the next one of equal timesteps counts
        known = {at.time: (at.alpha, at.noise) for at in ahead}
        shares = [known.get(time) for time in timesteps.flatten().tolist()]
        if None in shares:
            return self.base.add_noise(original_samples, noise, timesteps)
        alpha, sigma = torch.tensor(shares).to(original_samples).T.reshape(2, -1, *[1] * (original_samples.ndim - 1))
        return alpha * original_samples + sigma * noise

    def scale_noise(self, sample: torch.Tensor, timestep: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """`add_noise`, as flow pipelines call it."""
        return self.add_noise(sample, noise, timestep)

    def step(
        self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, generator=None, return_dict=True, **given
    ) -> EulerDiscreteSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """Goes on with the sampler: `model_output` is the network's at `sample`, both of the latents' shape. Returns
        `prev_sample`, of the next timestep, in model_output's dtype, and `pred_original_sample`, x0. For errors see the
        class."""
        tokens, known = given.pop("per_token_timesteps", None), given.pop("pred_original_sample", None)
        if wrong := [name for name, value in given.items() if getattr(value, "ndim", 0) or (name == "eta" and value)]:
            raise TypeError(f"KDiffusionScheduler.step takes no {', '.join(wrong)}")
        i = self._next(timestep)
        here, after = self._evaluations[i : i + 2]
        if model_output.shape[:2] == (len(sample), 2 * sample.shape[1]):
            model_output = model_output.chunk(2, dim=1)[0]  # the other half is the variance
        dtype = torch.promote_types(torch.promote_types(sample.dtype, model_output.dtype), torch.float32)
        x, output = sample.to(dtype), model_output.to(dtype)
        if self._inverted != (tokens is not None):
            output = -output  # LTXCondition negates the prediction, and restores its own tokens
        denoised = (here.skip * x - here.share * output) / here.norm if known is None else known.to(dtype)
        run = self._run
        if run and run.knows and known is None:  # Cosmos asks for x0 of both sides, and passes x0, guided
            self._step_index = i + 1
            return sample, denoised
        y, self._run = x / here.scale, None  # gone if the sampler fails
        place = x.shape, threading.current_thread()  # a greenlet stays in its thread
        if run is None or run.dead or run.place != (i, *place):
            run = self._begin(i, y, generator)
        # the pipeline may have changed what it got (inpainting, callbacks): the state is that and the residual
        run.parent, run.place, run.knows = getcurrent(), (i + 1, *place), known is not None
        asked = self._resume(run, i + 1, denoised, y + run.residual)
        x = (asked * after.scale).to(model_output.dtype)
        run.residual = asked - x.to(asked.dtype) / after.scale
        self._run, self._step_index = None if run.dead else run, i + 1
        return EulerDiscreteSchedulerOutput(x, denoised) if return_dict else (x, denoised)

    def _begin(self, i: int, x: torch.Tensor, generator: Any) -> Any:
        """The sampler, left where it asks for evaluation i."""
        first, sampler, rest = self._run_from(i)
        noisy = not sampler.is_k_diffusions or sampler.arguments.get("s_churn") or sampler.arguments.get("eta")
        if generator is None and noisy:
            seeds = self._seeds if self._seeds and len(self._seeds) == len(x) else seeds_of(x)
            generator = [torch.Generator("cpu").manual_seed((seed + i) % 2**63) for seed in seeds]
        call = functools.partial(call_sampler, sampler, sigmas=rest, generator=generator)
        run: Any = Paused(_sample)
        self._resume(run, i, x, [at.sigma for at in self._evaluations[i : first + 1]], call if len(rest) else None)
        return run

    def _resume(self, run: Any, i: int, *given: Any) -> torch.Tensor:
        """The sampler goes on until it asks for evaluation i, or ends: its state there."""
        grad = torch.is_grad_enabled()
        with torch.inference_mode(torch.is_inference_mode_enabled()), torch.set_grad_enabled(grad):
            x, sigma = run.switch(*given)
        planned = run.dead or self.sampler.is_k_diffusions  # to look at a sigma on a GPU is to wait for it
        planned = planned or math.isclose(torch.as_tensor(sigma).flatten()[0], [*self._trial[2], 0.0][i], rel_tol=1e-4)
        if not planned or run.dead != (i == len(self.timesteps)):
            raise ValueError("`sampler`: it asks for other evaluations than in its trial on a single number")
        return x


class Paused(greenlet):
    """A sampler that waits for a prediction. Copies share it until one of them goes on. It can't be saved."""

    residual: Any = 0.0  # what rounding took from the state that the pipeline has
    __deepcopy__ = lambda self, memo: self  # noqa: E731
    __reduce_ex__ = lambda self, protocol: (type(None), ())  # noqa: E731


def try_out(sampler: Sampler, levels: torch.Tensor) -> list[float]:
    """The `sigmas` that a sampler asks for over these `levels`, with a tensor of one element. ValueError: it fails."""
    asked, device = list[float](), torch.get_default_device()
    # k-diffusion's sigmas are wanted in full; others may compare levels, as they will get them
    x = torch.ones([1] * 4, dtype=torch.float64 if sampler.is_k_diffusions else torch.float32, device="cpu")

    def model(x: torch.Tensor, sigma: torch.Tensor, with_uncond: bool = False) -> torch.Tensor:
        if with_uncond or torch.get_default_device() != device:
            raise ValueError(f"it needs {'both sides of guidance' if with_uncond else 'another default device'}")
        asked.append(float(sigma))
        return x * 0.5

    try:
        if "rtol" in sampler.arguments:
            raise ValueError("the network's predictions decide on its steps")
        still = {"noise_sampler": lambda *_: torch.zeros_like(x)} if "noise_sampler" in sampler.arguments else {}
        outside = greenlet(call_sampler)  # of the caller's context, where a pipeline of ours may count steps
        end = outside.switch(sampler, model, x, levels, torch.Generator("cpu").manual_seed(0), **still)
        if not asked or getattr(end, "shape", None) != x.shape:
            raise ValueError("it has to call the network, and to return the latents")
    except Exception as error:
        ours = "use StableDiffusionXLComfyPipeline or FluxComfyPipeline"
        raise ValueError(f"`sampler`: {sampler.name} can't run in a scheduler: {error}; {ours}") from error
    return asked


def seeds_of(x: torch.Tensor) -> list[int]:
    """A seed for each image, of its bits alone."""
    numbers = (image.detach().cpu().double().numpy().tobytes() for image in x)
    return [int.from_bytes(hashlib.blake2b(image, digest_size=8).digest(), "big") >> 1 for image in numbers]


def _sample(x: torch.Tensor, ahead: list[float], call: Callable | None) -> tuple[torch.Tensor, None]:
    """A run: Euler's steps through the levels `ahead`, then `call(model, x)`. GreenletExit ends one that is dropped."""

    def model(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():  # on its way back, the sampler's own modes
            try:
                denoised, state = getcurrent().parent.switch((x, sigma))
            except GreenletExit:  # a run that was left half way: what the caller's modes are then
                modes.enter_context(torch.inference_mode(torch.is_inference_mode_enabled()))
                raise
        x.copy_(state)
        return denoised

    with contextlib.ExitStack() as modes:
        for sigma, after in zip(ahead, ahead[1:]):
            x = x + (x - model(x, x.new_full([len(x)], sigma))) * (after / sigma - 1)
        return (call(model, x) if call else x), None


# --- shared block: the same text in the three files that are copied alone; `python tests/blocks.py` copies it ---

# k-diffusion's submodules, in a package of another name: the `__init__` of its own imports the training code
if (spec := importlib.util.find_spec("k_diffusion")) is None:
    raise ImportError("k-diffusion is not installed: pip install --no-deps k-diffusion==0.1.1.post1")
package = sys.modules.setdefault("k_diffusion_alone", ModuleType("k_diffusion_alone"))
package.__path__ = spec.submodule_search_locations or []
modules: Any = (importlib.import_module(f"k_diffusion_alone.{name}") for name in ("sampling", "external"))
sampling, external = modules
CODE = sampling.__spec__.loader.get_code(sampling.__name__)
GIVEN = {"model", "x", "sigmas", "sigma_min", "sigma_max", "n", "extra_args", "callback", "disable"}  # not options
GLOBAL_GENERATORS = vars(sampling).setdefault("global_generators", threading.RLock())  # all copies share it


def fresh_sampling(dtype: torch.dtype, **functions: Callable) -> Any:
    """k-diffusion's `sampling`, executed again as a module of its own, with these functions in place of torch's."""
    module: Any = importlib.util.module_from_spec(sampling.__spec__)
    exec(CODE, vars(module))
    # 0-dim tensors on the CPU mix with latents on any device; torch's defaults (dtype, device) do not count
    functions["linspace"] = lambda *args, device=None: torch.linspace(*args, dtype=dtype, device="cpu")
    functions["tensor"] = lambda value: torch.tensor(value, dtype=dtype, device="cpu")
    functions["__getattr__"] = functools.partial(getattr, torch)  # all other names are torch's
    module.torch, module.trange, module.DPMSolver.eps = ModuleType("torch"), sampling.trange, sampling.DPMSolver.eps
    vars(module.torch).update(functions)
    module.utils = SimpleNamespace(append_dims=lambda sigma, n: sigma)  # its levels stay 0-dim
    return module


def sampler_names() -> list[str]:
    """The samplers of the installed k-diffusion, without `sample_`, in the order of its source."""
    return [name[7:] for name in vars(sampling) if name.startswith("sample_")]


class Sampler(NamedTuple):
    """A function of k-diffusion, or a user-supplied callable with such a signature, and its options."""

    function: Callable
    name: str
    options: dict[str, Any]
    arguments: dict[str, Any]  # all that it takes, by name: the option, else the default, else None
    takes_any: bool  # it has **kwargs
    is_k_diffusions: bool


def find_sampler(sampler: Any, sampler_kwargs: dict[str, Any] | None = None) -> Sampler:
    """A sampler by name, or a callable, with its options. ValueError, TypeError: there is none, or not these."""
    options = dict(sampler_kwargs or {})
    if isinstance(sampler, str):
        if (name := sampler.removeprefix("sample_")) not in sampler_names():
            others = f"there are {', '.join(sampler_names())}; comfy_ksampler.py has ComfyUI's"
            raise ValueError(f"`sampler`: there is no {sampler!r}; {others}")
        sampler = getattr(sampling, f"sample_{name}")
    while isinstance(sampler, functools.partial) and not sampler.args:
        options, sampler = {**sampler.keywords, **options}, sampler.func
    try:
        (taken := inspect.signature(sampler)).bind_partial("model", "x", "sigmas")
        parameters = [*taken.parameters.values()]
    except (TypeError, ValueError):
        signature = "sampler(model, x, sigmas, extra_args=None, callback=None, disable=None, ...)"
        raise TypeError(f"`sampler` has to be a name or a callable, {signature}, but is {sampler!r}") from None
    name, takes_any = getattr(sampler, "__name__", repr(sampler)), any(p.kind is p.VAR_KEYWORD for p in parameters)
    by_name = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    named = [p.name for p in parameters[3:] if p in by_name and p.name not in GIVEN]
    wrong = [f"needs {p.name}" for p in by_name if p.name in named and p.default is p.empty and p.name not in options]
    wrong += [f"takes no {option}" for option in sampler_kwargs or {} if option not in named and not takes_any]
    if wrong:
        raise ValueError(f"`sampler_kwargs`: {name} {', '.join(wrong)}; it takes {', '.join(named) or 'none'}")
    arguments: dict[str, Any] = {p.name: None if p.default is p.empty else p.default for p in by_name}
    arguments |= {key: value for key, value in options.items() if key not in GIVEN}
    is_k_diffusions = any(sampler is one for one in vars(sampling).values())
    if is_k_diffusions and "rtol" in arguments and not arguments["rtol"] + arguments["atol"] > 0:
        raise ValueError("`sampler_kwargs`: rtol or atol has to be above 0, or the steps never end")
    return Sampler(sampler, name, options, arguments, takes_any, is_k_diffusions)


def check_sigmas(sigmas: Any, name: str = "sigmas", at_least: int = 1) -> torch.Tensor:
    """`sigmas` (any scale), copied in float64 to the CPU. ValueError unless finite, falling and not below zero."""
    levels = torch.as_tensor(sigmas, dtype=torch.float64, device="cpu").flatten().clone()
    single = levels.float()  # in which a sampler may get them
    falling = single.isfinite().all() and (single.diff() < 0).all() and (single[:1] > 0).all() and (levels >= 0).all()
    if len(levels) < at_least or not falling:
        rule = f"finite and fall from a positive number to zero or above (as float32), {at_least} of them at least"
        raise ValueError(f"`{name}` have to be {rule}: {sigmas}")
    return levels


def white_noise(x: torch.Tensor, generator: Any) -> torch.Tensor:
    """Standard normals of x's shape, dtype and device, drawn where the caller's generator or generators are."""
    first = generator[0] if isinstance(generator, list) else generator
    return _sent(randn_tensor(x.shape, generator, first.device if first else x.device, x.dtype), x.device)


def _sent(noise: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Noise on the latents' device. From pinned memory, so that the CPU does not wait for a GPU to take it."""
    pinned = noise.device.type == "cpu" and device.type == "cuda"
    return noise.pin_memory().to(device, non_blocking=True) if pinned else noise.to(device)


def brownian_noise(x: torch.Tensor, seeds: Sequence[int], device: torch.device | str) -> Callable:
    """Step noise (W(sigma_next) - W(sigma)) / sqrt(|sigma_next - sigma|) of x's shape: a path W for each image's seed.

    In law k-diffusion's BrownianTreeNoiseSampler, but W depends on the seed alone. Levy's construction: W(2^-64) = 0,
    normal 0 gives W(2^64), normal 1 W at the middle in log sigma, 2 n and 2 n + 1 at the middles of n's two halves.
    """
    generator = torch.Generator(device)

    @functools.lru_cache(22)  # for speed: a level has 22, and the next one draws about 13 of them anew
    def normal(node: int) -> torch.Tensor:
        noise = torch.empty(x.shape, dtype=x.dtype, device=device)
        for image, seed in zip(noise, seeds, strict=True):
            # the CPU's generator uses the low 32 bits of a seed; the odd factor keeps a path's nodes apart there
            image.normal_(generator=generator.manual_seed((seed + node * 0x9E3779B97F4A7C15) % 2**63))
        return noise

    @functools.lru_cache(2)  # for speed: a step begins where another ended
    def w(sigma: float) -> torch.Tensor:
        low, high, node = 2.0**-64, 2.0**64, 1
        total = normal(0) * ((sigma - low) / math.sqrt(high - low))
        for _ in range(20):
            middle = math.sqrt(low * high)
            hat = (sigma - low) / (middle - low) if sigma < middle else (high - sigma) / (high - middle)
            total.add_(normal(node), alpha=math.sqrt((middle - low) * (high - middle) / (high - low)) * hat)
            low, high, node = (low, middle, 2 * node) if sigma < middle else (middle, high, 2 * node + 1)
        return total.add_(normal(node), alpha=math.sqrt((sigma - low) * (high - sigma) / (high - low)))

    def noise_sampler(sigma: torch.Tensor, sigma_next: torch.Tensor) -> torch.Tensor:
        start, end = (w(max(float(s), 2.0**-64)) for s in (sigma, sigma_next))  # `end` last: the next step begins there
        return _sent((end - start) / math.sqrt(abs(float(sigma_next) - float(sigma))), x.device)

    return noise_sampler


def step_noise(sampler: Sampler, x: torch.Tensor, generator: Any) -> Callable:
    """Noise of x's shape, unit variance: Brownian for any dpmpp_*_sde, whose intervals may overlap; else white."""
    if sampler.is_k_diffusions and not sampler.arguments.get("eta", 1):  # k-diffusion multiplies the noise by zero
        return lambda sigma, sigma_next: x.new_zeros(())
    if not ("dpmpp" in sampler.name and "_sde" in sampler.name):
        return lambda sigma, sigma_next: white_noise(x, generator)
    generators = generator if isinstance(generator, list) else [generator]
    generators = generators * max(1, len(x) // len(generators))  # one may be for all images
    seeds = [int(torch.randint(2**63 - 1, (), generator=g, device=g.device if g else "cpu")) for g in generators]
    return brownian_noise(x, seeds, generators[0].device if generators[0] else x.device)


@contextlib.contextmanager
def exchanged(states: dict[torch.device, torch.Tensor], enter: bool) -> Iterator[None]:
    """Swaps the states of torch's global generators with these, and back. A lock is held if `enter`, else released."""

    def exchange(enter: bool) -> None:
        with GLOBAL_GENERATORS:
            for device, state in states.items():
                where = () if device.type in ("cpu", "mps") else (device,)
                module: Any = torch if device.type == "cpu" else torch.get_device_module(device)
                states[device], _ = module.get_rng_state(*where), module.set_rng_state(state, *where)
            (GLOBAL_GENERATORS.acquire if enter else GLOBAL_GENERATORS.release)()

    exchange(enter)
    try:
        yield
    finally:
        exchange(not enter)


def call_sampler(sampler: Sampler, model: Callable, x: torch.Tensor, sigmas: torch.Tensor, generator, **given) -> Any:
    """Calls `sampler(model, x, sigmas)` with `given`, a `callback` or `noise_sampler`.

    A function of k-diffusion runs in its own module, whose `torch.randn_like` draws from the generator. Other code runs
    with torch's global generators seeded from it, but not the network and callbacks. Euler's method takes the last step
    to zero of samplers that place their own levels, and a run of one step to zero.
    """
    own, positive, unwrapped = sampler.is_k_diffusions, sigmas[sigmas > 0].tolist(), model
    sampler = find_sampler("euler") if own and len(sigmas) == 2 and sigmas[1] == 0 else sampler
    function, named = sampler.function, sampler.arguments
    if own:  # it calls randn_like even where s_churn is 0
        draw = (lambda x: white_noise(x, generator)) if named.get("s_churn") else (lambda x: x.new_zeros(()))
        function = getattr(fresh_sampling(x.dtype, randn_like=draw), function.__name__)
    if generator is not None and (not own or named.get("noise_sampler")):
        first = generator[0] if isinstance(generator, list) else generator  # a clone: the caller's stays as it is
        seed = int(torch.randint(2**63 - 1, (), generator=first.clone_state(), device=first.device))
        states = {d: torch.Generator(d).manual_seed(seed).get_state() for d in {torch.device("cpu"), x.device}}
        inside, outside = exchanged(states, enter=True), exchanged(states, enter=False)
        function, model, given = inside(function), outside(model), {name: outside(f) for name, f in given.items()}
    options = {"extra_args": {}, **sampler.options, "disable": True, **given}
    if "noise_sampler" in named and options.get("noise_sampler") is None:
        options["noise_sampler"] = step_noise(sampler, x, generator)
    if "sigma_min" in named:
        options |= {"sigma_min": positive[-1], "sigma_max": positive[0], "n": len(positive) - 1, "return_info": False}
        options["eta"] = eta if (eta := named.get("eta") or 0.0) >= 1e-3 else 0.0  # float32 makes NaN of lower ones
    options = {name: value for name, value in options.items() if sampler.takes_any or name in named}
    if "sigma_min" not in named:
        return function(model, x, sigmas if own else sigmas.to(x, copy=True), **options)
    x = function(model, x, **options) if len(positive) > 1 else x
    for _ in sampling.trange(int(sigmas[-1] == 0), disable=True):  # a step like the others
        x = unwrapped(x, positive[-1] * x.new_ones([x.shape[0]]))
    return x


# --- the block's part for flow models ---


def uses_ve(parameterization: str, sampler: Sampler, ts: torch.Tensor) -> bool:
    """Whether the sampler's sigma is t / (1 - t), "ve", or t, "flow". "auto": "ve" for noise and for own levels."""
    if parameterization == "auto":
        one_step, named = len(ts) == 2 and ts[1] == 0 and sampler.is_k_diffusions, sampler.arguments
        return not one_step and bool("noise_sampler" in named or "sigma_min" in named or named.get("s_churn"))
    if parameterization not in ("flow", "ve"):
        raise ValueError(f"`parameterization` has to be 'auto', 'flow' or 've', but is {parameterization!r}")
    return parameterization == "ve"


def ve_sigmas(ts: torch.Tensor) -> torch.Tensor:
    """sigma = t / (1 - t). At t = 1, where it is infinite, the first one continues the ratio of the next two."""
    sigmas = ts / (1 - ts)
    if ts[0] > 0.9999:  # at least 15, SDXL's highest: noise of a lower sigma would hide too little of the picture
        second, third = sigmas[1].item(), sigmas[2].item() if len(sigmas) > 2 else 0.0
        sigmas[0] = max(second * (second / third if third > 0 else 4.0), 15.0)
    return sigmas


# --- end of the shared block ---
