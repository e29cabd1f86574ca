"""The one error class of the package: what went wrong, what was expected, what was found, what to do."""

from __future__ import annotations


class QlipError(Exception):
    """A failure that the user can act on.

    Attributes:
        problem: What went wrong, one clause without a full stop.
        expected: What the tool needed, or ``None`` where the problem says it all.
        found: What was there instead.
        fix: What to do next; a command where one exists.
    """

    exit_code = 2

    def __init__(
        self, problem: str, *, expected: str | None = None, found: str | None = None, fix: str | None = None
    ) -> None:
        """Store the fields; ``str()`` joins those that are set, one a line."""
        self.problem = problem
        self.expected = expected
        self.found = found
        self.fix = fix
        parts = [problem]
        for label, text in (("expected", expected), ("found", found), ("what to do", fix)):
            if text is not None:
                parts.append(f"  {label}: {text}")
        super().__init__("\n".join(parts))

    def as_dict(self) -> dict[str, str | None]:
        """Return the fields for machine-readable output."""
        return {"problem": self.problem, "expected": self.expected, "found": self.found, "fix": self.fix}


class NotFiniteError(QlipError):
    """A run produced NaN or infinity: some engine overflows."""
