"""Ray shells, the training loop, the command line, MLflow tracking, reports."""
