"""What can go wrong, as data: a message, where it happened and what to do. Only the command line prints them."""


class FxroofError(Exception):
    """Analysis cannot go on.

    Attributes:
        message: what was wrong and where, in one or two sentences.
        hint: what the user can do about it; empty when nothing helps.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class TargetError(FxroofError):
    """The target names no model that can be loaded."""


class WorkloadError(FxroofError):
    """No example inputs could be made for the model's forward."""


class TraceError(FxroofError):
    """The model could not be traced into a graph."""


class BoxError(FxroofError):
    """The process that ran the model's code ended, hung or grew without giving what was asked for."""


class CoverageError(FxroofError):
    """Too much of the graph has no formula for its total to mean anything."""


class ReportFileError(FxroofError):
    """A saved report cannot be read or written."""
