"""Sub-commands of `ddpm`: thin shells over documented functions."""
