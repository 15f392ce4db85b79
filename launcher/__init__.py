"""What runs on the laptop: submit a recipe, follow its run, read what happened."""
