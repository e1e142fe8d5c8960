"""DRAKES: masked diffusion over tokens, pretrained on sequences and fine-tuned by reward (arXiv 2410.13643)."""
