"""Calls of the pipelines on the model with a known exact solution, for tests and benchmarks."""

from __future__ import annotations

from typing import Any

import torch

from parity.exact import Mixture, Transformer, UNet, patched, solve


class PassesVelocity(Transformer):
    """A planted fault: the pipeline's `denoised` becomes the velocity."""

    def velocity(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return (x - super().velocity(x, t)) / t


def call(pipe: Any, rows: int, columns: int, **arguments: Any) -> torch.Tensor:
    """The latents of a call without a prompt: rows * columns patches of 2x2, those of each image in one dimension.

    Returns:
        of shape (images, patches, d): samples of the mixture.
    """
    network = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    nothing = torch.zeros(1, 1, 1, dtype=network.dtype)
    arguments = {"guidance_scale": 1.0, "output_type": "latent", "height": 16 * rows, "width": 16 * columns} | arguments
    latents = pipe(prompt_embeds=nothing, pooled_prompt_embeds=nothing[:, 0], **arguments).images
    if latents.ndim == 4:
        return patched(latents, network.mixture)
    return latents.reshape(len(latents), -1, network.mixture.dimensions)


def evaluations(pipe: Any, *arguments: Any, **keywords: Any) -> tuple[list[tuple[float, torch.Tensor]], torch.Tensor]:
    """What the network was shown in `call(...)`, and the latents at the end.

    Returns:
        (sigma, y) for each evaluation, y = x0 + sigma noise of shape (images, patches, d) on both pipelines, and what
        `call` returns.
    """
    seen, network = list[tuple[float, torch.Tensor]](), pipe.unet if hasattr(pipe, "unet") else pipe.transformer

    def record(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        if isinstance(module, UNet):
            sigma = module.sigma(args[1].flatten()[:1].double()).item()
            seen.append((sigma, patched(args[0].double() * (sigma**2 + 1) ** 0.5, module.mixture)))
        else:
            t, x = kwargs["timestep"].flatten()[0].double().item(), kwargs["hidden_states"].double()
            left = max(1 - t, 1e-12)  # at t = 1 there is no y; what is shown is noise alone
            seen.append((t / left, x.reshape(len(x), -1, module.mixture.dimensions) / left))

    hook = network.register_forward_pre_hook(record, with_kwargs=True)
    try:
        return seen, call(pipe, *arguments, **keywords)
    finally:
        hook.remove()


def solve_ode(known: Mixture, y: torch.Tensor, sigma: float, sigma_end: float) -> torch.Tensor:
    """y at sigma_end by dy/dsigma = (y - x0(y)) / sigma (Karras et al. 2022, eq. 3), to ten digits; y of (..., d)."""
    (x,) = solve(known, y / (1 + sigma), sigma / (1 + sigma), [sigma_end / (1 + sigma_end)])
    return x * (1 + sigma_end)
