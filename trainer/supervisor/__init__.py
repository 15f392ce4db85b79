"""What outlives the training program: claims the run, restores, starts the workers, uploads, commits."""
