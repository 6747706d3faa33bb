"""The two sides of a comparison: how they are named on the command line, and what a scheduler's lists say."""

from __future__ import annotations

import ast
import copy
import importlib
import inspect
import math
import re
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from comfy_ksampler import names
from gallery.models import reason
from gallery.options import FLUX, SDXL, Family, unknown
from gallery.refused import Refused, refusing


@dataclass(frozen=True)
class Side:
    """A sampler with k-diffusion's signature or a scheduler of diffusers, with its options."""

    text: str
    target: Any
    options: dict[str, Any]
    file: str | None = None  # that it was loaded from, where it is user-supplied

    @property
    def is_scheduler(self) -> bool:
        return inspect.isclass(self.target)

    @property
    def is_for_comfyui(self) -> bool:
        """Whether its file looks up what ComfyUI's functions do, or has imported ComfyUI."""
        return self.file is not None and ("comfy" in sys.modules or b"inner_model" in Path(self.file).read_bytes())

    def check_family(self, family: Family, flag: str = "--against") -> None:
        """Refuses a scheduler of diffusers that is made for the other kind of model."""
        if not self.is_scheduler or not self.target.__module__.startswith("diffusers."):
            return
        name, flow = self.target.__name__, hasattr(self.target, "scale_noise")  # only flow schedulers have it
        if family is SDXL and flow:
            raise Refused(f"{flag}: {name} is for flow models: add --family flux")
        if family is FLUX and not flow and not self.options.get("use_flow_sigmas"):
            takes = "use_flow_sigmas" in inspect.signature(self.target.__init__).parameters
            flows = "(use_flow_sigmas=True, prediction_type='flow_prediction')"
            raise Refused(f"{flag}: {name} {f'needs {flows} for FLUX' if takes else 'is not for flow models'}")

    def failure(self, error: Exception) -> str:
        """What went wrong while this side ran, for a user-supplied one also in which line of its file."""
        if isinstance(error, Refused):
            return str(error)
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == self.file]
        why = "; the function needs ComfyUI: put its folder on the path, PYTHONPATH=..., and install its requirements"
        needs = why * (getattr(error, "name", None) == "inner_model")
        return f"{self.text}: {reason(error)}{needs}" + (f" ({self.file}, line {lines[-1]})" if lines else "")

    @property
    def eta(self) -> float | None:
        """How much step noise a sampler adds, 0 to 1; None for one without the option."""
        parameter = inspect.signature(self.target).parameters.get("eta")
        return self.options.get("eta", parameter and parameter.default)


def find_side(text: str, module: ModuleType, flag: str) -> Side:
    """`NAME` or `NAME(option=value, ...)`.

    NAME is a sampler of k-diffusion, a scheduler class of diffusers, or a user-supplied sampler function or scheduler
    class, `path/to/file.py:name` or `package.module:name`. A file is run only when it is named here.

    Args:
        module: the pipeline file, which knows k-diffusion's samplers.
        flag: the option that `text` came with, for messages.
    """
    name, options = _parse(text, flag)
    file = None
    if ":" in name:
        target, file = _load(name, module, flag)
    elif name.removeprefix("sample_") in module.sampler_names():
        target = module.find_sampler(name).function
    else:
        import diffusers

        target = getattr(diffusers, name, None) if name.isidentifier() else None
        if not _is_scheduler(target):
            schedulers = (n for n in dir(diffusers) if n.endswith("Scheduler"))
            known = [*module.sampler_names(), *(n for n in schedulers if _is_scheduler(getattr(diffusers, n, None)))]
            which = f"which function of {name}? name it as {name}:NAME"
            raise Refused(f"{flag}: {which if name.endswith('.py') else unknown(name, known)}")
    if not inspect.isclass(target):
        with refusing(TypeError, ValueError, text=lambda error: f"{flag}: {error}".replace("`", "")):
            module.find_sampler(target, options)
    elif not _is_scheduler(target):
        raise Refused(f"{flag}: {name} is a class, but no scheduler: it needs set_timesteps() and step()")
    else:
        parameters = inspect.signature(target.__init__).parameters
        known = list(parameters)[1:]
        strange = [option for option in options if option not in known]
        if strange and not any(one.kind is one.VAR_KEYWORD for one in parameters.values()):
            raise Refused(f"{flag}: {name} takes no {', '.join(strange)}; it takes {', '.join(known)}")
    return Side(text, target, options, file)


def _is_scheduler(target: Any) -> bool:
    return inspect.isclass(target) and hasattr(target, "set_timesteps") and hasattr(target, "step")


def _parse(text: str, flag: str) -> tuple[str, dict[str, Any]]:
    name, bracket, arguments = text.strip().partition("(")
    with refusing(Exception, text=lambda _: f"{flag}: expected NAME or NAME(option=value, ...), but got {text!r}"):
        call = ast.parse(f"f({arguments}" if bracket else "f()", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or any(keyword.arg is None for keyword in call.keywords):
            raise ValueError
        return name.strip(), {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}


def _load(name: str, module: ModuleType, flag: str) -> tuple[Any, str | None]:
    """The object of `path/to/file.py:name` or `package.module:name`, and its file."""
    source, _, attribute = name.rpartition(":")
    path, loaded = Path(source).resolve(), module.sampling  # k-diffusion's can't be imported as its package's
    if source.endswith(".py") and not path.exists():
        raise Refused(f"{flag}: there is no file {source}")
    if source != loaded.__name__ and path != Path(loaded.__file__).resolve():
        words = f"{flag}: {source} can't be imported: "
        with refusing(Exception, text=lambda error: f"{words}{type(error).__name__}: {error}"):
            loaded = _load_file(path) if source.endswith(".py") else importlib.import_module(source)
    if not callable(getattr(loaded, attribute, None)):
        own = [n for n, value in vars(loaded).items() if n.startswith("sample_") and callable(value)]
        own += [n for n, value in vars(loaded).items() if _is_scheduler(value) and value.__module__ == loaded.__name__]
        raise Refused(f"{flag}: {source}: {unknown(attribute, own) if own else 'it has no sampler and no scheduler'}")
    return getattr(loaded, attribute), loaded.__file__


def _load_file(path: Path) -> ModuleType:
    """A module from a file. One that belongs to a package which it imports by name is loaded as that package's.

    ComfyUI's `comfy/k_diffusion/sampling.py` says `from . import utils` and `import comfy.model_sampling`, so it is
    `comfy.k_diffusion.sampling` below the folder that holds `comfy`.
    """
    text = path.read_text(encoding="utf-8")
    imported = re.findall(r"^\s*(?:import|from)\s+(\w+|\.)", text, re.MULTILINE)
    packages = [folder for folder in path.parents if folder.name in imported] + [path.parent] * ("." in imported)
    if packages:
        sys.path.append(str(packages[0].parent))
        if packages[0].name == "comfy":
            names()  # imports ComfyUI as it is told to: without a GPU on the CPU
        return importlib.import_module(".".join(path.relative_to(packages[0].parent).with_suffix("").parts))
    name = "side_" + re.sub(r"\W", "_", path.stem)
    sys.modules[name] = loaded = ModuleType(name)  # where dataclasses look for it
    loaded.__file__ = str(path)
    exec(compile(text, path, "exec"), vars(loaded))
    return loaded


def prepared(scheduler: Any, steps: int, tokens: int | None = None) -> Any:
    """A copy with its timesteps set as the stock pipeline sets them; FLUX's for that many tokens of the picture."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps  # slow to import

    scheduler, arguments = copy.deepcopy(scheduler), {}
    if tokens is not None:
        defaults = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
        shift = (scheduler.config.get(name, default) for name, default in defaults.items())
        arguments["mu"] = calculate_shift(tokens, *shift)
        if not scheduler.config.get("use_flow_sigmas"):
            arguments["sigmas"] = np.linspace(1.0, 1 / steps, steps)
    stock = "StableDiffusionXLPipeline" if tokens is None else "FluxPipeline"
    words = f"{type(scheduler).__name__} does not run in {stock}: "
    with refusing(Exception, text=lambda error: words + reason(error)):
        retrieve_timesteps(scheduler, steps, "cpu", **arguments)
    return scheduler


def levels_of(scheduler: Any, level_of: Callable[[float], float]) -> tuple[list[float], list[float], list[int]]:
    """Of a scheduler with its timesteps set: the levels of its evaluations, of its steps and their end, the starts.

    A scheduler of order 2 lists a level twice or has midpoints between; its steps begin at every other evaluation.
    A DPMSolverSinglestepScheduler begins a step where its order is 1 and goes on from there.
    """
    count = len(scheduler.timesteps)
    if getattr(scheduler, "sigmas", None) is None:
        alpha = float(getattr(scheduler, "final_alpha_cumprod", None) or 1.0)
        listed = [*(level_of(float(t)) for t in scheduler.timesteps), math.sqrt((1 - alpha) / alpha)]
    else:
        listed = scheduler.sigmas.tolist()
    levels, starts = listed[:count], list(range(count))
    if orders := getattr(scheduler, "order_list", None):
        starts = [i for i, order in enumerate(orders) if order == 1]
    elif getattr(scheduler, "order", 1) == 2:
        starts = starts[::2]
        if getattr(scheduler, "sigmas_interpol", None) is not None:
            middle, back = scheduler.sigmas_interpol.tolist(), int("sigmas_down" in vars(scheduler))
            levels = [middle[i - back] if i % 2 else level for i, level in enumerate(levels)]
        elif hasattr(scheduler, "mid_point_sigma"):
            levels = [math.sqrt(levels[i - 1] * level) if i % 2 else level for i, level in enumerate(levels)]
    return levels, [levels[i] for i in starts] + [listed[-1]], starts
