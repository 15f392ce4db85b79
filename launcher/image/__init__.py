"""The trainer's image: tagged by its content, made by whatever builder is here."""
