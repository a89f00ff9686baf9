"""The mathematics of diffusion: processes, losses, likelihood, samplers. Pure: no file, network or group."""
