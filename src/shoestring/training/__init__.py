"""What every training run shares: recipes, run folders, exact resume, metrics and plots, on HF's `Trainer`."""
