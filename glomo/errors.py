"""The one exception that means "the user can mend this": the command line prints it as a sentence and exits with 2."""


class UserError(ValueError):
    """A mistake in what the user gave (a file, a recipe, a checkpoint, ...).

    Its message is one sentence that names the thing, what it was and what is needed.
    """
