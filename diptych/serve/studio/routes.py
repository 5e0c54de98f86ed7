"""Where the pages are: the Studio at the root of the server, the ledger beside it."""
import asyncio
import functools

from fastapi import FastAPI
from starlette.responses import Response

from diptych.serve.studio import assemble


def add_studio(app: FastAPI) -> None:
    """`GET /` and `GET /ledger`: the same for everybody. They need no key; what the page asks the server for does."""

    @app.get("/", include_in_schema=False)
    async def studio() -> Response:
        return _html(*await asyncio.to_thread(assemble.page))

    @app.get("/ledger", include_in_schema=False)
    async def ledger() -> Response:
        answer = _html(*await asyncio.to_thread(ledger_page))
        answer.headers["x-frame-options"] = "SAMEORIGIN"  # the Studio shows it in a frame
        return answer


@functools.cache
def ledger_page() -> tuple[str, str]:
    """The page of the bundled entries and its Content-Security-Policy. Its tables say their widths in attributes."""
    from diptych.report.ledger import page_of

    page = page_of()
    rules = assemble.policy(page, "'self'").replace("style-src ", "style-src-elem ")
    return page, rules + "; style-src-attr 'unsafe-inline'"


def _html(page: str, rules: str) -> Response:
    return Response(page, media_type="text/html; charset=utf-8",
                    headers={"content-security-policy": rules, "cache-control": "no-cache"})
