"""``python -m sparsed`` is the command line."""

from sparsed.controller.cli.main import main

if __name__ == "__main__":
    main()
