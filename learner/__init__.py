"""Pure PyTorch: networks, objectives, dynamics model, exact evaluation, sample metrics. Knows no actor, no Ray, no MLflow."""
