"""Classes from outside the package, named in a config as "package.module:Class"."""

import re
import sys
from importlib import import_module
from pathlib import Path

from sltrain_ds.errors import UserError

FORM = r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*"


def is_dotted(name) -> bool:
    """Whether a name has the form "package.module:Class"."""
    return isinstance(name, str) and re.fullmatch(FORM, name) is not None


def load_class(name: str, base: type, where: str) -> type:
    """The subclass of `base` that `name` means; modules in the current directory are found, as `python -m` does.

    Raises `UserError`, which begins with `where`, the config's key, for what cannot be imported or is something else.
    """
    if not is_dotted(name):
        raise UserError(f'{where}: {name!r} does not name a class; write "package.module:Class"')
    module, _, attribute = name.partition(":")
    here = str(Path.cwd())
    if "" not in sys.path and here not in sys.path:
        sys.path.append(here)
    try:
        found = getattr(import_module(module), attribute, None)
    except ImportError as error:
        raise UserError(f"{where}: {module} cannot be imported ({error}); install it, or start where it is") from None
    if found is None:
        raise UserError(f"{where}: {module} has no {attribute}")
    if not (isinstance(found, type) and issubclass(found, base)):
        raise UserError(f"{where}: {name} is not a subclass of {base.__module__}.{base.__name__}")
    return found
