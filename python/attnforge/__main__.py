"""``python -m attnforge``: the same as the command ``attnforge``."""

from attnforge.cli.app import main

if __name__ == "__main__":
    main()
