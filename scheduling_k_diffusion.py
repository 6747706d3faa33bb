"""KDiffusionScheduler: the samplers of k-diffusion in every pipeline of diffusers.

    pipe.scheduler = KDiffusionScheduler.from_scheduler(pipe.scheduler, sampler="dpmpp_2m_sde")

This file works alone: it needs torch, diffusers, k-diffusion and greenlet, and can be copied anywhere.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import diffusers
import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteSchedulerOutput
from diffusers.utils import torch_utils  # noqa: F401
from greenlet import GreenletExit, getcurrent, greenlet

from sdxl_comfy_pipeline import (
    sampler_names,
    BY_RANGE,
    _adds_noise as adds_noise,
    _call as call_sampler,
    _first_parameters,
    _is_k_diffusion,
    _noise_sampler as step_noise,
    _SamplerMode,
    check_sampler_kwargs,
    check_sigmas,
    external,
    find_sampler,
    for_levels,
    named_sigmas,
    white_noise,
)


class _Evaluation(NamedTuple):
    """One call of the network: its sample is x = alpha x0 + noise n in the pipeline, scale y for the sampler's state y."""

    sigma: float
    alpha: float
    noise: float
    scale: float


class KDiffusionScheduler(SchedulerMixin, ConfigMixin):
    """A scheduler that runs a k-diffusion sampler, `sampler(model, x, sigmas)`, inside the loop of a stock pipeline.

    The sampler runs in a greenlet. Where it calls `model(x, sigma)` it is left, and the pipeline goes on: it gives x
    to its network at the next of `timesteps`. `step` takes the prediction, makes `denoised` of it and goes on with the
    sampler, until that asks again. So there is one timestep for each evaluation of the network. The timesteps are found
    before the run, by one on a single number.

    The base scheduler says what the network was trained with (betas, shift, prediction), in which scale latents
    are, and which levels a call uses, unless a schedule is named. Its `step` is never called. `config` is the base's, and
    what is saved is the base: every loader of diffusers reads the folder.

    For flow models "ve" and "flow" are as in `FluxComfyPipeline`: x = (1 - t) x0 + t noise is y = x / (1 - t) with
    sigma = t / (1 - t), or is taken for y with sigma = t. At t = 1 the network sees pure noise, at any sigma.

    Where a pipeline gives `step` no generator, as FLUX's and its kin do, the noise is seeded by the first sample, image by
    image: the generator that drew it decides it all the same.
    """

    def __init__(
        self,
        scheduler: SchedulerMixin,
        *,
        sampler: str | Callable = "euler",
        sampler_kwargs: dict[str, Any] | None = None,
        schedule: Any = None,
        parameterization: str = "auto",
        quantize_timesteps: bool = False,
    ):
        if type(scheduler) is KDiffusionScheduler:
            scheduler = scheduler.base
        if type(scheduler).__name__ == "CogVideoXDPMScheduler":  # pipelines call its step with other arguments
            scheduler = diffusers.CogVideoXDDIMScheduler.from_config(scheduler.config)
        self.base = type(scheduler).from_config(scheduler.config)
        self.sampler = find_sampler(sampler)
        self.sampler_kwargs = check_sampler_kwargs(self.sampler, sampler_kwargs)
        self.schedule, self.parameterization, self.quantize_timesteps = schedule, parameterization, quantize_timesteps
        self._kind = _kind(self.base)
        if parameterization not in ("auto", "flow", "ve"):
            raise ValueError(f"`parameterization` has to be 'auto', 'flow' or 've', but is {parameterization!r}")
        if schedule is not None and not isinstance(schedule, str):
            check_sigmas(schedule, name="schedule")
        self._plan([4.0, 2.0, 1.0, 0.5, 0.0])
        self.timesteps, self.sigmas = self.base.timesteps, getattr(self.base, "sigmas", None)
        self.num_inference_steps = None

    @classmethod
    def from_scheduler(cls, scheduler: SchedulerMixin, **options: Any) -> KDiffusionScheduler:
        """This sampler in place of the scheduler of a pipeline, which stays as it is.

        Args:
            scheduler: any of diffusers' that has betas with `epsilon`, `v_prediction` or `sample`, or is for flow
                matching, or EDM.
            sampler: a sampler of k-diffusion by name, with or without `sample_`, or a callable with its signature.
            sampler_kwargs: options for it: `eta`, `s_noise`, `s_churn`, `solver_type`, `order`, ...
            schedule: k-diffusion's "karras", "exponential", "polyexponential" or "vp", or the levels themselves, falling
                (sigma; for flow models t). None: the scheduler's own, also where the pipeline passes some.
            parameterization: of flow models, "auto" ("ve" for samplers that add noise or place their levels), "flow", "ve".
            quantize_timesteps: round to the trained timesteps.

        Raises:
            ValueError, TypeError: for what does not fit. `dpm_adaptive` can't tell its timesteps before the run.
        """
        return cls(scheduler, **options)

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As of any scheduler of diffusers, with the options of `from_scheduler` beside those of the base."""
        names = inspect.signature(cls.__init__).parameters
        options = {name: kwargs.pop(name) for name in list(kwargs) if name in names}
        base, unused = _base_class(config).from_config(config, return_unused_kwargs=True, **kwargs)
        scheduler = cls(base, **options)
        return (scheduler, unused) if return_unused_kwargs else scheduler

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Writes the base scheduler, which every loader of diffusers knows."""
        self.base.save_pretrained(*args, **kwargs)

    # To pipelines and to diffusers' savers it is the base scheduler with another step: what they ask of it, its class
    # included, is the base's.

    @property
    def __class__(self) -> type:  # type: ignore[override]
        return type(self.base)

    @property
    def __module__(self) -> str:  # type: ignore[override]
        return type(self.base).__module__

    @property
    def _internal_dict(self) -> Any:
        return self.base._internal_dict

    @_internal_dict.setter
    def _internal_dict(self, config: Any) -> None:
        self.base._internal_dict = config

    def __getattr__(self, name: str) -> Any:
        if name == "base":  # while a copy is made
            raise AttributeError(name)
        return getattr(self.base, name)

    def __repr__(self) -> str:
        name = getattr(self.sampler, "__name__", self.sampler)
        return f"KDiffusionScheduler(sampler={name}, sampler_kwargs={self.sampler_kwargs}, {self.base})"

    def __reduce__(self) -> tuple:
        return object.__new__, (KDiffusionScheduler,), {**self.__dict__, "_run": None}  # a run can't be copied

    @property
    def set_timesteps(self) -> Callable:
        """The base's, with its signature: pipelines look for `sigmas`, `timesteps` and `mu` in it."""

        @functools.wraps(self.base.set_timesteps)
        def set_timesteps(*args: Any, **kwargs: Any) -> None:
            self.base.set_timesteps(*args, **kwargs)
            self._set_levels(kwargs.get("mu"))

        return set_timesteps

    def _set_levels(self, mu: float | None) -> None:
        levels, timesteps = self._base_levels()
        steps = len(timesteps)
        if self.schedule is not None:
            levels, timesteps = self._scheduled(steps, mu), []
            if len(levels) - 1 != steps:
                raise ValueError(
                    f"`schedule` has {len(levels) - 1} steps, but the pipeline asks for {steps}: pass"
                    f" num_inference_steps={len(levels) - 1}"
                )
        check_sigmas(levels, name=f"{type(self.base).__name__}.sigmas")
        self.num_inference_steps = steps
        self._plan(levels, timesteps)

    def _base_levels(self) -> tuple[list[float], list[float]]:
        """The base's noise levels, in its own scale, with a zero at the end, and the timestep of each but the last."""
        count = getattr(self.base, "order", 1)  # 2 for those that list a level for each evaluation
        timesteps = self.base.timesteps.double().cpu()[::count]
        if self._kind.table is not None and not hasattr(self.base, "sigmas"):
            timesteps = timesteps.unique_consecutive()  # PNDM's lists one twice
            levels = self._kind.table.t_to_sigma(timesteps)
        else:
            levels = self.base.sigmas.double().cpu()
            levels = (1 - levels if self._kind.inverted else levels).unique_consecutive()
        # one that lists its last level twice, or ends above zero, keeps its number of steps and gets the zero
        return [*levels[: len(timesteps)].tolist(), 0.0], timesteps.tolist()

    def _scheduled(self, n: int, mu: float | None) -> list[float]:
        if not isinstance(self.schedule, str):
            return torch.as_tensor(self.schedule, dtype=torch.float64).flatten().tolist()
        if self._kind.table is not None:
            low, high = self._kind.table.sigmas[[0, -1]].tolist()
        elif self._kind.flow:
            shift = math.exp(mu) if mu is not None else self.base.config.get("shift", 1.0)
            low, high = shift / (shift + 9999), 1.0
        else:
            low, high = self.base.config.sigma_min, self.base.config.sigma_max
        return named_sigmas(self.schedule, n, low, high).tolist()

    def _plan(self, levels: list[float], timesteps: list[float] = ()) -> None:  # type: ignore[assignment]
        """Finds the evaluations that the sampler will make with these levels, and their timesteps."""
        kind, sigmas = self._kind, torch.tensor(levels, dtype=torch.float64, device="cpu")
        ve = kind.flow and levels[0] <= 1 and self._uses_ve(levels)
        sigmas = _ve_sigmas(sigmas) if ve else sigmas
        asked, self._starts = _trial(self.sampler, sigmas, self.sampler_kwargs)
        self._levels = sigmas
        self.order = math.ceil(len(asked) / (len(levels) - 1))
        self._evaluations, times = [], []
        for sigma in [*asked, sigmas[-1].item()]:
            level = sigma / (1 + sigma) if ve else sigma
            if ve and not times and levels[0] > 0.9999:
                level = levels[0]
            alpha, noise = kind.share(level)
            scale = 1.0 if kind.flow and not ve else alpha if level < 0.9999 or not kind.flow else 1 / sigma
            self._evaluations.append(_Evaluation(sigma, alpha, noise, scale))
            near = [t for known, t in zip(levels, timesteps) if abs(known - level) <= 1e-9 * known]
            times.append(near[0] if near and not self.quantize_timesteps else kind.time(level))
        times = times[:-1]
        if self.quantize_timesteps:
            times = [float(round(t)) for t in times]
        dtype = self.base.timesteps.dtype
        if not dtype.is_floating_point and any(t != round(t) for t in times):
            dtype = torch.float32
        self.timesteps = torch.tensor(times, dtype=dtype, device=self.base.timesteps.device)
        self._times = self.timesteps.tolist()
        ratios = [e.noise / e.alpha if kind.table is not None else e.noise for e in self._evaluations]
        self.sigmas = torch.tensor(ratios, dtype=torch.float32, device="cpu")
        if kind.inverted:
            self.sigmas = 1 - self.sigmas
        self._run, self._step_index, self._begin_index = None, None, None

    def _uses_ve(self, levels: list[float]) -> bool:
        if self.parameterization != "auto":
            return self.parameterization == "ve"
        parameters = inspect.signature(self.sampler).parameters
        if self.sampler_kwargs.get("s_churn", 0):
            return True
        if len(levels) == 2 and levels[1] == 0 and _is_k_diffusion(self.sampler):
            return False  # one step to zero is x0 either way, and this way it begins at t = 1
        return "noise_sampler" in parameters or _first_parameters(self.sampler) == BY_RANGE

    @property
    def init_noise_sigma(self) -> float:
        """What the pipeline multiplies unit noise by, for the first sample."""
        base, first = float(self.base.init_noise_sigma) if hasattr(self.base, "init_noise_sigma") else 1.0, 1.0
        if self._kind.flow or self.num_inference_steps is None:
            return base
        first = self._evaluations[0]
        if self.schedule is not None:
            return first.noise
        return base * first.sigma / self._levels[0].item() if base != 1 else base

    @property
    def step_index(self) -> int | None:
        """The evaluation that comes next."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """The evaluation that the run begins with, if the pipeline named one."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begins the run with this one of `timesteps`."""
        self._begin_index = begin_index

    def index_for_timestep(self, timestep: Any, schedule_timesteps: Any = None) -> int:
        """Where in `timesteps` this one is; the evaluation that begins a step, if it is there twice; 0 if it is not."""
        value = float(torch.as_tensor(timestep).max())
        near = [abs(t - value) for t in self._times]
        close = [i for i, distance in enumerate(near) if distance <= min(near) + 1e-6]
        if min(near) > 1e-2 * max(abs(value), 0.1):
            return 0
        return next((i for i in close if i in self._starts), close[0])

    def _locate(self, timestep: Any) -> int:
        """The evaluation that comes next. Where none was named, the first timestep says where the run begins."""
        if self._step_index is None:
            named = self._begin_index
            self._step_index = self.index_for_timestep(timestep) if named is None else named
        return self._step_index

    def scale_model_input(self, sample: torch.Tensor, timestep: Any = None) -> torch.Tensor:
        """The network's input: x / sqrt(sigma^2 + 1) where the base scheduler keeps x0 + sigma noise."""
        evaluation = self._evaluations[self._locate(0 if timestep is None else timestep)]
        if self._kind.edm:
            return self.base.precondition_inputs(sample, evaluation.sigma)
        if self._kind.table is None or self._kind.vp:
            return sample
        return sample / math.hypot(evaluation.sigma, 1)

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """alpha x0 + sigma noise in the pipeline's scale, at any timesteps, one for each image or one for all."""
        shares = []
        for time in timesteps.flatten().double().tolist():
            known = [e for e, t in zip(self._evaluations, self._times) if abs(t - time) <= 1e-6 * abs(t)]
            shares.append(known[0][1:3] if known else self._kind.share(self._kind.level(time)))
        shape = [len(shares)] + [1] * (original_samples.ndim - 1)
        alpha, sigma = (torch.tensor(each).to(original_samples).view(shape) for each in zip(*shares))
        return alpha * original_samples + sigma * noise

    def scale_noise(self, sample: torch.Tensor, timestep: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """`add_noise` by the name that flow pipelines use."""
        return self.add_noise(sample, noise, timestep)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: Any,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
        per_token_timesteps: torch.Tensor | None = None,
        pred_original_sample: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Goes on with the sampler: to it, the network predicted `model_output` at `sample`.

        Returns:
            `prev_sample`, which the network is to see at the next timestep, in model_output's dtype, and the x0 that
            was predicted, `pred_original_sample`; a tuple of both without `return_dict`.
        """
        i = self._locate(timestep)
        if self._run is not None and self._run.position != i:
            self._run = None  # the pipeline went back
        here, after = self._evaluations[i], self._evaluations[i + 1]
        dtype = torch.promote_types(torch.promote_types(sample.dtype, model_output.dtype), torch.float32)
        x = sample.to(dtype)
        if model_output.ndim > 1 and model_output.shape[1] == 2 * sample.shape[1] and "learned" in self._variance:
            model_output = model_output.chunk(2, dim=1)[0]  # the other half is the variance
        denoised = pred_original_sample
        if denoised is None:
            output = model_output.to(dtype)
            denoised = self._denoised(output if per_token_timesteps is None else -output, x, here)
        run = self._run or self._begin(i, x / here.scale, generator)
        y = run.step(x / here.scale, denoised.to(dtype), after.scale, model_output.dtype)
        self._run, self._step_index = (None, None) if run.ended else (run, i + 1)
        return EulerDiscreteSchedulerOutput(y, denoised) if return_dict else (y, denoised)

    @property
    def _variance(self) -> str:
        return str(self.config.get("variance_type"))

    def _denoised(self, output: torch.Tensor, x: torch.Tensor, at: _Evaluation) -> torch.Tensor:
        """The x0 of a prediction at x = alpha x0 + sigma noise."""
        kind = self._kind.prediction
        if self._kind.edm:
            return self.base.precondition_outputs(x, output, at.sigma)
        if kind == "epsilon":
            return (x - at.noise * output) / at.alpha
        if kind == "v_prediction":
            norm = math.hypot(at.alpha, at.noise)
            return (at.alpha / norm * x - at.noise * output) / norm
        if kind == "flow_prediction":
            return x + at.noise * output if self._kind.inverted else x - at.noise * output
        return output

    def _begin(self, i: int, x: torch.Tensor, generator: Any) -> _Run:
        """The sampler in a greenlet, left where it asks for evaluation i."""
        sigmas, options = self._levels, dict(self.sampler_kwargs)
        first = next((e for e in sorted(self._starts) if e >= i), len(self._evaluations) - 1)
        # a pipeline that does not count by `order` begins within a step: Euler's method takes it to its end
        ahead = [e.sigma for e in self._evaluations[i : first + 1]]
        rest = None
        if first in self._starts:
            done = self._starts[first]
            rest = sigmas[done:]
            if _first_parameters(self.sampler) == BY_RANGE:  # it has one level an evaluation
                rest = torch.cat([sigmas.new_tensor([self._evaluations[first].sigma]), sigmas[first + 1 :]])
            if "s_churn" in options and _is_k_diffusion(self.sampler):
                options["s_churn"] *= (len(rest) - 1) / (len(sigmas) - 1)  # it is spread over all steps
            rest = rest.to(x.dtype)
        if isinstance(generator, list) and len(generator) == 1:
            generator = generator[0]
        return _Run(self.sampler, options, x.clone(), ahead, rest, generator, i, len(self._evaluations) - 1)


class _Run:
    """A sampler under way. It holds no reference to the scheduler, so that one that is left half way goes with it."""

    def __init__(
        self,
        sampler: Callable,
        options: dict[str, Any],
        x: torch.Tensor,
        ahead: list[float],
        sigmas: torch.Tensor | None,
        generator: Any,
        position: int,
        total: int,
    ):
        self.position, self.total, self.ended = position, total, False
        self.residual: torch.Tensor | float = 0.0
        self.greenlet = greenlet(_sample)
        self.asked = self._switch(sampler, options, x, ahead, sigmas, generator)

    def step(self, y: torch.Tensor, denoised: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
        """The next sample, `scale` times the state that the sampler asks for, in this dtype; y is the state now.

        The pipeline may have changed what it got (inpainting, callbacks), so the state is what it hands back, and
        what rounding had taken from it.
        """
        self.asked.copy_(y + self.residual)
        self.asked = self._switch(denoised)
        self.position += 1
        self.ended = self.greenlet.dead
        if self.ended != (self.position == self.total):
            raise ValueError("the sampler asks for other evaluations than in its trial run on a single number")
        sample = (self.asked * scale).to(dtype)
        self.residual = self.asked - sample.to(self.asked.dtype) / scale
        return sample.clone() if sample is self.asked else sample

    def _switch(self, *values: Any) -> torch.Tensor:
        """Goes on with the sampler. What is torch's and thread-local is the same after as before."""
        grad = torch.is_grad_enabled()
        outside = (torch._C._len_torch_function_stack(), grad, torch.is_inference_mode_enabled())
        self.greenlet.parent = getcurrent()
        try:
            return self.greenlet.switch(outside, *values)
        finally:
            torch.set_grad_enabled(grad)


def _sample(
    outside: tuple,
    sampler: Callable,
    options: dict[str, Any],
    x: torch.Tensor,
    ahead: list[float],
    sigmas: torch.Tensor | None,
    generator: Any,
) -> torch.Tensor:
    """A run of the sampler, in its greenlet."""

    def model(x: torch.Tensor, sigma: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        nonlocal outside
        if kwargs.get("with_uncond"):
            raise ValueError("`sampler`: a scheduler can't know the prediction without guidance, use a pipeline for it")
        with _left(outside):
            try:
                outside, denoised = getcurrent().parent.switch(x)
            except GreenletExit:
                outside = (0, torch.is_grad_enabled(), False)
                raise
        return denoised

    try:
        for sigma, after in zip(ahead, ahead[1:]):
            x = x + (x - model(x, x.new_full([len(x)], sigma))) * (after / sigma - 1)
        if sigmas is None:
            return x
        sampler = for_levels(sampler, sigmas)
        noisy = adds_noise(sampler, options)
        if noisy and generator is None:
            generator = [_seeded_by(image) for image in x]
        arguments = {"disable": True, **options}
        if "noise_sampler" in inspect.signature(sampler).parameters and options.get("noise_sampler") is None:
            arguments["noise_sampler"] = step_noise(sampler, x, generator) if noisy else lambda *_: x.new_zeros(())
        with _SamplerMode(lambda like: white_noise(like, generator) if noisy else like.new_zeros(())):
            return call_sampler(sampler, model, x, sigmas, arguments)
    except GreenletExit:
        torch.set_grad_enabled(outside[1])  # the sampler's own no_grad has put back what was when it began
        raise


@contextlib.contextmanager
def _left(outside: tuple[int, bool, bool]) -> Iterator[None]:
    """Takes off torch's function modes, grad and inference mode that the sampler entered, then puts them back."""
    depth, grad, inference = outside
    inner, entered = torch.is_grad_enabled(), torch._C._len_torch_function_stack() - depth
    modes = [torch._C._pop_torch_function_stack() for _ in range(entered)]
    switched = torch.is_inference_mode_enabled() != inference
    try:
        with torch.inference_mode(inference) if switched else contextlib.nullcontext():
            torch.set_grad_enabled(grad)
            yield
    finally:
        for mode in reversed(modes):
            torch._C._push_on_torch_function_stack(mode)
        torch.set_grad_enabled(inner)


def _seeded_by(image: torch.Tensor) -> torch.Generator:
    """A generator on the CPU, seeded by the bits of a sample."""
    digest = hashlib.blake2b(image.double().cpu().numpy().tobytes(), digest_size=8).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest, "big") >> 1)


def _trial(sampler: Callable, sigmas: torch.Tensor, options: dict[str, Any]) -> tuple[list[float], dict[int, int]]:
    """The level of each evaluation of a run with these levels, and which of them begins which step."""
    name = getattr(sampler, "__name__", repr(sampler))
    parameters = inspect.signature(sampler).parameters
    if "rtol" in parameters:
        raise ValueError(
            f"`sampler`: {name} chooses its levels as it goes, and a pipeline's loop has to know its timesteps before;"
            " StableDiffusionXLComfyPipeline and FluxComfyPipeline can run it"
        )
    asked, starts = list[float](), dict[int, int]()

    def model(x: torch.Tensor, sigma: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        asked.append(float(sigma.flatten()[0]))
        return torch.zeros_like(x)

    arguments = {"disable": True, **options, "callback": lambda info: starts.setdefault(len(asked) - 1, info["i"])}
    if "noise_sampler" in parameters:
        arguments["noise_sampler"] = lambda sigma, sigma_next: torch.zeros_like(x)
    with torch.device("cpu"), _SamplerMode(torch.zeros_like):
        x = torch.ones([1, 1, 1, 1], dtype=sigmas.dtype)
        call_sampler(for_levels(sampler, sigmas), model, x, sigmas, arguments)
    if len(starts) < len(sigmas) - 1 and len(asked) == len(sigmas) - 1 and _first_parameters(sampler) != BY_RANGE:
        starts = {i: i for i in range(len(asked))}
    return asked, starts or {0: 0}


class _Kind(NamedTuple):
    """What a base scheduler says of its network and of the scale of its latents."""

    prediction: str
    flow: bool = False
    inverted: bool = False  # its t is 1 - t, as Mochi's
    edm: Any = None
    vp: bool = False
    table: Any = None
    train: int = 1000

    def share(self, level: float) -> tuple[float, float]:
        """(alpha, sigma) of x = alpha x0 + sigma noise at a level."""
        if self.flow:
            return (1 - level, level) if level <= 1 else (1.0, level)
        norm = math.hypot(1, level) if self.vp else 1.0
        return 1 / norm, level / norm

    def time(self, level: float) -> float:
        """The network's timestep at a level."""
        if self.flow:
            return self.train * (1 - level if self.inverted else level)
        if level <= 0:
            return 0.0
        sigma = torch.tensor([level], dtype=torch.float64)
        return float(self.edm(sigma) if self.edm else self.table.sigma_to_t(sigma))

    def level(self, time: float) -> float:
        """The level at a timestep that is not among those of the run."""
        if self.flow:
            return 1 - time / self.train if self.inverted else time / self.train
        if self.edm:
            return math.exp(4 * time)
        return float(self.table.t_to_sigma(torch.tensor(time, dtype=torch.float64)))


def _kind(base: SchedulerMixin) -> _Kind:
    """Raises a ValueError in words for what no k-diffusion sampler can stand in for."""
    config, name = base.config, type(base).__name__
    prediction = config.get("prediction_type", "epsilon")
    step = list(inspect.signature(base.step).parameters.values()) if hasattr(base, "step") else []
    needed = [p.name for p in step if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    train = config.get("num_train_timesteps", 1000)
    if needed == ["model_output", "timestep", "sample"] and "stage_index" not in _parameters(base.set_timesteps):
        if hasattr(base, "precondition_outputs"):
            return _Kind(prediction, edm=base.precondition_noise)
        has_betas = hasattr(base, "alphas_cumprod")
        if config.get("use_flow_sigmas") or not has_betas and "shift" in config:
            return _Kind("flow_prediction", flow=True, inverted=bool(config.get("invert_sigmas")), train=train)
        if has_betas and "Inverse" not in name and prediction in PREDICTIONS:
            # zero terminal SNR has no finite last sigma: as EulerDiscreteScheduler does, take 4096 for it
            alphas_cumprod = base.alphas_cumprod.double().cpu().clamp(min=2**-24)
            table = external.DiscreteSchedule(((1 - alphas_cumprod) / alphas_cumprod).sqrt(), quantize=False)
            return _Kind(prediction, vp=isinstance(base.init_noise_sigma, float), table=table, train=train)
    raise ValueError(
        f"`scheduler`: needs betas and prediction_type 'epsilon', 'v_prediction' or 'sample', or a flow-matching or EDM"
        f" scheduler whose step takes a prediction, a timestep and a sample, but is {name} with {prediction!r}"
    )


PREDICTIONS = ("epsilon", "v_prediction", "sample", "original_sample")


def _parameters(function: Callable) -> Any:
    return inspect.signature(function).parameters


def _base_class(config: Any) -> type:
    """The class that a configuration names. One made in code names none: what is in it tells flow from betas."""
    if config.get("_class_name"):
        return getattr(diffusers, config["_class_name"])
    if "beta_start" in config:
        flow = config.get("use_flow_sigmas")
        return diffusers.UniPCMultistepScheduler if flow else diffusers.EulerDiscreteScheduler
    return diffusers.EDMEulerScheduler if "sigma_data" in config else diffusers.FlowMatchEulerDiscreteScheduler


def _ve_sigmas(ts: torch.Tensor) -> torch.Tensor:
    """sigma = t / (1 - t). At t = 1, where it is infinite, the first one continues the ratio of the next two.

    It is at least 15, SDXL's highest: below, the picture that noise of finite sigma still shows would be missed.
    """
    sigmas = ts / (1 - ts)
    if ts[0] > 0.9999:
        second, third = sigmas[1].item(), sigmas[2].item() if len(sigmas) > 2 else 0.0
        sigmas[0] = max(second * (second / third if third > 0 else 4.0), 15.0)
    return sigmas
