"""DRAKES: masked discrete diffusion of DNA, fine-tuned by back-propagating a reward (Wang et al. 2025, arXiv 2410.13643)."""
