"""Training of denoising diffusion models: mathematics, network, engine, checkpoints."""
