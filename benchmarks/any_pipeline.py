"""Every pipeline of diffusers with its own scheduler and with KDiffusionScheduler: the table of docs/any-pipeline.md.

    python benchmarks/any_pipeline.py --diffusers FOLDER
    python benchmarks/any_pipeline.py --grid output/any-pipeline-grid.png    # image to image with every sampler

FOLDER is a checkout of diffusers' repository. Its tests build each pipeline with small random networks; the tokenizers
and encoders that they load from the hub are replaced by small local ones, so that nothing is downloaded.
"""

from __future__ import annotations

import argparse
import builtins
import contextlib
import copy
import functools
import gc
import importlib
import inspect
import json
import logging
import os
import re
import signal
import sys
import tempfile
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["HF_HUB_OFFLINE"] = "1"  # what has no stand-in fails at once

import diffusers  # noqa: E402
import numpy  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from small_pipelines import LevelNoise, run_over_k_diffusion  # noqa: E402

from scheduling_k_diffusion import KDiffusionScheduler, find_sampler, sampler_names  # noqa: E402

STEPS, SECONDS, CLOSE = 4, 120, 1e-5  # the seconds are for one pipeline with one scheduler
CHAT = "{% for m in messages %}{{ m['content'] if m['content'] is string else m['content'][-1]['text'] }}{% endfor %}"


def stand_in(cls: type, name: Any, *args: Any, **kwargs: Any) -> Any:
    """A small local object of the kind that `cls.from_pretrained(name)` would get from the hub."""
    kind = cls.__name__
    if "Tokenizer" in kind:
        folder = "sdxl/tokenizer" if "CLIP" in kind else "flux/tokenizer_2"
        real = transformers.CLIPTokenizer if "CLIP" in kind else transformers.T5TokenizerFast
        tokenizer = real.from_pretrained(ROOT / "demo" / folder)
        tokenizer.chat_template = CHAT
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer
    t5 = {"d_model": 32, "d_ff": 37, "d_kv": 8, "num_layers": 2, "num_heads": 4, "vocab_size": 1103}
    if kind == "AutoConfig":
        return transformers.T5Config(**t5)
    if hasattr(cls, "config_class") and cls.config_class is not None:
        torch.manual_seed(0)
        if "T5" in kind:
            return cls(cls.config_class(**t5)).eval()
        small = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}
        parts = getattr(cls.config_class, "sub_configs", {})  # of Gemma 3: text and vision
        return cls(cls.config_class(**({name: dict(small) for name in parts} or small))).eval()
    raise OSError(f"no stand-in for {kind}.from_pretrained({name!r})")


@contextlib.contextmanager
def without_hub() -> Iterator[None]:
    """While this is open, small local objects replace what tests load from the hub."""
    names = "PreTrainedTokenizerBase PreTrainedModel AutoConfig AutoTokenizer ProcessorMixin AutoProcessor"
    with contextlib.ExitStack() as stack:
        # these packages only decorate tests, none of which runs here
        stack.enter_context(
            mock.patch.dict(sys.modules, {name: mock.MagicMock() for name in ("parameterized", "requests_mock")})
        )
        ftfy = types.SimpleNamespace(fix_text=str)  # pipelines clean their prompts with it
        stack.enter_context(mock.patch.object(builtins, "ftfy", ftfy, create=True))
        for base in [getattr(transformers, name) for name in names.split()]:
            stock = base.__dict__["from_pretrained"].__func__

            def load(cls: type, name: Any, *args: Any, stock: Any = stock, **kwargs: Any) -> Any:
                local = Path(str(name)).is_dir()
                return stock(cls, name, *args, **kwargs) if local else stand_in(cls, name, *args, **kwargs)

            stack.enter_context(mock.patch.object(base, "from_pretrained", classmethod(load)))
        yield


def testers(folder: Path) -> Iterator[tuple[str, Any]]:
    """(module, class) of the tests that can build a pipeline, one for each class of pipelines; or (module, error)."""
    sys.path.insert(0, str(folder))
    for name in [name for name in sys.modules if name.split(".")[0] == "tests"]:
        del sys.modules[name]
    seen = set()
    for path in sorted(folder.glob("tests/pipelines/*/**/test_*.py")):
        name = ".".join(path.relative_to(folder).with_suffix("").parts)
        try:
            module = importlib.import_module(name)
        except Exception as error:
            yield name, error
            continue
        for cls in vars(module).values():
            own = inspect.isclass(cls) and cls.__module__ == name and hasattr(cls, "get_dummy_inputs")
            pipeline = getattr(cls, "pipeline_class", None) if own else None
            if own and hasattr(cls, "get_dummy_components") and inspect.isclass(pipeline) and pipeline not in seen:
                seen.add(pipeline)
                yield name, cls


def stock_schedulers(scheduler: Any) -> Iterator[Any]:
    """Schedulers of diffusers that take Euler's steps, in place of this one; the first that runs is used.

    The last is None: a pipeline that runs only with schedulers that draw noise has no counterpart.
    """
    config = scheduler.config
    if "final_sigmas_type" in config:  # Cosmos' end at the lowest positive level: KDiffusionScheduler goes on to zero
        config = {**config, "final_sigmas_type": "zero"}
    if type(scheduler).__name__.startswith("FlowMatch"):
        yield diffusers.FlowMatchEulerDiscreteScheduler.from_config(config)
    elif "sigma_data" in config:
        yield diffusers.EDMEulerScheduler.from_config(config)
    elif config.get("use_flow_sigmas"):
        options = {"solver_order": 1, "algorithm_type": "dpmsolver++", "prediction_type": "flow_prediction"}
        yield diffusers.DPMSolverMultistepScheduler.from_config(config, **options)
    elif hasattr(scheduler, "alphas_cumprod"):
        with contextlib.suppress(NotImplementedError):  # for all kinds of betas
            yield diffusers.EulerDiscreteScheduler.from_config(config)
        # without eta it is Euler's method, in another scale
        options = {"clip_sample": False, "thresholding": False, "set_alpha_to_one": True}
        with contextlib.suppress(NotImplementedError):
            yield diffusers.DDIMScheduler.from_config(config, **options)
    else:
        yield copy.deepcopy(scheduler)
    yield None


def call(method: Any, *arguments: Any) -> Any:
    """A method with as many of the arguments as it needs."""
    parameters = inspect.signature(method).parameters.values()
    return method(*arguments[: sum(p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)])


def time_out(*_: Any) -> None:
    raise TimeoutError(f"more than {SECONDS} s")


def draw(tester: Any, pipe: Any, scheduler: Any, steps: int, **options: Any) -> torch.Tensor:
    """All that a call of this pipeline returns, as one vector. The options take precedence over the tester's inputs."""
    getattr(pipe, "decoder_pipe", pipe).scheduler = scheduler  # Kandinsky's combined pipelines have their own copy
    torch.manual_seed(0)
    inputs = {**call(tester.get_dummy_inputs, "cpu"), **options}
    if "num_inference_steps" in inputs:
        inputs["num_inference_steps"] = max(steps, inputs["num_inference_steps"])
    signal.alarm(SECONDS)
    try:
        output = pipe(**inputs)
    finally:
        signal.alarm(0)
    values = output.values() if isinstance(output, dict) else output if isinstance(output, tuple) else [output]
    return torch.cat([vector(value) for value in values])


def vector(value: Any) -> torch.Tensor:
    if isinstance(value, (list, tuple)):
        return torch.cat([vector(v) for v in value]) if value else torch.zeros(0)
    with contextlib.suppress(Exception):
        return torch.as_tensor(value if hasattr(value, "shape") else numpy.asarray(value)).double().flatten()
    return torch.zeros(0)


def reason(error: BaseException) -> str:
    text = re.sub(r"\s+", " ", str(error)).strip().replace("|", "/")
    return f"{type(error).__name__}: {text[:110]}"


def name_of(tester_class: type) -> str:
    return tester_class.pipeline_class.__name__.removesuffix("Wrapper")


def measure(tester_class: type, samplers: list[str], config: dict[str, Any] | None) -> dict[str, Any]:
    """One row of the table. `config`: of a scheduler in place of the pipeline's own."""
    row: dict[str, Any] = {"pipeline": name_of(tester_class)}
    stage = "built"
    try:
        tester = tester_class.__new__(tester_class)
        pipe = tester.pipeline_class(**call(tester.get_dummy_components))
        pipe.set_progress_bar_config(disable=True)
        own = getattr(pipe, "scheduler", None)
        if own is None:
            raise ValueError("it has no scheduler")
        own = getattr(diffusers, config["_class_name"]).from_config(config) if config else own
        row["scheduler"] = type(own).__name__
        row["prediction"] = own.config.get("prediction_type", "flow")
        stage, output = "run with its own scheduler", {}
        if "output_type" in inspect.signature(pipe.__call__).parameters:
            with contextlib.suppress(Exception):  # latents where there are some: pictures of random networks are flat
                draw(tester, pipe, own, STEPS, output_type="latent")
                output = {"output_type": "latent"}
        draw(tester, pipe, own, STEPS, **output)
        stage = "taken"
        KDiffusionScheduler.from_scheduler(own)
        for stock in stock_schedulers(own):
            with contextlib.suppress(Exception):
                expected = None if stock is None else draw(tester, pipe, copy.deepcopy(stock), STEPS, **output)
                break
        stage, base = "run", own if expected is None else stock
        found, other = (
            draw(tester, pipe, KDiffusionScheduler.from_scheduler(base, sampler=name), STEPS, **output)
            for name in ("euler", "dpmpp_2m_sde")
        )
        row["stock"] = None if expected is None else type(stock).__name__
        row["difference"] = None if expected is None else ((found - expected).norm() / expected.norm()).item()
        row["seen"] = ((found - other).norm() / found.norm()).item() > CLOSE  # the output depends on the sampler
    except Exception as error:
        return {**row, "stage": stage, "reason": reason(error)}
    row["samplers"], row["failed"], row["rounded"], row["right"] = 0, {}, [], {}
    noise, run = LevelNoise(), functools.partial(draw, tester, pipe, steps=STEPS, **output)

    def compared(name: str, **options: Any) -> float:
        expected = run_over_k_diffusion(run, base, name, noise, quantize=bool(options))
        given = {"noise_sampler": noise} if "noise_sampler" in find_sampler(name).arguments else {}
        found = run(KDiffusionScheduler.from_scheduler(base, sampler=name, sampler_kwargs=given, **options))
        return ((found - expected).norm() / expected.norm()).item()

    for name in samplers:
        try:
            try:
                row["right"][name] = compared(name)
            except IndexError:  # Kandinsky's image to image takes its timesteps for indices
                row["right"][name] = compared(name, quantize_timesteps=True)
                row["rounded"].append(name)
            if not row["right"][name] <= CLOSE:
                raise ValueError(f"{row['right'][name]:.0e}")
            row["samplers"] += 1
        except Exception as error:
            row["failed"][name] = reason(error).removeprefix("ValueError: ")
    return row


def table(rows: list[dict[str, Any]], samplers: int) -> str:
    """The page's table: those that ran, then those that did not, with the reason."""
    ran = sorted((row for row in rows if "difference" in row), key=lambda row: row["pipeline"])
    others = sorted((row for row in rows if "difference" not in row), key=lambda row: row["pipeline"])
    lines = ["| pipeline | prediction | `euler` from diffusers' | samplers |", "|---|---|---|---|"]
    for row in ran:
        failed = "; ".join(f"`{name}`: {why}" for name, why in row["failed"].items())
        difference = f"{row['difference']:.0e}" if row["difference"] is not None else "draws noise"
        difference = difference if row["seen"] else "hides it"
        rounded = f" ({', '.join(f'`{name}`' for name in row['rounded'])} with `quantize_timesteps=True`)"
        count = f"{row['samplers']} of {samplers}" + (f" ({failed})" if failed else "") + rounded * bool(row["rounded"])
        lines.append(f"| {row['pipeline']} | {row['prediction']} | {difference} | {count} |")
    lines += ["", "Not run, or not taken:", "", "| pipeline | could not be | reason |", "|---|---|---|"]
    lines += [f"| {row['pipeline']} | {row['stage']} | {row['reason']} |" for row in others]
    return "\n".join(lines) + "\n"


def grid(path: Path, steps: int = 20) -> None:
    """A picture of FLUX's demo model, and what image to image makes of it with every sampler."""
    from gallery.pictures import contact_sheet, write_png

    text = diffusers.FluxPipeline.from_pretrained(ROOT / "demo" / "flux")
    pipe = diffusers.FluxImg2ImgPipeline(**{k: v for k, v in text.components.items() if k != "image_encoder"})
    for each in (text, pipe):
        each.set_progress_bar_config(disable=True)
    own, seed = pipe.scheduler, torch.Generator().manual_seed
    scene = {"num_inference_steps": steps, "height": 128, "width": 128}
    start = text("Robot in a desert, warm color palette", **scene, generator=seed(0)).images[0]
    prompt, entries = "Astronaut in a jungle, cold color palette", []
    with tempfile.TemporaryDirectory() as folder:
        for name in ("", *(one for one in sampler_names() if one != "dpm_adaptive")):
            image, note = start, "the picture that the others start from"
            if name:
                pipe.scheduler = KDiffusionScheduler.from_scheduler(own, sampler=name)
                image = pipe(prompt, image=start, strength=0.8, **scene, generator=seed(0)).images[0]
                note = f"{len(pipe.scheduler.timesteps)} timesteps"
            file = Path(folder) / f"{name or 'start'}.png"
            image.save(file)
            entries.append((name, note, file))
        title = ["FluxImg2ImgPipeline with KDiffusionScheduler", f'"{prompt}", strength 0.8, {steps} steps, one seed']
        write_png(contact_sheet(title, entries, cell=256), path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--diffusers", type=Path, metavar="FOLDER", help="a checkout of diffusers")
    parser.add_argument("--grid", type=Path, metavar="FILE", help="only draw image to image with every sampler")
    parser.add_argument("--only", default="", metavar="TEXT", help="pipelines with this in their test's name")
    parser.add_argument("--base", type=json.loads, metavar="JSON", help="the config of a scheduler for all pipelines")
    known = [name for name in sampler_names() if name != "dpm_adaptive"]
    parser.add_argument("--samplers", nargs="*", default=known, help="names; default: all but dpm_adaptive")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="keep rows in this JSON file, and continue from it")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "any-pipeline.md", help="whose table is replaced")
    options = parser.parse_args()
    if options.grid:
        return grid(options.grid)
    if not options.diffusers:
        parser.error("pass --diffusers FOLDER or --grid FILE")
    signal.signal(signal.SIGALRM, time_out)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    diffusers.utils.logging.set_verbosity(logging.CRITICAL)
    rows = json.loads(options.rows.read_text()) if options.rows and options.rows.exists() else []
    done = {row["pipeline"] for row in rows}
    with without_hub():
        for module, cls in testers(options.diffusers.resolve()):
            if isinstance(cls, Exception):
                print(f"{module}: {reason(cls)}", flush=True)
            if isinstance(cls, Exception) or options.only not in module or name_of(cls) in done:
                continue
            row = measure(cls, options.samplers, options.base)
            gc.collect()
            rows.append(row)
            print(json.dumps(row), flush=True)
            if options.rows:
                options.rows.write_text(json.dumps(rows, indent=1))
    close = sum(row["difference"] <= CLOSE for row in rows if row.get("stock") and row["seen"])
    ran = [row for row in rows if "difference" in row]
    every = sum(row["samplers"] == len(options.samplers) for row in ran)
    head = f"diffusers {diffusers.__version__}: {len(rows)} pipelines, {len(ran)} ran, {close} equal to {CLOSE:.0e}."
    head += f" In {every} of them every sampler agreed with k-diffusion's to {CLOSE:.0e}."
    print(head)
    if not (options.only or options.base):
        page = options.page.read_text() if options.page.exists() else "<!-- table -->\n"
        before = page.split("<!-- table -->")[0]
        options.page.write_text(f"{before}<!-- table -->\n\n{head}\n\n{table(rows, len(options.samplers))}")


if __name__ == "__main__":
    main()
