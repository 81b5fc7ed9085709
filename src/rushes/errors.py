"""Every error that Rushes raises on purpose.

::

    RushesError                      an error with a wire code and an HTTP status
    ├── MalformedRequest   400       the body is no JSON object, or a header or query makes no sense
    ├── InvalidIdentifier  400       an id that cannot be an id
    ├── Unauthorized       401       no key, a wrong key, a revoked key
    ├── InsufficientFunds  402       kept for budgets
    ├── Forbidden          403       a signed link that does not fit
    ├── NotFound           404       unknown, or another account's: existence is not disclosed
    ├── MethodNotAllowed   405
    ├── BodyTooLarge       413
    ├── RangeUnsatisfiable 416
    ├── InvalidInput       422       fields of the input do not fit; lists all of them
    ├── RateLimited        429       with Retry-After
    ├── QueueFull          429       with Retry-After
    ├── InternalError      500
    ├── StoreUnavailable   503       with Retry-After
    ├── ManifestError                a model folder that cannot be used: file, key, fix
    ├── SettingsError                a setting that cannot be used: name, value, fix
    ├── MediaError                   a file that is not what it should be (code for the wire)
    ├── EngineError                  a generation that failed (code for the wire)
    └── DirectoryInUse               another server owns the data directory

A class's docstring is its default message. ``code`` is stable: clients may branch on it.
"""

from typing import Any, ClassVar


class RushesError(Exception):
    """Something went wrong."""

    code: ClassVar[int] = 500001
    status: ClassVar[int] = 500

    def __init__(
        self,
        message: str | None = None,
        *,
        detail: list[dict[str, Any]] | None = None,
        retry_after: float | None = None,
    ) -> None:
        self.message = message or (type(self).__doc__ or "").strip()
        self.detail = detail
        self.retry_after = retry_after
        """Seconds until a new try makes sense, for ``Retry-After``; None where it makes none."""
        super().__init__(self.message)


class MalformedRequest(RushesError):
    """The body is not a JSON object."""

    code = 400003
    status = 400


class InvalidIdentifier(RushesError):
    """This is not a valid identifier."""

    code = 400001
    status = 400


class Unauthorized(RushesError):
    """Send a valid API key: `Authorization: Bearer <key>`. `rushes keys create` makes one."""

    code = 400004
    status = 401


class InsufficientFunds(RushesError):
    """The account has too little left for this request."""

    code = 400002
    status = 402


class Forbidden(RushesError):
    """This link is not valid, or no longer. Ask for the result again to get a fresh one."""

    code = 403001
    status = 403


class NotFound(RushesError):
    """There is nothing here under this name."""

    code = 404001
    status = 404


class MethodNotAllowed(RushesError):
    """This address does not take this method."""

    code = 405001
    status = 405


class BodyTooLarge(RushesError):
    """The body is larger than this server accepts."""

    code = 413001
    status = 413


class RangeUnsatisfiable(RushesError):
    """The range lies outside the file."""

    code = 416001
    status = 416


class InvalidInput(RushesError):
    """The input does not fit the model's schema."""

    code = 422001
    status = 422

    @classmethod
    def listing(cls, detail: list[dict[str, Any]]) -> "InvalidInput":
        """The error for these fields, the first three in its message."""
        messages = [str(entry["msg"]).rstrip(" .") for entry in detail]
        where = "" if len(messages) == 1 else f" in {len(messages)} places"
        text = "; ".join(messages[:3]) + ("; …" if len(messages) > 3 else "")
        return cls(
            f"The input does not fit{where}: {text}{'' if text.endswith(('?', '…')) else '.'}", detail=detail
        )


class RateLimited(RushesError):
    """Too many requests with this key. Wait, then try again."""

    code = 429001
    status = 429


class QueueFull(RushesError):
    """This key has as many waiting requests as it may have. Wait for some to finish."""

    code = 429002
    status = 429


class InternalError(RushesError):
    """The server made a mistake. The operator finds it in the log under this X-Request-Id."""

    code = 500001
    status = 500


class StoreUnavailable(RushesError):
    """The store cannot be reached or cannot write. Nothing was accepted; try again."""

    code = 503001
    status = 503

    def __init__(self, message: str | None = None, *, retry_after: float = 1.0) -> None:
        super().__init__(message, retry_after=retry_after)


class ManifestError(RushesError):
    """A model folder cannot be used."""

    def __init__(self, file: str, key: str, problem: str) -> None:
        self.file, self.key, self.problem = file, key, problem
        super().__init__(f"{file}: {key}: {problem}" if key else f"{file}: {problem}")


class SettingsError(RushesError):
    """A setting cannot be used."""


class MediaError(RushesError):
    """The file is not usable as media.

    ``reason`` is the stable word that a failed request carries as its error code, for example
    ``input_not_https``, ``input_too_large``, ``input_not_media``.
    """

    def __init__(self, reason: str, message: str) -> None:
        self.reason = reason
        super().__init__(message)


class EngineError(RushesError):
    """The engine could not generate.

    ``reason`` is the stable word that the failed request carries as its error code; ``node`` names the
    part of a workflow at fault, and ``field`` the input, where there is one; ``retryable`` says whether another
    attempt may help. ``began`` False says that the engine had not begun: with ``retryable`` the request goes back to
    the queue and the attempt is not counted. ``replace`` says that the engine cannot go on: its process is
    replaced before it gets another job.
    """

    def __init__(
        self,
        reason: str,
        message: str,
        *,
        node: str | None = None,
        retryable: bool = False,
        began: bool = True,
        replace: bool = False,
        field: str | None = None,
    ) -> None:
        self.reason, self.node, self.field, self.retryable = reason, node, field, retryable
        self.began, self.replace = began, replace
        super().__init__(message)


class DirectoryInUse(RushesError):
    """Another server runs on this data directory."""
