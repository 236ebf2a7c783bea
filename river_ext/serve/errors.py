"""What the server refuses or cannot do, in the form of OpenAI's errors."""

from collections.abc import Mapping

from ..errors import RiverError

TYPES = {401: "authentication_error", 429: "rate_limit_error"}  # of other statuses: by their first digit


class ApiError(RiverError):
    """An answer that is an error."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.code, self.headers = status, code, dict(headers or {})
        self.param = None if param is None else str(RiverError(param))

    def body(self) -> dict:
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


def engine_failed(why: str) -> ApiError:
    return ApiError(503, f"the engine has failed ({why}); the server has to be started again", code="failed")
