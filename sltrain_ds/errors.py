"""What a user can put right, in one line."""


class UserError(Exception):
    """Bad input: one line that names the key or file, what is wrong and what would work.

    Entry points print it as ``sltrain-ds: error: LINE`` and exit with code 2, without a traceback.
    """


def os_error_line(error: OSError) -> str:
    """FILE: what, on one line; what alone where the error names no file."""
    lines = str(error.strerror or error).strip().splitlines()
    what = lines[0] if lines else type(error).__name__
    return f"{error.filename}: {what}" if error.filename is not None else what
