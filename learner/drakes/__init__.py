"""DRAKES: masked discrete diffusion, fine-tuned to a reward by back-propagation through sampling (arXiv 2410.13643)."""
