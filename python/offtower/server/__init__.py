"""An HTTP server for exports: search, draws with known propensities, decisions as a log.

settings      limits, batching, the log of decisions
columns       contexts of a request as a table of fixed types
requests      bodies in JSON and Arrow, checked before any work
exports       the export that is served, and its replacement by a newer one
batching      requests that arrive together become one call of the retriever
decisions     served decisions in Parquet files, written by rotation
answers       results as JSON and Arrow
app           routes, token, limits and errors, for any ASGI server
process       the app in one process, until SIGTERM
"""

from offtower.server.settings import DecisionSettings, Limits, ServerSettings

__all__ = ["DecisionSettings", "Limits", "ServerSettings"]
