"""`python -m launcher`."""

import sys

try:
    from launcher.cli import main
except ModuleNotFoundError as error:  # the first command is often typed before `make setup`
    if str(error.name).startswith(("launcher", "trainer")):
        raise
    print(  # noqa: T201 (click is what is missing)
        f"error: {sys.executable} has no `{error.name}`\n  `make setup` makes the environments; then `. .venv/bin/activate`",
        file=sys.stderr,
    )
    sys.exit(2)

if __name__ == "__main__":
    main()
