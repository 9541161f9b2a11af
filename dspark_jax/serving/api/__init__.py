"""The HTTP server: the engine behind OpenAI's interface, with its metrics and its page.

One thread owns the engine and steps it (`driver`); one asyncio loop talks to clients (`app`). Requests go in by
`Engine.submit`, which any thread may call, and tokens come out through a `Channel` for each HTTP request.
"""
