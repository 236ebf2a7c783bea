"""A server with OpenAI's HTTP API, around one engine: `river serve`.

    a client -> guard.py -> app.py -> schema.py: a body -> answer.py -> prepare.py: a checked request
                                                            |  ^
                                                            v  |
                                                    worker.py: the thread that steps the engine

What it needs beyond river_ext is the extra `serve`: fastapi, uvicorn and prometheus_client.
"""
