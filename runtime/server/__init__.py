"""An OpenAI-compatible HTTP server over one Generator: `serve(engine_dir, ServerSettings())`.

`worker` answers requests one after another on its own thread; `app` holds the routes, `answer` what
happens in them; `schema` reads requests, `replies` writes answers; `guards` checks keys and body
sizes and logs; `listen` runs uvicorn, `connections` closes those that send no request. Prompts,
answers and keys are never logged.
"""

from runtime.server.app import create_app
from runtime.server.listen import serve
from runtime.server.settings import ServerSettings

__all__ = ["ServerSettings", "create_app", "serve"]
