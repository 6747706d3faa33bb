"""A model with a known exact solution: a Gaussian mixture's ideal denoiser in place of SDXL's or FLUX's network.

The pipelines run as they are; only the network is `UNet` or `Transformer` of this file. Three coordinates occur:
y = x0 + sigma noise, FLUX's x = (1 - t) x0 + t noise with t = sigma / (1 + sigma), and x = alpha x0 + sigma noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.cache_utils import CacheMixin
from scipy.integrate import solve_ivp

MISSING = dict.fromkeys(("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
SDXL_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


class Mixture:
    """An equal mixture of isotropic Gaussians: `means` of shape (components, d), `stds` of shape (components,)."""

    def __init__(self, means: torch.Tensor, stds: torch.Tensor):
        self.means, self.stds, self.dimensions = means.double(), stds.double(), means.shape[1]
        self._squares = self.means.square().sum(-1)

    @property
    def mean(self) -> torch.Tensor:
        """Of shape (d,)."""
        return self.means.mean(0)

    @property
    def covariance(self) -> torch.Tensor:
        """Of shape (d, d)."""
        centred, within = self.means - self.mean, self.stds.square().mean()
        return centred.T @ centred / len(centred) + within * torch.eye(self.dimensions, dtype=torch.float64)

    def sample(self, n: int, generator: torch.Generator) -> torch.Tensor:
        """True samples, of shape (n, d), float64."""
        component = torch.randint(len(self.means), (n,), generator=generator)
        noise = torch.randn(n, self.dimensions, generator=generator, dtype=torch.float64)
        return self.means[component] + self.stds[component, None] * noise

    def within(self, x: torch.Tensor, t: float = 0.0) -> float:
        """How far x = (1 - t) x0 + t noise, (n, d), spreads about the nearest component, over how far it should."""
        away = torch.cdist(x, (1 - t) * self.means).min(-1)
        variance = (1 - t) ** 2 * self.stds[away.indices].square() + t**2
        return (away.values.square() / variance).mean().div(self.dimensions).sqrt().item()

    def split(self, x: torch.Tensor, alpha: Any, sigma: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """(E[x0 | x], E[noise | x]) for x = alpha x0 + sigma noise, (..., d); alpha, sigma: numbers or (..., 1).

        Given its component k, x is N(alpha means_k, alpha^2 stds_k^2 + sigma^2), and x0 is the mean of x / alpha and
        means_k weighed by the variances of the other (Bishop 2006, section 2.3.3). No difference of near numbers is
        taken, so that both are exact to rounding at sigma = 0 and at alpha = 0.
        """
        x, alpha, sigma = x.double(), *(torch.as_tensor(share, dtype=torch.float64) for share in (alpha, sigma))
        variance = alpha**2 * self.stds.square() + sigma**2  # (..., k)
        distance = x.square().sum(-1, keepdim=True) - 2 * alpha * (x @ self.means.T) + alpha**2 * self._squares
        weight = (-distance / (2 * variance) - variance.log() * self.dimensions / 2).softmax(-1)
        precision = weight / variance  # (..., k)
        inner = precision * self.stds.square()
        x0 = (weight - alpha**2 * inner) @ self.means + alpha * inner.sum(-1, keepdim=True) * x
        return x0, sigma * (precision.sum(-1, keepdim=True) * x - alpha * (precision @ self.means))


# the one that is used throughout: means from N(0, 1), and a fifth of that spread in each component
MEANS = torch.randn(8, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
KNOWN = Mixture(MEANS, torch.full([8], 0.2))


class UNet(ModelMixin, ConfigMixin):
    """SDXL's network for a mixture: epsilon or v at a trained timestep, interpolated ones included.

    A mixture of d dimensions rules each patch of d numbers by itself: 2x2 of four channels for d = 16, so that one
    picture holds as many samples as it has patches.
    """

    @register_to_config
    def __init__(self, in_channels=4, sample_size=16, addition_time_embed_dim=1, cross_attention_dim=1):
        super().__init__()
        self.parameter = torch.nn.Parameter(torch.zeros(()))  # for the module's dtype and device
        self.add_embedding = torch.nn.Module()
        self.add_embedding.linear_1 = torch.nn.Linear(6 * addition_time_embed_dim + 1, 1)
        self.register_to_config(time_cond_proj_dim=None)

    def answering(self, mixture: Mixture, scheduler: Any) -> UNet:
        """This network, with a mixture to know, in the terms of a scheduler's betas and prediction_type."""
        self.mixture, self.prediction_type = mixture, scheduler.config.prediction_type
        alphas_cumprod = scheduler.alphas_cumprod.double().clamp(min=2**-24)
        self.log_sigmas = ((1 - alphas_cumprod) / alphas_cumprod).log().numpy() / 2
        return self

    def sigma(self, timestep: torch.Tensor) -> torch.Tensor:
        """The level of a timestep; log sigma is linear between the trained ones, as in k-diffusion."""
        trained = np.arange(len(self.log_sigmas))
        return torch.from_numpy(np.exp(np.interp(timestep.double().numpy(), trained, self.log_sigmas)))

    def prediction(self, y: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """Epsilon, v (Salimans and Ho 2022) or x0 of y = x0 + sigma noise."""
        split = self.mixture.split(patched(y, self.mixture), 1.0, sigma.reshape(-1, 1, 1))
        x0, noise = (unpatched(part, y.shape) for part in split)
        kinds = {"epsilon": noise, "v_prediction": (noise - sigma * x0) / (sigma**2 + 1).sqrt()}
        return kinds.get(self.prediction_type, x0)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, **conditioning: Any) -> tuple[torch.Tensor]:
        sigma = self.sigma(timestep.reshape(-1).expand(len(sample))).view(-1, 1, 1, 1)
        y = sample.double() * (sigma**2 + 1).sqrt()
        return (self.prediction(y, sigma).to(sample.dtype),)


class Transformer(ModelMixin, ConfigMixin, CacheMixin):
    """FLUX's network for a mixture: the velocity noise - x0 at x = (1 - t) x0 + t noise of (b, tokens, channels)."""

    @register_to_config
    def __init__(self, in_channels=16, guidance_embeds=False, joint_attention_dim=1, pooled_projection_dim=1):
        super().__init__()
        self.parameter = torch.nn.Parameter(torch.zeros(()))

    def velocity(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """noise - x0 at t of shape (b, 1, 1)."""
        x0, noise = self.mixture.split(x.reshape(len(x), -1, self.mixture.dimensions), 1 - t, t)
        return (noise - x0).reshape(x.shape)

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor, **conditioning: Any) -> tuple[torch.Tensor]:
        x, t = hidden_states.double(), timestep.double().view(-1, 1, 1)
        return (self.velocity(x, t).to(hidden_states.dtype),)


def patched(x: torch.Tensor, mixture: Mixture) -> torch.Tensor:
    """(b, c, h, w) -> (b, patches, d). A mixture of as many dimensions as the picture has one patch."""
    b, c, h, w = x.shape
    if mixture.dimensions == c * h * w:
        return x.reshape(b, 1, -1)
    return x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, -1, 4 * c)


def unpatched(patches: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The reverse of `patched`."""
    b, c, h, w = shape
    if patches.shape[1] == 1:
        return patches.reshape(shape)
    return patches.view(b, h // 2, w // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(shape)


def sdxl_pipeline(
    known: Mixture, dtype: torch.dtype = torch.float64, network: type[UNet] = UNet, **scheduler: Any
) -> Any:
    """The pipeline with SDXL's betas and a known network. Options go to EulerDiscreteScheduler."""
    from sdxl_comfy_pipeline import StableDiffusionXLComfyPipeline

    scheduler = EulerDiscreteScheduler(**{**SDXL_BETAS, **scheduler})
    unet = torch.nn.Module.to(network(), dtype).answering(known, scheduler)
    pipe = StableDiffusionXLComfyPipeline(unet=unet, scheduler=scheduler, add_watermarker=False, **MISSING)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def flux_pipeline(
    known: Mixture,
    dtype: torch.dtype = torch.float64,
    network: type[Transformer] = Transformer,
    mu: float = 1.15,
    channels: int = 16,
) -> Any:
    """The pipeline with FLUX's scheduler, shifted by exp(mu) at any size, and a known network."""
    from flux_comfy_pipeline import FluxComfyPipeline

    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=mu, max_shift=mu)
    transformer = torch.nn.Module.to(network(in_channels=channels), dtype)
    transformer.mixture = known
    pipe = FluxComfyPipeline(transformer=transformer, scheduler=scheduler, **MISSING)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def solve(known: Mixture, x: torch.Tensor, t: Any, ends: Sequence[Any]) -> list[torch.Tensor]:
    """x = (1 - t) x0 + t noise of (..., d) at each of the falling `ends` by dx/dt = noise - x0, to ten digits.

    `t` and `ends` are numbers. With levels of their own for the samples, `t` and the only end have shape (..., 1).
    """
    span = ends[-1] - t

    def slope(share: float, flat: np.ndarray) -> np.ndarray:
        at = t + share * span
        x0, noise = known.split(torch.from_numpy(flat).view(x.shape), 1 - at, at)
        return ((noise - x0) * span).flatten().numpy()

    shares = [1.0] if len(ends) == 1 else [(end - t) / (span or 1.0) for end in ends]
    first = x.double().flatten().numpy()
    solution = solve_ivp(slope, (0, 1), first, method="DOP853", t_eval=shares, rtol=1e-10, atol=1e-11)
    return [torch.from_numpy(column.copy()).view(x.shape) for column in solution.y.T]


def sliced_wasserstein(a: torch.Tensor, b: torch.Tensor, projections: int = 256) -> float:
    """The mean of the Wasserstein-1 distances of two sets of samples, (n, d) each, along random directions."""
    directions = torch.randn(a.shape[-1], projections, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    directions /= directions.norm(dim=0)
    a, b = ((samples.double() @ directions).sort(0).values for samples in (a, b))
    return (a - b).abs().mean().item()
