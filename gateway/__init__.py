"""The public HTTP edge: OpenAI's shapes for videos and models, live progress, the studio page."""
