"""Training: the recipes, the stages and the one loop that runs them all."""
