"""`python -m engine` is `engine`. Run by its path, this file is the engine of its own folder."""

import sys

if __name__ == "__main__":
    # Python puts the current folder (-m) or this file's (by its path) first: no module is looked for in either.
    if not getattr(sys.flags, "safe_path", False):
        del sys.path[0]
    if not __package__:
        from pathlib import Path

        sys.path.insert(0, str(Path(__file__).absolute().parents[1]))
        import engine  # noqa: F401  # its modules are found in its folder from now on

        del sys.path[0]

    from engine.commands.cli import main

    main()
