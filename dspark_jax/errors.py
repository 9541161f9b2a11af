"""The one exception that means "the user can fix this"."""


class UserError(Exception):
    """A mistake in what the user gave: shown as one sentence, without a traceback."""
