"""The one exception for what a user can put right."""


class UserError(Exception):
    """Bad input: one line that names the key or file, what is wrong and what would work.

    Entry points print it as ``sltrain-ds: error: LINE`` and exit with code 2, without a traceback.
    """
