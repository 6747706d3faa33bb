"""Samplers that look up the same things on a model as ComfyUI's: the noise levels behind `inner_model`."""


def sample_euler(model, x, sigmas, extra_args=None, callback=None, disable=None, s_churn=0.0, half=None):
    """Euler's method, with a second look at the model's range. Step `half` goes half as far."""
    sampling = model.inner_model.inner_model.model_sampling
    assert sampling is model.inner_model.model_patcher.get_model_object("model_sampling")
    assert float(sampling.sigma_min) < float(sigmas[0]) <= float(sampling.sigma_max) * 1.001
    assert set(extra_args) >= {"seed", "model_options"} and x.ndim == 4
    ones = x.new_ones([x.shape[0]])
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i] * ones, **extra_args)
        if callback is not None:
            callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": denoised})
        share = 0.5 if i == half else 1.0
        x = x + share * (x - denoised) / sigmas[i] * (sigmas[i + 1] - sigmas[i])
    return x


def sample_lcm(model, x, sigmas, extra_args=None, callback=None, disable=None, noise_sampler=None, s_noise=1.0):
    """The prediction, with new noise of the next level by the model's own scaling."""
    sampling = model.inner_model.model_patcher.get_model_object("model_sampling")
    ones, amount = x.new_ones([x.shape[0]]), s_noise * getattr(sampling, "noise_scale", 1.0)
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i] * ones, **extra_args)
        if callback is not None:
            callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": denoised})
        x = denoised
        if sigmas[i + 1] > 0:
            x = sampling.noise_scaling(sigmas[i + 1], amount * noise_sampler(sigmas[i], sigmas[i + 1]), x)
    return x
