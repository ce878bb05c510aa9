"""The routes for the page: a read-only one for the state, one that stops idle workers, and one that tries out the devices."""

from __future__ import annotations

import asyncio
import math
from typing import Any

from aiohttp import web


def register(server: Any) -> None:
    """Add the routes to the host's ``server``. Only the first request imports the rest of the pack."""

    @server.routes.get("/asyncdiff/state")
    async def state(request: web.Request) -> web.Response:
        """Send the current run, or the last one. With ``client`` (a websocket's id), that page gets events for a while.

        ``interval``: seconds between two events; 0: no more events.
        """
        from . import progress
        from .state import state

        client, wanted = request.query.get("client"), request.query.get("interval", "0.25")
        try:
            interval = float(wanted)
        except ValueError:
            interval = math.nan
        if interval != 0 and not 0.05 <= interval <= 60:
            return _refused(400, f"interval={wanted!r}: give seconds between two events, 0.05 to 60, or 0 for none")
        if interval == 0:
            progress.WATCHERS.dismiss(client)
        elif client in server.sockets:
            progress.WATCHERS.watch(client, interval)
        return web.json_response(await asyncio.to_thread(state))

    @server.routes.post("/asyncdiff/stop")
    async def stop(request: web.Request) -> web.Response:
        """End the worker processes that wait for the next prompt."""
        from asyncdiff_nodes.host.workers.pool import POOL

        if refusal := _unless_json(request):
            return refusal
        stopped = await asyncio.to_thread(POOL.release_idle)
        if stopped is None:
            return _refused(409, "The workers are sampling: cancel the run first.")
        return web.json_response({"stopped": stopped})

    @server.routes.post("/asyncdiff/selftest")
    async def selftest(request: web.Request) -> web.Response:
        """Try out the devices for two minutes; sends the result as text."""
        from . import selftest

        if refusal := _unless_json(request):
            return refusal
        try:
            return web.json_response({"text": await selftest.run()})
        except selftest.BusyError as error:
            return _refused(409, str(error))


def _unless_json(request: web.Request) -> web.Response | None:
    """Refuse what a form on another site can send."""
    if request.content_type == "application/json":
        return None
    return _refused(415, f"Content-Type={request.content_type!r}: send application/json")


def _refused(status: int, reason: str) -> web.Response:
    return web.json_response({"error": reason}, status=status)
