"""``python -m limbeck`` and the ``limbeck`` command."""

from __future__ import annotations


def main() -> None:
    """Run the command line."""
    from limbeck.cli import main as run

    run()


if __name__ == "__main__":
    main()
