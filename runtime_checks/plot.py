"""A picture on a page and the data that it draws, as a CSV file that the page itself carries."""

import base64
import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

Value = str | float | int | None
Rows = Sequence[Sequence[Value]]


@dataclass(frozen=True)
class Plot:
    """title; svg: the element; rows: what is drawn, column heads first, an unknown value as None."""

    title: str
    svg: str
    rows: Rows

    @property
    def csv(self) -> str:
        """The rows; None is empty."""
        stream = io.StringIO()
        csv.writer(stream, lineterminator="\n").writerows(self.rows)
        return stream.getvalue()

    @property
    def file(self) -> str:
        """What the file is called when it is saved."""
        return f"{re.sub('[^a-z0-9]+', '-', self.title.lower()).strip('-')}.csv"

    @property
    def href(self) -> str:
        """The file as a data: URL, for the page must not need another file."""
        return "data:text/csv;charset=utf-8;base64," + base64.b64encode(self.csv.encode()).decode()
