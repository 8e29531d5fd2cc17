"""What the commands of the command line share."""

import argparse
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; the usage is for --help."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"blip3o: {message} (see {self.prog} --help)\n")


def given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}
