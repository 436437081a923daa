"""Why a record cannot be used, and the report of all that cannot."""

import dataclasses
from collections import Counter

from pdrop_jax.errors import UserError, printable

# Users see how often each reason occurs.
MALFORMED = "malformed JSON"  # also if it is not an object
NO_CONVERSATION = "no conversations or messages"
CONVERSATION = "malformed conversation"  # wrong roles or order, or content of an unknown type
NOT_FOR_TEMPLATE = "not for this template"  # "plain" supports one image with its caption only
VIDEO = "video"  # training takes images only
NO_FILE = "no image file"
OUTSIDE = "image outside of data.images"  # unless data.outside_images allows it
BAD_ENTRY = "malformed image entry"  # neither a name nor the contents of a file
CORRUPT = "corrupt image"  # usually detected when it is loaded; also if it has too many pixels or is too narrow
NO_PICTURE = "<image> tag without image"
NO_TAG = "image without <image> tag"
NO_TARGET = "no target"
TOO_LONG = "too long"

EXAMPLES = 3  # invalid records of each reason that are named


class InvalidRecord(Exception):
    """A record that cannot be used: one of the reasons above, and what exactly is wrong, where that helps."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


@dataclasses.dataclass
class Report:
    """Counts of the records that were read.

    Attributes:
      seen: number of records, valid or not.
      invalid: number of invalid records, by reason.
      examples: the first EXAMPLES invalid records of each reason: their numbers, starting at 1, and details.
    """

    seen: int = 0
    invalid: Counter[str] = dataclasses.field(default_factory=Counter)
    examples: dict[str, list[tuple[int, str]]] = dataclasses.field(default_factory=dict)

    @property
    def valid(self) -> int:
        return self.seen - self.invalid.total()

    @property
    def reasons(self) -> str:
        """ "2 no image file, 1 too long": the most common reason first."""
        return ", ".join(f"{count} {reason}" for reason, count in self.invalid.most_common())

    @property
    def first(self) -> int:
        """Number of the first invalid record."""
        return min(number for named in self.examples.values() for number, _ in named)

    def add(self, number: int, error: InvalidRecord) -> None:
        """Counts invalid record ``number``. Records may come in any order within a reason."""
        self.invalid[error.reason] += 1
        named = sorted([*self.examples.get(error.reason, []), (number, error.detail)])
        self.examples[error.reason] = named[:EXAMPLES]

    def merge(self, other: "Report") -> None:
        """Adds the counts of a report on other records."""
        self.seen += other.seen
        self.invalid += other.invalid
        for reason, named in other.examples.items():
            self.examples[reason] = sorted([*self.examples.get(reason, []), *named])[:EXAMPLES]

    def lines(self) -> list[str]:
        """The report as text, one line for each reason."""
        found = [f"{self.seen:,} records, {self.valid:,} valid, {self.invalid.total():,} invalid"]
        for reason, count in self.invalid.most_common():
            named = "; ".join(
                f"record {number:,}{f' ({printable(detail)})' if detail else ''}"
                for number, detail in self.examples[reason]
            )
            found.append(f"  {count:>9,}  {reason}: {named}{', …' if count > EXAMPLES else ''}")
        return found


def check_report(report: Report, path: str) -> None:
    """Raises UserError if there are no records, or none that are valid."""
    if not report.seen:
        raise UserError(f"{path} contains no conversations: expected at least one record")
    if not report.valid:
        number, detail = min(named[0] for named in report.examples.values())
        raise UserError(
            f"{path} contains no usable rows: all {report.seen} are invalid ({report.reasons})"
            + (f"; row {number}: {detail}" if detail else "")
        )
