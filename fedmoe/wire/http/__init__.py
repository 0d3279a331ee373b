"""HTTP building blocks of both servers: deadlines, body limits, bearer tokens, cross-site checks, OpenAPI."""
