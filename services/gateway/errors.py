"""How failures look to a client: HTTP status and OpenAI's error object, one sentence each."""

from typing import Any

from common.errors import AtollError, Overloaded, Rejected, Retryable

RETRY_AFTER_S = 1


class ApiError(Exception):
    """A failure with its HTTP status; `param` names the field to blame, `code` is for programs."""

    def __init__(
        self, status: int, message: str, *, kind: str = "invalid_request_error",
        param: str | None = None, code: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.param = param
        self.code = code

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        return {
            "error": {
                "message": str(self),
                "type": self.kind,
                "param": self.param,
                "code": self.code,
            }
        }

    @property
    def headers(self) -> dict[str, str]:
        """What else the client should know: when to come back."""
        return {"Retry-After": str(RETRY_AFTER_S)} if self.status in (429, 503) else {}


def invalid(message: str, *, param: str | None = None, code: str | None = None) -> ApiError:
    """The request is wrong (400)."""
    return ApiError(400, message, param=param, code=code)


def unavailable(message: str, *, code: str = "unavailable") -> ApiError:
    """The service cannot do it now; the same request may work later (503)."""
    return ApiError(503, message, kind="service_unavailable", code=code)


def from_atoll(error: AtollError) -> ApiError:
    """The error tree as HTTP: overloaded 429, rejected 400, retryable 503, anything else 500."""
    match error:
        case Overloaded():
            return ApiError(429, str(error), kind="rate_limit_error", code="overloaded")
        case Rejected():
            return invalid(str(error))
        case Retryable():
            return unavailable(str(error))
        case _:
            return ApiError(500, str(error), kind="server_error", code="internal_error")
