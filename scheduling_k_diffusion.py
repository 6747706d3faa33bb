"""KDiffusionScheduler: the samplers of k-diffusion in every pipeline of diffusers.

    pipe.scheduler = KDiffusionScheduler.from_scheduler(pipe.scheduler, sampler="dpmpp_2m_sde")

This file works alone: it needs torch, diffusers, k-diffusion and greenlet, and can be copied anywhere.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import functools
import hashlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import diffusers
import torch
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from greenlet import getcurrent, greenlet
from torch.overrides import TorchFunctionMode


class KDiffusionScheduler(diffusers.SchedulerMixin, diffusers.ConfigMixin):
    """A scheduler that runs a k-diffusion sampler, `sampler(model, x, sigmas)`, inside the loop of a stock pipeline.

    The sampler runs in a greenlet. At `model(x, sigma)` it pauses, and the pipeline gives x to its network. `step`
    turns the prediction into `denoised` and resumes the sampler until it asks again. So `timesteps` has one for each
    evaluation of the network; a trial on a tensor of one element finds them before the run.

    The base scheduler says what the network was trained with, in which scale latents are, and which levels a call uses
    where no schedule is named. `config` is the base's, and what is saved is the base, which every loader knows.

    Flow models: x = (1 - t) x0 + t noise is y / (1 + sigma), sigma = t / (1 - t) ("ve"), or t is sigma ("flow").
    In "ve" the first sigma is finite (15 or more), but the network is still told t = 1.
    Where a pipeline gives `step` no generator, as FLUX's, each image's noise is seeded by a hash of its first sample.

    Args:
        scheduler: the base: one with betas (epsilon, v_prediction, sample), for flow matching, or EDM.
        sampler: a sampler of k-diffusion by name, with or without `sample_`, or a callable with its signature. One with
            several evaluations a step that never calls back does not tell where its steps begin: a run that starts
            part-way (`strength` below 1) uses Euler's method in its place.
        sampler_kwargs: options for it: `eta`, `s_noise`, `s_churn`, `solver_type`, `order`, ...
        schedule: k-diffusion's "karras", "exponential", "polyexponential" or "vp", or the levels themselves, falling
            (sigma; for flow models t). None: the base's, also for the `sigmas` or `timesteps` that a pipeline passes.
        parameterization: of flow models: "flow", "ve", or "auto", "ve" for those that add noise or place levels.
        quantize_timesteps: round to the trained timesteps.

    Raises:
        ValueError, TypeError: for what does not fit, and for `dpm_adaptive`, which can't tell its timesteps beforehand.
    """

    def __init__(
        self,
        scheduler: diffusers.SchedulerMixin,
        *,
        sampler: str | Callable = "euler",
        sampler_kwargs: dict[str, Any] | None = None,
        schedule: str | Sequence[float] | torch.Tensor | None = None,
        parameterization: str = "auto",
        quantize_timesteps: bool = False,
    ):
        base: Any = scheduler.base if type(scheduler) is KDiffusionScheduler else scheduler
        if isinstance(base, diffusers.CogVideoXDPMScheduler):  # its pipelines call its step with other arguments
            base = diffusers.CogVideoXDDIMScheduler.from_config(base.config)
        config, kind = base.config, type(base)
        self.base: Any = copy.deepcopy(base)  # with what the config does not know, as `set_shift`
        self.__module__ = kind.__module__  # beside __class__, for savers
        self.sampler = find_sampler(sampler, sampler_kwargs)
        self.schedule = schedule if isinstance(schedule, str | None) else check_sigmas(schedule, "schedule")
        if parameterization not in ("auto", "flow", "ve"):
            raise ValueError(f"`parameterization` has to be 'auto', 'flow' or 've', but is {parameterization!r}")
        self.parameterization, self.quantize_timesteps = parameterization, quantize_timesteps
        self._inverted = bool(config.get("invert_sigmas"))  # its t is 1 - t, as Mochi's
        self._train: int = config.get("num_train_timesteps", 1000)
        self._prediction, self._scale = config.get("prediction_type", "epsilon"), ""
        self._table: Any = None
        self._tried: tuple = (None, None)  # a sampler, levels, and what its trial over them told
        taken = inspect.signature(getattr(base, "step", lambda: None)).parameters.values()
        needed = [p.name for p in taken if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
        if needed == ["model_output", "timestep", "sample"] and "Inverse" not in kind.__name__:
            if hasattr(base, "precondition_outputs"):
                self._scale = "edm"
            elif config.get("use_flow_sigmas") or ("shift" in config and not hasattr(base, "alphas_cumprod")):
                self._scale, self._prediction = "flow", "flow_prediction"
            elif hasattr(base, "alphas_cumprod"):
                self._scale = "vp" if float(base.init_noise_sigma) == 1 else "betas"
                # zero terminal SNR has no finite last sigma: as EulerDiscreteScheduler does, take 4096 for it
                alphas = base.alphas_cumprod.double().cpu().clamp(min=2**-24)
                self._table = external.DiscreteSchedule(((1 - alphas) / alphas).sqrt(), quantize=quantize_timesteps)
        kinds = ("epsilon", "v_prediction", "sample", "original_sample", "flow_prediction")
        if not self._scale or self._prediction not in kinds:
            needs = "betas (epsilon, v_prediction, sample), flow or EDM, and step(model_output, timestep, sample)"
            raise ValueError(f"`scheduler`: needs {needs}, but is {kind.__name__} with {self._prediction!r}")
        self._plan(check_sigmas([0.8, 0.4, 0.2, 0.1, 0.0]), {})  # `order` is asked before timesteps are set
        self.timesteps = self.base.timesteps
        self.num_inference_steps: int | None = None

    @classmethod
    def from_scheduler(cls, scheduler: diffusers.SchedulerMixin, **options: Any) -> KDiffusionScheduler:
        """In place of a pipeline's scheduler, which stays as it is. The options are those of the class."""
        return cls(scheduler, **options)

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As any scheduler's, with the options of the class beside those of the base."""
        options = {name: kwargs.pop(name) for name in list(kwargs) if name in arguments_of(cls.__init__)}
        # one of a scheduler made in code names no class: what is in it tells flow from betas
        kinds = {"use_flow_sigmas": "DPMSolverMultistep", "beta_start": "EulerDiscrete", "sigma_data": "EDMEuler"}
        kind = next((kind for key, kind in kinds.items() if config.get(key)), "FlowMatchEulerDiscrete")
        base = getattr(diffusers, config.get("_class_name") or f"{kind}Scheduler")
        base, unused = base.from_config(config, return_unused_kwargs=True, **kwargs)
        return (cls(base, **options), unused) if return_unused_kwargs else cls(base, **options)

    # To pipelines and savers it is the base with another step: what they ask of it, its class included, is the base's.
    __class__ = property(lambda me: type(me.base))  # type: ignore[assignment]
    _internal_dict = property(lambda me: me.base._internal_dict, lambda me, d: vars(me.base).update(_internal_dict=d))

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self).get("base"), name)  # none while a copy is made

    def __repr__(self) -> str:
        return f"KDiffusionScheduler(sampler={self.sampler}, {self.base!r})"

    def __reduce__(self) -> tuple:
        return object.__new__, (KDiffusionScheduler,), {**self.__dict__, "_run": None}  # a run can't be copied

    @property
    def set_timesteps(self) -> Callable[..., None]:
        """The base's, with its signature: pipelines look for `sigmas`, `timesteps` and `mu` in it."""
        return functools.wraps(self.base.set_timesteps)(functools.partial(self._set_timesteps))

    def _set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        self.base.set_timesteps(*args, **kwargs)
        times = self.base.timesteps.double().cpu()[:: getattr(self.base, "order", 1)]  # one a step
        own = getattr(self.base, "sigmas", None)
        times = times.unique_consecutive() if own is None else times  # PNDM's lists one twice
        levels = self._table.t_to_sigma(times) if own is None else own.double().cpu()
        levels = (1 - levels if self._inverted else levels).unique_consecutive()[: len(times)]
        known = {} if self.quantize_timesteps else dict(zip(levels.tolist(), times.tolist()))
        # one that lists its last level twice, or ends above zero, keeps its number of steps and gets the zero
        levels = torch.cat([levels, levels.new_zeros(1)])
        levels = self.schedule if isinstance(self.schedule, torch.Tensor) else levels
        if isinstance(self.schedule, str):
            levels = self._named_levels(self.schedule, len(times), kwargs.get("mu"))
        if (steps := len(levels) - 1) != len(times):
            raise ValueError(f"`schedule` has {steps} steps: pass num_inference_steps={steps}, not {len(times)}")
        check_sigmas(levels, f"{type(self.base).__name__}.sigmas")
        self._plan(levels, known)
        if any(kwargs.get(name) is not None for name in ("sigmas", "timesteps")):
            self.order = 1  # pipelines that pass levels, as FLUX's, count `timesteps` by one then

    def _named_levels(self, schedule: str, n: int, mu: float | None) -> torch.Tensor:
        """Between the ends that the network was trained with; "vp" of a flow model between k-diffusion's own."""
        config = self.base.config
        if self._scale != "flow":
            ends = self._table.sigmas[[0, -1]].tolist() if self._table else (config.sigma_min, config.sigma_max)
            return named_sigmas(schedule, n, *ends)
        if schedule == "vp":
            with torch.device("cpu"), SamplerMode():
                sigmas = sampling.get_sigmas_vp(n)
            return sigmas / (1 + sigmas)
        own = hasattr(type(self.base), "shift")  # its `set_shift` leaves the config alone
        shift = self.base.shift if own else config.get("flow_shift", config.get("shift", 1.0))
        if mu is not None and config.get("use_dynamic_shifting"):
            shift = mu if config.get("time_shift_type") == "linear" else math.exp(mu)
        return named_sigmas(schedule, n, shift / (shift + 9999), 1.0)

    def _plan(self, levels: torch.Tensor, known: dict[float, float]) -> None:
        """The evaluations that the sampler will make, through these levels. `known`: their timesteps, if the base's."""
        n = self.num_inference_steps = len(levels) - 1
        kind, named = self.parameterization, arguments_of(self.sampler)
        own = is_k_diffusions(self.sampler)
        one = n == 1 and levels[1] == 0 and own  # x0 either way, and "flow" begins at t = 1
        auto = named.get("s_churn") or named.keys() & {"noise_sampler", "sigma_min"} and not one
        ve = self._scale == "flow" and levels[0] <= 1 and (kind == "ve" or kind == "auto" and auto)
        pure = ve and levels[0] > 0.9999
        self._levels = levels / (1 - levels) if ve else levels
        if pure:  # not infinity: the ratio of the next two goes on, to SDXL's highest sigma, 15, at least
            second, third = [*self._levels[1:].tolist(), 0.0][:2]
            self._levels[0] = max(second * (second / third if third > 0 else 4.0), 15.0)
        # for others anew: they may have changed in between
        if not (own and self.sampler is self._tried[0] and self._levels.equal(self._tried[1])):
            self._tried = self.sampler, self._levels, *step_starts(self.sampler, 4, self._levels)
        asked, starts = self._tried[2:]
        if not asked:
            others = "StableDiffusionXLComfyPipeline and FluxComfyPipeline"
            raise ValueError(f"`sampler`: can't tell its timesteps before the run; for dpm_adaptive there are {others}")
        self._starts = starts or ({i: i for i in range(n)} if len(asked) == n else {0: 0})
        self.order = math.ceil(len(asked) / n)
        self._evaluations, times = list[SimpleNamespace](), list[float]()
        for i, sigma in enumerate([*asked, float(self._levels[-1])]):
            level = float(levels[0]) if pure and i == 0 else sigma / (1 + sigma) if ve else sigma
            alpha, noise = self._shares(level)
            scale = 1 / sigma if pure and i == 0 else alpha if ve or self._scale != "flow" else 1.0
            # the pipeline's sample there: alpha x0 + noise n, n of unit variance, and scale y, y the sampler's state
            self._evaluations.append(SimpleNamespace(sigma=sigma, alpha=alpha, noise=noise, scale=scale))
            near = [t for one, t in known.items() if abs(one - level) <= 1e-9 * one]
            times.append(near[0] if near else self._time(level))
        like = levels if self.base.timesteps is None else self.base.timesteps  # PNDM's, at first
        whole = all(t == round(t) for t in times[:-1])
        self.timesteps = torch.tensor(times[:-1], dtype=like.dtype if whole else torch.float32, device=like.device)
        self._times = self.timesteps.tolist()
        ts = [one.noise if self._table is None else one.sigma for one in self._evaluations]
        self.sigmas = torch.tensor([1 - t for t in ts] if self._inverted else ts, dtype=torch.float32, device="cpu")
        self._run: Any = None
        self._step_index: int | None = None
        self.begin_index: int | None = None

    def _shares(self, level: float) -> tuple[float, float]:
        """(alpha, sigma) of the pipeline's x = alpha x0 + sigma noise at a level of the base."""
        if self._scale == "flow" and level <= 1:
            return 1 - level, level
        norm = math.hypot(1, level) if self._scale == "vp" else 1.0
        return 1 / norm, level / norm

    def _time(self, level: float) -> float:
        """The network's timestep at a level of the base."""
        if self._scale == "flow":
            time = self._train * (1 - level if self._inverted else level)
            return float(round(time)) if self.quantize_timesteps else time
        to_time = self._table.sigma_to_t if self._table else self.base.precondition_noise
        return float(to_time(torch.tensor([level], dtype=torch.float64, device="cpu")))

    @property
    def init_noise_sigma(self) -> float:
        """What the pipeline multiplies unit noise by, for the first sample."""
        base, first = float(getattr(self.base, "init_noise_sigma", 1.0)), self._evaluations[0]
        explicit = isinstance(self.schedule, torch.Tensor) and self._scale != "flow"
        if self.num_inference_steps is None or base == 1 and not explicit:
            return base
        return first.noise if self.schedule is not None else base * first.sigma / float(self._levels[0])

    step_index = property(lambda self: self._step_index, doc="The evaluation that comes next.")

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begins the run with this one of `timesteps`."""
        self.begin_index = begin_index

    def _locate(self, timestep: Any) -> int:
        """The evaluation that comes next. Where none was named, the first timestep says where the run begins."""
        if self._step_index in (None, len(self._times)):  # at first, and after a run that went to its end
            self._step_index = self.begin_index
        if self._step_index is None:
            time = float(torch.as_tensor(timestep).max())
            away = [(abs(t - time), i not in self._starts) for i, t in enumerate(self._times)]
            found = min(away)[0] <= 1e-2 * max(abs(time), 0.1)  # some round, and some pass others
            self._step_index = away.index(min(away)) if found else 0
        return self._step_index

    def scale_model_input(self, sample: torch.Tensor, timestep: Any = None) -> torch.Tensor:
        """The network's input."""
        sigma = self._evaluations[self._locate(timestep)].sigma
        if self._scale == "edm":
            return self.base.precondition_inputs(sample, sigma)
        return sample / math.hypot(sigma, 1) if self._scale == "betas" else sample

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """alpha x0 + sigma noise at any timesteps, one for each image or for all."""
        shares = []
        for time in timesteps.flatten().tolist():
            known = [one for one, t in zip(self._evaluations, self._times) if abs(t - time) <= 1e-6 * abs(t)]
            level = (self._train - time if self._inverted else time) / self._train
            if self._table is not None:
                level = float(self._table.t_to_sigma(torch.tensor(float(time), device="cpu")))
            elif self._scale == "edm" and not known:
                raise ValueError(f"`timesteps`: {time} is none of the run's")
            shares.append((known[0].alpha, known[0].noise) if known else self._shares(level))
        alpha, sigma = torch.tensor(shares).to(original_samples).T.reshape(2, -1, *[1] * (original_samples.ndim - 1))
        return alpha * original_samples + sigma * noise

    def scale_noise(self, sample: torch.Tensor, timestep: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """`add_noise`, as flow pipelines call it."""
        return self.add_noise(sample, noise, timestep)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: Any,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
        **given: Any,
    ) -> EulerDiscreteSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """Goes on with the sampler: the network predicted `model_output` at `sample`.

        Returns `prev_sample`, of the next timestep, in model_output's dtype; and `pred_original_sample`, x0.
        """
        i = self._locate(timestep)
        here, after = self._evaluations[i : i + 2]
        if model_output.shape[:2] == (len(sample), 2 * sample.shape[1]):
            model_output = model_output.chunk(2, dim=1)[0]  # the other half is the variance
        dtype = torch.promote_types(torch.promote_types(sample.dtype, model_output.dtype), torch.float32)
        x, output = sample.to(dtype), model_output.to(dtype)
        if self._inverted != (given.get("per_token_timesteps") is not None):
            output = -output  # LTXCondition turns the sign of its network's, and keeps its own tokens
        denoised = given.get("pred_original_sample")  # Cosmos has it from a call before
        denoised = self._denoised(output, x, here) if denoised is None else denoised.to(dtype)
        run = self._run if self._run and self._run.position == i else None  # the pipeline may have gone back
        if run and run.residual.shape != x.shape:
            self._step_index = i + 1
            return sample, denoised  # Cosmos asks for x0 of both sides of guidance, then goes back
        self._run = None  # gone if the sampler fails
        y = x / here.scale
        run = run or self._begin(i, y, generator)
        run.parent = getcurrent()
        # the pipeline may have changed what it got (inpainting, callbacks): the state is that and what rounding took
        asked = run.switch(denoised, y + run.residual)
        if run.dead != (i + 1 == len(self._times)):
            raise ValueError("`sampler`: it asks for other evaluations than in its trial on a single number")
        x = (asked * after.scale).to(model_output.dtype)
        run.position, run.residual = i + 1, asked - x.to(asked.dtype) / after.scale
        self._run, self._step_index = None if run.dead else run, i + 1
        return EulerDiscreteSchedulerOutput(x, denoised) if return_dict else (x, denoised)

    def _denoised(self, output: torch.Tensor, x: torch.Tensor, at: SimpleNamespace) -> torch.Tensor:
        """The x0 of a prediction at x = alpha x0 + sigma noise."""
        if self._scale == "edm":
            return self.base.precondition_outputs(x, output, at.sigma)
        if self._prediction == "epsilon":
            return (x - at.noise * output) / at.alpha
        if self._prediction == "v_prediction":
            norm = math.hypot(at.alpha, at.noise)
            return (at.alpha / norm * x - at.noise * output) / norm
        if self._prediction == "flow_prediction":
            return x - at.noise * output
        return output

    def _begin(self, i: int, x: torch.Tensor, generator: Any) -> greenlet:
        """The sampler, left where it asks for evaluation i."""
        sampler, own, named = self.sampler, is_k_diffusions(self.sampler), arguments_of(self.sampler)
        # a pipeline that does not count by `order` begins within a step: Euler's method goes to the next one
        first = min((one for one in self._starts if one >= i), default=len(self._times))
        ahead = [one.sigma for one in self._evaluations[i : first + 1]]
        rest = self._levels[self._starts.get(first, len(self._levels)) :]
        if "sigma_min" in named and len(rest):  # it has a level for each evaluation
            rest = torch.cat([rest.new_tensor(ahead[-1:]), self._levels[first + 1 :]])
        if own and (churn := named.get("s_churn")):  # it is spread over the steps
            sampler = functools.partial(sampler, s_churn=churn * (len(rest) - 1) / (len(self._levels) - 1))
        # as in the trial: in float32 a level may round to zero, where k-diffusion's leave an evaluation out
        rest = rest if own else rest.to(x.dtype)
        generator = generator[0] if isinstance(generator, list) and len(generator) == 1 else generator
        if generator is None and (not own or named.get("s_churn") or named.get("eta")):  # as in `call_sampler`
            numbers = (image.detach().cpu().double().numpy().tobytes() for image in x)
            digests = [hashlib.blake2b(image, digest_size=8).digest() for image in numbers]
            generator = [torch.Generator("cpu").manual_seed(int.from_bytes(digest, "big") >> 1) for digest in digests]
        call = functools.partial(call_sampler, sampler, sigmas=rest, generator=generator) if len(rest) else None
        run = greenlet(_sample)
        run.residual = 0.0
        run.switch(x, ahead, call)
        return run


def _sample(x: torch.Tensor, ahead: list[float], call: Callable | None) -> torch.Tensor:
    """A run, in its greenlet: Euler's steps through the levels `ahead`, then `call(model, x)`."""
    # nothing here refers to the scheduler: a run that is left half way ends with it

    def torch_state() -> tuple[int, bool, bool]:
        return torch._C._len_torch_function_stack(), torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    here = torch_state()

    def model(x: torch.Tensor, sigma: torch.Tensor, with_uncond: bool = False, **kwargs: Any) -> torch.Tensor:
        nonlocal here
        if with_uncond:
            raise ValueError("`sampler`: a scheduler can't see the prediction without guidance, as our pipelines can")
        depth, grad, inference = here
        with outside(depth), torch.inference_mode(inference), torch.set_grad_enabled(grad):
            try:
                denoised, state = getcurrent().parent.switch(x)
            finally:  # also where a run that was left half way ends
                here = torch_state()
        x.copy_(state)
        return denoised

    try:
        for sigma, after in zip(ahead, ahead[1:]):
            x = x + (x - model(x, x.new_full([len(x)], sigma))) * (after / sigma - 1)
        return call(model, x) if call else x
    finally:
        torch.set_grad_enabled(here[1])  # the sampler's own no_grad puts back what was when it began


# --- shared block: the same text in every file that is copied alone; `python tests/blocks.py` keeps it so ---


def _k_diffusion(name: str) -> ModuleType:
    """k-diffusion's submodule, in a package of another name: the `__init__` of its own imports the training code."""
    if (spec := importlib.util.find_spec("k_diffusion")) is None:
        raise ImportError("k-diffusion is not installed: pip install --no-deps k-diffusion==0.1.1.post1")
    package = sys.modules.setdefault("k_diffusion_alone", ModuleType("k_diffusion_alone"))
    package.__path__ = spec.submodule_search_locations or []
    return importlib.import_module(f"k_diffusion_alone.{name}")


sampling, external = _k_diffusion("sampling"), _k_diffusion("external")
SCHEDULES = ("karras", "exponential", "polyexponential", "vp")
GIVEN = {"model", "x", "sigmas", "sigma_min", "sigma_max", "n", "extra_args", "callback", "disable"}  # not options


def sampler_names() -> list[str]:
    """The samplers of the installed k-diffusion, without `sample_`, in the order of its source."""
    return [name[7:] for name in vars(sampling) if name.startswith("sample_")]


def arguments_of(sampler: Callable) -> dict[str, Any]:
    """What a sampler takes, with the values that are bound (`functools.partial`) or the defaults, else None."""
    parameters = inspect.signature(sampler).parameters.values()
    taken = {p.name: None if p.default is p.empty else p.default for p in parameters}
    bound = sampler.keywords if isinstance(sampler, functools.partial) else {}
    return taken | {name: value for name, value in bound.items() if name not in GIVEN}


def unbound(sampler: Any) -> Callable:
    """The function under any `functools.partial`."""
    return unbound(sampler.func) if isinstance(sampler, functools.partial) else sampler


def is_k_diffusions(sampler: Callable) -> bool:
    """Whether it is a function of k-diffusion itself, or a `functools.partial` of one. A wrapper is not."""
    return unbound(sampler) in vars(sampling).values()


def find_sampler(sampler: str | Callable, sampler_kwargs: dict[str, Any] | None = None) -> Callable:
    """The sampler of this name, with or without `sample_`, or the callable itself, with its options bound.

    ValueError, TypeError: there is none; it does not take an option, or lacks one.
    """
    signature = "sampler(model, x, sigmas, extra_args=None, callback=None, disable=None, ...)"
    if isinstance(sampler, str):
        name, names = sampler.removeprefix("sample_"), sampler_names()
        if name not in names:
            near = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.7)  # "lcm" is not near "lms"
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}, or pass {signature}"
            raise ValueError(f"`sampler`: k-diffusion has no {sampler!r}; {hint}")
        sampler = getattr(sampling, f"sample_{name}")
    try:
        inspect.signature(sampler).bind_partial("model", "x", "sigmas")
    except (TypeError, ValueError):
        raise TypeError(f"`sampler` has to be a name or a callable, {signature}, but is {sampler!r}") from None
    options, rest = dict(sampler_kwargs or {}), list(inspect.signature(sampler).parameters.values())[3:]
    named = {p.name: p for p in rest if p.name not in GIVEN and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    wrong = [f"needs {name}" for name, p in named.items() if p.default is p.empty and name not in options]
    if all(p.kind is not p.VAR_KEYWORD for p in rest):
        wrong += [f"takes no {name}" for name in options if name not in named]
    if wrong:
        name = getattr(sampler, "__name__", repr(sampler))
        raise ValueError(f"`sampler_kwargs`: {name} {', '.join(wrong)}; it takes {', '.join(named) or 'none'}")
    sampler = functools.partial(sampler, **options) if options else sampler
    tolerances = [value for name, value in arguments_of(sampler).items() if name in ("rtol", "atol")]
    if is_k_diffusions(sampler) and tolerances and not sum(tolerances) > 0:
        raise ValueError("`sampler_kwargs`: rtol or atol has to be above 0, or the steps never end")
    return sampler


def check_sigmas(sigmas: Any, name: str = "sigmas", at_least: int = 1) -> torch.Tensor:
    """`sigmas` (any scale), copied in float64 to the CPU. ValueError unless finite, falling and not below zero."""
    levels = torch.as_tensor(sigmas, dtype=torch.float64, device="cpu").flatten().clone()
    single = levels.float()  # in which a sampler may get them
    falling = single.isfinite().all() and (single.diff() < 0).all() and (single[:1] > 0).all() and (levels >= 0).all()
    if len(levels) < at_least or not falling:
        rule = f"finite and fall from a positive number to zero or above (as float32), {at_least} of them at least"
        raise ValueError(f"`{name}` have to be {rule}: {sigmas}")
    return levels


def named_sigmas(schedule: str, n: int, sigma_min: float, sigma_max: float) -> torch.Tensor:
    """k-diffusion's noise levels of this name, n from sigma_max down to sigma_min, then zero; float64, on the CPU.

    "vp" gets the betas that make it begin and end there. "polyexponential" is "exponential", its default rho being 1.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"`schedule`: there is no {schedule!r}; there are {', '.join(SCHEDULES)}, or pass the levels")
    arguments = {"sigma_min": sigma_min, "sigma_max": sigma_max}
    if schedule == "vp":
        eps, low, high = 1e-3, math.log1p(sigma_min**2), math.log1p(sigma_max**2)
        beta_min = (low - high * eps**2) / (eps - eps**2)
        arguments = {"beta_d": 2 * (high - beta_min), "beta_min": beta_min, "eps_s": eps}
    with torch.device("cpu"), SamplerMode():
        return getattr(sampling, f"get_sigmas_{schedule}")(n, **arguments)


def white_noise(x: torch.Tensor, generator: torch.Generator | list[torch.Generator] | None) -> torch.Tensor:
    """Standard normals of x's shape, dtype and device, drawn where the caller's generators are."""
    first = generator[0] if isinstance(generator, list) else generator
    return _sent(randn_tensor(x.shape, generator, first.device if first else x.device, x.dtype), x.device)


def _sent(noise: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Noise on the latents' device. From pinned memory, so that the CPU does not wait for a GPU to take it."""
    pinned = noise.device.type == "cpu" and device.type == "cuda"
    return noise.pin_memory().to(device, non_blocking=True) if pinned else noise.to(device)


def brownian_noise(x: torch.Tensor, seeds: Sequence[int], device: torch.device | str) -> Callable:
    """Step noise (W(sigma_next) - W(sigma)) / sqrt(|sigma_next - sigma|) of x's shape: a path W for each image's seed.

    In law it is k-diffusion's BrownianTreeNoiseSampler, but W depends on the seed alone and not on the levels. Levy's
    construction, from W(2^-64) = 0: normal 0 gives W(2^64). Normal 1 gives W at the middle in log sigma, as the
    distance from the line between the ends. Normals 2 n and 2 n + 1 do so in the halves of n's interval. After 20
    halvings an interval is 0.01 % of sigma wide. One more normal gives W(sigma) in it (arXiv:2405.06464).
    """
    generator = torch.Generator(device)

    @functools.lru_cache(22)  # those of one level: a next one draws about 13
    def normal(node: int) -> torch.Tensor:
        noise = torch.empty(x.shape, dtype=x.dtype, device=device)
        for image, seed in zip(noise, seeds, strict=True):
            # the CPU's generator uses the low 32 bits of a seed; the odd factor keeps a path's nodes apart there
            image.normal_(generator=generator.manual_seed((seed + node * 0x9E3779B97F4A7C15) % 2**63))
        return noise

    @functools.lru_cache(2)  # a step begins where another ended
    def w(sigma: float) -> torch.Tensor:
        low, high, node = 2.0**-64, 2.0**64, 1
        total = normal(0) * ((sigma - low) / math.sqrt(high - low))
        for _ in range(20):
            middle = math.sqrt(low * high)
            weight = math.sqrt((middle - low) * (high - middle) / (high - low))
            weight *= (sigma - low) / (middle - low) if sigma < middle else (high - sigma) / (high - middle)
            total.add_(normal(node), alpha=weight)
            low, high, node = (low, middle, 2 * node) if sigma < middle else (middle, high, 2 * node + 1)
        return total.add_(normal(node), alpha=math.sqrt((sigma - low) * (high - sigma) / (high - low)))

    def noise_sampler(sigma: torch.Tensor, sigma_next: torch.Tensor) -> torch.Tensor:
        start, end = (w(max(float(s), 2.0**-64)) for s in (sigma, sigma_next))  # in this order, for the cache of two
        return _sent((end - start) / math.sqrt(abs(float(sigma_next) - float(sigma))), x.device)

    return noise_sampler


def step_noise(sampler: Callable, x: torch.Tensor, generator: Any) -> Callable:
    """Noise of x's shape, unit variance: Brownian for any dpmpp_*_sde, whose intervals may overlap; else white."""
    name = getattr(unbound(sampler), "__name__", "")
    if not ("dpmpp" in name and "_sde" in name):
        return lambda sigma, sigma_next: white_noise(x, generator)
    generators = generator if isinstance(generator, list) else [generator] * x.shape[0]
    seeds = [int(torch.randint(2**63 - 1, (), generator=g, device=g.device if g else "cpu")) for g in generators]
    return brownian_noise(x, seeds, generators[0].device if generators[0] else x.device)


class SamplerMode(TorchFunctionMode):
    """While a sampler runs, `torch.randn_like` (the noise of `s_churn` and of callables) is `draw(like)`.

    `linspace` and float `tensor`s get `dtype`, not torch's default. `sigma[..., None]` of a number on the CPU is the
    number itself, so that it goes with latents on any device.
    """

    def __init__(self, draw: Callable[[torch.Tensor], torch.Tensor] = torch.randn_like, dtype=torch.float64):
        self.draw, self.dtype = draw, dtype

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.randn_like:
            return self.draw(torch.empty_like(*args, **kwargs))
        if func is torch.Tensor.__getitem__ and args[0].ndim == 0 and args[0].device.type == "cpu":
            if isinstance(args[1], tuple) and args[1][:1] == (...,) and not any(args[1][1:]):  # (..., None, None)
                return args[0]
        if func is torch.linspace or func is torch.tensor and isinstance(args[0], float):
            kwargs = {"dtype": self.dtype, **kwargs}
        return func(*args, **kwargs)


@contextlib.contextmanager
def outside(depth: int) -> Iterator[None]:
    """Takes off the modes above this depth of torch's stack: with them torch.compile would compile a network again."""
    modes = [torch._C._pop_torch_function_stack() for _ in range(torch._C._len_torch_function_stack() - depth)]
    try:
        yield
    finally:
        for mode in reversed(modes):
            torch._C._push_on_torch_function_stack(mode)


def call_sampler(
    sampler: Callable, model: Callable, x: torch.Tensor, sigmas: torch.Tensor, generator: Any = None, **ours: Any
) -> torch.Tensor:
    """Calls a sampler of either signature. Its noise is the generator's (False: zeros, a trial), `ours` a `callback`.

    One step to zero is `denoised` with every sampler of k-diffusion, but some fail there: Euler's method takes it. A
    sampler that takes `sigma_min` stops at the lowest positive level: Euler's step to zero is taken here, and is one of
    dpm_fast's n. k-diffusion draws noise even where `s_churn` and `eta` are 0: it gets zeros, and nothing is drawn.
    """
    if len(sigmas) == 2 and sigmas[1] == 0 and is_k_diffusions(sampler):
        sampler = sampling.sample_euler
    own, named, positive = is_k_diffusions(sampler), arguments_of(sampler), sigmas[sigmas > 0]
    noisy = generator is not False and (not own or named.get("s_churn") or named.get("eta"))
    given = named.get("noise_sampler") is not None

    def draw(like: torch.Tensor) -> torch.Tensor:
        if noisy:
            return white_noise(like, generator)
        return like.new_zeros(()) if own and not given else torch.zeros_like(like)  # others may write on it

    # most of k-diffusion's make none of the mode's calls where x and sigmas are of one kind
    calls = given or {"s_churn", "sigma_min"} & {*named}
    plain = own and not calls and (x.device, x.dtype) == (sigmas.device, sigmas.dtype)
    ours = {"disable": True, **ours}
    if "noise_sampler" in named and (not given or generator is False):
        ours["noise_sampler"] = step_noise(sampler, x, generator) if noisy else lambda *_: draw(x)
    if all(p.kind is not p.VAR_KEYWORD for p in inspect.signature(sampler).parameters.values()):
        ours = {name: value for name, value in ours.items() if name in named}
    with contextlib.nullcontext() if plain else SamplerMode(draw, x.dtype):
        if "sigma_min" not in named:
            return sampler(model, x, sigmas, **ours)
        if "n" in named:
            ours["n"] = len(positive) - 1
        if 0 < (named.get("eta") or 0) < 1e-3:
            ours["eta"] = 0.0  # these two find their noise by a difference that float32 loses, with NaN for its root
        if len(positive) > 1:
            x = sampler(model, x, sigma_min=positive[-1].item(), sigma_max=positive[0].item(), **ours)
            x = x[0] if isinstance(x, tuple) else x  # return_info=True
        return x if sigmas[-1] > 0 else model(x, positive[-1] * x.new_ones([x.shape[0]]))


def step_starts(sampler: Callable, ndim: int, sigmas: torch.Tensor) -> tuple[list[float], dict[int, int]]:
    """The level of each evaluation, and {evaluation: step} for those that begin a step.

    Found by a trial on a tensor of one element. Both are empty for dpm_adaptive and where the trial fails. The second
    also is where the sampler's callback gets another x than the model got.
    """
    inputs, levels, starts = [], list[float](), dict[int, int]()

    def model(x: torch.Tensor, sigma: torch.Tensor, with_uncond: bool = False, **kwargs: Any) -> torch.Tensor:
        inputs.append(x)
        levels.append(float(sigma))
        return x.new_zeros([2, *x.shape] if with_uncond else x.shape)

    def callback(info: dict[str, Any]) -> None:
        starts[len(inputs) - 1 if info["x"] is inputs[-1] else -1] = info["i"]

    try:
        if "rtol" not in arguments_of(sampler):
            call_sampler(sampler, model, sigmas.new_ones([1] * ndim), sigmas, False, callback=callback)
    except Exception:
        return [], {}
    return levels, {} if -1 in starts else starts


# --- end of the shared block ---
