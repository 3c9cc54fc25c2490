"""CSV tables from other programs, read row by row. A malformed table raises a `UserError` that names file and line."""

from __future__ import annotations

import csv
import gzip
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from model.support.cli import UserError
from model.support.files import LONGEST_LINE, check_regular

csv.field_size_limit(LONGEST_LINE)


class Table:
    """A CSV file (comma, semicolon or tab; .gz too) with a header. `columns`: the header's names in lower case."""

    def __init__(self, path: Path) -> None:
        self.path, self.line = path, 1
        self.columns: list[str] = []
        for row in self._rows():
            self.columns = [name.strip().lower() for name in row]
            return
        raise UserError(f"{path}: empty; give a header and rows")

    def rows(self, *wanted: str) -> Iterator[tuple[int, dict[str, str]]]:
        """Yield (line number, {column: cell}) with those of the `wanted` columns that exist; skips empty rows."""
        for name, count in Counter(self.columns).items():
            if name in wanted and count > 1:
                raise UserError(f"{self.path}: {count} columns are named {name!r}; keep one of them")
        rows, width = self._rows(), len(self.columns)
        next(rows)
        for row in rows:
            if not any(cell.strip() for cell in row):  # spreadsheets export empty rows at the end
                continue
            if any(cell.strip() for cell in row[width:]):
                raise UserError(
                    f"{self.path}:{self.line}: more cells ({len(row)}) than columns ({width}); quote cells "
                    f"that hold a {self.delimiter!r}, give an index column a name"
                )
            if len(row) < width:
                raise UserError(f"{self.path}:{self.line}: fewer cells ({len(row)}) than columns ({width})")
            yield self.line, {name: cell for name, cell in zip(self.columns, row, strict=False) if name in wanted}

    def unread(self, *wanted: str) -> str:
        """A sentence naming the columns that are not `wanted`; "" if there are none."""
        other = [name or "(no name)" for name in self.columns if name not in wanted]
        return f"{len(other)} columns not read ({', '.join(other)})" if other else ""

    def _rows(self) -> Iterator[list[str]]:
        self.line = 1
        check_regular(self.path)
        try:
            with (gzip.open if self.path.suffix == ".gz" else open)(
                self.path, "rt", encoding="utf-8-sig", newline=""
            ) as stream:
                header = next((line for line in self._lines(stream) if line.strip()), "")
                self.delimiter = max(",;\t", key=header.count)
                stream.seek(0)
                reader = csv.reader(self._lines(stream), delimiter=self.delimiter, strict=True)
                for row in reader:
                    self.line = reader.line_num
                    if row:
                        yield row
        except UnicodeDecodeError as error:
            raise UserError(f"{self.path}: not UTF-8 text (after line {self.line}); save it as 'CSV UTF-8'") from error
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise UserError(f"{self.path}: not a whole gzip file (after line {self.line})") from error
        except csv.Error as error:
            raise UserError(
                f"{self.path}: the row after line {self.line}: {error}; is a quotation mark missing?"
            ) from error

    def _lines(self, stream: TextIO) -> Iterator[str]:
        while line := stream.readline(LONGEST_LINE + 1):
            if len(line) > LONGEST_LINE:
                raise UserError(f"{self.path}: a line of more than {LONGEST_LINE:,} characters; is a line end missing?")
            yield line
