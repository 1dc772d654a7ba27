"""What a request must be before the app sees it, and errors in OpenAI's form."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import uuid
from collections.abc import Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Any

KEYS_VARIABLE = "HFBLEND_API_KEYS"
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_KEY = re.compile(r"[!-~]{1,512}")  # visible ASCII
_SECONDS = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?")
_HUGE = re.compile(r"[0-9](?:[0-9]{18}|[eE]\+?[0-9]{3})")  # no number without it is large
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_CODES = {
    401: "invalid_api_key",
    408: "request_timeout",
    413: "request_too_large",
    415: "unsupported_media_type",
    429: "rate_limit_exceeded",
    500: "internal_error",
    504: "deadline_exceeded",
}


class Refused(Exception):
    """A request that is answered with an error.

    Args:
        headers: of the answer, with `_` for `-`.
    """

    def __init__(self, status: int, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status, self.headers = status, {name.replace("_", "-"): value for name, value in headers.items()}

    @property
    def body(self) -> bytes:
        """The error in OpenAI's form."""
        return error_body(self.status, str(self), _CODES.get(self.status))


def openai_error(status: int, message: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """Returns an error as OpenAI's API has it."""
    kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_body(status: int, message: str, code: str | None = None) -> bytes:
    """Returns the body of an answer that is an error."""
    return json.dumps(openai_error(status, message, code)).encode()


def in_openai_form(status: int, body: bytes) -> bytes:
    """Returns the body of an error of the app: unchanged if it has OpenAI's form, else its message in that form."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):  # text, or none
        found = None
    found = found if isinstance(found, dict) else {}
    if isinstance(error := found.get("error"), dict) and isinstance(error.get("message"), str):
        return body
    message = found.get("error", found.get("detail"))
    if isinstance(message, list):  # FastAPI's, of a schema
        message = "; ".join(map(_fault, message))
    if not message or not isinstance(message, str):
        message = HTTPStatus(status).phrase if status in HTTPStatus._value2member_map_ else f"Error {status}"
    return error_body(status, message)


def _fault(found: Any) -> str:
    """A fault that a schema finds, with its place."""
    place = (
        ".".join(map(str, found["loc"][1:])) if isinstance(found, dict) and isinstance(found.get("loc"), list) else ""
    )
    message = str(found.get("msg")) if isinstance(found, dict) else str(found)
    return f"{place}: {message}" if place else message


# --- headers ----------------------------------------------------------------------------------------------------------


def request_id(headers: Mapping[str, str]) -> str:
    """Returns the client's `x-request-id`, or a new one if it has none, or one that is long or of other characters."""
    given = headers.get("x-request-id", "")
    return given if _ID.fullmatch(given) else uuid.uuid4().hex


def seconds_allowed(headers: Mapping[str, str], at_most: float) -> float:
    """Returns the deadline of a request in seconds; `x-request-timeout` may ask for less than `at_most`."""
    given = headers.get("x-request-timeout")
    if given is None:
        return at_most
    if not _SECONDS.fullmatch(given) or not float(given):
        raise Refused(400, "The header x-request-timeout takes seconds above 0, as 30 or 2.5.")
    return min(at_most, float(given))


def require_json_headers(headers: Mapping[str, str]) -> None:
    """Refuses bodies that do not say that they are JSON, and compressed ones."""
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not re.fullmatch(r"application/[\w.-]+\+json", kind):
        raise Refused(415, f"The body must be JSON: send content-type: application/json, got {kind[:80] or 'none'!r}.")
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise Refused(415, "Compressed bodies are not read: leave content-encoding out.")


# --- the body ---------------------------------------------------------------------------------------------------------


def require_json_object(body: bytes, max_depth: int) -> None:
    """Refuses all but a JSON object in UTF-8, of bounded depth, with numbers that a machine has and no name twice."""
    try:
        text = body.decode()
        # A call a number would take half of the time for a prompt of ids.
        numbers: dict[str, Any] = {"parse_float": _float, "parse_int": _int} if _HUGE.search(text) else {}
        found = json.loads(text, parse_constant=_not_a_number, object_pairs_hook=_without_twins, **numbers)
        if not isinstance(found, dict):
            raise ValueError("an object is expected")
        _require_flat(found, max_depth)
        if _SURROGATE.search(text):
            json.dumps(found, ensure_ascii=False).encode()  # half of a pair, which no encoder takes, fails here
    except (UnicodeDecodeError, UnicodeEncodeError) as error:  # before ValueError, which they are
        raise Refused(400, f"The body is not text in UTF-8: {error.reason}.") from None
    except RecursionError:
        raise Refused(400, f"The body is nested deeper than {max_depth} levels.") from None
    except ValueError as error:
        raise Refused(400, f"The body is not a JSON object as it should be: {error}.") from None


def _float(text: str) -> float:
    if math.isinf(number := float(text)):
        raise ValueError("a number is too large")
    return number


def _int(text: str) -> int:
    if len(text) > 20 or not -(2**63) <= (number := int(text)) < 2**64:
        raise ValueError("a whole number is too large")
    return number


def _not_a_number(text: str) -> None:
    raise ValueError(f"{text} is no number of JSON")


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object has a name twice")
    return found


def _require_flat(value: Any, max_depth: int) -> None:
    level = [value]
    for _ in range(max_depth):
        insides = [one.values() if isinstance(one, dict) else one for one in level]
        level = [inner for inside in insides for inner in inside if isinstance(inner, (dict, list))]
        if not level:
            return
    raise RecursionError


# --- keys -------------------------------------------------------------------------------------------------------------


def digest_of(key: str) -> bytes:
    """Returns what keys are compared by: how long that takes says nothing of a key."""
    return hashlib.sha256(key.encode()).digest()


def given_key(headers: Mapping[str, str]) -> str | None:
    """Returns the key of `Authorization: Bearer …`, else that of `x-api-key`."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else headers.get("x-api-key")


def read_api_keys(file: Path | None = None) -> dict[str, str]:
    """Reads API keys and their namespaces from a file, else from `$HFBLEND_API_KEYS`; none if neither is there."""
    if file is not None:
        return parse_api_keys(file.read_text(encoding="utf-8"), str(file))
    return parse_api_keys(os.environ.get(KEYS_VARIABLE, ""))


def parse_api_keys(text: str, source: str = KEYS_VARIABLE) -> dict[str, str]:
    """Reads `key=namespace` entries, separated by commas or lines; `#` begins a comment line.

    >>> parse_api_keys("key1=tenantA,key2=tenantB")
    {'key1': 'tenantA', 'key2': 'tenantB'}

    Raises:
        ValueError: an entry of another form, or a key twice. Messages count entries and never show a key.
    """
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    entries = [entry for line in lines for entry in map(str.strip, line.split(",")) if entry]
    keys: dict[str, str] = {}
    for i, entry in enumerate(entries, 1):
        key, equals, namespace = entry.rpartition("=")  # a key may end with =
        if not equals:
            raise ValueError(f"Entry {i} of {source} must be key=namespace; it has no =.")
        require_api_key(key.strip(), namespace.strip(), f"Entry {i} of {source}")
        if key.strip() in keys:
            raise ValueError(f"Entry {i} of {source} has the key of an earlier one; each key opens one namespace.")
        keys[key.strip()] = namespace.strip()
    return keys


def require_api_key(key: str, namespace: str, source: str) -> None:
    """Raises `ValueError` for a key that no header can carry, or a namespace of other characters."""
    if not _KEY.fullmatch(key):
        raise ValueError(f"{source} needs a key of 1 to 512 visible ASCII characters without blanks.")
    if not _ID.fullmatch(namespace):
        raise ValueError(f"{source} needs a namespace of 1 to 64 letters, digits, '.', '_' or '-', got {namespace!r}.")
