"""The one error a user may cause.

Everything that a user can put right (a missing file, a rate out of range, a truncated checkpoint) is raised as
`UserError`; the command line prints its one line and exits with code 2. Any other exception is a bug of ours.
"""


class UserError(Exception):
    """One clear line: what is wrong, where, and what to do about it."""


class NotFinite(UserError):
    """Weights or activations that are not finite, in a type that they are stored or computed in."""


class Unreachable(UserError):
    """A rate that a method cannot reach with this model and these settings, whatever is tried again."""
