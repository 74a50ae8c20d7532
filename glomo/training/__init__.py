"""Training: recipes, run folders, checkpoints, the loop, GLoMo pre-training and transfer."""
