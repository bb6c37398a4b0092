"""`python -m qcompile` is `qcompile`: for who has the package on a path and no script."""

from qcompile.cli import main

if __name__ == "__main__":
    main()
