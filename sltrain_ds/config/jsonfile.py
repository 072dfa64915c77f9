"""Strict JSON in: where it breaks, it says the line, the column and what to do."""

import json
import re
from pathlib import Path

from sltrain_ds.errors import UserError


def read_json(path):
    """Parse ``path`` into a dict. UserError names file, line and column; duplicate keys and NaN are refused."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; ds_configs/ holds files to start from") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a directory; give the JSON file itself") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text at byte {error.start}; save the file as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
    return parse(text, str(path))


def parse(text, name):
    """Parse JSON text whose top level is an object; ``name`` stands before every message."""
    try:
        data = json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constants)
    except json.JSONDecodeError as error:
        where = f"{name}: line {error.lineno}, column {error.colno}"
        raise UserError(f"{where}: {error.msg}; {_advice(text, error)}") from None
    except _Bad as error:
        lines = [text.count("\n", 0, m.start()) + 1 for m in re.finditer(re.escape(json.dumps(error.word)), text)]
        where = f" (lines {', '.join(map(str, lines))})" if error.duplicate and len(lines) == 2 else ""
        raise UserError(f"{name}: {error}{where}") from None
    except RecursionError:
        raise UserError(f"{name}: nested too deeply; a config needs no more than six levels") from None
    except ValueError as error:  # an integer with more digits than Python reads
        raise UserError(f"{name}: {str(error).splitlines()[0]}; write a smaller number") from None
    if not isinstance(data, dict):
        raise UserError(f'{name}: the top level must be an object, {{"train_batch_size": ...}}, not {kind(data)}')
    return data


def kind(value):
    """What a JSON value is called in messages."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true/false", type(None): "null"}
    return names.get(type(value), "a number")


def shown(value, limit=60):
    """A JSON value on one line, cut to ``limit`` characters."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= limit else text[: limit - 3] + "..."


class _Bad(ValueError):
    def __init__(self, message, word, duplicate):
        super().__init__(message)
        self.word, self.duplicate = word, duplicate


def _no_duplicates(pairs):
    seen = {}
    for key, value in pairs:
        if key in seen:
            raise _Bad(f"key {json.dumps(key)} is written twice in one object; keep one of them", key, True)
        seen[key] = value
    return seen


def _no_constants(word):
    raise _Bad(f"{word} is not JSON and no setting takes it; write a finite number", word, False)


def _advice(text, error):
    rest, before = text[error.pos :], text[: error.pos].rstrip()
    if not text.strip():
        return "the file is empty; start from one in ds_configs/"
    if rest.startswith(("//", "#", "/*")):
        return "JSON has no comments; remove it"
    if rest.startswith("'"):
        return "JSON strings take double quotes"
    if (before.endswith(",") and rest[:1] in "}]") or "Illegal trailing comma" in error.msg:
        return "remove the comma before the closing bracket"
    if rest.startswith(("True", "False", "None")):
        return "write true, false or null in lower case"
    if "delimiter" in error.msg:
        return "a comma or a closing bracket is missing just before this point"
    return (
        "the file breaks off here; close the brackets" if not rest.strip() else "check quotes, commas and brackets here"
    )
