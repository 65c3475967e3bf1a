"""`python -m fxroof.analyzer`: the same as the command `fxroof`."""

from .cli import main

if __name__ == "__main__":
    main()
