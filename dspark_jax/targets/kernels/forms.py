"""The environment variable by which kernels are asked for, or done without."""

import os

from dspark_jax.errors import UserError

FORM = "DSPARK_ATTENTION"
FORMS = ("auto", "einsum", "kernel")


def chosen_form() -> str:
    """The form that DSPARK_ATTENTION names, one of `FORMS`; UserError for another value."""
    form = os.environ.get(FORM) or FORMS[0]
    if form not in FORMS:
        raise UserError(f"{FORM} is {form!r}; expected one of {', '.join(FORMS)}.")
    return form
