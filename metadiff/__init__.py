"""MetaDiff: meta-learning with conditional diffusion for few-shot learning (AAAI 2024)."""
