"""Submit a run: resolve the options, decide where it runs, launch it, follow it to its end."""
