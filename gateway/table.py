"""Every route of the gateway."""

from gateway.chat.schemas import ChatCompletion, Completion, CreateChatCompletion, CreateCompletion
from gateway.routes import chat, content, events, stack, videos
from gateway.routing import JSON, Answer, Parameter, Route
from gateway.schemas import (
    Cluster,
    CreateVideo,
    Health,
    Model,
    ModelList,
    Readiness,
    Timeline,
    Video,
    VideoDeleted,
    VideoList,
)

_VIDEO_ID = Parameter("video_id", "path", description="The id that create answered.")
_MODEL_ID = Parameter("model", "path")
_VIDEO = "videos"
_MODELS = "models"
_LANGUAGE = "language"

_VIDEO_ROUTES = (
    Route(
        "POST",
        "/v1/videos",
        videos.create_video,
        "Make a video",
        (Answer(200, "The job, stored and queued.", Video),),
        body=CreateVideo,
        errors=(400, 404, 408, 413, 415, 429, 503, 507),
        tag=_VIDEO,
    ),
    Route(
        "GET",
        "/v1/videos",
        videos.list_videos,
        "List videos",
        (Answer(200, "A page of videos in order of creation.", VideoList),),
        parameters=(
            Parameter("limit", "query", {"type": "integer", "minimum": 1, "maximum": 100, "default": 20}),
            Parameter("after", "query", description="The last id of the page before."),
            Parameter("order", "query", {"type": "string", "enum": ["asc", "desc"], "default": "desc"}),
        ),
        errors=(400, 503),
        tag=_VIDEO,
    ),
    Route(
        "GET",
        "/v1/videos/{video_id}",
        videos.retrieve_video,
        "Where a video stands",
        (Answer(200, "The job.", Video),),
        parameters=(_VIDEO_ID,),
        errors=(404, 503),
        tag=_VIDEO,
    ),
    Route(
        "DELETE",
        "/v1/videos/{video_id}",
        videos.delete_video,
        "Delete a video with its file, cancelling it if it is not finished",
        (Answer(200, "It is gone.", VideoDeleted),),
        parameters=(_VIDEO_ID,),
        errors=(404, 503),
        tag=_VIDEO,
    ),
    Route(
        "GET",
        "/v1/videos/{video_id}/content",
        content.video_content,
        "The finished file, or pictures of it",
        (
            Answer(200, "The file.", media_types=("video/mp4", "image/webp")),
            Answer(206, "The range asked for.", media_types=("video/mp4",)),
            Answer(304, "Unchanged since the version named by If-None-Match."),
        ),
        parameters=(
            _VIDEO_ID,
            Parameter(
                "variant",
                "query",
                {"type": "string", "enum": ["video", "thumbnail", "spritesheet"], "default": "video"},
            ),
            Parameter("Range", "header"),
            Parameter("If-Range", "header"),
            Parameter("If-None-Match", "header"),
        ),
        errors=(400, 404, 409, 416, 503),
        tag=_VIDEO,
    ),
    Route(
        "GET",
        "/v1/videos/{video_id}/events",
        events.video_events,
        "Live progress as server-sent events; each one's data is a VideoEvent, after a deletion a VideoDeleted",
        (
            Answer(200, "Where the video stands, then every change until it ends.", media_types=("text/event-stream",)),
            Answer(204, "Nothing more: Last-Event-ID is that of the last event."),
        ),
        parameters=(_VIDEO_ID, Parameter("Last-Event-ID", "header")),
        errors=(404, 503),
        tag=_VIDEO,
    ),
    Route(
        "POST",
        "/v1/videos/{video_id}/cancel",
        videos.cancel_video,
        "Stop making a video",
        (Answer(200, "The job, cancelled.", Video),),
        parameters=(_VIDEO_ID,),
        errors=(404, 409, 503),
        tag=_VIDEO,
    ),
    Route(
        "GET",
        "/v1/videos/{video_id}/timeline",
        videos.video_timeline,
        "Which slot did which step",
        (Answer(200, "The spans, in no particular order.", Timeline),),
        parameters=(_VIDEO_ID,),
        errors=(404, 409, 503),
        tag=_VIDEO,
    ),
)

_LANGUAGE_ROUTES = (
    Route(
        "POST",
        "/v1/chat/completions",
        chat.create_chat_completion,
        "Answer a conversation",
        (
            Answer(
                200,
                "The answer; with 'stream', events whose data is a chat.completion.chunk, then [DONE].",
                ChatCompletion,
                media_types=("text/event-stream",),
            ),
        ),
        body=CreateChatCompletion,
        forms=False,
        errors=(400, 404, 408, 413, 415, 503),
        tag=_LANGUAGE,
    ),
    Route(
        "POST",
        "/v1/completions",
        chat.create_completion,
        "Continue a text",
        (
            Answer(
                200,
                "The continuation; with 'stream', events whose data is a part of it, then [DONE].",
                Completion,
                media_types=("text/event-stream",),
            ),
        ),
        body=CreateCompletion,
        forms=False,
        errors=(400, 404, 408, 413, 415, 503),
        tag=_LANGUAGE,
    ),
)

_MODEL_ROUTES = (
    Route(
        "GET", "/v1/models", stack.list_models, "List models", (Answer(200, "What is served.", ModelList),), tag=_MODELS
    ),
    Route(
        "GET",
        "/v1/models/{model}",
        stack.retrieve_model,
        "What a model can do",
        (Answer(200, "The model and its limits.", Model),),
        parameters=(_MODEL_ID,),
        errors=(404,),
        tag=_MODELS,
        # A model from a hub has a slash in its name.
        pattern="/v1/models/{model:.+}",
    ),
)

_STACK_ROUTES = (
    Route(
        "GET", "/v1/cluster", stack.cluster, "The stack's members", (Answer(200, "As of now.", Cluster),), errors=(503,)
    ),
    Route("GET", "/healthz", stack.healthz, "Whether the process lives", (Answer(200, "It does.", Health),)),
    Route(
        "GET",
        "/readyz",
        stack.readyz,
        "Whether the stack can do its work",
        (Answer(200, "It can.", Readiness), Answer(503, "Not yet; see 'missing'.", Readiness)),
    ),
    Route("GET", "/metrics", stack.metrics, "Prometheus metrics", (Answer(200, "Text.", media_types=("text/plain",)),)),
    Route("GET", "/openapi.json", stack.openapi, "This document", (Answer(200, "OpenAPI 3.1.", media_types=(JSON,)),)),
    Route("GET", "/", stack.studio, "The studio page", (Answer(200, "A page.", media_types=("text/html",)),)),
)

# Parts of the studio page, and what OpenAI has and this does not.
_UNDESCRIBED = (
    *(Route("GET", f"/{name}", stack.studio, "", (), described=False) for name in ("studio.css", "studio.js")),
    *(
        Route(method, path, videos.unsupported_operation, "", (), described=False)
        for method, path in (
            ("POST", "/v1/videos/edits"),
            ("POST", "/v1/videos/extensions"),
            ("POST", "/v1/videos/characters"),
            ("GET", "/v1/videos/characters/{video_id}"),
            ("POST", "/v1/videos/{video_id}/remix"),
        )
    ),
)

ROUTES = (*_UNDESCRIBED, *_VIDEO_ROUTES, *_LANGUAGE_ROUTES, *_MODEL_ROUTES, *_STACK_ROUTES)
