"""What the commands print on the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.table import Table

console = Console(soft_wrap=True, highlight=False)


def print_rows(title: str, columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    """Print a table; cells are converted with ``str`` and never interpreted as markup."""
    from rich.text import Text

    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    # Into a file or a pipe a table takes the width it needs.
    Console(highlight=False, width=None if sys.stdout.isatty() else 240).print(table)


def print_table(title: str, frame: Any) -> None:
    """Print a pandas table."""
    print_rows(title, [str(c) for c in frame.columns], frame.itertuples(index=False))
