"""The command line of `test.py` and `test_flux.py`. Nothing heavy is imported, so that `--help` answers at once."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "Astronaut in a jungle, cold color palette, muted colors, detailed, 8k"
OFFLOAD = ("none", "model", "sequential")
DTYPES = ("float16", "bfloat16", "float32", "float64")


@dataclass(frozen=True)
class Family:
    """What differs between SDXL and FLUX: the pipeline, the real model and its defaults."""

    name: str
    module: str
    pipeline: str
    hub_model: str
    dtype: str
    size: int
    steps: int
    guidance: float
    schedule: str | None
    schedule_help: str

    @property
    def demo(self) -> Path:
        return ROOT / "demo" / self.name


SDXL = Family(
    name="sdxl",
    module="sdxl_comfy_pipeline",
    pipeline="StableDiffusionXLComfyPipeline",
    hub_model="stabilityai/stable-diffusion-xl-base-1.0",
    dtype="float16",
    size=1024,
    steps=25,
    guidance=5.0,
    schedule="karras",  # dpmpp_3m_sde needs small last steps, which the scheduler's own levels lack
    schedule_help="karras (default), exponential, polyexponential, vp, or 'scheduler' for the model's own",
)
FLUX = Family(
    name="flux",
    module="flux_comfy_pipeline",
    pipeline="FluxComfyPipeline",
    hub_model="black-forest-labs/FLUX.1-dev",
    dtype="bfloat16",
    size=1024,
    steps=28,
    guidance=3.5,
    schedule=None,
    schedule_help="'scheduler' for the model's own (default), karras, exponential, polyexponential or vp",
)


def parse(family: Family, arguments: list[str] | None = None) -> argparse.Namespace:
    """The options of a grid. Raises SystemExit(2) with one line for values that can't be right."""
    parser = argparse.ArgumentParser(
        description=f"Draws every sampler of k-diffusion with {family.name.upper()}, from the same noise, into a grid.",
        epilog="Without --model: the real model on a machine with CUDA, the demo model of this folder on any other.",
    )
    add = parser.add_argument
    add("--model", help=f"hub id, folder, .safetensors file, or 'demo' (default: {family.hub_model}, or demo)")
    add("--samplers", nargs="+", metavar="NAME", help="these only (default: all), with or without 'sample_'")
    add("--steps", type=_positive, help=f"(default: {family.steps}{', schnell: 4' if family is FLUX else ''})")
    add("--schedule", default=family.schedule, help=f"noise levels: {family.schedule_help}")
    add("--width", type=_positive, help="pixels (default: the model's)")
    add("--height", type=_positive, help="pixels (default: the model's)")
    add("--prompt", default=PROMPT, help="(default: %(default)s)")
    add("--negative-prompt", help="what not to draw")
    add("--guidance", type=float, default=family.guidance, help="guidance scale (default: %(default)s)")
    if family is FLUX:
        add("--true-cfg", type=float, default=2.0, help="scale of the negative prompt (default: %(default)s)")
    add("--prompts", type=Path, metavar="FILE", help="draw every line of a text file instead of --prompt")
    add("--seed", type=int, default=2, help="of the noise, the same for every sampler (default: %(default)s)")
    add("--seeds", type=_positive, default=1, metavar="N", help="draw N of them, from --seed on (default: 1)")
    add("--batch", type=_positive, default=1, metavar="N", help="draw N prompts and seeds at once (default: 1)")
    add("--dtype", choices=DTYPES, help=f"of the network (default: {family.dtype}, on a CPU float32)")
    add("--device", help="cuda, cuda:1, mps, cpu, ... (default: cuda where there is one, else cpu)")
    add("--offload", choices=OFFLOAD, default="none", help="keep the model in main memory, for small GPUs")
    add("--output", type=Path, default=Path("output"), help="folder (default: %(default)s)")
    add("--resume", action="store_true", help="keep the pictures that are there already with the same settings")
    options = parser.parse_args(arguments)
    if options.schedule == "scheduler":
        options.schedule = None
    if options.prompts is not None:
        try:
            lines = options.prompts.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            parser.error(f"argument --prompts: can't read {options.prompts}: {error}")
        if not (found := [line.strip() for line in lines if line.strip()]):
            parser.error(f"argument --prompts: {options.prompts} has no line with a prompt")
        options.prompts = found
    if options.samplers is not None:
        options.samplers = [name for names in options.samplers for name in names.split(",") if name]
    return options


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"has to be at least 1, but is {value}")
    return value
